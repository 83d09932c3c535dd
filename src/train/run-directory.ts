/** The folder of one run: its configuration, its figures, its checkpoints and models. */
import { type FileHandle, mkdir, open, readFile, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { type Config, MAX_CONFIG_BYTES } from '../config.js';
import { readFileBounded } from '../data/files.js';
import { FolderLock } from '../data/folder-lock.js';
import { HardmineError } from '../errors.js';
import { removeAbandonedFiles, writeFileAtomic } from '../formats/atomic.js';
import { EventWriter } from '../formats/tfevents.js';

/** One line of skipped.tsv: an image that was left out of training. */
export interface SkippedLine {
  /** Steps done when it was found. */
  step: number;
  /** The .rec and the key of the record in its .idx. */
  file: string;
  key: number;
  identity: string;
  reason: string;
}

const SKIPPED_COLUMNS = ['step', 'file', 'key', 'identity', 'reason'] as const;

/** One line of metrics.jsonl: means over the steps since the line before. */
export interface MetricsLine {
  /** Steps done in all. */
  step: number;
  /** The epoch that they belong to, from 1. */
  epoch: number;
  /** Seconds of training so far. */
  time: number;
  /** Means over the steps since the last line: weighted loss with the center loss, and base loss. */
  loss: number;
  baseLoss: number;
  /** Share of the samples whose greatest logit before the margin is their class's. */
  accuracy: number;
  /** Learning rate of the last step. */
  lr: number;
  imagesPerSecond: number;
  /** Shares of the samples by dHM/dL: below 0.1, between, above 1. */
  silenced: number;
  kept: number;
  amplified: number;
  /** Between embeddings of different identities, -1 to 1. */
  meanCosine: number;
  /** Mean length of the embeddings. */
  embeddingNorm: number;
  /** Share of the margin in force, 0 to 1, of the last step. */
  marginFactor: number;
  /** A-Softmax's lambda at the last step; 0 with other losses. */
  lambda: number;
}

/**
 * Where the counts of dHM/dL are divided: silenced, kept, amplified. The last bucket is open; its
 * limit is the greatest weight of Algorithm 1 with the paper's constants, 11.72.
 */
const GATE_BUCKETS = { min: 0, max: 12, limits: [0.1, 1, 12] };

function unwritable(path: string, cause: unknown): HardmineError {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new HardmineError(
    'ERR_IO',
    `the run directory ${path} cannot be written (${reason}): give another one as --out, or mend its permissions`,
    { cause },
  );
}

export class RunDirectory {
  private metrics: FileHandle | null = null;
  private events: EventWriter | null = null;

  /** @param lock null: it is read */
  private constructor(
    readonly path: string,
    private readonly lock: FolderLock | null,
  ) {}

  get checkpoints(): string {
    return join(this.path, 'checkpoints');
  }

  file(name: string): string {
    return join(this.path, name);
  }

  /** That of a run, as it stands; nothing is checked. */
  static at(path: string): RunDirectory {
    return new RunDirectory(path, null);
  }

  /**
   * Takes `path` for this process alone, until close(), and checks whether it holds a run. Where it was not
   * there it is made, and goes again with close() if nothing was written.
   *
   * @throws HardmineError ERR_BUSY while another process, or another Trainer of this one, has it; ERR_IO when
   *   it cannot be written; ERR_CONFIG when it holds a run and `resume` is false, or none and `resume` is true
   */
  static async claim(path: string, resume: boolean): Promise<RunDirectory> {
    const lock = await FolderLock.take(path);
    const directory = new RunDirectory(path, lock);
    const holdsRun = await isFile(directory.file('config.json'));
    if (holdsRun === resume) return directory;
    await directory.close();
    throw new HardmineError(
      'ERR_CONFIG',
      holdsRun
        ? `${path} already holds a run: go on with it by --resume, or give another run directory as --out`
        : `${path} holds no run to resume: leave out --resume, or give the directory of the run as --out`,
    );
  }

  /** Why a second process is not kept out; null where it is. */
  get warning(): string | null {
    return this.lock?.warning ?? null;
  }

  /** The configuration that the run was started with, as it was written. */
  async readConfig(): Promise<unknown> {
    const path = this.file('config.json');
    try {
      return JSON.parse(
        (await readFileBounded(path, MAX_CONFIG_BYTES, 'a configuration')).toString('utf8'),
      );
    } catch (cause) {
      throw new HardmineError(
        'ERR_CONFIG',
        `${path} cannot be read as JSON: restore it, or start anew in another run directory`,
        { cause },
      );
    }
  }

  /** The images that were left out in the first `step` steps. */
  async readSkipped(step: number): Promise<SkippedLine[]> {
    const text = await readFile(this.file('skipped.tsv'), 'utf8').catch(noFile);
    const lines: SkippedLine[] = [];
    for (const line of text.split('\n').slice(1)) {
      const [at, file, key, identity, reason] = line.split('\t');
      if (reason === undefined) break; // only the last line can be half written
      const found = {
        step: Number(at),
        file: file!,
        key: Number(key),
        identity: identity!,
        reason,
      };
      if (found.step <= step) lines.push(found);
    }
    return lines;
  }

  /** Replaces skipped.tsv, which stands only where there is something to say. */
  async writeSkipped(lines: readonly SkippedLine[]): Promise<void> {
    if (lines.length === 0) return this.remove(['skipped.tsv']);
    const rows = lines.map((line) => SKIPPED_COLUMNS.map((column) => cell(line[column])));
    await writeFileAtomic(
      this.file('skipped.tsv'),
      [[...SKIPPED_COLUMNS], ...rows].map((row) => `${row.join('\t')}\n`),
    );
  }

  /**
   * Makes the folder, removes what a killed process left half written, writes the configuration, opens
   * metrics.jsonl, cut back to `step`, and starts an event file for TensorBoard.
   *
   * @returns the lines of metrics.jsonl up to `step`
   */
  async open(config: Config, step: number): Promise<MetricsLine[]> {
    const metrics = this.file('metrics.jsonl');
    let kept: MetricsLine[];
    try {
      await mkdir(this.checkpoints, { recursive: true });
      await removeAbandonedFiles(this.path);
      kept = (await readMetrics(metrics)).filter((line) => line.step <= step);
      await writeFileAtomic(
        metrics,
        kept.map((line) => `${JSON.stringify(line)}\n`),
      );
      this.metrics = await open(metrics, 'a');
      this.events = await EventWriter.create(this.path, step);
    } catch (cause) {
      throw cause instanceof HardmineError ? cause : unwritable(this.path, cause);
    }
    const { resume: _, ...saved } = config;
    await this.writeJson('config.json', saved);
    await this.events?.text(
      step,
      'config',
      `\`\`\`json\n${JSON.stringify(saved, null, 2)}\n\`\`\``,
    );
    return kept;
  }

  /** @param rows samples behind the means of `line` */
  async append(line: MetricsLine, rows: number): Promise<void> {
    try {
      await this.metrics?.appendFile(`${JSON.stringify(line)}\n`);
    } catch (cause) {
      throw unwritable(this.path, cause);
    }
    const { step, epoch, time: _, silenced, kept, amplified, ...figures } = line;
    await this.events?.scalars(step, {
      epoch,
      ...Object.fromEntries(
        Object.entries(figures).map(([name, value]) => [`training/${name}`, value]),
      ),
      'gate/silenced': silenced,
      'gate/kept': kept,
      'gate/amplified': amplified,
    });
    const counts = [silenced, kept, amplified].map((share) => Math.round(share * rows));
    await this.events?.histogram(step, 'gate/weight', { ...GATE_BUCKETS, counts });
  }

  /** Figures that are no step's, for TensorBoard. */
  async scalars(step: number, values: Readonly<Record<string, number>>): Promise<void> {
    await this.events?.scalars(step, values);
  }

  async writeJson(name: string, value: unknown): Promise<void> {
    await writeFileAtomic(this.file(name), [`${JSON.stringify(value, null, 2)}\n`]);
  }

  async remove(names: readonly string[]): Promise<void> {
    for (const name of names) await rm(this.file(name), { force: true });
  }

  async close(): Promise<void> {
    try {
      await this.metrics?.close();
      await this.events?.close();
      this.metrics = null;
      this.events = null;
    } finally {
      await this.lock?.release();
    }
  }
}

/** The whole lines of a metrics.jsonl; a line that a killed process left half written is left out. */
export async function readMetrics(path: string): Promise<MetricsLine[]> {
  const text = await readFile(path, 'utf8').catch(noFile);
  const lines: MetricsLine[] = [];
  for (const line of text.split('\n')) {
    if (line === '') continue;
    try {
      const value: unknown = JSON.parse(line);
      if (typeof value !== 'object' || value === null) break;
      lines.push(value as MetricsLine);
    } catch {
      break; // only the last line can be half written
    }
  }
  return lines;
}

/** The text of a file that is not there. */
function noFile(error: NodeJS.ErrnoException): string {
  if (error.code === 'ENOENT') return '';
  throw error;
}

/** A value as a cell of a table: names from outside may hold its separators. */
function cell(value: string | number): string {
  return String(value).replace(/[\t\r\n]/g, ' ');
}

async function isFile(path: string): Promise<boolean> {
  return stat(path).then(
    (stats) => stats.isFile(),
    () => false,
  );
}
