/** Celebrities in Frontal-Profile: frontal against frontal (FF) and frontal against profile (FP) faces. */

import { join } from 'node:path';
import { exists } from '../data/files.js';
import { mapBounded } from '../data/images.js';
import { checkPath, HardmineError, quote } from '../errors.js';
import { type AlignFace, ImageFiles } from './image-source.js';
import { findImage, linesOf, readList, refuseMissing } from './lists.js';
import {
  embedForPairs,
  evaluatePairs,
  type ImagesResult,
  noteMissing,
  type ScoreModel,
  type VerificationPair,
} from './pairs.js';
import { type ProtocolName, rowLength } from './protocols.js';

const FOLDS = 10;
const KINDS = ['FF', 'FP'] as const;
type Kind = (typeof KINDS)[number];

export interface CfpLists {
  /** "001/frontal/01", frontal images first, each without its extension. */
  images: string[];
  /** `a` and `b` are indices of `images`. */
  pairs: Record<Kind, VerificationPair[]>;
}

/**
 * Reads the protocol's folder: `Pair_list_F.txt` and `Pair_list_P.txt` number the images from 1 ("1
 * ../Data/Images/001/frontal/01.jpg"), and `Split/{FF,FP}/01..10/{same,diff}.txt` hold pairs of those
 * numbers ("5,97"), in FP a frontal one first.
 *
 * @throws HardmineError ERR_PROTOCOL with the file and line for everything else, for a pair under `same`
 *   of two people or under `diff` of one, and for a fold without both kinds
 */
export async function readCfpLists(folder: string): Promise<CfpLists> {
  const frontal = await readImageList(join(folder, 'Pair_list_F.txt'), 'frontal');
  const profile = await readImageList(join(folder, 'Pair_list_P.txt'), 'profile');
  const images = [...frontal, ...profile];
  const read = async (kind: Kind): Promise<VerificationPair[]> => {
    const second =
      kind === 'FF'
        ? { first: 0, count: frontal.length }
        : { first: frontal.length, count: profile.length };
    const pairs: VerificationPair[] = [];
    for (let fold = 0; fold < FOLDS; fold++) {
      for (const same of [true, false]) {
        const path = join(
          folder,
          'Split',
          kind,
          String(fold + 1).padStart(2, '0'),
          same ? 'same.txt' : 'diff.txt',
        );
        const lines = linesOf(await readList(path, '--cfp-protocol'));
        if (lines.length === 0) throw refusal(path, 0, 'found no pair, expected "number,number"');
        for (const [line, text] of lines.entries()) {
          const match = /^(\d{1,9}),(\d{1,9})$/.exec(text);
          const a = Number(match?.[1]) - 1;
          const b = Number(match?.[2]) - 1;
          // Written so that NaN, of a line that is no pair, fails too.
          if (!(a >= 0 && a < frontal.length && b >= 0 && b < second.count)) {
            throw refusal(
              path,
              line,
              `found ${quote(text)}, expected two numbers of images, from 1 to ${frontal.length} and from 1 to ${second.count}`,
            );
          }
          const pair = { a, b: second.first + b, same, fold };
          if (pair.a === pair.b) throw refusal(path, line, 'it pairs an image with itself');
          if ((personOf(images[pair.a]!) === personOf(images[pair.b]!)) !== same) {
            throw refusal(
              path,
              line,
              `${images[pair.a]} and ${images[pair.b]} stand under ${same ? 'same' : 'diff'}`,
            );
          }
          pairs.push(pair);
        }
      }
    }
    return pairs;
  };
  return { images, pairs: { FF: await read('FF'), FP: await read('FP') } };
}

async function readImageList(path: string, pose: 'frontal' | 'profile'): Promise<string[]> {
  const lines = linesOf(await readList(path, '--cfp-protocol'));
  if (lines.length === 0) throw refusal(path, 0, 'found no image');
  return lines.map((text, line) => {
    // Digits and one of two words: no such path leads out of the data set.
    const match = /^(\d{1,9})\s+(?:\.\.\/Data\/Images\/)?(\d{1,9}\/(\w+)\/\d{1,9})\.jpg$/.exec(
      text,
    );
    if (Number(match?.[1]) !== line + 1 || match?.[3] !== pose) {
      throw refusal(
        path,
        line,
        `found ${quote(text)}, expected "${line + 1} ../Data/Images/001/${pose}/01.jpg"`,
      );
    }
    return match[2]!;
  });
}

