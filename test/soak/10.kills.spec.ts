import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { killAndResume } from '../helpers/kills.js';
import { drawFaces } from '../helpers/small-training.js';

describe('training that is killed again and again', function () {
  this.timeout(0); // as long as it takes
  let folder: string;
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-kills-'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('ends with the weights of a run that was left alone: 50 kills, 15 of them inside a save', async () => {
    const data = await drawFaces(join(folder, 'faces'));
    const figures = await killAndResume(
      {
        data,
        folder,
        steps: 204,
        checkpointEvery: 12,
        kills: 50,
        inSaves: 15,
        killsPerRun: 17,
        longestMs: 3000,
        seed: 1,
      },
      (line) => console.log(`      ${line}`),
    );
    assert.equal(figures.equal, figures.runs);
    assert.ok(figures.kills >= 50 && figures.inSaves >= 15);
  });
});
