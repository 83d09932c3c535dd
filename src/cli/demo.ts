import { copyFile, readdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import type { Command } from 'commander';
import { hasNvidiaDriver } from '../addon-file.js';
import type { ConfigInput } from '../config.js';
import { type Dataset, openDataset } from '../data/dataset.js';
import { FolderLock } from '../data/folder-lock.js';
import { generateFaces } from '../data/generated-faces.js';
import { validationPairs } from '../data/split.js';
import { HardmineError, quote } from '../errors.js';
import {
  embedForPairs,
  evaluatePairs,
  type PairsResult,
  pixelSimilarity,
  type ScoreModel,
  type VerificationPair,
} from '../evaluate/pairs.js';
import type { TensorMap } from '../formats/safetensors.js';
import { resolveLoss } from '../loss.js';
import { FaceModel } from '../model.js';
import { chooseDevice, type DeviceName } from '../native.js';
import { timeText } from '../report/page.js';
import { writeReport } from '../report/report.js';
import { readMetrics } from '../train/run-directory.js';
import { reportFace, reportFaces } from '../train/run-report.js';
import { Trainer } from '../trainer.js';
import {
  type CommonOptions,
  makeCommand,
  output,
  percent,
  progressNote,
  table,
} from './command.js';
import { stopOnInterrupt } from './interrupt.js';
import { TrainingLog } from './training-log.js';

/** Two seeds: no person of one set is in the other. */
const TRAIN = { seed: 1, identities: 400 };
const TEST = { seed: 2, identities: 60, imagesPerIdentity: 10 };
const PAIRS = 2000;
/** Training may take this long; with drawing, evaluation and report the demo stays below five minutes. */
const TRAINING_SECONDS = 190;
const MOST_EPOCHS = 40;
/** New images teach more than seen ones, up to what is worth drawing. */
const IMAGES_PER_IDENTITY = { least: 6, most: 24 };
const FEWEST_EPOCHS = 2;
/** How long the speed is measured. */
const TRY_OUT_MS = 4000;

const BATCH = 32;

/**
 * HM-ArcFace with what lets a margin loss start within some four hundred steps: a scale near
 * sqrt(2) ln(C - 1) = 8.5, a small margin that grows over half of the run, a large learning rate.
 */
function settings(epochs: number): Omit<ConfigInput, 'data' | 'out'> {
  return {
    loss: 'arcface',
    weighting: 'hard-mining',
    scale: 12,
    margin: 0.1,
    marginWarmUp: epochs / 2,
    lr: 0.1,
    epochs,
    milestones: [Math.ceil(0.7 * epochs)],
    batch: BATCH,
    validation: 'none',
    // Once, at the end: the epochs are short.
    validateEvery: epochs,
    checkpointEvery: Number.MAX_SAFE_INTEGER,
  };
}

interface Options extends CommonOptions {
  out: string;
  device: DeviceName;
}

export function demoCommand(): Command {
  return makeCommand(
    'demo',
    'Train HM-ArcFace on generated faces and evaluate it on people never trained on, in at most five minutes.',
    'hardmine demo',
  )
    .option('--out <dir>', 'folder for its run, models and report, replaced', join('runs', 'demo'))
    .option('--device <name>', 'auto, cpu, cuda or cuda:N', 'auto')
    .action(demo);
}

async function demo(options: Options): Promise<void> {
  using interrupt = stopOnInterrupt('the demo ends');
  const { out, device } = options;
  const { signal } = interrupt;
  await using lock = await FolderLock.take(out);
  if (lock.warning !== null) output.warning(lock.warning);
  const { addon, why } = chooseDevice({ device });
  await refuseForeign(out);
  await lock.clear();
  if (addon.backend === 'cpu' && device === 'auto' && hasNvidiaDriver()) output.note(why);

  // Outside the run directory, which is replaced: a second demo need not draw them again.
  const cache = join(dirname(out), '.hardmine-cache', 'demo');
  const draw = (name: string, people: typeof TEST): Promise<string> => {
    const note = progressNote(`drawing for ${name}:`);
    return generateFaces({
      ...people,
      out: join(cache, `${name}-${people.imagesPerIdentity}`),
      onProgress: ({ done, total }) => note(done, total),
      signal,
    });
  };
  const testData = await draw('test', TEST);
  const test = await openDataset(testData);
  try {
    const held = await heldOutPairs(test);
    const { imagesPerSecond, untrained } = await tryOut(testData, device);
    const affordable = TRAINING_SECONDS * imagesPerSecond;
    const imagesPerIdentity = Math.max(
      IMAGES_PER_IDENTITY.least,
      Math.min(
        IMAGES_PER_IDENTITY.most,
        Math.floor(affordable / (FEWEST_EPOCHS * TRAIN.identities)),
      ),
    );
    const images = TRAIN.identities * imagesPerIdentity;
    const epochs = Math.max(1, Math.min(MOST_EPOCHS, Math.floor(affordable / images)));
    const data = await draw('training', { ...TRAIN, imagesPerIdentity });
    output.note(
      `training for ${epochs} epochs on ${images} faces of ${TRAIN.identities} people, chosen from the ${imagesPerSecond.toFixed(0)} images per second just measured`,
    );
    const run = await train({ data, out: join(out, 'run'), device, ...settings(epochs) }, signal);

    output.note('evaluating on the people never trained on');
    const path = join(out, 'model.safetensors');
    await copyFile(join(out, 'run', 'best.safetensors'), path);
    const model = await FaceModel.load(path, { device });
    let trained: PairsResult;
    try {
      trained = await held.evaluate(model);
      await model.exportOnnx(join(out, 'model.onnx'));
    } finally {
      await model.dispose();
    }
    const evaluations = [
      { name: 'trained network', result: trained },
      { name: 'untrained network', result: await evaluateUntrained(untrained, device, held) },
      { name: 'pixel similarity', result: await held.evaluate(pixelSimilarity) },
    ];
    await writeReport(join(out, 'report.html'), {
      title: 'Demo: HM-ArcFace on generated faces',
      created: timeText(new Date()),
      config: run.config,
      environment: run.environment,
      metrics: await readMetrics(join(out, 'run', 'metrics.jsonl')),
      trainingSeconds: run.seconds,
      evaluatedOn: `${trained.pairs} pairs of ${TEST.identities} people never trained on`,
      evaluations,
      hardest: await reportFaces(trained, held.face),
    });
    if (options.json) {
      output.json({
        out,
        ...run,
        evaluations: evaluations.map(({ name, result: { details: _, ...figures } }) => ({
          name,
          ...figures,
        })),
      });
      return;
    }
    output.result(
      table([
        ['on people never trained on', 'accuracy', 'std', 'EER'],
        ...evaluations.map(({ name, result }) => [
          name,
          percent(result.accuracy.mean),
          percent(result.accuracy.std),
          percent(result.eer),
        ]),
      ]),
    );
    output.result(`report  ${join(out, 'report.html')}`);
    output.result(`model   ${path} and ${join(out, 'model.onnx')}`);
  } finally {
    await test.dispose();
  }
}

/** What a demo leaves, and what one that was killed had half written. */
const OWN =
  /^(run|report\.html|model\.(safetensors|onnx)|\.hardmine\.lock|\.(report|model)\..*\.tmp)$/;

/** The folder is emptied, so it must hold nothing that a demo has not written. */
async function refuseForeign(out: string): Promise<void> {
  const foreign = (await readdir(out)).find((name) => !OWN.test(name));
  if (foreign === undefined) return;
  throw new HardmineError(
    'ERR_CONFIG',
    `${out} holds ${quote(foreign)}, which is not of an earlier demo, and would be emptied: give a new folder as --out`,
  );
}

/** Pairs of the test set's people, their pixels at hand, and pictures for the report. */
async function heldOutPairs(test: Dataset) {
  const drawn = validationPairs(test.labels, { pairs: PAIRS, seed: TEST.seed });
  const pairs = Array.from(
    drawn.a,
    (a, i): VerificationPair => ({
      a,
      b: drawn.b[i]!,
      same: drawn.same[i] === 1,
      fold: drawn.fold[i]!,
    }),
  );
  const images = await test.records.decode(Int32Array.from(test.labels.keys()));
  return {
    face: (row: number) => reportFace(test.names[test.labels[row]!]!, () => test.records.jpeg(row)),
    async evaluate(model: ScoreModel): Promise<PairsResult> {
      const embeddings = await embedForPairs(model, { images });
      return evaluatePairs({ embeddings, dim: model.embedding, pairs });
    },
  };
}

type HeldOut = Awaited<ReturnType<typeof heldOutPairs>>;

/** Takes the weights of an untrained network and then trains it for some seconds to see how fast that is. */
async function tryOut(
  data: string,
  device: DeviceName,
): Promise<{ imagesPerSecond: number; untrained: TensorMap }> {
  const { addon, execution } = chooseDevice({ device });
  const dataset = await openDataset(data);
  const session = await addon.createSession(
    {
      network: { architecture: 'resnet18', embedding: 512, embeddingBatchNorm: true },
      classes: dataset.identities,
      loss: resolveLoss({ base: { kind: 'arcface' }, weighting: { kind: 'hard-mining' } }).native,
      implementation: 'fused',
      batch: BATCH,
      seed: 1,
    },
    execution,
  );
  const batches = await dataset.records.batches({
    images: Int32Array.from(dataset.labels.keys()),
    labels: dataset.labels,
    batch: BATCH,
    seed: 1,
    mirror: true,
    crop: 0,
    decodeThreads: 1,
    execution: null,
    skip: null,
  });
  try {
    const untrained: TensorMap = new Map();
    for (const { name, shape, role } of session.tensors) {
      if (role === 'optimizer' || name.startsWith('head.')) continue;
      untrained.set(name, { dtype: 'F32', shape, data: await session.read(name) });
    }
    const step = {
      momentum: 0,
      weightDecay: 0,
      decayAll: false,
      marginFactor: 0,
      lambda: 0,
      lr: 0,
    };
    await session.train(batches, [step]);
    const startMs = performance.now();
    let images = 0;
    while (performance.now() - startMs < TRY_OUT_MS) {
      await session.train(batches, [step, step]);
      images += 2 * BATCH;
    }
    return { imagesPerSecond: (1000 * images) / (performance.now() - startMs), untrained };
  } finally {
    await session.dispose();
    await batches.dispose();
    await dataset.dispose();
  }
}

async function evaluateUntrained(
  tensors: TensorMap,
  device: DeviceName,
  held: HeldOut,
): Promise<PairsResult> {
  const model = await FaceModel.fromTensors(tensors, {}, { device });
  try {
    return await held.evaluate(model);
  } finally {
    await model.dispose();
  }
}

async function train(config: ConfigInput, signal: AbortSignal) {
  const trainer = await Trainer.create(config, { signal });
  const log = new TrainingLog();
  const startMs = performance.now();
  try {
    const { plan } = trainer;
    log.start(plan, 0);
    for await (const event of trainer.run({ signal })) log.event(event);
    return {
      config: trainer.config,
      steps: plan.totalSteps,
      seconds: (performance.now() - startMs) / 1000,
      environment: {
        device: plan.device,
        precision: plan.precision,
        threads: String(plan.threads),
      },
      training: log.lastEpoch,
    };
  } finally {
    log.end();
    await trainer.dispose();
  }
}
