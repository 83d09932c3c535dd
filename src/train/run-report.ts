/** The report of a run: its curves, and where it was evaluated the pairs it got most wrong. */
import { readFile } from 'node:fs/promises';
import { basename } from 'node:path';
import type { Config } from '../config.js';
import type { PairsResult, ScoredPair } from '../evaluate/pairs.js';
import {
  type ReportData,
  type ReportFace,
  type ReportPair,
  writeReport,
} from '../report/report.js';
import type { CheckpointState } from './checkpoint.js';
import type { FinalResult } from './evaluation.js';
import { type RunDirectory, readMetrics } from './run-directory.js';

/** Pairs of each kind that a report shows. */
const SHOWN = 6;

/** The worst pairs of an evaluation with their pictures; `face` gives that of a row. */
export async function reportFaces(
  { details: { hardestImpostors, hardestGenuine } }: PairsResult,
  face: (row: number) => Promise<ReportFace>,
): Promise<{ impostors: ReportPair[]; genuine: ReportPair[] }> {
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

/** `face` of reportFaces for rows that are files. */
export function faceFiles(paths: readonly string[]): (row: number) => Promise<ReportFace> {
  return async (row) => ({ label: basename(paths[row]!), jpeg: await readFile(paths[row]!) });
}

/** Writes report.html into the run directory. */
export async function writeRunReport(
  directory: RunDirectory,
  run: {
    config: Config;
    environment: Record<string, string>;
    validations: CheckpointState['validations'];
    seconds: number;
    evaluations: readonly FinalResult[];
  },
): Promise<void> {
  const { config, environment, validations, seconds, evaluations } = run;
  const [first, ...others] = evaluations;
  const name = 'trained network';
  const data: ReportData = {
    title: basename(directory.path),
    created: new Date().toISOString(),
    config,
    environment,
    metrics: await readMetrics(directory.file('metrics.jsonl')),
    validations,
    trainingSeconds: seconds,
    evaluations: first ? [{ name, result: first }] : [],
    ...(first && {
      evaluatedOn: pairsOf(first),
      hardest: await reportFaces(first, faceFiles(first.details.paths)),
    }),
    alsoEvaluated: others.map((result) => ({
      evaluatedOn: pairsOf(result),
      evaluations: [{ name, result }],
    })),
  };
  await writeReport(directory.file('report.html'), data);
}

/** "6000 pairs of lfw". */
export function pairsOf({ pairs, dataset }: { pairs: number; dataset: string }): string {
  return `${pairs} pairs of ${dataset}`;
}
