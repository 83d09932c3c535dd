import assert from 'node:assert/strict';
import {
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  rm,
  stat,
  truncate,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { INSTANCE } from '../src/formats/processes.js';
import type { Tensor } from '../src/formats/safetensors.js';
import {
  type CheckpointTensors,
  checkpointName,
  fileOfTensor,
  findCheckpoint,
  readCheckpointTensors,
  removeStale,
  writeCheckpoint,
} from '../src/train/checkpoint.js';
import { stateOf } from './helpers/checkpoint-state.js';
import { startOf } from './helpers/process-start.js';

const FILES = ['model.safetensors', 'head.safetensors', 'optimizer.safetensors', 'state.json'];

function tensor(...values: number[]): Tensor {
  return { dtype: 'F32', shape: [values.length], data: Float32Array.from(values) };
}

function tensorsOf(step: number): CheckpointTensors {
  return {
    model: new Map([['conv1.weight', tensor(step, 1, 2)]]),
    head: new Map([['head.weight', tensor(step, 3)]]),
    optimizer: new Map([['momentum/conv1.weight', tensor(0, step, 0)]]),
  };
}

async function flipBit(path: string, at: number): Promise<void> {
  const file = await open(path, 'r+');
  try {
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, at);
    byte[0]! ^= 1;
    await file.write(byte, 0, 1, at);
  } finally {
    await file.close();
  }
}

describe('checkpoints', () => {
  let folder: string;
  const write = (step: number, keep = 9) =>
    writeCheckpoint(folder, tensorsOf(step), stateOf(step), keep);

  beforeEach(async () => {
    folder = join(await mkdtemp(join(tmpdir(), 'hardmine-checkpoint-')), 'checkpoints');
    await mkdir(folder);
  });
  afterEach(() => rm(join(folder, '..'), { recursive: true, force: true }));

  it('come back as they were', async () => {
    const path = await write(1200);
    assert.equal(path, join(folder, 'step-00001200'));
    assert.deepEqual((await readdir(path)).sort(), ['MANIFEST.json', ...FILES].sort());
    const { found, rejected } = await findCheckpoint(folder);
    assert.deepEqual(rejected, []);
    assert.deepEqual(found, {
      path,
      state: { format: 'hardmine checkpoint 1', ...stateOf(1200) },
    });
    const tensors = await readCheckpointTensors(path);
    assert.deepEqual([...tensors.keys()], ['conv1.weight', 'head.weight', 'momentum/conv1.weight']);
    assert.deepEqual([...tensors.get('momentum/conv1.weight')!.data], [0, 1200, 0]);
  });

  it('are found nowhere when there are none', async () => {
    assert.deepEqual(await findCheckpoint(folder), { found: null, rejected: [] });
    assert.deepEqual(await findCheckpoint(join(folder, 'absent')), { found: null, rejected: [] });
  });

  it('leave the newest ones alone', async () => {
    for (const step of [1, 20, 3]) await write(step, 2);
    assert.deepEqual((await readdir(folder)).sort(), [checkpointName(3), checkpointName(20)]);
    // Beyond eight digits the order is still that of the numbers.
    await write(1_000_000_000, 2);
    assert.equal((await findCheckpoint(folder)).found?.state.step, 1_000_000_000);
  });

  it('are told from damaged ones by any bit and any byte, and the one before is taken', async () => {
    await write(1);
    for (const file of FILES) {
      const path = join(await write(2), file);
      const { size } = await stat(path);
      for (const at of [0, size >> 1, size - 1]) {
        await flipBit(path, at);
        const { found, rejected } = await findCheckpoint(folder);
        assert.equal(found?.state.step, 1, `${file}, byte ${at}`);
        assert.match(rejected.join(), new RegExp(`step-00000002.*${file}.*SHA-256`));
        await flipBit(path, at);
      }
      assert.equal((await findCheckpoint(folder)).found?.state.step, 2);
      await truncate(path, size - 1);
      const { found, rejected } = await findCheckpoint(folder);
      assert.equal(found?.state.step, 1);
      assert.match(rejected.join(), new RegExp(`${file} has ${size - 1} bytes.*${size}`));
      await rm(path);
      assert.match(
        (await findCheckpoint(folder)).rejected.join(),
        new RegExp(`${file} is missing`),
      );
    }
  });

  it('are rejected without a manifest, with one that is cut off, or with one of something else', async () => {
    await write(1);
    const manifest = join(await write(2), 'MANIFEST.json');
    const text = await readFile(manifest, 'utf8');
    for (const damaged of ['', text.slice(0, 40), '[]', '{"files":{}}', '{"files":{"a":1}}']) {
      await writeFile(manifest, damaged);
      const { found, rejected } = await findCheckpoint(folder);
      assert.equal(found?.state.step, 1);
      assert.match(rejected.join(), /MANIFEST\.json/);
    }
    await rm(manifest);
    assert.equal((await findCheckpoint(folder)).found?.state.step, 1);
  });

  it('say so when none of them is sound', async () => {
    for (const step of [1, 2]) await rm(join(await write(step), 'head.safetensors'));
    await assert.rejects(findCheckpoint(folder), {
      code: 'ERR_CHECKPOINT',
      message: /step-00000002.*step-00000001/,
    });
  });

  it('replace a damaged one of the same step', async () => {
    await rm(join(await write(5), 'head.safetensors'));
    await write(5);
    assert.equal((await findCheckpoint(folder)).found?.state.step, 5);
  });

  it('leave nothing when they cannot be written whole', async () => {
    const before = await write(1);
    const broken = tensorsOf(2);
    // A shape that its data do not fill: refused when the second file is encoded.
    broken.head.set('head.weight', { dtype: 'F32', shape: [9], data: new Float32Array(2) });
    await assert.rejects(writeCheckpoint(folder, broken, stateOf(2), 1), { code: 'ERR_INPUT' });
    assert.deepEqual(await readdir(folder), [checkpointName(1)]);
    assert.equal((await findCheckpoint(folder)).found?.path, before);
  });

  it('are not seen while they are written, and are removed when their writer is gone', async () => {
    await write(1);
    // Beyond the kernel's greatest process id, so no process has it.
    const name = (step: number, writer: string) => `${checkpointName(step)}.tmp-${writer}`;
    const parent = `${process.ppid}-${startOf(process.ppid)}`;
    const dead = [
      name(2, '4194305-1'),
      // Numbers that other processes have by now.
      name(4, `${process.pid}-1`),
      name(5, `${process.ppid}-${Number(startOf(process.ppid)) - 1}`),
      // Left by a save of this process: none is under way.
      name(6, `${INSTANCE}-old`),
    ];
    for (const path of [...dead, name(3, parent)]) await mkdir(join(folder, path));
    assert.equal((await findCheckpoint(folder)).found?.state.step, 1);
    await removeStale(folder);
    assert.deepEqual((await readdir(folder)).sort(), [checkpointName(1), name(3, parent)]);
  });

  it('keep the network, the head and the optimiser apart', () => {
    assert.equal(fileOfTensor({ name: 'conv1.weight', role: 'parameter' }), 'model');
    assert.equal(fileOfTensor({ name: 'embedding_bn.running_mean', role: 'statistic' }), 'model');
    assert.equal(fileOfTensor({ name: 'head.weight', role: 'parameter' }), 'head');
    assert.equal(fileOfTensor({ name: 'momentum/head.weight', role: 'optimizer' }), 'optimizer');
    assert.equal(fileOfTensor({ name: 'loss_scale', role: 'optimizer' }), 'optimizer');
  });
});
