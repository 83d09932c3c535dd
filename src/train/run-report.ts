/** The report of a run: written as it goes on, from what the trainer tells it, and whole at its end. */
import { basename, dirname } from 'node:path';
import type { Config } from '../config.js';
import { readImageFile, thumbnail } from '../data/images.js';
import { HardmineError } from '../errors.js';
import type { PairsResult, ScoredPair } from '../evaluate/pairs.js';
import type { VerificationResult } from '../evaluate/verification.js';
import { writeFileAtomic } from '../formats/atomic.js';
import type { NativeStepStats } from '../native.js';
import { MetricsHistory } from '../report/history.js';
import { timeText } from '../report/page.js';
import {
  type ReportData,
  type ReportFace,
  type ReportPair,
  writeReport,
} from '../report/report.js';
import type { CheckpointState } from './checkpoint.js';
import type { FinalResult } from './evaluation.js';
import { HardestSamples } from './hardest.js';
import type { MetricsLine, RunDirectory } from './run-directory.js';
import {
  ifSound,
  type RunStatus,
  readScores,
  type ScoreSet,
  savedScores,
  scoresFile,
} from './run-files.js';

/** Pairs of each kind that a report shows. */
const SHOWN = 6;
/** A page is behind the run by about this, and by one reload. */
const WRITE_MS = 20_000;
/** Writing may take this share of the time: what comes more often waits. */
const MOST_SHARE = 0.01;
/** What is drawn: one model, so it needs no other name. */
const MODEL = 'trained network';

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

/** A face for a report; one whose picture cannot be read is shown without, and ends nothing. */
export async function reportFace(
  label: string,
  read: () => Promise<Uint8Array>,
): Promise<ReportFace> {
  try {
    return { label, jpeg: await thumbnail(Buffer.from(await read()), label) };
  } catch (error) {
    if (!(error instanceof HardmineError)) throw error;
    return { label, jpeg: null };
  }
}

/** `face` of reportFaces for rows that are files. */
export function faceFiles(paths: readonly string[]): (row: number) => Promise<ReportFace> {
  return (row) => reportFace(basename(paths[row]!), () => readImageFile(paths[row]!));
}

/** "6000 pairs of lfw". */
export function pairsOf({ pairs, dataset }: { pairs: number; dataset: string }): string {
  return `${pairs} pairs of ${dataset}`;
}

/** A result on held-out pairs, and how to show it. */
export interface ValidationShown {
  epoch: number;
  result: PairsResult;
  /** What the pairs are of. */
  dataset: string;
  /** What tells the images of the pairs from others. */
  rows: readonly string[];
  face: (row: number) => Promise<ReportFace>;
}

export interface RunReportOptions {
  directory: RunDirectory;
  config: Config;
  environment: Record<string, string>;
  /** What is trained, on what, in a sentence. */
  summary: string;
  totalSteps: number;
  /** The picture of an image of the training data; null for a source's, which are gone. */
  face: ((image: number) => Promise<ReportFace>) | null;
}

/** What a report needs to know of the trainer each time. */
export type Progress = Pick<RunStatus, 'state' | 'step' | 'epoch' | 'seconds'> &
  Pick<CheckpointState, 'validations'>;

/** One set of pairs as it is shown. */
interface Judged {
  name: string;
  evaluatedOn: string;
  result: VerificationResult;
  /** Not known of what another process has judged. */
  hardest?: NonNullable<ReportData['hardest']>;
}

const networkOf = (epoch: number): string => `network of epoch ${epoch}`;

export class RunReport {
  private readonly history = new MetricsHistory();
  private readonly hardest = new HardestSamples();
  private readonly faces = new Map<number, Promise<ReportFace>>();
  private validation: Judged | null = null;
  private final: Judged[] = [];
  private news = true;
  private writing: Promise<void> | null = null;
  private writtenMs = Number.NEGATIVE_INFINITY;
  private tookMs = 0;
  private failure: unknown = null;

  constructor(private readonly run: RunReportOptions) {}

  /** Takes up what a run that is resumed has left, as far as it belongs to its checkpoint. */
  async resume(
    metrics: readonly MetricsLine[],
    validations: CheckpointState['validations'],
  ): Promise<void> {
    for (const line of metrics) this.history.add(line);
    const file = scoresFile('validation');
    const scores = await ifSound(readScores(this.run.directory.file(file)));
    if (scores && validations.some(({ epoch }) => scores.model === networkOf(epoch))) {
      const { dataset, model, result } = scores;
      this.validation = { name: model, evaluatedOn: pairsOf({ ...result, dataset }), result };
    } else {
      await this.run.directory.remove([file]);
    }
  }

  step(line: MetricsLine, stats: readonly NativeStepStats[]): void {
    this.history.add(line);
    this.hardest.add(stats, line.step - stats.length + 1, line.epoch);
  }

