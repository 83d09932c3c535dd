// How processes and threads that train end, whatever they do at that moment: with the code that was asked
// for, without a word on stderr, never by a signal of their own. test/soak has the whole matrix, five
// times, and the times.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ACTIVITIES, ENDS, endProcess } from './helpers/exits.js';
import { drawFaces } from './helpers/small-training.js';

describe('a process that trains', function () {
  this.timeout(120_000);
  let folder: string;
  let data: string;
  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-exits-'));
    data = await drawFaces(join(folder, 'faces'));
  });
  after(() => rmSync(folder, { recursive: true, force: true }));

  // Every end once and every activity at least once.
  for (const [i, end] of ENDS.entries()) {
    const activity = ACTIVITIES[(i + 1) % ACTIVITIES.length] ?? 'step';
    it(`ends by ${end} in the middle of: ${activity}`, async () => {
      await endProcess(end, activity, data, folder);
    });
  }
});
