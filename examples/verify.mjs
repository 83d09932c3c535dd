// Do two images show the same person?
//
//   node examples/verify.mjs [MODEL A B]
//
// A and B are aligned faces of 112x112 pixels (examples/nearest-faces.mjs aligns photographs).
import { join } from 'node:path';
import { embedForPairs, FaceModel } from 'hardmine';
import { drawPhotos, inTemporaryFolder, trainSmallModel } from './generated.mjs';

async function verify(modelPath, pairs) {
  const model = await FaceModel.load(modelPath);
  try {
    // Found on people held out of training. A model trained without them, or from elsewhere, has none: then
    // this is a guess, to be replaced by what your own people need.
    const threshold = model.info.threshold ?? 0.3;
    for (const [a, b] of pairs) {
      // Image and mirror image together, as the threshold was found: model.embed() alone is a little worse.
      const embeddings = await embedForPairs(model, { images: [a, b] });
      const similarity = model.similarity(
        embeddings.subarray(0, model.embedding),
        embeddings.subarray(model.embedding),
      );
      const verdict = similarity >= threshold ? 'same person' : 'different people';
      console.log(
        `${verdict}: similarity ${similarity.toFixed(4)}, threshold ${threshold.toFixed(4)} (${a}, ${b})`,
      );
    }
  } finally {
    await model.dispose();
  }
}

const [model, a, b] = process.argv.slice(2);
if (model && a && b) {
  await verify(model, [[a, b]]);
} else if (model) {
  console.error('usage: node verify.mjs [MODEL A B]');
  process.exitCode = 2;
} else {
  await inTemporaryFolder(async (folder) => {
    const drawn = await drawPhotos(folder);
    const face = (person, image) => join(drawn, `face-${person}`, `${image}.jpg`);
    await verify(await trainSmallModel(folder), [
      [face(1, 1), face(1, 1)],
      [face(1, 1), face(1, 2)],
      [face(1, 1), face(2, 1)],
    ]);
  });
}
