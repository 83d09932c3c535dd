/** Figure 1 of the hard-mining paper, drawn with the same code that trains. */

import type { NativeWeighting } from '../native.js';
import { type Chart, LIGHT, type Point, type Series, standaloneSvg } from './svg.js';

/** The addon's `weightLosses`. */
export type WeightLosses = (
  losses: Float64Array,
  weighting: NativeWeighting,
) => { weighted: Float64Array; gradientWeight: Float64Array };

export type GateParameters = Pick<NativeWeighting, 'alpha' | 'beta' | 'A' | 'B'>;

// The paper's values.
const PAPER: GateParameters = { alpha: 1.5, beta: 1.1, A: 35, B: 0.75 };
/** Likelihoods at which curves are computed: fine enough to read the peak of the gradient to three digits. */
const STEPS = 10_000;
/** Every how many of them a curve has a point: 400 points follow the gate to within a pixel. */
const STRIDE = 25;
const WIDTH = 640;
const HEIGHT = 360;
/** Where the loss axis ends: cross-entropy at p = 0.001 is 6.9, Algorithm 1 crosses it at p = 0.014. */
const HIGHEST_LOSS = 7;

/**
 * The loss of one sample against its likelihood p in (0, 1), L = -ln p: cross-entropy, hard mining by
 * Equation 2 (alpha L g) and by Algorithm 1 (alpha beta L g), with g = 1 / (1 + exp(-A (beta L - B))).
 * Below it the factor dHM/dL on the sample's gradient, which the paper does not show.
 *
 * @returns an SVG file's text, the same bytes for the same arguments
 */
export function plotLoss(weightLosses: WeightLosses, parameters = PAPER): string {
  const likelihoods = Float64Array.from({ length: STEPS - 1 }, (_, i) => (i + 1) / STEPS);
  const losses = likelihoods.map((p) => -Math.log(p));
  const hardMining = (form: NativeWeighting['form']) =>
    weightLosses(losses, {
      kind: 'hard-mining',
      ...parameters,
      gamma: 0,
      form,
      reduction: 'sample',
    });
  const equation = hardMining('equation');
  const algorithm = hardMining('algorithm');

  const curve = (label: string, colour: Series['colour'], values: Float64Array): Series => ({
    label,
    colour,
    kind: 'line',
    dashed: colour === 2, // Algorithm 1 lies close to Equation 2: colour alone would not part them
    points: Array.from(likelihoods, (p, i): Point => [p, values[i]!]).filter(
      (_, i) => i === 0 || (i + 1) % STRIDE === 0,
    ),
  });
  const midpoint = Math.exp(-parameters.B / parameters.beta);
  const { alpha, beta, A, B } = parameters;
  const x = { label: 'likelihood p of the labelled identity', min: 0, max: 1, ticks: TENTHS };
  const marks = [{ x: midpoint, label: `gate half open at p = ${midpoint.toFixed(3)}` }];
  const loss: Chart = {
    id: 'loss',
    title: 'Hard mining: the loss against the likelihood',
    description: `For p below ${midpoint.toFixed(2)} hard mining is cross-entropy times ${alpha} (Equation 2) or ${plain(alpha * beta)} (Algorithm 1); above, it falls to nothing.`,
    width: WIDTH,
    height: HEIGHT,
    x,
    y: { label: 'loss', min: 0, max: HIGHEST_LOSS },
    series: [
      curve('cross-entropy', 0, losses),
      curve('hard mining, Equation 2', 1, equation.weighted),
      curve('hard mining, Algorithm 1', 2, algorithm.weighted),
    ],
    marks,
  };
  const peak = (values: Float64Array) => Math.max(...values);
  const highest = peak(algorithm.gradientWeight);
  const gradient: Chart = {
    id: 'gradient',
    title: 'The factor dHM/dL on a sample’s gradient',
    description: `Peaks of ${peak(equation.gradientWeight).toFixed(2)} (Equation 2) and ${highest.toFixed(2)} (Algorithm 1) beside the gate; cross-entropy has 1 everywhere.`,
    width: WIDTH,
    height: HEIGHT,
    x,
    y: {
      label: `dHM/dL  (alpha ${alpha}, beta ${beta}, A ${A}, B ${B})`,
      min: 0,
      max: highest * 1.05,
    },
    series: [
      curve(
        'cross-entropy: 1',
        0,
        losses.map(() => 1),
      ),
      curve(
        `Equation 2, peak ${peak(equation.gradientWeight).toFixed(2)}`,
        1,
        equation.gradientWeight,
      ),
      curve(`Algorithm 1, peak ${highest.toFixed(2)}`, 2, algorithm.gradientWeight),
    ],
    marks,
  };
  return standaloneSvg([loss, gradient], LIGHT);
}

const TENTHS = Array.from({ length: 11 }, (_, i) => i / 10);

function plain(value: number): string {
  return String(Number(value.toFixed(3)));
}
