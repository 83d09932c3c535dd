import assert from 'node:assert/strict';
import type { HardmineError } from '../src/errors.js';
import { type HeadOutput, MarginHead, type MarginHeadOptions } from '../src/head.js';
import type { BaseLoss, LossSettings, Weighting } from '../src/loss.js';
import {
  caseWithAngles,
  caseWithLosses,
  describeBase,
  type HeadCase,
  lawOf,
  type Shape,
  weightingOf,
} from './helpers/head-cases.js';
import {
  psi,
  type ReferenceOutput,
  referenceRows,
  weighted,
  weightedLosses,
} from './helpers/reference-head.js';

const SHAPES: Shape[] = [
  { rows: 1, dim: 3, classes: 2 },
  { rows: 7, dim: 33, classes: 129 },
  { rows: 64, dim: 512, classes: 1003 },
];
const IMPLEMENTATIONS = ['fused', 'unfused'] as const;

const BASES: BaseLoss[] = [
  { kind: 'softmax' },
  { kind: 'a-softmax', margin: 2, lambda: 0 },
  { kind: 'a-softmax', margin: 3, lambda: 0 },
  { kind: 'a-softmax', margin: 3, lambda: 5 },
  { kind: 'a-softmax', margin: 4, lambda: 0 },
  { kind: 'a-softmax', margin: 4, lambda: 5 },
  { kind: 'arcface', scale: 64, margin: 0.5 },
  { kind: 'cosface', scale: 64, margin: 0.35 },
  // MXNet's example, and the second of ArcFace's Table 2, whose m1 is below 1.
  { kind: 'combined', scale: 64, m1: 1, m2: 0.3, m3: 0.2 },
  { kind: 'combined', scale: 30, m1: 0.9, m2: 0.4, m3: 0.15 },
  { kind: 'euclidean-margin', margin: 0.4, pull: 0.5 },
];

const OMITTED_WHEN_LARGE = [BASES[1], BASES[2], BASES[5]];

const WEIGHTINGS: Weighting[] = [
  { kind: 'none' },
  { kind: 'hard-mining', form: 'equation', reduction: 'sample' },
  { kind: 'hard-mining', form: 'equation', reduction: 'batch' },
  { kind: 'hard-mining', form: 'algorithm', reduction: 'sample' },
  { kind: 'hard-mining', form: 'algorithm', reduction: 'batch' },
  { kind: 'knot-magnify', gamma: 2 },
];

/** Enough where the weighting is not what is tested. */
const SOME_WEIGHTINGS = WEIGHTINGS.filter((_, i) => [0, 1, 4, 5].includes(i));

/**
 * The tolerances: fp32 rounds a cosine of 512 products to about 1e-7, which the scale of 64
 * and the slope of the margin carry to the loss; hard mining's gate multiplies a deviation of the
 * loss by up to 11 in the gradients.
 */
const BASE_LOSS = 2e-5;
const WEIGHTED_LOSS = 1e-5;
const GRADIENT_NORM = 1e-3;

/** Whether the base loss has a margin of the angle, and so a `gradient` and `beyondPi`. */
function isAngular({ kind }: BaseLoss): boolean {
  return kind !== 'softmax' && kind !== 'euclidean-margin';
}

/** Three of four rows inside the gate, the others easy and hard, the mean inside it too. */
function gateLoss(row: number, random: { uniform(low: number, high: number): number }): number {
  if (row % 4 !== 3) return random.uniform(0.56, 0.84);
  return row % 8 === 3 ? random.uniform(0.1, 0.4) : random.uniform(1, 1.4);
}

function relativeDistance(found: ArrayLike<number>, expected: Float64Array): number {
  assert.equal(found.length, expected.length);
  let difference = 0;
  let norm = 0;
  for (const [i, value] of expected.entries()) {
    difference += (found[i]! - value) ** 2;
    norm += value ** 2;
  }
  return Math.sqrt(difference / norm);
}

function assertClose(found: number, expected: number, tolerance: number, what: string): void {
  const distance = Math.abs(found - expected);
  assert.ok(
    distance <= tolerance,
    `${what}: ${found} where ${expected} is expected (off by ${distance}, allowed ${tolerance})`,
  );
}

/** Runs one forward and backward on a head of its own; one thread unless the threads are what is tested. */
async function run(
  input: HeadCase,
  loss: LossSettings,
  implementation: 'fused' | 'unfused',
  threads = 1,
): Promise<HeadOutput> {
  const { classes, dim, embeddings, weights, bias, labels } = input;
  const options = { classes, dim, loss, implementation, threads };
  const head = await MarginHead.create({ ...options, device: 'cpu' });
  try {
    return await head.forwardBackward(
      bias === null ? { embeddings, weights, labels } : { embeddings, weights, bias, labels },
    );
  } finally {
    await head.dispose();
  }
}

