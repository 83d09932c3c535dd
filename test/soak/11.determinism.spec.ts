import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { checkpointName } from '../../src/train/checkpoint.js';
import {
  checkpointHashes,
  drawFaces,
  runTraining,
  smallConfig,
} from '../helpers/small-training.js';

const STEPS = 108; // 9 epochs of 12

describe('two runs of one seed', function () {
  this.timeout(600_000); // half a minute each when alone
  let folder: string;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-determinism-'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  for (const threads of [1, 2]) {
    it(`have the same weights after ${STEPS} steps with ${threads} threads`, async () => {
      const data = await drawFaces(join(folder, `faces-${threads}`));
      const hashes = [];
      for (const run of ['first', 'second']) {
        const out = join(folder, `${run}-${threads}`);
        const schedule = { epochs: 9, milestones: [2], marginWarmUp: 2, checkpointEvery: STEPS };
        const { error } = await runTraining({ ...smallConfig(data, out), ...schedule, threads });
        assert.ifError(error);
        hashes.push(await checkpointHashes(join(out, 'checkpoints', checkpointName(STEPS))));
      }
      console.log(`      ${JSON.stringify(hashes)}`);
      assert.deepEqual(hashes[1], hashes[0]);
    });
  }
});
