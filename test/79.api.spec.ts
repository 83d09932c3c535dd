// The API as a program meets it: imported or required from the package, in worker threads, stopped by a
// signal, and given numbers that are none.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Tensor } from '../src/formats/safetensors.js';
import {
  embedForPairs,
  evaluateBin,
  evaluateCfp,
  evaluateIdentification,
  evaluateLfw,
  evaluateYtf,
  FaceAligner,
  FaceModel,
  generateFaces,
  HardmineError,
  inspectDataset,
  MarginHead,
  openDataset,
  packDataset,
} from '../src/index.js';
import { loadAddon } from '../src/native.js';
import { type Finished, finish, ROOT } from './helpers/built.js';
import { EXECUTION, IMAGE_BYTES } from './helpers/native-handles.js';
import { packColours } from './helpers/packed-colours.js';

function withValue(values: Float32Array, index: number, value: number): Float32Array {
  const changed = values.slice();
  changed[index] = value;
  return changed;
}

/** An untrained network with embeddings of 8. */
async function smallModel(): Promise<FaceModel> {
  const embedder = await loadAddon('cpu').createEmbedder(
    { architecture: 'resnet18', embedding: 8, embeddingBatchNorm: false },
    EXECUTION,
  );
  const tensors = new Map<string, Tensor>();
  for (const { name, shape } of embedder.tensors) {
    const data = (await embedder.read(name)).map((_, i) =>
      // Nothing but variances has to be above 0.
      name.endsWith('running_var') ? 1 : 0.05 * Math.sin(i + 1),
    );
    tensors.set(name, { dtype: 'F32', shape, data });
  }
  await embedder.dispose();
  return FaceModel.fromTensors(tensors, {}, { device: 'cpu', threads: 1 });
}

