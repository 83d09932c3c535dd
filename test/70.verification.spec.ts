import assert from 'node:assert/strict';
import type { ErrorCode } from '../src/errors.js';
import { HardmineError } from '../src/errors.js';
import { evaluatePairs } from '../src/evaluate/pairs.js';
import { mayBeGuessed, wilsonInterval } from '../src/evaluate/statistics.js';
import {
  bestThreshold,
  type LabelledDistances,
  verification,
} from '../src/evaluate/verification.js';

/** Both sides compute the same real number by a few operations on numbers below 1. */
const ROUNDING = 1e-12;

interface Case {
  distances: number[];
  same: boolean[];
  fold: number[];
  folds: number;
}

/** Marsaglia's xorshift32: the cases are the same on every run. */
function generator(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) % below;
  };
}

function randomCase(next: (below: number) => number): Case {
  const folds = 2 + next(6);
  const pairs = folds * (1 + next(8));
  // Distances on the grid of thresholds (the strict comparison decides), far coarser (many ties), or free.
  const style = next(3);
  const draw = () =>
    style === 0 ? next(401) * 0.01 : style === 1 ? next(6) * 0.5 : next(1 << 20) / (1 << 18);
  const skill = next(3);
  const same = Array.from({ length: pairs }, (_, i) => (i < 2 ? i === 0 : next(2) === 0));
  const distances = same.map((label) => {
    const first = draw();
    if (skill === 0) return first;
    const second = draw();
    return label ? Math.min(first, second) : Math.max(first, second);
  });
  return { distances, same, fold: same.map((_, i) => i % folds), folds };
}

const count = (n: number, test: (i: number) => boolean) => {
  let found = 0;
  for (let i = 0; i < n; i++) if (test(i)) found++;
  return found;
};

/** The protocol by its definition: every pair counted anew for every question. */
function bruteForce({ distances: d, same, fold, folds }: Case) {
  const n = d.length;
  const correct = (t: number, counts: (f: number) => boolean) =>
    count(n, (i) => counts(fold[i]!) && d[i]! < t === same[i]);
  const thresholds: number[] = [];
  const perFold: number[] = [];
  for (let f = 0; f < folds; f++) {
    let best = -1;
    let chosen = 0;
    for (let i = 0; i < 400; i++) {
      const right = correct(i * 0.01, (g) => g !== f);
      if (right > best) [best, chosen] = [right, i * 0.01];
    }
    thresholds.push(chosen);
    perFold.push(correct(chosen, (g) => g === f) / count(n, (i) => fold[i] === f));
  }
  const genuine = d.filter((_, i) => same[i]);
  const impostor = d.filter((_, i) => !same[i]);
  let wins = 0;
  for (const p of genuine) for (const q of impostor) wins += p < q ? 2 : p === q ? 1 : 0;
  const cuts = [-1, ...new Set(d)].sort((a, b) => a - b);
  const points = cuts.map((cut) => ({
    far: count(impostor.length, (i) => impostor[i]! <= cut) / impostor.length,
    tar: count(genuine.length, (i) => genuine[i]! <= cut) / genuine.length,
  }));
  const tar = (target: number) =>
    Math.max(...points.filter(({ far }) => far <= target).map((point) => point.tar));
  // Bisection along the ROC's line for FAR = 1 - TAR: another way than interpolating in one step.
  const k = points.findIndex(({ far, tar }) => far >= 1 - tar);
  const [from, to] = [points[k - 1]!, points[k]!];
  let [low, high] = [0, 1];
  const along = (s: number) => from.far + s * (to.far - from.far);
  for (let step = 0; step < 100; step++) {
    const s = (low + high) / 2;
    if (along(s) >= 1 - (from.tar + s * (to.tar - from.tar))) high = s;
    else low = s;
  }
  return {
    thresholds,
    perFold,
    auc: wins / (2 * genuine.length * impostor.length),
    eer: along(high),
    tarAtFar: { '1e-2': tar(1e-2), '1e-3': tar(1e-3) },
    right: perFold.map((share, f) => Math.round(share * count(n, (i) => fold[i] === f))),
  };
}

