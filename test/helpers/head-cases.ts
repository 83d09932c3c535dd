/** Inputs for margin heads whose rows have chosen losses. */
import { RandomStream } from '../../src/data/random.js';
import type { BaseLoss, LossSettings, Weighting } from '../../src/loss.js';
import {
  euclideanRow,
  type ReferenceInput,
  type ReferenceLaw,
  type ReferenceWeighting,
  rowLoss,
} from './reference-head.js';

export interface Shape {
  rows: number;
  dim: number;
  classes: number;
}

export interface HeadCase extends ReferenceInput {
  embeddings: Float32Array;
  weights: Float32Array;
  bias: Float32Array | null;
  labels: Int32Array;
}

/** The law of a loss, from the formulas and not from what the product makes of the settings. */
export function lawOf({
  base,
  gradient = 'exact',
  beyondPi = 'mirror',
}: LossSettings): ReferenceLaw {
  const law: ReferenceLaw = {
    base: 'margin',
    m1: 1,
    m2: 0,
    m3: 0,
    scale: 64,
    lambda: 0,
    beyondPi,
    gradient,
    hinge: { margin: 0, pull: 0 },
  };
  switch (base.kind) {
    case 'softmax':
      return { ...law, base: 'softmax', scale: 1 };
    case 'a-softmax':
      if (typeof base.lambda !== 'number') throw new Error('the tests give lambda as a number');
      return { ...law, m1: base.margin ?? 4, scale: 'norm', lambda: base.lambda };
    case 'arcface':
      return { ...law, scale: base.scale ?? 64, m2: base.margin ?? 0.5 };
    case 'cosface':
      return { ...law, scale: base.scale ?? 64, m3: base.margin ?? 0.35 };
    case 'combined':
      return {
        ...law,
        scale: base.scale ?? 64,
        m1: base.m1 ?? 1,
        m2: base.m2 ?? 0,
        m3: base.m3 ?? 0,
      };
    case 'euclidean-margin':
      return {
        ...law,
        base: 'euclidean-margin',
        hinge: { margin: base.margin ?? 0.4, pull: base.pull ?? 0.5 },
      };
  }
}

/** No hinge of a test is nearer to 0: ten times what fp32 makes of a cosine of 512 products, doubled. */
const HINGE_CLEARANCE = 2e-5;

/** With the paper's constants where the settings have none. */
export function weightingOf(weighting: Weighting): ReferenceWeighting | null {
  if (weighting.kind === 'none') return null;
  if (weighting.kind === 'knot-magnify') return weighting;
  const paper = { alpha: 1.5, beta: 1.1, A: 35, B: 0.75 } as const;
  return { ...paper, form: 'equation', reduction: 'sample', ...weighting };
}

export function describeBase(base: BaseLoss): string {
  const { kind, ...settings } = base;
  return [kind, ...Object.entries(settings).map(([key, value]) => `${key} ${value}`)].join(' ');
}

/**
 * Random class weights and labels, and embeddings on the way from a random direction to their class
 * so that the base loss of row i is `losses(i)`; null leaves the row random. The Euclidean margin loss
 * jumps where a hinge becomes active: a row comes as near to its loss as the jumps let it, and keeps
 * clear of them.
 */
