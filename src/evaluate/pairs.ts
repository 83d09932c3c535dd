/** Pairs of images and the embeddings that score them. */

import { decodeImages, PIXEL_BYTES, SIDE } from '../data/images.js';
import { HardmineError } from '../errors.js';
import { ImageFiles, type ImageSource, PixelImages } from './image-source.js';
import { type ProtocolName, protocolOf, rowLength } from './protocols.js';
import { checkFolds, checkLabelled, type VerificationResult, verifyFolds } from './verification.js';

/** How many of the worst pairs of each kind a result lists. */
const HARDEST = 12;
/** Scores that no threshold accepts: those of pairs in which a face was not found. */
const GREATEST_DISTANCE = 4;
const LEAST_COSINE = -1;

/** What scores images: a trained model, or a baseline to hold against it. */
export interface ScoreModel {
  /** Length of an embedding. */
  readonly embedding: number;
  /**
   * Raw embeddings, row after row [n, embedding], of `images`: RGB bytes [n, 112, 112, 3] or paths of files;
   * with `mirror` those of their mirror images.
   */
  embed(
    images: Uint8Array | readonly string[],
    options?: { mirror?: boolean },
  ): Promise<Float32Array>;
}

export interface VerificationPair {
  /** Rows of the two images. */
  a: number;
  b: number;
  same: boolean;
  /** 0 .. folds-1. */
  fold: number;
}

export interface ScoredPair extends VerificationPair {
  distance: number;
  /** Whether the threshold of its fold puts it on the wrong side. */
  wrong: boolean;
}

/** A result that knows its pairs, the hardest ones first. */
export interface PairsResult extends VerificationResult {
  details: VerificationResult['details'] & {
    /** Pairs of two people in rising distance. */
    hardestImpostors: ScoredPair[];
    /** Pairs of one person in falling distance. */
    hardestGenuine: ScoredPair[];
  };
}

export interface EvaluatePairs {
  /** What is compared, row after row, as `embedForPairs` gives it. */
  embeddings: Float32Array;
  /** Length of a row: the model's embedding, or what `rowLength` says of it for the protocol. */
  dim: number;
  pairs: readonly VerificationPair[];
  protocol?: ProtocolName;
  /** Rows of images that hold no face: pairs with one are taken for two people, whatever the threshold. */
  withoutFace?: readonly number[];
}

/**
 * Verification over embeddings that are at hand. Rows are normalised here; one of all zeros stays zero,
 * as in InsightFace.
 *
 * @throws HardmineError as `verification` does, ERR_INPUT for a pair that names no row, ERR_NON_FINITE
 *   for an embedding that holds NaN or infinity.
 */
export function evaluatePairs(input: EvaluatePairs): PairsResult {
  const { embeddings, dim, pairs, protocol = 'insightface', withoutFace = [] } = input;
  if (!(Number.isInteger(dim) && dim > 0) || embeddings.length % dim !== 0) {
    throw new HardmineError(
      'ERR_INPUT',
      `${embeddings.length} numbers are no whole rows of ${dim}; pass the embeddings row after row with their length.`,
    );
  }
  const rows = embeddings.length / dim;
  for (const [index, { a, b }] of pairs.entries()) {
    if (!isRow(a, rows) || !isRow(b, rows)) {
      throw new HardmineError(
        'ERR_INPUT',
        `Pair ${index} names the images ${a} and ${b}, expected whole numbers from 0 to ${rows - 1}.`,
      );
    }
  }
  const absent = new Set(withoutFace);
  const lost = pairs.map(({ a, b }) => absent.has(a) || absent.has(b));
  const { score, centred } = protocolOf(protocol);
  const scoresWith = (mean: Float64Array): Float64Array => {
    const compared = centredRows(embeddings, dim, mean);
    return Float64Array.from(pairs, ({ a, b }, i) => {
      if (lost[i]) return score === 'cosine' ? LEAST_COSINE : GREATEST_DISTANCE;
      const { distance, cosine } = compare(compared, a, b);
      return score === 'cosine' ? cosine : distance;
    });
  };
  if (!centred) {
    const scores = scoresWith(new Float64Array(dim));
    return verifyPairs(() => scores, pairs, protocol);
  }
  const trainingRows = (testFold: number) =>
    pairs
      .filter(({ fold }) => fold !== testFold)
      .flatMap(({ a, b }) => [a, b])
      .filter((row) => !absent.has(row));
  return verifyPairs(
    (testFold) => scoresWith(meanRow(embeddings, dim, trainingRows(testFold))),
    pairs,
    protocol,
  );
}

