// As test/08.hostile-calls.spec.ts, with more calls.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { loadAddon } from '../../src/native.js';
import { callWithAnything } from '../helpers/hostile-calls.js';
import { packColours } from '../helpers/packed-colours.js';

describe('the raw binding', () => {
  it('has a typed error for any value in any place of 10,000 calls', async function () {
    this.timeout(600_000);
    const folder = mkdtempSync(join(tmpdir(), 'hardmine-hostile-'));
    try {
      const files = await packColours(folder, 5, 4);
      const outcomes = await callWithAnything(loadAddon('cpu'), files, 10_000);
      if (this.test) this.test.title += `: ${JSON.stringify(outcomes)}`;
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
