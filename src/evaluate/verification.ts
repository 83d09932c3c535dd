/**
 * Face verification: is a pair of images the same person? Turns the scores of labelled pairs into the
 * accuracy over folds, its uncertainty, and the figures of the pooled ROC.
 */

import { HardmineError } from '../errors.js';
import { countAtMost, countBelow } from './counting.js';
import { isRight, type Protocol, type ProtocolName, protocolOf } from './protocols.js';
import {
  type BootstrapInterval,
  bootstrapInterval,
  type Interval,
  wilsonInterval,
} from './statistics.js';

export type FarTarget = '1e-2' | '1e-3';

/** Points of the pooled ROC from (0, 0) to (1, 1), one for each distinct score and one before. */
export interface Roc {
  /** False accept rate: the share of impostor pairs taken for the same person. */
  far: Float64Array;
  /** True accept rate: the share of genuine pairs taken for the same person. */
  tar: Float64Array;
}

/** InsightFace's and facenet's VAL@FAR: thresholds interpolated on the training folds. */
export interface ValAtFar {
  /** Mean over folds of the true accept rate on the test fold, and its population deviation. */
  val: number;
  std: number;
  /** Mean over folds of the false accept rate that the test fold then has. */
  far: number;
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
    /** Which of the two the protocol's code base prints beside the mean. */
    spread: 'std' | 'standardError' | null;
    perFold: number[];
  };
  /** For each fold the threshold that the other folds chose, in the units of `score`. */
  thresholds: number[];
  /** Wilson's interval over all pairs, each judged at its own fold's threshold. */
  confidence95: Interval;
  /** Of the mean accuracy, from pairs drawn anew within their folds. */
  bootstrap95: BootstrapInterval;
  auc: number;
  eer: number;
  /** True accept rate at the largest threshold whose false accept rate is at most the target. */
  tarAtFar: Record<FarTarget, number>;
  /** Of protocols on squared distances. */
  valAtFar?: { '1e-3': ValAtFar };
  /** Whether mirror images have a part in the score. */
  flip: boolean;
  score: Protocol['score'];
  details: {
    /** Squared L2 distances of unit embeddings, 2 - 2 cos where the score is a cosine. */
    distances: Float64Array;
    same: Uint8Array;
    fold: Uint16Array;
    /** 1 where the pair's own fold's threshold judges it rightly. */
    right: Uint8Array;
    roc: Roc;
    /** Reservations a reader of the figures must know. */
    notes: string[];
  };
}

/** Scores of pairs: give `distances` for insightface and facenet, `cosines` for sphereface and facex. */
export interface LabelledDistances {
  /** Squared L2 distance of each pair's unit embeddings, 0 to 4. */
  distances?: ArrayLike<number>;
  /** Cosine similarity of each pair, -1 to 1. */
  cosines?: ArrayLike<number>;
  /** 1 (or true) where the pair shows one person. */
  same: ArrayLike<number | boolean>;
  /** Fold of each pair: 0 .. folds-1, at least two folds and none of them empty. */
  fold: ArrayLike<number>;
  /** 'insightface' by default. */
  protocol?: ProtocolName;
}

/** Pairs whose scores may depend on the fold under test, as those of a centred protocol do. */
export interface FoldedScores {
  /** Score of every pair, in the protocol's units, while `testFold` is the one judged. */
  scores: (testFold: number) => Float64Array;
  same: Uint8Array;
  fold: Uint16Array;
  protocol: ProtocolName;
}

// Fewer false accepts than this at a FAR target, and one pair more or less moves its TAR visibly.
const FEW_FALSE_ACCEPTS = 10;
// Of a product of 512 numbers in fp32, and of 2 - 2 cos with it.
const ROUNDING = 1e-4;
// Far beyond any protocol's ten; every fold looks at all pairs.
const MAX_FOLDS = 1000;
/** InsightFace's thresholds for VAL: numpy.arange(0, 4, 0.001). */
const VAL_DISTANCES = Float64Array.from({ length: 4000 }, (_, i) => i * 0.001);
const VAL_TARGET = 1e-3;