function refusal(path: string, line: number, what: string): HardmineError {
  return new HardmineError(
    'ERR_PROTOCOL',
    `${path}, line ${line + 1}: ${what}; use CFP's own Protocol folder.`,
  );
}

/** The person of an image of the lists, "001". */
export function personOf(image: string): string {
  return image.slice(0, image.indexOf('/'));
}

export interface EvaluateCfp {
  /** The data set, or the folder of its images: `Data/Images/001/frontal/01.jpg`, or `001/frontal/01.jpg`. */
  root: string;
  /** Folder of the lists; `Protocol` in `root` by default. */
  lists?: string;
  /** Images a call of the model, 64 by default. */
  batch?: number;
  protocol?: ProtocolName;
  /** For images that are not aligned yet. */
  align?: AlignFace;
  onProgress?: (done: number, total: number) => void;
  signal?: AbortSignal;
}

type CfpPart<Name extends string> = ImagesResult & {
  dataset: Name;
  /** `paths` are the files that the hardest pairs' rows mean. */
  details: { paths: string[] };
};

export interface CfpResult {
  ff: CfpPart<'cfp-ff'>;
  fp: CfpPart<'cfp-fp'>;
}

/**
 * CFP's two experiments, ten folds of 350 + 350 pairs each. Every image that a pair names is embedded
 * once.
 *
 * @throws HardmineError ERR_PROTOCOL for bad lists or images that are missing (the first ten by name),
 *   ERR_DATA for one that cannot be read or is not 112x112, ERR_ABORTED after `signal`
 */
export async function evaluateCfp(model: ScoreModel, options: EvaluateCfp): Promise<CfpResult> {
  checkPath(options?.root, 'CFP');
  const { root, lists, align, ...embedding } = options;
  const { protocol = 'insightface' } = embedding;
  const { pairs, used, paths } = await findCfpImages(root, lists);
  const source = new ImageFiles(paths, align);
  const embeddings = await embedForPairs(model, { images: source, ...embedding });
  const part = <Name extends string>(dataset: Name, kind: Kind): CfpPart<Name> => {
    const result = evaluatePairs({
      embeddings,
      dim: rowLength(model.embedding, protocol),
      pairs: pairs[kind].map((pair) => ({
        ...pair,
        a: used.rows.get(pair.a)!,
        b: used.rows.get(pair.b)!,
      })),
      protocol,
      withoutFace: source.withoutFace,
    });
    return {
      ...noteMissing(result, source),
      dataset,
      details: { ...result.details, paths },
    };
  };
  return { ff: part('cfp-ff', 'FF'), fp: part('cfp-fp', 'FP') };
}

/**
 * The lists and the files that they name.
 *
 * @throws HardmineError ERR_PROTOCOL for bad lists or images that are missing
 */
export async function findCfpImages(root: string, lists = join(root, 'Protocol')) {
  const { images, pairs } = await readCfpLists(lists);
  const used = usedRows([...pairs.FF, ...pairs.FP], images);
  return { pairs, used, paths: await findImages(root, used.images) };
}

/** The images that pairs name, and their rows. */
function usedRows(pairs: readonly VerificationPair[], images: readonly string[]) {
  const named = new Set(pairs.flatMap(({ a, b }) => [a, b]));
  const indices = [...named].sort((a, b) => a - b);
  return {
    images: indices.map((index) => images[index]!),
    rows: new Map(indices.map((index, row) => [index, row])),
  };
}

/** Where the listed images stand below `root`: Data/Images, Images or `root` itself; null for one that is not there. */
export async function locateCfpImages(
  root: string,
  images: readonly string[],
): Promise<{ folder: string; paths: (string | null)[] }> {
  const candidates = [join(root, 'Data', 'Images'), join(root, 'Images'), root];
  const standing = await Promise.all(candidates.map(exists));
  const folder = candidates.find((_, i) => standing[i]) ?? root;
  return { folder, paths: await mapBounded(images, (stem) => findImage(folder, stem)) };
}

async function findImages(root: string, images: readonly string[]): Promise<string[]> {
  const { folder, paths } = await locateCfpImages(root, images);
  const missing = images.filter((_, i) => paths[i] === null).map((stem) => `${stem}.jpg`);
  refuseMissing(missing, images.length, 'images', folder);
  return paths.filter((path) => path !== null);
}
