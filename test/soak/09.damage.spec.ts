import assert from 'node:assert/strict';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { checkpointName, writeCheckpoint } from '../../src/train/checkpoint.js';
import { stateOf } from '../helpers/checkpoint-state.js';
import { damageEverywhere } from '../helpers/damage.js';
import { drawFaces, runTraining, smallConfig } from '../helpers/small-training.js';

describe('a whole checkpoint', function () {
  this.timeout(0); // as long as it takes
  let folder: string;
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-damage-'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('is found damaged wherever it is cut at a block or one of 1,000 bits is flipped', async () => {
    const data = await drawFaces(join(folder, 'faces'));
    const out = join(folder, 'run');
    const { error } = await runTraining({
      ...smallConfig(data, out),
      epochs: 1,
      checkpointEvery: 6,
    });
    assert.ifError(error);
    const checkpoints = join(out, 'checkpoints');
    const [earlier, newest] = (await readdir(checkpoints)).sort() as [string, string];
    // The one to fall back on is read after every damage: one of no tensors in place of 90 MB.
    await rm(join(checkpoints, earlier), { recursive: true });
    const empty = new Map();
    const none = { model: empty, head: empty, optimizer: empty };
    await writeCheckpoint(checkpoints, none, stateOf(1), 9);
    assert.deepEqual((await readdir(checkpoints)).sort(), [checkpointName(1), newest]);
    const { cuts, flips } = await damageEverywhere(checkpoints, newest, 1, 1000);
    console.log(`      ${cuts} cuts and ${flips} flipped bits, each detected`);
    assert.ok(cuts > 20_000 && flips === 1000);
  });
});
