/**
 * Lists of what to keep of MS-Celeb-1M: identities (a MID a line), images ("MID/name" or "MID TAB name"),
 * or images with new labels ("MID/name LABEL"). Image names are compared without extension and without
 * the suffix _align, which differ between the lists and the data.
 */

import { createHash } from 'node:crypto';
import { quote } from '../errors.js';
import { dataError, isPlainName } from './image-source.js';
import { readRows } from './rows.js';
import { StringTable } from './string-table.js';

/** A MID, a name and a label take some 60 bytes. */
const MAX_ROW_BYTES = 4096;
/** Labels are stored as float32, which is exact up to here. */
const MAX_LABEL = 2 ** 24;

type Form = 'identities' | 'images' | 'labelled images';

const SHAPES: Readonly<Record<Form, string>> = {
  identities: '"MID"',
  images: '"MID/name" or "MID TAB name"',
  'labelled images': '"MID/name LABEL"',
};

export class CleanedList {
  readonly #path: string;
  readonly #hash = createHash('sha256');
  /** Of the first line; all lines have it. */
  #form: Form | undefined;
  readonly #labels = new StringTable();
  #digest = '';

  private constructor(path: string) {
    this.#path = path;
  }

  /** @throws ERR_DATA naming the line that is none of a list of its kind; ERR_IO */
  static async read(path: string): Promise<CleanedList> {
    const list = new CleanedList(path);
    for await (const { line, bytes } of readRows(path, MAX_ROW_BYTES)) {
      list.#hash.update(bytes).update('\n');
      list.#add(bytes.toString(), line);
    }
    if (list.#form === undefined) throw dataError(`${path} is empty: give the list to keep.`);
    list.#digest = list.#hash.digest('hex');
    return list;
  }

  get path(): string {
    return this.#path;
  }

  /** What its lines name. */
  get form(): Form {
    return this.#form!;
  }

  /** Distinct entries. */
  get size(): number {
    return this.#labels.size;
  }

  /** SHA-256 of its lines. */
  get digest(): string {
    return this.#digest;
  }

  /** The label of a listed image (0 where the list has none); undefined for one that is not listed. */
  find(mid: string, name: string): number | undefined {
    return this.#labels.get(this.#form === 'identities' ? mid : `${mid}/${bareName(name)}`);
  }

  #add(text: string, line: number): void {
    const fail: () => never = () => {
      const expected =
        this.#form === undefined ? Object.values(SHAPES).join(', ') : SHAPES[this.#form];
      throw dataError(
        `${this.#path}, line ${line}: found ${quote(text)} where ${expected} was expected: give one of the lists published for MS-Celeb-1M.`,
      );
    };
    const match = /^([^\s/]+)(?:[/\t]([^\s/]+)(?:[ \t]+(\d{1,8}))?)?[ \t]*$/.exec(text);
    if (match === null) fail();
    const [, mid, name, digits] = match;
    if (!isMid(mid!) || (name !== undefined && (!isPlainName(name) || /^\.+$/.test(name)))) {
      fail();
    }
    let form: Form = 'identities';
    if (name !== undefined) form = digits === undefined ? 'images' : 'labelled images';
    this.#form ??= form;
    if (form !== this.#form) fail();
    const key = name === undefined ? mid! : `${mid}/${bareName(name)}`;
    const label = Number(digits ?? 0);
    const before = this.#labels.get(key);
    if (label > MAX_LABEL || (before !== undefined && before !== label)) {
      throw dataError(
        `${this.#path}, line ${line}: ${quote(key)} has the label ${label}, ${label > MAX_LABEL ? `beyond the ${MAX_LABEL} that a .rec can number` : `and ${before} in an earlier line`}: give each image one label.`,
      );
    }
    this.#labels.set(key, label);
  }
}

/** Freebase's identifiers: m.0107_f. */
export function isMid(text: string): boolean {
  return /^[a-z]\.[0-9A-Za-z_]{1,60}$/.test(text);
}

function bareName(name: string): string {
  return name.replace(/\.(jpe?g|png)$/i, '').replace(/_align$/, '');
}