/** Compares everything that a head gives with the double reference. */
function compare(
  found: HeadOutput,
  expected: ReferenceOutput,
  weighting: Weighting,
  what: string,
): void {
  for (const [i, loss] of expected.baseLoss.entries()) {
    const tolerance = BASE_LOSS * Math.max(1, Math.abs(loss));
    assertClose(found.baseLoss[i]!, loss, tolerance, `${what}, base loss ${i}`);
  }
  // At the kernel's own losses, because the gate multiplies a deviation by up to 11.
  const own = weightedLosses(Float64Array.from(found.baseLoss), weightingOf(weighting));
  for (const [i, loss] of own.values.entries()) {
    const tolerance = WEIGHTED_LOSS * Math.max(1, loss);
    assertClose(found.weightedLoss[i]!, loss, tolerance, `${what}, weighted loss ${i}`);
  }
  const mean = own.values.reduce((a, b) => a + b) / own.values.length;
  assertClose(found.loss, mean, WEIGHTED_LOSS * Math.max(1, mean), `${what}, loss`);
  const gradients: [string, ArrayLike<number> | undefined, Float64Array][] = [
    ['embeddings', found.gradEmbeddings, expected.gradEmbeddings],
    ['weights', found.gradWeights, expected.gradWeights],
  ];
  if ('gradBias' in found) gradients.push(['bias', found.gradBias, expected.gradBias]);
  for (const [name, values, reference] of gradients) {
    const distance = relativeDistance(values!, reference);
    assert.ok(distance <= GRADIENT_NORM, `${what}, gradient of ${name}: off by ${distance}`);
  }
}

function errorLike(code: string, pattern: RegExp) {
  return (error: HardmineError) => {
    assert.equal(error.code, code, error.message);
    assert.match(error.message, pattern);
    return true;
  };
}

describe('the double reference of the margin head', () => {
  const shape: Shape = { rows: 3, dim: 5, classes: 4 };
  const STEP = 1e-6;
  // Truncation is about STEP^2 times the third derivative, up to 1e5 inside the gate, and rounding
  // about 1e-16 * 10 / STEP: both below 1e-6.
  const TOLERANCE = 1e-6;

  for (const base of BASES) {
    for (const gradient of ['exact', 'detached'] as const) {
      if (!isAngular(base) && gradient === 'detached') continue;
      it(`has the gradients of central differences: ${describeBase(base)}, ${gradient}`, () => {
        const law = lawOf({ base, gradient });
        const input = caseWithLosses(shape, law, gateLoss);
        // A detached gradient is the true one of a target that moves as the cosine does.
        const shift =
          gradient === 'exact'
            ? undefined
            : referenceRows(input, law).targetCosine.map((c) => psi(Math.acos(c), law) - c);
        for (const weighting of WEIGHTINGS) {
          const lossOf = (changed: Partial<HeadCase>) =>
            weighted(referenceRows({ ...input, ...changed }, law, shift), weightingOf(weighting))
              .loss;
          const analytic = weighted(referenceRows(input, law), weightingOf(weighting));
          const check = (name: 'embeddings' | 'weights' | 'bias', gradients: Float64Array) => {
            for (const [i, expected] of gradients.entries()) {
              const at = (offset: number) => {
                const values = Float64Array.from(input[name]!);
                values[i]! += offset;
                return lossOf({ [name]: values });
              };
              const difference = (at(STEP) - at(-STEP)) / (2 * STEP);
              const tolerance = TOLERANCE * Math.max(1, Math.abs(expected));
              assertClose(difference, expected, tolerance, `${weighting.kind} ${name}[${i}]`);
            }
          };
          check('embeddings', analytic.gradEmbeddings);
          check('weights', analytic.gradWeights);
          if (input.bias !== null) check('bias', analytic.gradBias);
        }
      });
    }
  }
});

