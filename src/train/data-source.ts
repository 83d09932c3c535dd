/** Training images of a program's own, by async iterator, instead of a data set on the disk. */
import { createHash } from 'node:crypto';
import { PIXEL_BYTES, SIDE } from '../data/images.js';
import { HardmineError, oneLine, quote } from '../errors.js';

/** One or more samples, as a source gives them; a batch may begin and end in the middle of them. */
export interface Samples {
  /** RGB bytes [n, 112, 112, 3], row after row from the upper left, n at least 1. */
  readonly images: Uint8Array;
  /** [n], each 0 to `identities` - 1. */
  readonly labels: Int32Array;
}

/**
 * Where a Trainer gets images that lie in no data set: drawn, augmented or fetched by the program.
 *
 * The order within an epoch is the source's own, nothing is shuffled. An epoch takes the first
 * floor(images / batch) * batch samples and then ends the iterator by return(), and so do the end of
 * run(), `signal` and dispose(); a read that is under way then is told by `signal` and not waited for.
 * Two batches are read ahead. `augment` is applied as ever; flips and shifts follow from the seed, the
 * epoch and the sample's place in it.
 */
export interface DataSource {
  /** What messages, config.json and the report call it. */
  readonly name: string;
  /** Samples of an epoch. */
  readonly images: number;
  /** Classes, at least 2. */
  readonly identities: number;
  /**
   * The samples of `epoch` (counted from 1) beginning with number `from` (counted from 0). It is called
   * once for every epoch with `from` 0; when a run is resumed, first with the place where it was. A
   * resumed run is the uninterrupted one, bit for bit, where (epoch, from) alone says which samples
   * come.
   *
   * @param signal aborted when nothing more will be read.
   */
  samples(
    epoch: number,
    from: number,
    signal: AbortSignal,
  ): AsyncIterable<Samples> | Iterable<Samples>;
}

/** A batch of a source and its place. */
export interface SourceBatch {
  images: Uint8Array;
  labels: Int32Array;
  epoch: number;
  /** Number of its first sample in the epoch. */
  first: number;
}

/** @throws HardmineError ERR_CONFIG for what is no data source */
export function checkDataSource({ name, images, identities, samples }: DataSource): void {
  const demand = (holds: boolean, what: string): void => {
    if (holds) return;
    throw new HardmineError(
      'ERR_CONFIG',
      `the configuration's "data" is an object but no data source (${what}): give a path, or { name, images, identities, samples }`,
    );
  };
  demand(typeof name === 'string' && name !== '', 'its name must be a text');
  demand(
    Number.isSafeInteger(images) && images >= 1,
    'its images must be a whole number from 1 up',
  );
  demand(
    Number.isSafeInteger(identities) && identities >= 2,
    'its identities must be a whole number from 2 up',
  );
  demand(typeof samples === 'function', 'its samples must be a function that gives an iterable');
}

/** What tells one source from another when a run is resumed: its samples are known only as they come. */
export function fingerprintOfSource({ name, images, identities }: DataSource): {
  images: number;
  identities: number;
  sha256: string;
} {
  const text = JSON.stringify([name, images, identities]);
  return { images, identities, sha256: createHash('sha256').update(text).digest('hex') };
}

/**
 * The batches of a source, epoch after epoch.
 *
 * @param start the epoch (from 1) of the first batch, and its number there (from 0).
 * @throws HardmineError ERR_DATA for samples of the wrong type, length or label, for too few of them,
 *   and for what the source throws (`cause`).
 */
export async function* batchesOf(
  source: DataSource,
  start: { epoch: number; step: number },
  { batch, epochs }: { batch: number; epochs: number },
  signal: AbortSignal,
): AsyncGenerator<SourceBatch, void, void> {
  const taken = Math.floor(source.images / batch) * batch;
  let from = start.step * batch;
  for (let epoch = start.epoch; epoch <= epochs; epoch += 1, from = 0) {
    let at = from;
    let next = emptyBatch(batch);
    for await (const samples of read(source, epoch, from, signal)) {
      checkSamples(source, samples, epoch, at);
      const { images, labels } = samples;
      for (let i = 0; i < labels.length && at < taken; ) {
        const filled = at % batch;
        const rows = Math.min(batch - filled, labels.length - i);
        next.labels.set(labels.subarray(i, i + rows), filled);
        next.images.set(
          images.subarray(i * PIXEL_BYTES, (i + rows) * PIXEL_BYTES),
          filled * PIXEL_BYTES,
        );
        i += rows;
        at += rows;
        if (at % batch !== 0) continue;
        yield { ...next, epoch, first: at - batch };
        next = emptyBatch(batch);
      }
      if (at === taken) break;
    }
    if (at < taken) {
      throw sourceError(
        source,
        `ended after ${at} of ${source.images} samples in epoch ${epoch}`,
        'let it give as many as its `images` say',
      );
    }
  }
}

const emptyBatch = (rows: number) => ({
  images: new Uint8Array(rows * PIXEL_BYTES),
  labels: new Int32Array(rows),
});

/** What the source throws, told as its own. */
async function* read(
  source: DataSource,
  epoch: number,
  from: number,
  signal: AbortSignal,
): AsyncGenerator<Samples, void, void> {
  try {
    const samples: object = Object(source.samples(epoch, from, signal));
    if (!(Symbol.asyncIterator in samples || Symbol.iterator in samples)) {
      throw new TypeError('its samples() returned no iterable');
    }
    yield* samples as AsyncIterable<Samples>;
  } catch (cause) {
    const reason = oneLine(cause instanceof Error ? cause.message : String(cause));
    throw sourceError(source, `failed in epoch ${epoch} (${reason})`, 'mend it', cause);
  }
}

const SHAPE = `{ images: Uint8Array [n, ${SIDE}, ${SIDE}, 3], labels: Int32Array [n] }`;

function checkSamples(source: DataSource, samples: Samples, epoch: number, at: number): void {
  const demand = (holds: boolean, found: string, expected: string): void => {
    if (holds) return;
    throw sourceError(source, `gave ${found} after sample ${at} of epoch ${epoch}`, expected);
  };
  const { images, labels } = samples ?? {};
  demand(
    images instanceof Uint8Array && labels instanceof Int32Array && labels.length > 0,
    'no samples',
    `give ${SHAPE} with n at least 1`,
  );
  demand(
    images.length === labels.length * PIXEL_BYTES,
    `${images.length} bytes of images with ${labels.length} labels`,
    `give ${SHAPE}, ${PIXEL_BYTES} bytes for each label`,
  );
  const wrong = labels.findIndex((label) => label < 0 || label >= source.identities);
  demand(
    wrong < 0,
    `the label ${labels[wrong]}`,
    `number its classes from 0 to ${source.identities - 1}`,
  );
}

function sourceError(
  { name }: DataSource,
  what: string,
  remedy: string,
  cause?: unknown,
): HardmineError {
  return new HardmineError('ERR_DATA', `the data source ${quote(name)} ${what}: ${remedy}`, {
    cause,
  });
}