  endEpoch(): void {
    this.hardest.endEpoch();
    this.news = true;
  }

  /** Shows the best so far of the epochs that this process has validated. */
  async validated({ epoch, rows, face, ...judged }: ValidationShown, best: boolean): Promise<void> {
    this.news = true;
    if (this.validation !== null && !best) return;
    const name = networkOf(epoch);
    const result = { ...judged.result, dataset: judged.dataset };
    this.validation = {
      name,
      evaluatedOn: pairsOf(result),
      result,
      hardest: await reportFaces(result, face),
    };
    await this.writeScores('validation', savedScores(result, rows, name));
  }

  async evaluated(result: FinalResult): Promise<void> {
    this.news = true;
    const { paths } = result.details;
    this.final.push({
      name: MODEL,
      evaluatedOn: pairsOf(result),
      result,
      hardest: await reportFaces(result, faceFiles(paths)),
    });
    // The folder above belongs to the name: files of videos are but numbered.
    const rows = paths.map((path) => `${basename(dirname(path))}/${basename(path)}`);
    await this.writeScores(
      result.dataset === 'ytf' ? 'ytf' : 'lfw',
      savedScores(result, rows, MODEL),
    );
  }

  /**
   * Begins to write where there is news, or where the page has become old, and does not wait: call it
   * while the device works. A failure is kept for `takeFailure`.
   */
  tick(progress: Progress): void {
    if (this.writing !== null) return;
    const age = performance.now() - this.writtenMs;
    if (age < (this.news ? 0 : WRITE_MS) || age < this.tookMs / MOST_SHARE) return;
    const startMs = performance.now();
    this.writing = this.write(progress)
      .catch((error: unknown) => {
        this.failure ??= error;
      })
      .finally(() => {
        this.writing = null;
        this.writtenMs = performance.now();
        this.tookMs = this.writtenMs - startMs;
      });
  }

  /** Why a report could not be written since the last call, or null. */
  takeFailure(): unknown {
    const { failure } = this;
    this.failure = null;
    return failure;
  }

  /** Waits for what is under way. */
  async settle(): Promise<void> {
    await this.writing;
  }

  /** Writes it as it stays. @throws HardmineError ERR_IO */
  async end(progress: Progress): Promise<void> {
    await this.settle();
    await this.write(progress);
  }

  private async writeScores(set: ScoreSet, scores: object): Promise<void> {
    const path = this.run.directory.file(scoresFile(set));
    await writeFileAtomic(path, [`${JSON.stringify(scores)}\n`]);
  }

  private async write(progress: Progress): Promise<void> {
    const { directory, environment, summary, totalSteps } = this.run;
    this.news = false;
    const now = new Date();
    const data = await this.data(progress, timeText(now));
    await writeReport(directory.file('report.html'), data);
    const status: RunStatus = {
      ...progress,
      totalSteps,
      written: now.toISOString(),
      summary,
      environment,
    };
    await directory.writeJson('status.json', status);
  }

  private async data(progress: Progress, created: string): Promise<ReportData> {
    const { directory, config, environment, summary, totalSteps } = this.run;
    const { state, step, validations, seconds } = progress;
    const samples = await this.hardestSamples();
    const [first, ...others] = [...this.final, ...(this.validation ? [this.validation] : [])];
    return {
      title: basename(directory.path),
      created,
      summary,
      ...(state !== 'finished' && { progress: { running: state === 'running', step, totalSteps } }),
      config,
      environment,
      metrics: this.history.lines,
      validations,
      trainingSeconds: seconds,
      evaluations: first ? [first] : [],
      ...(first && { evaluatedOn: first.evaluatedOn }),
      ...(first?.hardest && { hardest: first.hardest }),
      ...(this.validation && {
        note: 'The best epoch was chosen on the held-out pairs, so the figures on them are a little better than on pairs that chose nothing.',
      }),
      alsoEvaluated: others.map(({ evaluatedOn, ...evaluation }) => ({
        evaluatedOn,
        evaluations: [evaluation],
      })),
      ...(samples && { samples }),
    };
  }

  private async hardestSamples(): Promise<ReportData['samples'] | null> {
    const { worst } = this.hardest;
    const { face: draw } = this.run;
    if (worst === null || draw === null) return null;
    for (const image of this.faces.keys()) {
      if (!worst.samples.some((sample) => sample.image === image)) this.faces.delete(image);
    }
    const shown = worst.samples.map(async ({ image, ...figures }) => {
      const face = this.faces.get(image) ?? draw(image);
      this.faces.set(image, face);
      return { ...figures, face: await face };
    });
    return { epoch: worst.epoch, shown: await Promise.all(shown) };
  }
}
