/** The bytes of a pickle, taken piece by piece: every length is checked and every copy is accounted for. */
import { isUtf8 } from 'node:buffer';
import { HardmineError, quote } from '../errors.js';

/** Longest number or name; real ones have some 40 bytes. */
const MAX_SHORT_BYTES = 255;
/** V8 holds strings of 2^29 characters. */
const MAX_TEXT_BYTES = 2 ** 28;
/** As much of a name as is compared or shown. */
export const MAX_NAME_BYTES = 80;
/** What the value may take beside its input: this and twice the input's size. */
const SPARE_BYTES = 16 * 2 ** 20;
/** Rounded up from what V8 takes for one: a slot, an array, a view of bytes, a Map and its table. */
export const COST = { slot: 16, list: 160, bytes: 256, dictionary: 512, array: 512 } as const;

export class PickleInput {
  readonly #input: Buffer;
  readonly #name: string;
  #at = 0;
  /** Of the opcode at work, for messages. */
  #opcodeAt = 0;
  #budget: number;

  /** @param name of the file, for messages */
  constructor(bytes: Uint8Array, name: string) {
    this.#input = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
    this.#name = name;
    this.#budget = SPARE_BYTES + 2 * bytes.length;
  }

  /** The next operation; messages name its place from here on. */
  opcode(): number {
    this.#opcodeAt = this.#at;
    return this.unsigned(1);
  }

  /** Bytes that are left. */
  get left(): number {
    return this.#input.length - this.#at;
  }

