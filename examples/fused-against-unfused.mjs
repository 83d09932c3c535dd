// The margin head fused against the textbook chain: the same loss and gradients, without the N x classes
// matrix of logits.
//
//   node examples/fused-against-unfused.mjs [BATCH DIM CLASSES]
//
// `hardmine bench head` measures this properly, beside the bare matrix products and with the memory taken.
import { MarginHead } from 'hardmine';

const [batch = 32, dim = 128, classes = 4000] = process.argv.slice(2).map(Number);
const REPEATS = 5;

const values = (count) => Float32Array.from({ length: count }, (_, i) => Math.sin(1 + i * i));
const input = {
  embeddings: values(batch * dim),
  weights: values(classes * dim),
  labels: Int32Array.from({ length: batch }, (_, row) => (row * 7) % classes),
};

async function run(implementation) {
  const head = await MarginHead.create({
    classes,
    dim,
    implementation,
    precision: 'fp32',
    loss: { base: { kind: 'arcface' }, weighting: { kind: 'hard-mining' } },
  });
  try {
    // The first call makes what the others use.
    const output = await head.forwardBackward(input);
    const times = [];
    for (let i = 0; i < REPEATS; i++) {
      const start = performance.now();
      await head.forwardBackward({ embeddings: input.embeddings, labels: input.labels });
      times.push(performance.now() - start);
    }
    const median = times.sort((a, b) => a - b)[Math.floor(REPEATS / 2)];
    console.log(
      `${implementation.padEnd(8)} loss ${output.loss.toFixed(6)}, ${median.toFixed(1)} ms`,
    );
    return output;
  } finally {
    await head.dispose();
  }
}

const fused = await run('fused');
const unfused = await run('unfused');
for (const name of ['gradEmbeddings', 'gradWeights']) {
  let difference = 0;
  let length = 0;
  for (const [i, value] of unfused[name].entries()) {
    difference += (fused[name][i] - value) ** 2;
    length += value ** 2;
  }
  console.log(
    `${name} differ by ${Math.sqrt(difference / length).toExponential(1)} of their length`,
  );
}
