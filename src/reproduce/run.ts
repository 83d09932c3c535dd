/** Runs an experiment to its end, row by row; stopped or killed, it goes on where it was. */
import { readFile, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { type Config, configHash } from '../config.js';
import { type DataOptions, openDataset } from '../data/dataset.js';
import { exists } from '../data/files.js';
import { HardmineError } from '../errors.js';
import { evaluateCfp, findCfpImages } from '../evaluate/cfp.js';
import { evaluateIdentification } from '../evaluate/identification.js';
import { evaluateLfw } from '../evaluate/lfw.js';
import type { VerificationResult } from '../evaluate/verification.js';
import { evaluateYtf } from '../evaluate/ytf.js';
import { writeFileAtomic } from '../formats/atomic.js';
import { FaceModel } from '../model.js';
import { checkEvaluation } from '../train/evaluation.js';
import { Trainer, type TrainerEvent, type TrainingPlan } from '../trainer.js';
import {
  EVALUATION_SETS,
  type EvaluationSet,
  type Experiment,
  rowFolder,
  runConfig,
} from './experiment.js';

const measureSchema = z.strictObject({
  /** Mean over folds, or the share of probes identified; a fraction. */
  accuracy: z.number().min(0).max(1),
  /** One character a pair (or probe) in the list's order: 1 where it was judged rightly, else 0. */
  decisions: z.string().regex(/^[01]+$/),
});
export type Measure = z.output<typeof measureSchema>;

const outcomeSchema = z.strictObject({
  /** Of the settings that the run was made with. */
  configHash: z.string(),
  /** Data, device and precision that it was made with. */
  trainedOn: z.strictObject({
    images: z.int(),
    identities: z.int(),
    device: z.string(),
    precision: z.string(),
  }),
  seconds: z.number(),
  /** Means of the last epoch; null when training did not get that far. */
  lastEpoch: z.strictObject({ baseLoss: z.number(), accuracy: z.number() }).nullable(),
  warnings: z.array(z.string()),
  /** Why training ended early; null when it did not. */
  failure: z.string().nullable(),
  measures: z.partialRecord(z.enum(EVALUATION_SETS), measureSchema),
});

/** What one run gave, as its folder's outcome.json holds it. */
export type Outcome = z.output<typeof outcomeSchema>;

/** One row under one seed. */
export interface Run {
  row: string;
  seed: number;
  folder: string;
  /** Null until it is finished. */
  outcome: Outcome | null;
}

export type ReproduceEvent =
  | { type: 'run'; run: Run; number: number; of: number; plan: TrainingPlan; step: number }
  | { type: 'training'; event: TrainerEvent }
  | { type: 'finished'; run: Run; number: number; of: number };

export interface ReproduceOptions {
  /** Told of the preparation of the data. */
  onProgress?: DataOptions['onProgress'];
  signal?: AbortSignal;
}

/**
 * The runs of an experiment with what is finished of them, seed by seed, so that an experiment stopped
 * early has every row under the first seed.
 *
 * @throws HardmineError ERR_CONFIG where a finished run was made with other settings
 */
export async function listRuns(experiment: Experiment, out: string): Promise<Run[]> {
  const runs: Run[] = [];
  for (const seed of experiment.seeds) {
    for (const row of experiment.rows) {
      const folder = join(out, 'runs', rowFolder(row.name), `seed-${seed}`);
      const outcome = await readOutcome(join(folder, 'outcome.json'));
      if (outcome && outcome.configHash !== configHash(runConfig(experiment, row, seed, folder))) {
        throw new HardmineError(
          'ERR_CONFIG',
          `${folder} was made with other settings than the experiment has now: delete that folder, or give another one as --out`,
        );
      }
      runs.push({ row: row.name, seed, folder, outcome });
    }
  }
  return runs;
}

async function readOutcome(file: string): Promise<Outcome | null> {
  if (!(await exists(file))) return null;
  try {
    return outcomeSchema.parse(JSON.parse(await readFile(file, 'utf8')));
  } catch (cause) {
    throw new HardmineError(
      'ERR_DATA',
      `${file} is not what hardmine wrote there: delete its folder to train that run again`,
      { cause },
    );
  }
}

/**
 * Trains and evaluates whatever of `runs` is not finished. A run whose loss stops being a number is
 * recorded as such and the next one begins; any other error ends the experiment, which may be started
 * again. A finished run keeps its models and curves; its checkpoints go.
 *
 * @throws HardmineError ERR_ABORTED after `signal`, with a checkpoint written
 */
export async function* reproduce(
  experiment: Experiment,
  runs: readonly Run[],
  out: string,
  { onProgress, signal }: ReproduceOptions = {},
): AsyncGenerator<ReproduceEvent, void, void> {
  const pending = runs.filter(({ outcome }) => outcome === null);
  if (pending.length === 0) return;
  await checkSets(experiment);
  const dataset = await openDataset(experiment.data, {
    cacheDir: join(out, '.hardmine-cache'),
    onProgress,
    signal,
  });
  const packed = { ...experiment, data: dataset.recPath };
  await dataset.dispose();
  for (const run of pending) {
    const number = runs.indexOf(run) + 1;
    const row = packed.rows.find(({ name }) => name === run.row)!;
    const config = runConfig(packed, row, run.seed, run.folder);
    const training = train(config, { signal });
    let trained: Trained;
    for (;;) {
      const next = await training.next();
      if (next.done) {
        trained = next.value;
        break;
      }
      const { value } = next;
      if ('plan' in value) yield { type: 'run', run, number, of: runs.length, ...value };
      else yield { type: 'training', event: value };
    }
    run.outcome = {
      ...trained,
      configHash: configHash(config),
      measures: trained.failure === null ? await measure(experiment, config, signal) : {},
    };
    await writeFileAtomic(join(run.folder, 'outcome.json'), [`${JSON.stringify(run.outcome)}\n`]);
    await rm(join(run.folder, 'checkpoints'), { recursive: true, force: true });
    yield { type: 'finished', run, number, of: runs.length };
  }
}

type Trained = Omit<Outcome, 'configHash' | 'measures'>;

async function* train(
  config: Config,
  options: { signal: AbortSignal | undefined },
): AsyncGenerator<TrainerEvent | { plan: TrainingPlan; step: number }, Trained, void> {
  const resume = await exists(join(config.out, 'config.json'));
  const trainer = await Trainer.create(
    { ...config, resume },
    options.signal ? { signal: options.signal } : {},
  );
  try {
    const { images, identities, device, precision } = trainer.plan;
    const trained: Trained = {
      trainedOn: { images, identities, device, precision },
      seconds: 0,
      lastEpoch: null,
      warnings: [],
      failure: null,
    };
    yield { plan: trainer.plan, step: trainer.stepsDone };
    try {
      for await (const event of trainer.run(options.signal ? { signal: options.signal } : {})) {
        if (event.type === 'step') trained.seconds = event.time;
        if (event.type === 'warning') trained.warnings.push(event.message);
        if (event.type === 'epoch') {
          trained.lastEpoch = { baseLoss: event.baseLoss, accuracy: event.accuracy };
        }
        yield event;
      }
    } catch (error) {
      if (!(error instanceof HardmineError) || error.code !== 'ERR_NON_FINITE') throw error;
      trained.failure = error.message;
    }
    return trained;
  } finally {
    await trainer.dispose();
  }
}

/** What the end of every run needs is looked at before the start of the first. */
async function checkSets(experiment: Experiment): Promise<void> {
  const { evaluate, lfw, ytf, cfp, ...lists } = experiment;
  await checkEvaluation({
    ...lists,
    validation: 'none',
    ...(lfw && evaluate.includes('lfw') && { lfw }),
    ...(ytf && evaluate.includes('ytf') && { ytf }),
  });
  if (cfp && needsCfp(experiment)) await findCfpImages(cfp, experiment.cfpProtocol);
}

const needsCfp = ({ evaluate }: Experiment): boolean =>
  evaluate.includes('cfp-ff') || evaluate.includes('cfp-fp');

/** Judges a trained model by every set of the experiment. */
async function measure(
  experiment: Experiment,
  { out, device, threads }: Config,
  signal: AbortSignal | undefined,
): Promise<Outcome['measures']> {
  const { evaluate, lfw, lfwPairs, ytf, ytfSplits, cfp, cfpProtocol } = experiment;
  const model = await FaceModel.load(join(out, 'best.safetensors'), { device, threads });
  const stop = signal ? { signal } : {};
  const measures: Outcome['measures'] = {};
  const add = (
    set: EvaluationSet,
    { accuracy, details }: Pick<VerificationResult, 'accuracy'> & Decisions,
  ): void => {
    if (evaluate.includes(set)) measures[set] = measureOf(accuracy.mean, details.right);
  };
  try {
    if (evaluate.includes('lfw')) {
      add(
        'lfw',
        await evaluateLfw(model, { root: lfw!, ...(lfwPairs && { pairs: lfwPairs }), ...stop }),
      );
    }
    if (evaluate.includes('ytf')) {
      add(
        'ytf',
        await evaluateYtf(model, { root: ytf!, ...(ytfSplits && { splits: ytfSplits }), ...stop }),
      );
    }
    if (evaluate.includes('lfw-rank-1')) {
      const { rank1, details } = await evaluateIdentification(model, { root: lfw!, ...stop });
      measures['lfw-rank-1'] = measureOf(rank1, details.right);
    }
    if (needsCfp(experiment)) {
      const { ff, fp } = await evaluateCfp(model, {
        root: cfp!,
        ...(cfpProtocol && { lists: cfpProtocol }),
        ...stop,
      });
      add('cfp-ff', ff);
      add('cfp-fp', fp);
    }
    return measures;
  } finally {
    await model.dispose();
  }
}

interface Decisions {
  details: { right: Uint8Array };
}

function measureOf(accuracy: number, right: Uint8Array): Measure {
  return { accuracy, decisions: right.join('') };
}
