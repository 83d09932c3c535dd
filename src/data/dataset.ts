/**
 * Training sets: recognised, checked, packed to RecordIO once where they are image folders, and opened
 * by the native reader, through which all training data go.
 */
import { isUtf8 } from 'node:buffer';
import { createHash } from 'node:crypto';
import type { BigIntStats, Dirent } from 'node:fs';
import { open, readdir, readFile, realpath, stat } from 'node:fs/promises';
import { join, resolve, sep } from 'node:path';
import sharp from 'sharp';
import { HardmineError } from '../errors.js';
import {
  type PackedFiles,
  packedFiles,
  RecordWriter,
  refuseExisting,
} from '../formats/recordio.js';
import { loadAddon, type NativeRecords } from '../native.js';
import { exists, ioError, throwIfAborted } from './files.js';
import { decodeImage, imageInfo, mapBounded, readImageFile, SIDE } from './images.js';

export interface DataProgress {
  phase: 'scanning' | 'packing' | 'checking';
  done: number;
  total: number;
}

export interface DataOptions {
  onProgress?: ((progress: DataProgress) => void) | undefined;
  /** Stops the work; it then throws ERR_ABORTED and leaves nothing half-written. */
  signal?: AbortSignal | undefined;
}

/** A labelled set of 112x112 face images, open for reading. */
export interface Dataset {
  /** What the user gave. */
  readonly kind: 'folder' | 'recordio';
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
  readonly records: NativeRecords;
  dispose(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

const bytewise = (a: string, b: string): number => Buffer.compare(Buffer.from(a), Buffer.from(b));

function dataError(sentence: string): HardmineError {
  return new HardmineError('ERR_DATA', sentence);
}

// ---------------------------------------------------------------------------------------------
// Image folders

interface ImageFile {
  /** Path below the folder, with '/'. */
  name: string;
  identity: number;
  bytes: number;
  modifiedNs: bigint;
}

interface ImageFolder {
  root: string;
  /** In byte order: position is the label. */
  names: string[];
  /** In byte order within each identity. */
  files: ImageFile[];
}

const IMAGE_NAME = /\.(jpe?g|png)$/i;

interface Entry {
  name: string;
  stats: BigIntStats;
}

/** What a folder holds, hidden entries left out, in byte order; links are followed within `root` alone. */
async function listFolder(folder: string, root: string): Promise<Entry[]> {
  let listed: Dirent<Buffer>[];
  try {
    listed = await readdir(folder, { withFileTypes: true, encoding: 'buffer' });
  } catch (error) {
    throw ioError(folder, 'read', error, 'give a folder that exists and may be read');
  }
  const named: Dirent<Buffer>[] = [];
  for (const entry of listed) {
    // Byte 0x2e is the leading dot of hidden files (.DS_Store, .git).
    if (entry.name[0] === 0x2e) continue;
    // biome-ignore lint/suspicious/noControlCharactersInRegex: names go into line-based files
    if (!isUtf8(entry.name) || /[\u0000-\u001f\u007f]/.test(entry.name.toString())) {
      throw dataError(
        `${folder} holds a name that is not plain UTF-8 text (bytes ${entry.name.toString('hex')}): rename it.`,
      );
    }
    named.push(entry);
  }
  named.sort((a, b) => Buffer.compare(a.name, b.name));
  return mapBounded(named, async (entry) => {
    const name = entry.name.toString();
    const path = join(folder, name);
    try {
      if (entry.isSymbolicLink() && !(await realpath(path)).startsWith(root + sep)) {
        throw dataError(
          `${path} is a symbolic link that leaves ${root}: copy the files there or remove the link.`,
        );
      }
      return { name, stats: await stat(path, { bigint: true }) };
    } catch (error) {
      throw ioError(path, 'read', error, 'remove it or give the right to read it');
    }
  });
}

/** Lists an image folder: one sub-folder per identity, in it JPEG and PNG files and nothing else. */
async function scanFolder(path: string, options: DataOptions): Promise<ImageFolder> {
  const root = await realpath(path);
  const entries = await listFolder(root, root);
  const loose = entries.find((entry) => entry.stats.isFile() && IMAGE_NAME.test(entry.name));
  if (loose !== undefined) {
    throw dataError(
      `${join(path, loose.name)} lies outside any identity's folder: an image folder holds one sub-folder per identity with its images.`,
    );
  }
  const folders = entries.filter((entry) => entry.stats.isDirectory());
  const files: ImageFile[] = [];
  for (const [identity, folder] of folders.entries()) {
    throwIfAborted(options.signal, 'reading the image folder');
    const images = await listFolder(join(root, folder.name), root);
    if (images.length === 0) {
      throw dataError(`${join(path, folder.name)} holds no images: add some or delete the folder.`);
    }
    for (const image of images) {
      const name = `${folder.name}/${image.name}`;
      if (!image.stats.isFile() || !IMAGE_NAME.test(image.name)) {
        throw dataError(
          `${join(path, name)} is not a .jpg, .jpeg or .png file: an identity's folder holds its images and nothing else, so move it away.`,
        );
      }
      files.push({
        name,
        identity,
        bytes: Number(image.stats.size),
        modifiedNs: image.stats.mtimeNs,
      });
    }
    options.onProgress?.({ phase: 'scanning', done: identity + 1, total: folders.length });
  }
  if (files.length === 0) {
    throw dataError(
      `${path} holds no images: give a .rec file or a folder with one sub-folder per identity and JPEG or PNG images in it.`,
    );
  }
  return { root: path, names: folders.map((folder) => folder.name), files };
}

function refuseOneIdentity(path: string, identities: number): void {
  if (identities < 2) {
    throw dataError(
      `${path} holds ${identities} identity where training needs at least 2: add images of other people.`,
    );
  }
}

/** Changes when any image is added, removed, renamed or written. */
function fingerprint(folder: ImageFolder): string {
  // 'pack 1': what packing does to an image; raise it when that changes.
  const hash = createHash('sha256').update('hardmine pack 1\0');
  for (const file of folder.files) hash.update(`${file.name}\0${file.bytes} ${file.modifiedNs}\0`);
  return hash.digest('hex').slice(0, 32);
}

// ---------------------------------------------------------------------------------------------
// Packing

/** Encoded images in the order in which they are packed: by class, without gaps. */
interface ImageSource {
  /** What to call it in messages. */
  title: string;
  count: number;
  names: readonly string[];
  label(index: number): number;
  /** The image's name in messages. */
  name(index: number): string;
  read(index: number): Promise<Buffer>;
}

/** Images prepared and then written together: enough to keep the decoders busy, small in memory. */
const CHUNK = 64;

/** The bytes to store for one image, or the size it has when that is not 112x112. */
async function prepare(bytes: Buffer, name: string): Promise<Buffer | string> {
  const info = await imageInfo(bytes, name);
  if (info.width !== SIDE || info.height !== SIDE) return `${info.width}x${info.height}`;
  if (info.plainJpeg) return bytes;
  return sharp(await decodeImage(bytes, name), { raw: { width: SIDE, height: SIDE, channels: 3 } })
    .jpeg({ quality: 100, chromaSubsampling: '4:4:4' })
    .toBuffer();
}

async function pack(
  source: ImageSource,
  prefix: string,
  options: DataOptions,
): Promise<PackedFiles> {
  const total = source.count;
  const writer = await RecordWriter.create(prefix);
  try {
    const wrongSizes: { name: string; size: string }[] = [];
    for (let start = 0; start < total; start += CHUNK) {
      throwIfAborted(options.signal, 'packing');
      const chunk = Array.from({ length: Math.min(CHUNK, total - start) }, (_, i) => start + i);
      const prepared = await mapBounded(chunk, async (index) =>
        prepare(await source.read(index), source.name(index)),
      );
      for (const [i, index] of chunk.entries()) {
        const image = prepared[i]!;
        if (typeof image === 'string') wrongSizes.push({ name: source.name(index), size: image });
        else if (wrongSizes.length === 0) await writer.add(source.label(index), image);
      }
      options.onProgress?.({ phase: 'packing', done: start + chunk.length, total });
    }
    if (wrongSizes.length > 0) throw wrongSizeError(source, wrongSizes);
    return await writer.finish(source.names, async (staged) => {
      throwIfAborted(options.signal, 'packing');
      options.onProgress?.({ phase: 'checking', done: 0, total });
      const records = await openRecords(staged.rec, staged.idx);
      try {
        // sharp has read the headers alone of what is copied; the decoder of training has the last word.
        const damaged = await records.verify();
        const first = damaged[0];
        if (first !== undefined) {
          throw dataError(
            `${source.name(first.index)} cannot be decoded (${first.reason}), the first of ${damaged.length} such images: replace or remove it.`,
          );
        }
      } finally {
        await records.dispose();
      }
      options.onProgress?.({ phase: 'checking', done: total, total });
    });
  } catch (error) {
    await writer.abort();
    throw error;
  }
}

function wrongSizeError(
  source: ImageSource,
  wrong: readonly { name: string; size: string }[],
): HardmineError {
  const first = wrong[0]!;
  const sizes = wrong.every((image) => image.size === first.size)
    ? `all ${first.size}`
    : `the first ${first.size}, others differ`;
  return dataError(
    `${wrong.length} of the ${source.count} images of ${source.title} are not ${SIDE}x${SIDE} pixels (${sizes}), beginning with ${first.name}: cut and align the faces first with hardmine align.`,
  );
}

function folderSource(folder: ImageFolder): ImageSource {
  const path = (index: number): string => join(folder.root, folder.files[index]!.name);
  return {
    title: folder.root,
    count: folder.files.length,
    names: folder.names,
    label: (index) => folder.files[index]!.identity,
    name: path,
    read: (index) => readImageFile(path(index)),
  };
}

function recordSource(dataset: Dataset): ImageSource {
  const { records, labels } = dataset;
  const order = Uint32Array.from(labels.keys()).sort((a, b) => labels[a]! - labels[b]! || a - b);
  return {
    title: dataset.path,
    count: order.length,
    names: dataset.names,
    label: (index) => labels[order[index]!]!,
    name: (index) => `record ${records.keys[order[index]!]} of ${dataset.recPath}`,
    read: async (index) => Buffer.from(await records.jpeg(order[index]!)),
  };
}

export interface PackResult {
  recPath: string;
  images: number;
  identities: number;
  /** Of the .rec. */
  bytes: number;
}

/**
 * Packs an image folder or another .rec into NAME.rec, NAME.idx and NAME.crc with `property` and
 * `identities.txt` beside them, as InsightFace lays them out. 112x112 RGB JPEGs without rotation are
 * copied byte for byte, others decoded and stored as JPEG of quality 100.
 * @param out path of the .rec, with or without the extension; an existing folder, or a path that ends
 *   with '/', gets train.rec
 * @throws ERR_DATA for a set that training would refuse (fewer than two identities is allowed here);
 *   ERR_IO when a file of that name exists or cannot be written; nothing is left behind then
 */
export async function packDataset(
  input: string,
  out: string,
  options: DataOptions = {},
): Promise<PackResult> {
  const prefix = await packPrefix(out);
  await refuseExisting(prefix);
  const found = await recognise(input);
  let source: ImageSource;
  let dataset: Dataset | undefined;
  if (found.kind === 'recordio') {
    dataset = await openPacked(found, found.rec);
    source = recordSource(dataset);
  } else {
    source = folderSource(await scanFolder(found.path, options));
  }
  try {
    const files = await pack(source, prefix, options);
    return {
      recPath: files.rec,
      images: source.count,
      identities: source.names.length,
      bytes: (await stat(files.rec)).size,
    };
  } finally {
    await dataset?.dispose();
  }
}

async function packPrefix(out: string): Promise<string> {
  const isFolder = out.endsWith('/') || (await isDirectory(out));
  return resolve(isFolder ? join(out, 'train') : out.replace(/\.rec$/, ''));
}

// ---------------------------------------------------------------------------------------------
// Opening

type Recognised = { path: string } & ({ kind: 'folder' } | { kind: 'recordio'; rec: string });

async function isDirectory(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory();
  } catch {
    return false; // absent: whoever opens it next says so
  }
}

async function recognise(given: string): Promise<Recognised> {
  const path = resolve(given);
  if (path.endsWith('.rec')) return { kind: 'recordio', path, rec: path };
  if (!(await exists(path))) {
    if (await exists(`${path}.rec`)) return { kind: 'recordio', path, rec: `${path}.rec` };
    throw dataError(
      `${path} does not exist: give a .rec file, or a folder with one sub-folder per identity.`,
    );
  }
  if (!(await isDirectory(path))) {
    throw dataError(
      `${path} is neither a .rec file nor a folder: give one of the two as training data.`,
    );
  }
  const records = (await readdir(path)).filter(
    (name) => name.endsWith('.rec') && !name.startsWith('.'),
  );
  if (records.length === 0) return { kind: 'folder', path };
  const chosen = records.includes('train.rec') ? 'train.rec' : records[0]!;
  if (records.length > 1 && chosen !== 'train.rec') {
    throw dataError(
      `${path} holds ${records.length} .rec files (${records.sort(bytewise).join(', ')}) and none is train.rec: give the path of one of them.`,
    );
  }
  return { kind: 'recordio', path, rec: join(path, chosen) };
}

async function openRecords(rec: string, idx: string): Promise<NativeRecords> {
  return (await loadAddon('cpu')).openRecords(rec, idx);
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
  const lines = size <= limit ? (await readFile(path, 'utf8')).split('\n') : [];
  if (lines.pop() !== '' || lines.length !== identities) {
    throw dataError(
      `${path} does not hold one line for each of the ${identities} identities: restore the file that hardmine pack wrote, or delete it to go without names.`,
    );
  }
  return lines;
}

async function openPacked(found: Recognised, recPath: string): Promise<Dataset> {
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
      kind: found.kind,
      layout: await readLayout(recPath),
      path: found.path,
      recPath,
      idxPath,
      images: records.images,
      identities: values.length,
      labels,
      names,
      records,
      dispose,
      [Symbol.asyncDispose]: dispose,
    };
  } catch (error) {
    await records.dispose();
    throw error;
  }
}

