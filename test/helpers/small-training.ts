/** Small data sets and runs for the tests of training. */
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { ConfigInput } from '../../src/config.js';
import { openDataset } from '../../src/data/dataset.js';
import { generateFaces } from '../../src/data/generated-faces.js';
import { Trainer, type TrainerEvent, type TrainerInput } from '../../src/trainer.js';

/** 12 people with 8 images each: 12 steps of 8 images an epoch. */
export const PEOPLE = 12;
export const IMAGES = 8;

/** Draws the faces of 12 people; returns the .rec. */
export function drawFaces(out: string): Promise<string> {
  return generateFaces({ identities: PEOPLE, imagesPerIdentity: IMAGES, seed: 7, out });
}

/** Settings of a run that takes little time. */
export function smallConfig(data: string, out: string): ConfigInput {
  return {
    data,
    out,
    validation: 'none',
    scale: 16,
    lr: 0.02,
    embedding: 32,
    batch: 8,
    device: 'cpu',
    deterministic: true,
  };
}

/** Runs to the end, until `stopAt` says so of an event, or until `controller` aborts; returns what happened. */
export async function runTraining(
  config: TrainerInput,
  stopAt: (event: TrainerEvent) => boolean = () => false,
  controller = new AbortController(),
): Promise<{ events: TrainerEvent[]; error: unknown }> {
  const trainer = await Trainer.create(config);
  const events: TrainerEvent[] = [];
  let error: unknown = null;
  try {
    for await (const event of trainer.run({ signal: controller.signal })) {
      events.push(event);
      if (stopAt(event)) controller.abort();
    }
  } catch (caught) {
    error = caught;
  } finally {
    await trainer.dispose();
  }
  return { events, error };
}

/** SHA-256 of the network, the head and the momentum of a checkpoint, from its manifest. */
export async function checkpointHashes(path: string): Promise<Record<string, string>> {
  const manifest = JSON.parse(await readFile(join(path, 'MANIFEST.json'), 'utf8')) as {
    files: Record<string, { sha256: string }>;
  };
  const hashes: Record<string, string> = {};
  for (const [name, { sha256 }] of Object.entries(manifest.files)) {
    if (name.endsWith('.safetensors')) hashes[name] = sha256;
  }
  return hashes;
}

/** The images of a .rec as a folder of people. */
export async function writeFolder(rec: string, folder: string): Promise<void> {
  const dataset = await openDataset(rec);
  try {
    const seen = new Map<number, number>();
    for (const [i, label] of dataset.labels.entries()) {
      const number = (seen.get(label) ?? 0) + 1;
      seen.set(label, number);
      const name = `Person_${String(label).padStart(2, '0')}`;
      await mkdir(join(folder, name), { recursive: true });
      const file = `${name}_${String(number).padStart(4, '0')}.jpg`;
      await writeFile(join(folder, name, file), await dataset.records.jpeg(i));
    }
  } finally {
    await dataset.dispose();
  }
}

/** writeFolder with a list of pairs in LFW's format beside the people: three folds of 4 and 4. */
export async function writeLfw(rec: string, folder: string): Promise<string> {
  await writeFolder(rec, folder);
  const person = (i: number) => `Person_${String(i % PEOPLE).padStart(2, '0')}`;
  const lines = ['3\t4'];
  for (let fold = 0; fold < 3; fold++) {
    for (let i = 0; i < 4; i++) lines.push(`${person(4 * fold + i)}\t${i + 1}\t${i + 2}`);
    for (let i = 0; i < 4; i++) {
      lines.push(`${person(4 * fold + i)}\t${i + 1}\t${person(4 * fold + i + 1)}\t${i + 3}`);
    }
  }
  const list = join(folder, 'pairs.txt');
  await writeFile(list, `${lines.join('\n')}\n`);
  return list;
}

/**
 * The images of a .rec as aligned frames of YouTube Faces: of every person the videos 0 and 1 of half the
 * images each, with a list of two splits of 4 and 4 pairs beside them.
 */
export async function writeYtf(rec: string, root: string): Promise<string> {
  const dataset = await openDataset(rec);
  try {
    const seen = new Map<number, number>();
    for (const [i, label] of dataset.labels.entries()) {
      const number = seen.get(label) ?? 0;
      seen.set(label, number + 1);
      const video = number < IMAGES / 2 ? 0 : 1;
      const folder = join(root, 'aligned_images_DB', `Person_${label}`, String(video));
      await mkdir(folder, { recursive: true });
      const file = join(folder, `aligned_detect_${video}.${number}.jpg`);
      await writeFile(file, await dataset.records.jpeg(i));
    }
  } finally {
    await dataset.dispose();
  }
  const lines: string[] = [];
  for (const split of [0, 1]) {
    for (let pair = 0; pair < 8; pair++) {
      const a = 4 * split + (pair % 4);
      const b = pair < 4 ? a : (a + 1) % PEOPLE;
      lines.push(`${split + 1}, ${pair + 1}, Person_${a}/0, Person_${b}/1, ${pair < 4 ? 1 : 0}`);
    }
  }
  const list = join(root, 'splits.txt');
  await writeFile(list, `${lines.join('\n')}\n`);
  return list;
}
