/**
 * Face verification: is a pair of images the same person? Turns the distances of labelled pairs into
 * the accuracy over folds, its uncertainty, and the figures of the pooled ROC.
 */

import { HardmineError } from '../errors.js';

export type ProtocolName = 'insightface';
export type FarTarget = '1e-2' | '1e-3';

/** How a code base gets from embeddings to a decision. */
export interface Protocol {
  /** Whether the mirror image's embedding is added to the image's. */
  readonly flip: boolean;
  readonly score: 'squared-l2';
  /** Candidates in rising order; a pair is taken for the same person where distance < threshold. */
  readonly thresholds: Float64Array;
}

export const protocols: Readonly<Record<ProtocolName, Protocol>> = {
  // numpy.arange(0, 4, 0.01) of InsightFace's verification.py: i * 0.01, not a running sum.
  insightface: {
    flip: true,
    score: 'squared-l2',
    thresholds: Float64Array.from({ length: 400 }, (_, i) => i * 0.01),
  },
};

/** Points of the pooled ROC from (0, 0) to (1, 1), one for each distinct distance and one before. */
export interface Roc {
  /** False accept rate: the share of impostor pairs taken for the same person. */
  far: Float64Array;
  /** True accept rate: the share of genuine pairs taken for the same person. */
  tar: Float64Array;
}

/** What `evaluate --json` prints, fractions in 0..1; `details` is for reports and stays out of the JSON. */
export interface VerificationResult {
  protocol: ProtocolName;
  pairs: number;
  accuracy: {
    /** Mean of `perFold`. */
    mean: number;
    /** Population standard deviation over the folds. */
    std: number;
    /** Sample standard deviation over the folds divided by sqrt(folds). */
    standardError: number;
    perFold: number[];
  };
  /** For each fold the threshold that the other folds chose. */
  thresholds: number[];
  /** Wilson's interval over all pairs, each judged at its own fold's threshold. */
  confidence95: { low: number; high: number };
  auc: number;
  eer: number;
  /** True accept rate at the largest threshold whose false accept rate is at most the target. */
  tarAtFar: Record<FarTarget, number>;
  flip: boolean;
  score: 'squared-l2';
  details: {
    distances: Float64Array;
    same: Uint8Array;
    fold: Uint16Array;
    roc: Roc;
    /** Reservations a reader of the figures must know. */
    notes: string[];
  };
}

export interface LabelledDistances {
  /** Distance of each pair, finite and at least 0. */
  distances: ArrayLike<number>;
  /** 1 (or true) where the pair shows one person. */
  same: ArrayLike<number | boolean>;
  /** Fold of each pair: 0 .. folds-1, at least two folds and none of them empty. */
  fold: ArrayLike<number>;
  protocol?: ProtocolName;
}

// The 0.975 quantile of the standard normal distribution.
const NORMAL_975 = 1.959963984540054;
// Fewer false accepts than this at a FAR target, and one pair more or less moves its TAR visibly.
const FEW_FALSE_ACCEPTS = 10;
// A fold's number has 16 bits.
const MAX_FOLDS = 65536;

/**
 * The protocol over folds: each fold is judged at the threshold that is best on all the others (the
 * first of equally good ones), so that no pair has a say in its own threshold.
 *
 * @throws HardmineError ERR_PROTOCOL for lengths that differ, no genuine or no impostor pair, fewer
 *   than two folds or an empty one; ERR_NON_FINITE for a distance that is no finite number.
 */
export function verification(pairs: LabelledDistances): VerificationResult {
  const name = pairs.protocol ?? 'insightface';
  const protocol = protocols[name];
  const { distances, same, fold, folds } = checkPairs(pairs);
  const { perFold, thresholds, correct } = foldAccuracies(distances, same, fold, folds, protocol);
  const mean = perFold.reduce((sum, value) => sum + value, 0) / folds;
  const squares = perFold.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const pooled = pooledRoc(distances, same);
  return {
    protocol: name,
    pairs: distances.length,
    accuracy: {
      mean,
      std: Math.sqrt(squares / folds),
      standardError: Math.sqrt(squares / (folds - 1) / folds),
      perFold,
    },
    thresholds,
    confidence95: wilsonInterval(correct, distances.length),
    auc: pooled.auc,
    eer: pooled.eer,
    tarAtFar: { '1e-2': tarAt(pooled.roc, 1e-2), '1e-3': tarAt(pooled.roc, 1e-3) },
    flip: protocol.flip,
    score: protocol.score,
    details: { distances, same, fold, roc: pooled.roc, notes: coarseTargets(pooled.impostors) },
  };
}

