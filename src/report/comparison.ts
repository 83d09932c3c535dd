/** Runs side by side: accuracies with the paired test, what was set otherwise, and their curves. */

import { mcnemar } from '../evaluate/statistics.js';
import type { VerificationResult } from '../evaluate/verification.js';
import { writeFileAtomic } from '../formats/atomic.js';
import {
  curve,
  detChart,
  type Figure,
  finite,
  type MetricsLine,
  percent,
  percentTick,
  rangeFromZero,
  rocChart,
  SERIES_COLOURS,
} from './curves.js';
import { page, scroll } from './page.js';
import { accuracyTable, card, duration, flatten, footer, verdict } from './report.js';
import { type Chart, niceTicks, plainNumber, type Series, escapeText as text } from './svg.js';

/** A chart holds as many runs as it has colours; tables hold all. */
const MOST_LINES = SERIES_COLOURS.length;

export interface ComparedRun {
  name: string;
  config: Readonly<Record<string, unknown>>;
  environment: Readonly<Record<string, string>>;
  /** As `orderedMetrics` gives them. */
  metrics: readonly MetricsLine[];
  validations: readonly { step: number; accuracy: number }[];
  /** What was run and on what, in a sentence. */
  summary: string;
  seconds: number;
  step: number;
  totalSteps: number;
  results: readonly ComparedResult[];
}

export interface ComparedResult {
  dataset: string;
  /** Equal where the pairs are the same in the same order. */
  list: string;
  result: VerificationResult;
}

/** @throws HardmineError ERR_IO when it cannot be written */
export async function writeComparison(
  path: string,
  runs: readonly ComparedRun[],
  created: string,
): Promise<void> {
  await writeFileAtomic(path, [renderComparison(runs, created)]);
}

/** The comparison as HTML, the same bytes for the same data; run names are different from each other. */
export function renderComparison(runs: readonly ComparedRun[], created: string): string {
  const title = runs.map(({ name }) => name).join(' against ');
  const sets = setsOf(runs);
  return page(
    title,
    [
      '<header>',
      '<p class="kind">hardmine comparison</p>',
      `<h1>${text(title)}</h1>`,
      ...sets
        .filter(({ judged }) => judged.length > 1)
        .map((set) => `<p class="lead">${text(verdictOf(set))}</p>`),
      '</header>',
      runTable(runs),
      sets.length > 0 ? '<h2>How well they tell people apart</h2>' : '',
      ...sets.map((set, i) => setSection(set, i)),
      settingsSection(runs),
      curveSection(runs),
      footer(created),
    ].join('\n'),
  );
}

/** Runs that were judged on the same pairs. */
interface PairSet {
  evaluatedOn: string;
  judged: { name: string; result: VerificationResult }[];
}

function setsOf(runs: readonly ComparedRun[]): PairSet[] {
  const sets = new Map<string, PairSet>();
  for (const { name, results } of runs) {
    for (const { dataset, list, result } of results) {
      const set = sets.get(list) ?? {
        evaluatedOn: `${plainNumber(result.pairs)} pairs of ${dataset}`,
        judged: [],
      };
      set.judged.push({ name, result });
      sets.set(list, set);
    }
  }
  return [...sets.values()];
}

/** Names the run that the others are held against. */
function verdictOf({ judged, evaluatedOn }: PairSet): string {
  const sentence = verdict({ evaluations: judged, evaluatedOn });
  return `${judged[0]!.name}: ${sentence.charAt(0).toLowerCase()}${sentence.slice(1)}`;
}

function runTable(runs: readonly ComparedRun[]): string {
  const rows = runs.map((run) => {
    const best = Math.max(...run.validations.map(({ accuracy }) => accuracy));
    const last = run.metrics.at(-1);
    const [loss, accuracy] = [finite(last?.baseLoss), finite(last?.accuracy)];
    const cells = [
      `${plainNumber(run.step)} of ${plainNumber(run.totalSteps)}`,
      duration(run.seconds),
      Number.isNaN(loss) ? '' : plainNumber(Number(loss.toPrecision(4))),
      Number.isNaN(accuracy) ? '' : percent(accuracy),
      run.validations.length > 0 ? percent(best) : '',
    ];
    return `<tr><th scope="row">${text(run.name)}</th>${cells.map((cell) => `<td>${cell}</td>`).join('')}<td class="prose">${text(run.summary)}</td></tr>`;
  });
  return scroll(
    'The runs',
    `<table><caption>The runs</caption>
<thead><tr><th scope="col">Run</th><th scope="col">Steps</th><th scope="col">Training time</th><th scope="col">Base loss, last step</th><th scope="col">Training accuracy, last step</th><th scope="col">Best on held-out pairs</th><th scope="col" class="prose">What was run</th></tr></thead>
<tbody>${rows.join('\n')}</tbody></table>`,
  );
}

function setSection({ evaluatedOn, judged }: PairSet, index: number): string {
  const drawn = judged.slice(0, MOST_LINES);
  const charts = [rocChart(drawn), detChart(drawn)].map((chart) => ({
    ...chart,
    id: `${chart.id}-${index}`,
  }));
  return [
    accuracyTable(judged, evaluatedOn, index === 0),
    pairedTable({ evaluatedOn, judged }),
    `<div class="cards">${charts.map(card).join('\n')}</div>`,
  ].join('\n');
}

