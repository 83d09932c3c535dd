import assert from 'node:assert/strict';
import { RandomStream } from '../src/data/random.js';
import { HardmineError } from '../src/errors.js';
import {
  expectedFirstLoss,
  type LossSettings,
  lambdaAt,
  plateauLoss,
  resolveLoss,
  type Weighting,
} from '../src/loss.js';
import { weightLosses } from '../src/weighting.js';
import { weightingOf } from './helpers/head-cases.js';
import { weightedLosses } from './helpers/reference-head.js';

function errorLike(code: string, pattern: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof HardmineError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, pattern);
    return true;
  };
}

function assertNear(found: number, expected: number, tolerance: number): void {
  assert.ok(Math.abs(found - expected) <= tolerance, `${found} where ${expected} is expected`);
}

/** Mean of ln sum_j e^(scale cos_j) over rows whose cosines with random classes are normal, 1 / dim their variance. */
function drawnFirstLoss(classes: number, dim: number, scale: number): number {
  const random = new RandomStream(3, 0);
  const rows = 256;
  let sum = 0;
  for (let row = 0; row < rows; row++) {
    const logits = Array.from(
      { length: classes },
      () => (scale * random.normal()) / Math.sqrt(dim),
    );
    const most = Math.max(...logits);
    sum += most + Math.log(logits.reduce((total, z) => total + Math.exp(z - most), 0));
  }
  return sum / rows;
}

