/** YouTube Faces: its splits, its folders of frames, its protocol. */

import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { Box } from '../align/boxes.js';
import { exists } from '../data/files.js';
import { mapBounded } from '../data/images.js';
import { checkPath, HardmineError, oneLine, oneOf, quote } from '../errors.js';
import { type AlignFace, ImageFiles } from './image-source.js';
import { isPlainName, linesOf, readList, refuseMissing } from './lists.js';
import {
  embedForPairs,
  evaluatePairs,
  type PairsResult,
  type ScoreModel,
  type VerificationPair,
  verifyPairs,
} from './pairs.js';
import { type ProtocolName, protocolOf, rowLength } from './protocols.js';
import { VideoCache, type VideoRows } from './video-cache.js';

export const AGGREGATES = ['mean-embedding', 'mean', 'max', 'min'] as const;
/**
 * How two videos are compared: by the mean of their frames' unit embeddings, brought to length 1 again,
 * or by the mean, greatest or least cosine of a frame of one and a frame of the other.
 */
export type Aggregate = (typeof AGGREGATES)[number];

const LAYOUTS = ['frame_images_DB', 'aligned_images_DB'] as const;
/** How many videos a note names. */
const NAMED = 10;

export interface YtfVideo {
  person: string;
  /** The folder under the person's: "0", "1", ... */
  number: string;
}

export interface YtfSplits {
  folds: number;
  /** Distinct videos in order of first mention. */
  videos: YtfVideo[];
  /** `a` and `b` are indices of `videos`. */
  pairs: VerificationPair[];
}

/**
 * Reads splits.txt or the corrected list: lines "split, pair, Person/video, Person/video, same", splits
 * and pairs counted from 1, with or without a line of headings. A name may be of one person in a pair
 * of two: the corrected list keeps such pairs where a label was wrong.
 *
 * @param path names the list in errors
 * @throws HardmineError ERR_PROTOCOL with the line's number for everything else, and for a split without
 *   both kinds of pair or of another size than the first
 */
export function parseYtfSplits(text: string, path = 'splits.txt'): YtfSplits {
  const lines = linesOf(text);
  const fail = (line: number, what: string): never => {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `${path}, line ${line + 1}: ${what}; use YouTube Faces' own list (splits.txt, splits_corrected.txt).`,
    );
  };
  const headings = /^split/i.test(lines[0] ?? '') ? 1 : 0;
  if (lines.length === headings) fail(headings, 'found no pair');
  const videos: YtfVideo[] = [];
  const rows = new Map<string, number>();
  const row = (field: string, line: number): number => {
    const [person = '', number = '', ...rest] = field.split('/');
    if (!isPlainName(person) || !/^\d{1,9}$/.test(number) || rest.length > 0) {
      fail(line, `${quote(field)} is no video, expected "Person/number"`);
    }
    const known = rows.get(field);
    if (known !== undefined) return known;
    rows.set(field, videos.length);
    return videos.push({ person, number }) - 1;
  };
  const counts: [number, number][] = [];
  const pairs = lines.slice(headings).map((text, i): VerificationPair => {
    const line = i + headings;
    const fields = text.split(',').map((field) => field.trim());
    const [split = '', place = '', first = '', second = '', same = ''] = fields;
    if (fields.length !== 5 || !/^[01]$/.test(same)) {
      fail(
        line,
        `found ${quote(text)}, expected "split, pair, Person/video, Person/video, 0 or 1"`,
      );
    }
    const isNext = Number(split) === counts.length + 1;
    const count = isNext ? ([0, 0] as [number, number]) : counts.at(-1);
    if (!count || !(isNext || Number(split) === counts.length)) {
      return fail(
        line,
        `found split ${quote(split)}, expected ${counts.length} or ${counts.length + 1}`,
      );
    }
    if (isNext) counts.push(count);
    if (Number(place) !== count[0] + count[1] + 1) {
      fail(
        line,
        `found pair ${quote(place)} of split ${split}, expected ${count[0] + count[1] + 1}`,
      );
    }
    count[same === '1' ? 1 : 0]++;
    const a = row(first, line);
    const b = row(second, line);
    if (a === b) fail(line, 'it pairs a video with itself');
    return { a, b, same: same === '1', fold: counts.length - 1 };
  });
  if (counts.length < 2) fail(lines.length - 1, 'found one split, expected at least two');
  const size = ([different, same]: [number, number]) => different + same;
  for (const [split, count] of counts.entries()) {
    if (count.includes(0)) {
      fail(
        lines.length - 1,
        `split ${split + 1} holds ${count[1]} pairs of one person and ${count[0]} of two, expected both kinds`,
      );
    }
    if (size(count) !== size(counts[0]!)) {
      fail(
        lines.length - 1,
        `split ${split + 1} holds ${size(count)} pairs where split 1 holds ${size(counts[0]!)}`,
      );
    }
  }
  return { folds: counts.length, videos, pairs };
}