describe('MarginHead against the double reference', function () {
  this.timeout(60_000);

  for (const shape of SHAPES) {
    const size = `(${shape.rows}, ${shape.dim}, ${shape.classes})`;
    // The largest shape takes seconds a loss: A-Softmax there with the two that differ most.
    const large = shape === SHAPES[2];
    for (const base of BASES.filter((base) => !large || !OMITTED_WHEN_LARGE.includes(base))) {
      it(`${size} ${describeBase(base)}: every weighting, inside the gate`, async () => {
        const law = lawOf({ base });
        const input = caseWithLosses(shape, law, gateLoss);
        const rows = referenceRows(input, law);
        const inside = rows.baseLoss.filter((loss) => loss >= 0.55 && loss <= 0.85).length;
        assert.ok(2 * inside >= shape.rows, `only ${inside} of ${shape.rows} rows in the gate`);
        const plain = new Map<string, HeadOutput>();
        for (const weighting of WEIGHTINGS) {
          const expected = weighted(rows, weightingOf(weighting));
          for (const implementation of IMPLEMENTATIONS) {
            const what = `${implementation}, ${JSON.stringify(weighting)}`;
            const found = await run(input, { base, weighting }, implementation, 2);
            assert.equal('gradBias' in found, base.kind === 'softmax');
            compare(found, expected, weighting, what);
            if (weighting.kind === 'none') plain.set(implementation, found);
            compareFactors(found, plain.get(implementation)!, shape, weighting, what);
          }
        }
      });
    }
  }

  /** A row's factor is what hard mining multiplies the gradient of its embedding with. */
  function compareFactors(
    found: HeadOutput,
    plain: HeadOutput,
    { rows, dim }: Shape,
    weighting: Weighting,
    what: string,
  ): void {
    const { slopes } = weightedLosses(Float64Array.from(found.baseLoss), weightingOf(weighting));
    for (let i = 0; i < rows; i++) {
      let product = 0;
      let square = 0;
      for (let d = i * dim; d < (i + 1) * dim; d++) {
        product += found.gradEmbeddings[d]! * plain.gradEmbeddings[d]!;
        square += plain.gradEmbeddings[d]! ** 2;
      }
      const tolerance = WEIGHTED_LOSS * Math.max(1, slopes[i]!);
      assertClose(product / square, slopes[i]!, tolerance, `${what}, factor ${i}`);
    }
  }

  const MARGIN_BASES = BASES.filter(isAngular);
  const small: Shape = { rows: 7, dim: 33, classes: 129 };

  for (const base of MARGIN_BASES) {
    it(`${describeBase(base)}: exact and detached, mirror and none`, async () => {
      for (const gradient of ['exact', 'detached'] as const) {
        for (const beyondPi of ['mirror', 'none'] as const) {
          if (base.kind === 'a-softmax' && beyondPi === 'none') continue;
          const law = lawOf({ base, gradient, beyondPi });
          const input = caseWithLosses(small, law, gateLoss);
          const rows = referenceRows(input, law);
          for (const weighting of SOME_WEIGHTINGS) {
            const expected = weighted(rows, weightingOf(weighting));
            for (const implementation of IMPLEMENTATIONS) {
              const settings: LossSettings = { base, weighting, gradient, beyondPi };
              const found = await run(input, settings, implementation);
              compare(found, expected, weighting, `${implementation} ${JSON.stringify(settings)}`);
            }
          }
        }
      }
    });

    it(`${describeBase(base)}: angles around every multiple of pi`, async () => {
      for (const beyondPi of ['mirror', 'none'] as const) {
        if (base.kind === 'a-softmax' && beyondPi === 'none') continue;
        for (const gradient of ['exact', 'detached'] as const) {
          const law = lawOf({ base, gradient, beyondPi });
          const thetas = [1, 2, 3, 4]
            .map((k) => (k * Math.PI - law.m2) / law.m1)
            .flatMap((theta) =>
              [-0.2, -1e-3, -1e-5, 1e-5, 1e-3, 0.2].map((offset) => theta + offset),
            )
            .filter((theta) => theta > 0 && theta < Math.PI - 0.1)
            .concat(3); // beyond pi for every law whose m2 is above 0.14
          const shape: Shape = { rows: thetas.length, dim: 33, classes: 129 };
          const input = caseWithAngles(shape, law, thetas);
          const expected = weighted(referenceRows(input, law), null);
          for (const implementation of IMPLEMENTATIONS) {
            const settings: LossSettings = { base, gradient, beyondPi };
            const found = await run(input, settings, implementation);
            compare(found, expected, { kind: 'none' }, `${implementation} ${beyondPi} ${gradient}`);
          }
        }
      }
    });

    it(`${describeBase(base)}: finite and bounded where |cos| is near 1`, async () => {
      const law = lawOf({ base });
      const nearOne = [0, 1e-7, 1e-5, 1e-4, 1e-3];
      const thetas = nearOne.flatMap((theta) => [theta, Math.PI - theta]);
      const shape: Shape = { rows: thetas.length, dim: 33, classes: 129 };
      const input = caseWithAngles(shape, law, thetas);
      for (const implementation of IMPLEMENTATIONS) {
        const found = await run(input, { base }, implementation);
        assert.ok(Number.isFinite(found.loss));
        assert.ok(found.baseLoss.every((loss) => Number.isFinite(loss) && loss >= 0));
        assert.ok(found.gradWeights.every(Number.isFinite));
        for (let i = 0; i < shape.rows; i++) {
          const row = (values: Float32Array) =>
            Math.hypot(...values.subarray(i * shape.dim, (i + 1) * shape.dim));
          const norm = row(input.embeddings);
          const s = law.scale === 'norm' ? norm : law.scale;
          // |d psi / d theta| is at most m1 and |d theta / dx| at most 1 / |x|; the other classes
          // together add 1 / |x|, and where |x| is the scale |psi| + 1 comes on top. A tenth more for
          // fp32's cancellation at a slope of 1 / sin(theta) = 2236.
          const angular = (s * (law.m1 + 1)) / norm;
          const radial = law.scale === 'norm' ? 2 * law.m1 + 2 : 0;
          const bound = (1.1 * (angular + radial)) / shape.rows;
          const length = row(found.gradEmbeddings);
          assert.ok(length <= bound, `${implementation}, theta ${thetas[i]}: ${length} > ${bound}`);
        }
      }
    });
  }

  /** Three of four rows around p_c, 0.11 to 0.24 for these gammas, where Knot Magnify turns. */
  const knotLoss: typeof gateLoss = (row, random) =>
    row % 4 !== 3 ? random.uniform(1.2, 2.4) : random.uniform(0.01, 0.2);

  for (const base of BASES) {
    it(`${describeBase(base)}: Knot Magnify of every strength, around its critical point`, async () => {
      const law = lawOf({ base });
      const input = caseWithLosses(small, law, knotLoss);
      const rows = referenceRows(input, law);
      const inside = rows.baseLoss.filter((loss) => loss >= 1.1 && loss <= 2.5).length;
      assert.ok(2 * inside >= small.rows, `only ${inside} of ${small.rows} rows around p_c`);
      for (const gamma of [0, 0.1, 2, 8, 1000]) {
        const weighting: Weighting = { kind: 'knot-magnify', gamma };
        const expected = weighted(rows, weightingOf(weighting));
        for (const implementation of IMPLEMENTATIONS) {
          const plain = await run(input, { base }, implementation);
          const found = await run(input, { base, weighting }, implementation);
          compare(found, expected, weighting, `${implementation}, gamma ${gamma}`);
          compareFactors(found, plain, small, weighting, `${implementation}, gamma ${gamma}`);
          if (gamma === 0) assert.deepEqual(found, plain);
        }
      }
    });
  }

  describe('of the Euclidean margin', () => {
    const kind = 'euclidean-margin';
    /** Class weights along the axes, embeddings with the cosines given. */
    function onAxes(cosines: number[][], labels: number[]): HeadCase {
      const classes = cosines[0]!.length;
      const dim = classes + 1;
      const weights = new Float32Array(classes * dim);
      for (let j = 0; j < classes; j++) weights[j * dim + j] = 2;
      const embeddings = Float32Array.from(
        cosines.flatMap((row) => [
          ...row,
          Math.sqrt(Math.max(0, 1 - row.reduce((a, b) => a + b * b, 0))),
        ]),
      );
      const shape = { rows: cosines.length, dim, classes };
      return { ...shape, embeddings, weights, bias: null, labels: Int32Array.from(labels) };
    }

    for (const [margin, pull] of [
      [0.4, 0.5],
      [1.5, 0],
      [0, 2],
      [4, 0.1],
    ] as const) {
      it(`every number of active classes, just active and just not: margin ${margin}, pull ${pull}`, async () => {
        const base: BaseLoss = { kind, margin, pull };
        const law = lawOf({ base });
        const near = 1e-4;
        const own = 0.5;
        // The cosine at which a hinge is 0: margin + d_y - d_j = margin + 2 (cos_j - cos_y).
        const edge = own - margin / 2;
        const rows = [
          [own, edge - near, edge - near, edge - near], // none
          [own, edge + near, edge - near, edge - near], // one, just
          [own, edge + near, edge + near, edge - near],
          [own, edge + near, edge + near, edge + near], // all, just
          [own, edge + 0.2, edge - 0.3, edge - near],
        ].map((row) => row.map((cosine) => Math.max(-0.49, cosine)));
        const input = onAxes(rows, [0, 0, 0, 0, 0]);
        const reference = referenceRows(input, law);
        for (const weighting of WEIGHTINGS) {
          const expected = weighted(reference, weightingOf(weighting));
          for (const implementation of IMPLEMENTATIONS) {
            const found = await run(input, { base, weighting }, implementation);
            compare(found, expected, weighting, `${implementation}, ${weighting.kind}`);
          }
        }
      });
    }

    it('counts a hinge that is exactly 0 as inactive', async () => {
      // cos_y = 1 and cos_j = 0 give 2 + 0 - 2, in any arithmetic.
      const base: BaseLoss = { kind, margin: 2, pull: 0.5 };
      const input = onAxes([[1, 0, 0]], [0]);
      // Beside it a class at cos_j = 1/2, whose hinge of 1 it would halve.
      input.weights.fill(1, 8, 12);
      for (const implementation of IMPLEMENTATIONS) {
        const found = await run(input, { base }, implementation);
        assert.equal(found.loss, 1);
        assert.ok(found.gradWeights.subarray(4, 8).every((value) => value === 0));
      }
    });

    it('is finite at cosines of 1 and -1, and for an embedding of zeros', async () => {
      const base: BaseLoss = { kind };
      const input = onAxes(
        [
          [1, 0, 0],
          [-1, 0, 0],
          [0, 0, 0],
        ],
        [0, 0, 1],
      );
      input.embeddings.fill(0, 8, 12);
      for (const implementation of IMPLEMENTATIONS) {
        const found = await run(input, { base }, implementation);
        assertClose(found.baseLoss[0]!, 0, 1e-6, 'on its class');
        // d_y = 4, d_j = 2: both hinges are 2.4.
        assertClose(found.baseLoss[1]!, 2.4 + 0.5 * 4, 1e-6, 'opposite its class');
        // A zero has no direction: all cosines are 0.
        assertClose(found.baseLoss[2]!, 0.4 + 0.5 * 2, 1e-6, 'an embedding of zeros');
        assert.ok(found.gradEmbeddings.every(Number.isFinite));
        assert.ok(found.gradWeights.every(Number.isFinite));
      }
    });
  });

  for (const base of BASES) {
    it(`${describeBase(base)}: one label for all, all easy, all hard`, async () => {
      const law = lawOf({ base });
      const sameLabel = caseWithLosses(small, law, gateLoss);
      sameLabel.labels.fill(sameLabel.labels[0]!);
      const batches = {
        'one label': sameLabel,
        'all easy': caseWithLosses(small, law, (_, random) => random.uniform(0.05, 0.3)),
        // Random embeddings of a margin loss are hard, those of softmax need not be.
        'all hard': caseWithLosses(small, law, (_, random) =>
          base.kind === 'softmax' ? random.uniform(2, 4) : null,
        ),
      };
      for (const [name, input] of Object.entries(batches)) {
        const rows = referenceRows(input, law);
        if (name === 'all easy') assert.ok(rows.baseLoss.every((loss) => loss < 0.35));
        if (name === 'all hard') assert.ok(rows.baseLoss.every((loss) => loss > 1));
        for (const weighting of SOME_WEIGHTINGS) {
          const expected = weighted(rows, weightingOf(weighting));
          for (const implementation of IMPLEMENTATIONS) {
            const found = await run(input, { base, weighting }, implementation);
            compare(found, expected, weighting, `${name}, ${implementation}, ${weighting.kind}`);
          }
        }
      }
    });
  }
});

