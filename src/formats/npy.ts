/** NumPy's .npy, version 1.0, for float32 matrices. */
import { HardmineError } from '../errors.js';
import { writeFileAtomic } from './atomic.js';

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
  header.write('\x93NUMPY\x01\x00', 0, 'latin1');
  header.writeUInt16LE(total - prefixBytes, 8);
  header.write(dictionary, prefixBytes, 'latin1');
  header.write('\n', total - 1, 'latin1');
  return header;
}
