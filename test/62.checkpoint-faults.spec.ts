import assert from 'node:assert/strict';
import { cp, mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { HardmineError } from '../src/errors.js';
import { removeAbandonedFiles, writeFileAtomic } from '../src/formats/atomic.js';
import {
  type CheckpointTensors,
  checkpointName,
  findCheckpoint,
  readCheckpointTensors,
  removeStale,
  writeCheckpoint,
} from '../src/train/checkpoint.js';
import { stateOf } from './helpers/checkpoint-state.js';
import { damageEverywhere } from './helpers/damage.js';
import { type FaultPlan, withFaults } from './helpers/file-faults.js';
import { startOf } from './helpers/process-start.js';

/** Three tensors of about 5 KB, so that their files have two blocks of 4 KiB. */
function tensorsOf(step: number): CheckpointTensors {
  const tensor = (shift: number) => ({
    dtype: 'F32' as const,
    shape: [1200],
    data: Float32Array.from({ length: 1200 }, (_, i) => Math.sin(i + shift + step)),
  });
  return {
    model: new Map([['conv1.weight', tensor(0)]]),
    head: new Map([['head.weight', tensor(1)]]),
    optimizer: new Map([['momentum/conv1.weight', tensor(2)]]),
  };
}

const NONE: FaultPlan = { fault: 'refused', at: Number.POSITIVE_INFINITY, onwards: false };
const PLANS: Omit<FaultPlan, 'at'>[] = [
  { fault: 'refused', onwards: false },
  { fault: 'done', onwards: false },
  { fault: 'short', onwards: false },
  { fault: 'refused', onwards: true },
];

describe('a checkpoint', function () {
  this.timeout(120_000);
  let root: string;
  before(async () => {
    root = await mkdtemp(join(tmpdir(), 'hardmine-faults-'));
  });
  after(() => rm(root, { recursive: true, force: true }));

  it('survives the failure of any file operation of the next save', async () => {
    const start = join(root, 'start');
    for (const step of [1, 2]) await writeCheckpoint(start, tensorsOf(step), stateOf(step), 2);
    /** What is there must be a whole checkpoint: 2, or 3 when the fault came after the rename. */
    const check = async (folder: string, about: string): Promise<number> => {
      const { found, rejected } = await findCheckpoint(folder);
      assert.deepEqual(rejected, [], about);
      assert.ok(found, about);
      const { step } = found.state;
      assert.ok(step === 2 || step === 3, about);
      assert.deepEqual(found.state, { format: 'hardmine checkpoint 1', ...stateOf(step) }, about);
      const tensors = await readCheckpointTensors(found.path);
      for (const map of Object.values(tensorsOf(step))) {
        for (const [name, tensor] of map) assert.deepEqual(tensors.get(name), tensor, about);
      }
      return step;
    };
    const save = (folder: string, plan: FaultPlan) =>
      withFaults(plan, () => writeCheckpoint(folder, tensorsOf(3), stateOf(3), 2));
    const rehearsal = join(root, 'rehearsal');
    await cp(start, rehearsal, { recursive: true });
    const { operations, error } = await save(rehearsal, NONE);
    assert.ifError(error);
    assert.equal(await check(rehearsal, 'no fault'), 3);
    // Five files, each opened, written, flushed and closed; two folders flushed; and the rest.
    assert.ok(operations.length >= 30);
    const kinds = ['close', 'mkdir', 'open', 'rename', 'rm', 'sync', 'write'];
    assert.deepEqual([...new Set(operations)].sort(), kinds);

    let faults = 0;
    for (const plan of PLANS) {
      for (const [at, name] of operations.entries()) {
        if (plan.fault === 'short' && name !== 'write') continue;
        const about = `${name}, operation ${at}, ${plan.fault}${plan.onwards ? ' and all after it' : ''}`;
        const folder = join(root, `${plan.fault}-${plan.onwards}-${at}`);
        await cp(start, folder, { recursive: true });
        const failed = await save(folder, { ...plan, at });
        faults++;
        assert.ok(failed.error instanceof HardmineError, `${about}: ${String(failed.error)}`);
        assert.equal(failed.error.code, 'ERR_IO', about);
        assert.ok(failed.error.message.includes(folder), `${about}: ${failed.error.message}`);
        await check(folder, about);
        // The next start, and the save that failed.
        await removeStale(folder);
        for (const entry of await readdir(folder)) assert.match(entry, /^step-\d{8}$/, about);
        assert.ifError((await save(folder, NONE)).error);
        const names = [checkpointName(2), checkpointName(3)];
        assert.deepEqual((await readdir(folder)).sort(), names, about);
        await rm(folder, { recursive: true });
      }
    }
    console.log(`      ${faults} faults planted, one a save`);
  });

  it('is found damaged wherever it is cut or a bit of it is flipped', async () => {
    const folder = join(root, 'damage');
    for (const step of [1, 2]) await writeCheckpoint(folder, tensorsOf(step), stateOf(step), 9);
    const { cuts, flips } = await damageEverywhere(folder, checkpointName(2), 1, 300);
    console.log(`      ${cuts} cuts and ${flips} flipped bits, each detected`);
    // Three files of two blocks, two of less than one.
    assert.deepEqual([cuts, flips], [8, 300]);
  });
});

describe('a file of a run', () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-faults-'));
  });
  afterEach(() => rm(folder, { recursive: true, force: true }));

  it('is the old one or the new one whichever file operation fails', async () => {
    const path = join(folder, 'config.json');
    for (const plan of PLANS) {
      for (let at = 0; ; at++) {
        await writeFile(path, 'old');
        const { operations, error } = await withFaults({ ...plan, at }, () =>
          writeFileAtomic(path, ['new ', 'content']),
        );
        if (operations.length <= at) {
          assert.ifError(error);
          assert.equal(await readFile(path, 'utf8'), 'new content');
          break;
        }
        const about = `${operations[at]}, operation ${at}, ${plan.fault}`;
        assert.ok(error instanceof HardmineError && error.code === 'ERR_IO', about);
        assert.ok(error.message.includes(path), about);
        assert.match(await readFile(path, 'utf8'), /^(old|new content)$/, about);
        if (!plan.onwards) assert.deepEqual(await readdir(folder), ['config.json'], about);
        else
          for (const name of await readdir(folder))
            if (name !== 'config.json') await rm(join(folder, name));
      }
    }
  });

  it('leaves nothing of a writer that was killed', async () => {
    const left = [
      // Beyond the kernel's greatest process id, so no process has it.
      '.best.safetensors.4194305-1-0123abcd.tmp',
      // Of the number that this process or another has by now: in a container, every run may have the same.
      `.last.safetensors.${process.pid}-1-0123abcd.tmp`,
      `.metrics.jsonl.${process.ppid}-${Number(startOf(process.ppid)) - 1}-0123abcd.tmp`,
    ];
    const kept = [
      `.config.json.${process.ppid}-${startOf(process.ppid)}-0123abcd.tmp`,
      `.report.html.${process.pid}-${startOf(process.pid)}-0123abcd.tmp`,
    ];
    for (const name of [...left, ...kept]) await writeFile(join(folder, name), '');
    await mkdir(join(folder, 'checkpoints'));
    await removeAbandonedFiles(folder);
    assert.deepEqual((await readdir(folder)).sort(), [...kept, 'checkpoints']);
    assert.ok((await stat(join(folder, 'checkpoints'))).isDirectory());
  });
});
