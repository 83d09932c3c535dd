/** Packed training sets (.rec, .idx), opened by the native reader, through which all training data go. */
import { createHash } from 'node:crypto';
import { open, stat } from 'node:fs/promises';
import { packedFiles } from '../formats/recordio.js';
import { loadAddon, type NativeRecords } from '../native.js';
import { type DataOptions, exists, readFileBounded, throwIfAborted } from './files.js';
import { dataError, type ImageSource, isPlainName } from './image-source.js';

/** What can be trained on: image folders (LFW's tree is one), RecordIO, MS-Celeb-1M's tables, im2rec's lists. */
export type TrainingKind = 'folder' | 'recordio' | 'tsv' | 'lst';

/** A labelled set of 112x112 face images, open for reading. */
export interface Dataset {
  /** What the user gave. */
  readonly kind: TrainingKind;
  /** How the .rec is laid out: with InsightFace's records of identities, or as im2rec writes it. */
  readonly layout: 'insightface' | 'im2rec';
  /** What the user gave, absolute. */
  readonly path: string;
  readonly recPath: string;
  readonly idxPath: string;
  readonly images: number;
  readonly identities: number;
  /** Class of each image, [images], each of 0..identities-1 at least once. */
  readonly labels: Int32Array;
  /** Name of each class: the folder's, or the label's number where the set has no names. */
  readonly names: readonly string[];
  /** The reader beneath: jpeg(index) as stored, decode(indices) to RGB bytes [n, 112, 112, 3]. */
  readonly records: NativeRecords;
  /**
   * Reads and decodes every image.
   * @returns the damaged ones, by their place in `labels`, with the reason
   * @throws ERR_ABORTED after `signal`, ERR_DISPOSED
   */
  verify(options?: DataOptions): Promise<{ index: number; reason: string }[]>;
  /** Ends work under way and closes the files; may be called twice. */
  dispose(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

export async function openRecords(rec: string, idx: string): Promise<NativeRecords> {
  return (await loadAddon('cpu')).openRecords(rec, idx);
}

/** Images decoded between two looks at the signal: a tenth of a second's work. */
const VERIFIED_TOGETHER = 256;

/**
 * Reads and decodes every image; the damaged ones with the reason.
 * @param what is stopped when `options.signal` is: 'packing'
 * @throws ERR_ABORTED
 */
export async function verifyRecords(
  records: NativeRecords,
  what: string,
  { onProgress, signal }: DataOptions,
): Promise<{ index: number; reason: string }[]> {
  const total = records.images;
  const damaged = [];
  throwIfAborted(signal, what);
  onProgress?.({ phase: 'checking', done: 0, total });
  for (let done = 0; done < total; ) {
    const to = Math.min(total, done + VERIFIED_TOGETHER);
    damaged.push(...(await records.verify(done, to)));
    done = to;
    throwIfAborted(signal, what);
    onProgress?.({ phase: 'checking', done, total });
  }
  return damaged;
}

/** The layout, from the length of the first record: InsightFace's holds two labels and no image. */
async function readLayout(rec: string): Promise<Dataset['layout']> {
  const HEAD_BYTES = 8;
  const INSIGHTFACE_RECORD_0_BYTES = 24 + 2 * 4;
  const head = Buffer.alloc(HEAD_BYTES);
  const handle = await open(rec, 'r');
  try {
    await handle.read(head, 0, HEAD_BYTES, 0);
  } finally {
    await handle.close();
  }
  return head.readUInt32LE(4) === INSIGHTFACE_RECORD_0_BYTES ? 'insightface' : 'im2rec';
}

/** Labels as classes 0..n-1 in ascending order of the numbers found. */
function denseLabels(found: Int32Array): { labels: Int32Array; values: number[] } {
  const values = [...new Set(found)].sort((a, b) => a - b);
  const classes = new Map(values.map((value, index) => [value, index]));
  return { labels: found.map((value) => classes.get(value)!), values };
}

async function readNames(path: string, identities: number): Promise<string[] | undefined> {
  if (!(await exists(path))) return undefined;
  // A folder's name has at most 255 bytes, and a line break.
  const limit = identities * 256;
  const { size } = await stat(path);
  const text = size <= limit ? await readFileBounded(path, limit, 'a list of names') : '';
  const lines = text.toString().split('\n');
  if (lines.pop() !== '' || lines.length !== identities || !lines.every(isPlainName)) {
    throw dataError(
      `${path} does not hold one line for each of the ${identities} identities: restore the file that hardmine pack wrote, or delete it to go without names.`,
    );
  }
  return lines;
}

/**
 * @param given what the user gave; `kind` and `path` of the result
 * @throws ERR_DATA for what is missing, damaged or empty
 */
export async function openPacked(
  given: { kind: TrainingKind; path: string },
  recPath: string,
): Promise<Dataset> {
  const prefix = recPath.slice(0, -'.rec'.length);
  const { idx: idxPath, identities: namesPath } = packedFiles(prefix);
  for (const path of [recPath, idxPath]) {
    if (!(await exists(path))) {
      throw dataError(
        `${path} does not exist: RecordIO needs the .rec and the .idx of one name side by side.`,
      );
    }
  }
  const records = await openRecords(recPath, idxPath);
  try {
    if (records.images === 0) {
      throw dataError(`${recPath} holds no images: pack a set that has some.`);
    }
    const { labels, values } = denseLabels(records.labels);
    const names = (await readNames(namesPath, values.length)) ?? values.map(String);
    const dispose = (): Promise<void> => records.dispose();
    return {
      kind: given.kind,
      layout: await readLayout(recPath),
      path: given.path,
      recPath,
      idxPath,
      images: records.images,
      identities: values.length,
      labels,
      names,
      records,
      verify: async (options = {}) => verifyRecords(records, 'checking', options),
      dispose,
      [Symbol.asyncDispose]: dispose,
    };
  } catch (error) {
    await records.dispose();
    throw error;
  }
}

/** A packed set as packing and inspection see it: by class, those of a class in the order of the .rec. */
export async function recordSource(dataset: Dataset): Promise<ImageSource> {
  const { records, labels } = dataset;
  const order = Uint32Array.from(labels.keys()).sort((a, b) => labels[a]! - labels[b]! || a - b);
  const key = (index: number): number => records.keys[order[index]!]!;
  const stats = await Promise.all(
    [dataset.recPath, dataset.idxPath].map((path) => stat(path, { bigint: true })),
  );
  return {
    title: dataset.path,
    count: order.length,
    bytes: records.bytes,
    names: dataset.names,
    fingerprint: createHash('sha256')
      .update(
        [dataset.recPath, ...stats.map(({ size, mtimeNs }) => `${size} ${mtimeNs}`)].join('\0'),
      )
      .digest('hex'),
    notes: [],
    label: (index) => labels[order[index]!]!,
    name: (index) => `record ${key(index)} of ${dataset.recPath}`,
    place: (index) => ({ key: key(index) }),
    read: async (index) => Buffer.from(await records.jpeg(order[index]!)),
    dispose: () => dataset.dispose(),
  };
}
