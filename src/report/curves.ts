/** Charts of a report: how training went, and how a model parts the pairs. */

import { normalQuantile } from '../evaluate/statistics.js';
import type { VerificationResult } from '../evaluate/verification.js';
import {
  type Axis,
  type Chart,
  niceRange,
  niceTicks,
  type Point,
  plainNumber,
  type Series,
} from './svg.js';

/** A line of metrics.jsonl; a figure that was NaN or infinite reads as null. */
export interface MetricsLine {
  step: number;
  epoch?: number | null;
  loss?: number | null;
  baseLoss?: number | null;
  /** Fractions 0..1. */
  accuracy?: number | null;
  lr?: number | null;
  imagesPerSecond?: number | null;
  silenced?: number | null;
  kept?: number | null;
  amplified?: number | null;
}

export interface Evaluation {
  name: string;
  result: VerificationResult;
}

/** Points of a curve: more than a chart has pixels for are averaged. */
const MAX_POINTS = 400;
/** Narrow enough for letters to stay legible on a phone: the page scales charts to its column. */
const WIDTH = 390;
const HEIGHT = 250;
/** Of the two charts that carry the result. */
const TALL = 290;
export const SERIES_COLOURS = [1, 2, 3, 0] as const;
/** Bars of a histogram: about the square root of LFW's 3,000 pairs of each kind. */
const BINS = 50;
/** A learning rate that spans more than this is drawn by powers of ten. */
const LOG_SPAN = 15;

export const FIGURES = [
  'loss',
  'baseLoss',
  'accuracy',
  'lr',
  'imagesPerSecond',
  'silenced',
  'kept',
  'amplified',
] as const satisfies readonly (keyof MetricsLine)[];
export type Figure = (typeof FIGURES)[number];

/**
 * One line a step in rising order: after a resumed run a step may stand twice, and the later line holds.
 */
export function orderedMetrics(lines: readonly MetricsLine[]): MetricsLine[] {
  const steps = new Map<number, MetricsLine>();
  for (const line of lines) if (Number.isFinite(line.step)) steps.set(line.step, line);
  return [...steps.values()].sort((a, b) => a.step - b.step);
}

/** The value, or NaN for whatever is no finite number. */
export function finite(value: unknown): number {
  return typeof value === 'number' && Number.isFinite(value) ? value : Number.NaN;
}

/**
 * At most MAX_POINTS points, each the mean over as many neighbouring lines; one where no value is
 * finite is a gap.
 */
export function curve(lines: readonly MetricsLine[], name: Figure): Point[] {
  const size = Math.ceil(lines.length / MAX_POINTS);
  const points: Point[] = [];
  for (let from = 0; from < lines.length; from += size) {
    const group = lines.slice(from, from + size);
    const values = group.map((line) => finite(line[name])).filter(Number.isFinite);
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    points.push([group[(group.length - 1) >> 1]!.step, mean]);
  }
  return points;
}