describe('the center loss', () => {
  const shape: Shape = { rows: 9, dim: 5, classes: 6 };
  const center = { weight: 0.3, rate: 0.4 };
  const { rows, dim, classes } = shape;
  /** Repeats, labels of one row alone, and classes 4 and 5 never. */
  const repeated = Int32Array.of(1, 0, 1, 3, 1, 0, 2, 1, 0);

  /** (weight / 2N) sum |x - c_y|^2, its gradient, and the centers after a step. */
  function reference(embeddings: Float32Array, labels: Int32Array, centers: Float64Array) {
    let loss = 0;
    const gradient = new Float64Array(rows * dim);
    const moved = centers.slice();
    const counts = labels.reduce((all, label) => {
      all[label]!++;
      return all;
    }, new Int32Array(classes));
    for (const [i, label] of labels.entries()) {
      for (let d = 0; d < dim; d++) {
        const difference = embeddings[i * dim + d]! - centers[label * dim + d]!;
        loss += (center.weight / (2 * rows)) * difference ** 2;
        gradient[i * dim + d] = (center.weight / rows) * difference;
        moved[label * dim + d]! += (center.rate * difference) / (1 + counts[label]!);
      }
    }
    return { loss, gradient, moved };
  }

  it('has the gradient of central differences, in the reference', () => {
    const { embeddings } = caseWithLosses(shape, lawOf({ base: { kind: 'softmax' } }), gateLoss);
    const centers = Float64Array.from({ length: classes * dim }, (_, i) => Math.sin(i));
    const { gradient } = reference(embeddings, repeated, centers);
    for (const [i, expected] of gradient.entries()) {
      const at = (offset: number) => {
        const values = embeddings.slice();
        values[i]! += offset;
        // The step that fp32 made of it.
        return { x: values[i]!, loss: reference(values, repeated, centers).loss };
      };
      const [up, down] = [at(1e-3), at(-1e-3)];
      // A parabola: only rounding of some 1e-16 over 2e-3.
      assertClose((up.loss - down.loss) / (up.x - down.x), expected, 1e-10, `gradient ${i}`);
    }
  });

  for (const base of BASES) {
    for (const implementation of IMPLEMENTATIONS) {
      it(`stands beside ${describeBase(base)}, outside the weighting, ${implementation}`, async () => {
        const law = lawOf({ base });
        for (const labels of [repeated, new Int32Array(rows).fill(4)]) {
          for (const weighting of SOME_WEIGHTINGS) {
            const input = caseWithLosses(shape, law, gateLoss);
            input.labels.set(labels);
            const { embeddings, weights, bias } = input;
            const options = { classes, dim, implementation, threads: 2, device: 'cpu' as const };
            const plain = await run(input, { base, weighting }, implementation, 2);
            const head = await MarginHead.create({
              ...options,
              loss: { base, weighting, center },
            });
            try {
              await (bias ? head.setWeights(weights, bias) : head.setWeights(weights));
              let centers = new Float64Array(classes * dim);
              assert.ok((await head.readCenters()).every((value) => value === 0));
              for (let step = 0; step < 3; step++) {
                const expected = reference(embeddings, labels, centers);
                const found = await head.forwardBackward({ embeddings, labels });
                assert.deepEqual(
                  await head.readCenters(),
                  Float32Array.from(centers),
                  'forwardBackward moves no center',
                );
                // lr 0: the weights, and so what the base loss has its share of, stay.
                const stepped = await head.step(embeddings, labels, { lr: 0, momentum: 0 });
                assert.deepEqual(found.baseLoss, plain.baseLoss);
                assert.deepEqual(found.weightedLoss, plain.weightedLoss);
                assert.deepEqual(found.gradWeights, plain.gradWeights);
                const loss = plain.loss + expected.loss;
                assertClose(found.loss, loss, 1e-6 * Math.max(1, loss), 'loss');
                assertClose(stepped.loss, loss, 1e-6 * Math.max(1, loss), 'loss of the step');
                const gradient = expected.gradient.map((g, i) => g + plain.gradEmbeddings[i]!);
                // One rounding of each of two fp32 terms.
                assert.ok(relativeDistance(found.gradEmbeddings, gradient) < 1e-6);
                assert.deepEqual(stepped.gradEmbeddings, found.gradEmbeddings);
                const moved = await head.readCenters();
                assert.ok(relativeDistance(moved, expected.moved) < 1e-6);
                assert.ok(
                  moved.subarray(5 * dim).every((value) => value === 0),
                  'class never seen',
                );
                centers = Float64Array.from(moved);
              }
              const set = Float32Array.from({ length: classes * dim }, (_, i) => Math.cos(i));
              await head.setCenters(set);
              assert.deepEqual(await head.readCenters(), set);
              const { loss } = await head.forwardBackward({ embeddings, labels });
              const expected = reference(embeddings, labels, Float64Array.from(set)).loss;
              assertClose(loss, plain.loss + expected, 1e-6 * Math.max(1, loss), 'set centers');
            } finally {
              await head.dispose();
            }
          }
        }
      });
    }
  }

  it('moves centers to the last bit alike in two heads', async () => {
    const input = caseWithLosses(shape, lawOf({ base: { kind: 'arcface' } }), gateLoss);
    const centersOf = async () => {
      const options = { classes, dim, threads: 2, device: 'cpu' as const };
      const head = await MarginHead.create({
        ...options,
        loss: { base: { kind: 'arcface' }, center: {} },
      });
      try {
        await head.setWeights(input.weights);
        for (let step = 0; step < 5; step++)
          await head.step(input.embeddings, repeated, { lr: 0.1 });
        return await head.readCenters();
      } finally {
        await head.dispose();
      }
    };
    const first = await centersOf();
    assert.ok(first.some((value) => value !== 0));
    assert.deepEqual(await centersOf(), first);
  });

  it('refuses centers that are not finite, of another length, or where there are none', async () => {
    const options = { classes: 2, dim: 3, device: 'cpu' as const };
    const loss: LossSettings = { base: { kind: 'arcface' }, center: {} };
    const head = await MarginHead.create({ ...options, loss });
    const without = await MarginHead.create({ ...options, loss: { base: { kind: 'arcface' } } });
    const input = {
      embeddings: Float32Array.of(1, 2, 3),
      weights: Float32Array.of(1, 2, 3, -1, 0, 2),
      labels: Int32Array.of(1),
    };
    try {
      const good = await head.forwardBackward(input);
      await head.setCenters(Float32Array.of(0, 0, 0, 1, Number.NaN, 1));
      await assert.rejects(
        head.forwardBackward(input),
        errorLike('ERR_NON_FINITE', /center of class 1 has nan at position 1/),
      );
      await assert.rejects(
        head.step(input.embeddings, input.labels, { lr: 0.1 }),
        errorLike('ERR_NON_FINITE', /center of class 1/),
      );
      await head.setCenters(new Float32Array(6));
      assert.deepEqual(await head.forwardBackward({ ...input }), good);
      await assert.rejects(
        head.setCenters(new Float32Array(5)),
        errorLike('ERR_INPUT', /centers has 5 values where classes \* dim = 6/),
      );
      const none = errorLike('ERR_INPUT', /no centers: create it with a center loss/);
      await assert.rejects(without.setCenters(new Float32Array(6)), none);
      await assert.rejects(without.readCenters(), none);
    } finally {
      await head.dispose();
      await without.dispose();
    }
    const disposed = errorLike('ERR_DISPOSED', /MarginHead was disposed/);
    await assert.rejects(head.setCenters(new Float32Array(6)), disposed);
    await assert.rejects(head.readCenters(), disposed);
  });
});