describe('the package', function () {
  this.timeout(300_000);
  /** Runs a program inside the package, where 'hardmine' is the package itself. */
  const run = (program: string, type: 'module' | 'commonjs'): Promise<Finished> =>
    finish(
      spawn(process.execPath, [`--input-type=${type}`, '--eval', program], {
        cwd: ROOT,
        env: { ...process.env, NODE_OPTIONS: '' },
      }),
    );
  const weigh = `weightLosses([2], { kind: 'hard-mining' }).gradientWeight[0].toFixed(4)`;
  const quiet = { code: 0, stdout: '1.5000\n', stderr: '' };

  it('is imported without a word on stderr', async () => {
    const program = `import { weightLosses } from 'hardmine'; console.log(${weigh});`;
    assert.deepEqual(await run(program, 'module'), quiet);
  });

  it('is required without a word on stderr, and is the same as imported', async () => {
    const program = `
      const { weightLosses, HardmineError } = require('hardmine');
      console.log(${weigh});
      import('hardmine').then((imported) => {
        if (imported.HardmineError !== HardmineError) throw new Error('two packages');
      });`;
    assert.deepEqual(await run(program, 'commonjs'), quiet);
  });

  it('says of a path that was left out that it is missing', async () => {
    // As of a program whose argument was not given.
    const path = process.argv[99] as string;
    const model = { embedding: 2, embed: async () => new Float32Array(2) };
    const calls: [() => Promise<unknown>, RegExp][] = [
      [() => openDataset(path), /path of the data set is undefined: give one as a string/],
      [() => openDataset(''), /path of the data set is empty/],
      [() => inspectDataset(path), /the data set is undefined/],
      [() => packDataset('faces', path), /the packed set is undefined/],
      [() => evaluateLfw(model, { root: path }), /LFW is undefined/],
      [() => evaluateYtf(model, { root: path }), /YouTube Faces is undefined/],
      [() => evaluateCfp(model, { root: path }), /CFP is undefined/],
      [() => evaluateIdentification(model, { root: path }), /LFW is undefined/],
      [() => evaluateBin(model, { path }), /the verification set is undefined/],
      [() => FaceAligner.load({ mtcnn: path }), /MTCNN's weights is undefined/],
    ];
    for (const [call, message] of calls) {
      await assert.rejects(call, (error) => {
        assert(error instanceof HardmineError, String(error));
        assert.equal(error.code, 'ERR_INPUT');
        assert.match(error.message, message);
        return true;
      });
    }
  });

  it('shows nothing but its API and its package.json', async () => {
    const program = `
      const codes = [];
      for (const path of ['hardmine/dist/native.js', 'hardmine/native']) {
        try { require(path); } catch (error) { codes.push(error.code); }
      }
      console.log(codes.join(), require('hardmine/package.json').name);`;
    const closed = 'ERR_PACKAGE_PATH_NOT_EXPORTED';
    assert.deepEqual(await run(program, 'commonjs'), {
      code: 0,
      stdout: `${closed},${closed} hardmine\n`,
      stderr: '',
    });
  });

  it('works in several worker threads beside the main thread, ended in the middle too', async () => {
    const work = `
      const { MarginHead } = await import('hardmine');
      const head = await MarginHead.create({
        classes: 3, dim: 2, device: 'cpu', threads: 1,
        loss: { base: { kind: 'arcface' }, weighting: { kind: 'hard-mining' } },
      });
      const rows = { embeddings: Float32Array.of(1, 2, 3, 4), labels: Int32Array.of(0, 2) };
      const weights = Float32Array.of(1, 0, 0, 1, 1, 1);
      const { loss } = await head.forwardBackward({ ...rows, weights });`;
    const program = `
      import { Worker } from 'node:worker_threads';
      const work = ${JSON.stringify(work)};
      const start = (rest) => new Worker(
        "const { parentPort } = await import('node:worker_threads');" + work + rest,
        { eval: true });
      const losses = [1, 2, 3].map(() => new Promise((resolve, reject) => {
        start('await head.dispose(); parentPort.postMessage(loss);').once('message', resolve)
          .once('error', reject);
      }));
      const endless = start('parentPort.postMessage(0); for (;;) await head.forwardBackward({ ...rows });');
      endless.on('error', (error) => { throw error; });
      await new Promise((resolve) => endless.once('message', resolve));
      ${work}
      await head.dispose();
      const same = (await Promise.all(losses)).every((one) => one === loss);
      await endless.terminate();
      console.log(same, loss > 0);`;
    const { code, stdout, stderr } = await run(program, 'module');
    assert.deepEqual({ code, stdout, stderr }, { code: 0, stdout: 'true true\n', stderr: '' });
  });
});

describe('what takes long', function () {
  this.timeout(300_000);
  let folder: string;
  let model: FaceModel;
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-api-'));
    model = await smallModel();
  });
  after(async () => {
    await model.dispose();
    await rm(folder, { recursive: true, force: true });
  });
  const reason = new Error('enough');
  /** Work that a signal stops, with an error that says so. */
  async function stopped(work: (controller: AbortController) => Promise<unknown>): Promise<void> {
    await assert.rejects(work(new AbortController()), (error) => {
      assert.ok(error instanceof HardmineError, String(error));
      assert.equal(error.code, 'ERR_ABORTED');
      assert.match(error.message, /stopped/);
      return true;
    });
  }

  it('embedding stops at the next 64 images', async () => {
    await stopped((controller) => {
      const images = new Uint8Array(65 * IMAGE_BYTES);
      const pending = model.embed(images, { signal: controller.signal });
      controller.abort(reason);
      return pending;
    });
    // Before anything is read.
    const signal = AbortSignal.abort(reason);
    await stopped(() => model.embed([join(folder, 'absent.png')], { signal }));
  });

  it('checking and packing a data set stop in the middle of their images', async () => {
    // More than are decoded together, 256.
    const { rec } = await packColours(folder, 3, 100);
    const dataset = await openDataset(rec);
    const seen: number[] = [];
    await stopped((controller) =>
      dataset.verify({
        signal: controller.signal,
        onProgress({ done }) {
          seen.push(done);
          controller.abort(reason);
        },
      }),
    );
    assert.deepEqual(seen, [0]);
    assert.deepEqual(await dataset.verify(), []);
    await dataset.dispose();
    const out = join(folder, 'packed');
    await stopped((controller) =>
      packDataset(rec, join(out, 'again'), {
        signal: controller.signal,
        onProgress: ({ phase }) => phase === 'checking' && controller.abort(reason),
      }),
    );
    assert.ok(!existsSync(out));
  });

  it('drawing faces stops', () =>
    stopped((controller) =>
      generateFaces({
        identities: 40,
        imagesPerIdentity: 2,
        seed: 1,
        out: join(folder, 'drawn'),
        signal: controller.signal,
        onProgress: () => controller.abort(reason),
      }),
    ));

  it('embedding for an evaluation stops', () =>
    stopped((controller) =>
      embedForPairs(model, {
        images: new Uint8Array(3 * IMAGE_BYTES),
        batch: 1,
        signal: controller.signal,
        onProgress: () => controller.abort(reason),
      }),
    ));
});