/** The curves for which there are figures; `lines` as `orderedMetrics` gives them. */
export function trainingCharts(
  lines: readonly MetricsLine[],
  validations: readonly { step: number; accuracy: number }[],
): Chart[] {
  const steps = [...lines, ...validations].map(({ step }) => step).sort((a, b) => a - b);
  const first = steps[0] ?? 0;
  const last = steps.at(-1) ?? 0;
  const x: Axis = {
    label: 'step',
    ...(last > first
      ? { min: first, max: last, ticks: niceTicks(first, last).filter(Number.isInteger) }
      : { min: first - 1, max: first + 1, ticks: [first] }),
  };
  const line = (label: string, colour: Series['colour'], name: Figure, dashed = false): Series => ({
    label,
    colour,
    kind: 'line',
    dashed,
    points: curve(lines, name),
  });
  const chart = (id: string, title: string, y: Axis, series: Series[]): Chart[] => {
    const drawn = series.filter(({ points }) => points.some(([, value]) => Number.isFinite(value)));
    if (drawn.length === 0) return [];
    return [
      {
        id,
        title,
        description: describe(drawn),
        width: WIDTH,
        height: HEIGHT,
        x,
        y,
        series: drawn,
      },
    ];
  };
  const fromZero = (series: readonly Series[]) =>
    rangeFromZero(series.flatMap(({ points }) => points.map(([, value]) => value)));

  const loss = [line('loss (trained on)', 1, 'loss'), line('base loss', 2, 'baseLoss', true)];
  const accuracy: Series[] = [
    line('training, before the margin', 1, 'accuracy'),
    {
      label: 'held-out pairs',
      colour: 2,
      kind: 'dots',
      points: validations.map(({ step, accuracy }): Point => [step, accuracy]),
    },
  ];
  const speed = [line('', 1, 'imagesPerSecond')];
  return [
    ...chart('loss', 'Loss', { label: 'mean over the batch', ...fromZero(loss) }, loss),
    ...chart(
      'accuracy',
      'Accuracy',
      { label: 'share right', ...fromZero(accuracy), format: percentTick },
      accuracy,
    ),
    ...gateChart(lines, x),
    ...chart('rate', 'Learning rate', rateAxis(curve(lines, 'lr')), [line('', 1, 'lr')]),
    ...chart('speed', 'Speed', { label: 'images per second', ...fromZero(speed) }, speed),
  ];
}

/** What hard mining did to the samples: shares stacked to 1. */
function gateChart(lines: readonly MetricsLine[], x: Axis): Chart[] {
  const shares = (['silenced', 'kept', 'amplified'] as const).map((name) => curve(lines, name));
  let floor: Point[] | undefined;
  const stacked = shares.map((points) => {
    const below = floor;
    const top = points.map(([step, share], i): Point => [step, share + (below?.[i]?.[1] ?? 0)]);
    floor = top;
    return { points: top, ...(below && { floor: below }) };
  });
  if (!floor?.some(([, value]) => Number.isFinite(value))) return [];
  const labels = ['silenced', 'kept', 'amplified'];
  const colours = [0, 1, 2] as const;
  const areas = stacked.map(
    (area, i): Series => ({ label: labels[i]!, colour: colours[i]!, kind: 'area', ...area }),
  );
  const edges = stacked.map(
    ({ points }, i): Series => ({ label: '', colour: colours[i]!, kind: 'line', points }),
  );
  const last = (points: readonly Point[]) =>
    percent(points.filter(([, value]) => Number.isFinite(value)).at(-1)?.[1] ?? Number.NaN);
  return [
    {
      id: 'gate',
      title: 'Hard mining’s gate',
      description: `Shares of samples by the factor on their gradient; at the end silenced ${last(shares[0]!)}, kept ${last(shares[1]!)}, amplified ${last(shares[2]!)}.`,
      width: WIDTH,
      height: HEIGHT,
      x,
      y: {
        label: 'share of samples with dHM/dL < 0.1, between, > 1',
        min: 0,
        max: 1,
        format: percentTick,
      },
      series: [...areas, ...edges],
    },
  ];
}

function rateAxis(points: readonly Point[]): Axis {
  const rates = points.map(([, rate]) => rate).filter((rate) => rate > 0);
  const [min, max] = [Math.min(...rates), Math.max(...rates)];
  if (rates.length === points.length && max / min > LOG_SPAN) {
    const down = 10 ** Math.floor(Math.log10(min) + 1e-9);
    const up = 10 ** Math.ceil(Math.log10(max) - 1e-9);
    return { label: 'logarithmic', log: true, min: down, max: up, format: String };
  }
  return { label: 'linear', ...rangeFromZero(rates) };
}

export function rangeFromZero(values: readonly number[]): { min: number; max: number } {
  const { max } = niceRange([0, ...values.filter((value) => value > 0)]);
  return { min: 0, max };
}

