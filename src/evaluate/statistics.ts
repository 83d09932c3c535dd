/** What a figure over pairs is worth: intervals, and the paired test between two models. */

import { RandomStream } from '../data/random.js';
import { HardmineError } from '../errors.js';
import { countAtMost } from './counting.js';

export interface Interval {
  low: number;
  high: number;
}

// The 0.975 quantile of the standard normal distribution.
const NORMAL_975 = 1.959963984540054;
/** Efron and Tibshirani (1993), 14.2: percentile intervals want one to two thousand resamples. */
const RESAMPLES = 2000;
const BOOTSTRAP_SEED = 1;
/** Fewer discordant pairs than this and chi-square is a poor guide to McNemar's test (Fagerland et al. 2013). */
const FEW_DISCORDANT = 25;
const SIGNIFICANT = 0.05;

/**
 * Wilson's 95% score interval of a proportion: (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).
 */
export function wilsonInterval(successes: number, trials: number): Interval {
  const p = successes / trials;
  const z2 = NORMAL_975 ** 2 / trials;
  const centre = (p + z2 / 2) / (1 + z2);
  const half = Math.sqrt(z2 * (p * (1 - p) + z2 / 4)) / (1 + z2);
  return { low: Math.max(0, centre - half), high: Math.min(1, centre + half) };
}

/** Whether an accuracy on `pairs` of which half are of one person may be that of a coin. */
export const mayBeGuessed = (accuracy: number, pairs: number): boolean =>
  wilsonInterval(accuracy * pairs, pairs).low <= 0.5;

export interface BootstrapInterval extends Interval {
  resamples: number;
  seed: number;
}

/**
 * The 95% percentile interval of the mean over folds of the share of right decisions: the pairs of every
 * fold are drawn anew from that fold, with replacement, 2,000 times under a fixed seed. Thresholds stay
 * as they were chosen. Where every decision is right (or wrong) it has no width: Wilson's interval then
 * says more.
 *
 * @param right 1 where a pair was judged rightly
 * @param fold fold of each pair, 0 .. folds-1, none of them empty
 */
export function bootstrapInterval(
  right: ArrayLike<number>,
  fold: ArrayLike<number>,
  folds: number,
): BootstrapInterval {
  const sizes = new Float64Array(folds);
  const successes = new Float64Array(folds);
  for (let i = 0; i < right.length; i++) {
    sizes[fold[i]!]!++;
    successes[fold[i]!]! += right[i]!;
  }
  const random = new RandomStream(BOOTSTRAP_SEED, 0);
  // How many of a fold's drawn pairs are right is all that matters, and that is binomial.
  const cumulative = Array.from(sizes, (n, f) => binomialCdf(n, successes[f]! / n));
  const means = Float64Array.from({ length: RESAMPLES }, () => {
    let sum = 0;
    for (let f = 0; f < folds; f++) {
      sum += countAtMost(cumulative[f]!, random.uniform()) / sizes[f]!;
    }
    return sum / folds;
  }).sort();
  const last = RESAMPLES - 1;
  return {
    low: means[Math.floor(0.025 * last)]!,
    high: means[Math.ceil(0.975 * last)]!,
    resamples: RESAMPLES,
    seed: BOOTSTRAP_SEED,
  };
}

/** P(X <= k) of the binomial for k = 0 .. n - 1. */
function binomialCdf(n: number, p: number): Float64Array {
  const cdf = new Float64Array(n);
  if (p === 1) return cdf; // the recurrence would divide by 1 - p
  let log = n * Math.log1p(-p);
  let sum = 0;
  for (let k = 0; k < n; k++) {
    sum += Math.exp(log);
    cdf[k] = sum;
    log += Math.log(((n - k) * p) / ((k + 1) * (1 - p)));
  }
  return cdf;
}