/**
 * Wilson's 95% score interval of a proportion: (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).
 */
export function wilsonInterval(successes: number, trials: number): { low: number; high: number } {
  const p = successes / trials;
  const z2 = NORMAL_975 ** 2 / trials;
  const centre = (p + z2 / 2) / (1 + z2);
  const half = Math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2);
  return { low: Math.max(0, centre - half), high: Math.min(1, centre + half) };
}

/**
 * The similarity that best parts genuine from impostor pairs, to be stored with a model: a pair is
 * taken for the same person where score >= threshold. Cuts lie half-way between neighbouring distinct
 * scores; of equally good cuts the middle one is taken, as the one farthest from both kinds of error.
 *
 * @param scores higher means more alike, finite
 * @param same 1 (or true) where the pair shows one person
 * @throws HardmineError ERR_PROTOCOL without a genuine or an impostor pair or when all scores are
 *   equal; ERR_NON_FINITE for a score that is no finite number
 */
export function bestThreshold(
  scores: ArrayLike<number>,
  same: ArrayLike<number | boolean>,
): number {
  const { values, labels } = checkLabelled(scores, same, 'score');
  const order = Uint32Array.from(values, (_, i) => i).sort((a, b) => values[a]! - values[b]!);
  // With the cut below everything all genuine pairs are right; each pair that falls below the rising
  // cut wins an impostor or loses a genuine one.
  let gain = 0;
  let best = Number.NEGATIVE_INFINITY;
  let cuts: number[] = [];
  for (let k = 0; k + 1 < order.length; k++) {
    gain += labels[order[k]!] ? -1 : 1;
    const below = values[order[k]!]!;
    const above = values[order[k + 1]!]!;
    if (below === above || gain < best) continue;
    if (gain > best) cuts = [];
    best = gain;
    // Rounding may land a half-way point between adjacent doubles on the lower one, which must stay below.
    const half = below + (above - below) / 2;
    cuts.push(half > below ? half : above);
  }
  if (cuts.length === 0) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `All ${values.length} scores are ${values[0]}, so no threshold parts them; check that the embeddings differ from image to image.`,
    );
  }
  return cuts[cuts.length >> 1]!;
}

function checkLabelled(
  numbers: ArrayLike<number>,
  same: ArrayLike<number | boolean>,
  what: 'distance' | 'score',
): { values: Float64Array; labels: Uint8Array } {
  if (numbers.length !== same.length) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `There are ${numbers.length} ${what}s but ${same.length} labels; give one label for each pair.`,
    );
  }
  const values = Float64Array.from(numbers);
  const labels = Uint8Array.from(same, (label) => (label ? 1 : 0));
  const genuine = labels.reduce((sum, label) => sum + label, 0);
  if (genuine === 0 || genuine === labels.length) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `The ${labels.length} pairs hold ${genuine} of one person and ${labels.length - genuine} of two; verification needs at least one of each.`,
    );
  }
  const bad = values.findIndex((value) => !Number.isFinite(value));
  if (bad >= 0) {
    throw new HardmineError(
      'ERR_NON_FINITE',
      `The ${what} of pair ${bad} is ${values[bad]}, expected a finite number; the model's weights or embeddings hold NaN or infinity.`,
    );
  }
  return { values, labels };
}

function checkPairs(pairs: LabelledDistances) {
  const { values: distances, labels: same } = checkLabelled(
    pairs.distances,
    pairs.same,
    'distance',
  );
  if (pairs.fold.length !== distances.length) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `There are ${distances.length} distances but ${pairs.fold.length} fold numbers; give one for each pair.`,
    );
  }
  let folds = 0;
  for (let i = 0; i < distances.length; i++) {
    const fold = pairs.fold[i]!;
    if (!Number.isInteger(fold) || fold < 0 || fold >= MAX_FOLDS) {
      throw new HardmineError(
        'ERR_PROTOCOL',
        `The fold of pair ${i} is ${fold}, expected a whole number from 0 to ${MAX_FOLDS - 1}.`,
      );
    }
    folds = Math.max(folds, fold + 1);
  }
  const fold = Uint16Array.from(pairs.fold);
  const sizes = new Uint32Array(folds);
  for (const f of fold) sizes[f]!++;
  const empty = sizes.indexOf(0);
  if (folds < 2 || empty >= 0) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      folds < 2
        ? 'All pairs are in one fold; a threshold is chosen on the other folds, so give at least two.'
        : `Fold ${empty} of ${folds} holds no pair; number the folds from 0 without gaps.`,
    );
  }
  return { distances, same, fold, folds };
}