/** `verification` of pairs by scores that may depend on the fold under test, and the hardest of them. */
export function verifyPairs(
  scores: (testFold: number) => Float64Array,
  pairs: readonly VerificationPair[],
  protocol: ProtocolName,
): PairsResult {
  const fold = pairs.map((pair) => pair.fold);
  const { values, labels } = checkLabelled(
    scores(0),
    pairs.map((pair) => pair.same),
    protocolOf(protocol).score === 'cosine' ? 'cosine' : 'distance',
  );
  checkFolds(fold);
  const result = verifyFolds({
    scores: (testFold) => (testFold === 0 ? values : scores(testFold)),
    same: labels,
    fold: Uint16Array.from(fold),
    protocol,
  });
  const { distances, right } = result.details;
  const scored = pairs.map(
    (pair, i): ScoredPair => ({ ...pair, distance: distances[i]!, wrong: right[i] === 0 }),
  );
  const hardest = (same: boolean) =>
    scored
      .filter((pair) => pair.same === same)
      .sort((p, q) => (same ? q.distance - p.distance : p.distance - q.distance))
      .slice(0, HARDEST);
  return {
    ...result,
    details: {
      ...result.details,
      hardestImpostors: hardest(false),
      hardestGenuine: hardest(true),
    },
  };
}

/** Rows less a mean, each with what brings it to length 1 (0 for a row of zeros). */
interface Rows {
  embeddings: Float32Array;
  dim: number;
  mean: Float64Array;
  inverseNorms: Float64Array;
}

function centredRows(embeddings: Float32Array, dim: number, mean: Float64Array): Rows {
  const inverseNorms = Float64Array.from({ length: embeddings.length / dim }, (_, row) => {
    let squares = 0;
    for (let i = 0; i < dim; i++) squares += (embeddings[row * dim + i]! - mean[i]!) ** 2;
    if (!Number.isFinite(squares)) {
      throw new HardmineError(
        'ERR_NON_FINITE',
        `The embedding of image ${row} holds NaN or infinity; the model's weights are damaged or its training diverged.`,
      );
    }
    return squares > 0 ? 1 / Math.sqrt(squares) : 0;
  });
  return { embeddings, dim, mean, inverseNorms };
}

/** Mean of the rows that `members` names, each as often as it is named. */
function meanRow(embeddings: Float32Array, dim: number, members: readonly number[]): Float64Array {
  const mean = new Float64Array(dim);
  for (const row of members) {
    for (let i = 0; i < dim; i++) mean[i]! += embeddings[row * dim + i]! / members.length;
  }
  return mean;
}

/** Squared distance and dot product of two rows brought to length 1. */
function compare(
  { embeddings, dim, mean, inverseNorms }: Rows,
  a: number,
  b: number,
): { distance: number; cosine: number } {
  let distance = 0;
  let cosine = 0;
  for (let i = 0; i < dim; i++) {
    const x = (embeddings[a * dim + i]! - mean[i]!) * inverseNorms[a]!;
    const y = (embeddings[b * dim + i]! - mean[i]!) * inverseNorms[b]!;
    distance += (x - y) ** 2;
    cosine += x * y;
  }
  return { distance, cosine };
}

export interface EmbedForPairs {
  /** Paths of the images, their RGB bytes [n, 112, 112, 3], or what reads them. */
  images: readonly string[] | Uint8Array | ImageSource;
  /** Images a call of the model, 64 by default. */
  batch?: number;
  protocol?: ProtocolName;
  onProgress?: (done: number, total: number) => void;
  signal?: AbortSignal;
}

/**
 * What `evaluatePairs` compares, rows of `rowLength` floats: raw embeddings of images and, where the
 * protocol says so, those of their mirror images, added or set behind them. Images are read once, the
 * next batch while the model works on this one.
 *
 * @throws HardmineError ERR_ABORTED at the next batch after `signal`, ERR_IO or ERR_DATA for a file
 *   that is no 112x112 image, and what the model throws.
 */
