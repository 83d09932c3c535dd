/**
 * InsightFace's verification sets (lfw.bin, cfp_fp.bin, agedb_30.bin): a pickle of two lists, 2P encoded
 * images and P booleans; pair k is images 2k and 2k + 1.
 */
import { ioError, openFile } from '../data/files.js';
import { HardmineError } from '../errors.js';
import { writeFileAtomic } from './atomic.js';
import { PickledArray, type PickleValue, readPickle } from './pickle.js';

/** The largest published set, CFP-FP's 14,000 images, would have 0.5 GiB as 112x112 PNGs. */
const MAX_BYTES = 2 ** 30;

export interface VerificationSet {
  /** JPEG or PNG files as stored, two for each pair. */
  images: Uint8Array[];
  /** Whether pair k shows one person. */
  same: boolean[];
}

/**
 * Reads a verification set of any pickle protocol; images may be bytes or NumPy uint8 arrays. The
 * images are views of one buffer and are not decoded here.
 * @throws HardmineError ERR_IO for what cannot be read; ERR_FORMAT for what is no such set or holds
 *   anything but data, of which nothing is ever run
 */
export async function readVerificationBin(path: string): Promise<VerificationSet> {
  const found = readPickle(await readWhole(path), path);
  const fail = (what: string): never => {
    throw new HardmineError(
      'ERR_FORMAT',
      `${path} is no verification set: ${what}; use a .bin that InsightFace or hardmine pack wrote.`,
    );
  };
  if (!Array.isArray(found) || found.length !== 2) {
    return fail('it should hold a list of images and a list of booleans, and holds something else');
  }
  const [encoded, flags] = found as [PickleValue, PickleValue];
  if (!Array.isArray(encoded)) return fail('its first part is no list of images');
  if (!Array.isArray(flags) && !(flags instanceof PickledArray)) {
    return fail('its second part is no list of true and false');
  }
  // Counted before a flag of one byte becomes one of eight: a .bin may be all flags.
  const pairs = Array.isArray(flags) ? flags.length : flags.data.length;
  if (encoded.length !== 2 * pairs || pairs === 0) {
    fail(`it holds ${encoded.length} images for ${pairs} pairs, which need two each`);
  }
  const same = booleans(flags) ?? fail('its second part is no list of true and false');
  const images = encoded.map(
    (item, i) => imageBytes(item) ?? fail(`its image ${i} is neither bytes nor a uint8 array`),
  );
  return { images, same };
}

/** Refused before memory is taken when it is no file or too large. */
async function readWhole(path: string): Promise<Buffer> {
  const file = await openFile(path, 'a verification .bin');
  try {
    const { size } = await file.stat();
    if (size > MAX_BYTES) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${path} has ${size} bytes where a verification set has at most ${MAX_BYTES}: give a verification .bin.`,
      );
    }
    return await file.readFile();
  } catch (error) {
    throw ioError(path, 'read', error, 'give a verification .bin that exists and may be read');
  } finally {
    await file.close();
  }
}

function imageBytes(item: PickleValue): Uint8Array | undefined {
  if (item instanceof Uint8Array) return item;
  const isRow = item instanceof PickledArray && item.dtype === '|u1' && item.shape.length === 1;
  return isRow ? item.data : undefined;
}

/** Python's booleans, 0 and 1, or an array of either. */
function booleans(flags: PickleValue): boolean[] | undefined {
  if (flags instanceof PickledArray) {
    const isRow = ['|b1', '|u1', '|i1'].includes(flags.dtype) && flags.shape.length === 1;
    return isRow ? booleans([...flags.data]) : undefined;
  }
  if (!Array.isArray(flags)) return undefined;
  const values = flags.map((flag) => (typeof flag === 'number' ? [false, true][flag] : flag));
  return values.every((value) => typeof value === 'boolean') ? values : undefined;
}

/** Items that Python's pickler appends at a time. */
const BATCH = 1000;

/**
 * Writes a verification set as pickle protocol 4, which InsightFace's loader reads; whole or not at
 * all, one image in memory at a time.
 * @param images JPEG or PNG files, two for each pair, in order
 * @param same whether pair k shows one person
 * @throws HardmineError ERR_INPUT where there are not two images for each pair or they exceed 1 GiB
 *   together; ERR_IO where the operating system refuses; and what `images` throws
 */
export async function writeVerificationBin(
  path: string,
  images: Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
  same: readonly boolean[],
): Promise<void> {
  await writeFileAtomic(path, encode(path, images, same));
}

// Opcodes of CPython's Lib/pickletools.py.
const PROTO_4 = [0x80, 4];
const EMPTY_LIST = 0x5d;
const MARK = 0x28;
const APPENDS = 0x65;
const BINBYTES = 0x42;
const TRUE = 0x88;
const FALSE = 0x89;
const TUPLE2 = 0x86;
const STOP = 0x2e;

async function* encode(
  path: string,
  images: Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
  same: readonly boolean[],
): AsyncGenerator<Uint8Array> {
  yield Uint8Array.from([...PROTO_4, EMPTY_LIST, MARK]);
  let count = 0;
  let bytes = 2 * same.length;
  for await (const image of images) {
    if (count > 0 && count % BATCH === 0) yield Uint8Array.from([APPENDS, MARK]);
    const head = Buffer.alloc(5);
    head[0] = BINBYTES;
    head.writeUInt32LE(image.length, 1);
    yield head;
    yield image;
    count += 1;
    bytes += head.length + image.length;
    if (bytes > MAX_BYTES) {
      throw new HardmineError(
        'ERR_INPUT',
        `${path} would have more than ${MAX_BYTES} bytes after ${count} images: a verification set holds encoded 112x112 images.`,
      );
    }
  }
  if (count !== 2 * same.length || count === 0) {
    throw new HardmineError(
      'ERR_INPUT',
      `${path} was given ${count} images for ${same.length} pairs: give two images for each pair.`,
    );
  }
  const flags = same.map((value) => (value ? TRUE : FALSE));
  yield Uint8Array.from([APPENDS, EMPTY_LIST, MARK, ...flags, APPENDS, TUPLE2, STOP]);
}
