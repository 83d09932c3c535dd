/**
 * Line and area charts as SVG text: no dependency, no clock, no random number, so one input gives the
 * same bytes on every run. Colours are classes (s1..s3 lines, f1..f3 areas); the page or file that
 * holds the chart defines them with `chartStyle`.
 */

import { normalQuantile } from '../evaluate/statistics.js';

export type Point = readonly [x: number, y: number];

export interface Axis {
  label: string;
  min: number;
  max: number;
  log?: boolean;
  /** By the quantiles of the normal distribution, for shares within (0, 1); give it `ticks`. */
  probit?: boolean;
  /** Positions of ticks; chosen when left out. */
  ticks?: readonly number[];
  format?: (value: number) => string;
}

export interface Series {
  /** Name in the legend; none for an empty one. */
  label: string;
  /** Which of the palette's colours; 0 is the muted one. */
  colour: 0 | 1 | 2 | 3;
  /** A point that is not finite leaves a gap. */
  points: readonly Point[];
  /** An area reaches down to `floor`, or to the bottom. */
  kind: 'line' | 'area' | 'dots';
  dashed?: boolean;
  /** Lower edge of a stacked area, in the order of `points`. */
  floor?: readonly Point[];
}

export interface Mark {
  x: number;
  label: string;
}

export interface Chart {
  /** Unique in its document: letters, digits and hyphens. */
  id: string;
  /** What is shown, for people who cannot see it. */
  title: string;
  description: string;
  width: number;
  height: number;
  x: Axis;
  y: Axis;
  series: readonly Series[];
  marks?: readonly Mark[];
}

/** CSS colours. */
export interface ChartPalette {
  ink: string;
  muted: string;
  rule: string;
  surface: string;
  series: readonly [string, string, string];
}

// Blue, vermilion and green of Okabe and Ito's palette (told apart with every kind of colour
// blindness), darkened or lightened until each has a contrast of at least 4.5 to its surface.
export const LIGHT: ChartPalette = {
  ink: '#1b1e24',
  muted: '#5a6270',
  rule: '#e2e5ea',
  surface: '#ffffff',
  series: ['#0b63a5', '#b84a00', '#00775a'],
};

export const DARK: ChartPalette = {
  ink: '#e9ebef',
  muted: '#a3abb8',
  rule: '#31363f',
  surface: '#1b1e24',
  series: ['#64b3f4', '#ff9a57', '#45cfa4'],
};

const FONT_SIZE = 12;
/** Mean advance of a sans-serif letter in ems: enough to place a legend. */
const LETTER = 0.58;
const LEGEND_ROW = 19;
const MARGIN = { left: 50, right: 22, bottom: 40 };
const SWATCH = 18;

/** The rules behind the classes of charts, for colours that are names or `var()`s. */
export function chartStyle(palette: ChartPalette): string {
  const colours = [palette.muted, ...palette.series];
  return [
    `.chart text{font:${FONT_SIZE}px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;fill:${palette.muted}}`,
    `.chart .name{fill:${palette.ink}}`,
    `.chart .heading{font-size:15px;font-weight:600;fill:${palette.ink}}`,
    `.chart .grid{stroke:${palette.rule};fill:none}`,
    `.chart .axis{stroke:${palette.muted};fill:none}`,
    `.chart .mark{stroke:${palette.ink};stroke-dasharray:3 3;fill:none}`,
    `.chart .halo{stroke:${palette.surface};stroke-width:4px;stroke-linejoin:round;paint-order:stroke;fill:${palette.ink}}`,
    '.chart .line{fill:none;stroke-width:2px;stroke-linejoin:round;stroke-linecap:round}',
    '.chart .area{stroke:none;fill-opacity:.3}',
    '.chart .dashed{stroke-dasharray:6 4}',
    ...colours.map((colour, i) => `.chart .s${i}{stroke:${colour}}.chart .f${i}{fill:${colour}}`),
  ].join('\n');
}

/** A chart as an `<svg>` element that scales with its container. */
export function drawChart(chart: Chart): string {
  const { id, width, height } = chart;
  return [
    `<svg class="chart" viewBox="0 0 ${width} ${height}" role="img" aria-labelledby="${id}-title ${id}-description">`,
    `<title id="${id}-title">${escapeText(chart.title)}</title>`,
    `<desc id="${id}-description">${escapeText(chart.description)}</desc>`,
    plot(chart),
    '</svg>',
  ].join('\n');
}