describe('weightLosses', () => {
  /** From nothing over the gate (0.68) to where its exponential leaves fp32 and double. */
  const losses = [
    0, 1e-300, 1e-9, 0.1, 0.3, 0.5, 0.6, 0.65, 0.6818, 0.6858, 0.75, 0.8, 1, 3, 25, 1e3, 1e300,
  ];

  for (const form of ['equation', 'algorithm'] as const) {
    for (const reduction of ['sample', 'batch'] as const) {
      for (const parameters of [{}, { alpha: 2, beta: 0.9, A: 20, B: 0.5 }]) {
        const weighting: Weighting = { kind: 'hard-mining', form, reduction, ...parameters };
        it(`is the double formula: ${JSON.stringify(weighting)}`, () => {
          // The batch's mean is taken inside the gate, or it would be 1e299.
          const given = reduction === 'sample' ? losses : losses.slice(3, 13);
          const found = weightLosses(given, weighting);
          const expected = weightedLosses(Float64Array.from(given), weightingOf(weighting));
          for (const [i, loss] of given.entries()) {
            // Rounding of exp's argument, up to 700 where exp is a normal number, and no more.
            const near = (a: number, b: number) =>
              assertNear(a, b, 1e-12 * Math.max(1e-12, Math.abs(b)));
            near(found.weighted[i]!, expected.values[i]!);
            near(found.gradientWeight[i]!, expected.slopes[i]!);
            assert.ok(Number.isFinite(found.weighted[i]!), `HM(${loss}) is finite`);
          }
        });
      }
    }
  }

  it('is open for a loss with which even its argument overflows', () => {
    const { weighted, gradientWeight } = weightLosses([1e308], { kind: 'hard-mining' });
    assert.deepEqual([...weighted, ...gradientWeight], [1.5e308, 1.5]);
  });

  for (const gamma of [0, 0.1, 1, 2, 8, 1e6]) {
    it(`is the double formula of Knot Magnify with gamma ${gamma}`, () => {
      const weighting: Weighting = { kind: 'knot-magnify', gamma };
      const found = weightLosses(losses, weighting);
      const expected = weightedLosses(Float64Array.from(losses), weighting);
      for (const [i, loss] of losses.entries()) {
        // Rounding of some ten operations; the reference's quotient rule cancels a digit more.
        const near = (a: number, b: number) => assertNear(a, b, 1e-14 * Math.abs(b));
        near(found.weighted[i]!, expected.values[i]!);
        near(found.gradientWeight[i]!, expected.slopes[i]!);
        assert.ok(Number.isFinite(found.weighted[i]!), `KM(${loss}) is finite`);
      }
      // At L = 0, p is 1; far out, p is nothing and the loss is left as it is.
      assertNear(found.gradientWeight[0]!, (gamma + 1) ** -2, 1e-15);
      assert.equal(found.gradientWeight.at(-1), 1);
      assert.equal(found.weighted.at(-1), 1e300);
    });
  }

  it("has the derivative of Knot Magnify's value", () => {
    for (const gamma of [0.1, 2, 8]) {
      const at = (loss: number) => weightLosses([loss], { kind: 'knot-magnify', gamma });
      for (let loss = 0.01; loss < 6; loss += 0.05) {
        const difference = (at(loss + 1e-5).weighted[0]! - at(loss - 1e-5).weighted[0]!) / 2e-5;
        // Third derivatives up to about 10 at gamma 8, times 1e-10; rounding of 1e-16 / 1e-5.
        assertNear(at(loss).gradientWeight[0]!, difference, 1e-8);
      }
    }
  });

  it("has the poster's critical points of Knot Magnify", () => {
    // Rounded up to three digits there, as p_c = sqrt(1 / (gamma ln(1 + gamma))) - 1 / gamma shows.
    const table = [
      [0.1, 0.244],
      [1, 0.202],
      [2, 0.175],
      [4, 0.145],
      [6, 0.126],
      [8, 0.114],
    ] as const;
    for (const [gamma, expected] of table) {
      /** R = gamma / (ln(gamma + 1) (gamma p + 1)^2), by the weighting itself: KM(L) / L is 1 / (gamma p + 1)^2. */
      const relation = (p: number) => {
        const loss = -Math.log(p);
        const { weighted } = weightLosses([loss], { kind: 'knot-magnify', gamma });
        return ((weighted[0]! / loss) * gamma) / Math.log1p(gamma);
      };
      let [low, high] = [1e-6, 1 - 1e-6];
      assert.ok(relation(low) > 1 && relation(high) < 1);
      for (let step = 0; step < 50; step++) {
        const middle = (low + high) / 2;
        if (relation(middle) >= 1) low = middle;
        else high = middle;
      }
      assert.equal(Math.ceil(low * 1000) / 1000, expected, `p_c(${gamma}) is ${low}`);
    }
  });

  it("has the paper's figures", () => {
    // Loss, HM / L of Equation 2, dHM/dL of Equation 2 and of Algorithm 1, rounded as given there.
    const table: [number, number, number, number][] = [
      [0.5, 1.4e-3, 0.028, 0.03],
      [0.6, 0.062, 1.43, 1.57],
      [0.65, 0.341, 6.93, 7.62],
      [0.6858, Number.NaN, 10.65, 11.72],
      [0.75, 1.4, 4.13, 4.54],
      [0.8, 1.48, 1.96, 2.16],
      [1, 1.5, 1.5, 1.65],
    ];
    for (const [loss, ratio, equation, algorithm] of table) {
      const eq2 = weightLosses([loss], { kind: 'hard-mining' });
      const alg1 = weightLosses([loss], { kind: 'hard-mining', form: 'algorithm' });
      // Half of the last digit given is up to 4 % of the figure.
      if (!Number.isNaN(ratio)) assertNear(eq2.weighted[0]! / loss, ratio, 0.04 * ratio);
      assertNear(eq2.gradientWeight[0]!, equation, 0.04 * equation);
      assertNear(alg1.gradientWeight[0]!, algorithm, 0.04 * algorithm);
      assertNear(alg1.weighted[0]!, 1.1 * eq2.weighted[0]!, 1e-12);
    }
  });

  it('has on the batch one factor for all, and weighted losses whose mean is HM of the mean', () => {
    const batch = [0.4, 0.7, 1];
    const weighting: Weighting = { kind: 'hard-mining', reduction: 'batch' };
    const { weighted, gradientWeight } = weightLosses(batch, weighting);
    const whole = weightLosses([0.7], { kind: 'hard-mining' });
    const mean = weighted.reduce((a, b) => a + b) / batch.length;
    assertNear(mean, whole.weighted[0]!, 1e-12);
    for (const factor of gradientWeight) assertNear(factor, whole.gradientWeight[0]!, 1e-10);
  });

  it('gives losses of nothing at all nothing, not NaN', () => {
    const { weighted } = weightLosses([0, 0], { kind: 'hard-mining', reduction: 'batch' });
    assert.deepEqual([...weighted], [0, 0]);
  });

  it('leaves losses as they are without weighting, and takes every kind of array', () => {
    for (const given of [[0.5, 2], Float32Array.of(0.5, 2), Float64Array.of(0.5, 2)]) {
      const { weighted, gradientWeight } = weightLosses(given, { kind: 'none' });
      assert.deepEqual([...weighted], [0.5, 2]);
      assert.deepEqual([...gradientWeight], [1, 1]);
    }
  });

  it('refuses no losses, and one that is not finite', () => {
    const weighting: Weighting = { kind: 'hard-mining' };
    assert.throws(() => weightLosses([], weighting), errorLike('ERR_INPUT', /no losses/));
    assert.throws(
      () => weightLosses(undefined as unknown as number[], weighting),
      errorLike('ERR_INPUT', /losses are undefined: give an array/),
    );
    for (const loss of [Number.NaN, Number.POSITIVE_INFINITY]) {
      assert.throws(
        () => weightLosses(Float32Array.of(1, loss), weighting),
        errorLike('ERR_INPUT', /Loss 1 is (NaN|Infinity)/),
      );
    }
  });
});

