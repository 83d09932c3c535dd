// State x method tables of every public handle: in each state each method is done, waits its turn and is
// done, or fails with the error that the table names. That no method is missing from a table is checked
// by reflection, and for the classes by the compiler.
import assert from 'node:assert/strict';
import { mkdirSync, mkdtempSync, readdirSync, readlinkSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import sharp from 'sharp';
import { FaceAligner } from '../src/align/aligner.js';
import { type Dataset, openDataset } from '../src/data/dataset.js';
import type { ErrorCode } from '../src/errors.js';
import { HardmineError } from '../src/errors.js';
import { loadOnnxRuntime } from '../src/formats/onnx-runtime.js';
import { type PackedFiles, RecordWriter } from '../src/formats/recordio.js';
import type { Tensor } from '../src/formats/safetensors.js';
import { MarginHead } from '../src/head.js';
import { FaceModel } from '../src/model.js';
import { loadAddon, type NativeAddon } from '../src/native.js';
import { Trainer } from '../src/trainer.js';
import {
  BATCH,
  CLASSES,
  DIM,
  type Disposable,
  EXECUTION,
  type HandleKind,
  handleKinds,
  IMAGE_BYTES,
  loose,
  NETWORK,
  ramp,
  rows,
  SESSION,
  STEP,
} from './helpers/native-handles.js';
import { packColours } from './helpers/packed-colours.js';
import { shared } from './helpers/skip.js';

/** 'done', or the code of the error. */
type Outcome = 'done' | ErrorCode;

async function outcomeOf(call: () => unknown): Promise<Outcome> {
  try {
    await call();
    return 'done';
  } catch (error) {
    assert.ok(error instanceof HardmineError, `not a HardmineError: ${String(error)}`);
    return error.code;
  }
}

/** A record file whose image `damaged` ends early. */
async function packDamaged(folder: string, damaged: number): Promise<PackedFiles> {
  const writer = await RecordWriter.create(join(folder, 'damaged'));
  for (let i = 0; i < 8; i++) {
    const background = { r: 40 * (i % 5), g: 90, b: 10 * i };
    const jpeg = await sharp({ create: { width: 112, height: 112, channels: 3, background } })
      .jpeg()
      .toBuffer();
    await writer.add(Math.floor(i / 4), i === damaged ? jpeg.subarray(0, -150) : jpeg);
  }
  return writer.finish(['a', 'b']);
}

describe('states and methods', function () {
  this.timeout(120_000);
  let folder: string;
  let files: PackedFiles;
  let damaged: PackedFiles;
  let addon: NativeAddon;

  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-states-'));
    files = await packColours(folder, CLASSES, 4);
    const other = join(folder, 'other');
    mkdirSync(other);
    damaged = await packDamaged(other, 3);
    addon = loadAddon('cpu');
  });
  after(() => rmSync(folder, { recursive: true, force: true }));

  describe('of native handles', () => {
    /** What brings a handle into a state; a function that it returns is awaited after the method. */
    type Enter = (handle: object, also: object[]) => Promise<void> | (() => Promise<unknown>);
    const call = (handle: object, name: string, ...args: unknown[]): Promise<unknown> =>
      Promise.resolve(loose(handle)[name]?.(...args));
    /** Work that is pending while the method is called. */
    const busyWith =
      (name: string, args: (also: object[]) => unknown[]): Enter =>
      (handle, also) => {
        const pending = call(handle, name, ...args(also));
        return () => pending;
      };
    const failed =
      (name: string, args: (also: object[]) => unknown[], code: ErrorCode): Enter =>
      async (handle, also) =>
        assert.equal(await outcomeOf(() => call(handle, name, ...args(also))), code);

    const [x, y] = rows(2);
    const image = new Uint8Array(IMAGE_BYTES);
    const nan = new Float32Array(x.length).fill(Number.NaN);
    interface Row {
      states: Record<string, Enter>;
      /** Where the outcome is not 'done', by state and method. */
      except?: Record<string, Record<string, Outcome>>;
    }
    const table: Record<string, Row> = {
      head: {
        states: {
          busy: busyWith('time', () => ['step', 2, 3]),
          failed: failed('step', () => [nan, y, STEP], 'ERR_NON_FINITE'),
          refused: failed('step', () => [x, y], 'ERR_INPUT'),
        },
      },
      session: {
        states: {
          busy: busyWith('train', ([batches]) => [batches, [STEP, STEP]]),
          cancelled: async (session, [batches]) => {
            const pending = call(session, 'train', batches, new Array(50).fill(STEP));
            await call(session, 'cancel');
            await pending;
          },
          refused: failed('train', () => [null, []], 'ERR_INPUT'),
        },
        except: { busy: { train: 'ERR_BUSY' } },
      },
      embedder: {
        states: {
          busy: busyWith('embed', () => [image, false]),
          refused: failed('read', () => ['no tensor'], 'ERR_INPUT'),
        },
      },
      records: {
        states: {
          busy: busyWith('verify', () => []),
          refused: failed('jpeg', () => [1e6], 'ERR_INPUT'),
        },
      },
      batches: {
        states: {
          busy: busyWith('drain', () => [3]),
          refused: failed('seek', () => [0, 0], 'ERR_INPUT'),
        },
        except: { busy: { drain: 'ERR_BUSY', seek: 'ERR_BUSY' } },
      },
      // It has no method but dispose(); what that does to the folder is test/66's.
      lock: { states: {} },
    };
    const disposing: Enter = (handle) => {
      const pending = (handle as Disposable).dispose();
      return () => pending;
    };
    const disposed: Enter = (handle) => (handle as Disposable).dispose();

    async function walk(kind: HandleKind, { states, except = {} }: Row): Promise<void> {
      const ends = { disposing, disposed };
      for (const [state, enter] of Object.entries({ fresh: async () => {}, ...states, ...ends })) {
        const { handle, also } = await kind.make();
        try {
          const own = Object.getOwnPropertyNames(handle);
          const methods = own.filter((name) => typeof loose(handle)[name] === 'function');
          assert.deepEqual(methods.sort(), [...Object.keys(kind.calls), 'dispose'].sort());
          for (const [name, args] of Object.entries(kind.calls)) {
            const entered = enter(handle, also);
            const leave = entered instanceof Promise ? await entered : entered;
            let result: unknown;
            const found = await outcomeOf(async () => {
              result = await call(handle, name, ...args(also));
            });
            const expected = state in ends ? 'ERR_DISPOSED' : (except[state]?.[name] ?? 'done');
            assert.equal(found, expected, `${name} of a handle that is ${state}`);
            await (result as Partial<Disposable> | undefined)?.dispose?.();
            await leave?.();
          }
          await handle.dispose();
        } finally {
          for (const one of [handle, ...also]) await one.dispose();
        }
      }
    }

    for (const [name, row] of Object.entries(table)) {
      it(`${name}: ${['fresh', ...Object.keys(row.states), 'disposing', 'disposed'].join(', ')}`, async () => {
        const kinds = handleKinds(addon, files);
        assert.deepEqual(Object.keys(kinds).sort(), Object.keys(table).sort());
        await walk(kinds[name] ?? assert.fail(), row);
      });
    }

    it('records and batches with a damaged image: the sound ones are still given', async () => {
      const records = await addon.openRecords(damaged.rec, damaged.idx);
      assert.equal(await outcomeOf(() => records.decode(new Int32Array([0, 3]))), 'ERR_DATA');
      assert.equal((await records.decode(new Int32Array([0, 2]))).length, 2 * IMAGE_BYTES);
      assert.deepEqual(
        (await records.verify()).map(({ index }) => index),
        [3],
      );
      const batches = await records.batches({
        images: records.labels.map((_, i) => i),
        labels: records.labels,
        batch: BATCH,
        seed: 1,
        mirror: false,
        crop: 0,
        decodeThreads: 1,
        execution: null,
        skip: null,
      });
      const session = await addon.createSession({ ...SESSION, classes: 2 }, EXECUTION);
      // An epoch has the damaged image in one of its batches; the ring stays there, and goes on elsewhere.
      assert.equal(await outcomeOf(() => batches.drain(4)), 'ERR_DATA');
      assert.equal(await outcomeOf(() => batches.drain(1)), 'ERR_DATA');
      assert.ok(batches.waitedMs() >= 0);
      await batches.seek(2, 0);
      const training = () => session.train(batches, new Array(4).fill(STEP));
      assert.equal(await outcomeOf(training), 'ERR_DATA');
      assert.equal((await session.read('conv1.weight')).length, 64 * 3 * 7 * 7);
      for (const one of [session, batches, records]) await one.dispose();
    });

    it('getters that dispose what they are read for', async () => {
      const kinds = handleKinds(addon, files);
      const { handle, also } = await (kinds['session'] ?? assert.fail()).make();
      const [batches] = also as [Disposable];
      const ending = (one: Disposable) => ({
        ...STEP,
        get lr() {
          void one.dispose();
          return 0.01;
        },
      });
      const train = (settings: unknown[]) =>
        outcomeOf(() => call(handle, 'train', batches, settings));
      assert.equal(await train([STEP, ending(batches)]), 'ERR_DISPOSED');
      const other = await (kinds['session'] ?? assert.fail()).make();
      const settings: unknown[] = [ending(other.handle)];
      assert.equal(
        await outcomeOf(() => call(other.handle, 'train', other.also[0], settings)),
        'ERR_DISPOSED',
      );
      // Settings that grow while they are read: those that were there are taken.
      const growing: unknown[] = [];
      const grow = {
        ...STEP,
        get lr() {
          growing.push(growing.length < 50 ? grow : STEP);
          return 0.01;
        },
      };
      growing.push(grow);
      const third = await (kinds['session'] ?? assert.fail()).make();
      const stats = (await call(third.handle, 'train', third.also[0], growing)) as unknown[];
      assert.equal(stats.length, 1);
      for (const one of [handle, ...also, other.handle, ...other.also]) await one.dispose();
      for (const one of [third.handle, ...third.also]) await one.dispose();
    });
  });

  /** The names of the methods of T: the compiler demands a row for each, private members aside. */
  type MethodOf<T> = keyof {
    [K in keyof T as T[K] extends (...args: never[]) => unknown ? K : never]: true;
  };
  type Calls<T> = Record<MethodOf<T>, (handle: T) => unknown>;
  type Expected<T> = Partial<Record<MethodOf<T>, Outcome>>;

  interface Made<T> {
    handle: T;
    leave?: Promise<unknown>;
  }

  const methodsOf = (prototype: object): (string | symbol)[] =>
    Reflect.ownKeys(prototype).filter(
      (key) =>
        key !== 'constructor' &&
        typeof Object.getOwnPropertyDescriptor(prototype, key)?.value === 'function',
    );
  const order = (keys: (string | symbol)[]): string[] => keys.map(String).sort();

  /**
   * Each method in each state. `make` brings the handle that it is given, or a new one, into the state; what
   * is then still under way, `leave`, may be refused by what the method does.
   */
  async function walk<T extends Disposable>(
    calls: Calls<T>,
    states: Record<string, (before: T | null) => Promise<Made<T>>>,
    expected: Record<string, Outcome | Expected<T>>,
  ): Promise<void> {
    const names = Reflect.ownKeys(calls) as MethodOf<T>[];
    for (const [state, make] of Object.entries(states)) {
      const outcomes: Outcome | Expected<T> = expected[state] ?? {};
      let before: T | null = null;
      for (const name of names) {
        // The last row ends once more what dispose() has ended.
        const made: Made<T> =
          name === Symbol.asyncDispose && before ? { handle: before } : await make(before);
        const handle: T = made.handle;
        if (before !== null && handle !== before) await before.dispose();
        before = handle;
        const left = Promise.allSettled([made.leave]);
        const found = await outcomeOf(() => calls[name](handle));
        const ends = name === 'dispose' || name === Symbol.asyncDispose;
        const named = typeof outcomes === 'string' ? outcomes : outcomes[name];
        assert.equal(found, ends ? 'done' : (named ?? 'done'), `${String(name)}, ${state}`);
        await left;
      }
    }
  }

  async function refuseForeign(prototype: object, args: unknown[]): Promise<void> {
    for (const name of methodsOf(prototype)) {
      const method = Reflect.get(prototype, name) as (...given: unknown[]) => unknown;
      for (const foreign of [undefined, {}, Object.create(prototype), new Proxy(prototype, {})]) {
        await assert.rejects(async () => method.apply(foreign, args), TypeError, String(name));
      }
    }
  }

  it('MarginHead: without weights, ready, busy, failed, disposing, disposed', async () => {
    const [x, y] = rows(2);
    const weights = ramp(CLASSES * DIM);
    const calls: Calls<MarginHead> = {
      forwardBackward: (head) => head.forwardBackward({ embeddings: x, labels: y }),
      setWeights: (head) => head.setWeights(weights),
      step: (head) => head.step(x, y, { lr: 0.1 }),
      readWeights: (head) => head.readWeights(),
      setCenters: (head) => head.setCenters(weights),
      readCenters: (head) => head.readCenters(),
      dispose: (head) => head.dispose(),
      [Symbol.asyncDispose]: (head) => head[Symbol.asyncDispose](),
    };
    assert.deepEqual(order(methodsOf(MarginHead.prototype)), order(Reflect.ownKeys(calls)));
    const create = () =>
      MarginHead.create({
        classes: CLASSES,
        dim: DIM,
        loss: { base: { kind: 'arcface' }, center: {} },
        device: 'cpu',
        threads: 1,
      });
    const ready = async () => {
      const handle = await create();
      await handle.setWeights(weights);
      return handle;
    };
    const unset = 'ERR_INPUT';
    await walk(
      calls,
      {
        'without weights': async () => ({ handle: await create() }),
        ready: async (before) => ({ handle: before ?? (await ready()) }),
        busy: async (before) => {
          const handle = before ?? (await ready());
          return { handle, leave: handle.step(x, y, { lr: 0.1 }) };
        },
        failed: async (before) => {
          const handle = before ?? (await ready());
          const nan = new Float32Array(x.length).fill(Number.NaN);
          await assert.rejects(handle.step(nan, y, { lr: 0.1 }), { code: 'ERR_NON_FINITE' });
          return { handle };
        },
        disposing: async (before) => {
          const handle = before ?? (await ready());
          return { handle, leave: handle.dispose() };
        },
        disposed: async (before) => {
          const handle = before ?? (await ready());
          await handle.dispose();
          return { handle };
        },
      },
      {
        'without weights': { forwardBackward: unset, step: unset, readWeights: unset },
        disposing: 'ERR_DISPOSED',
        disposed: 'ERR_DISPOSED',
      },
    );
    await refuseForeign(MarginHead.prototype, [{ embeddings: x, labels: y }]);
  });

  it('FaceModel: fresh, busy, failed, disposing, disposed', async () => {
    const image = new Uint8Array(IMAGE_BYTES);
    const tensors = new Map<string, Tensor>();
    const embedder = await addon.createEmbedder(
      { ...NETWORK, embeddingBatchNorm: false },
      EXECUTION,
    );
    for (const { name, shape } of embedder.tensors) {
      const values = await embedder.read(name);
      // Nothing but variances has to be above 0, and those of a new network may be 0.
      tensors.set(name, {
        dtype: 'F32',
        shape,
        data: values.fill(name.endsWith('var') ? 1 : 0.01),
      });
    }
    await embedder.dispose();
    const onnx = join(folder, 'model.onnx');
    const e = new Float32Array(NETWORK.embedding).fill(1);
    const calls: Calls<FaceModel> = {
      embed: (model) => model.embed(image),
      similarity: (model) => model.similarity(e, e),
      save: (model) => model.save(join(folder, 'model.safetensors')),
      exportOnnx: (model) => model.exportOnnx(join(folder, 'again.onnx')),
      checkOnnx: (model) => model.checkOnnx(onnx, image),
      dispose: (model) => model.dispose(),
      [Symbol.asyncDispose]: (model) => model[Symbol.asyncDispose](),
    };
    assert.deepEqual(order(methodsOf(FaceModel.prototype)), order(Reflect.ownKeys(calls)));
    const create = () => FaceModel.fromTensors(tensors, {}, { device: 'cpu', threads: 1 });
    const first = await create();
    await first.exportOnnx(onnx);
    await first.dispose();
    await walk(
      calls,
      {
        fresh: async (before) => ({ handle: before ?? (await create()) }),
        busy: async (before) => {
          const handle = before ?? (await create());
          return { handle, leave: handle.embed(image) };
        },
        failed: async (before) => {
          const handle = before ?? (await create());
          await assert.rejects(handle.embed(image.subarray(1)), { code: 'ERR_INPUT' });
          return { handle };
        },
        disposing: async (before) => {
          const handle = before ?? (await create());
          return { handle, leave: handle.dispose() };
        },
        disposed: async (before) => {
          const handle = before ?? (await create());
          await handle.dispose();
          return { handle };
        },
      },
      { disposing: 'ERR_DISPOSED', disposed: 'ERR_DISPOSED' },
    );
    await refuseForeign(FaceModel.prototype, [image]);
    const busy = await create();
    const pending = assert.rejects(busy.embed(new Uint8Array(8 * IMAGE_BYTES)), {
      code: 'ERR_DISPOSED',
    });
    // Neither call comes back before the network is gone.
    await Promise.all([busy.dispose(), busy.dispose()]);
    await pending;
  });

  it('FaceAligner: fresh, busy, failed, disposing, disposed', async function () {
    const mtcnn = shared(this, 'mtcnn');
    const image = await sharp({ create: { width: 40, height: 40, channels: 3, background: 'red' } })
      .jpeg()
      .toBuffer();
    const calls: Calls<FaceAligner> = {
      detect: (aligner) => aligner.detect(image),
      align: (aligner) => aligner.align(image),
      dispose: (aligner) => aligner.dispose(),
      [Symbol.asyncDispose]: (aligner) => aligner[Symbol.asyncDispose](),
    };
    assert.deepEqual(order(methodsOf(FaceAligner.prototype)), order(Reflect.ownKeys(calls)));
    const create = () => FaceAligner.load({ mtcnn, threads: 1 });
    await walk(
      calls,
      {
        fresh: async (before) => ({ handle: before ?? (await create()) }),
        busy: async (before) => {
          const handle = before ?? (await create());
          return { handle, leave: handle.detect(image) };
        },
        failed: async (before) => {
          const handle = before ?? (await create());
          await assert.rejects(handle.detect(Buffer.from('text')), { code: 'ERR_DATA' });
          return { handle };
        },
        disposing: async (before) => {
          const handle = before ?? (await create());
          return { handle, leave: handle.dispose() };
        },
        disposed: async (before) => {
          const handle = before ?? (await create());
          await handle.dispose();
          return { handle };
        },
      },
      { disposing: 'ERR_DISPOSED', disposed: 'ERR_DISPOSED' },
    );
    await refuseForeign(FaceAligner.prototype, [image]);
  });

  it('a FaceAligner that is disposed in the middle of work ends it, and frees once what it used', async function () {
    const aligner = await FaceAligner.load({ mtcnn: shared(this, 'mtcnn'), threads: 1 });
    const image = await sharp({
      create: { width: 300, height: 200, channels: 3, background: 'red' },
    })
      .jpeg()
      .toBuffer();
    const { InferenceSession } = await loadOnnxRuntime('This test');
    const prototype: { release(): Promise<void> } = Reflect.get(InferenceSession, 'prototype');
    const { release } = prototype;
    const order: string[] = [];
    prototype.release = async function (this: object) {
      await setTimeout(20); // as long as another call of dispose() would need to come back
      await release.call(this);
      order.push('released');
    };
    try {
      const note = (name: string) => (): void => void order.push(name);
      const work = [
        aligner.detect(image).then(note('work')),
        aligner.align(image).then(note('work')),
      ];
      const ends = [aligner.dispose(), aligner.dispose(), aligner[Symbol.asyncDispose]()];
      assert.equal(await outcomeOf(() => aligner.detect(image)), 'ERR_DISPOSED');
      await Promise.all([...work, ...ends.map((end) => end.then(note('disposed')))]);
      const three = (name: string) => [name, name, name];
      assert.deepEqual(order, ['work', 'work', ...three('released'), ...three('disposed')]);
      await aligner.dispose();
      assert.equal(await outcomeOf(() => aligner.align(image)), 'ERR_DISPOSED');
    } finally {
      prototype.release = release;
    }
  });

  it('Dataset: fresh, in use, disposing, disposed', async () => {
    const calls: Calls<Dataset> = {
      verify: (dataset) => dataset.verify(),
      dispose: (dataset) => dataset.dispose(),
      [Symbol.asyncDispose]: (dataset) => dataset[Symbol.asyncDispose](),
    };
    const open = () => openDataset(files.rec);
    const dataset = await open();
    const found = Reflect.ownKeys(dataset).filter(
      (key) => typeof Reflect.get(dataset, key) === 'function',
    );
    assert.deepEqual(order(found), order(Reflect.ownKeys(calls)));
    const pending = assert.rejects(dataset.records.verify(), { code: 'ERR_DISPOSED' });
    await Promise.all([dataset.dispose(), dataset.dispose()]);
    await pending;
    await dataset[Symbol.asyncDispose]();
    assert.equal(await outcomeOf(() => dataset.records.jpeg(0)), 'ERR_DISPOSED');
    assert.equal(await outcomeOf(() => dataset.verify()), 'ERR_DISPOSED');
  });

  it('Trainer: fresh, running, suspended, stopped, failed, done, disposing, disposed', async () => {
    const calls: Calls<Trainer> = {
      run: (trainer) => trainer.run().next(),
      estimate: (trainer) => trainer.estimate(),
      dispose: (trainer) => trainer.dispose(),
      [Symbol.asyncDispose]: (trainer) => trainer[Symbol.asyncDispose](),
    };
    let runs = 0;
    const create = (data = files.rec) =>
      Trainer.create({
        data,
        out: join(folder, `run-${runs++}`),
        validation: 'none',
        embedding: 32,
        batch: 8,
        epochs: 1,
        device: 'cpu',
        threads: 1,
        precision: 'fp32',
      });
    const drain = async (trainer: Trainer, signal?: AbortSignal) => {
      for await (const _ of trainer.run(signal ? { signal } : {}));
    };
    await walk(
      calls,
      {
        fresh: async () => ({ handle: await create() }), // it can be used once
        running: async () => {
          const handle = await create();
          return { handle, leave: drain(handle) };
        },
        suspended: async () => {
          const handle = await create();
          const events = handle.run();
          await events.next();
          return { handle };
        },
        stopped: async () => {
          const handle = await create();
          await assert.rejects(drain(handle, AbortSignal.abort()), { code: 'ERR_ABORTED' });
          return { handle };
        },
        failed: async () => {
          const handle = await create(damaged.rec);
          await assert.rejects(drain(handle), { code: 'ERR_DATA' });
          return { handle };
        },
        done: async () => {
          const handle = await create();
          await drain(handle);
          return { handle };
        },
        disposing: async () => {
          const handle = await create();
          return { handle, leave: handle.dispose() };
        },
        disposed: async () => {
          const handle = await create();
          await handle.dispose();
          return { handle };
        },
      },
      {
        running: { run: 'ERR_BUSY', estimate: 'ERR_BUSY' },
        suspended: { run: 'ERR_BUSY', estimate: 'ERR_BUSY' },
        stopped: { run: 'ERR_BUSY', estimate: 'ERR_BUSY' },
        failed: { run: 'ERR_BUSY', estimate: 'ERR_BUSY' },
        done: { run: 'ERR_BUSY', estimate: 'ERR_BUSY' },
        disposing: { run: 'ERR_DISPOSED', estimate: 'ERR_DISPOSED' },
        disposed: { run: 'ERR_DISPOSED', estimate: 'ERR_DISPOSED' },
      },
    );
    for (const name of Reflect.ownKeys(calls)) {
      const method = Reflect.get(Trainer.prototype, name) as () => unknown;
      await assert.rejects(async () => {
        const result = method.call({}) as { next?: () => Promise<unknown> };
        await (result.next?.() ?? result);
      }, TypeError);
    }
  });

  it('a Trainer that is disposed between two events closes its files and says so', async () => {
    const out = join(folder, 'suspended');
    const trainer = await Trainer.create({
      ...{ data: files.rec, out, validation: 'none', embedding: 32, batch: 8 },
      ...{ epochs: 2, device: 'cpu', threads: 1, precision: 'fp32' },
    });
    const openFiles = () =>
      readdirSync('/proc/self/fd').filter((fd) => {
        try {
          return readlinkSync(`/proc/self/fd/${fd}`).startsWith(out);
        } catch {
          return false; // the folder itself, closed since
        }
      });
    const events = trainer.run();
    while ((await events.next()).value?.type !== 'step');
    assert.ok(openFiles().length > 0);
    await trainer.dispose();
    assert.deepEqual(openFiles(), []);
    const goOn = async () => {
      while (!(await events.next()).done);
    };
    assert.equal(await outcomeOf(goOn), 'ERR_DISPOSED');
    assert.equal(await outcomeOf(() => trainer.run().next()), 'ERR_DISPOSED');
  });
});
