/** Packing: any set that can be trained on to RecordIO as InsightFace lays it out. */
import { stat } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { checkPath, HardmineError } from '../errors.js';
import {
  type PackedFiles,
  packedFiles,
  RecordWriter,
  refuseExisting,
} from '../formats/recordio.js';
import { DigestList, type Duplicates, reportDuplicates } from './duplicates.js';
import { type DataOptions, throwIfAborted } from './files.js';
import { folderSource } from './image-folder.js';
import { imageListSource } from './image-list.js';
import { dataError, type ImageSource, withoutIdentities } from './image-source.js';
import { decodeImage, encodeJpeg, imageInfo, mapBounded, SIDE } from './images.js';
import { msCelebSource } from './ms-celeb.js';
import { openPacked, openRecords, recordSource, verifyRecords } from './packed-set.js';
import { isDirectory, recognise, type TrainingSet, trainingOnly } from './recognise.js';

/** Images prepared and then written together: enough to keep the decoders busy, small in memory. */
const CHUNK = 64;
/** Images after which what is written is made durable: some 20 MiB, a second's work. */
const CHECKPOINT = 64 * CHUNK;

/** The bytes to store for one image, or the size it has when that is not 112x112. */
async function prepare(bytes: Buffer, name: string): Promise<Buffer | string> {
  const info = await imageInfo(bytes, name);
  if (info.width !== SIDE || info.height !== SIDE) return `${info.width}x${info.height}`;
  if (info.plainJpeg) return bytes;
  return encodeJpeg({ pixels: await decodeImage(bytes, name), width: SIDE, height: SIDE });
}

/**
 * Packs a source to `prefix`. A process that is killed, or stopped by `options.signal`, leaves what it
 * had made durable in a hidden folder, from which the same pack goes on; after an error nothing is left.
 * @throws ERR_DATA naming the image that is damaged, or counting those of another size; ERR_IO;
 *   ERR_ABORTED
 */
export async function packSource(
  source: ImageSource,
  prefix: string,
  options: DataOptions,
): Promise<{ files: PackedFiles; duplicates: Duplicates }> {
  const total = source.count;
  const digests = new DigestList();
  const writer = await RecordWriter.create(prefix, {
    source: source.fingerprint,
    onFound: (image) => digests.add(image),
  });
  try {
    const wrong = new WrongSizes(source);
    for (let start = writer.images; start < total; start += CHUNK) {
      throwIfAborted(options.signal, 'packing');
      const chunk = Array.from({ length: Math.min(CHUNK, total - start) }, (_, i) => start + i);
      const prepared = await mapBounded(chunk, async (index) =>
        prepare(await source.read(index), source.name(index)),
      );
      for (const [i, index] of chunk.entries()) {
        const image = prepared[i]!;
        if (typeof image === 'string') wrong.add(index, image);
        else if (wrong.count === 0) {
          await writer.add(source.label(index), image);
          digests.add(image);
        }
      }
      if (wrong.count === 0 && writer.images % CHECKPOINT === 0) await writer.checkpoint();
      options.onProgress?.({ phase: 'packing', done: start + chunk.length, total });
    }
    wrong.refuse();
    let duplicates: Duplicates | undefined;
    const files = await writer.finish(source.names, async (staged) => {
      await checkImages(staged, source, options);
      duplicates = await reportDuplicates(digests, source, staged.duplicates);
    });
    return { files, duplicates: duplicates! };
  } catch (error) {
    if (error instanceof HardmineError && error.code === 'ERR_ABORTED') {
      const kept = await writer.suspend();
      if (kept > 0) throw stopped(prefix, kept, total, error);
    } else {
      await writer.abort();
    }
    throw error;
  }
}

function stopped(prefix: string, kept: number, total: number, cause: unknown): HardmineError {
  return new HardmineError(
    'ERR_ABORTED',
    `packing ${prefix}.rec was stopped by the caller with ${kept} of ${total} images safe: pack the same again and it goes on from there.`,
    { cause },
  );
}

/** Decodes the staged set: sharp has read the headers alone of what is copied. */
async function checkImages(
  staged: PackedFiles,
  source: ImageSource,
  options: DataOptions,
): Promise<void> {
  const records = await openRecords(staged.rec, staged.idx);
  try {
    // The decoder of training has the last word.
    const damaged = await verifyRecords(records, 'packing', options);
    const first = damaged[0];
    if (first !== undefined) {
      // Of the reader's sentence what is wrong, not where in the staged file, which goes again.
      const [, reason = first.reason] = /\(label \d+\) is (.*?);/.exec(first.reason) ?? [];
      throw dataError(
        `${source.name(first.index)} cannot be decoded (${reason}), the first of ${damaged.length} such images: replace or remove them; hardmine inspect names all.`,
      );
    }
  } finally {
    await records.dispose();
  }
}