describe('verification', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  it('equals brute force on 1,000 random score sets, ties and grid values among them', () => {
    const next = generator(20);
    for (let round = 0; round < 1000; round++) {
      const random = randomCase(next);
      const expected = bruteForce(random);
      const result = verification(random);
      const what = `round ${round}: ${JSON.stringify(random)}`;
      assert.deepEqual(result.thresholds, expected.thresholds, what);
      assert.deepEqual(result.accuracy.perFold, expected.perFold, what);
      assert.equal(result.auc, expected.auc, what);
      assert.deepEqual(result.tarAtFar, expected.tarAtFar, what);
      assert.ok(Math.abs(result.eer - expected.eer) < ROUNDING, what);
      const right = expected.right.reduce((sum, n) => sum + n, 0);
      assert.deepEqual(result.confidence95, wilsonInterval(right, random.same.length), what);
    }
  });

  it('gives the mean, the population deviation and the standard error over folds', () => {
    // Thresholds part the two kinds in folds 0 and 1; in fold 2 one of two pairs is on the wrong side.
    const result = verification({
      distances: [0.5, 1.5, 0.5, 1.5, 0.5, 0.4],
      same: [1, 0, 1, 0, 1, 0],
      fold: [0, 0, 1, 1, 2, 2],
    });
    assert.deepEqual(result.accuracy.perFold, [1, 1, 0.5]);
    const { mean, std, standardError } = result.accuracy;
    assert.ok(Math.abs(mean - 5 / 6) < ROUNDING);
    // Squared deviations 1/36, 1/36, 4/36: population variance 1/18, sample variance 1/12.
    assert.ok(Math.abs(std - Math.sqrt(1 / 18)) < ROUNDING);
    assert.ok(Math.abs(standardError - Math.sqrt(1 / 12 / 3)) < ROUNDING);
    assert.equal(result.pairs, 6);
    assert.deepEqual(
      [result.protocol, result.flip, result.score],
      ['insightface', true, 'squared-l2'],
    );
  });

  it('compares strictly: a distance on the threshold is two people', () => {
    // The two kinds lie on 0.30 and 0.31; only a threshold above the first and not above the second is right.
    const result = verification({
      distances: [30 * 0.01, 31 * 0.01, 30 * 0.01, 31 * 0.01],
      same: [1, 0, 1, 0],
      fold: [0, 0, 1, 1],
    });
    assert.deepEqual(result.thresholds, [31 * 0.01, 31 * 0.01]);
    assert.equal(result.accuracy.mean, 1);
  });

  it('never lets a fold choose its own threshold', () => {
    const next = generator(7);
    for (let round = 0; round < 200; round++) {
      const random = randomCase(next);
      const fold = next(random.folds);
      const before = verification(random).thresholds[fold];
      const same = random.same.map((label, i) => (random.fold[i] === fold ? !label : label));
      if (new Set(same).size < 2) continue;
      const after = verification({ ...random, same }).thresholds[fold];
      assert.equal(after, before);
    }
  });

  it('draws the pooled ROC from (0, 0) to (1, 1), ties as one slanted line', () => {
    const { details, auc, eer } = verification({
      distances: [0.2, 0.5, 0.5, 0.9],
      same: [1, 1, 0, 0],
      fold: [0, 1, 0, 1],
    });
    assert.deepEqual([...details.roc.far], [0, 0, 0.5, 1]);
    assert.deepEqual([...details.roc.tar], [0, 0.5, 1, 1]);
    assert.equal(auc, 0.875);
    // From (0, 0.5) to (0.5, 1) the line crosses FAR = 1 - TAR at 0.25.
    assert.equal(eer, 0.25);
  });

  it('says when impostor pairs are too few for a FAR target', () => {
    const pairs = (impostors: number): LabelledDistances => {
      const n = impostors + 2;
      return {
        distances: Array.from({ length: n }, (_, i) => i / n),
        same: Array.from({ length: n }, (_, i) => i < 2),
        fold: Array.from({ length: n }, (_, i) => i % 2),
      };
    };
    assert.equal(verification(pairs(10_000)).details.notes.length, 0);
    const { notes } = verification(pairs(3000)).details;
    assert.equal(notes.length, 1);
    assert.match(notes[0]!, /FAR 0.1% over 3000 impostor pairs allows 3 false accepts/);
    assert.equal(verification(pairs(50)).details.notes.length, 2);
  });

  it('refuses what it cannot judge', () => {
    const good = { distances: [0.1, 0.9, 0.2, 0.8], same: [1, 0, 1, 0], fold: [0, 0, 1, 1] };
    const refused: [Partial<LabelledDistances>, ErrorCode, RegExp][] = [
      [{ same: [1, 0, 1] }, 'ERR_PROTOCOL', /4 distances but 3 labels/],
      [{ fold: [0, 1] }, 'ERR_PROTOCOL', /4 distances but 2 fold numbers/],
      [{ same: [1, 1, 1, 1] }, 'ERR_PROTOCOL', /4 of one person and 0 of two/],
      [{ same: [0, 0, 0, 0] }, 'ERR_PROTOCOL', /0 of one person and 4 of two/],
      [{ distances: [], same: [], fold: [] }, 'ERR_PROTOCOL', /The 0 pairs/],
      [{ distances: [0.1, Number.NaN, 0.2, 0.8] }, 'ERR_NON_FINITE', /pair 1 is NaN/],
      [{ distances: [0.1, 1, 0.2, Infinity] }, 'ERR_NON_FINITE', /pair 3 is Infinity/],
      [{ distances: [0.1, 1, -0.2, 1] }, 'ERR_INPUT', /pair 2 is -0.2.*between 0 and 4/],
      [{ distances: [0.1, 4.1, 0.2, 1] }, 'ERR_INPUT', /pair 1 is 4.1/],
      [{ fold: [0, 0, 0, 0] }, 'ERR_PROTOCOL', /one fold/],
      [{ fold: [0, 0, 2, 2] }, 'ERR_PROTOCOL', /Fold 1 of 3 holds no pair/],
      [{ fold: [0, 0, -1, 1] }, 'ERR_PROTOCOL', /fold of pair 2 is -1/],
      [{ fold: [0, 0.5, 1, 1] }, 'ERR_PROTOCOL', /fold of pair 1 is 0.5/],
      [{ fold: [0, 1, 1e9, 1] }, 'ERR_PROTOCOL', /fold of pair 2 is 1000000000/],
    ];
    for (const [change, code, message] of refused) {
      assert.throws(
        () => verification({ ...good, ...change }),
        (error: unknown) =>
          error instanceof HardmineError && error.code === code && message.test(error.message),
        JSON.stringify(change),
      );
    }
  });
});

