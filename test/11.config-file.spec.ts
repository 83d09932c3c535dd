import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { resolveConfig } from '../src/config.js';
import { configJsonSchema, readConfigFile } from '../src/config-file.js';

describe('configuration files', () => {
  let folder: string;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-config-'));
  });

  after(() => rm(folder, { recursive: true, force: true }));

  async function read(text: string | Buffer): Promise<Record<string, unknown>> {
    const path = join(folder, 'config.json');
    await writeFile(path, text);
    return readConfigFile(path);
  }

  it('may have comments, trailing commas, a byte order mark and the schema that the editor uses', async () => {
    const text = `\uFEFF// The paper's settings
    {
      "$schema": "./config.schema.json", /* for
      the editor */
      "data": "faces // not a comment",
      "milestones": [8, 12, 16,],
      "weighting": { "kind": "none" },
    }`;
    assert.deepEqual(await read(text), {
      data: 'faces // not a comment',
      milestones: [8, 12, 16],
      weighting: { kind: 'none' },
    });
  });

  it('are read as JSON.parse reads them', async () => {
    const text =
      '{"a":[1,-2.5e3,true,false,null,"\\u00e9\\n\\"",{}],"__proto__":{"lr":1},"constructor":2}';
    const found = await read(text);
    assert.deepEqual(found, JSON.parse(text));
    assert.deepEqual(Object.keys(found), ['a', '__proto__', 'constructor']);
    assert.throws(() => resolveConfig(found), { code: 'ERR_CONFIG' });
  });

  it('are refused with line and column', async () => {
    const wrong: [string | Buffer, RegExp][] = [
      ['{\n  "lr": 0.1\n  "batch": 4\n}', /config\.json, line 3, column 3: .*comma expected/],
      ['{\n"lr": .1 }', /line 2, column 7: .*invalid symbol/],
      ['{"lr": 0.1', /line 1, column 11: .*close brace expected/],
      ['{"lr": 0.1,\n "lr": 0.2}', /line 2, column 2: the key "lr" stands here a second time/],
      ['{"augment": {"crop": 1, "crop": 1}}', /line 1, column 25: .*"crop"/],
      ['[1]', /line 1, column 1: expected a JSON object/],
      ['"text"', /expected a JSON object/],
      ['', /line 1, column 1: /],
      ['{} {}', /line 1, column 4: .*end of file expected/],
      [`{"a":${'['.repeat(500_000)}`, /line 1, column 1: brackets nest deeper/],
      [Buffer.from([0xff, 0xfe, 0x7b, 0]), /line 1, column 1: /],
    ];
    for (const [text, message] of wrong) {
      await assert.rejects(read(text), (error: Error & { code?: string }) => {
        assert.equal(error.code, 'ERR_CONFIG');
        assert.match(error.message, message);
        assert.doesNotMatch(error.message, /\n/);
        return true;
      });
    }
    await assert.rejects(readConfigFile(join(folder, 'absent.json')), { code: 'ERR_CONFIG' });
  });

  it('have the schema that stands beside package.json', () => {
    const path = new URL('../config.schema.json', import.meta.url);
    assert.deepEqual(
      JSON.parse(readFileSync(path, 'utf8')),
      JSON.parse(JSON.stringify(configJsonSchema())),
      'config.schema.json is old: run `node scripts/setup.mjs && node scripts/config-schema.mjs`',
    );
  });

  it('have a schema that knows every key, the short forms and the defaults', () => {
    const schema = JSON.parse(JSON.stringify(configJsonSchema())) as {
      additionalProperties: boolean;
      properties: Record<
        string,
        { default?: unknown; description?: string; anyOf?: { type: string; enum?: string[] }[] }
      >;
    };
    assert.equal(schema.additionalProperties, false);
    const { $schema: own, ...properties } = schema.properties;
    assert.deepEqual(own, { type: 'string' });
    const config: Record<string, unknown> = { ...resolveConfig({ data: 'a', out: 'b' }) };
    for (const [key, { default: value, description }] of Object.entries(properties)) {
      assert.ok(description, key);
      if (value !== undefined && key !== 'weighting') assert.deepEqual(config[key], value, key);
    }
    for (const key of Object.keys(config)) assert.ok(key in properties, key);
    assert.deepEqual(
      properties['lambda']?.anyOf?.map(({ type }) => type),
      ['number', 'object'],
    );
    assert.deepEqual(
      properties['weighting']?.anyOf?.map((form) => form.enum ?? form.type),
      [['hard-mining', 'knot-magnify', 'none'], 'object'],
    );
  });
});
