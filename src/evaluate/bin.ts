/** Verification sets in InsightFace's .bin (LFW, AgeDB-30, CALFW, CPLFW, CFP-FP and their like). */

import { checkPath, HardmineError } from '../errors.js';
import { readVerificationBin } from '../formats/verification-bin.js';
import { EncodedImages } from './image-source.js';
import {
  evaluateImages,
  type ImagesResult,
  type ScoreModel,
  type VerificationPair,
} from './pairs.js';
import type { ProtocolName } from './protocols.js';

const FOLDS = 10;

/**
 * The fold of each of `pairs` pairs as scikit-learn's KFold(10, shuffle=False) cuts them: ten blocks in
 * their order, the first of which are longer by one where ten does not divide.
 */
export function blockFolds(pairs: number): number[] {
  const size = Math.floor(pairs / FOLDS);
  const longer = pairs % FOLDS;
  return Array.from({ length: FOLDS }, (_, fold) =>
    new Array<number>(size + (fold < longer ? 1 : 0)).fill(fold),
  ).flat();
}

export interface EvaluateBin {
  path: string;
  /** Images a call of the model, 64 by default. */
  batch?: number;
  protocol?: ProtocolName;
  onProgress?: (done: number, total: number) => void;
  signal?: AbortSignal;
}

export type BinResult = ImagesResult & {
  dataset: 'bin';
  /** `images` are the files in the set, as the hardest pairs' rows mean them. */
  details: { images: Uint8Array[] };
};

/**
 * A .bin file in ten folds, its blocks, as InsightFace judges it.
 *
 * @throws HardmineError ERR_FORMAT or ERR_DATA for a file that is no verification set or an image in it that
 *   is not 112x112, ERR_PROTOCOL for fewer than ten pairs or pairs of one kind, ERR_ABORTED after `signal`
 */
export async function evaluateBin(model: ScoreModel, options: EvaluateBin): Promise<BinResult> {
  checkPath(options?.path, 'the verification set');
  const { path, ...embedding } = options;
  const { images, same } = await readVerificationBin(path);
  if (same.length < FOLDS) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `${path} holds ${same.length} pairs, expected at least ${FOLDS} to cut into folds; use a whole verification set.`,
    );
  }
  const fold = blockFolds(same.length);
  const pairs = same.map(
    (label, k): VerificationPair => ({ a: 2 * k, b: 2 * k + 1, same: label, fold: fold[k]! }),
  );
  const source = new EncodedImages(images, path);
  const result = await evaluateImages(model, { images: source, pairs, ...embedding });
  return { ...result, dataset: 'bin', details: { ...result.details, images } };
}
