// Finds the faces in a photo folder that are nearest to the one in a photo.
//
//   node examples/nearest-faces.mjs [MODEL FOLDER PHOTO [MTCNN]]
//
// MTCNN is the folder with det1.npy, det2.npy and det3.npy of the facenet project: with it photographs of
// any size are taken and the face in each is found first (needs onnxruntime-node). Without it the files must
// be aligned faces of 112x112 pixels.
import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { FaceAligner, FaceModel } from 'hardmine';
import { drawPhotos, inTemporaryFolder, trainSmallModel } from './generated.mjs';

const SHOWN = 5;

/** One embedding a photo; those without a face are left out. */
async function embedAll(model, paths, mtcnn) {
  if (!mtcnn) {
    const rows = await model.embed(paths);
    return paths.map((path, i) => ({
      path,
      embedding: rows.subarray(i * model.embedding, (i + 1) * model.embedding),
    }));
  }
  const found = [];
  const aligner = await FaceAligner.load({ mtcnn });
  try {
    for (const path of paths) {
      const face = await aligner.align(path);
      if (face) found.push({ path, embedding: await model.embed(face.pixels) });
      else console.log(`no face in ${path}`);
    }
  } finally {
    await aligner.dispose();
  }
  return found;
}

async function search(modelPath, folder, photo, mtcnn) {
  const names = await readdir(folder, { recursive: true });
  const paths = names
    .filter((name) => /\.(jpe?g|png)$/i.test(name))
    .map((name) => join(folder, name));
  const model = await FaceModel.load(modelPath);
  try {
    const [wanted] = await embedAll(model, [photo], mtcnn);
    if (!wanted) return;
    const photos = await embedAll(model, paths, mtcnn);
    const ranked = photos
      .map(({ path, embedding }) => ({
        path,
        similarity: model.similarity(wanted.embedding, embedding),
      }))
      .sort((a, b) => b.similarity - a.similarity);
    console.log(`nearest to ${photo} of ${ranked.length} photos:`);
    for (const { path, similarity } of ranked.slice(0, SHOWN)) {
      console.log(`${similarity.toFixed(4)}  ${path}`);
    }
  } finally {
    await model.dispose();
  }
}

const [model, photos, photo, mtcnn] = process.argv.slice(2);
if (model && photos && photo) {
  await search(model, photos, photo, mtcnn);
} else if (model) {
  console.error('usage: node nearest-faces.mjs [MODEL FOLDER PHOTO [MTCNN]]');
  process.exitCode = 2;
} else {
  await inTemporaryFolder(async (folder) => {
    const drawn = await drawPhotos(folder);
    await search(await trainSmallModel(folder), drawn, join(drawn, 'face-3', '2.jpg'));
  });
}
