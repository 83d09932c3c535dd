/**
 * safetensors, read strictly and written so that Python's library reads it: a u64 header length, a
 * JSON header padded with spaces to 8 bytes, then the tensors back to back, little-endian.
 */
import { constants } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { HardmineError, quote } from '../errors.js';
import { writeFileAtomic } from './atomic.js';

/** A tensor in C order; its product of `shape` is the length of `data`, a scalar's shape is []. */
export type Tensor =
  | { dtype: 'F32'; shape: readonly number[]; data: Float32Array }
  | { dtype: 'I64'; shape: readonly number[]; data: BigInt64Array };

export type TensorMap = Map<string, Tensor>;

export interface SafetensorsFile {
  tensors: TensorMap;
  /** The header's `__metadata__`; empty where the file has none. */
  metadata: Map<string, string>;
}

/**
 * ResNet18's header has 12 KB, that of a network of a thousand tensors 110. The reference implementation
 * reads 100 MB, which as objects would take gigabytes: tensors without elements take 32 times what they
 * have in the header.
 */
const MAX_HEADER_BYTES = 2 ** 20;
const LENGTH_BYTES = 8;
const ALIGNMENT_BYTES = 8;
/** Of a shape in a message; NumPy has no arrays of more dimensions than 64, and we none of more than 4. */
const MAX_LISTED = 8;
const METADATA_KEY = '__metadata__';
const BYTES_PER_ELEMENT = { F32: 4, I64: 8 } as const;
type Dtype = keyof typeof BYTES_PER_ELEMENT;

interface TensorEntry {
  name: string;
  dtype: Dtype;
  shape: number[];
  elements: number;
  begin: number;
  end: number;
}

/**
 * Reads a whole file. Everything the header says is checked against the file's size before memory is
 * taken, so a hostile file costs at most its own size.
 *
 * @throws HardmineError ERR_IO when it cannot be read, ERR_FORMAT when it is not a safetensors file
 *   of F32 and I64 tensors, covered without holes, overlap or rest.
 */
export async function readSafetensors(path: string): Promise<SafetensorsFile> {
  let file: FileHandle | undefined;
  try {
    // Non-blocking, because opening a FIFO would otherwise wait for a writer for ever.
    file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
    const stats = await file.stat();
    if (!stats.isFile())
      throw malformed(path, 'is not a regular file', {
        remedy: 'give the path of a safetensors file',
      });
    const { size } = stats;
    const length = await readExactly(file, path, 0, Math.min(LENGTH_BYTES, size));
    const headerBytes = headerLength(path, length, size);
    const header = await readExactly(file, path, LENGTH_BYTES, headerBytes);
    const dataStart = LENGTH_BYTES + headerBytes;
    const { entries, metadata } = parseHeader(path, header, size - dataStart);
    const tensors: TensorMap = new Map();
    for (const entry of entries) {
      const bytes = await readExactly(file, path, dataStart + entry.begin, entry.end - entry.begin);
      tensors.set(entry.name, tensorOf(entry, bytes));
    }
    return { tensors, metadata };
  } catch (cause) {
    if (cause instanceof HardmineError) throw cause;
    throw new HardmineError(
      'ERR_IO',
      `${path} could not be read (${cause instanceof Error ? cause.message : String(cause)}): give the path of a readable safetensors file.`,
      { cause },
    );
  } finally {
    await file?.close();
  }
}

/**
 * Writes tensors and metadata, whole or not at all. I64 tensors come first, because PyTorch views
 * each tensor in place and refuses an unaligned one; within a type the order is the map's.
 *
 * @throws HardmineError ERR_INPUT when a shape does not fit its data, ERR_IO when writing fails.
 */
export async function writeSafetensors(
  path: string,
  tensors: TensorMap,
  metadata: ReadonlyMap<string, string> = new Map(),
): Promise<void> {
  await writeFileAtomic(path, encodeSafetensors(tensors, metadata));
}

/** The chunks of a safetensors file, in order: the header, then each tensor's bytes (not copied). */
export function encodeSafetensors(
  tensors: TensorMap,
  metadata: ReadonlyMap<string, string> = new Map(),
): Uint8Array[] {
  const fields: string[] = [];
  if (metadata.size > 0) {
    const pairs = [...metadata].map(
      ([key, value]) => `${JSON.stringify(key)}:${JSON.stringify(value)}`,
    );
    fields.push(`"${METADATA_KEY}":{${pairs.join(',')}}`);
  }
  const ordered = [...tensors].sort(
    ([, a], [, b]) => BYTES_PER_ELEMENT[b.dtype] - BYTES_PER_ELEMENT[a.dtype],
  );
  const chunks: Uint8Array[] = [];
  let offset = 0;
  for (const [name, { dtype, shape, data }] of ordered) {
    if (name === METADATA_KEY || elementCount(shape) !== data.length) {
      throw new HardmineError(
        'ERR_INPUT',
        name === METADATA_KEY
          ? `A tensor is named ${METADATA_KEY}, which safetensors keeps for its metadata: give it another name.`
          : `Tensor ${quote(name)} has shape ${listed(shape)} but ${data.length} values: give it as many values as its shape has.`,
      );
    }
    const end = offset + data.byteLength;
    fields.push(
      `${JSON.stringify(name)}:{"dtype":"${dtype}","shape":[${shape.join(',')}],"data_offsets":[${offset},${end}]}`,
    );
    chunks.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    offset = end;
  }
  const json = Buffer.from(`{${fields.join(',')}}`, 'utf8');
  const padded = Math.ceil(json.length / ALIGNMENT_BYTES) * ALIGNMENT_BYTES;
  const header = Buffer.alloc(LENGTH_BYTES + padded, ' ');
  header.writeBigUInt64LE(BigInt(padded), 0);
  json.copy(header, LENGTH_BYTES);
  return [header, ...chunks];
}