describe('MarginHead', () => {
  const shape = { classes: 5, dim: 3 };
  const options: MarginHeadOptions = {
    ...shape,
    device: 'cpu',
    loss: { base: { kind: 'arcface' } },
  };
  const embeddings = Float32Array.of(1, 2, 3, -1, 0, 2);
  const labels = Int32Array.of(4, 0);
  const weights = Float32Array.from({ length: 15 }, (_, i) => Math.sin(i + 1));
  let head: MarginHead;

  beforeEach(async () => {
    head = await MarginHead.create(options);
  });
  afterEach(() => head.dispose());

  for (const implementation of IMPLEMENTATIONS) {
    for (const base of [{ kind: 'softmax' }, { kind: 'arcface', scale: 8 }] as BaseLoss[]) {
      it(`steps by SGD with momentum and weight decay (${base.kind}, ${implementation})`, async () => {
        const stepped = await MarginHead.create({ ...options, loss: { base }, implementation });
        try {
          await stepped.setWeights(weights);
          const expected = Float64Array.from(weights);
          const velocity = new Float64Array(weights.length);
          const bias = new Float64Array(shape.classes);
          const biasVelocity = new Float64Array(shape.classes);
          for (let step = 0; step < 3; step++) {
            const { gradWeights, gradBias, gradEmbeddings, loss } = await stepped.forwardBackward({
              embeddings,
              labels,
            });
            const done = await stepped.step(embeddings, labels, { lr: 0.1, weightDecay: 0.01 });
            assertClose(done.loss, loss, 1e-6, 'loss of the step'); // the same sums in fp32
            assert.ok(
              relativeDistance(done.gradEmbeddings, Float64Array.from(gradEmbeddings)) < 1e-6,
            );
            for (const [i, gradient] of gradWeights.entries()) {
              velocity[i] = 0.9 * velocity[i]! + gradient + 0.01 * expected[i]!;
              expected[i]! -= 0.1 * velocity[i]!;
            }
            for (const [i, gradient] of (gradBias ?? []).entries()) {
              biasVelocity[i] = 0.9 * biasVelocity[i]! + gradient;
              bias[i]! -= 0.1 * biasVelocity[i]!;
            }
          }
          const read = await stepped.readWeights();
          // Three steps of fp32 additions.
          assert.ok(relativeDistance(read.weights, expected) < 1e-6);
          if (base.kind === 'softmax') assert.ok(relativeDistance(read.bias!, bias) < 1e-5);
          else assert.equal('bias' in read, false);
        } finally {
          await stepped.dispose();
        }
      });
    }
  }

  it('anneals the lambda of A-Softmax from step to step', async () => {
    const settings = (lambda: number | { start: number; decay: number; floor: number }) =>
      MarginHead.create({ ...options, loss: { base: { kind: 'a-softmax', margin: 4, lambda } } });
    const annealed = await settings({ start: 10, decay: 1, floor: 4 });
    try {
      await annealed.setWeights(weights);
      for (const lambda of [10, 5, 4, 4]) {
        const fixed = await settings(lambda);
        const { loss } = await fixed.forwardBackward({ embeddings, weights, labels });
        await fixed.dispose();
        // lr 0 leaves the weights as they are.
        const step = await annealed.step(embeddings, labels, { lr: 0 });
        assertClose(step.loss, loss, 1e-6 * Math.max(1, loss), `loss at lambda ${lambda}`);
      }
    } finally {
      await annealed.dispose();
    }
  });

  it('keeps concurrent calls apart', async () => {
    const others = weights.map((value) => -value);
    const [first, second] = await Promise.all([
      head.forwardBackward({ embeddings, weights, labels }),
      head.forwardBackward({ embeddings, weights: others, labels }),
    ]);
    const alone = await head.forwardBackward({ embeddings, weights, labels });
    assert.deepEqual(first, alone);
    assert.notEqual(first.loss, second.loss);
  });

  it('refuses labels outside the classes', async () => {
    for (const label of [-1, 5, 2 ** 31 - 1, -(2 ** 31)]) {
      await assert.rejects(
        head.forwardBackward({ embeddings, weights, labels: Int32Array.of(0, label) }),
        errorLike('ERR_INPUT', new RegExp(`Label 1 is ${label} where 0 to 4`)),
      );
    }
  });

  it('refuses weights and embeddings that are not finite', async () => {
    for (const value of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const badWeights = weights.slice();
      badWeights[7] = value;
      await assert.rejects(
        head.forwardBackward({ embeddings, weights: badWeights, labels }),
        (error) => errorLike('ERR_NON_FINITE', /weight/)(error as HardmineError),
      );
      const badEmbeddings = embeddings.slice();
      badEmbeddings[4] = value;
      await assert.rejects(
        head.forwardBackward({ embeddings: badEmbeddings, weights, labels }),
        (error) => errorLike('ERR_NON_FINITE', /embedding/)(error as HardmineError),
      );
    }
    const good = await head.forwardBackward({ embeddings, weights, labels });
    assert.ok(Number.isFinite(good.loss)); // the head is none the worse
  });

  it('refuses arrays of the wrong length or type', async () => {
    const wrong: [Parameters<MarginHead['forwardBackward']>[0], RegExp][] = [
      [{ embeddings: embeddings.slice(1), weights, labels }, /embeddings has 5 values .* = 6/],
      [{ embeddings, weights: weights.slice(1), labels }, /weights has 14 values .* = 15/],
      [{ embeddings, weights, bias: new Float32Array(5), labels }, /only softmax/],
      [{ embeddings, weights, labels: new Int32Array() }, /labels/],
      // @ts-expect-error: a bias belongs to weights
      [{ embeddings, bias: new Float32Array(5), labels }, /bias was given without weights/],
      [{ embeddings: [...embeddings] as never, weights, labels }, /no Float32Array/],
      [{ embeddings, weights, labels: [0, 1] as never }, /Int32Array/],
    ];
    for (const [input, pattern] of wrong) {
      await assert.rejects(head.forwardBackward(input), errorLike('ERR_INPUT', pattern));
    }
  });

  it('refuses to work without weights', async () => {
    const pattern = errorLike('ERR_INPUT', /no class weights yet/);
    await assert.rejects(head.forwardBackward({ embeddings, labels }), pattern);
    await assert.rejects(head.step(embeddings, labels, { lr: 0.1 }), pattern);
    await assert.rejects(head.readWeights(), pattern);
  });

  it('refuses sizes and settings out of range', async () => {
    for (const classes of [0, 1, 2.5, Number.NaN, -3]) {
      await assert.rejects(
        MarginHead.create({ ...options, classes }),
        errorLike('ERR_INPUT', /classes is .* whole number of at least 2/),
      );
    }
    await assert.rejects(
      MarginHead.create({ ...options, dim: 0 }),
      errorLike('ERR_INPUT', /dim is 0/),
    );
    await assert.rejects(
      MarginHead.create({ ...options, classes: 2 ** 40, dim: 2 ** 10 }),
      errorLike('ERR_INPUT', /more than the/),
    );
    await head.setWeights(weights);
    for (const lr of [-1, Number.NaN, Number.POSITIVE_INFINITY]) {
      await assert.rejects(head.step(embeddings, labels, { lr }), errorLike('ERR_INPUT', /lr is/));
    }
  });

  it('answers every method with ERR_DISPOSED after dispose, which may be called twice', async () => {
    await head.dispose();
    await head[Symbol.asyncDispose]();
    const disposed = errorLike('ERR_DISPOSED', /MarginHead was disposed/);
    await assert.rejects(head.forwardBackward({ embeddings, weights, labels }), disposed);
    await assert.rejects(head.setWeights(weights), disposed);
    await assert.rejects(head.readWeights(), disposed);
    await assert.rejects(head.step(embeddings, labels, { lr: 0.1 }), disposed);
  });
});