  /** Where the next `bytes` begin, which are taken. */
  #advance(bytes: number): number {
    if (bytes > this.left) this.cutOff(bytes);
    this.#at += bytes;
    return this.#at - bytes;
  }

  take(bytes: number): Buffer {
    const start = this.#advance(bytes);
    return this.#input.subarray(start, start + bytes);
  }

  unsigned(bytes: 1 | 2 | 4 | 8): number {
    const start = this.#advance(bytes);
    return bytes === 8
      ? Number(this.#input.readBigUInt64LE(start))
      : this.#input.readUIntLE(start, bytes);
  }

  #lineBytes(most: number): Buffer {
    const end = this.#input.indexOf(0x0a, this.#at);
    if (end === -1) this.damaged('a line has no end');
    if (end - this.#at > most) {
      this.damaged(`a line has ${end - this.#at} bytes, and at most ${most} are read here`);
    }
    const line = this.take(end - this.#at);
    this.#at += 1;
    return line;
  }

  /** A number or a name. */
  line(): string {
    return this.text(this.#lineBytes(MAX_SHORT_BYTES).toString('latin1'));
  }

  index(): number {
    const index = this.integer(this.line());
    if (typeof index !== 'number') this.damaged(`${index} is no index`);
    return index;
  }

  integer(text: string): number | bigint {
    if (!/^[+-]?\d+$/.test(text)) this.damaged(`${quote(text)} is no whole number`);
    return plainest(BigInt(text.replace(/^\+/, '')));
  }

  /** As Python's repr writes it. */
  float(): number {
    const text = this.line();
    const special = SPECIAL_FLOATS.get(text);
    if (special !== undefined) return special;
    if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text)) {
      this.damaged(`${quote(text)} is no number`);
    }
    return Number(text);
  }

  /** Two's complement, little-endian. */
  longBytes(bytes: number): number | bigint {
    const taken = this.take(bytes);
    if (bytes > MAX_SHORT_BYTES) {
      this.damaged(`a number takes ${bytes} bytes, and at most ${MAX_SHORT_BYTES} are read`);
    }
    if (bytes === 0) return 0;
    const magnitude = BigInt(`0x${Buffer.from(taken).reverse().toString('hex')}`);
    return plainest(BigInt.asIntN(8 * bytes, magnitude));
  }

  utf8(bytes: number): string {
    const taken = this.take(bytes);
    if (bytes > MAX_TEXT_BYTES) {
      this.damaged(`a text has ${bytes} bytes, and at most ${MAX_TEXT_BYTES} are read`);
    }
    if (!isUtf8(taken)) this.damaged('a text is not UTF-8');
    return this.text(taken.toString('utf8'));
  }

  /** Accounts for a text. */
  text(text: string): string {
    this.charge(2 * text.length);
    return text;
  }

  bytes(bytes: number): Uint8Array {
    const taken = this.take(bytes);
    this.charge(COST.bytes);
    return new Uint8Array(taken.buffer, taken.byteOffset, bytes);
  }

  /** A Python 2 `str` as its repr writes it, from '...' or "...". */
  quoted(): Uint8Array {
    const line = this.#lineBytes(this.left);
    const quotes = [0x22, 0x27];
    if (line.length < 2 || !quotes.includes(line[0]!) || line.at(-1) !== line[0]) {
      return this.damaged('a string has no quotes');
    }
    this.charge(COST.bytes + line.length);
    const bytes = new Uint8Array(line.length);
    let length = 0;
    for (let i = 1; i < line.length - 1; i += 1) {
      const byte = line[i]!;
      if (byte !== BACKSLASH) {
        bytes[length++] = byte;
        continue;
      }
      const match = ESCAPE.exec(line.toString('latin1', i, Math.min(i + 4, line.length - 1)));
      if (match === null) return this.damaged('a string has an escape that Python does not write');
      const [whole, hex, octal, letter] = match;
      if (hex !== undefined) bytes[length] = Number.parseInt(hex, 16);
      else if (octal !== undefined) bytes[length] = Number.parseInt(octal, 8);
      else bytes[length] = ESCAPED.get(letter!)!;
      length += 1;
      i += whole.length - 1;
    }
    return bytes.subarray(0, length);
  }

  /** Text as protocol 0 writes it: latin-1, and \\uXXXX for the rest. */
  rawUnicode(): string {
    const line = this.#lineBytes(MAX_TEXT_BYTES);
    const units = Buffer.alloc(2 * line.length);
    let length = 0;
    for (let i = 0; i < line.length; i += 1) {
      let code = line[i]!;
      const digits = code === BACKSLASH ? UNICODE_DIGITS.get(line[i + 1]) : undefined;
      if (digits !== undefined) {
        const hex = line.toString('latin1', i + 2, i + 2 + digits);
        code = Number.parseInt(hex, 16);
        if (!/^[0-9a-fA-F]+$/.test(hex) || hex.length < digits || code > 0x10ffff) {
          return this.damaged('a text has an escape that Python does not write');
        }
        i += 1 + digits;
      }
      for (const unit of code > 0xffff ? surrogates(code) : [code]) {
        length = units.writeUInt16LE(unit, length);
      }
    }
    return this.text(units.toString('utf16le', 0, length));
  }

  latin1(text: string): Uint8Array {
    this.charge(COST.bytes + text.length);
    if (/[^\0-\xff]/.test(text)) this.damaged('bytes are written as text beyond latin-1');
    const { buffer, byteOffset, length } = Buffer.from(text, 'latin1');
    return new Uint8Array(buffer, byteOffset, length);
  }

  /** Accounts for memory that the value takes beside the input. */
  charge(bytes: number): void {
    this.#budget -= bytes;
    if (this.#budget < 0) {
      this.damaged('it would take more memory than twice its size and 16 MiB');
    }
  }

  cutOff(bytes: number): never {
    this.damaged(
      `${bytes} bytes should follow and ${this.left} are left, so it is cut off or damaged`,
    );
  }

  damaged(what: string): never {
    throw new HardmineError(
      'ERR_FORMAT',
      `${this.#name} is no pickle of plain data: at byte ${this.#opcodeAt}, ${what}; get the file anew.`,
    );
  }

  refuse(what: string): never {
    throw new HardmineError(
      'ERR_FORMAT',
      `${this.#name} is refused: at byte ${this.#opcodeAt} it asks for ${what}, which could run code, and nothing of it was run; use files that hold numbers, text, bytes and NumPy arrays alone.`,
    );
  }
}

const SPECIAL_FLOATS: ReadonlyMap<string, number> = new Map([
  ['nan', Number.NaN],
  ['inf', Number.POSITIVE_INFINITY],
  ['-inf', Number.NEGATIVE_INFINITY],
]);

const BACKSLASH = 0x5c;
/** Escapes of a string's repr. */
const ESCAPE = /^\\(?:x([0-9a-fA-F]{2})|([0-3][0-7]{2})|([\\'"abfnrtv]))/;
const ESCAPED: ReadonlyMap<string, number> = new Map([
  ['\\', 0x5c],
  ["'", 0x27],
  ['"', 0x22],
  ['a', 7],
  ['b', 8],
  ['f', 12],
  ['n', 10],
  ['r', 13],
  ['t', 9],
  ['v', 11],
]);
/** Hexadecimal digits after 'u' and 'U'. */
const UNICODE_DIGITS: ReadonlyMap<number | undefined, number> = new Map([
  [0x75, 4],
  [0x55, 8],
]);

function surrogates(code: number): [high: number, low: number] {
  return [0xd800 + ((code - 0x10000) >> 10), 0xdc00 + ((code - 0x10000) & 0x3ff)];
}

/** A number where it is exact. */
function plainest(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

/** One character a byte. */
export function latin1Text(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1');
}
