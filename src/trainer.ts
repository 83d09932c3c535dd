/** Training as an async iterator of typed events: thin, the work is native. */
import { createHash } from 'node:crypto';
import { availableParallelism } from 'node:os';
import { basename, dirname, join, sep } from 'node:path';
import {
  type Config,
  type ConfigInput,
  changedOnResume,
  configHash,
  lossSettings,
  resolveConfig,
} from './config.js';
import { type DataProgress, type Dataset, openDataset } from './data/dataset.js';
import { exists, throwIfAborted } from './data/files.js';
import { decodeImages } from './data/images.js';
import { recognise } from './data/recognise.js';
import { splitIdentities, validationPairs } from './data/split.js';
import { HardmineError } from './errors.js';
import { readLfwPairs } from './evaluate/lfw.js';
import { embedForPairs, evaluatePairs, type VerificationPair } from './evaluate/pairs.js';
import { bestThreshold } from './evaluate/verification.js';
import type { TensorMap } from './formats/safetensors.js';
import { cosineWeight, expectedFirstLoss, resolveLoss } from './loss.js';
import { type ModelInfo, writeModel } from './model.js';
import {
  type ChosenDevice,
  chooseDevice,
  type NativeDevice,
  type NativeLoss,
  type NativeSession,
  type NativeStepSettings,
  type NativeStepStats,
  type Precision,
} from './native.js';
import {
  type CheckpointState,
  type FoundCheckpoint,
  fileOfTensor,
  findCheckpoint,
  readCheckpointTensors,
  removeStale,
  writeCheckpoint,
} from './train/checkpoint.js';
import { checkDataSource, type DataSource, fingerprintOfSource } from './train/data-source.js';
import {
  type DiskEstimate,
  estimateDisk,
  formatBytes,
  type TrainingEstimate,
} from './train/estimate.js';
import {
  checkEvaluation,
  evaluateBest,
  evaluatedSets,
  evaluationFigures,
  type FinalResult,
  isPairsFile,
} from './train/evaluation.js';
import { type Feed, ringFeed, SourceFeed } from './train/feed.js';
import {
  checkFirstLoss,
  Health,
  meanProgress,
  type Progress,
  type WarningKind,
} from './train/health.js';
import { type MetricsLine, RunDirectory, type SkippedLine } from './train/run-directory.js';
import { ifSound, type RunStatus, readStatus, scoresFile } from './train/run-files.js';
import {
  faceFiles,
  type Progress as ReportedProgress,
  RunReport,
  reportFace,
  type ValidationShown,
} from './train/run-report.js';
import { stepSettings, stepsPerCall } from './train/schedule.js';
import { SkippedImages } from './train/skipped.js';

/** Pairs drawn from held-out identities: as many as LFW's View 2 has. */
const VALIDATION_PAIRS = 6000;
/** Held-out images decoded and embedded at a time. */
const EMBED_IMAGES = 64;
/** CPU threads that share one decoder: decoding takes about a tenth of what a training step takes. */
const THREADS_PER_DECODER = 8;

/** Some steps are done: as many as about a quarter of a second takes. */
export type StepEvent = { type: 'step' } & MetricsLine;

/** An epoch has ended; means as StepEvent has them. */
export interface EpochEvent {
  type: 'epoch';
  /** The epoch that has ended, from 1. */
  epoch: number;
  /** Steps done in all. */
  step: number;
  /** Means over the whole epoch. */
  loss: number;
  baseLoss: number;
  accuracy: number;
  silenced: number;
  kept: number;
  amplified: number;
}

/** The network was tried on pairs that it is not trained on. */
export interface ValidationEvent {
  type: 'validation';
  epoch: number;
  step: number;
  pairs: number;
  /** Mean over folds of the verification accuracy, 0 to 1. */
  accuracy: number;
  /** Cosine similarity that parts the pairs best, -1 to 1; the model file's `threshold`. */
  threshold: number;
  /** Whether no earlier epoch was as good. */
  best: boolean;
}

/** LFW or YouTube Faces at the end, by the best model; `result.dataset` says which. */
export interface EvaluationEvent {
  type: 'evaluation';
  result: FinalResult;
  /** Path of the model. */
  model: string;
}

/** A checkpoint was written, durable, and older ones beyond `keep` removed. */
export interface CheckpointEvent {
  type: 'checkpoint';
  step: number;
  /** Its folder. */
  path: string;
}

/** Something looks wrong; the run goes on. */
export interface WarningEvent {
  type: 'warning';
  kind: WarningKind;
  /** One sentence for people. */
  message: string;
}

/**
 * A damaged image was left out (`onBadRecord: skip`) and the next sound one of the epoch's order took its
 * place; said once of each image, and written into skipped.tsv.
 */
export type SkippedEvent = { type: 'skipped' } & SkippedLine;

/** What run() yields: `type` says which. */
export type TrainerEvent =
  | StepEvent
  | EpochEvent
  | ValidationEvent
  | EvaluationEvent
  | CheckpointEvent
  | SkippedEvent
  | WarningEvent;

/** What a run is going to do. */
export interface TrainingPlan {
  /** Images and identities that train, and those held out for validation. */
  images: number;
  identities: number;
  heldOutImages: number;
  stepsPerEpoch: number;
  totalSteps: number;
  backend: 'cpu' | 'cuda';
  device: string;
  precision: Precision;
  threads: number;
}