export function caseWithLosses(
  { rows, dim, classes }: Shape,
  law: ReferenceLaw,
  losses: (row: number, random: RandomStream) => number | null,
  { seed = 1, norm = 14 }: { seed?: number; norm?: number } = {},
): HeadCase {
  const random = new RandomStream(seed, rows * classes);
  const normal = (length: number) => Float32Array.from({ length }, () => random.normal());
  const weights = normal(classes * dim);
  // Norms differ, because a margin head must divide by them; softmax does not, and a class of small
  // norm could not win.
  const spread = law.base === 'softmax' ? 0.1 : 0.4;
  const norms = Float64Array.from({ length: classes }, () => 1 + random.uniform(-spread, spread));
  for (const [j, length] of norms.entries()) {
    scaleTo(weights.subarray(j * dim, (j + 1) * dim), length);
  }
  const bias = law.base === 'softmax' ? normal(classes).map((value) => 0.3 * value) : null;
  const labels = Int32Array.from({ length: rows }, () => random.below(classes));
  const embeddings = new Float32Array(rows * dim);
  for (let i = 0; i < rows; i++) {
    const y = labels[i]!;
    const away = normal(dim);
    scaleTo(away, 1);
    const towards = weights.slice(y * dim, (y + 1) * dim);
    scaleTo(towards, 1);
    const length = norm * random.uniform(0.8, 1.2);
    const wanted = losses(i, random);
    // Products are linear along the way, so those with both ends give them everywhere.
    const ends = [away, towards].map((end) =>
      Float64Array.from({ length: classes }, (_, j) => {
        const product = dot(end, weights.subarray(j * dim, (j + 1) * dim));
        return law.base === 'softmax' ? product : product / norms[j]!;
      }),
    );
    const between = dot(away, towards);
    let sign = 1;
    const productsAt = (t: number) => {
      const stretch = 1 / Math.sqrt((1 - t) ** 2 + t ** 2 + 2 * t * (1 - t) * sign * between);
      return ends[0]!.map((start, j) => {
        const product = stretch * ((1 - t) * sign * start + t * ends[1]![j]!);
        return law.base === 'softmax'
          ? length * product + bias![j]!
          : Math.max(-1, Math.min(1, product));
      });
    };
    const hingesAt = (t: number) =>
      euclideanRow(
        productsAt(t).map((cosine) => 2 - 2 * cosine),
        y,
        law.hinge,
      );
    const lossAt = (t: number) =>
      law.base === 'euclidean-margin'
        ? hingesAt(t).loss
        : rowLoss(productsAt(t), y, law.scale === 'norm' ? length : law.scale, law).loss;
    let t = 0;
    if (wanted !== null) {
      if (lossAt(0) < wanted) sign = -1;
      let [low, high] = [0, 1];
      // 2^-16 of the way is finer than the gate by far.
      for (let step = 0; step < 16; step++) {
        const middle = (low + high) / 2;
        if (lossAt(middle) > wanted) low = middle;
        else high = middle;
      }
      t = (low + high) / 2;
    }
    if (law.base === 'euclidean-margin') {
      const touches = () =>
        hingesAt(t).hinges.some((hinge, j) => j !== y && Math.abs(hinge) < HINGE_CLEARANCE);
      while (touches()) t += 2 * HINGE_CLEARANCE;
    }
    const mixed = away.map((value, d) => (1 - t) * sign * value + t * towards[d]!);
    scaleTo(mixed, length);
    embeddings.set(mixed, i * dim);
  }
  return { rows, dim, classes, embeddings, weights, bias, labels };
}

/** As caseWithLosses with random rows, but row i at the angle thetas[i] to its class. */
export function caseWithAngles(
  shape: Shape,
  law: ReferenceLaw,
  thetas: readonly number[],
): HeadCase {
  const input = caseWithLosses(shape, law, () => null);
  const { dim, embeddings, weights, labels } = input;
  for (const [i, theta] of thetas.entries()) {
    const towards = weights.slice(labels[i]! * dim, (labels[i]! + 1) * dim);
    scaleTo(towards, 1);
    const row = embeddings.subarray(i * dim, (i + 1) * dim);
    const length = Math.sqrt(dot(row, row));
    const along = dot(row, towards);
    const across = row.map((value, d) => value - along * towards[d]!);
    scaleTo(across, 1);
    for (let d = 0; d < dim; d++) {
      row[d] = length * (Math.cos(theta) * towards[d]! + Math.sin(theta) * across[d]!);
    }
  }
  return input;
}

function dot(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let d = 0; d < a.length; d++) sum += a[d]! * b[d]!;
  return sum;
}

function scaleTo(values: Float32Array, length: number): void {
  const factor = length / Math.sqrt(dot(values, values));
  for (let d = 0; d < values.length; d++) values[d]! *= factor;
}
