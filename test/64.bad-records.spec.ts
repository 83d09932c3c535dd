import assert from 'node:assert/strict';
import { cp, mkdtemp, open, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import type { ConfigInput } from '../src/config.js';
import { openDataset } from '../src/data/dataset.js';
import { splitIdentities } from '../src/data/split.js';
import { RecordWriter } from '../src/formats/recordio.js';
import { readSafetensors } from '../src/formats/safetensors.js';
import {
  type CheckpointTensors,
  checkpointName,
  findCheckpoint,
  writeCheckpoint,
} from '../src/train/checkpoint.js';
import type { TrainerEvent } from '../src/trainer.js';
import { checkpointHashes, drawFaces, runTraining, smallConfig } from './helpers/small-training.js';

/** Two epochs of 12 steps. */
const STEPS = 24;

function ofType<Type extends TrainerEvent['type']>(events: readonly TrainerEvent[], type: Type) {
  return events.filter(
    (event): event is Extract<TrainerEvent, { type: Type }> => event.type === type,
  );
}

/** A copy of a packed set in which a byte of some images' JPEGs is another. */
async function damage(rec: string, folder: string, images: readonly number[]): Promise<string> {
  await cp(dirname(rec), folder, { recursive: true });
  const copy = join(folder, 'train.rec');
  const dataset = await openDataset(copy);
  const offsets = images.map((image) => dataset.records.offsets[image]!);
  await dataset.dispose();
  const file = await open(copy, 'r+');
  try {
    for (const offset of offsets) {
      const byte = Buffer.alloc(1);
      // In the JPEG: behind eight bytes of framing and the image header's 24.
      await file.read(byte, 0, 1, offset + 8 + 24 + 700);
      byte[0]! ^= 4;
      await file.write(byte, 0, 1, offset + 8 + 24 + 700);
    }
  } finally {
    await file.close();
  }
  return copy;
}

describe('a damaged image', function () {
  // Seconds on a quiet machine; a busy one may take many times as long.
  this.timeout(900_000);
  let folder: string;
  let sound: string;
  let data: string;
  const out = (name: string) => join(folder, name);
  const config = (name: string, more: Partial<ConfigInput> = {}): ConfigInput => ({
    ...smallConfig(data, out(name)),
    onBadRecord: 'skip',
    epochs: 2,
    ...more,
  });
  const hashes = (name: string) =>
    checkpointHashes(join(out(name), 'checkpoints', checkpointName(STEPS)));

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-bad-'));
    sound = await drawFaces(join(folder, 'faces'));
    data = await damage(sound, join(folder, 'damaged'), [41]);
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('ends the run, unless it may be skipped', async () => {
    const { error } = await runTraining(config('fails', { onBadRecord: 'fail' }));
    assert.ok(error instanceof Error && 'code' in error);
    assert.equal(error.code, 'ERR_DATA');
    assert.match(error.message, /image key 42 at byte \d+ of .*train\.rec \(label 5\).*CRC32C/);
  });

  it('is left out, told of once, and the run is the same on every run and after a resumption', async () => {
    for (const name of ['first', 'second']) {
      const { events, error } = await runTraining(config(name));
      assert.ifError(error);
      const [skipped, ...more] = ofType(events, 'skipped');
      assert.deepEqual(more, []);
      assert.ok(skipped && skipped.step >= 1 && skipped.step <= 12, 'in the first epoch');
      assert.deepEqual([skipped.file, skipped.key], [data, 42]);
      assert.match(skipped.reason, /image key 42 .* is damaged: its CRC32C/);
      const [head, line, end] = (await readFile(join(out(name), 'skipped.tsv'), 'utf8')).split(
        '\n',
      );
      assert.equal(head, 'step\tfile\tkey\tidentity\treason');
      assert.equal(line, [skipped.step, data, 42, skipped.identity, skipped.reason].join('\t'));
      assert.equal(end, '');
    }
    assert.deepEqual(await hashes('second'), await hashes('first'));

    await runTraining(
      config('stopped', { checkpointEvery: 3 }),
      (event) => event.type === 'step' && event.step >= 15,
    );
    const resumed = await runTraining(config('stopped', { checkpointEvery: 3, resume: true }));
    assert.ifError(resumed.error);
    assert.deepEqual(ofType(resumed.events, 'skipped'), [], 'it was told of before');
    assert.deepEqual(await hashes('stopped'), await hashes('first'));
    const lines = (await readFile(join(out('stopped'), 'skipped.tsv'), 'utf8')).split('\n');
    assert.equal(lines.length, 3);

    // It is the image that makes the difference, and nothing else about skipping.
    const whole = { ...config('whole'), data: sound };
    const { events, error } = await runTraining(whole);
    assert.ifError(error);
    assert.deepEqual(ofType(events, 'skipped'), []);
    assert.notDeepEqual(await hashes('whole'), await hashes('first'));
    await assert.rejects(stat(join(out('whole'), 'skipped.tsv')), { code: 'ENOENT' });
  });

  it('is one too many beyond 0.1% of the images', async () => {
    const more = await damage(sound, join(folder, 'more'), [41, 77]);
    const { error } = await runTraining({ ...config('over'), data: more });
    assert.ok(error instanceof Error && 'code' in error);
    assert.equal(error.code, 'ERR_DATA');
    assert.match(error.message, /more than the 1 images that may be skipped.*CRC32C/i);
  });

  it('is left out of the held-out identities too, before the first step', async () => {
    const dataset = await openDataset(sound);
    const { validation } = splitIdentities(dataset, { seed: 1 });
    await dataset.dispose();
    const held = validation.images[3]!;
    const path = await damage(sound, join(folder, 'held'), [held]);
    const { events, error } = await runTraining({
      ...config('held-out', { validation: 'identities', epochs: 1 }),
      data: path,
    });
    assert.ifError(error);
    const [skipped] = ofType(events, 'skipped');
    assert.deepEqual([skipped?.step, skipped?.key], [0, held + 1]);
    assert.equal(ofType(events, 'validation').length, 1);
  });

  it('names the identity that it leaves with fewer than two', async () => {
    const dataset = await openDataset(sound);
    const writer = await RecordWriter.create(join(folder, 'pair', 'train'));
    try {
      // Of the first person two images, of the others all.
      for (const [i, label] of dataset.labels.entries()) {
        if (label > 0 || i < 2) await writer.add(label, await dataset.records.jpeg(i));
      }
      await writer.finish(dataset.names);
    } finally {
      await dataset.dispose();
    }
    const path = await damage(join(folder, 'pair', 'train.rec'), join(folder, 'single'), [1]);
    const { events, error } = await runTraining({ ...config('single-run'), data: path });
    assert.ifError(error);
    const warnings = ofType(events, 'warning').filter(({ kind }) => kind === 'identity');
    assert.equal(warnings.length, 1);
    assert.match(warnings[0]!.message, /has 1 sound image\(s\) left/);
    assert.ok(warnings[0]!.message.includes(ofType(events, 'skipped')[0]!.identity));
  });

  it('is one thing, a weight that is not a number another: step and last good checkpoint are named', async () => {
    const name = { data: sound, epochs: 1 };
    assert.ifError((await runTraining(config('nan', name))).error);
    const checkpoints = join(out('nan'), 'checkpoints');
    const { found } = await findCheckpoint(checkpoints);
    const tensors: CheckpointTensors = { model: new Map(), head: new Map(), optimizer: new Map() };
    for (const file of ['model', 'head', 'optimizer'] as const) {
      const read = await readSafetensors(join(found!.path, `${file}.safetensors`));
      for (const [key, tensor] of read.tensors) tensors[file].set(key, tensor);
    }
    tensors.model.get('layer2.0.conv1.weight')!.data[5] = Number.NaN;
    const { format: _, ...state } = found!.state;
    // A sound checkpoint of a broken network, one step on.
    const path = await writeCheckpoint(
      checkpoints,
      tensors,
      { ...state, step: 13, epoch: 2, stepInEpoch: 1 },
      9,
    );
    const { error } = await runTraining(config('nan', { ...name, epochs: 2, resume: true }));
    assert.ok(error instanceof Error && 'code' in error);
    assert.equal(error.code, 'ERR_NON_FINITE');
    assert.match(error.message, /^step 14, the last good checkpoint is .*layer2\.0\.conv1/);
    assert.ok(error.message.includes(path));
  });
});