/** Images that are not 112x112: their count and the first, however many they are. */
class WrongSizes {
  readonly #source: ImageSource;
  #first: { name: string; size: string } | undefined;
  #alike = true;
  count = 0;

  constructor(source: ImageSource) {
    this.#source = source;
  }

  add(index: number, size: string): void {
    this.#first ??= { name: this.#source.name(index), size };
    this.#alike &&= size === this.#first.size;
    this.count += 1;
  }

  refuse(): void {
    if (this.#first === undefined) return;
    const { name, size } = this.#first;
    const sizes = this.#alike ? `all ${size}` : `the first ${size}, others differ`;
    throw dataError(
      `${this.count} of the ${this.#source.count} images of ${this.#source.title} are not ${SIDE}x${SIDE} pixels (${sizes}), beginning with ${name}: cut and align the faces first with hardmine align.`,
    );
  }
}

/** Which part of a set is meant. */
export interface Selection {
  /** A cleaned list of MS-Celeb-1M: what to keep of a .tsv, and under which labels. */
  keep?: string | undefined;
  /** A file of identities to leave out, one name a line. */
  excludeIdentities?: string | undefined;
}

/**
 * Opens what a training set holds, as it is stored.
 * @throws ERR_INPUT for `keep` with anything but a .tsv; ERR_DATA; ERR_IO; ERR_ABORTED
 */
export async function openSource(
  found: TrainingSet,
  { keep, excludeIdentities }: Selection,
  options: DataOptions,
): Promise<ImageSource> {
  if (keep !== undefined && found.kind !== 'tsv') {
    throw new HardmineError(
      'ERR_INPUT',
      `${found.path} is no .tsv of MS-Celeb-1M, to which ${keep} as a list to keep could be applied: leave identities out with --exclude-identities instead.`,
    );
  }
  const source = await openWhole(found, keep, options);
  if (excludeIdentities === undefined) return source;
  try {
    return await withoutIdentities(source, excludeIdentities);
  } catch (error) {
    await source.dispose();
    throw error;
  }
}

async function openWhole(
  found: TrainingSet,
  keep: string | undefined,
  options: DataOptions,
): Promise<ImageSource> {
  switch (found.kind) {
    case 'recordio':
      return recordSource(await openPacked(found, found.rec));
    case 'tsv':
      return msCelebSource(found.path, keep, options);
    case 'lst':
      return imageListSource(found.path, options);
    case 'folder':
      return folderSource(found.path, options);
  }
}

export interface PackResult {
  recPath: string;
  images: number;
  identities: number;
  /** Of the .rec. */
  bytes: number;
  duplicates: Duplicates;
  /** NAME.duplicates.tsv, where there are any. */
  duplicatesPath?: string;
  /** What the user should know, a sentence each. */
  notes: readonly string[];
}

/**
 * Packs an image folder, a .tsv, a .lst or another .rec into NAME.rec, NAME.idx and NAME.crc with
 * `property` and `identities.txt` beside them, as InsightFace lays them out, and NAME.duplicates.tsv
 * where images are the same byte for byte. 112x112 RGB JPEGs without rotation are copied byte for byte,
 * others decoded and stored as JPEG of quality 100.
 * @param out path of the .rec, with or without the extension; an existing folder, or a path that ends
 *   with '/', gets train.rec
 * @throws ERR_DATA for a set that training would refuse (fewer than two identities is allowed here);
 *   ERR_IO when a file of that name exists or cannot be written; nothing is left behind then. After
 *   ERR_ABORTED, and after the process was killed, the same call goes on where it was
 */
export async function packDataset(
  input: string,
  out: string,
  options: DataOptions & Selection = {},
): Promise<PackResult> {
  const prefix = await packPrefix(out);
  await refuseExisting(prefix);
  const source = await openSource(trainingOnly(await recognise(input)), options, options);
  try {
    const { files, duplicates } = await packSource(source, prefix, options);
    return {
      recPath: files.rec,
      images: source.count,
      identities: source.names.length,
      bytes: (await stat(files.rec)).size,
      duplicates,
      ...(duplicates.copies > 0 && { duplicatesPath: packedFiles(prefix).duplicates }),
      notes: source.notes,
    };
  } finally {
    await source.dispose();
  }
}

async function packPrefix(out: string): Promise<string> {
  checkPath(out, 'the packed set');
  const isFolder = out.endsWith('/') || (await isDirectory(out));
  return resolve(isFolder ? join(out, 'train') : out.replace(/\.rec$/, ''));
}
