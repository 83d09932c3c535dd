/**
 * Writes MXNet RecordIO as InsightFace packs training sets: record 0 holds where the images end and
 * the identities begin, records 1..N the images, the rest which images each identity has. The reader
 * is native (core/records.h).
 */
import type { FileHandle } from 'node:fs/promises';
import { open, rename, rm, rmdir } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { exists, ioError, makeFolders } from '../data/files.js';
import { HardmineError } from '../errors.js';
import { syncFolder, writeFileAtomic } from './atomic.js';
import {
  BlockReader,
  leaveBehind,
  makeTemporary,
  noteProgress,
  takeOver,
} from './record-progress.js';

const MAGIC = 0xced7230a;
const MAGIC_BYTES = Buffer.from([0x0a, 0x23, 0xd7, 0xce]);
/** The length shares a 32-bit word with three bits of cflag. */
const MAX_RECORD_BYTES = 2 ** 29 - 1;
const HEADER_BYTES = 24;
/** Keys and labels are stored as float32, which is exact up to here. */
const MAX_KEY = 2 ** 24;
/** Records are small (a few kB): gathered, the writes cost next to nothing. */
const WRITE_BYTES = 1 << 20;
/** The image size that `property` states; hardmine packs no other. */
const SIDE = 112;

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  // 0x82F63B78: Castagnoli's polynomial 0x1EDC6F41 with its bits reversed (RFC 3720, appendix B.4).
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0x82f63b78 : value >>> 1;
  return value;
});

/** CRC32C (Castagnoli) of bytes. */
export function crc32c(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (let i = 0; i < bytes.length; i += 1) {
    crc = CRC_TABLE[(crc ^ bytes[i]!) & 0xff]! ^ (crc >>> 8);
  }
  return ~crc >>> 0;
}

/** A record's payload: the 24-byte header (flag, label, id, 0), `labels` when flag is not 0, the image. */
function payloadOf(
  key: number,
  label: number,
  labels: readonly number[],
  image: Uint8Array,
): Buffer {
  const payload = Buffer.alloc(HEADER_BYTES + 4 * labels.length + image.length);
  payload.writeUInt32LE(labels.length, 0);
  payload.writeFloatLE(label, 4);
  payload.writeBigUInt64LE(BigInt(key), 8);
  for (const [i, value] of labels.entries()) payload.writeFloatLE(value, HEADER_BYTES + 4 * i);
  payload.set(image, HEADER_BYTES + 4 * labels.length);
  return payload;
}

/**
 * The chunks of one record as dmlc-core writes them: whole (cflag 0), or, where the payload holds the
 * magic word at a multiple of four, cut there into a first, middle and last part (1, 2, 3) with the
 * word left out, so that a reader can look for the magic from any place.
 */
export function encodeRecord(payload: Uint8Array): Buffer {
  if (payload.length > MAX_RECORD_BYTES) {
    throw new HardmineError(
      'ERR_DATA',
      `a record of ${payload.length} bytes does not fit RecordIO, which holds at most ${MAX_RECORD_BYTES}: leave this image out.`,
    );
  }
  const bytes = Buffer.from(payload.buffer, payload.byteOffset, payload.length);
  const chunks: Buffer[] = [];
  const put = (cflag: number, part: Buffer): void => {
    const head = Buffer.alloc(8);
    head.writeUInt32LE(MAGIC, 0);
    head.writeUInt32LE(cflag * 2 ** 29 + part.length, 4);
    chunks.push(head, part);
  };
  let start = 0;
  let found = bytes.indexOf(MAGIC_BYTES);
  while (found !== -1) {
    if (found % 4 === 0) {
      put(start === 0 ? 1 : 2, bytes.subarray(start, found));
      start = found + 4;
      found = bytes.indexOf(MAGIC_BYTES, start);
    } else {
      found = bytes.indexOf(MAGIC_BYTES, found + 1);
    }
  }
  put(start === 0 ? 0 : 3, bytes.subarray(start));
  // Every part but the last ends on a multiple of four already.
  chunks.push(Buffer.alloc((4 - (payload.length % 4)) % 4));
  return Buffer.concat(chunks);
}

/**
 * The record of `encodeRecord` at `offset`, its parts joined.
 * @returns undefined where there is none
 */
