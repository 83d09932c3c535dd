/** An experiment as data: rows to train under several seeds, and what to judge them by. */
import { resolve } from 'node:path';
import { z } from 'zod';
import { type Config, kebab, MAX_CONFIG_BYTES, resolveConfig } from '../config.js';
import { readFileBounded } from '../data/files.js';
import { HardmineError, nearest, oneLine, quote } from '../errors.js';

/** What a row is judged by, in the order of a table's columns. */
export const EVALUATION_SETS = ['lfw', 'ytf', 'lfw-rank-1', 'cfp-ff', 'cfp-fp'] as const;
export type EvaluationSet = (typeof EVALUATION_SETS)[number];

/** The key that says where a set lies. */
const PLACE = {
  lfw: 'lfw',
  ytf: 'ytf',
  'lfw-rank-1': 'lfw',
  'cfp-ff': 'cfp',
  'cfp-fp': 'cfp',
} as const satisfies Record<EvaluationSet, string>;

const path = () => z.string().min(1);
const settings = () => z.record(z.string(), z.unknown());

const rowSchema = z.strictObject({
  /** Shown in the table, and the name of its folder in lower case. */
  name: z
    .string()
    .regex(/^[\w .,+*-]{1,60}$/, 'expected up to 60 letters, digits, spaces or .,+*-'),
  /** Keys of `train` that make this row what it is. */
  config: settings().default({}),
  /** Factor of the learning rate that the rows share. */
  lrFactor: z.number().positive().default(1),
  /** The row that this one is compared with, by its name. */
  against: z.string().exactOptional(),
  /** Accuracies that a paper printed for it, fractions. */
  published: z.partialRecord(z.enum(EVALUATION_SETS), z.number().min(0).max(1)).default({}),
});

const experimentSchema = z.strictObject({
  name: z.string().min(1).max(200),
  /** What is particular about it: stands above the table. */
  note: z.string().max(2000).default(''),
  /** Training data: whatever `train --data` takes. */
  data: path(),
  /** The training data behind the published figures. */
  publishedData: z.string().max(200).default(''),
  lfw: path().exactOptional(),
  lfwPairs: path().exactOptional(),
  ytf: path().exactOptional(),
  ytfSplits: path().exactOptional(),
  cfp: path().exactOptional(),
  cfpProtocol: path().exactOptional(),
  evaluate: z.array(z.enum(EVALUATION_SETS)).min(1),
  seeds: z.array(z.int().min(0)).min(1),
  /** Keys of `train` that all rows share. */
  config: settings().default({}),
  rows: z.array(rowSchema).min(1),
});

export type Experiment = z.output<typeof experimentSchema>;
export type ExperimentRow = Experiment['rows'][number];

export const PATHS = [
  'data',
  ...(['lfw', 'lfwPairs', 'ytf', 'ytfSplits', 'cfp', 'cfpProtocol'] as const),
] as const;

/** The folder of a row. */
export function rowFolder(name: string): string {
  return name.toLowerCase().replace(/[^a-z0-9]+/g, '-');
}

/**
 * Checks an experiment whole, each row's settings included, so that none fails after days.
 *
 * @throws HardmineError ERR_CONFIG naming what is wrong
 */
export function resolveExperiment(value: unknown): Experiment {
  const result = experimentSchema.safeParse(value);
  if (!result.success) throw configError(issueSentence(result.error.issues[0]!));
  const experiment = result.data;
  const names = experiment.rows.map(({ name }) => name);
  const folders = new Map<string, string>();
  for (const { name, against } of experiment.rows) {
    const other = folders.get(rowFolder(name));
    if (other !== undefined) {
      throw configError(
        `the rows "${other}" and "${name}" would share a folder: rename one of them`,
      );
    }
    folders.set(rowFolder(name), name);
    if (against !== undefined && (against === name || !names.includes(against))) {
      const others = names.filter((candidate) => candidate !== name);
      throw configError(
        `the row "${name}" is compared with "${against}", which is no other row: the nearest is "${nearest(against, others)}"`,
      );
    }
  }
  if (new Set(experiment.seeds).size !== experiment.seeds.length) {
    throw configError(
      `the experiment's "seeds" are ${JSON.stringify(experiment.seeds)}: name each once`,
    );
  }
  for (const key of PATHS) {
    const given = experiment[key];
    if (given !== undefined) experiment[key] = resolve(given);
  }
  for (const set of experiment.evaluate) {
    if (experiment[PLACE[set]] === undefined) {
      throw configError(
        `the experiment is judged by ${set} but does not say where it lies: give it as --${PLACE[set]}, or name other sets as --evaluate`,
      );
    }
  }
  for (const row of experiment.rows) {
    try {
      runConfig(experiment, row, experiment.seeds[0]!, 'runs');
    } catch (error) {
      if (!(error instanceof HardmineError)) throw error;
      throw configError(`in the row "${row.name}", ${error.message}`);
    }
  }
  return experiment;
}

/** The configuration of one run. It is evaluated afterwards, so it names no test set. */
export function runConfig(
  { data, config }: Experiment,
  row: ExperimentRow,
  seed: number,
  out: string,
): Config {
  const given: Record<string, unknown> = { ...config, ...row.config };
  const own = [...PATHS, 'out', 'seed', 'resume'].find((key) => key in given);
  if (own !== undefined) {
    throw configError(`"config" sets "${own}", which the experiment sets itself: remove it there`);
  }
  const run = { ...given, data, out, seed };
  if (row.lrFactor === 1) return resolveConfig(run);
  // 0.01 * 1.65 and the like: without the last bits, which would only look odd.
  const lr = Number((resolveConfig(run).lr * row.lrFactor).toPrecision(12));
  return resolveConfig({ ...run, lr });
}

/** @throws HardmineError ERR_CONFIG for a file that is no JSON */
export async function readExperiment(file: string): Promise<unknown> {
  try {
    return JSON.parse(
      (await readFileBounded(file, MAX_CONFIG_BYTES, 'an experiment')).toString('utf8'),
    );
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new HardmineError(
      'ERR_CONFIG',
      `the experiment ${file} cannot be read (${oneLine(reason)}): give a JSON file`,
      { cause },
    );
  }
}

function configError(message: string): HardmineError {
  return new HardmineError('ERR_CONFIG', message);
}

function issueSentence(issue: z.core.$ZodIssue): string {
  const at = issue.path.map(String).join('.');
  if (issue.code === 'unrecognized_keys') {
    const known = Object.keys(at.startsWith('rows') ? rowSchema.shape : experimentSchema.shape);
    const key = issue.keys[0] ?? '';
    return `the experiment has an unknown key ${quote(at === '' ? key : `${at}.${key}`)}: the nearest known one is "${nearest(key, known)}"`;
  }
  if (issue.message.endsWith('received undefined')) {
    const option = PATHS.some((key) => key === at) ? ` as --${kebab(at)} or` : '';
    return `the experiment lacks "${at}": give it${option} in its file`;
  }
  return `the experiment's "${at}" is wrong: ${issue.message.replace(/^Invalid (input|option|string): /, '')}`;
}
