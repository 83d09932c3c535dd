import assert from 'node:assert/strict';
import { embedForPairs, evaluatePairs, type ScoreModel } from '../src/evaluate/pairs.js';
import { PROTOCOLS, rowLength } from '../src/evaluate/protocols.js';
import { verification } from '../src/evaluate/verification.js';

/** Both sides compute the same real number by a few operations on numbers below 10. */
const ROUNDING = 1e-12;

const near = (actual: number, expected: number, what = '') =>
  assert.ok(Math.abs(actual - expected) < ROUNDING, `${what} ${actual} against ${expected}`);

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

const pair = (a: number, b: number, same: boolean, fold: number) => ({ a, b, same, fold });
const count = <T>(items: readonly T[], test: (item: T) => boolean) => items.filter(test).length;

/** Embeddings 1, 2 and their mirror images' 10, 20. */
class TwoNumbers implements ScoreModel {
  readonly embedding = 2;
  mirrored = 0;
  async embed(images: Uint8Array | string[], { mirror = false } = {}): Promise<Float32Array> {
    const n = images.length / (112 * 112 * 3);
    if (mirror) this.mirrored += n;
    return Float32Array.from({ length: 2 * n }, (_, i) => (mirror ? 10 : 1) * (1 + (i % 2)));
  }
}