describe('numbers that are none', () => {
  it('similarity() refuses them, and takes zeros for nobody', async () => {
    const model = await smallModel();
    try {
      const e = Float32Array.of(1, 2, 3, 4, 5, 6, 7, 8);
      const opposite = e.map((value) => -2 * value);
      assert.ok(Math.abs(model.similarity(e, e) - 1) < 1e-12);
      assert.ok(Math.abs(model.similarity(e, opposite) + 1) < 1e-12);
      assert.equal(model.similarity(e, new Float32Array(8)), 0);
      for (const value of [Number.NaN, Number.POSITIVE_INFINITY]) {
        assert.throws(() => model.similarity(e, withValue(e, 3, value)), {
          code: 'ERR_NON_FINITE',
          message: new RegExp(`${value} as its element 3`),
        });
      }
      assert.throws(() => model.similarity(e, e.subarray(1)), { code: 'ERR_INPUT' });
      assert.throws(() => model.similarity(e, [...e] as never), {
        code: 'ERR_INPUT',
        message: /no Float32Array/,
      });
      await assert.rejects(model.embed(new Float32Array(IMAGE_BYTES) as never), {
        code: 'ERR_INPUT',
        message: /no Uint8Array/,
      });
      assert.equal((await model.embed([])).length, 0);
      assert.equal((await model.embed(new Uint8Array())).length, 0);
    } finally {
      await model.dispose();
    }
  });

  it('a margin head refuses them and keeps what it has', async () => {
    const head = await MarginHead.create({
      classes: 3,
      dim: 2,
      device: 'cpu',
      loss: { base: { kind: 'arcface', scale: 8 } },
    });
    try {
      const embeddings = Float32Array.of(1, 2, 3, 4);
      const labels = Int32Array.of(0, 2);
      const weights = Float32Array.of(1, 0, 0, 1, 1, 1);
      await head.setWeights(weights);
      for (const value of [Number.NaN, Number.NEGATIVE_INFINITY]) {
        const wrong = withValue(embeddings, 1, value);
        const refused = { code: 'ERR_NON_FINITE' };
        await assert.rejects(head.step(wrong, labels, { lr: 0.1 }), refused);
        await assert.rejects(head.forwardBackward({ embeddings: wrong, labels }), refused);
        assert.deepEqual((await head.readWeights()).weights, weights);
        await assert.rejects(head.step(embeddings, labels, { lr: value }), { code: 'ERR_INPUT' });
        await head.setWeights(withValue(weights, 0, value));
        await assert.rejects(head.forwardBackward({ embeddings, labels }), refused);
        await head.setWeights(weights);
      }
      assert.ok((await head.step(embeddings, labels, { lr: 0.1 })).loss > 0);
    } finally {
      await head.dispose();
    }
  });
});