/** An estimate tries the first step, which is slower, and then goes on for this long. */
const ESTIMATE_MS = 3000;

/** Pairs that choose `best`, how to embed their images, and how to show them. */
interface Validation extends Pick<ValidationShown, 'dataset' | 'rows' | 'face'> {
  pairs: readonly VerificationPair[];
  embed(): Promise<Float32Array>;
}

interface Parts {
  config: Config;
  loss: NativeLoss;
  plan: TrainingPlan;
  /** Null: the images come from a source of the program's own. */
  dataset: Dataset | null;
  data: CheckpointState['data'];
  environment: Record<string, string>;
  session: NativeSession;
  feed: Feed;
  validation: Validation | null;
  directory: RunDirectory;
  start: FoundCheckpoint | null;
  /** Null: a damaged image ends the run. */
  skipped: SkippedImages | null;
  disk: DiskEstimate;
  /** Bytes taken on the GPU; null on the CPU. */
  deviceMemory: (() => number) | null;
  /** What is said before the first step. */
  news: (WarningEvent | SkippedEvent)[];
}

/**
 * A configuration as `hardmine train` takes it, by whose names and ranges it is checked; `data` may be a
 * source of images instead of a path. There is no identity to hold out of a source: its `validation` is
 * none unless it is a pairs file.
 */
export type TrainerInput = Omit<ConfigInput, 'data'> & { data: string | DataSource };

export interface TrainerOptions {
  /** Told of the preparation of the training data. */
  onProgress?: (progress: DataProgress) => void;
  /** Stops the preparation. */
  signal?: AbortSignal;
}

/**
 * Trains one network. Make it with Trainer.create, iterate over run() once, then dispose() it.
 */
export class Trainer {
  /** With every default filled in, and the precision that the device gave. */
  readonly config: Config;
  readonly plan: TrainingPlan;
  private state: 'idle' | 'running' | 'done' | 'disposed' = 'idle';
  private step = 0;
  private epochParts: Progress[] = [];
  private validations: CheckpointState['validations'] = [];
  private secondsBefore = 0;
  private startedMs = performance.now();
  private msPerStep: number | null = null;
  private checkpointed: { step: number; path: string } | null = null;
  private readonly disposal = new AbortController();
  private readonly health: Health;
  private report: RunReport | null = null;
  /** What run() goes through. */
  private events: AsyncGenerator<TrainerEvent, void, void> | null = null;
  /** Whether run() came to the end of its run. */
  private finished = false;

  private constructor(private readonly parts: Parts) {
    this.config = parts.config;
    this.plan = parts.plan;
    this.health = new Health(
      parts.config,
      parts.loss,
      parts.plan.identities,
      parts.plan.stepsPerEpoch,
    );
    const { start } = parts;
    if (start) {
      const { step, epochProgress, validations, seconds } = start.state;
      this.step = step;
      this.epochParts = epochProgress ? [epochProgress] : [];
      this.validations = validations;
      this.secondsBefore = seconds;
      this.checkpointed = { step, path: start.path };
    }
  }

  /** Steps done so far. */
  get stepsDone(): number {
    return this.step;
  }

  /**
   * Checks the configuration, opens and, where needed, packs the data, and makes the network; with
   * `resume` it takes up the newest sound checkpoint. The run directory is its own from here on, until run()
   * or dispose() has ended; nothing but the lock is written there.
   *
   * @throws HardmineError ERR_BUSY while another process, or another Trainer, has the run directory;
   *   ERR_CONFIG for settings, and on resumption for those of another run; ERR_IO for a run directory that
   *   cannot be written; ERR_DATA for data, ERR_PROTOCOL for lists of pairs;
   *   ERR_CHECKPOINT where no checkpoint is sound; ERR_DEVICE_UNAVAILABLE, ERR_DEVICE_OOM, ERR_ADDON;
   *   ERR_ABORTED after `options.signal`.
   */
  static async create(input: TrainerInput, options: TrainerOptions = {}): Promise<Trainer> {
    const { asked, source } = resolveInput(input);
    const { native: loss } = resolveLoss(lossSettings(asked));
    if (!source) await refuseInside(asked);
    const directory = await RunDirectory.claim(asked.out, asked.resume);
    const dispose: { dispose(): Promise<void> }[] = [{ dispose: () => directory.close() }];
    try {
      await checkEvaluation(asked);
      const found = asked.resume ? await resumeFrom(directory, asked) : null;
      const precision = asked.precision ?? found?.config.precision;
      const { addon, device, execution } = chooseDevice({
        device: asked.device,
        threads: asked.threads,
        deterministic: asked.deterministic,
        ...(precision && { precision }),
      });
      const config: Config = { ...asked, precision: execution.precision };
      const news: Parts['news'] = found?.warnings ?? [];
      if (directory.warning !== null) {
        news.push({ type: 'warning', kind: 'lock', message: directory.warning });
      }
      const material = source ? ofSource(source, config) : await ofDataset(config, options);
      dispose.push(material);
      const { data, dataset, images, classes } = material;
      if (found?.checkpoint) checkSameData(config.data, found.checkpoint.state.data, data);
      const skipped = dataset && config.onBadRecord === 'skip' ? new SkippedImages(dataset) : null;
      let { heldOut } = material;
      if (skipped) {
        if (found?.checkpoint) {
          skipped.resume(await directory.readSkipped(found.checkpoint.state.step));
        }
        heldOut = await soundOnly(heldOut, skipped, news);
      }
      if (images < config.batch) {
        throw new HardmineError(
          'ERR_DATA',
          `${config.data} has ${images} images to train on, fewer than the batch of ${config.batch}: lower batch to at most that, or add images`,
        );
      }
      const threads = execution.threads || device.threads;
      const session = await addon.createSession(
        {
          network: {
            architecture: config.network,
            embedding: config.embedding,
            embeddingBatchNorm: config.embeddingNorm === 'batch',
          },
          classes,
          loss,
          implementation: 'fused',
          batch: config.batch,
          seed: config.seed,
        },
        execution,
      );
      dispose.push(session);
      const { epoch, stepInEpoch } = found?.checkpoint?.state ?? { epoch: 1, stepInEpoch: 0 };
      const start = { epoch, step: stepInEpoch };
      const feed = await material.feed(session, start, { addon, execution, threads, skipped });
      dispose.push(feed);
      const environment = environmentOf(addon.backend, device, config, threads, session.engines);
      if (found?.checkpoint) {
        await restore(session, found.checkpoint);
        news.push(...environmentWarnings(found.checkpoint.state.environment, environment));
      }
      const disk = await estimateDisk(config.out, session.tensors, config.keep);
      news.push(...diskWarnings(config, disk, found?.checkpoint != null));
      return new Trainer({
        config,
        loss,
        plan: {
          images,
          identities: classes,
          heldOutImages: heldOut?.images.length ?? 0,
          stepsPerEpoch: feed.stepsPerEpoch,
          totalSteps: feed.stepsPerEpoch * config.epochs,
          backend: addon.backend,
          device: device.name,
          precision: execution.precision,
          threads,
        },
        dataset,
        data,
        environment,
        session,
        feed,
        validation: await validationOf(config, material, heldOut, session),
        directory,
        start: found?.checkpoint ?? null,
        skipped,
        disk,
        deviceMemory:
          addon.backend === 'cuda'
            ? () => device.freeBytes - addon.device(execution.device).freeBytes
            : null,
        news,
      });
    } catch (error) {
      for (const part of dispose.reverse()) await part.dispose();
      throw error;
    }
  }

