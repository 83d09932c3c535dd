/** Labeled Faces in the Wild: its lists of pairs, its folder layout, its protocol. */

import { join } from 'node:path';
import { mapBounded } from '../data/images.js';
import { checkPath, HardmineError, quote } from '../errors.js';
import { type AlignFace, ImageFiles } from './image-source.js';
import { findImage, isPlainName, linesOf, readList, refuseMissing } from './lists.js';
import {
  evaluateImages,
  type ImagesResult,
  type ScoreModel,
  type VerificationPair,
} from './pairs.js';
import type { ProtocolName } from './protocols.js';

/** Folds into which a list without folds of its own (View 1) is cut. */
const VIEW1_FOLDS = 10;

export interface LfwImage {
  name: string;
  /** From 1. */
  number: number;
}

export interface LfwPairs {
  /** 2 for a list in folds (pairs.txt), 1 for a single list (pairsDevTrain.txt, pairsDevTest.txt). */
  view: 1 | 2;
  folds: number;
  /** Distinct images in order of first mention. */
  images: LfwImage[];
  /** `a` and `b` are indices of `images`. */
  pairs: VerificationPair[];
}

/**
 * Reads a list of pairs. View 2 begins with "folds TAB n" and holds, for each fold, n lines
 * "name number number" of one person and n lines "name number name number" of two. View 1 begins with
 * "n" and holds n and n such lines; it has no folds, so its pairs are cut into ten by their place in
 * the list: fold f takes the f-th tenth of the genuine pairs and the f-th tenth of the impostor pairs
 * (blocks over the whole file would be folds of one kind only).
 *
 * @param path names the list in errors
 * @throws HardmineError ERR_PROTOCOL with the line's number for everything else
 */
export function parseLfwPairs(text: string, path = 'pairs.txt'): LfwPairs {
  const lines = linesOf(text);
  const fail = (line: number, what: string): never => {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `${path}, line ${line + 1}: ${what}; use one of LFW's own lists (pairs.txt, pairsDevTest.txt, pairsDevTrain.txt).`,
    );
  };
  const wholeNumber = (text: string, line: number): number => {
    // Nine digits: far beyond any list, and exact.
    if (!/^[0-9]{1,9}$/.test(text) || Number(text) === 0) {
      fail(line, `found ${quote(text)}, expected a whole number from 1 up`);
    }
    return Number(text);
  };
  const header = (lines[0] ?? '').split(/\s+/);
  if (header.length > 2) {
    fail(0, `found ${quote(lines[0] ?? '')}, expected "folds TAB pairs" or "pairs"`);
  }
  const view = header.length === 2 ? 2 : 1;
  const blocks = view === 2 ? wholeNumber(header[0]!, 0) : 1;
  const perKind = wholeNumber(header.at(-1)!, 0);
  const folds = view === 2 ? blocks : VIEW1_FOLDS;
  if (folds < 2) fail(0, `found ${folds} fold, expected at least two`);
  if (view === 1 && perKind < VIEW1_FOLDS) {
    fail(
      0,
      `found ${perKind} pairs of each kind, expected at least ${VIEW1_FOLDS} to cut into folds`,
    );
  }
  const expected = 2 * blocks * perKind;
  if (lines.length - 1 !== expected) {
    fail(0, `it announces ${expected} pairs but ${lines.length - 1} lines follow`);
  }

  const images: LfwImage[] = [];
  const rows = new Map<string, number>();
  const row = (name: string, digits: string, line: number): number => {
    // A name is a folder's: it must not lead out of the data set.
    if (!isPlainName(name)) {
      fail(line, `the name ${quote(name)} is no plain folder name`);
    }
    const number = wholeNumber(digits, line);
    const key = `${name}\t${number}`;
    const known = rows.get(key);
    if (known !== undefined) return known;
    rows.set(key, images.length);
    return images.push({ name, number }) - 1;
  };
  const pairs = lines.slice(1).map((text, i): VerificationPair => {
    const line = i + 1;
    const block = Math.floor(i / (2 * perKind));
    const place = i % perKind;
    const same = i % (2 * perKind) < perKind;
    const fields = text.split(/\s+/);
    if (fields.length !== (same ? 3 : 4)) {
      fail(
        line,
        `found ${quote(text)}, expected ${same ? '"name number number"' : '"name number name number"'}`,
      );
    }
    const a = row(fields[0]!, fields[1]!, line);
    const b = same ? row(fields[0]!, fields[2]!, line) : row(fields[2]!, fields[3]!, line);
    if (a === b) fail(line, 'it pairs an image with itself');
    if (!same && fields[0] === fields[2]) {
      fail(line, `it gives ${quote(fields[0]!)} as two different people`);
    }
    return { a, b, same, fold: view === 2 ? block : Math.floor((place * folds) / perKind) };
  });
  return { view, folds, images, pairs };
}

