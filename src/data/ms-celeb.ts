/**
 * MS-Celeb-1M's tables (FaceImageCroppedWithAlignment.tsv and its relatives): one image a row, seven
 * columns separated by TABs: MID, search rank, image URL, page URL, face id, rectangle in base64, the
 * JPEG in base64. A first pass finds the rows to keep, a second reads them identity by identity.
 */

import { createHash } from 'node:crypto';
import { open, stat } from 'node:fs/promises';
import { quote } from '../errors.js';
import { CleanedList, isMid } from './cleaned-list.js';
import { type DataOptions, ioError, throwIfAborted } from './files.js';
import { dataError, type ImageSource } from './image-source.js';
import { type Row, RowIndex, readRows } from './rows.js';
import { StringTable } from './string-table.js';

const COLUMNS = 7;
/** Published rows have some 100 KB, and base64 of the largest photograph that anyone cut a face from fits. */
const MAX_ROW_BYTES = 8 * 2 ** 20;
/** Rows between two reports of progress. */
const REPORT_ROWS = 1024;

/**
 * @param keep path of a cleaned list; without one every row is kept
 * @throws ERR_DATA naming the row that is none of MS-Celeb-1M's; ERR_IO; ERR_ABORTED
 */
export async function msCelebSource(
  path: string,
  keep: string | undefined,
  options: DataOptions,
): Promise<ImageSource> {
  const list = keep === undefined ? undefined : await CleanedList.read(keep);
  const stats = await stat(path, { bigint: true });
  const index = new RowIndex();
  const classes = new Classes(list?.form === 'labelled images');
  const matched = list === undefined ? undefined : new Matched(list);
  let rows = 0;
  for await (const row of readRows(path, MAX_ROW_BYTES)) {
    const { mid, name } = identify(row, path);
    const label = list === undefined ? 0 : list.find(mid, name);
    if (label !== undefined) {
      checkImage(row, path);
      index.add(row, classes.of(mid, label));
      matched?.add(mid, name);
    }
    rows += 1;
    if (rows % REPORT_ROWS === 0) {
      throwIfAborted(options.signal, 'reading the table');
      options.onProgress?.({ phase: 'scanning', done: row.offset, total: Number(stats.size) });
    }
  }
  if (index.count === 0) {
    throw dataError(
      rows === 0
        ? `${path} is empty: give a table of MS-Celeb-1M.`
        : `None of the ${rows} images of ${path} is in ${keep}: check that the list belongs to this table.`,
    );
  }
  const { names, ranks } = classes.finish();
  index.sort(ranks);
  const file = await open(path, 'r');
  const nameOf = (row: number): string => `${path}, line ${index.line(row)}`;
  return {
    title: path,
    count: index.count,
    bytes: Number(stats.size),
    names,
    fingerprint: createHash('sha256')
      .update(`hardmine pack 1 tsv\0${path}\0${stats.size} ${stats.mtimeNs}\0${list?.digest ?? ''}`)
      .digest('hex')
      .slice(0, 32),
    notes: [...(matched?.notes(path) ?? []), ...classes.notes(keep ?? '')],
    label: (row) => index.label(row),
    name: nameOf,
    place: (row) => ({ line: index.line(row) }),
    read: async (row) => {
      try {
        return imageOf(await index.read(file, row), nameOf(row));
      } catch (error) {
        throw ioError(path, 'read', error, 'leave the file as it is while it is read');
      }
    },
    dispose: () => file.close(),
  };
}

/** The first five columns hold less than this; the rest is not looked at to find out whose a row is. */
const HEAD_BYTES = 64 * 2 ** 10;

function identify(row: Row, path: string): { mid: string; name: string } {
  let columns = 1;
  for (let at = row.bytes.indexOf(0x09); at !== -1; at = row.bytes.indexOf(0x09, at + 1)) {
    columns += 1;
  }
  if (columns !== COLUMNS) {
    throw dataError(
      `${path}, line ${row.line}: found ${columns} columns where MS-Celeb-1M's tables have ${COLUMNS}, separated by TABs: check that this is such a table and that it is not cut off.`,
    );
  }
  const [mid, rank, , , face] = row.bytes.toString('latin1', 0, HEAD_BYTES).split('\t', 5);
  if (!isMid(mid!) || !/^\d{1,9}$/.test(rank!) || !/^[\w-]{1,60}$/.test(face ?? '')) {
    throw dataError(
      `${path}, line ${row.line}: found MID ${quote(mid!)}, rank ${quote(rank!)} and face ${quote(face ?? '')} where ones like m.0107_f, 10 and FaceId-0 were expected: check that this is a table of MS-Celeb-1M.`,
    );
  }
  return { mid: mid!, name: `${rank}-${face}` };
}

