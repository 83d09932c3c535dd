/** Damaged files without end: number n of a corpus is the same bytes on every machine. */
import { seeded } from '../helpers/random.js';

/** Longer ones find nothing that these do not, and take their time. */
const MAX_BYTES = 1 << 16;
/** How many changes are made to one seed at most. */
const MAX_CHANGES = 6;

/** Lengths, counts and offsets at which arithmetic goes wrong. */
const EXTREMES: readonly bigint[] = [
  ...[0n, 1n, 2n, 3n, 4n, 7n, 8n, 24n, 112n, 127n, 128n, 255n, 256n, 65_500n, 65_535n, 65_536n],
  ...[24, 29, 31, 32, 53, 62, 63, 64].flatMap((bits) => {
    const power = 1n << BigInt(bits);
    return [power - 1n, power, power + 1n];
  }),
];
/** The same in text, with what else is no number of ours. */
const NUMBERS: readonly Buffer[] = [
  ...EXTREMES.map(String),
  ...['-1', '-0', '00', '0.5', '1e3', '1e400', '-9223372036854775809', '0x10', 'NaN', ''],
].map((text) => Buffer.from(text));

type Draw = (below: number) => number;

/** One change; gives the bytes changed in place, or new ones. */
type Change = (bytes: Buffer, draw: Draw, source: Mutator) => Buffer;

const CHANGES: readonly Change[] = [
  (bytes, draw) => {
    if (bytes.length > 0) bytes[draw(bytes.length)]! ^= 1 << draw(8);
    return bytes;
  },
  (bytes, draw) => {
    if (bytes.length > 0) bytes[draw(bytes.length)] = draw(256);
    return bytes;
  },
  // A length field, wherever it may stand, of 1 to 8 bytes and either end first.
  (bytes, draw) => {
    const width = 1 << draw(4);
    if (bytes.length < width) return bytes;
    const field = Buffer.alloc(8);
    const extreme = EXTREMES[draw(EXTREMES.length)]!;
    // Half of them count what there is: lengths that are wrong by a little.
    const near = BigInt(bytes.length + draw(9) - 4);
    field.writeBigUInt64LE(BigInt.asUintN(64, draw(2) === 0 ? extreme : near));
    const value = field.subarray(0, width);
    if (draw(2) === 0) value.reverse();
    bytes.set(value, draw(bytes.length - width + 1));
    return bytes;
  },
  // The same in text: the digits from some place on.
  (bytes, draw) => {
    const from = draw(bytes.length + 1);
    let start = from;
    while (start < bytes.length && !isDigit(bytes[start]!)) start += 1;
    let end = start;
    while (end < bytes.length && isDigit(bytes[end]!)) end += 1;
    return spliced(bytes, start, end, NUMBERS[draw(NUMBERS.length)]!);
  },
  (bytes, draw) => bytes.subarray(0, draw(bytes.length + 1)),
  (bytes, draw) => {
    const [start, end] = range(bytes, draw);
    return spliced(bytes, start, end, Buffer.alloc(0));
  },
  // A piece once more, or very often: nesting, repeated keys, lists without end.
  (bytes, draw) => {
    const [start, end] = range(bytes, draw);
    const piece = Buffer.from(bytes.subarray(start, end));
    const times = draw(8) === 0 ? 1 + draw(2000) : 1;
    const room = Math.floor((MAX_BYTES - bytes.length) / Math.max(1, piece.length));
    const copies = Buffer.concat(Array<Buffer>(Math.max(0, Math.min(times, room))).fill(piece));
    return spliced(bytes, end, end, copies);
  },
  (bytes, draw) => {
    const noise = Buffer.from(Array.from({ length: 1 + draw(8) }, () => draw(256)));
    const at = draw(bytes.length + 1);
    return spliced(bytes, at, at, noise);
  },
  (bytes, draw, { words }) => {
    if (words.length === 0) return bytes;
    const word = words[draw(words.length)]!;
    const at = draw(bytes.length + 1);
    return spliced(bytes, at, draw(2) === 0 ? at : Math.min(bytes.length, at + word.length), word);
  },
  // The beginning of one and the end of another.
  (bytes, draw, { seeds }) => {
    const other = seeds[draw(seeds.length)]!;
    return Buffer.concat([
      bytes.subarray(0, draw(bytes.length + 1)),
      other.subarray(draw(other.length + 1)),
    ]);
  },
];

const isDigit = (byte: number): boolean => byte >= 0x30 && byte <= 0x39;

function range(bytes: Buffer, draw: Draw): [start: number, end: number] {
  const start = draw(bytes.length + 1);
  // Short pieces are what fields, rows and entries are made of.
  const length = draw(4) === 0 ? draw(bytes.length + 1) : draw(32);
  return [start, Math.min(bytes.length, start + length)];
}

function spliced(bytes: Buffer, start: number, end: number, by: Uint8Array): Buffer {
  return Buffer.concat([bytes.subarray(0, start), by, bytes.subarray(end)]);
}

export class Mutator {
  readonly seeds: readonly Buffer[];
  /** What the format is made of: magic words, keys, opcodes. */
  readonly words: readonly Buffer[];

  /** @param words each character stands for a byte */
  constructor(seeds: readonly Buffer[], words: readonly string[]) {
    this.seeds = seeds;
    this.words = words.map((word) => Buffer.from(word, 'latin1'));
  }

  /** Input number `index`: one in 64 is noise, the others are seeds with a few changes. */
  input(index: number): Buffer {
    const draw = seeded(index);
    draw(2); // neighbouring numbers differ from the second draw on
    if (draw(64) === 0) return Buffer.from(Array.from({ length: draw(256) }, () => draw(256)));
    let bytes: Buffer = Buffer.from(this.seeds[draw(this.seeds.length)]!);
    // Few more often than many: what breaks at once shows only the first check.
    for (let changes = 1 + draw(1 + draw(MAX_CHANGES)); changes > 0; changes -= 1) {
      bytes = CHANGES[draw(CHANGES.length)]!(bytes, draw, this).subarray(0, MAX_BYTES);
    }
    return bytes;
  }
}
