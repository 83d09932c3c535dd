/** Sets that are evaluated on and not trained on, as inspection sees them: their images and their words. */

import { realpath, stat } from 'node:fs/promises';
import { dirname, join, relative, resolve } from 'node:path';
import { quote } from '../errors.js';
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
import { readRows } from './rows.js';

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

/** @throws ERR_DATA, ERR_FORMAT, ERR_IO for what is not such a set, naming the file */
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

/** A line of CFP's lists is an index and a path, or two indices. */
const MAX_CFP_ROW = 1024;

/** CFP: two lists of images, frontal and profile, and ten folds of pairs of their indices. */
async function openCfp(
  path: string,
  protocol: string,
): Promise<{ set: ImageSet; facts: EvaluationFacts }> {
  // The lists say ../Data/Images/001/frontal/01.jpg, from the protocol's folder.
  const root = dirname(protocol);
  const frontal = await readCfpList(join(protocol, 'Pair_list_F.txt'), root);
  const profile = await readCfpList(join(protocol, 'Pair_list_P.txt'), root);
  const listed = [...frontal, ...profile];
  // .../Images/PERSON/frontal/NN.jpg
  const person = (name: string): string => name.split('/').at(-3)!;
  const people = [...new Set(listed.map(person))].sort();
  const numbers = new Map(people.map((name, number) => [name, number]));
  const files: ImageFile[] = [];
  await mapBounded(listed, async (name) => {
    const stats = await stat(join(root, name)).catch(() => undefined);
    if (stats?.isFile())
      files.push({ name, identity: numbers.get(person(name))!, bytes: stats.size });
  });
  files.sort((a, b) => (a.name < b.name ? -1 : 1));
  const set = { ...fileSet(root, files, people), title: path };
  return {
    set,
    facts: {
      kind: 'cfp',
      ...countIdentities(set),
      frontal: frontal.length,
      profile: profile.length,
      missing: listed.length - files.length,
      pairs: {
        frontalFrontal: await countCfpPairs(join(protocol, 'Split', 'FF')),
        frontalProfile: await countCfpPairs(join(protocol, 'Split', 'FP')),
      },
    },
  };
}

/** Paths of a list below `root`. */
async function readCfpList(list: string, root: string): Promise<string[]> {
  const names: string[] = [];
  for await (const { line, bytes } of readRows(list, MAX_CFP_ROW)) {
    const [index, path = ''] = bytes.toString().trim().split(/\s+/, 2);
    const name = relative(root, resolve(dirname(list), path));
    const wanted = /^[^./\0][^\0]*\/(frontal|profile)\/[^/\0]+$/.test(name);
    if (index !== String(names.length + 1) || !wanted) {
      throw dataError(
        `${list}, line ${line}: found ${quote(bytes.toString())} where "${names.length + 1} ../Data/Images/PERSON/frontal/NN.jpg" or the like was expected: use CFP's own lists.`,
      );
    }
    names.push(name);
  }
  return names;
}

async function countCfpPairs(split: string): Promise<number> {
  const root = await realpath(split);
  let pairs = 0;
  for (const fold of await listFolder(root, root)) {
    for (const kind of ['same.txt', 'diff.txt']) {
      for await (const { line, bytes } of readRows(join(root, fold.name, kind), MAX_CFP_ROW)) {
        if (!/^\s*\d+\s*,\s*\d+\s*$/.test(bytes.toString())) {
          throw dataError(
            `${join(split, fold.name, kind)}, line ${line}: found ${quote(bytes.toString())} where two indices were expected ("4,7"): use CFP's own lists.`,
          );
        }
        pairs += 1;
      }
    }
  }
  return pairs;
}
