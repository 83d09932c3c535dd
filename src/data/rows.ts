/** Text files of any size, row by row: lists of images, and tables whose rows hold whole images. */
import type { FileHandle } from 'node:fs/promises';
import { HardmineError } from '../errors.js';
import { ioError, openFile } from './files.js';

export interface Row {
  /** From 1. */
  line: number;
  /** Where it begins in the file, in bytes. */
  offset: number;
  /** Without its line break; good until the next row is asked for. */
  bytes: Buffer;
}

const READ_BYTES = 2 ** 20;

/**
 * The rows of a file in order, one in memory at a time. Empty rows are left out, as are a byte order
 * mark before the first and a carriage return at the end of each.
 * @param maxBytes longest row that is read; memory stays below twice that and a MiB
 * @throws ERR_DATA naming file and line for a longer row; ERR_IO
 */
export async function* readRows(path: string, maxBytes: number): AsyncGenerator<Row> {
  const file = await openFile(path, 'a text file');
  try {
    let buffer = Buffer.allocUnsafe(Math.min(READ_BYTES, maxBytes + 1));
    let offset = 0; // of buffer[0]
    let filled = 0;
    let line = 1;
    for (let ended = false; !ended; ) {
      const { bytesRead } = await file.read(
        buffer,
        filled,
        buffer.length - filled,
        offset + filled,
      );
      ended = bytesRead === 0;
      const scanned = filled;
      filled += bytesRead;
      const text = buffer.subarray(0, filled);
      let start = 0;
      for (let from = scanned; ; line += 1) {
        const found = text.indexOf(0x0a, from);
        if (found === -1 && !(ended && start < filled)) break;
        const end = found === -1 ? filled : found;
        if (end - start > maxBytes) throw tooLong(path, line, maxBytes);
        const row = trimmed(text.subarray(start, end), offset + start === 0);
        if (row.length > 0) {
          yield {
            line,
            offset: offset + start + (row.byteOffset - text.byteOffset - start),
            bytes: row,
          };
        }
        start = end + 1;
        from = start;
        if (found === -1) break;
      }
      if (filled - start > maxBytes) throw tooLong(path, line, maxBytes);
      buffer.copy(buffer, 0, start, filled);
      offset += start;
      filled = Math.max(0, filled - start);
      if (filled === buffer.length) {
        const larger = Buffer.allocUnsafe(Math.min(2 * buffer.length, maxBytes + 1));
        buffer.copy(larger, 0, 0, filled);
        buffer = larger;
      }
    }
  } catch (error) {
    throw ioError(path, 'read', error, 'give a file that may be read');
  } finally {
    await file.close();
  }
}

function trimmed(row: Buffer, first: boolean): Buffer {
  const marked = first && row.length >= 3 && row.readUIntBE(0, 3) === 0xefbbbf;
  return row.subarray(marked ? 3 : 0, row.at(-1) === 0x0d ? -1 : row.length);
}

function tooLong(path: string, line: number, maxBytes: number): HardmineError {
  return new HardmineError(
    'ERR_DATA',
    `${path}, line ${line}: the row is longer than ${maxBytes} bytes, which no row of such a file is: check that this is the right file and that it is not damaged.`,
  );
}

/** Where the kept rows of a file stand and which class each has; 20 bytes a row. */
export class RowIndex {
  #offsets = new Float64Array(1024);
  #lengths = new Uint32Array(1024);
  #lines = new Uint32Array(1024);
  #classes = new Int32Array(1024);
  #order = new Uint32Array();
  #count = 0;

  get count(): number {
    return this.#count;
  }

  add(row: Row, label: number): void {
    if (this.#count === this.#lines.length) {
      const rows = 2 * this.#count;
      this.#offsets = grown(this.#offsets, new Float64Array(rows));
      this.#lengths = grown(this.#lengths, new Uint32Array(rows));
      this.#lines = grown(this.#lines, new Uint32Array(rows));
      this.#classes = grown(this.#classes, new Int32Array(rows));
    }
    this.#offsets[this.#count] = row.offset;
    this.#lengths[this.#count] = row.bytes.length;
    this.#lines[this.#count] = row.line;
    this.#classes[this.#count] = label;
    this.#count += 1;
  }

  /**
   * Puts the rows into the order of their classes, those of a class in the order of the file.
   * @param ranks final class of each label that `add` was given
   */
  sort(ranks: Int32Array): void {
    const classes = this.#classes.subarray(0, this.#count).map((label) => ranks[label]!);
    this.#classes = classes;
    this.#order = Uint32Array.from(classes.keys()).sort(
      (a, b) => classes[a]! - classes[b]! || a - b,
    );
  }

  /** Of the sorted row `index`. */
  label(index: number): number {
    return this.#classes[this.#order[index]!]!;
  }

  line(index: number): number {
    return this.#lines[this.#order[index]!]!;
  }

  async read(file: FileHandle, index: number): Promise<Buffer> {
    const row = this.#order[index]!;
    const bytes = Buffer.allocUnsafe(this.#lengths[row]!);
    const { bytesRead } = await file.read(bytes, 0, bytes.length, this.#offsets[row]!);
    return bytes.subarray(0, bytesRead);
  }
}

function grown<T extends Float64Array | Uint32Array | Int32Array>(old: T, larger: T): T {
  larger.set(old);
  return larger;
}
