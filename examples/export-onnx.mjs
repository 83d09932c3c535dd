// Exports a model to ONNX and runs it in onnxruntime-node (`npm install onnxruntime-node`), as any other
// program would: RGB, channels first, (x - 127.5) / 128.
//
//   node examples/export-onnx.mjs [MODEL OUT.onnx]
import { join } from 'node:path';
import { FaceModel, openDataset } from 'hardmine';
import { InferenceSession, Tensor } from 'onnxruntime-node';
import { drawFaces, inTemporaryFolder, trainSmallModel } from './generated.mjs';

const SIDE = 112; // pixels
const AREA = SIDE * SIDE;

/** RGB bytes [n, 112, 112, 3] to the input of the network, float [n, 3, 112, 112]. */
function networkInput(images) {
  const count = images.length / (3 * AREA);
  const input = new Float32Array(images.length);
  for (let image = 0; image < count; image++) {
    for (let pixel = 0; pixel < AREA; pixel++) {
      for (let channel = 0; channel < 3; channel++) {
        const value = images[(image * AREA + pixel) * 3 + channel];
        input[(image * 3 + channel) * AREA + pixel] = (value - 127.5) / 128;
      }
    }
  }
  return new Tensor('float32', input, [count, 3, SIDE, SIDE]);
}

async function exportAndRun(modelPath, out, images) {
  const model = await FaceModel.load(modelPath);
  try {
    await model.exportOnnx(out);
    const session = await InferenceSession.create(out);
    const { embedding } = await session.run({ input: networkInput(images) });
    await session.release();
    const ours = await model.embed(images);
    let least = 1;
    for (let at = 0; at < ours.length; at += model.embedding) {
      const [a, b] = [ours, embedding.data].map((rows) => rows.subarray(at, at + model.embedding));
      least = Math.min(least, model.similarity(a, b));
    }
    console.log(`${out}: embeddings ${embedding.dims.join(' x ')}`);
    console.log(`least cosine with hardmine's own embeddings: ${least.toFixed(6)}`);
  } finally {
    await model.dispose();
  }
}

await inTemporaryFolder(async (folder) => {
  const dataset = await openDataset(await drawFaces(folder));
  const images = await dataset.records.decode(Int32Array.of(0, 10, 20, 30));
  await dataset.dispose();
  const [model, out] = process.argv.slice(2);
  if (model && out) await exportAndRun(model, out, images);
  else await exportAndRun(await trainSmallModel(folder), join(folder, 'model.onnx'), images);
});