describe('mayBeGuessed', () => {
  it('is a two-sided test at 5% that the coin is fair', () => {
    // Of 860 pairs a fair coin gets 430 right, with a standard deviation of sqrt(860) / 2 = 14.66.
    assert.ok(mayBeGuessed((430 + 1.9 * 14.66) / 860, 860));
    assert.ok(!mayBeGuessed((430 + 2.0 * 14.66) / 860, 860));
    assert.ok(mayBeGuessed(0.4, 860));
    assert.ok(mayBeGuessed(0.9, 4));
    assert.ok(!mayBeGuessed(0.9, 20));
  });
});

describe('wilsonInterval', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  it("gives the published values (Newcombe 1998, table I; R's prop.test without correction)", () => {
    const published: [number, number, number, number][] = [
      [81, 263, 0.2553, 0.3662],
      [15, 148, 0.0624, 0.1605],
      [0, 20, 0, 0.1611],
      [1, 29, 0.0061, 0.1718],
      [5, 10, 0.2366, 0.7634],
    ];
    for (const [k, n, low, high] of published) {
      const interval = wilsonInterval(k, n);
      // The tables have four decimals.
      assert.ok(Math.abs(interval.low - low) <= 5e-5, `${k}/${n}: ${interval.low}`);
      assert.ok(Math.abs(interval.high - high) <= 5e-5, `${k}/${n}: ${interval.high}`);
    }
    assert.equal(wilsonInterval(20, 20).high, 1);
  });
});

