/** Encoded images with classes, wherever they come from: what packing writes and inspection looks at. */
import { createHash } from 'node:crypto';
import { join } from 'node:path';
import { HardmineError, quote } from '../errors.js';
import { readImageFile } from './images.js';
import { readRows } from './rows.js';

/** Where an image of a set stands: a file below its folder, a record's key, a row, an image of a .bin. */
export type Place = { file: string } | { key: number } | { line: number } | { image: number };

export function placeText(place: Place): string {
  if ('file' in place) return place.file;
  if ('key' in place) return `record ${place.key}`;
  return 'line' in place ? `line ${place.line}` : `image ${place.image}`;
}

/** Encoded images, each of one class. */
export interface ImageSet {
  /** What to call it in messages. */
  readonly title: string;
  readonly count: number;
  /** Of the whole set as it is stored. */
  readonly bytes: number;
  /** One for each class, in class order. */
  readonly names: readonly string[];
  label(index: number): number;
  /** The image's name in messages. */
  name(index: number): string;
  place(index: number): Place;
  read(index: number): Promise<Buffer>;
  dispose(): Promise<void>;
}

/** A set in the order in which it is packed: by class, every class having images. */
export interface ImageSource extends ImageSet {
  /** Changes whenever an image, a class or their order may have changed; plain letters and digits. */
  readonly fingerprint: string;
  /** What the user should know about what was found, a sentence each. */
  readonly notes: readonly string[];
}

/** An image file of a set. */
export interface ImageFile {
  /** Path below the set's folder, with '/'. */
  name: string;
  identity: number;
  bytes: number;
}

/** A set of files below `root`. */
export function fileSet(
  root: string,
  files: readonly ImageFile[],
  names: readonly string[],
): ImageSet {
  const path = (index: number): string => join(root, files[index]!.name);
  return {
    title: root,
    count: files.length,
    bytes: files.reduce((sum, file) => sum + file.bytes, 0),
    names,
    label: (index) => files[index]!.identity,
    name: path,
    place: (index) => ({ file: files[index]!.name }),
    read: (index) => readImageFile(path(index)),
    dispose: async () => undefined,
  };
}

/** How many classes a set has, and how many images they have. */
export interface Identities {
  identities: number;
  imagesPerIdentity: { min: number; median: number; max: number };
}

export function countIdentities(set: ImageSet): Identities {
  const identities = set.names.length;
  const counts = new Int32Array(identities);
  for (let i = 0; i < set.count; i += 1) counts[set.label(i)]! += 1;
  counts.sort();
  const middle = identities / 2;
  return {
    identities,
    imagesPerIdentity: {
      min: counts[0]!,
      median: (counts[Math.ceil(middle) - 1]! + counts[Math.floor(middle)]!) / 2,
      max: counts[identities - 1]!,
    },
  };
}

export function dataError(sentence: string): HardmineError {
  return new HardmineError('ERR_DATA', sentence);
}

/** File systems allow 255 bytes, and so do we. */
const MAX_NAME_BYTES = 255;
/** How many names a note lists. */
const LISTED = 10;

/** A name that goes into line-based files and messages. */
export function isPlainName(name: string): boolean {
  return (
    name.length > 0 &&
    Buffer.byteLength(name) <= MAX_NAME_BYTES &&
    // biome-ignore lint/suspicious/noControlCharactersInRegex: names go into line-based files
    !/[\u0000-\u001f\u007f-\u009f\ufffd]/.test(name)
  );
}

/** 'a, b, c and 4 more'. */
export function listed(names: readonly string[]): string {
  const more = names.length > LISTED ? ` and ${names.length - LISTED} more` : '';
  return `${names.slice(0, LISTED).join(', ')}${more}`;
}

/**
 * Leaves out the identities that a file names, one a line; names that the set does not have are told in
 * a note.
 * @throws ERR_DATA where no image is left
 */
export async function withoutIdentities(source: ImageSource, list: string): Promise<ImageSource> {
  const excluded = new Set<string>();
  for await (const { line, bytes } of readRows(list, MAX_NAME_BYTES)) {
    const name = bytes.toString().trim();
    if (!isPlainName(name)) {
      throw dataError(
        `${list}, line ${line}: ${quote(name)} is no identity's name: give one a line.`,
      );
    }
    excluded.add(name);
  }
  const names: string[] = [];
  const classes = Int32Array.from(source.names, (name) =>
    excluded.has(name) ? -1 : names.push(name) - 1,
  );
  let count = 0;
  for (let i = 0; i < source.count; i += 1) if (classes[source.label(i)] !== -1) count += 1;
  if (count === 0) {
    throw dataError(`${list} excludes every identity of ${source.title}: exclude fewer.`);
  }
  const kept = new Uint32Array(count);
  for (let i = 0, k = 0; k < count; i += 1) if (classes[source.label(i)] !== -1) kept[k++] = i;
  const known = new Set(source.names);
  const unknown = [...excluded].filter((name) => !known.has(name));
  const notes = [`Identities excluded by ${list}: ${source.names.length - names.length}.`];
  if (unknown.length > 0) {
    notes.push(
      `${unknown.length} of the ${excluded.size} names in ${list} are not in ${source.title}: ${listed(unknown)}.`,
    );
  }
  return {
    ...source,
    count,
    names,
    notes: [...source.notes, ...notes],
    fingerprint: createHash('sha256')
      .update(`${source.fingerprint} without ${[...excluded].sort().join('\t')}`)
      .digest('hex'),
    label: (index) => classes[source.label(kept[index]!)]!,
    name: (index) => source.name(kept[index]!),
    place: (index) => source.place(kept[index]!),
    read: (index) => source.read(kept[index]!),
    dispose: () => source.dispose(),
  };
}