/**
 * The protocol over folds: each fold is judged at the threshold that the protocol chooses on all the
 * others, so that no pair has a say in its own threshold. Scores are taken as they are: of sphereface
 * they must come from embeddings whose mean is off already.
 *
 * @throws HardmineError ERR_INPUT for the other kind of score than the protocol's or one out of its
 *   range, ERR_PROTOCOL for
 *   lengths that differ, no genuine or no impostor pair (for facex outside any fold), fewer than two
 *   folds or an empty one; ERR_NON_FINITE for a score that is no finite number.
 */
export function verification(pairs: LabelledDistances): VerificationResult {
  const protocol = pairs.protocol ?? 'insightface';
  const what = protocolOf(protocol).score === 'cosine' ? 'cosine' : 'distance';
  const given = what === 'cosine' ? pairs.cosines : pairs.distances;
  if (given === undefined || (pairs.cosines && pairs.distances)) {
    throw new HardmineError(
      'ERR_INPUT',
      `The protocol ${protocol} judges ${what}s: give them, and nothing else, as ${what}s.`,
    );
  }
  const { values, labels } = checkLabelled(given, pairs.same, what);
  const [least, most] = what === 'cosine' ? [-1, 1] : [0, 4];
  const wrong = values.findIndex((v) => v < least - ROUNDING || v > most + ROUNDING);
  if (wrong >= 0) {
    throw new HardmineError(
      'ERR_INPUT',
      `The ${what} of pair ${wrong} is ${values[wrong]}; ${what === 'cosine' ? 'a cosine' : 'the squared distance of unit embeddings'} lies between ${least} and ${most}.`,
    );
  }
  if (pairs.fold.length !== values.length) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `There are ${values.length} ${what}s but ${pairs.fold.length} fold numbers; give one for each pair.`,
    );
  }
  checkFolds(pairs.fold);
  return verifyFolds({
    scores: () => values,
    same: labels,
    fold: Uint16Array.from(pairs.fold),
    protocol,
  });
}

/** `verification` of pairs that were checked. */
export function verifyFolds({
  scores,
  same,
  fold,
  protocol: name,
}: FoldedScores): VerificationResult {
  const protocol = protocolOf(name);
  const folds = fold.reduce((most, f) => Math.max(most, f), 0) + 1;
  const values = new Float64Array(same.length);
  const right = new Uint8Array(same.length);
  const thresholds: number[] = [];
  const perFold: number[] = [];
  const vals: { val: number; far: number }[] = [];
  for (let f = 0; f < folds; f++) {
    const scored = scores(f);
    const kind = (label: number, inFold: boolean) =>
      scored.filter((_, i) => same[i] === label && (fold[i] === f) === inFold).sort();
    const train = { genuine: kind(1, false), impostor: kind(0, false) };
    const threshold = protocol.threshold(train);
    thresholds.push(threshold);
    let pairs = 0;
    let rightPairs = 0;
    for (let i = 0; i < fold.length; i++) {
      if (fold[i] !== f) continue;
      values[i] = scored[i]!;
      right[i] = isRight(protocol.score, scored[i]!, threshold, same[i] === 1) ? 1 : 0;
      pairs++;
      rightPairs += right[i]!;
    }
    perFold.push(rightPairs / pairs);
    if (protocol.score === 'squared-l2') {
      vals.push(valAtFar(train, { genuine: kind(1, true), impostor: kind(0, true) }));
    }
  }
  const accuracy = overFolds(perFold);
  const cosine = protocol.score === 'cosine';
  const pooled = pooledRoc(cosine ? values.map((value) => -value) : values, same);
  return {
    protocol: name,
    pairs: same.length,
    accuracy: {
      mean: accuracy.mean,
      std: accuracy.std,
      standardError: accuracy.std / Math.sqrt(folds - 1),
      spread: protocol.spread,
      perFold,
    },
    thresholds,
    confidence95: wilsonInterval(
      right.reduce((sum, one) => sum + one, 0),
      same.length,
    ),
    bootstrap95: bootstrapInterval(right, fold, folds),
    auc: pooled.auc,
    eer: pooled.eer,
    tarAtFar: { '1e-2': tarAt(pooled.roc, 1e-2), '1e-3': tarAt(pooled.roc, 1e-3) },
    ...(!cosine && { valAtFar: { '1e-3': meanVal(vals) } }),
    flip: protocol.mirror !== 'none',
    score: protocol.score,
    details: {
      distances: cosine ? values.map((value) => 2 - 2 * value) : values,
      same,
      fold,
      right,
      roc: pooled.roc,
      notes: [...coarseTargets(pooled.impostors), ...oneSidedFolds(same, fold, folds)],
    },
  };
}

