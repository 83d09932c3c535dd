/**
 * How published code bases get from embeddings to a decision, so that a figure can be held against
 * theirs: what is compared, how a threshold is chosen on the training folds, which spread they print.
 */

import { HardmineError, oneOf } from '../errors.js';
import { countAtMost, countBelow } from './counting.js';

export const PROTOCOLS = ['insightface', 'facenet', 'sphereface', 'facex'] as const;
export type ProtocolName = (typeof PROTOCOLS)[number];

/** Values of the pairs on which a threshold is chosen, each kind in rising order. */
export interface TrainingValues {
  genuine: Float64Array;
  impostor: Float64Array;
}

export interface Protocol {
  /**
   * What becomes of the mirror image's embedding: added to the image's, set behind it (a row is twice as
   * long), or not taken at all.
   */
  readonly mirror: 'added' | 'concatenated' | 'none';
  /**
   * 'squared-l2' of unit embeddings: one person where value < threshold, else two. 'cosine': right is
   * value > threshold for one person and value < threshold for two, so a value on it is always wrong.
   */
  readonly score: 'squared-l2' | 'cosine';
  /** Whether the mean embedding of the training folds' pairs is taken off before normalising. */
  readonly centred: boolean;
  /** The spread over folds that the code base prints beside the mean. */
  readonly spread: 'std' | 'standardError' | null;
  readonly threshold: (train: TrainingValues) => number;
}

/** numpy.arange(0, 4, 0.01) of InsightFace's and facenet's evaluation: i * 0.01, not a running sum. */
const DISTANCES = Float64Array.from({ length: 400 }, (_, i) => i * 0.01);
/** SphereFace's thrNum: thresholds -1, -0.9999, ... 1. */
const COSINE_STEPS = 10_000;
/** FaceX-Zoo's num_thresholds. */
const RANGE_STEPS = 1000;

const protocols: Readonly<Record<ProtocolName, Protocol>> = {
  // InsightFace's recognition/arcface_torch/eval/verification.py.
  insightface: {
    mirror: 'added',
    score: 'squared-l2',
    centred: false,
    spread: 'std',
    threshold: firstBestDistance,
  },
  // facenet's src/lfw.py with its defaults: no mirror image, no mean subtracted.
  facenet: {
    mirror: 'none',
    score: 'squared-l2',
    centred: false,
    spread: 'std',
    threshold: firstBestDistance,
  },
  // SphereFace's test/code/evaluation.m.
  sphereface: {
    mirror: 'concatenated',
    score: 'cosine',
    centred: true,
    spread: null,
    threshold: meanOfBestCosines,
  },
  // FaceX-Zoo's test_protocol/lfw/lfw_evaluator.py.
  facex: {
    mirror: 'none',
    score: 'cosine',
    centred: false,
    spread: 'standardError',
    threshold: widestGap,
  },
};

/** @throws HardmineError ERR_INPUT for a name that is none of them */
export function protocolOf(name: ProtocolName): Protocol {
  oneOf('protocol', name, PROTOCOLS);
  return protocols[name];
}

/** Floats of what is compared, for one image of a model with embeddings of `embedding` floats. */
export function rowLength(embedding: number, protocol: ProtocolName): number {
  return protocolOf(protocol).mirror === 'concatenated' ? 2 * embedding : embedding;
}

/** Whether a pair is judged rightly. */
export function isRight(
  score: Protocol['score'],
  value: number,
  threshold: number,
  same: boolean,
): boolean {
  if (score === 'squared-l2') return value < threshold === same;
  return same ? value > threshold : value < threshold;
}

/** The first of the thresholds that judge most pairs rightly. */
function firstBestDistance({ genuine, impostor }: TrainingValues): number {
  let best = 0;
  let most = -1;
  for (const threshold of DISTANCES) {
    const right =
      countBelow(genuine, threshold) + impostor.length - countBelow(impostor, threshold);
    if (right > most) [most, best] = [right, threshold];
  }
  return best;
}

/** The mean of the thresholds that judge most pairs rightly. */
function meanOfBestCosines({ genuine, impostor }: TrainingValues): number {
  let most = -1;
  let sum = 0;
  let ties = 0;
  for (let i = -COSINE_STEPS; i <= COSINE_STEPS; i++) {
    const threshold = i / COSINE_STEPS;
    const right =
      genuine.length - countAtMost(genuine, threshold) + countBelow(impostor, threshold);
    if (right > most) [most, sum, ties] = [right, 0, 0];
    if (right === most) {
      sum += i;
      ties++;
    }
  }
  return sum / ties / COSINE_STEPS;
}

/** The first threshold, of equal steps from the least value to the greatest, where TPR - FPR is greatest. */
function widestGap({ genuine, impostor }: TrainingValues): number {
  if (genuine.length === 0 || impostor.length === 0) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `Outside one of the folds there are ${genuine.length} pairs of one person and ${impostor.length} of two, and TPR - FPR needs both: spread the two kinds over the folds.`,
    );
  }
  const low = Math.min(genuine[0]!, impostor[0]!);
  const high = Math.max(genuine.at(-1)!, impostor.at(-1)!);
  const step = (high - low) / RANGE_STEPS;
  const above = (values: Float64Array, threshold: number) =>
    (values.length - countAtMost(values, threshold)) / values.length;
  let best = low + step;
  let widest = Number.NEGATIVE_INFINITY;
  for (let i = 1; i <= RANGE_STEPS; i++) {
    const threshold = low + step * i;
    const gap = above(genuine, threshold) - above(impostor, threshold);
    if (gap > widest) [widest, best] = [gap, threshold];
  }
  return best;
}
