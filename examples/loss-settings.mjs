// Settings of the loss: every base loss, with and without a weighting, on the same embeddings.
//
//   node examples/loss-settings.mjs [EMBEDDINGS_PER_CLASS]
//
// Here a margin head stands alone, after a network of your own; the Trainer has the same settings under
// the same names (`loss`, `scale`, `margin`, `weighting`, `center`, ...).
import { MarginHead } from 'hardmine';

const each = Number(process.argv[2] ?? 8);
const classes = 10;
const dim = 16;

// Embeddings around a direction for each class.
let state = 1;
const noise = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 31 - 1;
};
const centers = Float32Array.from({ length: classes * dim }, noise);
const labels = Int32Array.from({ length: classes * each }, (_, row) => row % classes);
const embeddings = new Float32Array(labels.length * dim);
for (const [row, label] of labels.entries()) {
  for (let i = 0; i < dim; i++) {
    embeddings[row * dim + i] = centers[label * dim + i] + 0.5 * noise();
  }
}
const weights = Float32Array.from({ length: classes * dim }, () => 0.1 * noise());

const hardMining = { kind: 'hard-mining', alpha: 1.5, beta: 1.1, A: 35, B: 0.75 };
const settings = {
  softmax: { base: { kind: 'softmax' } },
  'a-softmax, lambda held at 5': { base: { kind: 'a-softmax', margin: 4, lambda: 5 } },
  arcface: { base: { kind: 'arcface', scale: 16, margin: 0.3 } },
  'arcface, margin gradient 1': {
    base: { kind: 'arcface', scale: 16, margin: 0.3 },
    gradient: 'detached',
  },
  cosface: { base: { kind: 'cosface', scale: 16, margin: 0.2 } },
  'combined margins': { base: { kind: 'combined', scale: 16, m1: 1, m2: 0.2, m3: 0.1 } },
  'euclidean margin': { base: { kind: 'euclidean-margin', margin: 0.4, pull: 0.5 } },
  'hard-mining arcface': {
    base: { kind: 'arcface', scale: 16, margin: 0.3 },
    weighting: hardMining,
  },
  'hard mining of the batch, as Algorithm 1': {
    base: { kind: 'arcface', scale: 16, margin: 0.3 },
    weighting: { ...hardMining, form: 'algorithm', reduction: 'batch' },
  },
  'knot magnify, with center loss': {
    base: { kind: 'arcface', scale: 16, margin: 0.3 },
    weighting: { kind: 'knot-magnify', gamma: 2 },
    center: { weight: 0.003, rate: 0.5 },
  },
};

const percent = (share) => `${(100 * share).toFixed(0)}%`.padStart(4);
for (const [name, loss] of Object.entries(settings)) {
  const head = await MarginHead.create({ classes, dim, loss });
  try {
    await head.setWeights(weights);
    const first = await head.step(embeddings, labels, { lr: 0.1 });
    let last = first;
    for (let i = 0; i < 200; i++) last = await head.step(embeddings, labels, { lr: 0.1 });
    console.log(
      `${name.padEnd(40)} base loss ${first.baseLoss.toFixed(3).padStart(7)} -> ${last.baseLoss.toFixed(3).padStart(7)}   right ${percent(first.accuracy)} -> ${percent(last.accuracy)}`,
    );
  } finally {
    await head.dispose();
  }
}
