/** report.html: one file that shows what was run, how it went and how good the model is. */

import { mayBeGuessed, mcnemar } from '../evaluate/statistics.js';
import type { VerificationResult } from '../evaluate/verification.js';
import { writeFileAtomic } from '../formats/atomic.js';
import {
  cosineThresholds,
  detChart,
  type Evaluation,
  histogramChart,
  type MetricsLine,
  meanThreshold,
  orderedMetrics,
  percent,
  rocChart,
  similarity,
  trainingCharts,
} from './curves.js';
import { page, scroll } from './page.js';
import { type Chart, drawChart, plainNumber, escapeText as text } from './svg.js';

export interface ReportFace {
  /** Whose face it is, for instance "Ann, image 1". */
  label: string;
  /** The picture's file, shown as it is; null where there is none to show. */
  jpeg: Uint8Array | null;
}

export interface ReportPair {
  a: ReportFace;
  b: ReportFace;
  /** Squared L2 distance of the unit embeddings, 0..4. */
  distance: number;
  /** Whether the threshold put it on the wrong side. */
  wrong: boolean;
}

/** A training sample. */
export interface ReportSample {
  face: ReportFace;
  /** The step that it was part of, counted from 1. */
  step: number;
  baseLoss: number;
  /** What the weighting multiplied its gradient by, dHM/dL. */
  gradientWeight: number;
}

export interface ReportData {
  title: string;
  /** When the report was made, as it should be shown; the report reads no clock. */
  created: string;
  /** What was run and on what, in a sentence. */
  summary?: string;
  /** Of a run that is not at its end. While it is running the page reloads itself. */
  progress?: { running: boolean; step: number; totalSteps: number };
  /** Settings; nested ones are shown by their path. */
  config: Readonly<Record<string, unknown>>;
  /** What it ran on: device, instruction set, versions. */
  environment: Readonly<Record<string, string>>;
  metrics: readonly MetricsLine[];
  /** Accuracies on held-out pairs during training, fractions. */
  validations?: readonly { step: number; accuracy: number }[];
  trainingSeconds?: number;
  /** A reservation about the figures. */
  note?: string;
  /** The pairs that were judged, for instance "6,000 pairs of LFW View 2". */
  evaluatedOn?: string;
  /** The model first, then what to hold it against. */
  evaluations: readonly Evaluation[];
  /** The same models on other pairs. */
  alsoEvaluated?: readonly { evaluatedOn: string; evaluations: readonly Evaluation[] }[];
  /** The model's worst pairs, worst first. */
  hardest?: { impostors: readonly ReportPair[]; genuine: readonly ReportPair[] };
  /** Those of an epoch with the highest base loss, worst first. */
  samples?: { epoch: number; shown: readonly ReportSample[] };
}

/** A page that is read often would shift under the reader; seldom, and it would be old. */
const RELOAD_SECONDS = 30;

/**
 * Writes the report whole or not at all. The file needs no network and no script; all text is escaped.
 *
 * @throws HardmineError ERR_IO when it cannot be written
 */
export async function writeReport(path: string, data: ReportData): Promise<void> {
  await writeFileAtomic(path, [renderReport(data)]);
}

/** The report as HTML, the same bytes for the same data. */
export function renderReport(data: ReportData): string {
  const metrics = orderedMetrics(data.metrics);
  return page(
    data.title,
    [
      header(data, metrics),
      accuracySection(data),
      trainingSection(data, metrics),
      separationSection(data.evaluations),
      foldSection(data.evaluations),
      pairsSection(data.hardest),
      samplesSection(data.samples),
      settingsSection(data),
      footer(data.created),
    ].join('\n'),
    data.progress?.running ? RELOAD_SECONDS : undefined,
  );
}

export function footer(created: string): string {
  return `<footer>Made by hardmine, ${text(created)}. Everything is in this one file; it asks for nothing from the network.</footer>`;
}

