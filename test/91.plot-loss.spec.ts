import assert from 'node:assert/strict';
import sharp from 'sharp';
import type { NativeWeighting } from '../src/native.js';
import { plotLoss, type WeightLosses } from '../src/report/plot-loss.js';

/** Hard mining from the paper's formulas, apart from the addon's code. */
const formulas: WeightLosses = (losses, { alpha, beta, A, B, form }) => {
  const factor = form === 'equation' ? alpha : alpha * beta;
  const gate = (loss: number) => 1 / (1 + Math.exp(-A * (beta * loss - B)));
  return {
    weighted: losses.map((loss) => factor * loss * gate(loss)),
    gradientWeight: losses.map((loss) => {
      const g = gate(loss);
      return factor * (g + beta * A * loss * g * (1 - g));
    }),
  };
};

/** The y coordinate of curve `name` in panel `panel` at each x, read back from the file. */
function drawn(svg: string, panel: number, name: string): [number, number][] {
  const part = svg.split('<g clip-path=')[panel + 1]!;
  const path = new RegExp(`<path class="line ${name}" d="([^"]*)"`).exec(part)?.[1];
  return path!
    .slice(1)
    .split('L')
    .map((point) => point.split(' ').map(Number) as [number, number]);
}

describe('plotLoss', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  it('asks for hard mining in both forms with the paper’s values', () => {
    const asked: NativeWeighting[] = [];
    plotLoss((losses, weighting) => {
      asked.push(weighting);
      assert.ok(losses.every((loss) => loss > 0 && Number.isFinite(loss)));
      return formulas(losses, weighting);
    });
    const paper = { kind: 'hard-mining', alpha: 1.5, beta: 1.1, A: 35, B: 0.75, gamma: 0 };
    assert.deepEqual(asked, [
      { ...paper, form: 'equation', reduction: 'sample' },
      { ...paper, form: 'algorithm', reduction: 'sample' },
    ]);
  });

  it('draws what it was given: Equation 2 crosses cross-entropy at p = 0.49667', () => {
    const svg = plotLoss(formulas);
    const entropy = drawn(svg, 0, 's0');
    const equation = drawn(svg, 0, 's1');
    assert.equal(entropy.length, equation.length);
    // y grows downwards: above cross-entropy left of the crossing, below it right of it.
    const crossing = equation.findIndex(([, y], i) => i > 0 && y > entropy[i]![1]);
    const left = Number(/<path class="axis" d="M([\d.]+) [\d.]+H/.exec(svg)?.[1]);
    const right = Number(/<path class="axis" d="M[\d.]+ [\d.]+H([\d.]+)/.exec(svg)?.[1]);
    const p = (x: number) => (x - left) / (right - left);
    // Where alpha g = 1; curves have a point every 0.0025.
    assert.ok(p(equation[crossing - 1]![0]) < 0.49667 && p(equation[crossing]![0]) > 0.49667);
  });

  it('names the peaks of the gradient: 10.65 and 11.72', () => {
    const svg = plotLoss(formulas);
    assert.match(svg, /Equation 2, peak 10\.65</);
    assert.match(svg, /Algorithm 1, peak 11\.72</);
    assert.match(plotLoss(formulas, { alpha: 3, beta: 1.1, A: 35, B: 0.75 }), /peak 21\.30</);
  });

  it('is an SVG file of its own, the same bytes each time, that renders', async () => {
    const svg = plotLoss(formulas);
    assert.equal(svg, plotLoss(formulas));
    assert.equal(svg.match(/:\/\//g)?.length, 1); // the namespace
    assert.ok(!/NaN|Infinity|undefined/.test(svg));
    const { width, height } = await sharp(Buffer.from(svg)).metadata();
    assert.deepEqual([width, height], [640, 788]);
    const { data, info } = await sharp(Buffer.from(svg))
      .raw()
      .toBuffer({ resolveWithObject: true });
    const colours = new Set<number>();
    for (let i = 0; i < data.length; i += info.channels) colours.add(data.readUIntBE(i, 3));
    for (const colour of [0x0b63a5, 0xb84a00, 0xffffff]) assert.ok(colours.has(colour));
  });
});