export interface EvaluateLfw {
  /** Folder with one folder a person: `Name/Name_0001.jpg` (or .png), aligned to 112x112. */
  root: string;
  /** List of pairs; `pairs.txt` in `root` by default. */
  pairs?: string;
  /** Images a call of the model, 64 by default. */
  batch?: number;
  protocol?: ProtocolName;
  /** For images that are not aligned yet. */
  align?: AlignFace;
  /** Told of distinct images embedded so far. */
  onProgress?: (done: number, total: number) => void;
  signal?: AbortSignal;
}

/**
 * `evaluate --json` without `model`; `missing` counts the images in which `align` found no face (a file
 * that is not there is an error), `details.paths` are the files that the hardest pairs' rows mean.
 */
export type LfwResult = ImagesResult & {
  dataset: 'lfw' | 'lfw-view1';
  details: { paths: string[] };
};

/**
 * The LFW protocol: View 2 in its own folds (report it once), View 1 in ten (choose settings on it).
 * Every distinct image is embedded once, together with its mirror image.
 *
 * @throws HardmineError ERR_PROTOCOL for a bad list or for images that are missing (the first ten by
 *   name), ERR_DATA for one that cannot be read or is not 112x112, ERR_ABORTED after `signal`
 */
export async function evaluateLfw(model: ScoreModel, options: EvaluateLfw): Promise<LfwResult> {
  checkPath(options?.root, 'LFW');
  const { root, pairs: list, align, ...embedding } = options;
  const { view, paths, pairs } = await readLfwPairs(root, list);
  const images = new ImageFiles(paths, align);
  const result = await evaluateImages(model, { images, pairs, ...embedding });
  return {
    ...result,
    dataset: view === 2 ? 'lfw' : 'lfw-view1',
    details: { ...result.details, paths },
  };
}

/**
 * A list of pairs (`pairs.txt` in `root` by default) and the files of its images.
 *
 * @param option how a user names the list, for the error when it cannot be read
 * @throws HardmineError ERR_PROTOCOL as `parseLfwPairs` and `findImages` do
 */
export async function readLfwPairs(
  root: string,
  list = join(root, 'pairs.txt'),
  option = '--pairs',
): Promise<LfwPairs & { paths: string[] }> {
  const parsed = parseLfwPairs(await readList(list, option), list);
  return { ...parsed, paths: await findImages(root, parsed.images) };
}

/**
 * Files of `images` under `root`: `Name/Name_0001.jpg`, else .png.
 *
 * @throws HardmineError ERR_PROTOCOL with the count of missing ones and the first ten
 */
export async function findImages(root: string, images: readonly LfwImage[]): Promise<string[]> {
  const missing: string[] = [];
  const paths = await mapBounded(images, async ({ name, number }) => {
    const stem = join(name, `${name}_${String(number).padStart(4, '0')}`);
    const path = await findImage(root, stem);
    if (path === null) missing.push(`${stem}.jpg`);
    return path ?? '';
  });
  refuseMissing(missing, images.length, 'images', root);
  return paths;
}