function header(data: ReportData, metrics: readonly MetricsLine[]): string {
  const [model] = data.evaluations;
  const tiles: [string, string, string][] = [];
  if (model) {
    const { accuracy, confidence95, eer } = model.result;
    tiles.push(
      ['Accuracy', percent(accuracy.mean), `95% interval ${interval(confidence95)}`],
      ['Equal error rate', percent(eer), 'pooled over all pairs'],
    );
  }
  const last = metrics.at(-1);
  if (last) {
    const epoch = Number.isFinite(last.epoch) ? `in epoch ${plainNumber(last.epoch!)}` : '';
    tiles.push(['Steps', plainNumber(last.step), epoch]);
    if (Number.isFinite(last.baseLoss)) {
      tiles.push([
        'Base loss',
        plainNumber(Number(last.baseLoss!.toPrecision(4))),
        'at the last step',
      ]);
    }
  }
  const speeds = metrics
    .map(({ imagesPerSecond }) => imagesPerSecond ?? Number.NaN)
    .filter(Number.isFinite)
    .sort((a, b) => a - b);
  if (speeds.length > 0) {
    const median = speeds[speeds.length >> 1]!;
    const time =
      data.trainingSeconds === undefined ? '' : `${duration(data.trainingSeconds)} in all`;
    tiles.push(['Images per second', plainNumber(Number(median.toPrecision(3))), time || 'median']);
  }
  const dl = tiles
    .map(
      ([name, value, note]) =>
        `<div><dt>${text(name)}</dt><dd>${text(value)}${note === '' ? '' : `<small>${text(note)}</small>`}</dd></div>`,
    )
    .join('');
  return [
    '<header>',
    '<p class="kind">hardmine report</p>',
    `<h1>${text(data.title)}</h1>`,
    progressBar(data),
    `<p class="lead">${text(verdict(data))}</p>`,
    data.summary === undefined ? '' : `<p class="note">${text(data.summary)}</p>`,
    dl === '' ? '' : `<dl class="tiles">${dl}</dl>`,
    '</header>',
  ].join('\n');
}

/** How far a run is that is not at its end. */
function progressBar({ progress, created }: ReportData): string {
  if (!progress) return '';
  const { running, step, totalSteps } = progress;
  const share = percent(step / totalSteps, 0);
  const far = `step ${plainNumber(step)} of ${plainNumber(totalSteps)} (${share})`;
  const sentence = running
    ? `Running: ${far} as of ${created}. This page reloads itself every ${RELOAD_SECONDS} seconds.`
    : `Stopped at ${far}. hardmine train --resume goes on from its last checkpoint.`;
  return `<div class="progress"><progress max="${totalSteps}" value="${step}" aria-label="Steps done">${share}</progress><p>${text(sentence)}</p></div>`;
}

/** The result in a sentence or two. */
export function verdict({
  evaluations,
  evaluatedOn,
}: Pick<ReportData, 'evaluations' | 'evaluatedOn'>): string {
  const [model, ...others] = evaluations;
  if (!model) return 'Nothing has been evaluated yet.';
  const { accuracy, confidence95, pairs } = model.result;
  const judged = `Right on ${percent(accuracy.mean)} of ${evaluatedOn ?? `${plainNumber(pairs)} pairs`} (95% interval ${interval(confidence95)})`;
  if (others.length === 0) {
    return `${judged}${mayBeGuessed(accuracy.mean, pairs) ? ', which guessing may give too' : ''}.`;
  }
  const compared = others.map(({ name, result }) => {
    const points = (accuracy.mean - result.accuracy.mean) * 100;
    return `${Math.abs(points).toFixed(1)} points ${points >= 0 ? 'above' : 'below'} ${name} (${percent(result.accuracy.mean)}${significance(model.result, result)})`;
  });
  return `${judged}: ${compared.join(' and ')}.`;
}

/** What McNemar's test says of two results on the same pairs; nothing where they are of different ones. */
function significance(a: VerificationResult, b: VerificationResult): string {
  const [first, second] = [a.details, b.details];
  const paired =
    first.same.length === second.same.length &&
    first.same.every((label, i) => label === second.same[i]);
  if (!paired) return '';
  const { p, distinguishable } = mcnemar(first.right, second.right);
  const shown = `McNemar’s test: p ${p < 0.001 ? '< 0.001' : `= ${p.toFixed(3)}`}`;
  return distinguishable ? `; ${shown}` : `; ${shown}, so these pairs cannot tell the two apart`;
}

function accuracySection(data: ReportData): string {
  const { evaluations, evaluatedOn, alsoEvaluated = [], note } = data;
  if (evaluations.length === 0) return '';
  return [
    '<h2>How well it tells people apart</h2>',
    accuracyTable(evaluations, evaluatedOn, true),
    ...alsoEvaluated.map((also) => accuracyTable(also.evaluations, also.evaluatedOn, false)),
    note === undefined ? '' : `<p class="note">${text(note)}</p>`,
  ].join('\n');
}

