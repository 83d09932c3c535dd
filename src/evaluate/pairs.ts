/** Pairs of images and the embeddings that score them. */

import { decodeImages, PIXEL_BYTES, SIDE } from '../data/images.js';
import { HardmineError } from '../errors.js';
import type { ProtocolName, VerificationResult } from './verification.js';
import { protocols, verification } from './verification.js';

/** How many of the worst pairs of each kind a result lists. */
const HARDEST = 12;

/** What scores images: a trained model, or a baseline to hold against it. */
export interface ScoreModel {
  /** Length of an embedding. */
  readonly embedding: number;
  /**
   * Raw embeddings, row after row, of `images`: RGB bytes [n, 112, 112, 3] or paths of files;
   * with `mirror` those of their mirror images.
   */
  embed(images: Uint8Array | string[], options?: { mirror?: boolean }): Promise<Float32Array>;
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
  /** What is compared, row after row: raw embedding of the image plus that of its mirror image. */
  embeddings: Float32Array;
  /** Length of a row. */
  dim: number;
  pairs: readonly VerificationPair[];
  protocol?: ProtocolName;
}

/**
 * Verification over embeddings that are at hand. Rows are normalised here; one of all zeros stays zero,
 * as in InsightFace.
 *
 * @throws HardmineError as `verification` does, ERR_INPUT for a pair that names no row, ERR_NON_FINITE
 *   for an embedding that holds NaN or infinity.
 */
export function evaluatePairs({ embeddings, dim, pairs, protocol }: EvaluatePairs): PairsResult {
  if (!(Number.isInteger(dim) && dim > 0) || embeddings.length % dim !== 0) {
    throw new HardmineError(
      'ERR_INPUT',
      `${embeddings.length} numbers are no whole rows of ${dim}; pass the embeddings row after row with their length.`,
    );
  }
  const rows = embeddings.length / dim;
  const inverseNorms = Float64Array.from({ length: rows }, (_, row) => {
    let squares = 0;
    for (let i = row * dim; i < (row + 1) * dim; i++) squares += embeddings[i]! ** 2;
    if (!Number.isFinite(squares)) {
      throw new HardmineError(
        'ERR_NON_FINITE',
        `The embedding of image ${row} holds NaN or infinity; the model's weights are damaged or its training diverged.`,
      );
    }
    return squares > 0 ? 1 / Math.sqrt(squares) : 0;
  });
  const distances = pairs.map(({ a, b }, index) => {
    if (!isRow(a, rows) || !isRow(b, rows)) {
      throw new HardmineError(
        'ERR_INPUT',
        `Pair ${index} names the images ${a} and ${b}, expected whole numbers from 0 to ${rows - 1}.`,
      );
    }
    let distance = 0;
    for (let i = 0; i < dim; i++) {
      const difference =
        embeddings[a * dim + i]! * inverseNorms[a]! - embeddings[b * dim + i]! * inverseNorms[b]!;
      distance += difference * difference;
    }
    return distance;
  });
  const result = verification({
    distances,
    same: pairs.map((pair) => pair.same),
    fold: pairs.map((pair) => pair.fold),
    ...(protocol && { protocol }),
  });
  const scored = pairs.map((pair, i): ScoredPair => {
    const accepted = distances[i]! < result.thresholds[pair.fold]!;
    return { ...pair, distance: distances[i]!, wrong: accepted !== pair.same };
  });
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

export interface EmbedForPairs {
  /** Paths of the images, or their RGB bytes [n, 112, 112, 3]. */
  images: string[] | Uint8Array;
  /** Images a call of the model, 64 by default. */
  batch?: number;
  protocol?: ProtocolName;
  onProgress?: (done: number, total: number) => void;
  signal?: AbortSignal;
}

/**
 * What `evaluatePairs` compares: raw embeddings of images plus, where the protocol says so, those of
 * their mirror images. Files are decoded once, the next batch while the model works on this one.
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
  const total = Array.isArray(images) ? images.length : images.length / PIXEL_BYTES;
  if (!Number.isInteger(total)) {
    throw new HardmineError(
      'ERR_INPUT',
      `${images.length} bytes are no whole images of ${PIXEL_BYTES} bytes (${SIDE}x${SIDE} RGB).`,
    );
  }
  const sums = new Float32Array(total * model.embedding);
  const load = async (from: number): Promise<Uint8Array> =>
    Array.isArray(images)
      ? decodeImages(images.slice(from, from + batch))
      : images.subarray(from * PIXEL_BYTES, (from + batch) * PIXEL_BYTES);
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
    const mirrored = protocols[protocol].flip
      ? await model.embed(pixels, { mirror: true })
      : undefined;
    const at = done * model.embedding;
    for (let i = 0; i < raw.length; i++) sums[at + i] = raw[i]! + (mirrored ? mirrored[i]! : 0);
    done += count;
    onProgress?.(done, total);
  }
  return sums;
}

/**
 * The baseline that any model must beat: an image's own pixels less their mean, so that the score is
 * the cosine of mean-removed pixels. One embedding takes 147 KiB.
 */
export const pixelSimilarity: ScoreModel = {
  embedding: PIXEL_BYTES,
  async embed(images, { mirror = false } = {}) {
    const pixels = Array.isArray(images) ? await decodeImages(images) : images;
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

function isRow(row: number, rows: number): boolean {
  return Number.isInteger(row) && row >= 0 && row < rows;
}