async function readExactly(
  file: FileHandle,
  path: string,
  position: number,
  length: number,
): Promise<Uint8Array> {
  const bytes = new Uint8Array(length);
  let done = 0;
  while (done < length) {
    const { bytesRead } = await file.read(bytes, done, length - done, position + done);
    if (bytesRead === 0) throw malformed(path, 'became shorter while it was read');
    done += bytesRead;
  }
  return bytes;
}

function headerLength(name: string, lengthBytes: Uint8Array, fileBytes: number): number {
  if (fileBytes < LENGTH_BYTES) {
    throw malformed(name, `has ${fileBytes} bytes where the length of the header takes 8`);
  }
  const length = Buffer.from(lengthBytes).readBigUInt64LE(0);
  if (length > BigInt(MAX_HEADER_BYTES)) {
    throw malformed(
      name,
      `announces a header of ${length} bytes; at most ${MAX_HEADER_BYTES} are allowed`,
    );
  }
  if (Number(length) > fileBytes - LENGTH_BYTES) {
    throw malformed(
      name,
      `announces a header of ${length} bytes but has ${fileBytes - LENGTH_BYTES} after the length`,
    );
  }
  return Number(length);
}

function tensorOf({ dtype, shape, elements }: TensorEntry, bytes: Uint8Array): Tensor {
  return dtype === 'F32'
    ? { dtype, shape, data: new Float32Array(bytes.buffer, 0, elements) }
    : { dtype, shape, data: new BigInt64Array(bytes.buffer, 0, elements) };
}

function parseHeader(
  name: string,
  bytes: Uint8Array,
  dataBytes: number,
): { entries: TensorEntry[]; metadata: Map<string, string> } {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw malformed(name, 'has a header that is not UTF-8', { cause });
  }
  if (!text.startsWith('{')) throw malformed(name, 'has a header that does not start with "{"');
  const fields = new HeaderReader(name, text).read();
  const metadata = new Map<string, string>();
  const entries: TensorEntry[] = [];
  for (const [key, value] of fields) {
    if (key !== METADATA_KEY) {
      entries.push(tensorEntry(name, key, value));
      continue;
    }
    for (const [field, content] of value) {
      if (typeof content !== 'string') {
        throw malformed(name, `has metadata ${quote(field)} that is not a string`);
      }
      metadata.set(field, content);
    }
  }
  // The whole of the data, each byte in one tensor; tensors without elements hold none and may stand
  // anywhere between two others.
  entries.sort((a, b) => a.begin - b.begin || a.end - b.end);
  let covered = 0;
  for (const entry of entries) {
    if (entry.begin !== covered) {
      throw malformed(
        name,
        `has tensor ${quote(entry.name)} at offset ${entry.begin}, where the one before ends at ${covered}: tensors must follow each other without hole or overlap`,
      );
    }
    covered = entry.end;
  }
  if (covered !== dataBytes) {
    throw malformed(name, `has ${dataBytes} bytes of data but its tensors cover ${covered}`);
  }
  return { entries, metadata };
}

function tensorEntry(file: string, name: string, fields: Map<string, HeaderValue>): TensorEntry {
  for (const key of fields.keys()) {
    if (key !== 'dtype' && key !== 'shape' && key !== 'data_offsets') {
      throw malformed(file, `has tensor ${quote(name)} with the unknown field ${quote(key)}`);
    }
  }
  const dtype = fields.get('dtype');
  const shape = fields.get('shape');
  const offsets = fields.get('data_offsets');
  if (typeof dtype !== 'string' || !Array.isArray(shape) || !Array.isArray(offsets)) {
    throw malformed(file, `has tensor ${quote(name)} without a dtype, a shape and data_offsets`);
  }
  if (dtype !== 'F32' && dtype !== 'I64') {
    throw malformed(
      file,
      `has tensor ${quote(name)} of type ${quote(dtype)}; hardmine reads F32 and I64`,
      {
        remedy: 'convert it and save it again',
      },
    );
  }
  const [begin, end] = offsets;
  if (offsets.length !== 2 || begin === undefined || end === undefined || begin > end) {
    throw malformed(
      file,
      `has tensor ${quote(name)} with data_offsets ${listed(offsets)}; expected [begin, end]`,
    );
  }
  const elements = elementCount(shape);
  const expected = elements * BYTES_PER_ELEMENT[dtype];
  if (!Number.isSafeInteger(expected)) {
    throw malformed(
      file,
      `has tensor ${quote(name)} of shape ${listed(shape)}, more than any memory holds`,
    );
  }
  if (end - begin !== expected) {
    throw malformed(
      file,
      `has tensor ${quote(name)} of type ${dtype} and shape ${listed(shape)} in ${end - begin} bytes; expected ${expected}`,
    );
  }
  return { name, dtype, shape, elements, begin, end };
}