  /**
   * Trains to the end and yields what happens. After `signal` it stops at the next step, writes a
   * checkpoint and throws ERR_ABORTED, which names it; any other error leaves the checkpoints as they
   * are. Leaving the loop stops between two steps, without a checkpoint. At its end, whichever, the run
   * directory is free again.
   *
   * @throws HardmineError ERR_BUSY when it was called before, ERR_NON_FINITE when the loss is no finite
   *   number, ERR_DATA for a damaged image or a source's mistake, ERR_IO when writing fails,
   *   ERR_DEVICE_LOST, ERR_DISPOSED.
   */
  async *run({ signal }: { signal?: AbortSignal } = {}): AsyncGenerator<TrainerEvent, void, void> {
    this.begin();
    this.events = this.train(signal);
    yield* this.events;
    if (!this.finished) throw disposedError();
  }

  private async *train(signal: AbortSignal | undefined): AsyncGenerator<TrainerEvent, void, void> {
    const { config, directory, feed, plan } = this.parts;
    const cancel = () => feed.cancel();
    signal?.addEventListener('abort', cancel);
    const { signal: disposed } = this.disposal;
    try {
      const earlier = await directory.open(config, this.step);
      await removeStale(directory.checkpoints);
      if (this.step === plan.totalSteps && (await this.wasFinished())) {
        this.finished = true;
        yield* this.parts.news;
        return;
      }
      // Of a run that was finished and goes on for more epochs.
      await directory.remove(['evaluation.json', scoresFile('lfw'), scoresFile('ytf')]);
      this.report = this.makeReport();
      await this.report.resume(earlier, this.validations);
      if (this.parts.skipped) await directory.writeSkipped(this.parts.skipped.lines);
      yield* this.parts.news;
      this.startedMs = performance.now();
      while (this.step < plan.totalSteps) {
        if (signal?.aborted) {
          const event = await this.checkpoint();
          yield event;
          throw new HardmineError(
            'ERR_ABORTED',
            `training was stopped after step ${this.step} of ${plan.totalSteps}; go on from ${event.path} with --resume`,
            { cause: signal.reason },
          );
        }
        yield* this.trainSome();
      }
      yield* this.finish(signal ? AbortSignal.any([signal, disposed]) : disposed);
      this.finished = true;
    } catch (error) {
      throw disposed.aborted ? disposedError(error) : error;
    } finally {
      signal?.removeEventListener('abort', cancel);
      // What ended the run early is what there is to tell.
      if (!this.finished) await this.report?.end(this.progress('stopped')).catch(() => undefined);
      if (this.state === 'running') this.state = 'done';
      try {
        await feed.dispose();
      } finally {
        await directory.close();
      }
    }
  }