/** ROC of every evaluation, by the logarithm of the false accept rate. */
export function rocChart(evaluations: readonly Evaluation[]): Chart {
  const lowest = Math.min(
    ...evaluations.map(({ result }) => result.details.roc.far.find((far) => far > 0) ?? 1),
  );
  // At least two decades, so that a small test does not fill the chart with its first steps.
  const min = Math.min(1e-2, 10 ** Math.floor(Math.log10(lowest) + 1e-9));
  const series = evaluations.map(
    ({ name, result }, i): Series => ({
      label: name,
      colour: SERIES_COLOURS[i % SERIES_COLOURS.length]!,
      dashed: i > 0,
      kind: 'line',
      points: rocPoints(result, min),
    }),
  );
  return {
    id: 'roc',
    title: 'ROC',
    description: evaluations
      .map(
        ({ name, result }) =>
          `${name}: true accept rate ${percent(result.tarAtFar['1e-2'])} at a false accept rate of 1%, area under the curve ${result.auc.toFixed(4)}.`,
      )
      .join(' '),
    width: WIDTH,
    height: TALL,
    x: { label: 'false accept rate (logarithmic)', min, max: 1, log: true, format: percentTick },
    y: { label: 'true accept rate', min: 0, max: 1, format: percentTick },
    series,
  };
}

/** Points at whole pixels of the logarithmic axis, the last (highest) of those that share one. */
function rocPoints({ details: { roc } }: VerificationResult, min: number): Point[] {
  const pixel = (far: number) => Math.round((Math.log10(far / min) / -Math.log10(min)) * WIDTH);
  const points: Point[] = [];
  let previous = Number.NaN;
  roc.far.forEach((far, i) => {
    const at = far < min ? 0 : pixel(far);
    const point: Point = [Math.max(far, min), roc.tar[i]!];
    if (at === previous) points[points.length - 1] = point;
    else points.push(point);
    previous = at;
  });
  return points;
}

/** Error rates that the axes of a detection error trade-off name. */
const ERROR_TICKS = [0.0001, 0.001, 0.01, 0.05, 0.2, 0.4];
/** The axes reach down to the error rates that there are, and to 5% at least. */
const FEWEST_TICKS = 3;
/** Beyond an equal error rate of one half a model errs on purpose. */
const MOST_ERROR = 0.6;

/**
 * Detection error trade-off: misses against false accepts, both by normal quantiles, where scores that are
 * normally distributed give straight lines (Martin et al. 1997).
 */
export function detChart(evaluations: readonly Evaluation[]): Chart {
  const rates = evaluations.flatMap(({ result }) => shownErrors(result).flat());
  const least = rates.reduce((min, rate) => (rate > 0 ? Math.min(min, rate) : min), MOST_ERROR);
  // A rate of 0 has no place on the axis and is drawn at its end.
  const above = ERROR_TICKS.filter((tick) => tick > least).length;
  const ticks = ERROR_TICKS.slice(-Math.min(Math.max(above + 1, FEWEST_TICKS), ERROR_TICKS.length));
  const min = ticks[0]!;
  const axis = (label: string): Axis => ({
    label,
    min,
    max: MOST_ERROR,
    probit: true,
    ticks,
    format: percentTick,
  });
  return {
    id: 'det',
    title: 'Detection error trade-off',
    description: evaluations
      .map(({ name, result }) => `${name}: equal error rate ${percent(result.eer)}.`)
      .join(' '),
    width: WIDTH,
    height: TALL,
    x: axis('false accept rate (normal quantiles)'),
    y: axis('share of genuine pairs missed'),
    series: [
      {
        label: 'equal errors',
        colour: 0,
        dashed: true,
        kind: 'line',
        points: [
          [min, min],
          [MOST_ERROR, MOST_ERROR],
        ],
      },
      ...evaluations.map(
        ({ name, result }, i): Series => ({
          label: name,
          colour: SERIES_COLOURS[i % SERIES_COLOURS.length]!,
          dashed: i > 0,
          kind: 'line',
          points: detPoints(result, min),
        }),
      ),
    ],
  };
}

/** (FAR, misses) of the ROC's points that lie within the axes. */
function shownErrors({ details: { roc } }: VerificationResult): [number, number][] {
  return Array.from(roc.far, (far, i): [number, number] => [far, 1 - roc.tar[i]!]).filter(
    ([far, miss]) => far <= MOST_ERROR && miss <= MOST_ERROR,
  );
}