/**
 * Opens a training set: a .rec with its .idx, a folder that holds one (train.rec, or a single .rec), or
 * an image folder with one sub-folder of JPEG and PNG files per identity, which is packed to RecordIO
 * on first use. Identities of a folder are labelled in the byte order of their names; labels of a .rec
 * become 0..n-1 in ascending order. Hidden entries are left out.
 * @param options.cacheDir where packed folders are kept, `.hardmine-cache` by default; a set is used
 *   again until an image in its folder is added, removed, renamed or written
 * @throws ERR_DATA for anything that cannot be trained on, naming it; ERR_IO; ERR_ABORTED
 */
export async function openDataset(
  path: string,
  options: DataOptions & { cacheDir?: string | undefined } = {},
): Promise<Dataset> {
  const found = await recognise(path);
  let recPath: string;
  if (found.kind === 'recordio') {
    recPath = found.rec;
  } else {
    const folder = await scanFolder(found.path, options);
    refuseOneIdentity(found.path, folder.names.length);
    const prefix = join(options.cacheDir ?? '.hardmine-cache', fingerprint(folder), 'train');
    recPath = resolve(packedFiles(prefix).rec);
    // The .rec comes last into its place, so where it stands the set is whole.
    if (!(await exists(recPath))) await pack(folderSource(folder), prefix, options);
  }
  const dataset = await openPacked(found, recPath);
  try {
    refuseOneIdentity(found.path, dataset.identities);
  } catch (error) {
    await dataset.dispose();
    throw error;
  }
  return dataset;
}