/** Every run against the first. */
function pairedTable({ evaluatedOn, judged }: PairSet): string {
  const [first, ...others] = judged;
  if (!first || others.length === 0) return '';
  const rows = others.map(({ name, result }) => {
    const { onlyFirst, onlySecond, p, method, distinguishable } = mcnemar(
      result.details.right,
      first.result.details.right,
    );
    const points = (result.accuracy.mean - first.result.accuracy.mean) * 100;
    const verdict = distinguishable ? (onlyFirst > onlySecond ? 'better' : 'worse') : 'not decided';
    const cells = [
      `${points < 0 ? '−' : '+'}${Math.abs(points).toFixed(2)}`,
      plainNumber(onlyFirst),
      plainNumber(onlySecond),
      `${p < 1e-4 ? '&#60; 0.0001' : p.toFixed(4)} (${method})`,
      verdict,
    ];
    return `<tr><th scope="row">${text(name)}</th>${cells.map((cell) => `<td>${cell}</td>`).join('')}</tr>`;
  });
  const many =
    others.length > 1
      ? ' Each test is taken on its own: of twenty comparisons without a difference one comes out so.'
      : '';
  return [
    scroll(
      `Paired test on ${evaluatedOn}`,
      `<table><caption>Against ${text(first.name)}, pair by pair</caption>
<thead><tr><th scope="col">Run</th><th scope="col">Difference (points)</th><th scope="col">It alone is right on</th><th scope="col">${text(first.name)} alone on</th><th scope="col">McNemar’s p</th><th scope="col">Verdict</th></tr></thead>
<tbody>${rows.join('\n')}</tbody></table>`,
    ),
    `<p class="note">McNemar’s test counts only pairs that one run judges rightly and the other does not; below p = 0.05 the difference is taken for real.${many}</p>`,
  ].join('\n');
}

function settingsSection(runs: readonly ComparedRun[]): string {
  if (runs.length < 2) return '';
  const all = runs.map(
    ({ config, environment }) => new Map([...flatten(config), ...flatten(environment)]),
  );
  const keys = [...new Set(all.flatMap((settings) => [...settings.keys()]))].filter(
    (key) => key !== 'out', // of each run its own
  );
  const differing = keys.filter(
    (key) => new Set(all.map((settings) => settings.get(key))).size > 1,
  );
  if (differing.length === 0) return '<h2>What was set otherwise</h2>\n<p>Nothing.</p>';
  const rows = differing.map(
    (key) =>
      `<tr><th scope="row">${text(key)}</th>${all.map((settings) => `<td>${text(settings.get(key) ?? '–')}</td>`).join('')}</tr>`,
  );
  const head = runs.map(({ name }) => `<th scope="col">${text(name)}</th>`).join('');
  return `<h2>What was set otherwise</h2>\n${scroll('Settings that differ', `<table class="left"><thead><tr><th scope="col">Setting</th>${head}</tr></thead>\n<tbody>${rows.join('\n')}</tbody></table>`)}`;
}

function curveSection(runs: readonly ComparedRun[]): string {
  const drawn = runs.slice(0, MOST_LINES).filter(({ metrics }) => metrics.length > 0);
  if (drawn.length === 0) return '';
  const last = Math.max(...drawn.map(({ metrics }) => metrics.at(-1)!.step));
  const chart = (
    id: string,
    heading: string,
    label: string,
    points: (run: ComparedRun) => Series['points'],
    format?: (value: number) => string,
  ): Chart[] => {
    const series = drawn.map(
      (run, i): Series => ({
        label: run.name,
        colour: SERIES_COLOURS[i]!,
        kind: 'line',
        dashed: i > 0,
        points: points(run),
      }),
    );
    const values = series.flatMap(({ points: shown }) => shown.map(([, value]) => value));
    if (!values.some(Number.isFinite)) return [];
    return [
      {
        id,
        title: heading,
        description: series
          .map((one) => `${one.label} ends at ${plainNumber(one.points.at(-1)?.[1] ?? Number.NaN)}`)
          .join('; '),
        width: 390,
        height: 250,
        x: { label: 'step', min: 0, max: last, ticks: niceTicks(0, last).filter(Number.isInteger) },
        y: { label, ...rangeFromZero(values), ...(format && { format }) },
        series,
      },
    ];
  };
  const of = (name: Figure) => (run: ComparedRun) => curve(run.metrics, name);
  const charts = [
    ...chart('base-loss', 'Base loss', 'before the weighting', of('baseLoss')),
    ...chart('accuracy', 'Training accuracy', 'share right', of('accuracy'), percentTick),
    ...chart(
      'held-out',
      'Accuracy on held-out pairs',
      'share right',
      ({ validations }) => validations.map(({ step, accuracy }) => [step, accuracy] as const),
      percentTick,
    ),
    ...chart('speed', 'Speed', 'images per second', of('imagesPerSecond')),
  ];
  const note =
    runs.length > MOST_LINES ? `<p class="note">Of the first ${MOST_LINES} runs.</p>\n` : '';
  return `<h2>How training went</h2>\n${note}<div class="cards">${charts.map(card).join('\n')}</div>`;
}