describe('bestThreshold', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  it('has no better threshold, on 500 random score sets', () => {
    const next = generator(3);
    for (let round = 0; round < 500; round++) {
      const n = 2 + next(20);
      const scores = Array.from({ length: n }, () => (next(9) - 4) / 4);
      const same = scores.map((_, i) => (i < 2 ? i : next(2)));
      if (new Set(scores).size === 1) continue;
      const right = (t: number) => count(n, (i) => scores[i]! >= t === (same[i] === 1));
      const distinct = [...new Set(scores)].sort((a, b) => a - b);
      const best = Math.max(...distinct.slice(1).map(right));
      assert.equal(right(bestThreshold(scores, same)), best, JSON.stringify({ scores, same }));
    }
  });

  it('cuts half-way, and takes the middle one of equally good cuts', () => {
    assert.equal(bestThreshold([0.2, 0.4, 0.8, 0.9], [0, 0, 1, 1]), 0.4 + (0.8 - 0.4) / 2);
    // Cuts at 1.5, 2.5 (worse), 3.5, 4.5 (worse), 5.5: three equally good ones.
    assert.equal(bestThreshold([1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 0, 1]), 3.5);
    const next = 1 + Number.EPSILON;
    assert.equal(bestThreshold([1, next], [0, 1]), next);
  });

  it('refuses scores that are all equal, and NaN', () => {
    assert.throws(() => bestThreshold([1, 1], [0, 1]), { code: 'ERR_PROTOCOL' });
    assert.throws(() => bestThreshold([1, Number.NaN], [0, 1]), { code: 'ERR_NON_FINITE' });
  });
});

describe('evaluatePairs', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  const rows = Float32Array.from([3, 0, 0, 2, 1, 0.1, -1, 0]);
  const pair = (a: number, b: number, same: boolean, fold: number) => ({ a, b, same, fold });
  const pairs = [
    pair(0, 2, true, 0),
    pair(0, 1, false, 0),
    pair(2, 2, true, 1),
    pair(0, 3, false, 1),
    pair(1, 3, true, 1),
  ];

  it('normalises rows and takes the squared distance', () => {
    const { details } = evaluatePairs({ embeddings: rows, dim: 2, pairs });
    const y = Math.fround(0.1);
    // |a - b|^2 = 2 - 2 cos for unit vectors.
    const expected = [2 - 2 / Math.hypot(1, y), 2, 0, 4, 2];
    details.distances.forEach((distance, i) => {
      assert.ok(Math.abs(distance - expected[i]!) < ROUNDING, `pair ${i}: ${distance}`);
    });
  });

  it('lists the hardest pairs, worst first, and says which are wrong', () => {
    const { details } = evaluatePairs({ embeddings: rows, dim: 2, pairs });
    assert.deepEqual(
      details.hardestImpostors.map(({ a, b }) => [a, b]),
      [
        [0, 1],
        [0, 3],
      ],
    );
    assert.deepEqual(
      details.hardestGenuine.map(({ a, b, wrong }) => [a, b, wrong]),
      [
        [1, 3, true],
        [0, 2, false],
        [2, 2, false],
      ],
    );
  });

  it('leaves an embedding of zeros zero', () => {
    const { details } = evaluatePairs({
      embeddings: Float32Array.from([0, 0, 0, 5]),
      dim: 2,
      pairs: [pair(0, 1, false, 0), pair(1, 1, true, 1)],
    });
    assert.deepEqual([...details.distances], [1, 0]);
  });

  it('refuses rows that do not exist, ragged rows and NaN', () => {
    const evaluate = (embeddings: Float32Array, a: number) =>
      evaluatePairs({ embeddings, dim: 2, pairs: [pair(a, 0, false, 0), pair(0, 0, true, 1)] });
    for (const a of [4, -1, 0.5, Number.NaN]) {
      assert.throws(() => evaluate(rows, a), { code: 'ERR_INPUT' }, `row ${a}`);
    }
    assert.throws(() => evaluate(rows.subarray(1), 1), { code: 'ERR_INPUT' });
    assert.throws(
      () => evaluate(Float32Array.from([1, 2, 3, Number.NaN]), 0),
      (error: unknown) =>
        error instanceof HardmineError &&
        error.code === 'ERR_NON_FINITE' &&
        error.message.includes('image 1'),
    );
  });
});
