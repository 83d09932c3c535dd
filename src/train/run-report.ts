/** The report of a run: its curves, and where LFW was evaluated the pairs it got most wrong. */
import { readFile } from 'node:fs/promises';
import { basename } from 'node:path';
import type { Config } from '../config.js';
import type { LfwResult } from '../evaluate/lfw.js';
import type { ScoredPair } from '../evaluate/pairs.js';
import { type ReportData, type ReportPair, writeReport } from '../report/report.js';
import type { CheckpointState } from './checkpoint.js';
import { type RunDirectory, readMetrics } from './run-directory.js';

/** Pairs of each kind that a report shows. */
const SHOWN = 6;

/** The worst pairs of an evaluation with their pictures. */
export async function reportFaces(
  result: LfwResult,
): Promise<{ impostors: ReportPair[]; genuine: ReportPair[] }> {
  const { hardestImpostors, hardestGenuine, paths } = result.details;
  const face = async (row: number) => {
    const path = paths[row]!;
    return { label: basename(path), jpeg: await readFile(path) };
  };
  const show = (pairs: readonly ScoredPair[]) =>
    Promise.all(
      pairs.slice(0, SHOWN).map(async ({ a, b, distance, wrong }) => ({
        a: await face(a),
        b: await face(b),
        distance,
        wrong,
      })),
    );
  return { impostors: await show(hardestImpostors), genuine: await show(hardestGenuine) };
}

/** Writes report.html into the run directory. */
export async function writeRunReport(
  directory: RunDirectory,
  run: {
    config: Config;
    environment: Record<string, string>;
    validations: CheckpointState['validations'];
    seconds: number;
    evaluation: LfwResult | null;
  },
): Promise<void> {
  const { config, environment, validations, seconds, evaluation } = run;
  const data: ReportData = {
    title: basename(directory.path),
    created: new Date().toISOString(),
    config,
    environment,
    metrics: await readMetrics(directory.file('metrics.jsonl')),
    validations,
    trainingSeconds: seconds,
    evaluations: evaluation ? [{ name: 'trained network', result: evaluation }] : [],
    ...(evaluation && {
      evaluatedOn: `${evaluation.pairs} pairs of ${evaluation.dataset}`,
      hardest: await reportFaces(evaluation),
    }),
  };
  await writeReport(directory.file('report.html'), data);
}
