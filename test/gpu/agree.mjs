// Does a device compute what the CPU computes? Prints JSON with a verdict for each comparison; exit
// code 1 where one fails. run.mjs of the GPU kit starts it beside dist/, with NVIDIA_TF32_OVERRIDE=0.
//
//   agree.mjs DEVICE losses         ten losses of a training in fp32 on DEVICE and on the CPU
//   agree.mjs DEVICE repeats        100 deterministic steps, three times, to the same bits
//   agree.mjs DEVICE together       two trainings at once, whose kernels wait for all of their own blocks
//   agree.mjs DEVICE head SHAPE...  the heads of a benchmark's shapes (batch x dim x classes)

import { createHash } from 'node:crypto';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { generateFaces, MarginHead, Trainer } from './dist/index.js';

const [device, what, ...shapes] = process.argv.slice(2);
const onCpu = device === 'cpu';
const folder = fs.mkdtempSync(join(tmpdir(), 'hardmine-agree-'));

let drawn;

/** Trains on drawn faces; returns the loss of every call of the trainer, and where the model is. */
async function train(config, images) {
  drawn ??= await generateFaces({
    identities: images / 4,
    imagesPerIdentity: 4,
    seed: 7,
    out: join(folder, 'faces'),
  });
  const out = fs.mkdtempSync(join(folder, 'run-'));
  const trainer = await Trainer.create({
    ...{
      data: drawn,
      out,
      validation: 'none',
      loss: 'arcface',
      weighting: { kind: 'hard-mining' },
    },
    ...{ deterministic: true, lr: 0.01, checkpointEvery: 1e6, validateEvery: 1e6, ...config },
  });
  const losses = [];
  try {
    for await (const event of trainer.run()) if (event.type === 'step') losses.push(event.loss);
  } finally {
    await trainer.dispose();
  }
  return { losses, model: join(out, 'last.safetensors') };
}

/** An epoch of one step, so that each step's loss is told. */
async function compareLosses() {
  const images = 32;
  // At the paper's scale so few images are learnt in five steps, and nothing is left to compare.
  const config = {
    precision: 'fp32',
    batch: images,
    epochs: 10,
    milestones: [],
    scale: 16,
    lr: 0.002,
  };
  const { losses: found } = await train({ ...config, device }, images);
  const { losses: expected } = await train({ ...config, device: 'cpu' }, images);
  const worst = Math.max(...expected.map((loss, i) => Math.abs(found[i] / loss - 1)));
  return [{ ok: found.length === 10 && worst < 1e-3, worst, found, expected }];
}

/** Of so many people that they are not learnt by the end. */
async function compareRepeats() {
  const [batch, steps, epochs] = onCpu ? [8, 2, 2] : [64, 16, 7];
  const sums = [];
  for (let i = 0; i < 3; i++) {
    const { model } = await train({ device, batch, epochs, milestones: [] }, steps * batch);
    sums.push(createHash('sha256').update(fs.readFileSync(model)).digest('hex'));
  }
  return [{ ok: new Set(sums).size === 1, steps: steps * epochs, sums }];
}

async function trainTogether() {
  const [batch, steps] = onCpu ? [8, 2] : [64, 16];
  const config = { device, batch, epochs: 2, deterministic: false, lr: 1e-3 };
  await train({ ...config, epochs: 1 }, steps * batch); // what is timed is timed alone
  const both = await Promise.all([1, 2].map((seed) => train({ ...config, seed }, steps * batch)));
  return both.map(({ losses }) => ({ ok: losses.every(Number.isFinite), losses }));
}

// --- the head ---

let state = 1;

/** From -1 to 1, by xorshift32: half a billion in seconds. */
function uniforms(count) {
  const values = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    values[i] = (state | 0) * 2 ** -31;
  }
  return values;
}

const SCALE = 64;
const MARGIN = 0.5;

/**
 * Weights of any direction and embeddings at the angle to their own at which the loss goes from 0.55 to
 * 0.85 over the batch, through the gate: a cosine with another class is about normal with variance
 * 1 / dim, so the other classes' exponentials sum to classes * exp(scale^2 / (2 dim)).
 */
function makeInput({ batch, dim, classes }) {
  const weights = uniforms(classes * dim);
  const labels = Int32Array.from({ length: batch }, (_, i) => Math.floor((i * classes) / batch));
  const embeddings = new Float32Array(batch * dim);
  const others = Math.log(classes) + SCALE ** 2 / (2 * dim);
  for (let row = 0; row < batch; row++) {
    const loss = 0.55 + (0.3 * row) / batch;
    const target = Math.min(1, (others - Math.log(Math.expm1(loss))) / SCALE);
    const angle = Math.max(0, Math.acos(target) - MARGIN);
    const own = unit(weights.subarray(labels[row] * dim, (labels[row] + 1) * dim));
    const other = unit(uniforms(dim));
    const along = other.reduce((sum, value, i) => sum + value * own[i], 0);
    const across = unit(other.map((value, i) => value - along * own[i]));
    for (let i = 0; i < dim; i++) {
      embeddings[row * dim + i] = 20 * (Math.cos(angle) * own[i] + Math.sin(angle) * across[i]);
    }
  }
  return { embeddings, weights, labels };
}

function unit(values) {
  const norm = Math.hypot(...values);
  return Float64Array.from(values, (value) => value / norm);
}

/** Squared error over squared size. */
function nmse(found, expected) {
  let [error, size] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error += (found[i] - expected[i]) ** 2;
    size += expected[i] ** 2;
  }
  return error / size;
}

async function compareHead(shape) {
  const [batch, dim, classes] = shape.split('x').map(Number);
  const input = makeInput({ batch, dim, classes });
  const loss = {
    base: { kind: 'arcface', scale: SCALE, margin: MARGIN },
    weighting: { kind: 'hard-mining' },
  };
  const compute = async (options) => {
    const head = await MarginHead.create({ classes, dim, loss, ...options });
    try {
      return await head.forwardBackward(input);
    } finally {
      await head.dispose();
    }
  };
  const expected = await compute({ device: 'cpu', precision: 'fp32' });
  const within = expected.baseLoss.filter((each) => each > 0.55 && each < 0.85).length;
  const results = [];
  for (const precision of onCpu ? ['fp32'] : ['fp32', 'fp16', 'bf16']) {
    for (const implementation of ['fused', 'unfused']) {
      const found = await compute({ device, precision, implementation });
      const errors = {
        baseLoss: nmse(found.baseLoss, expected.baseLoss),
        weightedLoss: nmse(found.weightedLoss, expected.weightedLoss),
        gradEmbeddings: nmse(found.gradEmbeddings, expected.gradEmbeddings),
        gradWeights: nmse(found.gradWeights, expected.gradWeights),
      };
      const most = precision === 'fp32' ? 1e-7 : 1e-4;
      const ok = Object.values(errors).every((error) => error < most);
      results.push({ ok, shape, precision, implementation, rowsInTheGate: within, errors });
    }
  }
  return results;
}

try {
  const results = [];
  if (what === 'losses') results.push(...(await compareLosses()));
  if (what === 'repeats') results.push(...(await compareRepeats()));
  if (what === 'together') results.push(...(await trainTogether()));
  for (const shape of shapes) results.push(...(await compareHead(shape)));
  console.log(JSON.stringify({ device, what, results }, null, 2));
  if (results.length === 0 || results.some(({ ok }) => !ok)) process.exitCode = 1;
} finally {
  fs.rmSync(folder, { recursive: true, force: true });
}
