/** Configuration files: JSON with comments and trailing commas (JSONC), and the JSON Schema that editors check them by. */
import { type Node, type ParseError, parseTree, printParseErrorCode } from 'jsonc-parser';
import { z } from 'zod';
import { configSchema, MAX_CONFIG_BYTES } from './config.js';
import { readFileBounded } from './data/files.js';
import { HardmineError, oneLine, quote } from './errors.js';

/**
 * The keys and values of a configuration file, not checked against the schema yet (resolveConfig does
 * that). The key `$schema` is left out: it is a note to the user's editor.
 *
 * @throws HardmineError ERR_CONFIG with line and column for what is no JSONC, and for a key that stands
 *   twice
 */
export async function readConfigFile(path: string): Promise<Record<string, unknown>> {
  let text: string;
  try {
    text = (await readFileBounded(path, MAX_CONFIG_BYTES, 'a configuration')).toString('utf8');
  } catch (cause) {
    throw new HardmineError(
      'ERR_CONFIG',
      `the configuration ${path} cannot be read: give the path of a JSON file`,
      { cause },
    );
  }
  text = text.replace(/^\uFEFF/, '');
  const refuse = (offset: number, what: string): HardmineError => {
    const before = text.slice(0, offset).split('\n');
    return new HardmineError(
      'ERR_CONFIG',
      `the configuration ${path}, line ${before.length}, column ${before.at(-1)!.length + 1}: ${oneLine(what)}: mend it there`,
    );
  };
  const errors: ParseError[] = [];
  let config: unknown;
  try {
    const root = parseTree(text, errors, { allowTrailingComma: true });
    const [error] = errors;
    if (error !== undefined) {
      const code = printParseErrorCode(error.error).replace(/(?<=[a-z])[A-Z]/g, ' $&');
      throw refuse(error.offset, `this is no JSON (${code.toLowerCase()})`);
    }
    config = root && nodeValue(root, refuse);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw refuse(0, 'brackets nest deeper than the stack is');
  }
  if (config === null || typeof config !== 'object' || Array.isArray(config)) {
    throw refuse(0, 'expected a JSON object of keys and values');
  }
  const { $schema: _, ...rest } = config as Record<string, unknown>;
  return rest;
}

/** The value of a node; `__proto__` is a key as any other, and a key that stands twice is refused. */
function nodeValue(node: Node, refuse: (offset: number, what: string) => Error): unknown {
  const children = node.children ?? [];
  if (node.type === 'array') return children.map((child) => nodeValue(child, refuse));
  if (node.type !== 'object') return node.value;
  const entries = new Map<string, unknown>();
  for (const property of children) {
    const [key, value] = property.children as [Node, Node];
    const name = String(key.value);
    if (entries.has(name)) {
      throw refuse(key.offset, `the key ${quote(name)} stands here a second time`);
    }
    entries.set(name, nodeValue(value, refuse));
  }
  return Object.fromEntries(entries);
}

/**
 * The JSON Schema (draft 2020-12) of a configuration file. It says of each key what it means, its type,
 * range and default; which keys a loss or a weighting has, only resolveConfig knows.
 */
export function configJsonSchema(): object {
  const { properties } = z.toJSONSchema(configSchema, {
    io: 'input',
    override: ({ jsonSchema }) => {
      const { optionPrefix: _, shorthand, ...schema } = jsonSchema as z.core.JSONSchema.BaseSchema;
      for (const key of Object.keys(jsonSchema)) Reflect.deleteProperty(jsonSchema, key);
      if (shorthand === undefined) {
        Object.assign(jsonSchema, schema);
        return;
      }
      const { description, default: value, ...object } = schema;
      const short =
        shorthand === 'number'
          ? { type: 'number', minimum: 0 }
          : schema.properties?.[String(shorthand)];
      Object.assign(jsonSchema, { description, default: value, anyOf: [short, object] });
    },
  });
  return {
    $schema: 'https://json-schema.org/draft/2020-12/schema',
    title: "hardmine's configuration of a training run",
    type: 'object',
    // `data` and `out` are needed too, but may be given as options.
    properties: { $schema: { type: 'string' }, ...properties },
    additionalProperties: false,
  };
}