export async function embedForPairs(
  model: ScoreModel,
  { images, batch = 64, protocol = 'insightface', onProgress, signal }: EmbedForPairs,
): Promise<Float32Array> {
  if (!(Number.isInteger(batch) && batch > 0)) {
    throw new HardmineError(
      'ERR_INPUT',
      `The batch is ${batch}, expected a whole number from 1 up.`,
    );
  }
  const source = sourceOf(images);
  const total = source.count;
  const { mirror } = protocolOf(protocol);
  const dim = model.embedding;
  const length = rowLength(dim, protocol);
  const rows = new Float32Array(total * length);
  const load = (from: number) => source.read(from, Math.min(total, from + batch));
  let next = load(0);
  for (let done = 0; done < total; ) {
    const pixels = await next;
    if (signal?.aborted) {
      throw new HardmineError(
        'ERR_ABORTED',
        `The evaluation was stopped after ${done} of ${total} images.`,
      );
    }
    const count = pixels.length / PIXEL_BYTES;
    next = load(done + count);
    next.catch(() => undefined); // awaited in the next turn, unless the model fails before
    const raw = await model.embed(pixels);
    const mirrored = mirror === 'none' ? null : await model.embed(pixels, { mirror: true });
    for (let k = 0; k < count; k++) {
      const at = (done + k) * length;
      const from = k * dim;
      for (let i = 0; i < dim; i++) {
        if (mirror === 'added') rows[at + i] = raw[from + i]! + mirrored![from + i]!;
        else rows[at + i] = raw[from + i]!;
        if (mirror === 'concatenated') rows[at + dim + i] = mirrored![from + i]!;
      }
    }
    done += count;
    onProgress?.(done, total);
  }
  return rows;
}

export interface EvaluateImages extends Omit<EmbedForPairs, 'images'> {
  images: ImageSource;
  pairs: readonly VerificationPair[];
}

/** `missing` is the number of images without a face: their pairs are taken for two people. */
export type ImagesResult = PairsResult & { missing: number };

/** `embedForPairs` and `evaluatePairs` in one. */
export async function evaluateImages(
  model: ScoreModel,
  { pairs, protocol = 'insightface', ...embedding }: EvaluateImages,
): Promise<ImagesResult> {
  const { images } = embedding;
  const embeddings = await embedForPairs(model, { protocol, ...embedding });
  const dim = rowLength(model.embedding, protocol);
  const { withoutFace } = images;
  return noteMissing(evaluatePairs({ embeddings, dim, pairs, protocol, withoutFace }), images);
}

/** A result that says how many images hold no face. */
export function noteMissing(
  result: PairsResult,
  { withoutFace, count }: Pick<ImageSource, 'withoutFace' | 'count'>,
): ImagesResult {
  const missing = withoutFace.length;
  if (missing > 0) {
    result.details.notes.push(
      `No face was found in ${missing} of ${count} images: their pairs are taken for two people.`,
    );
  }
  return { ...result, missing };
}

/**
 * The baseline that any model must beat: an image's own pixels less their mean, so that the score is
 * the cosine of mean-removed pixels. One embedding takes 147 KiB.
 */
export const pixelSimilarity: ScoreModel = {
  embedding: PIXEL_BYTES,
  async embed(images, { mirror = false } = {}) {
    const pixels = images instanceof Uint8Array ? images : await decodeImages(images);
    const embeddings = new Float32Array(pixels.length);
    for (let start = 0; start < pixels.length; start += PIXEL_BYTES) {
      let sum = 0;
      for (let i = start; i < start + PIXEL_BYTES; i++) sum += pixels[i]!;
      const mean = sum / PIXEL_BYTES;
      for (let y = 0; y < SIDE; y++) {
        for (let x = 0; x < SIDE; x++) {
          const to = start + (y * SIDE + x) * 3;
          const from = mirror ? start + (y * SIDE + SIDE - 1 - x) * 3 : to;
          for (let c = 0; c < 3; c++) embeddings[to + c] = pixels[from + c]! - mean;
        }
      }
    }
    return embeddings;
  },
};

function sourceOf(images: readonly string[] | Uint8Array | ImageSource): ImageSource {
  if (images instanceof Uint8Array) return new PixelImages(images);
  return 'read' in images ? images : new ImageFiles(images);
}

function isRow(row: number, rows: number): boolean {
  return Number.isInteger(row) && row >= 0 && row < rows;
}
