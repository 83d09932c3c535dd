/**
 * im2rec's lists (.lst): an image a row, "index TAB label ... TAB path", the path below the folder that
 * holds the list. The first label is the identity.
 */

import { createHash } from 'node:crypto';
import { open, realpath, stat } from 'node:fs/promises';
import { dirname, join, normalize, sep } from 'node:path';
import { oneLine, quote } from '../errors.js';
import { type DataOptions, ioError, throwIfAborted } from './files.js';
import { dataError, type ImageSource } from './image-source.js';
import { readImageFile } from './images.js';
import { type Row, RowIndex, readRows } from './rows.js';

/** Linux takes paths of 4,096 bytes; labels and index are numbers. */
const MAX_ROW_BYTES = 8192;
/** Labels are stored as float32, which is exact up to here. */
const MAX_LABEL = 2 ** 24;
/** Rows between two reports of progress. */
const REPORT_ROWS = 256;

/** @throws ERR_DATA naming the row that is wrong or whose image is missing; ERR_IO; ERR_ABORTED */
export async function imageListSource(path: string, options: DataOptions): Promise<ImageSource> {
  const root = await realpath(dirname(path));
  const { size } = await stat(path);
  const hash = createHash('sha256').update('hardmine pack 1 lst\0');
  const index = new RowIndex();
  const seen = new Map<number, number>();
  let imageBytes = 0;
  for await (const row of readRows(path, MAX_ROW_BYTES)) {
    const { label, image } = parse(row.bytes, `${path}, line ${row.line}`);
    const stats = await statInside(root, image, path, row);
    imageBytes += Number(stats.size);
    hash.update(row.bytes).update(`\0${stats.size} ${stats.mtimeNs}\0`);
    let number = seen.get(label);
    if (number === undefined) {
      number = seen.size;
      seen.set(label, number);
    }
    index.add(row, number);
    if (index.count % REPORT_ROWS === 0) {
      throwIfAborted(options.signal, 'reading the list');
      options.onProgress?.({ phase: 'scanning', done: row.offset, total: size });
    }
  }
  if (index.count === 0) throw dataError(`${path} is empty: give a list that im2rec takes.`);
  const labels = [...seen.keys()].sort((a, b) => a - b);
  const ranks = new Int32Array(labels.length);
  for (const [rank, label] of labels.entries()) ranks[seen.get(label)!] = rank;
  index.sort(ranks);
  const file = await open(path, 'r');
  const nameOf = (row: number): string => `${path}, line ${index.line(row)}`;
  return {
    title: path,
    count: index.count,
    bytes: imageBytes,
    names: labels.map(String),
    fingerprint: hash.digest('hex').slice(0, 32),
    notes: [],
    label: (row) => index.label(row),
    name: nameOf,
    place: (row) => ({ line: index.line(row) }),
    read: async (row) => {
      const { image } = parse(await index.read(file, row), nameOf(row));
      return readImageFile(join(root, image));
    },
    dispose: () => file.close(),
  };
}

function parse(bytes: Buffer, name: string): { label: number; image: string } {
  const text = bytes.toString();
  const columns = text.split('\t');
  const image = columns.at(-1)!;
  const numbers = columns.slice(0, -1).map(Number);
  if (
    columns.length < 3 ||
    columns.slice(0, -1).some((text) => text.trim() === '') ||
    numbers.some(Number.isNaN)
  ) {
    throw dataError(
      `${name}: found ${quote(text)} where "index TAB label TAB path" was expected: write the list with im2rec --list.`,
    );
  }
  const label = numbers[1]!;
  if (!Number.isInteger(label) || label < 0 || label > MAX_LABEL) {
    throw dataError(
      `${name}: the label is ${label} where a whole number from 0 to ${MAX_LABEL} was expected: number the identities.`,
    );
  }
  const plain = normalize(image);
  // biome-ignore lint/suspicious/noControlCharactersInRegex: a path with them is damage
  const strange = /[\u0000-\u001f\u007f-\u009f\ufffd]/.test(image) || image === '';
  if (strange || plain.startsWith('/') || plain === '..' || plain.startsWith('../')) {
    throw dataError(
      `${name}: the path ${quote(image)} leads out of the list's folder: write paths below the folder that holds the list.`,
    );
  }
  return { label, image: plain };
}

/** Size and time of an image; a link that leads out of `root` is no image of the list. */
async function statInside(root: string, image: string, path: string, row: Row) {
  const full = join(root, image);
  try {
    if (!(await realpath(full)).startsWith(root + sep)) {
      throw dataError(
        `${path}, line ${row.line}: ${quote(image)} is a link that leaves ${root}: copy the files there.`,
      );
    }
    return await stat(full, { bigint: true });
  } catch (error) {
    throw ioError(
      `${path}, line ${row.line}: the image ${oneLine(full)}`,
      'read',
      error,
      'move the list into the folder to which its paths are relative, or add the image',
    );
  }
}