/** One point at most for each pixel across. */
function detPoints(result: VerificationResult, min: number): Point[] {
  const low = normalQuantile(min);
  const span = normalQuantile(MOST_ERROR) - low;
  const points: Point[] = [];
  let previous = Number.NaN;
  for (const [far, miss] of shownErrors(result)) {
    const point: Point = [Math.max(far, min), Math.max(miss, min)];
    const pixel = Math.round(((normalQuantile(point[0]) - low) / span) * WIDTH);
    if (pixel === previous) points[points.length - 1] = point;
    else points.push(point);
    previous = pixel;
  }
  return points;
}

/** How the similarities of genuine and of impostor pairs are distributed, with the threshold. */
export function histogramChart({ name, result }: Evaluation): Chart {
  const { distances, same } = result.details;
  const similarities = distances.map(similarity);
  const { min, max } = niceRange(similarities);
  const counts = [0, 1].map(() => new Array<number>(BINS).fill(0));
  similarities.forEach((value, i) => {
    const bin = Math.floor(((value - min) / (max - min)) * BINS);
    counts[same[i]!]![Math.min(BINS - 1, bin)]!++;
  });
  const shares = counts.map((kind) => {
    const total = kind.reduce((sum, n) => sum + n, 0);
    return kind.map((n) => n / total);
  });
  const outline = (kind: readonly number[]): Point[] =>
    kind.flatMap((share, i): Point[] => {
      const at = (edge: number) => min + ((max - min) * edge) / BINS;
      return [
        [at(i), share],
        [at(i + 1), share],
      ];
    });
  const series = (['two people', 'one person'] as const).flatMap((label, kind): Series[] => {
    const colour = kind === 1 ? 1 : 2;
    const points = outline(shares[kind]!);
    return [
      { label, colour, kind: 'area', points },
      { label: '', colour, kind: 'line', points },
    ];
  });
  const threshold = meanThreshold(result);
  const shown = (Number(threshold.toFixed(2)) || 0).toFixed(2); // never "-0.00"
  return {
    id: 'histogram',
    title: `Similarity of pairs: ${name}`,
    description: `Pairs of one person lie to the right, pairs of two people to the left; the threshold is at a cosine of ${shown}.`,
    width: WIDTH,
    height: TALL,
    x: { label: 'cosine similarity', min, max },
    y: {
      label: 'share of the pairs of a kind',
      ...rangeFromZero(shares.flat()),
      format: percentTick,
    },
    series,
    marks: [{ x: threshold, label: `threshold ${shown}` }],
  };
}

/** Cosine of two unit vectors from their squared distance. */
export function similarity(squaredDistance: number): number {
  return 1 - squaredDistance / 2;
}

/** Mean of the folds' thresholds, as a cosine. */
export function meanThreshold(result: VerificationResult): number {
  const cosines = cosineThresholds(result);
  return cosines.reduce((sum, value) => sum + value, 0) / cosines.length;
}

/** The folds' thresholds as cosines, whatever the protocol's score. */
export function cosineThresholds({ thresholds, score }: VerificationResult): number[] {
  return score === 'cosine' ? thresholds : thresholds.map(similarity);
}

/** 0.98765 as "98.77%". */
export function percent(fraction: number, digits = 2): string {
  return Number.isFinite(fraction) ? `${(fraction * 100).toFixed(digits)}%` : 'not finite';
}

export function percentTick(fraction: number): string {
  return `${Number((fraction * 100).toPrecision(6))}%`;
}

function describe(series: readonly Series[]): string {
  return series
    .map(({ label, points }) => {
      const finite = points.filter(([, value]) => Number.isFinite(value));
      const [from, to] = [finite[0]!, finite.at(-1)!];
      return `${label === '' ? '' : `${label}: `}${plainNumber(from[1])} at step ${plainNumber(from[0])}, ${plainNumber(to[1])} at step ${plainNumber(to[0])}.`;
    })
    .join(' ');
}