export interface McNemar {
  /** Pairs that the first model alone judged rightly, and the second alone. */
  onlyFirst: number;
  onlySecond: number;
  /** Exact binomial below 25 such pairs, else chi-square with continuity correction. */
  method: 'exact' | 'chi-square';
  /** Two-sided: how likely so uneven a split is where neither model is better. */
  p: number;
  /** Whether p < 0.05. */
  distinguishable: boolean;
}

/**
 * McNemar's test (1947) of two models on the same pairs, from which of them each judged rightly.
 *
 * @param first 1 (or true) where the first model is right
 * @throws HardmineError ERR_INPUT when the two are not equally long
 */
export function mcnemar(
  first: ArrayLike<number | boolean>,
  second: ArrayLike<number | boolean>,
): McNemar {
  if (first.length !== second.length) {
    throw new HardmineError(
      'ERR_INPUT',
      `${first.length} decisions cannot be paired with ${second.length}: give those of both models on the same pairs.`,
    );
  }
  let onlyFirst = 0;
  let onlySecond = 0;
  for (let i = 0; i < first.length; i++) {
    if (first[i]! > second[i]!) onlyFirst++;
    if (first[i]! < second[i]!) onlySecond++;
  }
  const exact = onlyFirst + onlySecond < FEW_DISCORDANT;
  const p = exact ? signTest(onlyFirst, onlySecond) : correctedChiSquare(onlyFirst, onlySecond);
  return {
    onlyFirst,
    onlySecond,
    method: exact ? 'exact' : 'chi-square',
    p,
    distinguishable: p < SIGNIFICANT,
  };
}

/** Twice the tail of the binomial with n = a + b and p = 1/2; n is below 25, so all counts are exact. */
function signTest(a: number, b: number): number {
  const n = a + b;
  let tail = 0;
  let choose = 1;
  for (let k = 0; k <= Math.min(a, b); k++) {
    tail += choose;
    choose = (choose * (n - k)) / (k + 1);
  }
  return Math.min(1, (2 * tail) / 2 ** n);
}

/** Edwards' (1948) correction; one degree of freedom, so the tail is that of |z|. */
function correctedChiSquare(a: number, b: number): number {
  return erfc(Math.max(0, Math.abs(a - b) - 1) / Math.sqrt(2 * (a + b)));
}

/** Complementary error function of x >= 0, relative error below 1.2e-7 (Press et al., erfcc). */
function erfc(x: number): number {
  const t = 1 / (1 + x / 2);
  const coefficients = [
    -1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398,
    1.48851587, -0.82215223, 0.17087277,
  ];
  const exponent = coefficients.reduceRight((sum, coefficient) => sum * t + coefficient, 0);
  return t * Math.exp(-x * x + exponent);
}

/**
 * Quantile of the standard normal distribution for 0 < p < 1, relative error below 1.2e-9 (Acklam's
 * rational approximations); minus and plus infinity at 0 and 1.
 */
export function normalQuantile(p: number): number {
  if (p > 0.5) return -normalQuantile(1 - p);
  if (p === 0) return Number.NEGATIVE_INFINITY;
  const polynomial = (x: number, coefficients: readonly number[]) =>
    coefficients.reduce((sum, coefficient) => sum * x + coefficient, 0);
  if (p < 0.02425) {
    const q = Math.sqrt(-2 * Math.log(p));
    return (
      polynomial(
        q,
        [
          -7.784894002430293e-3, -3.223964580411365e-1, -2.400758277161838, -2.549732539343734,
          4.374664141464968, 2.938163982698783,
        ],
      ) /
      polynomial(
        q,
        [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1],
      )
    );
  }
  const q = p - 0.5;
  const r = q * q;
  return (
    (q *
      polynomial(
        r,
        [
          -3.969683028665376e1, 2.209460984245205e2, -2.759285104469687e2, 1.38357751867269e2,
          -3.066479806614716e1, 2.506628277459239,
        ],
      )) /
    polynomial(
      r,
      [
        -5.447609879822406e1, 1.615858368580409e2, -1.556989798598866e2, 6.680131188771972e1,
        -1.328068155288572e1, 1,
      ],
    )
  );
}