/** A video of the data set and the files of its frames, in their order. */
export interface FoundVideo {
  name: string;
  frames: string[];
  /** Where each frame's face is, if its person's labeled_faces.txt says so. */
  boxes: (Box | undefined)[];
}

/**
 * Frames of `videos` under `root`, which holds `frame_images_DB` or `aligned_images_DB` (of both, the
 * former with `boxes` and the latter without), or is such a folder itself: Person/video/ and in it
 * `video.frame.jpg` or `aligned_detect_video.frame.jpg`.
 *
 * @param boxes whether to read the labels of `frame_images_DB` too
 * @throws HardmineError ERR_PROTOCOL with the count of videos without a frame and the first ten of them,
 *   for a file name without a frame's number, and for labels that are missing or damaged
 */
export async function findVideos(
  root: string,
  videos: readonly YtfVideo[],
  boxes: boolean,
): Promise<{ folder: string; videos: FoundVideo[] }> {
  const order = boxes ? LAYOUTS : [...LAYOUTS].reverse();
  const candidates = order.map((layout) => join(root, layout));
  const standing = await Promise.all(candidates.map(exists));
  const folder = candidates.find((_, i) => standing[i]) ?? root;
  const missing: string[] = [];
  const found = await mapBounded(videos, async ({ person, number }): Promise<FoundVideo> => {
    const name = `${person}/${number}`;
    const frames = await framesOf(join(folder, person, number));
    if (frames.length === 0) missing.push(name);
    return { name, frames, boxes: [] };
  });
  refuseMissing(missing, videos.length, 'videos', folder);
  if (boxes && !folder.endsWith('aligned_images_DB')) {
    const people = new Map<string, Map<string, Box>>();
    for (const [i, { person, number }] of videos.entries()) {
      const labels = people.get(person) ?? (await readLabels(folder, person));
      people.set(person, labels);
      const video = found[i]!;
      video.boxes = video.frames.map((path) =>
        labels.get(`${number}/${path.slice(path.lastIndexOf('/') + 1)}`),
      );
    }
  }
  return { folder, videos: found };
}

/** Paths of a video's frames by rising frame number; none where the folder is not there. */
async function framesOf(folder: string): Promise<string[]> {
  const names = await readdir(folder).catch(() => []);
  const frames = names
    .filter((name) => /\.(?:jpe?g|png)$/i.test(name))
    .map((name) => {
      const match = /^(?:aligned_detect_)?\d+\.(\d{1,9})\.\w+$/.exec(name);
      if (!match) {
        throw new HardmineError(
          'ERR_PROTOCOL',
          `${oneLine(join(folder, name))} is no frame's name, expected "video.frame.jpg" or "aligned_detect_video.frame.jpg"; rename or remove it.`,
        );
      }
      return { name, frame: Number(match[1]) };
    })
    .sort((a, b) => a.frame - b.frame);
  const twice = frames.find(({ frame }, i) => frames[i + 1]?.frame === frame);
  if (twice) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `${folder} holds frame ${twice.frame} more than once; remove all but one.`,
    );
  }
  return frames.map(({ name }) => join(folder, name));
}