function overFolds(figures: readonly number[]): { mean: number; std: number } {
  const mean = figures.reduce((sum, value) => sum + value, 0) / figures.length;
  const squares = figures.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return { mean, std: Math.sqrt(squares / figures.length) };
}

/**
 * The threshold at which the line through the training folds' (FAR, threshold) reaches the target, or 0
 * where it never does; then the true and false accept rates of the test fold there. NaN for a kind that
 * the fold lacks.
 */
function valAtFar(
  train: { impostor: Float64Array },
  test: { genuine: Float64Array; impostor: Float64Array },
): { val: number; far: number } {
  const far = (threshold: number) => countBelow(train.impostor, threshold) / train.impostor.length;
  // FAR is 0 at the first threshold, 0, since no distance is below it.
  const reached = VAL_DISTANCES.findIndex((threshold) => far(threshold) >= VAL_TARGET);
  let threshold = 0;
  if (reached > 0) {
    const [from, to] = [VAL_DISTANCES[reached - 1]!, VAL_DISTANCES[reached]!];
    threshold = from + ((to - from) * (VAL_TARGET - far(from))) / (far(to) - far(from));
  }
  return {
    val: countBelow(test.genuine, threshold) / test.genuine.length,
    far: countBelow(test.impostor, threshold) / test.impostor.length,
  };
}

/** Over the folds that hold the kind of pair a rate is of. */
function meanVal(folds: readonly { val: number; far: number }[]): ValAtFar {
  const { mean, std } = overFolds(folds.map(({ val }) => val).filter(Number.isFinite));
  return {
    val: mean,
    std,
    far: overFolds(folds.map(({ far }) => far).filter(Number.isFinite)).mean,
  };
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

/** @throws HardmineError ERR_PROTOCOL for lengths that differ or one kind alone, ERR_NON_FINITE */
export function checkLabelled(
  numbers: ArrayLike<number>,
  same: ArrayLike<number | boolean>,
  what: 'distance' | 'cosine' | 'score',
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

/** @throws HardmineError ERR_PROTOCOL unless the folds are 0, 1, .. and at least two, none of them empty */
export function checkFolds(fold: ArrayLike<number>): void {
  const sizes: number[] = [];
  for (let i = 0; i < fold.length; i++) {
    const f = fold[i]!;
    if (!Number.isInteger(f) || f < 0 || f >= MAX_FOLDS) {
      throw new HardmineError(
        'ERR_PROTOCOL',
        `The fold of pair ${i} is ${f}, expected a whole number from 0 to ${MAX_FOLDS - 1}.`,
      );
    }
    while (sizes.length <= f) sizes.push(0);
    sizes[f]!++;
  }
  const empty = sizes.indexOf(0);
  if (sizes.length < 2 || empty >= 0) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      sizes.length < 2
        ? 'All pairs are in one fold; a threshold is chosen on the other folds, so give at least two.'
        : `Fold ${empty} of ${sizes.length} holds no pair; number the folds from 0 without gaps.`,
    );
  }
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
  return roc.tar[countAtMost(roc.far, target) - 1]!;
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

/** Blocks of a list that was not laid out for ten folds may hold one kind of pair alone. */
function oneSidedFolds(same: Uint8Array, fold: Uint16Array, folds: number): string[] {
  const kinds = Array.from({ length: folds }, () => new Set<number>());
  for (const [i, f] of fold.entries()) kinds[f]!.add(same[i]!);
  const oneSided = kinds.filter(({ size }) => size < 2).length;
  if (oneSided === 0) return [];
  return [
    `${oneSided} of the ${folds} folds hold pairs of one kind alone, so the accuracies of folds and their spread mean little.`,
  ];
}
