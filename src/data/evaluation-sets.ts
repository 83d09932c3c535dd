/** Sets that are evaluated on and not trained on, as inspection sees them: their images and their words. */

import { realpath, stat } from 'node:fs/promises';
import { dirname, join, relative } from 'node:path';
import { locateCfpImages, personOf, readCfpLists } from '../evaluate/cfp.js';
import { readVerificationBin } from '../formats/verification-bin.js';
import {
  countIdentities,
  dataError,
  fileSet,
  type Identities,
  type ImageFile,
  type ImageSet,
} from './image-source.js';
import { mapBounded } from './images.js';
import { IMAGE_NAME, listFolder } from './list-folder.js';
import type { EvaluationSet } from './recognise.js';

/** What such a set holds, in its own words. */
export type EvaluationFacts =
  | { kind: 'verification-bin'; pairs: number; same: number; different: number }
  | ({ kind: 'ytf'; videos: number } & Identities)
  | ({
      kind: 'cfp';
      frontal: number;
      profile: number;
      /** Listed images that are not there: the protocol is published apart from them. */
      missing: number;
      /** Pairs of the FF and FP protocols in all folds. */
      pairs: { frontalFrontal: number; frontalProfile: number };
    } & Identities);

/** @throws ERR_DATA, ERR_FORMAT, ERR_IO, ERR_PROTOCOL for what is not such a set, naming the file */
export async function openEvaluationSet(
  found: EvaluationSet,
): Promise<{ set: ImageSet; facts: EvaluationFacts }> {
  switch (found.kind) {
    case 'verification-bin':
      return openBin(found.path);
    case 'ytf':
      return openFrames(found.path, found.frames);
    case 'cfp':
      return openCfp(found.path, found.protocol);
  }
}

/** A .bin does not say who its people are: each pair is a class of its own. */
async function openBin(path: string): Promise<{ set: ImageSet; facts: EvaluationFacts }> {
  const { images, same } = await readVerificationBin(path);
  const positives = same.filter(Boolean).length;
  const name = (index: number): string => `image ${index} of ${path}`;
  return {
    set: {
      title: path,
      count: images.length,
      bytes: (await stat(path)).size,
      names: same.map((_, pair) => `pair ${pair}`),
      label: (index) => Math.floor(index / 2),
      name,
      place: (index) => ({ image: index }),
      read: async (index) => Buffer.from(images[index]!),
      dispose: async () => undefined,
    },
    facts: {
      kind: 'verification-bin',
      pairs: same.length,
      same: positives,
      different: same.length - positives,
    },
  };
}

/** YouTube Faces: Person/video/frame.jpg; other files (labelled boxes, headers) are no frames. */
async function openFrames(
  path: string,
  folder: string,
): Promise<{ set: ImageSet; facts: EvaluationFacts }> {
  const root = await realpath(folder);
  const people: string[] = [];
  const files: ImageFile[] = [];
  let videos = 0;
  for (const person of await listFolder(root, root)) {
    if (!person.stats.isDirectory()) continue;
    const before = files.length;
    for (const video of await listFolder(join(root, person.name), root)) {
      if (!video.stats.isDirectory()) continue;
      videos += 1;
      for (const frame of await listFolder(join(root, person.name, video.name), root)) {
        if (!frame.stats.isFile() || !IMAGE_NAME.test(frame.name)) continue;
        files.push({
          name: `${person.name}/${video.name}/${frame.name}`,
          identity: people.length,
          bytes: Number(frame.stats.size),
        });
      }
    }
    if (files.length > before) people.push(person.name);
  }
  if (files.length === 0) {
    throw dataError(
      `${folder} holds no frames: YouTube Faces keeps them as Person/video/frame.jpg, so unpack it there.`,
    );
  }
  const set = { ...fileSet(folder, files, people), title: path };
  return {
    set,
    facts: { kind: 'ytf', videos, ...countIdentities(set) },
  };
}

async function openCfp(
  path: string,
  protocol: string,
): Promise<{ set: ImageSet; facts: EvaluationFacts }> {
  const { images, pairs } = await readCfpLists(protocol);
  const root = dirname(protocol);
  const { paths } = await locateCfpImages(root, images);
  const people = [...new Set(images.map(personOf))].sort();
  const numbers = new Map(people.map((name, number) => [name, number]));
  const files: ImageFile[] = [];
  await mapBounded([...paths.entries()], async ([i, file]) => {
    if (file === null) return;
    const { size } = await stat(file);
    const identity = numbers.get(personOf(images[i]!))!;
    files.push({ name: relative(root, file), identity, bytes: size });
  });
  files.sort((a, b) => (a.name < b.name ? -1 : 1));
  const set = { ...fileSet(root, files, people), title: path };
  const frontal = images.filter((image) => image.includes('/frontal/')).length;
  return {
    set,
    facts: {
      kind: 'cfp',
      ...countIdentities(set),
      frontal,
      profile: images.length - frontal,
      missing: images.length - files.length,
      pairs: { frontalFrontal: pairs.FF.length, frontalProfile: pairs.FP.length },
    },
  };
}
