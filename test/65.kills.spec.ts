import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { killAndResume } from './helpers/kills.js';
import { drawFaces } from './helpers/small-training.js';

describe('training that is killed', function () {
  // Each process starts Node and compiles the sources anew; a busy machine takes many times as long.
  this.timeout(900_000);
  let folder: string;
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-kills-'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('ends with the weights of a run that was left alone (npm run test:soak kills 50 times)', async () => {
    const figures = await killAndResume(
      {
        data: await drawFaces(join(folder, 'faces')),
        folder,
        steps: 36,
        checkpointEvery: 6,
        kills: 3,
        inSaves: 1,
        killsPerRun: 3,
        longestMs: 1500,
        seed: 2,
      },
      (line) => console.log(`      ${line}`),
    );
    assert.equal(figures.equal, figures.runs);
    assert.ok(figures.kills >= 3 && figures.inSaves >= 1);
  });
});
