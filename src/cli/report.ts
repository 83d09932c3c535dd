import { basename, resolve } from 'node:path';
import type { Command } from 'commander';
import { resolveConfig } from '../config.js';
import { HardmineError } from '../errors.js';
import { type ComparedResult, type ComparedRun, writeComparison } from '../report/comparison.js';
import { orderedMetrics } from '../report/curves.js';
import { timeText } from '../report/page.js';
import { RunDirectory, readMetrics } from '../train/run-directory.js';
import { readScores, readStatus, SCORE_SETS, scoresFile } from '../train/run-files.js';
import { type CommonOptions, makeCommand, output } from './command.js';

interface Options extends CommonOptions {
  out: string;
}

export function reportCommand(): Command {
  return makeCommand(
    'report',
    'Compare runs in one page: accuracies on the same pairs with the paired test of McNemar, settings that differ, curves.',
    'hardmine report runs/plain runs/hard-mining --out comparison.html',
  )
    .argument(
      '<run...>',
      'run directories of train, finished or not; the first is what the others are held against',
    )
    .requiredOption('--out <file>', 'the page (.html)')
    .action(report);
}

async function report(folders: readonly string[], { out, json }: Options): Promise<void> {
  const runs: ComparedRun[] = [];
  for (const folder of folders) runs.push(await readRun(folder));
  await writeComparison(out, named(runs, folders), timeText(new Date()));
  if (json) output.json({ out, runs: folders });
  else output.result(out);
}

/** Runs whose folders have the same name are called by their paths. */
function named(runs: readonly ComparedRun[], folders: readonly string[]): ComparedRun[] {
  const unique = new Set(runs.map(({ name }) => name)).size === runs.length;
  return unique ? [...runs] : runs.map((run, i) => ({ ...run, name: folders[i]! }));
}

async function readRun(folder: string): Promise<ComparedRun> {
  const directory = RunDirectory.at(folder);
  const status = await readStatus(directory.file('status.json'));
  if (status === null) {
    throw new HardmineError(
      'ERR_CONFIG',
      `${folder} holds no run that has begun (there is no status.json): give a directory that train wrote as --out`,
    );
  }
  const results: ComparedResult[] = [];
  for (const set of SCORE_SETS) {
    const scores = await readScores(directory.file(scoresFile(set)));
    if (scores !== null) results.push(scores);
  }
  return {
    name: basename(resolve(folder)),
    config: resolveConfig(await directory.readConfig()),
    metrics: orderedMetrics(await readMetrics(directory.file('metrics.jsonl'))),
    ...status,
    results,
  };
}