/** Sizes or offsets in a message. */
function listed(numbers: readonly number[]): string {
  const shown = numbers.slice(0, MAX_LISTED).join(', ');
  return `[${shown}${numbers.length > MAX_LISTED ? ', ...' : ''}]`;
}

/** The product of a shape; not a safe integer (NaN) when it overflows on the way. */
function elementCount(shape: readonly number[]): number {
  let elements = 1;
  for (const size of shape) {
    elements *= size;
    if (!Number.isSafeInteger(elements)) return Number.NaN;
  }
  return elements;
}

type HeaderValue = string | number[];

/**
 * Reads JSON of exactly the header's form: an object of objects whose values are strings or arrays of
 * non-negative integers. JSON.parse would keep the last of two equal keys, lose digits of large
 * integers and give `__proto__` a meaning.
 */
class HeaderReader {
  private position = 0;

  constructor(
    private readonly name: string,
    private readonly text: string,
  ) {}

  read(): Map<string, Map<string, HeaderValue>> {
    const fields = this.object(() => this.object(() => this.value()));
    this.skipSpace();
    if (this.position !== this.text.length) throw this.unexpected('the end of the header');
    return fields;
  }

  private object<T>(readValue: () => T): Map<string, T> {
    const fields = new Map<string, T>();
    this.expect('{');
    if (this.accept('}')) return fields;
    do {
      const key = this.string();
      if (fields.has(key))
        throw malformed(this.name, `has the key ${quote(key)} twice in its header`);
      this.expect(':');
      fields.set(key, readValue());
    } while (this.accept(','));
    this.expect('}');
    return fields;
  }

  private value(): HeaderValue {
    this.skipSpace();
    if (this.text[this.position] === '"') return this.string();
    const values: number[] = [];
    this.expect('[');
    if (this.accept(']')) return values;
    do values.push(this.integer());
    while (this.accept(','));
    this.expect(']');
    return values;
  }

  private string(): string {
    this.skipSpace();
    if (this.text[this.position] !== '"') throw this.unexpected('a string');
    let end = this.position + 1;
    while (end < this.text.length && this.text[end] !== '"') end += this.text[end] === '\\' ? 2 : 1;
    const token = this.text.slice(this.position, end + 1);
    this.position = end + 1;
    try {
      return JSON.parse(token) as string;
    } catch (cause) {
      throw malformed(this.name, `has the broken string ${quote(token)} in its header`, {
        cause,
      });
    }
  }

  private integer(): number {
    this.skipSpace();
    const pattern = /(?:0|[1-9]\d*)(?![\d.eE])/y;
    pattern.lastIndex = this.position;
    const token = pattern.exec(this.text)?.[0];
    if (token === undefined) throw this.unexpected('a whole number');
    this.position += token.length;
    const value = Number(token);
    if (!Number.isSafeInteger(value)) {
      throw malformed(
        this.name,
        `has the number ${token.slice(0, 40)} in its header, beyond 2^53 - 1`,
      );
    }
    return value;
  }

  private accept(character: string): boolean {
    this.skipSpace();
    if (this.text[this.position] !== character) return false;
    this.position++;
    return true;
  }

  private expect(character: string): void {
    if (!this.accept(character)) throw this.unexpected(`"${character}"`);
  }

  private skipSpace(): void {
    const space = /[ \t\n\r]*/y;
    space.lastIndex = this.position;
    space.test(this.text);
    this.position = space.lastIndex;
  }

  private unexpected(expected: string): HardmineError {
    const found = this.text[this.position];
    return malformed(
      this.name,
      `has ${found === undefined ? 'the end' : quote(found)} at character ${this.position} of its header; expected ${expected}`,
    );
  }
}

function malformed(
  name: string,
  what: string,
  {
    cause,
    remedy = 'it is damaged or no safetensors file, save it again',
  }: { cause?: unknown; remedy?: string } = {},
): HardmineError {
  return new HardmineError(
    'ERR_FORMAT',
    `${name} ${what}: ${remedy}.`,
    cause === undefined ? undefined : { cause },
  );
}