function foldAccuracies(
  distances: Float64Array,
  same: Uint8Array,
  fold: Uint16Array,
  folds: number,
  { thresholds }: Protocol,
) {
  const candidates = thresholds.length;
  // accepted[label][f][i]: pairs of fold f with distance < thresholds[i] but not < thresholds[i-1];
  // sums over i turn them into counts of accepted pairs, so all choices are made on integers.
  const accepted = [0, 1].map(() =>
    Array.from({ length: folds }, () => new Int32Array(candidates + 1)),
  );
  for (let k = 0; k < distances.length; k++) {
    accepted[same[k]!]![fold[k]!]![firstAbove(thresholds, distances[k]!)]!++;
  }
  const size = new Array<number>(folds).fill(0);
  for (const f of fold) size[f]!++;
  const correct = Array.from({ length: folds }, (_, f) => {
    const impostors = accepted[0]![f]!;
    const genuine = accepted[1]![f]!;
    const counts = new Int32Array(candidates);
    let right = impostors.reduce((sum, n) => sum + n, 0);
    for (let i = 0; i < candidates; i++) {
      right += genuine[i]! - impostors[i]!;
      counts[i] = right;
    }
    return counts;
  });
  const total = new Int32Array(candidates);
  for (const counts of correct) for (let i = 0; i < candidates; i++) total[i]! += counts[i]!;

  let allCorrect = 0;
  const chosen: number[] = [];
  const perFold = correct.map((counts, f) => {
    let best = 0;
    for (let i = 1; i < candidates; i++) {
      if (total[i]! - counts[i]! > total[best]! - counts[best]!) best = i;
    }
    chosen.push(thresholds[best]!);
    allCorrect += counts[best]!;
    return counts[best]! / size[f]!;
  });
  return { perFold, thresholds: chosen, correct: allCorrect };
}

/** Index of the first element greater than `value` in rising `sorted`; its length when there is none. */
function firstAbove(sorted: Float64Array, value: number): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle]! > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

function pooledRoc(distances: Float64Array, same: Uint8Array) {
  const genuine = distances.filter((_, i) => same[i] === 1).sort();
  const impostor = distances.filter((_, i) => same[i] === 0).sort();
  const positives = genuine.length;
  const negatives = impostor.length;
  const far = [0];
  const tar = [0];
  // Twice Mann and Whitney's U, a whole number: two for each (genuine, impostor) where the genuine pair
  // is nearer, one where they tie.
  let twiceU = 0;
  let eer = Number.NaN;
  let g = 0;
  let f = 0;
  while (g < positives || f < negatives) {
    const distance = Math.min(genuine[g] ?? Infinity, impostor[f] ?? Infinity);
    const [g0, f0] = [g, f];
    while (genuine[g] === distance) g++;
    while (impostor[f] === distance) f++;
    twiceU += (g - g0) * (2 * (negatives - f) + (f - f0));
    far.push(f / negatives);
    tar.push(g / positives);
    // FAR - FNR in units of 1 / (positives negatives); it rises from -1 to 1, and the equal error rate
    // is where the straight line between two points of the ROC crosses 0.
    const before = f0 * positives - (positives - g0) * negatives;
    const after = f * positives - (positives - g) * negatives;
    if (before < 0 && after >= 0) {
      eer = (f0 + (f - f0) * (-before / (after - before))) / negatives;
    }
  }
  return {
    roc: { far: Float64Array.from(far), tar: Float64Array.from(tar) },
    auc: twiceU / (2 * positives * negatives),
    eer,
    impostors: negatives,
  };
}

function tarAt(roc: Roc, target: number): number {
  return roc.tar[firstAbove(roc.far, target) - 1]!;
}

function coarseTargets(impostors: number): string[] {
  return (['1e-2', '1e-3'] as const)
    .map((target) => ({ target, allowed: Math.floor(Number(target) * impostors) }))
    .filter(({ allowed }) => allowed < FEW_FALSE_ACCEPTS)
    .map(
      ({ target, allowed }) =>
        `FAR ${100 * Number(target)}% over ${impostors} impostor pairs allows ${allowed} false accept${allowed === 1 ? '' : 's'}, so the TAR there is coarse.`,
    );
}