  /**
   * What the steps that are left will take, found by training for some seconds. Nothing is written, and
   * this Trainer can only be disposed of then.
   *
   * @throws HardmineError ERR_ABORTED after `signal`, ERR_INPUT when no step is left; what run() throws
   */
  async estimate({ signal }: { signal?: AbortSignal } = {}): Promise<TrainingEstimate> {
    this.begin();
    const { config, feed, plan, disk, deviceMemory, news } = this.parts;
    const left = plan.totalSteps - this.step;
    if (left === 0) {
      throw new HardmineError(
        'ERR_INPUT',
        `${config.out} is finished: no step is left to estimate; give more epochs`,
      );
    }
    const cancel = () => feed.cancel();
    signal?.addEventListener('abort', cancel);
    let tried = 0;
    let [steps, ms] = [0, 0];
    try {
      while (tried < left && ms < ESTIMATE_MS) {
        throwIfAborted(signal, 'the estimate');
        const perCall: number = stepsPerCall(steps > 0 ? ms / steps : null, left - tried);
        const settings = Array.from({ length: perCall }, (_, i) =>
          stepSettings(config, this.step + tried + i, plan.stepsPerEpoch),
        );
        const startMs = performance.now();
        await feed.train(settings);
        this.disposal.signal.throwIfAborted();
        // The first step is slower than the others, so it counts only where it is the only one.
        if (tried === 1) [steps, ms] = [0, 0];
        steps += perCall;
        ms += performance.now() - startMs;
        tried += perCall;
      }
      throwIfAborted(signal, 'the estimate');
    } catch (error) {
      throw this.disposal.signal.aborted ? disposedError(error) : error;
    } finally {
      signal?.removeEventListener('abort', cancel);
    }
    return {
      ...disk,
      imagesPerSecond: (1000 * config.batch * steps) / ms,
      seconds: (left * ms) / steps / 1000,
      memoryBytes: 1024 * process.resourceUsage().maxRSS,
      deviceMemoryBytes: deviceMemory?.() ?? null,
      warnings: news.flatMap((event) => (event.type === 'warning' ? [event.message] : [])),
    };
  }

