// The raw binding, called with any values: typed errors, no crash, no hang. test/soak has more calls.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { loadAddon } from '../src/native.js';
import { callWithAnything } from './helpers/hostile-calls.js';
import { packColours } from './helpers/packed-colours.js';

describe('the raw binding', () => {
  it('has a typed error for any value in any place of 1,500 calls', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'hardmine-hostile-'));
    try {
      const files = await packColours(folder, 5, 4);
      const outcomes = await callWithAnything(loadAddon('cpu'), files, 1500);
      // The calls go deep: some are done, some are refused, some throw what the caller threw.
      for (const outcome of ['done', 'ERR_INPUT', 'planted']) {
        assert.ok((outcomes[outcome] ?? 0) > 0, JSON.stringify(outcomes));
      }
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
