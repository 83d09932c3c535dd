// An evaluation of your own on a data set of people whom the model has not seen: pairs drawn by you, judged
// by LFW's protocol, and rank-1 identification done by hand. Beside the model the baseline that it must
// beat, the similarity of bare pixels.
//
//   node examples/evaluate-your-way.mjs [MODEL FACES]
import { join } from 'node:path';
import {
  embedForPairs,
  evaluatePairs,
  FaceModel,
  generateFaces,
  openDataset,
  pixelSimilarity,
} from 'hardmine';
import { inTemporaryFolder, trainSmallModel } from './generated.mjs';

const FOLDS = 5;

/** Each image with the next one of its person and with one of the next person, in folds by turns. */
function drawPairs(labels) {
  const groups = new Map();
  for (const [i, label] of labels.entries()) groups.set(label, [...(groups.get(label) ?? []), i]);
  const people = [...groups.values()];
  return people.flatMap((images, person) => {
    const others = people[(person + 1) % people.length];
    return images.slice(1).flatMap((b, i) => {
      const fold = (person + i) % FOLDS;
      return [
        { a: images[i], b, same: true, fold },
        { a: images[i], b: others[i % others.length], same: false, fold },
      ];
    });
  });
}

/** Share of the images whose nearest other image shows the same person. */
function rankOne(rows, dim, labels) {
  const norms = Array.from(labels, (_, row) =>
    Math.hypot(...rows.subarray(row * dim, (row + 1) * dim)),
  );
  const cosine = (a, b) => {
    let dot = 0;
    for (let i = 0; i < dim; i++) dot += rows[a * dim + i] * rows[b * dim + i];
    return dot / (norms[a] * norms[b]);
  };
  const images = [...labels.keys()];
  const right = images.filter((a) => {
    const others = images.filter((b) => b !== a);
    const nearest = others.reduce((best, b) => (cosine(a, b) > cosine(a, best) ? b : best));
    return labels[nearest] === labels[a];
  });
  return right.length / images.length;
}

async function evaluate(modelPath, faces) {
  const dataset = await openDataset(faces);
  const model = await FaceModel.load(modelPath);
  try {
    const images = await dataset.records.decode(Int32Array.from(dataset.labels.keys()));
    const pairs = drawPairs(dataset.labels);
    // Anything with `embedding` and embed() is a model: put your own beside these.
    for (const [name, scorer] of Object.entries({ model, pixels: pixelSimilarity })) {
      const embeddings = await embedForPairs(scorer, { images });
      const { accuracy, auc } = evaluatePairs({ embeddings, dim: scorer.embedding, pairs });
      const first = rankOne(embeddings, scorer.embedding, dataset.labels);
      console.log(
        `${name}: accuracy ${accuracy.mean.toFixed(3)} over ${pairs.length} pairs, AUC ${auc.toFixed(3)}, rank-1 ${first.toFixed(3)}`,
      );
    }
  } finally {
    await model.dispose();
    await dataset.dispose();
  }
}

const [model, faces] = process.argv.slice(2);
if (model && faces) {
  await evaluate(model, faces);
} else if (model) {
  console.error('usage: node evaluate-your-way.mjs [MODEL FACES]');
  process.exitCode = 2;
} else {
  await inTemporaryFolder(async (folder) => {
    // Another seed: other people than the model was trained on.
    const others = { identities: 6, imagesPerIdentity: 4, seed: 2, out: join(folder, 'others') };
    await evaluate(await trainSmallModel(folder), await generateFaces(others));
  });
}
