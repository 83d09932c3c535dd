/** NumPy's .npy: float32 matrices of version 1.0 written and read back, single Python objects read. */
import { HardmineError, quote } from '../errors.js';
import { writeFileAtomic } from './atomic.js';
import { PickledArray, type PickleValue, readPickle } from './pickle.js';

const MAGIC = '\x93NUMPY';

/**
 * Writes a float32 matrix [rows, columns] in C order, whole or not at all.
 *
 * @throws HardmineError ERR_INPUT when `values` is not rows * columns long, ERR_IO when writing fails.
 */
export async function writeNpy(
  path: string,
  values: Float32Array,
  rows: number,
  columns: number,
): Promise<void> {
  if (values.length !== rows * columns) {
    throw new HardmineError(
      'ERR_INPUT',
      `${path} should hold ${rows} x ${columns} values but ${values.length} were given: give rows * columns values.`,
    );
  }
  await writeFileAtomic(path, [
    npyHeader(rows, columns),
    new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
  ]);
}

/** Magic, version, length and the dictionary, padded so that the data start at a multiple of 64. */
function npyHeader(rows: number, columns: number): Uint8Array {
  const dictionary = `{'descr': '<f4', 'fortran_order': False, 'shape': (${rows}, ${columns}), }`;
  const prefixBytes = 10;
  const total = Math.ceil((prefixBytes + dictionary.length + 1) / 64) * 64;
  const header = Buffer.alloc(total, ' ');
  header.write(`${MAGIC}\x01\x00`, 0, 'latin1');
  header.writeUInt16LE(total - prefixBytes, 8);
  header.write(dictionary, prefixBytes, 'latin1');
  header.write('\n', total - 1, 'latin1');
  return header;
}

/**
 * A matrix as `writeNpy` writes it.
 *
 * @param name of the file, for messages
 * @throws HardmineError ERR_FORMAT for everything but a float32 matrix in C order that fills the file.
 */
export function readNpyMatrix(
  file: Buffer,
  name: string,
): { values: Float32Array; rows: number; columns: number } {
  const known = file.length >= 10 && file.toString('latin1', 0, 8) === `${MAGIC}\x01\x00`;
  const start = 10 + (known ? file.readUInt16LE(8) : 0);
  const match =
    /^\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9})\), \} *\n$/.exec(
      file.toString('latin1', 10, start),
    );
  const rows = Number(match?.[1]);
  const columns = Number(match?.[2]);
  // NaN, of a header that is none, is unequal too.
  if (file.length !== start + rows * columns * Float32Array.BYTES_PER_ELEMENT) {
    throw new HardmineError(
      'ERR_FORMAT',
      `${name} (${file.length} bytes) is no whole .npy file of a float32 matrix in C order: write it anew.`,
    );
  }
  // Copied, because a Float32Array must begin at a multiple of four.
  return { values: new Float32Array(new Uint8Array(file.subarray(start)).buffer), rows, columns };
}

/**
 * The one object of a .npy that numpy.save made of a dictionary or the like: version 1.0 or 2.0, an
 * object array without dimensions, pickled.
 *
 * @param name of the file, for messages
 * @throws HardmineError ERR_FORMAT for every other .npy and for a pickle that is more than plain data.
 */
export function readNpyObject(bytes: Uint8Array, name: string): PickleValue {
  const file = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
  const fail = (what: string): never => {
    throw new HardmineError(
      'ERR_FORMAT',
      `${name} ${what}: give a .npy file in which numpy.save put one dictionary.`,
    );
  };
  if (file.length < 12 || file.toString('latin1', 0, 6) !== MAGIC) {
    fail('is no .npy file');
  }
  const version = `${file[6]}.${file[7]}`;
  if (version !== '1.0' && version !== '2.0') {
    fail(`is a .npy of version ${version} where 1.0 or 2.0 is expected`);
  }
  const [start, length] =
    version === '1.0' ? [10, file.readUInt16LE(8)] : [12, file.readUInt32LE(8)];
  if (length > file.length - start) {
    fail(`announces a header of ${length} bytes but has ${file.length - start} left`);
  }
  const header = file.toString('latin1', start, start + length);
  if (!/^\{'descr': '\|O', 'fortran_order': (True|False), 'shape': \(\), \}\s*$/.test(header)) {
    fail(`holds ${quote(header.trim())} where one Python object is expected`);
  }
  const array = readPickle(file.subarray(start + length), name);
  if (!(array instanceof PickledArray) || array.objects.length !== 1) {
    return fail('holds something else than its header says');
  }
  return array.objects[0]!;
}