describe('the settings of a loss', () => {
  it("become the addon's, with the defaults of the literature", () => {
    const plain = { m1: 1, m2: 0, m3: 0, scale: 64, normScale: false, lambda: 0 };
    const options = { mirror: true, detached: false };
    const none = {
      kind: 'none',
      alpha: 1.5,
      beta: 1.1,
      A: 35,
      B: 0.75,
      gamma: 0,
      form: 'equation',
      reduction: 'sample',
    };
    const parts = { euclidean: { margin: 0, pull: 0 }, center: { weight: 0, rate: 0 } };
    const rest = { ...options, weighting: none, ...parts };
    const cases: [LossSettings, object][] = [
      [{ base: { kind: 'softmax' } }, { base: 'softmax', ...plain, scale: 1, ...rest }],
      [{ base: { kind: 'arcface' } }, { base: 'margin', ...plain, m2: 0.5, ...rest }],
      [
        { base: { kind: 'cosface', scale: 30 } },
        { base: 'margin', ...plain, scale: 30, m3: 0.35, ...rest },
      ],
      [
        {
          base: { kind: 'combined', m1: 0.9, m2: 0.4, m3: 0.15 },
          gradient: 'detached',
          beyondPi: 'none',
        },
        {
          base: 'margin',
          ...plain,
          m1: 0.9,
          m2: 0.4,
          m3: 0.15,
          ...rest,
          mirror: false,
          detached: true,
        },
      ],
      [
        {
          base: { kind: 'a-softmax' },
          weighting: { kind: 'hard-mining', form: 'algorithm', A: 20 },
        },
        {
          base: 'margin',
          ...plain,
          scale: 1,
          m1: 4,
          normScale: true,
          lambda: 1000,
          ...options,
          ...parts,
          weighting: { ...none, kind: 'hard-mining', form: 'algorithm', A: 20 },
        },
      ],
      [
        { base: { kind: 'euclidean-margin' }, center: {} },
        {
          base: 'euclidean-margin',
          ...plain,
          scale: 1,
          ...rest,
          euclidean: { margin: 0.4, pull: 0.5 },
          center: { weight: 0.003, rate: 0.5 },
        },
      ],
      [
        {
          base: { kind: 'euclidean-margin', margin: 1, pull: 0 },
          weighting: { kind: 'knot-magnify', gamma: 2 },
          center: { weight: 0.1, rate: 0 },
        },
        {
          base: 'euclidean-margin',
          ...plain,
          scale: 1,
          ...rest,
          euclidean: { margin: 1, pull: 0 },
          weighting: { ...none, kind: 'knot-magnify', gamma: 2 },
          center: { weight: 0.1, rate: 0 },
        },
      ],
    ];
    for (const [settings, expected] of cases) {
      assert.deepEqual(resolveLoss(settings).native, expected);
    }
  });

  const refused: [unknown, RegExp][] = [
    [
      { base: { kind: 'arcfase' } },
      /loss\.base\.kind is "arcfase": expected "softmax", "a-softmax"/,
    ],
    [{ base: { kind: '__proto__' } }, /loss\.base\.kind is "__proto__"/],
    [{}, /loss\.base\.kind is undefined/],
    [null, /loss is null/],
    [
      { base: { kind: 'arcface', scal: 30 } },
      /loss\.base has an unknown key "scal": the nearest known one is "scale"/,
    ],
    [
      { base: { kind: 'softmax' }, weighing: {} },
      /loss has an unknown key "weighing": .* "weighting"/,
    ],
    [{ base: { kind: 'arcface', scale: 0 } }, /loss\.base\.scale is 0: /],
    [{ base: { kind: 'arcface', scale: Number.NaN } }, /loss\.base\.scale is NaN: /],
    [
      { base: { kind: 'arcface', margin: Number.POSITIVE_INFINITY } },
      /loss\.base\.margin is Infinity: /,
    ],
    [{ base: { kind: 'arcface', margin: 4 } }, /loss\.base\.margin is 4: /],
    [{ base: { kind: 'arcface', margin: '0.5' } }, /loss\.base\.margin is "0\.5": /],
    [{ base: { kind: 'cosface', margin: -0.1 } }, /loss\.base\.margin is -0\.1: /],
    [{ base: { kind: 'combined', m1: 0 } }, /loss\.base\.m1 is 0: /],
    [{ base: { kind: 'a-softmax', margin: 0.5 } }, /loss\.base\.margin is 0\.5: /],
    [{ base: { kind: 'a-softmax', lambda: -1 } }, /loss\.base\.lambda is -1: /],
    [
      { base: { kind: 'a-softmax', lambda: { start: 5 } } },
      /loss\.base\.lambda is .*start, decay, floor/,
    ],
    [
      { base: { kind: 'a-softmax' }, beyondPi: 'none' },
      /beyondPi is "none", which a-softmax cannot use/,
    ],
    [{ base: { kind: 'softmax' }, gradient: 'exakt' }, /loss\.gradient is "exakt": /],
    [{ base: { kind: 'softmax' }, weighting: { kind: 'hard' } }, /weighting\.kind is "hard"/],
    [
      { base: { kind: 'softmax' }, weighting: { kind: 'hard-mining', beta: -1 } },
      /weighting\.beta is -1: /,
    ],
    [
      { base: { kind: 'softmax' }, weighting: { kind: 'hard-mining', a: 1 } },
      /unknown key "a": .* "A"/,
    ],
  ];
  for (const [value, pattern] of [
    [undefined, /weighting\.gamma is undefined: /],
    [-1, /weighting\.gamma is -1: /],
    [1e7, /weighting\.gamma is 10000000: /],
    [Number.NaN, /weighting\.gamma is NaN: /],
  ] as const) {
    refused.push([
      { base: { kind: 'softmax' }, weighting: { kind: 'knot-magnify', gamma: value } },
      pattern,
    ]);
  }
  refused.push(
    [
      {
        base: { kind: 'softmax' },
        weighting: { kind: 'knot-magnify', gamma: 1, reduction: 'batch' },
      },
      /weighting has an unknown key "reduction"/,
    ],
    [{ base: { kind: 'euclidean-margin', scale: 30 } }, /loss\.base has an unknown key "scale"/],
    [{ base: { kind: 'euclidean-margin', margin: 5 } }, /loss\.base\.margin is 5: /],
    [{ base: { kind: 'euclidean-margin', pull: -1 } }, /loss\.base\.pull is -1: /],
    [{ base: { kind: 'softmax' }, center: { weight: 0 } }, /loss\.center\.weight is 0: /],
    [{ base: { kind: 'softmax' }, center: { rate: 1.5 } }, /loss\.center\.rate is 1\.5: /],
    [
      { base: { kind: 'softmax' }, center: { wait: 1 } },
      /loss\.center has an unknown key "wait": .*"weight"/,
    ],
  );
  for (const [settings, pattern] of refused) {
    it(`are refused with a sentence: ${JSON.stringify(settings)}`, () => {
      assert.throws(() => resolveLoss(settings as LossSettings), errorLike('ERR_CONFIG', pattern));
    });
  }

  it('anneal lambda as 1 / (1 + decay step) down to the floor', () => {
    const annealing = { start: 1000, decay: 0.12, floor: 5 };
    assert.equal(lambdaAt(annealing, 0), 1000);
    assert.equal(lambdaAt(annealing, 100), 1000 / 13);
    assert.equal(lambdaAt(annealing, 1e6), 5);
  });

  it('foretell the first loss', () => {
    const arcface = (scale: number) => resolveLoss({ base: { kind: 'arcface', scale } }).native;
    // Published classes of CASIA-WebFace and MS1MV2; losses.md's figures, to the last digit.
    assertNear(expectedFirstLoss(arcface(64), 10_575, 512), 43.9, 0.1);
    assertNear(expectedFirstLoss(arcface(64), 85_742, 512), 46.0, 0.1);
    assertNear(expectedFirstLoss(arcface(30), 10_575, 512), 24.5, 0.1);
    const first = (settings: LossSettings, norm?: number) =>
      expectedFirstLoss(resolveLoss(settings).native, 854, 512, norm);
    assert.equal(first({ base: { kind: 'softmax' } }), Math.log(854));
    assertNear(first({ base: { kind: 'cosface' } }), Math.log(854) + 4 + 64 * 0.35, 1e-9);
    // At pi / 2 the angle of margin 4 is 2 pi, where psi is 1 - 2 * 2 = -3; the scale is the norm.
    const aSoftmax: LossSettings = { base: { kind: 'a-softmax', margin: 4, lambda: 0 } };
    assertNear(first(aSoftmax, 10), Math.log(854) + 100 / 1024 + 30, 1e-9);
    assertNear(
      first({ base: { kind: 'a-softmax', lambda: 5 } }, 10),
      Math.log(854) + 100 / 1024 + 5,
      1e-9,
    );
    // Small embeddings and few classes, where the largest logit alone counts: drawn instead of foretold.
    for (const [classes, dim] of [
      [22, 32],
      [22, 128],
      [1000, 128],
      [1000, 512],
    ] as const) {
      const drawn = drawnFirstLoss(classes, dim, 64) + 64 * Math.sin(0.5);
      assertNear(expectedFirstLoss(arcface(64), classes, dim), drawn, 0.15 * drawn);
    }
    // All distances 2: margin + 2 pull.
    assertNear(first({ base: { kind: 'euclidean-margin' } }), 1.4, 1e-12);
  });

  it('foretell where a collapsed network rests', () => {
    const plateau = (settings: LossSettings) => plateauLoss(resolveLoss(settings).native, 854);
    // losses.md 1.4, to the last digit.
    assertNear(plateau({ base: { kind: 'arcface' } })!, 14.6, 0.05);
    assertNear(plateau({ base: { kind: 'arcface', scale: 16 } })!, 8.7, 0.05);
    assertNear(plateau({ base: { kind: 'cosface' } })!, Math.log(853) + 64 * 0.35, 1e-9);
    assertNear(plateau({ base: { kind: 'a-softmax' } })!, Math.log(853), 1e-9);
    assert.equal(plateau({ base: { kind: 'softmax' } }), null);
    assert.equal(plateau({ base: { kind: 'euclidean-margin', margin: 0.3 } }), 0.3);
  });
});
