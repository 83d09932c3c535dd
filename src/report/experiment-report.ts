/** report.html of an experiment: its tables, and the curves of each loss beside those compared with it. */

import { writeFileAtomic } from '../formats/atomic.js';
import type { EvaluationSet } from '../reproduce/experiment.js';
import type { ExperimentResult } from '../reproduce/results.js';
import { provenance, SET_TITLES, tableHead, tableRows, VERDICT_RULE } from '../reproduce/tables.js';
import { curve, type MetricsLine, orderedMetrics, percent } from './curves.js';
import { page, scroll } from './page.js';
import {
  type Chart,
  drawChart,
  niceRange,
  niceTicks,
  type Series,
  escapeText as text,
} from './svg.js';

/** Lines of metrics.jsonl by row, of its first finished seed. */
export type RowMetrics = ReadonlyMap<string, readonly MetricsLine[]>;

/** A chart holds the base and at most this many rows beside it: as many as there are colours. */
const MOST_LINES = 4;
const COLOURS = [1, 2, 3, 0] as const;

/** @throws HardmineError ERR_IO when it cannot be written */
export async function writeExperimentReport(
  path: string,
  result: ExperimentResult,
  metrics: RowMetrics,
  created: string,
): Promise<void> {
  await writeFileAtomic(path, [renderExperiment(result, metrics, created)]);
}

/** The report as HTML, the same bytes for the same data. */
export function renderExperiment(
  result: ExperimentResult,
  metrics: RowMetrics,
  created: string,
): string {
  const charts = families(result).flatMap((rows, i) => familyCharts(rows, metrics, i));
  const remarks = result.rows.flatMap(({ name, remarks }) =>
    remarks.map((remark) => `<li>${text(name)}, ${text(remark)}</li>`),
  );
  return page(
    result.name,
    [
      '<header>',
      '<p class="kind">hardmine experiment</p>',
      `<h1>${text(result.name)}</h1>`,
      `<p class="lead">${text(provenance(result))}</p>`,
      result.note === '' ? '' : `<p>${text(result.note)}</p>`,
      '</header>',
      ...result.evaluate.map((set) => tableSection(result, set)),
      `<p class="note">${text(VERDICT_RULE)}</p>`,
      charts.length > 0
        ? `<h2>How training went</h2>\n<p class="note">Of each row’s first finished seed.</p>\n<div class="cards">${charts.map(card).join('\n')}</div>`
        : '',
      remarks.length > 0 ? `<h2>Remarks</h2>\n<ul>${remarks.join('\n')}</ul>` : '',
      `<footer>Made by hardmine, ${text(created)}. Everything is in this one file; it asks for nothing from the network.</footer>`,
    ].join('\n'),
  );
}

function tableSection(result: ExperimentResult, set: EvaluationSet): string {
  const head = tableHead(result)
    .map((cell) => `<th scope="col">${text(cell)}</th>`)
    .join('');
  const rows = tableRows(result, set)
    .map(
      ([name, ...cells]) =>
        `<tr><th scope="row">${text(name!)}</th>${cells.map((cell) => `<td>${text(cell)}</td>`).join('')}</tr>`,
    )
    .join('\n');
  const title = SET_TITLES[set];
  return `<h2>${title}</h2>\n${scroll(`Accuracies on ${title}`, `<table><thead><tr>${head}</tr></thead>\n<tbody>${rows}</tbody></table>`)}`;
}

/** Rows that are compared with each other, directly or not, each with the row it starts from first. */
function families({ rows }: ExperimentResult): string[][] {
  const parents = new Map(
    rows.map(({ name, figures }) => [
      name,
      Object.values(figures).find((figure) => figure.comparison)?.comparison?.against,
    ]),
  );
  const rootOf = (name: string): string => {
    const seen = new Set<string>();
    let root = name;
    for (let parent = parents.get(root); parent !== undefined; parent = parents.get(root)) {
      if (seen.has(parent)) break; // rows compared with each other in a circle
      seen.add(parent);
      root = parent;
    }
    return root;
  };
  const byRoot = new Map<string, string[]>();
  for (const { name } of rows) {
    const root = rootOf(name);
    byRoot.set(root, [...(byRoot.get(root) ?? []), name]);
  }
  return [...byRoot.values()];
}

function familyCharts(rows: readonly string[], metrics: RowMetrics, family: number): Chart[] {
  const shown = rows
    .filter((row) => (metrics.get(row)?.length ?? 0) > 0)
    .slice(0, MOST_LINES)
    .map((row) => ({ row, lines: orderedMetrics(metrics.get(row)!) }));
  if (shown.length === 0) return [];
  const last = Math.max(...shown.map(({ lines }) => lines.at(-1)!.step));
  const chart = (
    name: 'baseLoss' | 'accuracy',
    title: string,
    label: string,
    format?: (value: number) => string,
  ): Chart => {
    const series = shown.map(
      ({ row, lines }, i): Series => ({
        label: row,
        colour: COLOURS[i]!,
        kind: 'line',
        points: curve(lines, name),
      }),
    );
    const values = series.flatMap(({ points }) => points.map(([, value]) => value));
    const { max } = niceRange([0, ...values.filter((value) => value > 0)]);
    return {
      id: `${name.toLowerCase()}-${family}`,
      title: `${rows[0]}: ${title}`,
      description: series
        .map(({ label, points }) => `${label} ends at ${points.at(-1)?.[1].toPrecision(3)}`)
        .join('; '),
      width: 390,
      height: 250,
      x: { label: 'step', min: 0, max: last, ticks: niceTicks(0, last).filter(Number.isInteger) },
      y: { label, min: 0, max, ...(format && { format }) },
      series,
    };
  };
  return [
    chart('baseLoss', 'base loss', 'before the weighting'),
    chart('accuracy', 'training accuracy', 'share right', (value) => percent(value, 0)),
  ];
}

function card(chart: Chart): string {
  return `<figure class="card"><h3>${text(chart.title)}</h3>${drawChart(chart)}</figure>`;
}
