// Generated faces, and a model that saw them for some seconds: for examples that are given none.
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { generateFaces, openDataset, Trainer } from 'hardmine';

/** Runs an example with a folder of its own, which is removed at the end. */
export async function inTemporaryFolder(example) {
  const folder = await mkdtemp(join(tmpdir(), 'hardmine-example-'));
  try {
    await example(folder);
  } finally {
    await rm(folder, { recursive: true });
  }
}

/** A packed set of 12 people with 4 images each; its path. */
export const drawFaces = (folder) =>
  generateFaces({ identities: 12, imagesPerIdentity: 4, seed: 1, out: join(folder, 'set') });

/** The same faces as a folder of JPEGs, one sub-folder a person; its path. */
export async function drawPhotos(folder) {
  const dataset = await openDataset(await drawFaces(folder));
  const photos = join(folder, 'photos');
  try {
    for (const [i, label] of dataset.labels.entries()) {
      const person = join(photos, dataset.names[label]);
      await mkdir(person, { recursive: true });
      await writeFile(join(person, `${(i % 4) + 1}.jpg`), await dataset.records.jpeg(i));
    }
  } finally {
    await dataset.dispose();
  }
  return photos;
}

/** A model that saw these faces for 48 small steps: it knows them a little, and nobody else; its file. */
export async function trainSmallModel(folder) {
  const trainer = await Trainer.create({
    data: await drawFaces(folder),
    out: join(folder, 'run'),
    validation: 'none',
    batch: 2,
    epochs: 2,
    scale: 12,
    margin: 0.1,
    lr: 0.02,
    // The files of a run take longer than these steps: once, at the end.
    validateEvery: 2,
    checkpointEvery: 48,
  });
  try {
    for await (const _ of trainer.run());
  } finally {
    await trainer.dispose();
  }
  return join(folder, 'run', 'best.safetensors');
}