/** Boxes of a person's frames by "video/file", from "file,ignore,x,y,width,height,ignore,ignore", x and y of the centre. */
async function readLabels(folder: string, person: string): Promise<Map<string, Box>> {
  const path = join(folder, `${person}.labeled_faces.txt`);
  const boxes = new Map<string, Box>();
  for (const [line, text] of linesOf(await readList(path, '--ytf')).entries()) {
    const [file = '', , ...fields] = text.split(',');
    const [x, y, width, height] = fields
      .slice(0, 4)
      .map((field) => (/^-?\d+(\.\d+)?$/.test(field.trim()) ? Number(field) : Number.NaN));
    if (!(x! + y! + width! + height! < Number.POSITIVE_INFINITY && width! > 0 && height! > 0)) {
      throw new HardmineError(
        'ERR_PROTOCOL',
        `${path}, line ${line + 1}: found ${quote(text)}, expected "file,0,x,y,width,height,0,1"; use the data set's own file.`,
      );
    }
    const key = file.split(/[\\/]/).slice(-2).join('/');
    boxes.set(key, {
      x: x! - width! / 2,
      y: y! - height! / 2,
      width: width!,
      height: height!,
    });
  }
  return boxes;
}

/** `most` of `items`, in the middle of equally long stretches; all where there are no more. */
export function evenlySpaced<T>(items: readonly T[], most: number): T[] {
  if (items.length <= most) return [...items];
  return Array.from(
    { length: most },
    (_, i) => items[Math.floor(((i + 0.5) * items.length) / most)]!,
  );
}

export interface EvaluateYtf {
  /** Folder that holds `frame_images_DB` or `aligned_images_DB`, or such a folder itself. */
  root: string;
  /** List of pairs; `splits.txt` in `root` by default. */
  splits?: string;
  /** Frames of a video at most, evenly spaced over it; all by default. */
  frames?: number;
  /** 'mean-embedding' by default. */
  aggregate?: Aggregate;
  /** Images a call of the model, 64 by default. */
  batch?: number;
  protocol?: ProtocolName;
  /** For frames that are not aligned yet. */
  align?: AlignFace;
  /**
   * Keeps the embeddings of every video in `folder`. `key` names the model and the alignment by their
   * contents (a hash): embeddings made under another key are not used.
   */
  cache?: { folder: string; key: string };
  /** Told of videos done so far. */
  onProgress?: (done: number, total: number) => void;
  signal?: AbortSignal;
}

/** `evaluate --json` without `model`. */
export type YtfResult = PairsResult & {
  dataset: 'ytf';
  videos: number;
  /** `used` counts the frames of all videos that were embedded and held a face. */
  frames: { sampling: 'all' | 'evenly spaced'; perVideo: number | null; used: number };
  framesWithoutFace: number;
  aggregate: Aggregate;
  /** Always 0: a missing video is an error. */
  missing: 0;
  /** Of each row the frame in the middle of its video. */
  details: { paths: string[] };
};

/**
 * The YouTube Faces protocol: ten splits of pairs of videos, each judged at the threshold that the others
 * choose. Every frame's embedding (and, as the protocol says, its mirror image's) is brought to length 1
 * before videos are compared. Frames in which `align` finds no face are left out and counted. 'max' and
 * 'min' keep every frame's embedding in memory: 2 KiB a frame, 1.2 GiB for all 621,126.
 *
 * @throws HardmineError ERR_INPUT for settings, ERR_PROTOCOL for a bad list, for videos that are missing
 *   (the first ten by name) and damaged labels; ERR_DATA for a frame that cannot be read or is not 112x112
 *   and for a video without a face, ERR_NON_FINITE for a damaged model, ERR_ABORTED after `signal`
 */
