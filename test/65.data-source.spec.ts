// Trainers fed by a program's own async iterator instead of a data set.
import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { openDataset } from '../src/data/dataset.js';
import { generateFaces } from '../src/data/generated-faces.js';
import { type DataSource, HardmineError, type Samples } from '../src/index.js';
import { checkpointName } from '../src/train/checkpoint.js';
import { batchesOf } from '../src/train/data-source.js';
import { Trainer, type TrainerInput } from '../src/trainer.js';
import { checkpointHashes, runTraining, smallConfig } from './helpers/small-training.js';

const PEOPLE = 4;
const EACH = 3;
const BATCH = 2;
const SIDE = 112; // pixels
const IMAGE = SIDE * SIDE * 3;
/** An odd number, so that an epoch leaves a sample over. */
const COUNT = PEOPLE * EACH - 1;
const STEPS = 5;

/** core/random.h anew, with BigInt. */
const mask = (x: bigint): bigint => BigInt.asUintN(64, x);
function mix(value: bigint): bigint {
  let x = mask(value + 0x9e3779b97f4a7c15n);
  x = mask((x ^ (x >> 30n)) * 0xbf58476d1ce4e5b9n);
  x = mask((x ^ (x >> 27n)) * 0x94d049bb133111ebn);
  return x ^ (x >> 31n);
}
function draw(purpose: string, epoch: number, index: number, below: number): number {
  let stream = 0xcbf29ce484222325n;
  for (const byte of Buffer.from(purpose)) stream = mask((stream ^ BigInt(byte)) * 0x100000001b3n);
  stream ^= mix(BigInt(epoch));
  const seed = 1n;
  const bits = mix(mix(mix(seed) ^ stream) ^ BigInt(index));
  return Number((bits * BigInt(below)) >> 64n);
}