// ---------------------------------------------------------------------------------------------
// Inspection

/** An image that training would refuse, by its file below the folder or by its key in the .rec. */
export type DamagedImage = { reason: string } & ({ file: string } | { key: number });

/** What `hardmine inspect --json` prints. */
export interface Inspection {
  kind: Dataset['kind'];
  images: number;
  identities: number;
  imagesPerIdentity: { min: number; median: number; max: number };
  /** Of the .rec, or of all image files. */
  bytes: number;
  damaged: DamagedImage[];
}

/** Reads and decodes every image of a set, and writes nothing. */
export async function inspectDataset(path: string, options: DataOptions = {}): Promise<Inspection> {
  const found = await recognise(path);
  if (found.kind === 'folder') return inspectFolder(found.path, options);
  const dataset = await openPacked(found, found.rec);
  try {
    const damaged = await dataset.records.verify();
    return {
      kind: 'recordio',
      images: dataset.images,
      identities: dataset.identities,
      imagesPerIdentity: countImages(dataset.labels, dataset.identities),
      bytes: dataset.records.bytes,
      damaged: damaged.map(({ index, reason }) => ({ key: dataset.records.keys[index]!, reason })),
    };
  } finally {
    await dataset.dispose();
  }
}

async function inspectFolder(path: string, options: DataOptions): Promise<Inspection> {
  const folder = await scanFolder(path, options);
  const { files } = folder;
  let done = 0;
  const reasons = await mapBounded(files, async ({ name }) => {
    throwIfAborted(options.signal, 'inspecting');
    let reason: string | undefined;
    try {
      await decodeImage(await readImageFile(join(path, name)), name);
    } catch (error) {
      if (!(error instanceof HardmineError)) throw error;
      reason = error.message;
    }
    done += 1;
    if (done % CHUNK === 0 || done === files.length) {
      options.onProgress?.({ phase: 'checking', done, total: files.length });
    }
    return reason;
  });
  const labels = Int32Array.from(files, (file) => file.identity);
  return {
    kind: 'folder',
    images: files.length,
    identities: folder.names.length,
    imagesPerIdentity: countImages(labels, folder.names.length),
    bytes: files.reduce((sum, file) => sum + file.bytes, 0),
    damaged: files.flatMap(({ name }, i) => {
      const reason = reasons[i];
      return reason === undefined ? [] : [{ file: name, reason }];
    }),
  };
}

function countImages(labels: Int32Array, identities: number): Inspection['imagesPerIdentity'] {
  const counts = new Int32Array(identities);
  for (const label of labels) counts[label]! += 1;
  counts.sort();
  const middle = identities / 2;
  return {
    min: counts[0]!,
    median: (counts[Math.ceil(middle) - 1]! + counts[Math.floor(middle)]!) / 2,
    max: counts[identities - 1]!,
  };
}