export async function evaluateYtf(model: ScoreModel, options: EvaluateYtf): Promise<YtfResult> {
  checkPath(options?.root, 'YouTube Faces');
  const { root, splits = join(root, 'splits.txt'), aggregate = 'mean-embedding' } = options;
  const { protocol = 'insightface', frames: most, cache } = options;
  checkOptions(options);
  const { videos: listed, pairs } = parseYtfSplits(await readList(splits, '--splits'), splits);
  const found = await findVideos(root, listed, options.align !== undefined);
  const videos = found.videos.map((video) => sample(video, most));
  const dim = rowLength(model.embedding, protocol);
  const store =
    cache &&
    (await VideoCache.open(
      cache.folder,
      { key: cache.key, mirror: protocolOf(protocol).mirror, frames: most ?? null },
      dim,
    ));

  const pairwise = aggregate === 'max' || aggregate === 'min';
  const means = new Float32Array(videos.length * dim);
  const units: Float32Array[] = [];
  let used = 0;
  let withoutFace = 0;
  for (const [i, video] of videos.entries()) {
    const rows =
      (await store?.take(video.name, video.frames)) ??
      (await embedVideo(model, video, options, store));
    used += rows.rows.length / dim;
    withoutFace += rows.withoutFace;
    const unit = unitRows(rows.rows, dim, video.name);
    if (pairwise) units.push(unit);
    means.set(meanOf(unit, dim), i * dim);
    options.onProgress?.(i + 1, videos.length);
    if (options.signal?.aborted) {
      throw new HardmineError(
        'ERR_ABORTED',
        `The evaluation was stopped after ${i + 1} of ${videos.length} videos.`,
      );
    }
  }
  const result =
    aggregate === 'mean-embedding'
      ? evaluatePairs({ embeddings: means, dim, pairs, protocol })
      : await verifyCosines(pairs, protocol, options.signal, (a, b) =>
          pairwise
            ? extreme(units[a]!, units[b]!, dim, aggregate)
            : dot(means, a * dim, means, b * dim, dim),
        );
  return {
    ...result,
    dataset: 'ytf',
    videos: videos.length,
    frames: {
      sampling: most === undefined ? 'all' : 'evenly spaced',
      perVideo: most ?? null,
      used,
    },
    framesWithoutFace: withoutFace,
    aggregate,
    missing: 0,
    details: {
      ...result.details,
      notes: [...result.details.notes, ...cacheNotes(store)],
      paths: videos.map(({ frames }) => frames[frames.length >> 1]!),
    },
  };
}

function checkOptions({ frames, aggregate, protocol = 'insightface' }: EvaluateYtf): void {
  if (aggregate !== undefined) oneOf('aggregate', aggregate, AGGREGATES);
  if (frames !== undefined && !(Number.isInteger(frames) && frames > 0)) {
    throw new HardmineError(
      'ERR_INPUT',
      `The number of frames is ${frames}, expected a whole number from 1 up.`,
    );
  }
  if (aggregate !== undefined && aggregate !== 'mean-embedding' && protocolOf(protocol).centred) {
    throw new HardmineError(
      'ERR_INPUT',
      `The protocol ${protocol} takes the mean embedding off, so it needs one embedding a video: choose the aggregate mean-embedding instead of ${aggregate}.`,
    );
  }
}

function sample(video: FoundVideo, most: number | undefined): FoundVideo {
  if (most === undefined) return video;
  const kept = evenlySpaced([...video.frames.keys()], most);
  return {
    name: video.name,
    frames: kept.map((i) => video.frames[i]!),
    boxes: kept.map((i) => video.boxes[i]),
  };
}