/** Every model on the same pairs, with intervals; below the first such table of a page what they mean. */
export function accuracyTable(
  evaluations: readonly Evaluation[],
  evaluatedOn: string | undefined,
  first: boolean,
): string {
  const rows = evaluations.map(({ name, result }, i) => {
    const { accuracy, confidence95, bootstrap95, auc, eer, tarAtFar } = result;
    const cells = [
      `${percent(accuracy.mean)} ± ${percent(accuracy.standardError)}`,
      `${interval(confidence95)}<br>bootstrap ${interval(bootstrap95)}`,
      auc.toFixed(4),
      percent(eer),
      percent(tarAtFar['1e-2']),
      percent(tarAtFar['1e-3']),
    ];
    return `<tr${i === 0 ? ' class="first"' : ''}><th scope="row">${text(name)}</th>${cells.map((cell) => `<td>${cell}</td>`).join('')}</tr>`;
  });
  const { result } = evaluations[0]!;
  const folds = result.accuracy.perFold.length;
  const meaning = `Protocol ${result.protocol}: accuracy is the mean over ${folds} folds, each judged at the threshold that the other ${folds === 2 ? 'one' : folds - 1} chose, ± its standard error; the interval is Wilson’s over all pairs, as if they were independent, and the bootstrap’s is of the mean over ${plainNumber(result.bootstrap95.resamples)} draws of pairs within their folds. AUC, equal error rate and TAR (true accept rate) at a given FAR (false accept rate) come from all pairs pooled.`;
  const notes = [...(first ? [meaning] : []), ...result.details.notes];
  const pairs = evaluatedOn ?? `${plainNumber(result.pairs)} pairs`;
  return [
    scroll(
      `Accuracy of every model on ${pairs}`,
      `<table><caption>${text(pairs)}</caption>
<thead><tr><th scope="col">Model</th><th scope="col">Accuracy</th><th scope="col">95% interval</th><th scope="col">AUC</th><th scope="col">EER</th><th scope="col">TAR at FAR 1%</th><th scope="col">TAR at FAR 0.1%</th></tr></thead>
<tbody>${rows.join('\n')}</tbody></table>`,
    ),
    `<p class="note">${notes.map(text).join(' ')}</p>`,
  ].join('\n');
}

function trainingSection(
  { validations = [], evaluations }: ReportData,
  metrics: readonly MetricsLine[],
): string {
  const charts = trainingCharts(metrics, validations);
  if (charts.length === 0 && evaluations.length > 0) return ''; // `evaluate` has not trained
  const notFinite = metrics.filter(
    ({ loss }) => loss === null || (loss !== undefined && !Number.isFinite(loss)),
  ).length;
  const note =
    notFinite > 0
      ? `<p class="note">At ${plainNumber(notFinite)} of ${plainNumber(metrics.length)} logged steps the loss was not finite; curves have gaps there.</p>`
      : '';
  return [
    '<h2>How training went</h2>',
    charts.length > 0
      ? `<div class="cards">${charts.map((chart) => card(chart)).join('\n')}</div>`
      : '<p class="note">No step has been logged.</p>',
    note,
  ].join('\n');
}

function separationSection(evaluations: readonly Evaluation[]): string {
  const [model] = evaluations;
  if (!model) return '';
  const charts = [histogramChart(model), rocChart(evaluations), detChart(evaluations)];
  return `<h2>Where it draws the line</h2>\n<div class="cards">${charts.map((chart) => card(chart)).join('\n')}</div>`;
}

function foldSection([model]: readonly Evaluation[]): string {
  if (!model) return '';
  const { accuracy, details } = model.result;
  const thresholds = cosineThresholds(model.result);
  const sizes = new Array<number>(thresholds.length).fill(0);
  for (const fold of details.fold) sizes[fold]!++;
  const row = (name: string, cells: string[]) =>
    `<tr><th scope="row">${name}</th>${cells.map((cell) => `<td>${cell}</td>`).join('')}</tr>`;
  const rows = thresholds.map((threshold, fold) =>
    row(String(fold + 1), [
      plainNumber(sizes[fold]!),
      percent(accuracy.perFold[fold]!),
      (2 - 2 * threshold).toFixed(2),
      threshold.toFixed(3),
    ]),
  );
  const mean = meanThreshold(model.result);
  rows.push(
    row('All', [
      plainNumber(model.result.pairs),
      `${percent(accuracy.mean)}<br>std ${percent(accuracy.std)}`,
      (2 - 2 * mean).toFixed(2),
      mean.toFixed(3),
    ]),
  );
  return [
    '<h2>Fold by fold</h2>',
    scroll(
      'Accuracy and threshold of every fold',
      `<table><caption>${text(model.name)}</caption>
<thead><tr><th scope="col">Fold</th><th scope="col">Pairs</th><th scope="col">Accuracy</th><th scope="col">Threshold</th><th scope="col">As cosine</th></tr></thead>
<tbody>${rows.join('\n')}</tbody></table>`,
      true,
    ),
    '<p class="note">Thresholds are squared distances of unit embeddings.</p>',
  ].join('\n');
}