/** The order in which the decode ring goes through `count` images in an epoch, under seed 1. */
function ringOrder(count: number, epoch: number): number[] {
  const order = Array.from({ length: count }, (_, i) => i);
  for (let i = count - 1; i > 0; i--) {
    const j = draw('epoch order', epoch, i, i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}

function mirrored(image: Uint8Array): Uint8Array {
  const out = new Uint8Array(IMAGE);
  for (let y = 0; y < SIDE; y++) {
    for (let x = 0; x < SIDE; x++) {
      const from = (y * SIDE + x) * 3;
      out.set(image.subarray(from, from + 3), (y * SIDE + SIDE - 1 - x) * 3);
    }
  }
  return out;
}

describe('training from a source of one’s own', function () {
  this.timeout(300_000);
  let folder: string;
  let rec: string;
  let pixels: Uint8Array;
  let labels: Int32Array;
  let runs = 0;
  const config = (more: Partial<TrainerInput>): TrainerInput => ({
    ...smallConfig(rec, join(folder, `run-${runs++}`)),
    batch: BATCH,
    epochs: 2,
    threads: 1,
    precision: 'fp32',
    augment: { flip: false },
    // Files of 90 MB are written at the end alone.
    validateEvery: 2,
    checkpointEvery: 1000,
    ...more,
  });
  const pick = (index: number): Samples => ({
    images: pixels.subarray(index * IMAGE, (index + 1) * IMAGE),
    labels: labels.subarray(index, index + 1),
  });
  const hashesOf = (out: string, step: number) =>
    checkpointHashes(join(out, 'checkpoints', checkpointName(step)));

  /** Gives the images in the ring's order, one, two or three at a time. */
  function source(more: Partial<DataSource> = {}): DataSource & { calls: [number, number][] } {
    const calls: [number, number][] = [];
    return {
      name: 'faces in memory',
      images: COUNT,
      identities: PEOPLE,
      calls,
      async *samples(epoch, from) {
        calls.push([epoch, from]);
        const order = ringOrder(COUNT, epoch);
        for (let at = from, size = 1; at < COUNT; at += size, size = (size % 3) + 1) {
          const chunk = order.slice(at, at + size).map(pick);
          yield {
            images: new Uint8Array(Buffer.concat(chunk.map(({ images }) => images))),
            labels: Int32Array.from(chunk, (one) => one.labels[0]!),
          };
        }
      },
      ...more,
    };
  }

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-source-'));
    rec = await generateFaces({
      identities: PEOPLE,
      imagesPerIdentity: EACH,
      seed: 3,
      out: join(folder, 'faces'),
    });
    const dataset = await openDataset(rec);
    pixels = await dataset.records.decode(Int32Array.from(dataset.labels.keys()));
    labels = dataset.labels;
    await dataset.dispose();
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('gives the bits that its images give from a data set, two Trainers at work in one process', async () => {
    const whole = PEOPLE * EACH;
    const order = source({
      images: whole,
      samples: (epoch) => ringOrder(whole, epoch).map(pick),
    });
    const steps = Math.floor(whole / BATCH) * 2;
    const [one, two] = [config({}), config({ data: order })];
    const ended = await Promise.all([one, two].map((each) => runTraining(each)));
    for (const { error } of ended) assert.ifError(error);
    assert.deepEqual(await hashesOf(two.out, steps), await hashesOf(one.out, steps));
    const written = JSON.parse(await readFile(join(two.out, 'config.json'), 'utf8')) as object;
    assert.equal(Reflect.get(written, 'data'), 'faces in memory');
    assert.equal(Reflect.get(written, 'validation'), 'none');
  });

  it('augments by the sample’s place in the epoch', async () => {
    const flipped = config({ data: source(), epochs: 1, augment: { flip: true } });
    const plain = source({
      *samples(epoch) {
        for (const [at, index] of ringOrder(COUNT, epoch).entries()) {
          const sample = pick(index);
          const flips = draw('augmentation', epoch, 3 * at, 2) === 1;
          yield flips ? { ...sample, images: mirrored(sample.images) } : sample;
        }
      },
    });
    const before = config({ data: plain, epochs: 1 });
    for (const each of [flipped, before]) assert.ifError((await runTraining(each)).error);
    assert.deepEqual(await hashesOf(flipped.out, STEPS), await hashesOf(before.out, STEPS));
  });

  it('goes on in mid-epoch to the same bits', async () => {
    const whole = config({ data: source() });
    const controller = new AbortController();
    const inner = source();
    const first = {
      ...inner,
      // Three batches are under way at most, so the first step of the epoch is done and the last is not.
      async *samples(epoch: number, from: number, signal: AbortSignal) {
        let given = from;
        for await (const chunk of inner.samples(epoch, from, signal)) {
          given += chunk.labels.length;
          if (epoch === 2 && given > (STEPS - 1) * BATCH) controller.abort();
          yield chunk;
        }
      },
    };
    const stopped = config({ data: first });
    assert.ifError((await runTraining(whole)).error);
    const { events, error } = await runTraining(stopped, () => false, controller);
    assert.equal((error as { code?: string } | null)?.code, 'ERR_ABORTED');
    const last = events.at(-1);
    assert.ok(last?.type === 'checkpoint');
    assert.ok(last.step > STEPS && last.step < 2 * STEPS, `stopped after step ${last.step}`);
    const again = source();
    const resumed = await runTraining({ ...stopped, data: again, resume: true });
    assert.ifError(resumed.error);
    assert.deepEqual(first.calls, [
      [1, 0],
      [2, 0],
    ]);
    assert.deepEqual(again.calls, [[2, (last.step - STEPS) * BATCH]]);
    const [expected, found] = await Promise.all(
      [whole, stopped].map(({ out }) => hashesOf(out, 2 * STEPS)),
    );
    assert.deepEqual(found, expected);
    // Another source is another run.
    await assert.rejects(
      Trainer.create({ ...stopped, data: source({ name: 'others' }), resume: true }),
      { code: 'ERR_CONFIG', message: /others is not the data that the run was started with/ },
    );
  });

  describe('refuses', () => {
    const image = new Uint8Array(IMAGE);
    const one = (label: number): Samples => ({ images: image, labels: Int32Array.of(label) });
    const wrong: Record<string, [samples: unknown, message: RegExp]> = {
      'what is no iterable': [42, /"faces in memory" failed in epoch 1 \(.*returned no iterable/],
      'what is no samples': [[undefined], /gave no samples after sample 0 of epoch 1/],
      'plain arrays': [[{ images: [1], labels: [0] }], /gave no samples .*Uint8Array \[n, 112/],
      'no samples at a time': [
        [{ images: new Uint8Array(), labels: new Int32Array() }],
        /gave no samples after sample 0/,
      ],
      'images cut short': [
        [one(0), { images: image.subarray(1), labels: Int32Array.of(0) }],
        /gave 37631 bytes of images with 1 labels after sample 1 of epoch 1: .*37632 bytes/,
      ],
      'a class too many': [
        [one(0), one(1), one(PEOPLE)],
        /gave the label 4 after sample 2 of epoch 1: number its classes from 0 to 3/,
      ],
      'a label below 0': [[one(-1)], /gave the label -1 after sample 0/],
      'fewer samples than it said': [[one(0)], /ended after 1 of 11 samples in epoch 1/],
      'what it throws': [
        (function* () {
          yield one(0);
          throw new Error('the camera is off');
        })(),
        /"faces in memory" failed in epoch 1 \(the camera is off\)/,
      ],
    };
    for (const [what, [samples, message]] of Object.entries(wrong)) {
      it(what, async () => {
        const given = source({ samples: () => samples as Iterable<Samples> });
        const batches = batchesOf(
          given,
          { epoch: 1, step: 0 },
          { batch: 2 * BATCH, epochs: 1 },
          new AbortController().signal,
        );
        await assert.rejects(batches.next(), { code: 'ERR_DATA', message });
      });
    }

    it('and the run ends with it', async () => {
      const cause = new Error('the camera is off');
      const given = source({
        async *samples() {
          yield* [0, 1, 2].map(pick);
          throw cause;
        },
      });
      const { events, error } = await runTraining(config({ data: given }));
      assert.ok(error instanceof HardmineError);
      assert.deepEqual([error.code, error.cause], ['ERR_DATA', cause]);
      // The batch before it was trained on.
      assert.ok(events.some((event) => event.type === 'step' && event.step === 1));
    });

    it('settings that need a data set, and what is no source', async () => {
      const refused: [Partial<TrainerInput>, RegExp][] = [
        [{ validation: 'identities' }, /"validation" is identities, which needs a data set/],
        [{ onBadRecord: 'skip' }, /"onBadRecord" is skip, which needs a data set/],
        [{ data: source({ name: '' }) }, /no data source \(its name/],
        [{ data: source({ images: 1.5 }) }, /no data source \(its images/],
        [{ data: source({ identities: 1 }) }, /no data source \(its identities/],
        [{ data: { ...source(), samples: 1 as never } }, /no data source \(its samples/],
      ];
      for (const [more, message] of refused) {
        await assert.rejects(Trainer.create(config({ data: source(), ...more })), {
          code: 'ERR_CONFIG',
          message,
        });
      }
      await assert.rejects(Trainer.create(config({ data: source({ images: BATCH - 1 }) })), {
        code: 'ERR_DATA',
        message: /faces in memory has 1 images to train on, fewer than the batch of 2/,
      });
    });
  });

  describe('ends the source', () => {
    /** Notes when its generator is closed and when its signal is aborted. */
    function watched() {
      const seen = { closed: 0, aborted: false };
      const given = source({
        async *samples(epoch, from, signal) {
          signal.addEventListener('abort', () => {
            seen.aborted = true;
          });
          try {
            yield* source().samples(epoch, from, signal);
          } finally {
            seen.closed += 1;
          }
        },
      });
      return { seen, given };
    }

    it('at the end of each epoch and of the run', async () => {
      const { seen, given } = watched();
      const trainer = await Trainer.create(config({ data: given }));
      for await (const _ of trainer.run());
      assert.deepEqual(seen, { closed: 2, aborted: true });
      await trainer.dispose();
    });

    it('when the loop over the events is left', async () => {
      const { seen, given } = watched();
      const trainer = await Trainer.create(config({ data: given }));
      for await (const event of trainer.run()) if (event.type === 'step') break;
      assert.deepEqual(seen, { closed: 1, aborted: true });
      await trainer.dispose();
    });

    it('when the Trainer is disposed', async () => {
      const { seen, given } = watched();
      const trainer = await Trainer.create(config({ data: given }));
      const run = trainer.run();
      await run.next();
      await trainer.dispose();
      assert.deepEqual(seen, { closed: 1, aborted: true });
      await assert.rejects(run.next(), { code: 'ERR_DISPOSED' });
    });

    const works = {
      run: async (trainer: Trainer, signal: AbortSignal) => {
        for await (const _ of trainer.run({ signal }));
      },
      estimate: (trainer: Trainer, signal: AbortSignal) => trainer.estimate({ signal }),
    };
    for (const [name, work] of Object.entries(works)) {
      for (const how of ['signal', 'dispose'] as const) {
        it(`though ${name}() waits for an image that does not come, by ${how}`, async () => {
          let asked = (): void => undefined;
          const waits = new Promise<void>((resolve) => {
            asked = resolve;
          });
          const given = source({
            async *samples() {
              yield pick(0);
              asked();
              await new Promise(() => undefined);
            },
          });
          const controller = new AbortController();
          const trainer = await Trainer.create(config({ data: given }));
          const code = how === 'signal' ? 'ERR_ABORTED' : 'ERR_DISPOSED';
          const ended = assert.rejects(work(trainer, controller.signal), { code });
          await waits;
          if (how === 'signal') controller.abort();
          else await trainer.dispose();
          await ended;
          await trainer.dispose();
        });
      }
    }
  });
});