describe('protocols', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores

  it('add, set behind or leave out the mirror image, and take it only where it counts', async () => {
    const images = new Uint8Array(2 * 112 * 112 * 3);
    const rows = {
      insightface: [11, 22, 11, 22],
      facenet: [1, 2, 1, 2],
      sphereface: [1, 2, 10, 20, 1, 2, 10, 20],
      facex: [1, 2, 1, 2],
    };
    for (const protocol of PROTOCOLS) {
      const model = new TwoNumbers();
      assert.deepEqual([...(await embedForPairs(model, { images, protocol }))], rows[protocol]);
      assert.equal(rowLength(2, protocol), rows[protocol].length / 2);
      assert.equal(model.mirrored, ['insightface', 'sphereface'].includes(protocol) ? 2 : 0);
    }
  });

  it('facenet: as insightface on the image alone', () => {
    // Of unit rows squared distances are 2 - 2 cos: 2/13 = 0.154, 2, 16/13 = 1.231 and 2.
    const rows = Float32Array.from([1, 0, 12 / 13, 5 / 13, 0, 1, 5 / 13, 12 / 13]);
    const pairs = [
      ...[pair(0, 1, true, 0), pair(0, 2, false, 0)],
      ...[pair(0, 3, true, 1), pair(2, 0, false, 1)],
    ];
    const result = evaluatePairs({ embeddings: rows, dim: 2, pairs, protocol: 'facenet' });
    // Fold 1 wants the first threshold above 1.231, fold 0 the first above 0.154.
    assert.deepEqual(result.thresholds, [124 * 0.01, 16 * 0.01]);
    assert.deepEqual(result.accuracy.perFold, [1, 0.5]);
    assert.deepEqual(
      [result.flip, result.score, result.accuracy.spread],
      [false, 'squared-l2', 'std'],
    );
    assert.equal(result.accuracy.std, 0.25);
  });

  it('sphereface: mean of the training folds off, mean of the tied thresholds, strict on both sides', () => {
    const rows = Float32Array.from([4, 2, 6, 2, 3, 5, 4, 2, 4, 2, 0, 2]);
    const pairs = [
      pair(0, 1, true, 0),
      pair(0, 2, false, 0),
      pair(3, 4, true, 1),
      pair(3, 5, false, 1),
    ];
    const result = evaluatePairs({ embeddings: rows, dim: 2, pairs, protocol: 'sphereface' });
    // Fold 0: rows 3, 4, 3, 5 have the mean (3, 2). Less it, fold 1 scores 1 and -1: all thresholds from
    // -0.9999 to 0.9999 are best, their mean is 0. Fold 0 scores cos((1,0),(3,0)) = 1, right, and
    // cos((1,0),(0,3)) = 0, which lies on the threshold and is wrong.
    // Fold 1: rows 0, 1, 0, 2 have the mean (4.25, 2.75). Less it, fold 0 scores 0.125/sqrt(2.265625) =
    // 0.0830 and -1.375/sqrt(4.140625) = -0.6757: thresholds -0.6757 to 0.0830 are best, their mean is
    // -0.29635. Fold 1 scores 1, right, and 1.625/sqrt(11.640625) = 0.4763, wrong.
    assert.equal(result.thresholds.length, 2);
    near(result.thresholds[0]!, 0);
    near(result.thresholds[1]!, -0.29635);
    assert.deepEqual(result.accuracy.perFold, [0.5, 0.5]);
    const cosines = [1, 0, 1, 1.625 / Math.sqrt(11.640625)];
    result.details.distances.forEach((distance, i) => {
      near(distance, 2 - 2 * cosines[i]!, `pair ${i}`);
    });
    assert.deepEqual([...result.details.right], [1, 0, 1, 0]);
    assert.equal(result.accuracy.spread, null);
    assert.equal(result.valAtFar, undefined);
  });

  it('facex: the first of 1,000 steps where TPR - FPR is greatest, strict on both sides', () => {
    const result = verification({
      cosines: [0.9, 0.1, 0.5, 0],
      same: [1, 0, 1, 0],
      fold: [0, 0, 1, 1],
      protocol: 'facex',
    });
    // Fold 1 runs from 0 to 0.5: 0 + 0.0005 parts it, and takes 0.1 of fold 0 for one person.
    // Fold 0 runs from 0.1 to 0.9: 0.1 + 0.0008 parts it, and fold 1 too.
    near(result.thresholds[0]!, 0.0005);
    near(result.thresholds[1]!, 0.1008);
    assert.deepEqual(result.accuracy.perFold, [0.5, 1]);
    assert.equal(result.accuracy.spread, 'standardError');
    // Sample deviation of 0.5 and 1: sqrt(0.125); over sqrt(2): 0.25.
    near(result.accuracy.standardError, 0.25);
    const onIt = verification({
      cosines: [0.001, 0.001, 1, 0],
      same: [1, 0, 1, 0],
      fold: [0, 0, 1, 1],
      protocol: 'facex',
    });
    assert.equal(onIt.thresholds[0], 0.001);
    assert.equal(onIt.accuracy.perFold[0], 0, 'a score on the threshold is wrong for either kind');
  });

  it('VAL at FAR 1e-3 lies between two thresholds of the training folds', () => {
    const result = verification({
      distances: [0.5, 0.500001, 0.500003, 0.4, 0.9, 0.1, 0.5005, 1],
      same: [1, 1, 1, 0, 0, 1, 0, 0],
      fold: [0, 0, 0, 0, 0, 1, 1, 1],
    });
    // For fold 0: none of fold 1's impostors is below 0.500, half of them are below 0.501, so FAR 1e-3 is
    // reached at 0.500 + 0.001 * 0.001 / 0.5 = 0.500002. Below it lie two of three genuine pairs and one
    // of two impostors. For fold 1: 0.400 + 0.000002, below it the genuine pair and no impostor.
    const val = result.valAtFar!['1e-3'];
    near(val.val, (2 / 3 + 1) / 2);
    near(val.std, 1 / 6);
    near(val.far, 0.25);
    // 2,000 impostors in fold 1, one of them below 0.500 and three below 0.501: FAR 0.0005 and 0.0015, so
    // 0.001 is reached half-way, at 0.5005.
    const impostors = Array.from({ length: 2000 }, (_, i) => (i < 1 ? 0.3 : i < 3 ? 0.5007 : 2));
    const halfWay = verification({
      distances: [0.5004, 0.5006, 2, 0.1, ...impostors],
      same: [1, 1, 0, 1, ...impostors.map(() => 0)],
      fold: [0, 0, 0, 1, ...impostors.map(() => 1)],
    });
    // Of fold 0 half its genuine pairs; for fold 1 FAR 1e-3 is reached just above 2, beyond its pair.
    near(halfWay.valAtFar!['1e-3'].val, (0.5 + 1) / 2);
    const never = verification({
      distances: [0.5, 4, 0.5, 4],
      same: [1, 0, 1, 0],
      fold: [0, 0, 1, 1],
    });
    assert.deepEqual(never.valAtFar!['1e-3'], { val: 0, std: 0, far: 0 });
  });

  for (const protocol of ['sphereface', 'facex'] as const) {
    it(`${protocol} equals its definition on random scores with ties`, () => {
      const next = generator(protocol === 'facex' ? 5 : 6);
      for (let round = 0; round < 60; round++) {
        const folds = 2 + next(2);
        const pairs = Array.from({ length: folds * (4 + next(3)) }, (_, i) => ({
          cosine: next(2) ? (next(21) - 10) / 10 : (next(20_001) - 10_000) / 10_000,
          same: i < 2 * folds ? Math.floor(i / folds) === 0 : next(2) === 0,
          fold: i % folds,
        }));
        const result = verification({
          cosines: pairs.map(({ cosine }) => cosine),
          same: pairs.map(({ same }) => same),
          fold: pairs.map(({ fold }) => fold),
          protocol,
        });
        for (let f = 0; f < folds; f++) {
          const train = pairs.filter(({ fold }) => fold !== f);
          const test = pairs.filter(({ fold }) => fold === f);
          const isRight = (t: number) => (p: (typeof pairs)[number]) =>
            p.same ? p.cosine > t : p.cosine < t;
          const values = train.map(({ cosine }) => cosine);
          const [low, high] = [Math.min(...values), Math.max(...values)];
          const candidates =
            protocol === 'facex'
              ? Array.from({ length: 1000 }, (_, i) => low + ((high - low) / 1000) * (i + 1))
              : Array.from({ length: 20_001 }, (_, i) => (i - 10_000) / 10_000);
          const merit = candidates.map((t) => {
            if (protocol === 'sphereface') return count(train, isRight(t));
            const share = (kind: boolean) =>
              count(train, (p) => p.same === kind && p.cosine > t) /
              count(train, (p) => p.same === kind);
            return share(true) - share(false);
          });
          const best = merit.reduce((a, b) => Math.max(a, b));
          const tied = candidates.filter((_, i) => merit[i] === best);
          const threshold =
            protocol === 'facex' ? tied[0]! : tied.reduce((a, b) => a + b) / tied.length;
          const what = `round ${round}, fold ${f}`;
          // A mean of up to 20,001 thresholds, summed in another order.
          assert.ok(Math.abs(result.thresholds[f]! - threshold) < 1e-10, what);
          assert.equal(
            result.accuracy.perFold[f],
            count(test, isRight(result.thresholds[f]!)) / test.length,
            what,
          );
        }
        // AUC by counting every genuine pair against every impostor pair.
        const genuine = pairs.filter(({ same }) => same);
        const impostor = pairs.filter(({ same }) => !same);
        let wins = 0;
        for (const g of genuine) {
          for (const i of impostor) {
            wins += g.cosine > i.cosine ? 1 : g.cosine === i.cosine ? 0.5 : 0;
          }
        }
        near(result.auc, wins / genuine.length / impostor.length);
      }
    });
  }

  it('sphereface equals its definition on random embeddings', () => {
    const next = generator(9);
    for (let round = 0; round < 20; round++) {
      const dim = 3;
      const embeddings = Float32Array.from({ length: 12 * dim }, () => next(2001) / 1000 - 0.8);
      const pairs = Array.from({ length: 12 }, (_, i) => pair(i, next(12), i % 2 === 0, i % 3));
      const result = evaluatePairs({ embeddings, dim, pairs, protocol: 'sphereface' });
      const row = (k: number) => [...embeddings.subarray(k * dim, (k + 1) * dim)];
      pairs.forEach(({ a, b, fold }, i) => {
        const members = pairs.filter((p) => p.fold !== fold).flatMap((p) => [row(p.a), row(p.b)]);
        const mean = Array.from(
          { length: dim },
          (_, d) => members.reduce((sum, m) => sum + m[d]!, 0) / members.length,
        );
        const centred = [row(a), row(b)].map((r) => r.map((x, d) => x - mean[d]!));
        const [x, y] = centred as [number[], number[]];
        const dot = x.reduce((sum, v, d) => sum + v * y[d]!, 0);
        const cosine = dot / Math.hypot(...x) / Math.hypot(...y);
        assert.ok(Math.abs(result.details.distances[i]! - (2 - 2 * cosine)) < 1e-9, `pair ${i}`);
      });
    }
  });

  it('never let a fold choose its own threshold', () => {
    const next = generator(11);
    for (const protocol of PROTOCOLS) {
      const cosine = protocol === 'sphereface' || protocol === 'facex';
      for (let round = 0; round < 30; round++) {
        const scores = Array.from({ length: 24 }, () => next(1000) / 1000);
        const same = scores.map((_, i) => i % 8 < 4);
        const fold = scores.map((_, i) => i % 4);
        const f = next(4);
        const threshold = (values: number[]) =>
          verification({
            ...(cosine ? { cosines: values } : { distances: values }),
            same,
            fold,
            protocol,
          }).thresholds[f];
        const others = scores.map((value, i) => (fold[i] === f ? next(1000) / 1000 : value));
        assert.equal(threshold(others), threshold(scores), protocol);
      }
    }
    // Nor by the mean that is taken off: rows 0 and 1 are of fold 0 alone.
    const rows = Float32Array.from({ length: 24 }, () => next(1000) / 500 - 1);
    const pairs = [
      ...[pair(0, 1, true, 0), pair(1, 0, false, 0), pair(2, 3, true, 1), pair(4, 5, false, 1)],
      ...[pair(6, 7, true, 2), pair(8, 9, false, 2)],
    ];
    const first = (embeddings: Float32Array) =>
      evaluatePairs({ embeddings, dim: 2, pairs, protocol: 'sphereface' }).thresholds;
    const before = first(rows);
    const changed = Float32Array.from(rows, (value, i) => (i < 4 ? -3 * value + 1 : value));
    const after = first(changed);
    assert.equal(after[0], before[0]);
    assert.notDeepEqual(after, before, 'rows of fold 0 do take part in the other folds');
  });

  it('take pairs with an image without a face for two people, and no part of it into the mean', () => {
    const rows = Float32Array.from([1, 0, 1, 0, 0, 1, 0, 0, 1, 0.1, 0, 1]);
    const pairs = [
      ...[pair(0, 1, true, 0), pair(0, 2, false, 0), pair(0, 3, true, 0)],
      ...[pair(0, 4, true, 1), pair(4, 5, false, 1), pair(3, 5, false, 1)],
    ];
    for (const protocol of PROTOCOLS) {
      const { details } = evaluatePairs({
        embeddings: rows,
        dim: 2,
        pairs,
        protocol,
        withoutFace: [3],
      });
      assert.deepEqual([details.right[2], details.right[5]], [0, 1], protocol);
      const moved = Float32Array.from(rows, (value, i) => (i === 6 || i === 7 ? 1000 : value));
      const again = evaluatePairs({ embeddings: moved, dim: 2, pairs, protocol, withoutFace: [3] });
      assert.deepEqual(again.details.distances, details.distances, protocol);
    }
  });

  it('refuse the other kind of score, both, and for facex training folds of one kind', () => {
    const labels = { same: [1, 0, 1, 0], fold: [0, 0, 1, 1] };
    const scores = [0.9, 0.1, 0.8, 0.2];
    assert.throws(() => verification({ ...labels, distances: scores, protocol: 'facex' }), {
      code: 'ERR_INPUT',
      message: /facex judges cosines/,
    });
    assert.throws(() => verification({ ...labels, cosines: scores }), {
      code: 'ERR_INPUT',
      message: /insightface judges distances/,
    });
    assert.throws(() => verification({ ...labels, cosines: scores, distances: scores }), {
      code: 'ERR_INPUT',
    });
    assert.throws(
      () =>
        verification({
          cosines: scores,
          same: [1, 1, 0, 0],
          fold: [0, 0, 1, 1],
          protocol: 'facex',
        }),
      { code: 'ERR_PROTOCOL', message: /0 pairs of one person and 2 of two/ },
    );
    assert.throws(
      () => verification({ ...labels, distances: scores, protocol: 'arcface' as 'facenet' }),
      { code: 'ERR_INPUT', message: /protocol is arcface: give insightface or facenet or/ },
    );
    const { details } = verification({ distances: scores, same: [1, 1, 0, 0], fold: [0, 0, 1, 1] });
    assert.ok(
      details.notes.some((note) => note.startsWith('2 of the 2 folds hold pairs of one kind')),
    );
    assert.throws(
      () => verification({ ...labels, cosines: [1, Number.NaN, 0, 0], protocol: 'facex' }),
      { code: 'ERR_NON_FINITE', message: /cosine of pair 1 is NaN/ },
    );
  });
});