async function embedVideo(
  model: ScoreModel,
  { name, frames, boxes }: FoundVideo,
  { protocol = 'insightface', align, batch, signal }: EvaluateYtf,
  store: VideoCache | undefined,
): Promise<VideoRows> {
  const images = new ImageFiles(frames, align, boxes);
  const all = await embedForPairs(model, {
    images,
    protocol,
    ...(batch !== undefined && { batch }),
    ...(signal && { signal }),
  });
  const dim = rowLength(model.embedding, protocol);
  const absent = new Set(images.withoutFace);
  if (absent.size === frames.length) {
    throw new HardmineError(
      'ERR_DATA',
      `No face was found in any of the ${frames.length} frames of the video ${name}; use more frames of it, or align it by hand.`,
    );
  }
  const kept = [...frames.keys()].filter((frame) => !absent.has(frame));
  const rows = new Float32Array(kept.length * dim);
  for (const [to, from] of kept.entries()) {
    rows.set(all.subarray(from * dim, (from + 1) * dim), to * dim);
  }
  const video = { rows, withoutFace: absent.size };
  await store?.put(name, frames, video);
  return video;
}

/** Rows brought to length 1; one of all zeros stays zero. */
function unitRows(rows: Float32Array, dim: number, name: string): Float32Array {
  const units = Float32Array.from(rows);
  for (let at = 0; at < units.length; at += dim) {
    const squares = dot(units, at, units, at, dim);
    if (!Number.isFinite(squares)) {
      throw new HardmineError(
        'ERR_NON_FINITE',
        `The embedding of a frame of the video ${name} holds NaN or infinity; the model's weights are damaged or its training diverged.`,
      );
    }
    const inverseNorm = squares > 0 ? 1 / Math.sqrt(squares) : 0;
    for (let i = at; i < at + dim; i++) units[i]! *= inverseNorm;
  }
  return units;
}

/** Its length is below 1; evaluatePairs brings it to 1, and the mean cosine of two videos is the product of two of them. */
function meanOf(units: Float32Array, dim: number): Float64Array {
  const mean = new Float64Array(dim);
  for (let at = 0; at < units.length; at += dim) {
    for (let i = 0; i < dim; i++) mean[i]! += units[at + i]!;
  }
  return mean.map((sum) => (sum * dim) / units.length);
}

async function verifyCosines(
  pairs: readonly VerificationPair[],
  protocol: ProtocolName,
  signal: AbortSignal | undefined,
  cosine: (a: number, b: number) => number,
): Promise<PairsResult> {
  const scores = new Float64Array(pairs.length);
  for (const [i, { a, b }] of pairs.entries()) {
    const value = cosine(a, b);
    // Of unit vectors, |a - b|^2 = 2 - 2 cos; rounding must not bring it below 0.
    scores[i] = protocolOf(protocol).score === 'cosine' ? value : Math.max(0, 2 - 2 * value);
    await new Promise(setImmediate); // a pair of long videos takes tens of milliseconds
    if (signal?.aborted) {
      throw new HardmineError(
        'ERR_ABORTED',
        `The evaluation was stopped after ${i + 1} of ${pairs.length} pairs.`,
      );
    }
  }
  return verifyPairs(() => scores, pairs, protocol);
}

function extreme(a: Float32Array, b: Float32Array, dim: number, which: 'max' | 'min'): number {
  const pick = which === 'max' ? Math.max : Math.min;
  let found = which === 'max' ? -1 : 1;
  for (let i = 0; i < a.length; i += dim) {
    for (let j = 0; j < b.length; j += dim) found = pick(found, dot(a, i, b, j, dim));
  }
  return found;
}

function dot(a: Float32Array, i: number, b: Float32Array, j: number, dim: number): number {
  let sum = 0;
  for (let k = 0; k < dim; k++) sum += a[i + k]! * b[j + k]!;
  return sum;
}

/** What of the cache was not used although it was there. */
function cacheNotes(store: VideoCache | undefined): string[] {
  const note = (videos: readonly string[], why: string): string[] => {
    if (videos.length === 0) return [];
    const more = videos.length > NAMED ? ` and ${videos.length - NAMED} more` : '';
    return [
      `${videos.length} cached videos ${why} and were embedded anew: ${videos.slice(0, NAMED).join(', ')}${more}.`,
    ];
  };
  if (!store) return [];
  return [...note(store.stale, 'had other frames'), ...note(store.damaged, 'were damaged')];
}