/** Charts one below the other, each under its title, as a file of its own. */
export function standaloneSvg(charts: readonly Chart[], palette: ChartPalette): string {
  const heading = 34;
  const width = Math.max(...charts.map((chart) => chart.width));
  let top = 0;
  const parts = charts.map((chart) => {
    const part = [
      `<g transform="translate(0 ${top})">`,
      `<text class="heading" x="${MARGIN.left}" y="23">${escapeText(chart.title)}</text>`,
      `<g transform="translate(0 ${heading})">`,
      `<desc>${escapeText(chart.description)}</desc>`,
      plot(chart),
      '</g>',
      '</g>',
    ].join('\n');
    top += heading + chart.height;
    return part;
  });
  const title = charts.map((chart) => chart.title).join('; ');
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="${width}" height="${top}" viewBox="0 0 ${width} ${top}" role="img">`,
    `<title>${escapeText(title)}</title>`,
    `<style>${chartStyle(palette)}</style>`,
    `<rect width="${width}" height="${top}" fill="${palette.surface}"/>`,
    ...parts,
    '</svg>',
    '',
  ].join('\n');
}

function plot(chart: Chart): string {
  const { id, width, height, x, y, series } = chart;
  const legend = drawLegend(series, width);
  const left = MARGIN.left;
  const right = width - MARGIN.right;
  const top = legend.height + 27;
  const bottom = height - MARGIN.bottom;
  const toX = scale(x, left, right);
  const toY = scale(y, bottom, top);
  const parts: string[] = [legend.svg];

  parts.push(`<text x="${left}" y="${legend.height + 15}">${escapeText(y.label)}</text>`);
  for (const tick of ticksOf(y)) {
    const at = px(toY(tick.value));
    parts.push(`<path class="grid" d="M${left} ${at}H${right}"/>`);
    parts.push(
      `<text x="${left - 7}" y="${px(toY(tick.value) + 4)}" text-anchor="end">${escapeText(tick.text)}</text>`,
    );
  }
  for (const tick of ticksOf(x)) {
    const at = px(toX(tick.value));
    parts.push(`<path class="axis" d="M${at} ${bottom}v4"/>`);
    parts.push(
      `<text x="${at}" y="${bottom + 17}" text-anchor="middle">${escapeText(tick.text)}</text>`,
    );
  }
  parts.push(`<path class="axis" d="M${left} ${bottom}H${right}"/>`);
  parts.push(
    `<text x="${px((left + right) / 2)}" y="${height - 5}" text-anchor="middle">${escapeText(x.label)}</text>`,
  );

  // The clip lets lines and dots touch the frame whole.
  parts.push(
    `<clipPath id="${id}-frame"><rect x="${left - 5}" y="${top - 5}" width="${right - left + 10}" height="${bottom - top + 10}"/></clipPath>`,
    `<g clip-path="url(#${id}-frame)">`,
    ...series.map((one) => drawSeries(one, toX, toY, bottom)),
    '</g>',
  );
  for (const mark of chart.marks ?? []) {
    const at = toX(mark.x);
    const before = at > (left + right) / 2;
    parts.push(
      `<path class="mark" d="M${px(at)} ${bottom}V${top}"/>`,
      `<text class="halo" x="${px(at + (before ? -6 : 6))}" y="${top + 10}" text-anchor="${before ? 'end' : 'start'}">${escapeText(mark.label)}</text>`,
    );
  }
  return parts.join('\n');
}

function drawSeries(
  { kind, colour, dashed, points, floor }: Series,
  toX: (value: number) => number,
  toY: (value: number) => number,
  bottom: number,
): string {
  const at = ([x, y]: Point) => `${px(toX(x))} ${px(toY(y))}`;
  const finite = ([x, y]: Point) => Number.isFinite(toX(x)) && Number.isFinite(toY(y));
  if (kind === 'dots') {
    return points
      .filter(finite)
      .map((p) => `<circle class="f${colour}" cx="${px(toX(p[0]))}" cy="${px(toY(p[1]))}" r="4"/>`)
      .join('\n');
  }
  const runs: number[][] = [];
  let open = false;
  points.forEach((point, i) => {
    const draw = finite(point);
    if (draw && open) runs.at(-1)!.push(i);
    else if (draw) runs.push([i]);
    open = draw;
  });
  if (kind === 'line') {
    const d = runs.map((run) => {
      const path = `M${run.map((i) => at(points[i]!)).join('L')}`;
      return run.length === 1 ? `${path}h0` : path; // a lone point shows as a dot by its round cap
    });
    return `<path class="line s${colour}${dashed ? ' dashed' : ''}" d="${d.join('')}"/>`;
  }
  const d = runs.map((run) => {
    const upper = run.map((i) => at(points[i]!)).join('L');
    const lower = [...run]
      .reverse()
      .map((i) => (floor ? at(floor[i]!) : `${px(toX(points[i]![0]))} ${px(bottom)}`))
      .join('L');
    return `M${upper}L${lower}Z`;
  });
  return `<path class="area f${colour}" d="${d.join('')}"/>`;
}

function drawLegend(series: readonly Series[], width: number): { svg: string; height: number } {
  const parts: string[] = [];
  let x: number = MARGIN.left;
  let row = 0;
  // A name longer than a row is cut: the chart's description has it whole.
  const room = width - MARGIN.left - MARGIN.right - SWATCH - 7;
  const most = Math.floor(room / (FONT_SIZE * LETTER));
  const named = series
    .filter(({ label }) => label !== '')
    .map((one) => ({ ...one, label: shortened(one.label, most) }));
  for (const { label, colour, kind, dashed } of named) {
    const extent = SWATCH + 7 + textWidth(label);
    if (x > MARGIN.left && x + extent > width - MARGIN.right) {
      x = MARGIN.left;
      row++;
    }
    const y = row * LEGEND_ROW + 10;
    parts.push(
      kind === 'line'
        ? `<path class="line s${colour}${dashed ? ' dashed' : ''}" d="M${px(x)} ${y}h${SWATCH}"/>`
        : kind === 'area'
          ? `<rect class="area f${colour}" x="${px(x)}" y="${y - 6}" width="${SWATCH}" height="12"/>`
          : `<circle class="f${colour}" cx="${px(x + SWATCH / 2)}" cy="${y}" r="4"/>`,
      `<text class="name" x="${px(x + SWATCH + 7)}" y="${y + 4}">${escapeText(label)}</text>`,
    );
    x += extent + 16;
  }
  return { svg: parts.join('\n'), height: named.length > 0 ? (row + 1) * LEGEND_ROW : 0 };
}

function scale(axis: Axis, from: number, to: number): (value: number) => number {
  const of = axis.log ? Math.log10 : axis.probit ? normalQuantile : (value: number) => value;
  const [low, high] = [of(axis.min), of(axis.max)];
  return (value) => from + ((of(value) - low) / (high - low)) * (to - from);
}

function ticksOf(axis: Axis): { value: number; text: string }[] {
  const values =
    axis.ticks ?? (axis.log ? decades(axis.min, axis.max) : niceTicks(axis.min, axis.max));
  const format = axis.format ?? plainNumber;
  return values.map((value) => ({ value, text: format(value) }));
}

/** Powers of ten within [min, max]; min > 0. */
function decades(min: number, max: number): number[] {
  // Ten to the nearest hundredth of a decade forgives the rounding of log10.
  const first = Math.ceil(Math.log10(min) - 0.01);
  const last = Math.floor(Math.log10(max) + 0.01);
  return Array.from({ length: last - first + 1 }, (_, i) => Number(`1e${first + i}`));
}

/** Four to eight multiples of 1, 2 or 5 times a power of ten within [min, max]; min < max, both finite. */
export function niceTicks(min: number, max: number): number[] {
  const rough = (max - min) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough * 0.8) ?? 10);
  // A thousandth of a step of slack: rounding must not lose the last tick.
  const first = Math.ceil(min / step - 1e-3);
  const last = Math.floor(max / step + 1e-3);
  return Array.from({ length: last - first + 1 }, (_, i) =>
    Number(((first + i) * step).toPrecision(12)),
  );
}

/** The least range of nice ticks that holds all finite `values`; [0, 1] when there is none. */
export function niceRange(values: Iterable<number>): { min: number; max: number } {
  let min = Number.POSITIVE_INFINITY;
  let max = Number.NEGATIVE_INFINITY;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    min = Math.min(min, value);
    max = Math.max(max, value);
  }
  if (min > max) return { min: 0, max: 1 };
  if (min === max) {
    const half = Math.abs(min) / 10 || 1;
    min -= half;
    max += half;
  }
  const ticks = niceTicks(min, max);
  const step = ticks[1]! - ticks[0]!;
  return {
    min: Number((Math.floor(min / step + 1e-3) * step).toPrecision(12)),
    max: Number((Math.ceil(max / step - 1e-3) * step).toPrecision(12)),
  };
}

/** 1234.5 as "1,234.5": thousands apart, at most four decimals, the same in every locale. */
export function plainNumber(value: number): string {
  if (!Number.isFinite(value)) return String(value);
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e9)) {
    return value
      .toExponential(2)
      .replace(/\.?0+e/, 'e')
      .replace('e+', 'e');
  }
  const [whole, fraction] = String(Number(value.toFixed(4))).split('.');
  const grouped = whole!.replace(/\B(?=(\d{3})+$)/g, ',');
  return fraction === undefined ? grouped : `${grouped}.${fraction}`;
}

/** Text for HTML and XML, in elements and in quoted attributes. */
export function escapeText(text: string): string {
  return (
    text
      .replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`)
      // Characters that XML has no way to write; HTML ignores or replaces them.
      .replace(/[^\P{Cc}\t\n\r]/gu, '\uFFFD')
  );
}

function shortened(label: string, most: number): string {
  const letters = [...label];
  return letters.length <= most ? label : `${letters.slice(0, most - 1).join('')}…`;
}

function textWidth(text: string): number {
  return text.length * FONT_SIZE * LETTER;
}

/** A coordinate: a hundredth of a pixel is finer than any screen. */
function px(value: number): string {
  return String(Number(value.toFixed(2)));
}
