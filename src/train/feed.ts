/** What a Trainer's steps are fed from: the decode ring over a data set, or a source of the program's own. */
import type { Config } from '../config.js';
import type {
  NativeBatches,
  NativeSession,
  NativeStepSettings,
  NativeStepStats,
} from '../native.js';
import { batchesOf, type DataSource, type SourceBatch } from './data-source.js';
import type { Damage } from './skipped.js';

/** Batches read while the device works on one: enough to even out a source that comes in bursts. */
const READ_AHEAD = 2;

export interface Feed {
  readonly stepsPerEpoch: number;
  /** Trains settings.length steps; fewer after cancel(). */
  train(settings: NativeStepSettings[]): Promise<NativeStepStats[]>;
  /** Ends train() after the step under way, or its wait for images; no other call follows. */
  cancel(): void;
  /** Images that could not be decoded and were left out so far. */
  skipped(): Damage[];
  /** Gives back what it holds; may be called twice. */
  dispose(): Promise<void>;
}

export function ringFeed(session: NativeSession, batches: NativeBatches): Feed {
  return {
    stepsPerEpoch: batches.stepsPerEpoch,
    train: (settings) => session.train(batches, settings),
    cancel: () => session.cancel(),
    skipped: () => batches.skipped(),
    dispose: () => batches.dispose(),
  };
}

export class SourceFeed implements Feed {
  readonly stepsPerEpoch: number;
  readonly #session: NativeSession;
  readonly #augment: { seed: number; mirror: boolean; crop: number };
  readonly #batches: AsyncGenerator<SourceBatch, void, void>;
  readonly #end = new AbortController();
  readonly #ended = new Promise<null>((resolve) => {
    this.#end.signal.addEventListener('abort', () => resolve(null));
  });
  readonly #ahead: Promise<IteratorResult<SourceBatch, void>>[] = [];
  /** Of `#ahead`, those that have not come yet. */
  #reading = 0;

  /** @param start as batchesOf takes it. */
  constructor(
    source: DataSource,
    session: NativeSession,
    config: Config,
    start: { epoch: number; step: number },
  ) {
    const { batch, seed, augment } = config;
    this.stepsPerEpoch = Math.floor(source.images / batch);
    this.#session = session;
    this.#augment = { seed, mirror: augment.flip, crop: augment.crop };
    this.#batches = batchesOf(source, start, config, this.#end.signal);
  }

  async train(settings: NativeStepSettings[]): Promise<NativeStepStats[]> {
    const stats: NativeStepStats[] = [];
    for (const one of settings) {
      const batch = await this.#next();
      if (batch === null) break;
      const { images, labels, epoch, first } = batch;
      const augment = { ...this.#augment, epoch, first };
      const step = await this.#session.trainOwn(images, labels, augment, one);
      if (step.length === 0) break;
      stats.push(...step);
    }
    return stats;
  }

  cancel(): void {
    this.#end.abort();
    this.#session.cancel();
  }

  skipped(): Damage[] {
    return [];
  }

  async dispose(): Promise<void> {
    this.#end.abort();
    const closed = this.#batches.return();
    // Behind a read that may never come it would wait for ever.
    if (this.#reading === 0) await closed;
    else closed.catch(() => undefined);
  }

  /** The next batch, or null after the end. */
  async #next(): Promise<SourceBatch | null> {
    const { signal } = this.#end;
    if (signal.aborted) return null;
    while (this.#ahead.length <= READ_AHEAD) this.#ahead.push(this.#read());
    const read = await Promise.race([this.#ahead.shift()!, this.#ended]);
    return read === null || read.done ? null : read.value;
  }

  #read(): Promise<IteratorResult<SourceBatch, void>> {
    this.#reading += 1;
    const read = this.#batches.next().finally(() => {
      this.#reading -= 1;
    });
    read.catch(() => undefined); // thrown when its turn comes
    return read;
  }
}