async function decodeRecord(
  reader: BlockReader,
  offset: number,
): Promise<{ payload: Buffer; end: number } | undefined> {
  const parts: Buffer[] = [];
  for (let at = offset; ; ) {
    const head = await reader.read(at, 8);
    if (head === undefined || head.readUInt32LE(0) !== MAGIC) return undefined;
    const cflag = head.readUInt32LE(4) >>> 29;
    const length = head.readUInt32LE(4) % 2 ** 29;
    const part = await reader.read(at + 8, length);
    if (part === undefined || (parts.length === 0) !== (cflag === 0 || cflag === 1)) {
      return undefined;
    }
    if (parts.length > 0) parts.push(MAGIC_BYTES);
    parts.push(Buffer.from(part));
    at += 8 + 4 * Math.ceil(length / 4);
    if (cflag === 0 || cflag === 3) return { payload: Buffer.concat(parts), end: at };
  }
}

/** The files of one packed set. */
export interface PackedFiles {
  rec: string;
  idx: string;
  crc: string;
  /** 'classes,112,112'. */
  property: string;
  /** One identity's name a line, in class order. */
  identities: string;
  /** Images of the same bytes, where there are any: sha256, key, identity, image. */
  duplicates: string;
}

/** `prefix` is a path without extension: 'faces/train' stands for faces/train.rec. */
export function packedFiles(prefix: string): PackedFiles {
  const folder = dirname(prefix);
  return {
    rec: `${prefix}.rec`,
    idx: `${prefix}.idx`,
    crc: `${prefix}.crc`,
    property: join(folder, 'property'),
    identities: join(folder, 'identities.txt'),
    duplicates: `${prefix}.duplicates.tsv`,
  };
}

/** What lets a pack go on where a killed one was. */
export interface Resumable {
  /** Fingerprint of the images, their order and their labels. */
  source: string;
  /** Told of each image that is packed already, in order. */
  onFound(image: Uint8Array): void;
}

/** Lines of an index written together. */
const INDEX_LINES = 4096;

const REMEDY = 'choose a folder that can be written and has room';

/**
 * Streams one packed set to a hidden temporary folder beside its place; `finish` makes it durable and
 * moves it there, the .rec last, so that a set is either whole or not there at all.
 */
export class RecordWriter {
  readonly #prefix: string;
  readonly #temporary: string;
  /** The topmost folder that was made for this set, to take away again; undefined: none was. */
  readonly #madeFolder: string | undefined;
  readonly #file: FileHandle;
  /** Fingerprint of what is packed; undefined: it cannot be gone on with. */
  readonly #source: string | undefined;
  readonly #offsets: number[] = [];
  readonly #crcs: number[] = [];
  /** Key of each identity's first image. */
  readonly #firsts: number[] = [];
  readonly #placed: string[] = [];
  #pending: Buffer[] = [];
  #pendingBytes = 0;
  /** Of the records so far, those still pending included. */
  #bytes = 0;
  /** Images that are durable and noted. */
  #noted = 0;

  private constructor(
    prefix: string,
    temporary: string,
    made: string | undefined,
    file: FileHandle,
    source: string | undefined,
  ) {
    this.#prefix = prefix;
    this.#temporary = temporary;
    this.#madeFolder = made;
    this.#file = file;
    this.#source = source;
  }

