// The whole matrix of ends and activities, five times (test/09.exits.spec.ts has each end once).
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ACTIVITIES, ENDS, endProcess } from '../helpers/exits.js';
import { drawFaces } from '../helpers/small-training.js';

const RUNS = 5;
/**
 * From the request to the end of the process: one step of this network, tens of milliseconds, and Node's
 * own end. Ends that save first are not asked to keep it: they wait for the disk.
 */
const EXIT_MS = 500;
const SAVES_FIRST = new Set(['end']);

describe('a process that trains', function () {
  this.timeout(600_000);
  let folder: string;
  let data: string;
  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-exits-'));
    data = await drawFaces(join(folder, 'faces'));
  });
  after(() => rmSync(folder, { recursive: true, force: true }));

  for (const end of ENDS) {
    for (const activity of ACTIVITIES) {
      it(`ends by ${end} in the middle of: ${activity}`, async function () {
        const times: number[] = [];
        for (let i = 0; i < RUNS; i++) times.push(await endProcess(end, activity, data, folder));
        const sorted = times.sort((a, b) => a - b);
        if (this.test) this.test.title += ` (${sorted.join(', ')} ms)`;
        // The median: another process of the machine may hold up one of them.
        const median = sorted[Math.floor(RUNS / 2)] ?? 0;
        if (!SAVES_FIRST.has(end)) assert.ok(median <= EXIT_MS, `${median} ms`);
      });
    }
  }
});
