// A short training and a call of everything else that is native, for scripts/sanitizers.mjs:
// `training.mjs DIST`, where DIST/native.js finds a sanitized addon.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const dist = resolve(process.argv[2] ?? 'dist');
const load = (name) => import(pathToFileURL(join(dist, name)).href);
const { FaceModel, HardmineError, MarginHead, openDataset, Trainer } = await load('index.js');
const { generateFaces } = await load('data/generated-faces.js');

const folder = mkdtempSync(join(tmpdir(), 'hardmine-sanitizers-'));
const device = { device: 'cpu', threads: 2 };

async function train() {
  const data = await generateFaces({
    ...{ identities: 6, imagesPerIdentity: 4, seed: 1, out: join(folder, 'faces') },
  });
  const out = join(folder, 'run');
  const trainer = await Trainer.create({
    ...{ data, out, validation: 'none', embedding: 32, batch: 6, epochs: 1, precision: 'fp32' },
    ...{ ...device, augment: { crop: 4 } },
  });
  for await (const _ of trainer.run());
  await trainer.dispose();
  return { data, model: join(out, 'last.safetensors') };
}

/** Every loss once, fused and not, and a step. */
async function steps() {
  const dim = 24;
  const classes = 37;
  const embeddings = Float32Array.from({ length: 5 * dim }, (_, i) => Math.sin(i));
  const weights = Float32Array.from({ length: classes * dim }, (_, i) => Math.cos(i));
  const labels = Int32Array.from([0, 36, 7, 7, 20]);
  const bases = [
    { kind: 'softmax' },
    { kind: 'a-softmax', margin: 4, lambda: 5 },
    { kind: 'arcface', scale: 64, margin: 0.5 },
    { kind: 'cosface', scale: 64, margin: 0.35 },
    { kind: 'euclidean-margin' },
  ];
  for (const base of bases) {
    for (const implementation of ['fused', 'unfused']) {
      const loss = { base, weighting: { kind: 'hard-mining' }, center: {} };
      const head = await MarginHead.create({ ...device, classes, dim, implementation, loss });
      await head.forwardBackward({ embeddings, weights, labels });
      await head.step(embeddings, labels, { lr: 0.1 });
      await head.readWeights();
      await head.dispose();
    }
  }
}

async function embed({ data, model: path }) {
  const dataset = await openDataset(data);
  const model = await FaceModel.load(path, { ...device });
  const images = await dataset.records.decode(new Int32Array([0, 5, 9]));
  const embeddings = await model.embed(images);
  if (!embeddings.every(Number.isFinite)) throw new Error('an embedding is not finite');
  // Disposed in the middle of work.
  const pending = Promise.allSettled([model.embed(images), dataset.records.verify()]);
  await Promise.all([model.dispose(), dataset.dispose()]);
  for (const { status, reason } of await pending) {
    const disposed = reason instanceof HardmineError && reason.code === 'ERR_DISPOSED';
    if (status !== 'rejected' || !disposed) throw reason ?? new Error('it was not stopped');
  }
}

try {
  const made = await train();
  await steps();
  await embed(made);
  console.log('trained, stepped and embedded');
} finally {
  rmSync(folder, { recursive: true });
}