  /**
   * @param prefix path without extension; missing folders are made
   * @param resumable makes this go on where a killed process was that packed the same; `images` then
   *   says how many are there
   * @throws ERR_IO where the folder cannot be written
   */
  static async create(prefix: string, resumable?: Resumable): Promise<RecordWriter> {
    const folder = dirname(resolve(prefix));
    const name = basename(prefix);
    let made: string | undefined;
    let temporary: string | undefined;
    try {
      made = await makeFolders(folder);
      const left = await takeOver(folder, name, resumable?.source);
      if (left !== undefined) {
        temporary = left.temporary;
        const file = await open(join(temporary, `${name}.rec`), 'r+');
        const writer = new RecordWriter(resolve(prefix), temporary, made, file, resumable!.source);
        if (await writer.#recover(left.bytes, resumable!)) return writer;
        await file.close();
        await rm(temporary, { recursive: true });
      }
      temporary = await makeTemporary(folder, name);
      const file = await open(join(temporary, `${name}.rec`), 'wx');
      const writer = new RecordWriter(resolve(prefix), temporary, made, file, resumable?.source);
      // Record 0's labels are known at the end; its length is known now.
      await writer.#record(payloadOf(0, 0, [0, 0], new Uint8Array()));
      return writer;
    } catch (error) {
      if (temporary !== undefined) await rm(temporary, { recursive: true, force: true });
      await removeEmpty(folder, made);
      throw ioError(`${prefix}.rec`, 'written', error, REMEDY);
    }
  }

  /** Images added so far. */
  get images(): number {
    return this.#crcs.length;
  }

  /**
   * Appends an image. Classes come in order: `label` is that of the image before, or the next one.
   * @throws ERR_DATA beyond what the format holds, ERR_IO where the disk refuses
   */
  async add(label: number, image: Uint8Array): Promise<void> {
    const key = this.#offsets.length;
    if (label === this.#firsts.length) this.#firsts.push(key);
    else if (label !== this.#firsts.length - 1) {
      throw new HardmineError(
        'ERR_INTERNAL',
        `label ${label} follows label ${this.#firsts.length - 1} in ${this.#prefix}.rec, where classes must be packed in order: report this.`,
      );
    }
    if (key + this.#firsts.length + 1 > MAX_KEY) {
      throw new HardmineError(
        'ERR_DATA',
        `${this.#prefix}.rec would hold more than ${MAX_KEY} images and identities, which RecordIO's float32 labels cannot number: pack a smaller set.`,
      );
    }
    const payload = payloadOf(key, label, [], image);
    this.#crcs.push(crc32c(payload));
    await this.#record(payload);
  }

  /** Makes what was added durable, so that a process that is killed later loses no more than the rest. */
  async checkpoint(): Promise<void> {
    if (this.#source === undefined) return;
    await this.#flush();
    try {
      await this.#file.sync();
      await noteProgress(this.#temporary, { source: this.#source, bytes: this.#bytes });
    } catch (error) {
      throw ioError(`${this.#prefix}.rec`, 'written', error, REMEDY);
    }
    this.#noted = this.images;
  }

  /**
   * Writes what remains, makes everything durable and moves it into place.
   * @param names one for each class, in order, without line breaks
   * @param check sees the whole set in its temporary place; what it throws keeps the set from being
   */
  async finish(
    names: readonly string[],
    check?: (staged: PackedFiles) => Promise<void>,
  ): Promise<PackedFiles> {
    const images = this.#crcs.length;
    const identities = this.#firsts.length;
    if (names.length !== identities) {
      throw new HardmineError(
        'ERR_INTERNAL',
        `${names.length} names were given for the ${identities} identities of ${this.#prefix}.rec: report this.`,
      );
    }
    const files = packedFiles(this.#prefix);
    const staged = packedFiles(join(this.#temporary, basename(this.#prefix)));
    try {
      for (const [label, first] of this.#firsts.entries()) {
        const end = this.#firsts[label + 1] ?? images + 1;
        await this.#record(payloadOf(images + 1 + label, 0, [first, end], new Uint8Array()));
      }
      await this.#flush();
      const head = encodeRecord(
        payloadOf(0, 0, [images + 1, images + 1 + identities], new Uint8Array()),
      );
      await this.#write(head, 0);
      await this.#file.sync();
      await this.#file.close();

      const crc = Buffer.alloc(16 + 4 * images);
      crc.write('HMCRC32C', 0, 'latin1');
      crc.writeUInt32LE(1, 8);
      crc.writeUInt32LE(images, 12);
      for (const [i, value] of this.#crcs.entries()) crc.writeUInt32LE(value, 16 + 4 * i);
      await writeFileAtomic(staged.crc, [crc]);
      await writeFileAtomic(staged.idx, this.#index());
      await writeFileAtomic(staged.property, [`${identities},${SIDE},${SIDE}`]);
      await writeFileAtomic(staged.identities, [names.map((name) => `${name}\n`).join('')]);
      await check?.(staged);

      for (const part of PLACED) {
        if (part === 'duplicates' && !(await exists(staged.duplicates))) continue;
        await rename(staged[part], files[part]);
        this.#placed.push(files[part]);
      }
      await syncFolder(dirname(this.#prefix));
      await rm(this.#temporary, { recursive: true });
    } catch (error) {
      throw ioError(files.rec, 'written', error, REMEDY);
    }
    return files;
  }

  /**
   * Stops in good order: what was made durable is left for the next pack of the same, else nothing.
   * @returns how many images are left
   */
  async suspend(): Promise<number> {
    if (this.#noted === 0) {
      await this.abort();
      return 0;
    }
    await this.#file.close().catch(() => undefined); // closed already when finish() was stopped
    await leaveBehind(this.#temporary, dirname(this.#prefix), basename(this.#prefix));
    return this.#noted;
  }

  /** Takes away everything written; for the `catch` of whoever fills the set. */
  async abort(): Promise<void> {
    await this.#file.close().catch(() => undefined); // closed already when finish() failed late
    for (const path of [this.#temporary, ...this.#placed]) {
      await rm(path, { recursive: true, force: true });
    }
    await removeEmpty(dirname(this.#prefix), this.#madeFolder);
  }

  /** Reads back what a killed process wrote; false where it is not what it should be. */
  async #recover(bytes: number, { onFound }: Resumable): Promise<boolean> {
    const reader = new BlockReader(this.#file, bytes);
    const first = await decodeRecord(reader, 0);
    if (first === undefined) return false;
    this.#offsets.push(0);
    for (let offset = first.end; offset < bytes; ) {
      const record = await decodeRecord(reader, offset);
      if (record === undefined || record.payload.length < HEADER_BYTES) return false;
      const { payload, end } = record;
      const key = this.#offsets.length;
      const label = payload.readFloatLE(4);
      if (payload.readUInt32LE(0) !== 0 || payload.readBigUInt64LE(8) !== BigInt(key)) return false;
      if (label === this.#firsts.length) this.#firsts.push(key);
      else if (label !== this.#firsts.length - 1) return false;
      this.#offsets.push(offset);
      this.#crcs.push(crc32c(payload));
      onFound(payload.subarray(HEADER_BYTES));
      offset = end;
      this.#bytes = end;
    }
    if (this.#bytes !== bytes) return false;
    await this.#file.truncate(bytes);
    this.#noted = this.images;
    return true;
  }

  *#index(): Generator<string> {
    for (let start = 0; start < this.#offsets.length; start += INDEX_LINES) {
      const offsets = this.#offsets.slice(start, start + INDEX_LINES);
      yield offsets.map((offset, i) => `${start + i}\t${offset}\n`).join('');
    }
  }

  async #write(bytes: Buffer, position: number): Promise<void> {
    for (let done = 0; done < bytes.length; ) {
      const { bytesWritten } = await this.#file.write(
        bytes,
        done,
        bytes.length - done,
        position + done,
      );
      done += bytesWritten;
    }
  }

  async #record(payload: Uint8Array): Promise<void> {
    const record = encodeRecord(payload);
    this.#offsets.push(this.#bytes);
    this.#bytes += record.length;
    this.#pending.push(record);
    this.#pendingBytes += record.length;
    if (this.#pendingBytes >= WRITE_BYTES) await this.#flush();
  }

  async #flush(): Promise<void> {
    const bytes = Buffer.concat(this.#pending);
    this.#pending = [];
    this.#pendingBytes = 0;
    try {
      await this.#write(bytes, this.#bytes - bytes.length);
    } catch (error) {
      throw ioError(`${this.#prefix}.rec`, 'written', error, REMEDY);
    }
  }
}

/** Removes `folder` and those above it up to `topmost`, as far as they are empty. */
async function removeEmpty(folder: string, topmost: string | undefined): Promise<void> {
  if (topmost === undefined) return;
  try {
    for (let path = folder; path.length >= topmost.length; path = dirname(path)) await rmdir(path);
  } catch {
    // Somebody else has put something there: it is theirs to keep.
  }
}

/** The order in which files come into their place: the .rec last. */
const PLACED = ['idx', 'crc', 'property', 'identities', 'duplicates', 'rec'] as const;

/** Throws ERR_IO when any file of the set stands already: packing never overwrites. */
export async function refuseExisting(prefix: string): Promise<void> {
  for (const path of Object.values(packedFiles(prefix)) as string[]) {
    if (await exists(path)) {
      throw new HardmineError(
        'ERR_IO',
        `${path} exists already and packing overwrites nothing: give another folder or delete it.`,
      );
    }
  }
}
