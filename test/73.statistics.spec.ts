import assert from 'node:assert/strict';
import { bootstrapInterval, mcnemar, normalQuantile } from '../src/evaluate/statistics.js';

/** Decisions of two models that differ on `b` pairs one way and on `c` the other. */
function decisions(b: number, c: number): [Uint8Array, Uint8Array] {
  const n = b + c + 10;
  return [
    Uint8Array.from({ length: n }, (_, i) => (i < b || i >= b + c + 4 ? 1 : 0)),
    Uint8Array.from({ length: n }, (_, i) => ((i >= b && i < b + c) || i >= b + c + 4 ? 1 : 0)),
  ];
}

/** Upper tail of the standard normal beyond `z` by Simpson's rule: another way than the series in the source. */
function normalTail(z: number): number {
  const density = (x: number) => Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI);
  const steps = 4000;
  const width = 12 / steps;
  let sum = density(z) + density(z + 12);
  for (let i = 1; i < steps; i++) sum += (i % 2 ? 4 : 2) * density(z + i * width);
  return (sum * width) / 3;
}

describe('mcnemar', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores

  it('gives the exact binomial where few pairs are discordant', () => {
    // Tails of the binomial with p = 1/2, as tables of the sign test print them. 1 and 7 are the
    // published example of Fagerland, Lydersen and Laake (2013): p = 0.070.
    const table: [number, number, number][] = [
      [0, 0, 1],
      [5, 5, 1],
      [0, 5, 0.0625],
      [1, 7, 0.0703],
      [7, 1, 0.0703],
      [1, 9, 0.0215],
      [2, 10, 0.0386],
      [6, 18, 0.0227],
    ];
    for (const [b, c, p] of table) {
      const result = mcnemar(...decisions(b, c));
      assert.deepEqual([result.onlyFirst, result.onlySecond, result.method], [b, c, 'exact']);
      assert.ok(Math.abs(result.p - p) <= 5e-5, `${b}, ${c}: ${result.p}`); // the table's four decimals
      assert.equal(result.distinguishable, p < 0.05);
    }
  });

  it('gives the chi-square with continuity correction from 25 discordant pairs up', () => {
    // mlxtend's example of 25 and 15: chi-square 2.025, p = 0.155.
    const published = mcnemar(...decisions(25, 15));
    assert.equal(published.method, 'chi-square');
    assert.equal(published.p.toFixed(3), '0.155');
    for (const [b, c] of [
      [13, 12],
      [20, 5],
      [40, 60],
      [101, 180],
      [500, 400],
    ] as const) {
      const z = (Math.abs(b - c) - 1) / Math.sqrt(b + c);
      const expected = 2 * normalTail(z);
      const { p } = mcnemar(...decisions(b, c));
      // The source's series promises 1.2e-7.
      assert.ok(Math.abs(p / expected - 1) < 2e-7, `${b}, ${c}: ${p} against ${expected}`);
    }
    // Percentage points of chi-square with one degree of freedom: 3.841 at 5%, 6.635 at 1%.
    assert.ok(mcnemar(...decisions(60, 40)).p > 0.05); // 19^2 / 100 = 3.61
    assert.ok(mcnemar(...decisions(61, 39)).p < 0.05); // 21^2 / 100 = 4.41
    assert.ok(mcnemar(...decisions(63, 37)).p > 0.01); // 25^2 / 100 = 6.25
    assert.ok(mcnemar(...decisions(64, 36)).p < 0.01); // 27^2 / 100 = 7.29
    assert.equal(mcnemar(...decisions(20, 20)).p.toFixed(6), '1.000000');
  });

  it('refuses decisions that cannot be paired', () => {
    assert.throws(() => mcnemar([1, 0], [1]), { code: 'ERR_INPUT', message: /^2 decisions/ });
  });
});

describe('bootstrapInterval', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores

  it('is as wide as the binomial says, and the same on every run', () => {
    const n = 6000;
    const right = Array.from({ length: n }, (_, i) => (i % 10 === 0 ? 0 : 1));
    const fold = Array.from({ length: n }, (_, i) => Math.floor(i / 600));
    const interval = bootstrapInterval(right, fold, 10);
    const half = 1.96 * Math.sqrt((0.9 * 0.1) / n);
    // Of 2,000 resamples the 50th has a standard error of about 2.7% of the half width times 1.96 / 2.3;
    // 8% is three of them.
    assert.ok(Math.abs(interval.low - (0.9 - half)) < 0.08 * half, JSON.stringify(interval));
    assert.ok(Math.abs(interval.high - (0.9 + half)) < 0.08 * half, JSON.stringify(interval));
    assert.deepEqual(bootstrapInterval(right, fold, 10), interval);
  });

  it('draws within folds, each of which weighs the same', () => {
    // One fold without an error, one of half errors: the mean's deviation is sqrt(0.25 / 400) / 2 = 0.0125,
    // where drawing over both would give sqrt(0.75 * 0.25 / 800) = 0.0153.
    const right = Array.from({ length: 800 }, (_, i) => (i < 400 ? 1 : i % 2));
    const fold = right.map((_, i) => (i < 400 ? 0 : 1));
    const { low, high } = bootstrapInterval(right, fold, 2);
    const deviation = (high - low) / (2 * 1.96);
    assert.ok(Math.abs(deviation - 0.0125) < 0.0012, String(deviation));
    assert.ok(Math.abs((low + high) / 2 - 0.75) < 0.004);
    // Unequal folds: the mean of 1 and 1/2, not of the pairs.
    const uneven = bootstrapInterval([1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1], 2);
    assert.deepEqual([uneven.low, uneven.high], [0.5, 1]);
  });

  it('has no width where all decisions are right', () => {
    const { low, high } = bootstrapInterval([1, 1, 1, 1], [0, 0, 1, 1], 2);
    assert.deepEqual([low, high], [1, 1]);
  });
});

describe('normalQuantile', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores

  it('gives the printed percentage points, and inverts the tail', () => {
    for (const [p, z] of [
      [0.5, 0],
      [0.975, 1.959964],
      [0.99, 2.326348],
      [0.9999, 3.719016],
      [0.0001, -3.719016],
    ] as const) {
      assert.ok(Math.abs(normalQuantile(p) - z) < 5e-7, `${p}: ${normalQuantile(p)}`);
    }
    for (const z of [0.1, 0.5, 1.5, 1.97, 1.98, 3, 4]) {
      assert.ok(Math.abs(normalQuantile(normalTail(z)) + z) < 1e-7, String(z));
    }
    assert.equal(normalQuantile(0), Number.NEGATIVE_INFINITY);
    assert.equal(normalQuantile(1), Number.POSITIVE_INFINITY);
  });
});
