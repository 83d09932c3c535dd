/** The result of an experiment as Markdown: for each evaluation set the paper's table, ours beside it. */
import { percent } from '../report/curves.js';
import type { EvaluationSet } from './experiment.js';
import type { Comparison, ExperimentResult, Figure } from './results.js';

/** What a set is called where people read. */
export const SET_TITLES: Readonly<Record<EvaluationSet, string>> = {
  lfw: 'LFW',
  ytf: 'YouTube Faces',
  'lfw-rank-1': 'LFW, rank-1 identification',
  'cfp-ff': 'CFP, frontal-frontal',
  'cfp-fp': 'CFP, frontal-profile',
};

/** With its sign, in percentage points. */
const points = (difference: number): string =>
  `${difference < 0 ? '-' : '+'}${Math.abs(100 * difference).toFixed(2)}`;

/** Mean over the seeds with their spread, and the single values. */
export function figureText({ mean, std, perSeed }: Figure): string {
  if (std === null) return `${percent(mean)} (one seed)`;
  return `${percent(mean)} ± ${(100 * std).toFixed(2)} (${perSeed.map((accuracy) => percent(accuracy)).join(', ')})`;
}

export function comparisonTexts({ against, differences, test, verdict }: Comparison): string[] {
  return [
    against,
    differences.map(points).join(', '),
    `${test.onlyFirst} / ${test.onlySecond}`,
    test.p < 1e-4 ? '< 0.0001' : test.p.toFixed(4),
    differences.length > 1 ? verdict : `${verdict} (one seed)`,
  ];
}

/** Headings of the columns that `figureText` and `comparisonTexts` fill. */
export function tableHead({ publishedData }: ExperimentResult): string[] {
  return [
    'loss',
    'accuracy, mean ± std',
    `published (${publishedData || 'no figure'})`,
    'against',
    'difference by seed (points)',
    'right alone: this / other',
    'p, seeds pooled',
    'verdict',
  ];
}

/** Rows of cells for one evaluation set; rows without a figure yet say so. */
export function tableRows({ rows }: ExperimentResult, set: EvaluationSet): string[][] {
  return rows.map(({ name, figures }) => {
    const figure = figures[set];
    if (figure === undefined) return [name, 'not finished', '', '', '', '', '', ''];
    const published = figure.published === null ? '' : percent(figure.published);
    const compared = figure.comparison ? comparisonTexts(figure.comparison) : ['', '', '', '', ''];
    return [name, figureText(figure), published, ...compared];
  });
}

/** What it was trained on, and how far it got, in a sentence. */
export function provenance({ data, trainedOn, finished, runs }: ExperimentResult): string {
  const on = trainedOn
    ? `Trained on ${trainedOn.images} images of ${trainedOn.identities} identities (${data}) on ${trainedOn.device}, ${trainedOn.precision}`
    : `To be trained on ${data}`;
  return `${on}; ${finished} of ${runs} runs are finished.`;
}

export function markdown(result: ExperimentResult): string {
  const line = (cells: readonly string[]) => `| ${cells.join(' | ')} |`;
  const head = tableHead(result);
  const parts = [`# ${result.name}`, provenance(result)];
  if (result.note !== '') parts.push(result.note);
  for (const set of result.evaluate) {
    parts.push(
      `## ${SET_TITLES[set]}`,
      [line(head), line(head.map(() => '---')), ...tableRows(result, set).map(line)].join('\n'),
    );
  }
  parts.push(VERDICT_RULE);
  const remarks = result.rows.flatMap(({ name, remarks }) =>
    remarks.map((remark) => `- ${name}, ${remark}`),
  );
  if (remarks.length > 0) parts.push('## Remarks', remarks.join('\n'));
  return `${parts.join('\n\n')}\n`;
}

export const VERDICT_RULE =
  'A row is called better (or worse) than the one it is compared with only where every one of at least two seeds says so and McNemar’s test over the pairs of all seeds together agrees (p < 0.05).';