  /** Stops work under way and frees everything, the run directory too; may be called twice. */
  async dispose(): Promise<void> {
    this.state = 'disposed';
    this.disposal.abort();
    const { feed, session, dataset, directory } = this.parts;
    await session.dispose();
    try {
      await feed.dispose();
    } finally {
      // The run directory is locked for as long as anything is written there.
      await this.events?.return();
      await dataset?.dispose();
      await directory.close();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  private begin(): void {
    if (this.state === 'disposed') throw disposedError();
    if (this.state !== 'idle') {
      throw new HardmineError(
        'ERR_BUSY',
        'run() or estimate() of this Trainer was called already: create a new one, with resume to go on with the run',
      );
    }
    this.state = 'running';
  }

  private get seconds(): number {
    return this.secondsBefore + (performance.now() - this.startedMs) / 1000;
  }

  /** The epoch that the next step belongs to, from 1, and its steps done. */
  private get position(): { epoch: number; stepInEpoch: number } {
    const { stepsPerEpoch } = this.plan;
    return {
      epoch: 1 + Math.floor(this.step / stepsPerEpoch),
      stepInEpoch: this.step % stepsPerEpoch,
    };
  }

  /** One native call and what falls due after it. */
  private async *trainSome(): AsyncGenerator<TrainerEvent, void, void> {
    const { config, directory } = this.parts;
    const { stepsPerEpoch, totalSteps } = this.plan;
    const { epoch, stepInEpoch } = this.position;
    const toCheckpoint = config.checkpointEvery
      ? config.checkpointEvery - (this.step % config.checkpointEvery)
      : stepsPerEpoch;
    const boundary = Math.min(stepsPerEpoch - stepInEpoch, toCheckpoint);
    const first = this.step;
    const settings = Array.from({ length: stepsPerCall(this.msPerStep, boundary) }, (_, i) =>
      stepSettings(config, first + i, stepsPerEpoch),
    );
    const startMs = performance.now();
    const training = this.trainSteps(settings);
    this.report?.tick(this.progress('running')); // while the device works
    const stats = await training;
    const done = stats.length;
    if (done === 0) return; // cancelled before the first step
    const callMs = performance.now() - startMs;
    this.msPerStep = callMs / done;
    this.step += done;
    const progress = progressOf(stats);
    this.epochParts.push(progress);

    const last = settings[done - 1]!;
    const { steps: _, rows, ...means } = progress;
    const line: MetricsLine = {
      step: this.step,
      epoch,
      time: this.seconds,
      ...means,
      lr: last.lr,
      imagesPerSecond: (1000 * rows) / callMs,
      marginFactor: last.marginFactor,
      lambda: last.lambda,
    };
    await directory.append(line, rows);
    this.report?.step(line, stats);
    yield { type: 'step', ...line };
    yield* this.skips();
    yield* this.reportFailure();
    if (first === 0) yield* this.checkFirst(stats[0]!, settings[0]!.marginFactor);
    for (const warning of [
      ...this.health.observeSteps(stats, first + 1),
      ...this.health.observe(progress, this.step, last.marginFactor),
    ]) {
      yield { type: 'warning', ...warning };
    }

    const endsEpoch = this.step % stepsPerEpoch === 0;
    if (endsEpoch) yield* this.endEpoch(epoch);
    const due = config.checkpointEvery
      ? this.step % config.checkpointEvery === 0 || this.step === totalSteps
      : endsEpoch;
    if (due) yield await this.checkpoint();
  }

  /** One native call; of a number that is not finite it says at which step, and what is still sound. */
  private async trainSteps(settings: NativeStepSettings[]): Promise<NativeStepStats[]> {
    const { session, feed } = this.parts;
    const before = session.stepsDone();
    try {
      return await feed.train(settings);
    } catch (error) {
      if (!(error instanceof HardmineError) || error.code !== 'ERR_NON_FINITE') throw error;
      const step = this.step + session.stepsDone() - before + 1;
      const sound = this.checkpointed
        ? `the last good checkpoint is ${this.checkpointed.path}`
        : 'there is no checkpoint yet';
      throw new HardmineError(error.code, `step ${step}, ${sound}: ${error.message}`, {
        cause: error,
      });
    }
  }

  /** What the steps since the last look had to leave out. */
  private async *skips(): AsyncGenerator<TrainerEvent, void, void> {
    const { feed, directory, skipped } = this.parts;
    if (!skipped) return;
    const { lines, warnings } = skipped.add(feed.skipped(), this.step);
    if (lines.length === 0) return;
    await directory.writeSkipped(skipped.lines);
    for (const line of lines) yield { type: 'skipped', ...line };
    for (const warning of warnings) yield { type: 'warning', ...warning };
  }

  private *checkFirst(stats: NativeStepStats, marginFactor: number): Iterable<TrainerEvent> {
    const { config, loss, plan } = this.parts;
    const inForce = {
      ...loss,
      m1: 1 + (loss.m1 - 1) * marginFactor,
      m2: loss.m2 * marginFactor,
      m3: loss.m3 * marginFactor,
      euclidean: { ...loss.euclidean, margin: loss.euclidean.margin * marginFactor },
    };
    const expected = expectedFirstLoss(
      inForce,
      plan.identities,
      config.embedding,
      stats.embeddingNorm,
    );
    const warning = checkFirstLoss(
      stats.baseLoss,
      expected,
      cosineWeight(inForce, stats.embeddingNorm),
      config,
    );
    if (warning) yield { type: 'warning', ...warning };
  }

  private async *endEpoch(epoch: number): AsyncGenerator<TrainerEvent, void, void> {
    const { config, directory, session, validation } = this.parts;
    const mean = meanProgress(this.epochParts);
    this.epochParts = [];
    this.report?.endEpoch();
    yield {
      type: 'epoch',
      epoch,
      step: this.step,
      loss: mean.loss,
      baseLoss: mean.baseLoss,
      accuracy: mean.accuracy,
      silenced: mean.silenced,
      kept: mean.kept,
      amplified: mean.amplified,
    };
    // Of fp16 alone.
    if (session.tensors.some(({ name }) => name === 'loss_scale')) {
      const scale = (await session.read('loss_scale'))[0]!;
      await directory.scalars(this.step, { 'training/lossScale': scale });
      for (const warning of this.health.observeLossScale(scale, this.step)) {
        yield { type: 'warning', ...warning };
      }
    }
    if (epoch % config.validateEvery !== 0 && epoch !== config.epochs) return;
    const info: ModelInfo = { configHash: configHash(config) };
    let isBest = true;
    if (validation) {
      const event = await this.validate(validation, epoch);
      info.threshold = event.threshold;
      isBest = event.best;
      await directory.scalars(this.step, { 'validation/accuracy': event.accuracy });
      yield event;
    }
    await this.saveModels(info, isBest);
  }

  private async validate(validation: Validation, epoch: number): Promise<ValidationEvent> {
    const { pairs } = validation;
    const result = evaluatePairs({
      embeddings: await validation.embed(),
      dim: this.config.embedding,
      pairs,
    });
    const accuracy = result.accuracy.mean;
    // Of unit vectors, |a - b|^2 = 2 - 2 cos.
    const cosines = result.details.distances.map((distance) => 1 - distance / 2);
    const best = this.validations.every((earlier) => accuracy > earlier.accuracy);
    this.validations.push({ epoch, step: this.step, accuracy });
    await this.report?.validated({ epoch, result, ...validation }, best);
    return {
      type: 'validation',
      epoch,
      step: this.step,
      pairs: pairs.length,
      accuracy,
      threshold: bestThreshold(cosines, result.details.same),
      best,
    };
  }

  private async saveModels(info: ModelInfo, best: boolean): Promise<void> {
    const { directory } = this.parts;
    const tensors = (await this.readTensors()).model;
    await writeModel(directory.file('last.safetensors'), tensors, info);
    if (best) await writeModel(directory.file('best.safetensors'), tensors, info);
  }

  private async readTensors(): Promise<Record<'model' | 'head' | 'optimizer', TensorMap>> {
    const { session } = this.parts;
    const files = { model: new Map(), head: new Map(), optimizer: new Map() } satisfies Record<
      string,
      TensorMap
    >;
    for (const { name, shape, role } of session.tensors) {
      const tensor = { dtype: 'F32', shape, data: await session.read(name) } as const;
      files[fileOfTensor({ name, role })].set(name, tensor);
    }
    return files;
  }

  private async checkpoint(): Promise<CheckpointEvent> {
    const { config, directory, data, environment } = this.parts;
    const { epoch, stepInEpoch } = this.position;
    const path = await writeCheckpoint(
      directory.checkpoints,
      await this.readTensors(),
      {
        step: this.step,
        epoch,
        stepInEpoch,
        seconds: this.seconds,
        epochProgress: this.epochParts.length > 0 ? meanProgress(this.epochParts) : null,
        validations: this.validations,
        config: { ...config },
        configHash: configHash(config),
        data,
        environment,
      },
      config.keep,
    );
    this.checkpointed = { step: this.step, path };
    return { type: 'checkpoint', ...this.checkpointed };
  }

  /** LFW and YouTube Faces, once, by the best model, and the report. */
  private async *finish(signal: AbortSignal): AsyncGenerator<TrainerEvent, void, void> {
    const { config, directory } = this.parts;
    if (this.checkpointed?.step !== this.step) yield await this.checkpoint();
    if (this.disposal.signal.aborted) throw disposedError();
    const model = directory.file('best.safetensors');
    const evaluations: FinalResult[] = [];
    this.report?.tick(this.progress('running'));
    for await (const result of evaluateBest(model, config, signal)) {
      evaluations.push(result);
      await directory.writeJson('evaluation.json', evaluationFigures(evaluations, model));
      await directory.scalars(this.step, { [`${result.dataset}/accuracy`]: result.accuracy.mean });
      await this.report?.evaluated(result);
      yield { type: 'evaluation', result, model };
      this.report?.tick(this.progress('running'));
    }
    // Its status is written last: where that says so, the run is finished.
    await this.report?.end(this.progress('finished'));
  }

  /** Whether the run that is taken up was trained and evaluated to its end. */
  private async wasFinished(): Promise<boolean> {
    const { directory, config } = this.parts;
    const status = await ifSound(readStatus(directory.file('status.json')));
    if (status?.state !== 'finished' || status.step !== this.step) return false;
    // A test set may be asked for only now.
    const judged = evaluatedSets(config).map((set) => exists(directory.file(scoresFile(set))));
    return (await Promise.all(judged)).every(Boolean);
  }

  private makeReport(): RunReport {
    const { config, plan, directory, environment, dataset } = this.parts;
    return new RunReport({
      directory,
      config,
      environment,
      summary: describeRun(config, plan),
      totalSteps: plan.totalSteps,
      face:
        dataset &&
        ((image) =>
          reportFace(dataset.names[dataset.labels[image]!]!, () => dataset.records.jpeg(image))),
    });
  }

  private progress(state: RunStatus['state']): ReportedProgress {
    const { step, validations, seconds } = this;
    const epoch = Math.min(this.position.epoch, this.parts.config.epochs);
    return { state, step, epoch, seconds, validations };
  }

  /** A page that cannot be written ends no training. */
  private *reportFailure(): Iterable<WarningEvent> {
    const failure = this.report?.takeFailure();
    if (failure) {
      const reason = failure instanceof Error ? failure.message : String(failure);
      yield { type: 'warning', kind: 'report', message: `the report falls behind: ${reason}` };
    }
  }
}

/** What is trained and on what, in a sentence. */
function describeRun(config: Config, plan: TrainingPlan): string {
  const { loss, weighting, network, epochs, batch } = config;
  const over = weighting.kind === 'none' ? '' : ` with ${weighting.kind}`;
  const held = plan.heldOutImages > 0 ? ` (${plan.heldOutImages} more held out)` : '';
  return `${network} by ${loss}${over}: ${plan.images} images of ${plan.identities} people${held}, ${epochs} epochs of ${plan.stepsPerEpoch} steps with ${batch} images each, on ${plan.device} in ${plan.precision}.`;
}

function disposedError(cause?: unknown): HardmineError {
  return new HardmineError('ERR_DISPOSED', 'this Trainer was disposed: create a new one', {
    cause,
  });
}

function progressOf(stats: readonly NativeStepStats[]): Progress {
  return meanProgress(
    stats.map(({ rows, correct, silenced, kept, amplified, ...means }) => ({
      ...means,
      steps: 1,
      rows,
      accuracy: correct / rows,
      silenced: silenced / rows,
      kept: kept / rows,
      amplified: amplified / rows,
    })),
  );
}

/** What a run trains on. */
interface Material {
  /** Null: a source of the program's own. */
  dataset: Dataset | null;
  data: CheckpointState['data'];
  /** Images and classes that train. */
  images: number;
  classes: number;
  heldOut: HeldOut | null;
  /** @param start the epoch (from 1) of the first batch, and its number there (from 0) */
  feed(
    session: NativeSession,
    start: { epoch: number; step: number },
    how: Pick<ChosenDevice, 'addon' | 'execution'> & {
      threads: number;
      skipped: SkippedImages | null;
    },
  ): Promise<Feed>;
  dispose(): Promise<void>;
}

/** A configuration checked, and the source of images that it may hold. */
function resolveInput(input: TrainerInput): { asked: Config; source: DataSource | null } {
  const data: unknown = input?.data;
  if (data === null || typeof data !== 'object')
    return { asked: resolveConfig(input), source: null };
  const source = data as DataSource;
  checkDataSource(source);
  const asked = resolveConfig({ validation: 'none', ...input, data: source.name });
  for (const [key, value] of [
    ['validation', 'identities'],
    ['onBadRecord', 'skip'],
  ] as const) {
    if (asked[key] !== value) continue;
    throw new HardmineError(
      'ERR_CONFIG',
      `the configuration's "${key}" is ${value}, which needs a data set on the disk, and "data" is a source: leave ${key} out`,
    );
  }
  return { asked: { ...asked, data: source.name }, source };
}

/** The files of a run would be taken for images of people, and the set never opened again. */
async function refuseInside({ data, out }: Config): Promise<void> {
  const inside = out === data || out.startsWith(join(data, sep));
  if (!inside || (await recognise(data)).kind !== 'folder') return;
  throw new HardmineError(
    'ERR_CONFIG',
    `the run directory ${out} lies in the training data ${data}, whose folders are people: give another one as --out`,
  );
}

function ofSource(source: DataSource, config: Config): Material {
  return {
    dataset: null,
    data: fingerprintOfSource(source),
    images: source.images,
    classes: source.identities,
    heldOut: null,
    feed: async (session, start) => new SourceFeed(source, session, config, start),
    dispose: async () => undefined,
  };
}

async function ofDataset(config: Config, options: TrainerOptions): Promise<Material> {
  const dataset = await openDataset(config.data, {
    cacheDir: join(dirname(config.out), '.hardmine-cache'),
    ...options,
  });
  try {
    const { train, validation } = splitOf(dataset, config);
    return {
      dataset,
      data: fingerprintOf(dataset),
      images: train.images.length,
      classes: train.classes,
      heldOut: validation,
      async feed(session, start, { addon, execution, threads, skipped }) {
        const batches = await dataset.records.batches({
          images: train.images,
          labels: train.labels,
          batch: config.batch,
          seed: config.seed,
          mirror: config.augment.flip,
          crop: config.augment.crop,
          decodeThreads:
            addon.backend === 'cpu'
              ? Math.max(1, Math.round(threads / THREADS_PER_DECODER))
              : Math.min(16, availableParallelism()),
          execution: addon.backend === 'cuda' ? execution : null,
          skip: skipped && { most: skipped.most, known: skipped.known },
        });
        await batches.seek(start.epoch, start.step);
        return ringFeed(session, batches);
      },
      dispose: () => dataset.dispose(),
    };
  } catch (error) {
    await dataset.dispose();
    throw error;
  }
}

interface Resumption {
  /** As it was. */
  config: Config;
  checkpoint: FoundCheckpoint | null;
  warnings: WarningEvent[];
}

async function resumeFrom(directory: RunDirectory, asked: Config): Promise<Resumption> {
  const config = resolveConfig(await directory.readConfig());
  const changed = changedOnResume(config, {
    ...asked,
    ...(asked.precision === undefined && config.precision && { precision: config.precision }),
  });
  if (changed !== null) {
    throw new HardmineError(
      'ERR_CONFIG',
      `the run in ${directory.path} was started with ${changed} ${JSON.stringify(config[changed] ?? null)} and cannot go on with ${JSON.stringify(asked[changed] ?? null)}: leave ${changed} as it was, or start another run`,
    );
  }
  const { found, rejected } = await findCheckpoint(directory.checkpoints);
  const warnings = rejected.map(
    (message): WarningEvent => ({
      type: 'warning',
      kind: 'checkpoint',
      message,
    }),
  );
  const begun = found ? found.state.epoch - (found.state.stepInEpoch > 0 ? 0 : 1) : 0;
  if (begun > asked.epochs) {
    throw new HardmineError(
      'ERR_CONFIG',
      `the run in ${directory.path} has epoch ${begun} behind it or under way and cannot end after epoch ${asked.epochs}: give epochs as ${begun} or more`,
    );
  }
  if (found === null) {
    warnings.push({
      type: 'warning',
      kind: 'checkpoint',
      message: `${directory.path} has no checkpoint yet, so training starts at step 0`,
    });
  }
  return { config, checkpoint: found, warnings };
}

function fingerprintOf(dataset: Dataset): CheckpointState['data'] {
  const { labels, records } = dataset;
  const hash = createHash('sha256');
  hash.update(new Uint8Array(labels.buffer, labels.byteOffset, labels.byteLength));
  const { offsets } = records;
  hash.update(new Uint8Array(offsets.buffer, offsets.byteOffset, offsets.byteLength));
  return { images: dataset.images, identities: dataset.identities, sha256: hash.digest('hex') };
}

function checkSameData(
  path: string,
  before: CheckpointState['data'],
  now: CheckpointState['data'],
): void {
  if (before.sha256 === now.sha256) return;
  throw new HardmineError(
    'ERR_CONFIG',
    `${path} is not the data that the run was started with (${now.images} images of ${now.identities} identities now, ${before.images} of ${before.identities} then, or in another order): give the same data, or start another run`,
  );
}

/** Images of a data set that do not train, and the identity of each. */
interface HeldOut {
  images: Int32Array;
  labels: Int32Array;
}

interface Split {
  train: { images: Int32Array; labels: Int32Array; classes: number };
  validation: HeldOut | null;
}

function splitOf(dataset: Dataset, config: Config): Split {
  if (config.validation === 'identities') return splitIdentities(dataset, { seed: config.seed });
  const { labels, identities } = dataset;
  const images = Int32Array.from(labels.keys());
  return { train: { images, labels, classes: identities }, validation: null };
}

/** Held-out images without the damaged ones, which are told of before the first step. */
async function soundOnly(
  heldOut: HeldOut | null,
  skipped: SkippedImages,
  news: Parts['news'],
): Promise<HeldOut | null> {
  if (!heldOut) return null;
  const damaged = await skipped.damagedOf(heldOut.images);
  const { lines, warnings } = skipped.add(damaged, 0);
  news.push(...lines.map((line): SkippedEvent => ({ type: 'skipped', ...line })));
  news.push(...warnings.map((warning): WarningEvent => ({ type: 'warning', ...warning })));
  const indices = new Set(damaged.map(({ index }) => index));
  const sound = [...heldOut.images.keys()].filter((i) => !indices.has(heldOut.images[i]!));
  return {
    images: Int32Array.from(sound, (i) => heldOut.images[i]!),
    labels: Int32Array.from(sound, (i) => heldOut.labels[i]!),
  };
}

async function validationOf(
  config: Config,
  { dataset }: Material,
  heldOut: HeldOut | null,
  session: NativeSession,
): Promise<Validation | null> {
  if (heldOut && dataset) return heldOutValidation(config, dataset, heldOut, session);
  if (!isPairsFile(config)) return null;
  const { paths, pairs } = await readLfwPairs(config.lfw!, config.validation, '--validation');
  const rows = paths.map((path) => basename(path));
  const model = {
    embedding: config.embedding,
    async embed(
      images: Uint8Array | readonly string[],
      { mirror = false } = {},
    ): Promise<Float32Array> {
      return session.embed(
        images instanceof Uint8Array ? images : await decodeImages(images),
        mirror,
      );
    },
  };
  return {
    pairs,
    dataset: basename(config.validation),
    rows,
    face: faceFiles(paths),
    embed: () => embedForPairs(model, { images: paths }),
  };
}

/** Pairs of held-out identities; only images that a pair names are embedded. */
function heldOutValidation(
  config: Config,
  dataset: Dataset,
  heldOut: HeldOut,
  session: NativeSession,
): Validation {
  const drawn = validationPairs(heldOut.labels, { pairs: VALIDATION_PAIRS, seed: config.seed });
  const rows = new Map<number, number>();
  const rowOf = (position: number): number => {
    const row = rows.get(position) ?? rows.size;
    rows.set(position, row);
    return row;
  };
  const pairs = Array.from(
    drawn.a,
    (a, i): VerificationPair => ({
      a: rowOf(a),
      b: rowOf(drawn.b[i]!),
      same: drawn.same[i] === 1,
      fold: drawn.fold[i]!,
    }),
  );
  const indices = Int32Array.from([...rows.keys()], (position) => heldOut.images[position]!);
  const embed = async (): Promise<Float32Array> => {
    const embeddings = new Float32Array(indices.length * config.embedding);
    for (let from = 0; from < indices.length; from += EMBED_IMAGES) {
      const pixels = await dataset.records.decode(indices.subarray(from, from + EMBED_IMAGES));
      const plain = await session.embed(pixels, false);
      const mirrored = await session.embed(pixels, true);
      embeddings.set(
        plain.map((value, i) => value + mirrored[i]!),
        from * config.embedding,
      );
    }
    return embeddings;
  };
  const { labels, names, records } = dataset;
  const rowNames = Array.from(
    indices,
    (index) => `${records.keys[index]} ${names[labels[index]!]}`,
  );
  const face = (row: number) => {
    const index = indices[row]!;
    return reportFace(names[labels[index]!]!, () => records.jpeg(index));
  };
  return { pairs, dataset: 'held-out people', rows: rowNames, face, embed };
}

/** What the bits of a run depend on besides its configuration. */
function environmentOf(
  backend: string,
  device: NativeDevice,
  config: Config,
  threads: number,
  engines: string,
): Record<string, string> {
  return {
    backend,
    device: device.name,
    ...device.details,
    threads: String(threads),
    precision: config.precision ?? '',
    // The list itself has a line for each convolution.
    ...(engines !== '' && {
      engines: createHash('sha256').update(engines).digest('hex').slice(0, 16),
    }),
  };
}

function environmentWarnings(
  before: Record<string, string>,
  now: Record<string, string>,
): WarningEvent[] {
  const changed = [...new Set([...Object.keys(before), ...Object.keys(now)])].filter(
    (key) => before[key] !== now[key],
  );
  if (changed.length === 0) return [];
  const list = changed.map((key) => `${key} ${now[key] ?? '?'} (was ${before[key] ?? '?'})`);
  return [
    {
      type: 'warning',
      kind: 'environment',
      message: `the run goes on under other conditions, ${list.join(', ')}, so its weights will not be bit-identical to an uninterrupted run's`,
    },
  ];
}

/** Before hours of work rather than at the first checkpoint. */
function diskWarnings(config: Config, disk: DiskEstimate, resumed: boolean): WarningEvent[] {
  // What a resumed run keeps is there already, but for the checkpoint being written.
  const needed = resumed ? disk.checkpointBytes : disk.diskBytes;
  if (disk.freeDiskBytes >= needed) return [];
  return [
    {
      type: 'warning',
      kind: 'disk',
      message: `${config.out} needs up to ${formatBytes(needed)} for its checkpoints and models and ${formatBytes(disk.freeDiskBytes)} are free there: free some, keep fewer checkpoints (keep is ${config.keep}), or give another run directory as --out`,
    },
  ];
}

async function restore(session: NativeSession, { path }: FoundCheckpoint): Promise<void> {
  const saved = await readCheckpointTensors(path);
  const damaged = (what: string): HardmineError =>
    new HardmineError(
      'ERR_CHECKPOINT',
      `the checkpoint ${path} ${what}: it belongs to another network or version; start another run`,
    );
  for (const { name, shape } of session.tensors) {
    const tensor = saved.get(name);
    if (tensor === undefined) throw damaged(`lacks the tensor ${name}`);
    if (tensor.dtype !== 'F32' || tensor.shape.join() !== shape.join()) {
      throw damaged(
        `has ${name} as [${tensor.shape.join(', ')}] where [${shape.join(', ')}] is expected`,
      );
    }
    await session.write(name, tensor.data);
    saved.delete(name);
  }
  const [extra] = saved.keys();
  if (extra !== undefined) throw damaged(`has the tensor ${extra}, which this network lacks`);
}