/** The last column, as text. */
function imageText(row: Buffer): string {
  return row.toString('latin1', row.lastIndexOf(0x09) + 1);
}

function checkImage(row: Row, path: string): void {
  const text = imageText(row.bytes);
  if (text.length === 0 || text.length % 4 !== 0 || !/^[A-Za-z0-9+/]*={0,2}$/.test(text)) {
    throw dataError(
      `${path}, line ${row.line}: the image (column ${COLUMNS}) is not base64, found ${quote(text)} of ${text.length} characters: get the table anew, or leave the image out with --keep.`,
    );
  }
}

function imageOf(row: Buffer, name: string): Buffer {
  const text = imageText(row);
  const image = Buffer.from(text, 'base64');
  // Checked in the first pass; what differs now was written since.
  if (text.length !== 4 * Math.ceil(image.length / 3)) {
    throw dataError(`${name}: the row changed while it was read: leave the file as it is.`);
  }
  return image;
}

/** Gathers the classes of rows: identities by MID in byte order, or a list's labels in ascending order. */
class Classes {
  readonly #labelled: boolean;
  /** Number of each class in the order of first sight, by MID or by label. */
  readonly #seen = new Map<string | number, number>();
  /** The MID of each label; undefined for a label that has several. */
  readonly #mids = new Map<number, string | undefined>();

  constructor(labelled: boolean) {
    this.#labelled = labelled;
  }

  of(mid: string, label: number): number {
    const key = this.#labelled ? label : mid;
    let seen = this.#seen.get(key);
    if (seen === undefined) {
      seen = this.#seen.size;
      this.#seen.set(key, seen);
      if (this.#labelled) this.#mids.set(label, mid);
    } else if (this.#labelled && this.#mids.get(label) !== mid) {
      this.#mids.set(label, undefined);
    }
    return seen;
  }

  /** Names of the classes in their final order, and the final class of each number that `of` gave. */
  finish(): { names: string[]; ranks: Int32Array } {
    // MIDs are ASCII, whose order in UTF-16 is that of its bytes.
    const keys = [...this.#seen.keys()].sort((a, b) =>
      typeof a === 'number' && typeof b === 'number' ? a - b : a < b ? -1 : 1,
    );
    const ranks = new Int32Array(keys.length);
    for (const [rank, key] of keys.entries()) ranks[this.#seen.get(key)!] = rank;
    if (!this.#labelled) return { names: keys.map(String), ranks };
    // Names must tell the classes apart: MIDs do where each belongs to one label and the other way round.
    const mids = keys.map((label) => this.#mids.get(Number(label)));
    const oneToOne = !mids.includes(undefined) && new Set(mids).size === mids.length;
    return { names: oneToOne ? mids.map(String) : keys.map(String), ranks };
  }

  notes(list: string): string[] {
    if (!this.#labelled) return [];
    let highest = 0;
    for (const label of this.#mids.keys()) highest = Math.max(highest, label);
    if (highest === this.#mids.size - 1) return [];
    return [
      `The labels of ${list} go to ${highest} but only ${this.#mids.size} of them have images: the classes are numbered anew, in the same order.`,
    ];
  }
}

/** Counts which entries of a list were met. */
class Matched {
  readonly #list: CleanedList;
  readonly #met = new StringTable();

  constructor(list: CleanedList) {
    this.#list = list;
  }

  add(mid: string, name: string): void {
    this.#met.set(this.#list.form === 'identities' ? mid : `${mid}/${name}`, 0);
  }

  notes(path: string): string[] {
    const { size, form } = this.#list;
    const absent = size - this.#met.size;
    if (absent === 0) return [];
    const what = form === 'identities' ? 'identities' : 'images';
    return [`${absent} of the ${size} ${what} listed in ${this.#list.path} are not in ${path}.`];
  }
}
