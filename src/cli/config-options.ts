/** Every key of the configuration as an option in kebab-case, generated from the schema. */
import { type Command, InvalidArgumentError, Option } from 'commander';
import { z } from 'zod';
import { configSchema, kebab } from '../config.js';
import { HardmineError } from '../errors.js';

/** The part of a JSON schema that the configuration uses, with our own notes on nested objects. */
interface Property {
  type: 'string' | 'number' | 'integer' | 'boolean' | 'array' | 'object';
  description?: string;
  default?: unknown;
  enum?: string[];
  items?: Property;
  properties?: Record<string, Property>;
  /** Nested objects: what stands before the options of their keys. */
  optionPrefix?: string;
  /** Nested objects: what the option of the object itself sets: a number, or this key. */
  shorthand?: string;
}

/** An option and where its value goes. */
interface Binding {
  attribute: string;
  path: readonly string[];
}

function parseNumber(text: string): number {
  const value = Number(text);
  if (text.trim() === '' || !Number.isFinite(value)) {
    throw new InvalidArgumentError('Give a number.');
  }
  return value;
}

function describe(property: Property): string {
  const { description = '', default: value } = property;
  if (value === undefined || property.type === 'object' || value === false) return description;
  return `${description} (default: ${Array.isArray(value) ? value.join(',') : String(value)})`;
}

/** Adds one option for a property that is no object. */
function addOption(
  command: Command,
  flag: string,
  path: readonly string[],
  property: Property,
): Binding {
  const description = describe(property);
  let option: Option;
  if (property.type === 'boolean') {
    option = new Option(`--${flag}`, description);
    command.addOption(option);
    command.addOption(new Option(`--no-${flag}`, `not --${flag}`));
    // Without a default of its own, --no-x would set x to true when neither is given.
    command.setOptionValue(option.attributeName(), undefined);
    return { attribute: option.attributeName(), path };
  }
  const isNumber = property.type === 'number' || property.type === 'integer';
  const placeholder = property.type === 'array' ? 'list' : isNumber ? 'number' : 'value';
  option = new Option(`--${flag} <${placeholder}>`, description);
  if (property.enum) option.choices(property.enum);
  else if (property.type === 'array') {
    option.argParser((text) =>
      text
        .split(',')
        .filter((part) => part !== '')
        .map(parseNumber),
    );
  } else if (isNumber) option.argParser(parseNumber);
  command.addOption(option);
  return { attribute: option.attributeName(), path };
}

function contradiction(one: string, other: string): HardmineError {
  return new HardmineError(
    'ERR_CONFIG',
    `${one} and ${other} contradict each other: give one of the two`,
  );
}

/**
 * Adds an option for every key. The function returned picks from the parsed options those that were
 * given, as a partial configuration.
 */
export function addConfigOptions(
  command: Command,
  left_out: readonly string[] = [],
): (options: Record<string, unknown>) => Record<string, unknown> {
  const schema = z.toJSONSchema(configSchema, { io: 'input' });
  const properties = schema.properties as unknown as Record<string, Property>;
  const bindings: Binding[] = [];
  for (const [key, property] of Object.entries(properties)) {
    if (left_out.includes(key)) continue;
    if (property.type !== 'object') {
      bindings.push(addOption(command, kebab(key), [key], property));
      continue;
    }
    for (const [inner, nested] of Object.entries(property.properties ?? {})) {
      const flag =
        inner === property.shorthand ? kebab(key) : `${property.optionPrefix ?? ''}${kebab(inner)}`;
      bindings.push(addOption(command, flag, [key, inner], nested));
    }
    if (property.shorthand === 'number') {
      bindings.push(addOption(command, kebab(key), [key], { ...property, type: 'number' }));
    }
  }
  if (!left_out.includes('weighting')) {
    command.option('--hard-mining', 'short for --weighting hard-mining');
    command.option('--no-hard-mining', 'short for --weighting none');
    command.setOptionValue('hardMining', undefined);
  }

  return (options) => {
    const config: Record<string, unknown> = {};
    for (const { attribute, path } of bindings) {
      const value = options[attribute];
      if (value === undefined) continue;
      const [key, inner] = path as [string, string?];
      if (inner === undefined && config[key] !== undefined) {
        throw contradiction(`--${kebab(key)}`, `the options --${kebab(key)}-...`);
      }
      if (inner === undefined) config[key] = value;
      else config[key] = { ...(config[key] as object | undefined), [inner]: value };
    }
    if (options['hardMining'] !== undefined) {
      const on = options['hardMining'] === true;
      const kind = on ? 'hard-mining' : 'none';
      const weighting = config['weighting'] as { kind?: string } | undefined;
      if (weighting?.kind !== undefined && weighting.kind !== kind) {
        throw contradiction(`--${on ? '' : 'no-'}hard-mining`, `--weighting ${weighting.kind}`);
      }
      config['weighting'] = { ...weighting, kind };
    }
    return config;
  };
}

/** A configuration with another laid over it; nested objects are merged, strings that stand for them replaced. */
export function overlay(
  base: Record<string, unknown>,
  over: Record<string, unknown>,
): Record<string, unknown> {
  const merged: Record<string, unknown> = { ...base };
  for (const [key, value] of Object.entries(over)) {
    const below = merged[key];
    const nested = typeof value === 'object' && value !== null && !Array.isArray(value);
    if (key === 'weighting' && nested) {
      const under = typeof below === 'string' ? { kind: below } : (below as object | undefined);
      const changesKind =
        'kind' in value && (under as { kind?: unknown } | undefined)?.kind !== value.kind;
      // Parameters of one weighting mean nothing to another.
      merged[key] = changesKind ? value : { ...under, ...value };
    } else if (nested && typeof below === 'object') {
      merged[key] = { ...below, ...value };
    } else {
      merged[key] = value;
    }
  }
  return merged;
}
