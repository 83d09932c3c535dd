/** What a run writes for other programs to read: how far it is, and the scores it was judged by. */
import { createHash } from 'node:crypto';
import { z } from 'zod';
import { exists, readFileBounded } from '../data/files.js';
import { HardmineError } from '../errors.js';
import { type VerificationResult, verification } from '../evaluate/verification.js';

/** Scores of 6,000 pairs take 150 KB; a set of a million pairs is far beyond any protocol. */
const MAX_BYTES = 32 * 2 ** 20;

const statusSchema = z.strictObject({
  state: z.enum(['running', 'stopped', 'finished']),
  step: z.int().min(0),
  totalSteps: z.int().min(1),
  epoch: z.int().min(0),
  /** Of training so far. */
  seconds: z.number().min(0),
  /** When this was written, ISO 8601. */
  written: z.string(),
  summary: z.string(),
  environment: z.record(z.string(), z.string()),
  validations: z.array(z.strictObject({ epoch: z.int(), step: z.int(), accuracy: z.number() })),
});

/** How far a run is; status.json. */
export type RunStatus = z.output<typeof statusSchema>;

const scoresSchema = z.strictObject({
  /** For instance "lfw". */
  dataset: z.string(),
  /** Which pairs these are: results on other pairs cannot be paired with them. */
  list: z.string(),
  /** Whose result it is where that is not the run's best model. */
  model: z.string(),
  notes: z.array(z.string()),
  /** Squared distances of unit embeddings, a pair each. */
  distances: z.array(z.number().min(0)).min(2),
  /** One character a pair: 1 where it shows one person. */
  same: z.string().regex(/^[01]+$/),
  fold: z.array(z.int().min(0)),
});

/** A result of the protocol insightface as scores-<set>.json holds it: its figures follow from the scores. */
export type SavedScores = z.output<typeof scoresSchema>;

/** What a run may be judged by, that which counts most first. */
export const SCORE_SETS = ['lfw', 'ytf', 'validation'] as const;
export type ScoreSet = (typeof SCORE_SETS)[number];

export const scoresFile = (set: ScoreSet): string => `scores-${set}.json`;

/** @param rows what tells the images of the pairs from others */
export function savedScores(
  result: VerificationResult & { dataset: string },
  rows: Iterable<string>,
  model: string,
): SavedScores {
  const { distances, same, fold, notes } = result.details;
  const hash = createHash('sha256').update(same).update(Uint16Array.from(fold));
  for (const row of rows) hash.update(`\n${row}`);
  return {
    dataset: result.dataset,
    list: hash.digest('hex'),
    model,
    notes,
    distances: [...distances],
    same: same.join(''),
    fold: [...fold],
  };
}

/** @returns null where there is none; @throws HardmineError ERR_DATA for a damaged one */
export const readStatus = (path: string): Promise<RunStatus | null> =>
  readJson(path, (value) => statusSchema.parse(value));

/** What `savedScores` was made of. */
export interface ReadScores extends Pick<SavedScores, 'dataset' | 'list' | 'model'> {
  result: VerificationResult;
}

/** @returns null where there are none; @throws HardmineError ERR_DATA for damaged ones */
export const readScores = (path: string): Promise<ReadScores | null> =>
  readJson(path, (value) => {
    const { distances, same, fold, notes, ...about } = scoresSchema.parse(value);
    const result = verification({ distances, same: [...same].map(Number), fold });
    return { ...about, result: { ...result, details: { ...result.details, notes } } };
  });

/** What is read, or null where it is damaged too: a run goes on without it. */
export async function ifSound<T>(reading: Promise<T | null>): Promise<T | null> {
  try {
    return await reading;
  } catch (error) {
    if (error instanceof HardmineError && error.code === 'ERR_DATA') return null;
    throw error;
  }
}

async function readJson<T>(path: string, parse: (value: unknown) => T): Promise<T | null> {
  if (!(await exists(path))) return null;
  const text = (await readFileBounded(path, MAX_BYTES, 'a file of a run')).toString('utf8');
  try {
    return parse(JSON.parse(text));
  } catch (cause) {
    throw new HardmineError(
      'ERR_DATA',
      `${path} is not what hardmine wrote there: remove it, or evaluate the run's model again`,
      { cause },
    );
  }
}