function pairsSection(hardest: ReportData['hardest']): string {
  if (!hardest || hardest.impostors.length + hardest.genuine.length === 0) return '';
  const list = (title: string, pairs: readonly ReportPair[], same: boolean): string => {
    if (pairs.length === 0) return '';
    const wrong = pairs.filter((pair) => pair.wrong).length;
    return `<h3>${title}</h3>
<p class="note">${wrong} of these ${pairs.length} ${wrong === 1 ? 'is' : 'are'} on the wrong side of the threshold.</p>
<ul class="pairs">${pairs.map((pair) => pairCard(pair, same)).join('\n')}</ul>`;
  };
  return [
    '<h2>The pairs it finds hardest</h2>',
    list('Two people, most alike to the model', hardest.impostors, false),
    list('One person, least alike to the model', hardest.genuine, true),
  ].join('\n');
}

function pairCard({ a, b, distance, wrong }: ReportPair, same: boolean): string {
  const taken = same !== wrong ? 'taken for one person' : 'taken for two people';
  return `<li class="pair ${wrong ? 'wrong' : 'right'}"><div class="faces">${figure(a)}${figure(b)}</div><p>cosine ${similarity(distance).toFixed(3)}<br><span class="verdict">${wrong ? '✗ wrong' : '✓ right'}: ${taken}</span></p></li>`;
}

function figure({ label, jpeg }: ReportFace): string {
  const caption = `<figcaption>${text(label)}</figcaption>`;
  if (jpeg === null) return `<figure><p class="absent">no picture</p>${caption}</figure>`;
  return `<figure><img src="data:image/jpeg;base64,${Buffer.from(jpeg).toString('base64')}" alt="Face of ${text(label)}" width="112" height="112">${caption}</figure>`;
}

function samplesSection(samples: ReportData['samples']): string {
  if (!samples || samples.shown.length === 0) return '';
  const cards = samples.shown.map(({ face, step, baseLoss, gradientWeight }) => {
    const verdict = `${gateWord(gradientWeight)} × ${gradientWeight.toFixed(2)}`;
    return `<li class="pair">${figure(face)}<p>base loss ${plainNumber(Number(baseLoss.toPrecision(4)))}<br><span class="verdict">${verdict}</span><br>in step ${plainNumber(step)}</p></li>`;
  });
  return `<h2>The training samples it finds hardest</h2>
<p class="note">Of each step of epoch ${samples.epoch} the sample with the highest base loss, and of these the worst, with what the weighting multiplied their gradient by. Wrong labels show up here: hard mining amplifies them like any hard face.</p>
<ul class="pairs">${cards.join('\n')}</ul>`;
}

/** As the gate's shares are counted. */
function gateWord(gradientWeight: number): string {
  if (gradientWeight < 0.1) return 'silenced';
  return gradientWeight > 1 ? 'amplified' : 'kept';
}

export function card(chart: Chart): string {
  return `<figure class="card"><h3>${text(chart.title)}</h3>${drawChart(chart)}</figure>`;
}

function settingsSection({ config, environment }: ReportData): string {
  const tables = [
    facts('Settings', flatten(config)),
    facts('Environment', Object.entries(environment)),
  ];
  if (tables.every((table) => table === '')) return '';
  return `<h2>What was run, and on what</h2>\n<div class="cards top">${tables.join('\n')}</div>`;
}

function facts(title: string, entries: readonly (readonly [string, string])[]): string {
  if (entries.length === 0) return '';
  const rows = entries
    .map(([name, value]) => `<tr><th scope="row">${text(name)}</th><td>${text(value)}</td></tr>`)
    .join('\n');
  return `<section class="card"><h3>${title}</h3><table class="facts"><tbody>${rows}</tbody></table></section>`;
}

/** Settings by their path: { weighting: { alpha: 1.5 } } as weighting.alpha. */
export function flatten(config: object, prefix = ''): [string, string][] {
  return Object.entries(config).flatMap(([key, value]: [string, unknown]): [string, string][] => {
    if (value === undefined) return [];
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
      return flatten(value, `${prefix}${key}.`);
    }
    return [[prefix + key, Array.isArray(value) ? value.join(', ') : String(value)]];
  });
}

function interval({ low, high }: { low: number; high: number }): string {
  return `${percent(low)} to ${percent(high)}`;
}

export function duration(seconds: number): string {
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}
