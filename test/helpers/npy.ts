import { readFile } from 'node:fs/promises';

/** Reads a float32 .npy file of version 1.0 in C order. */
export async function readNpy(path: string): Promise<{ shape: number[]; data: Float32Array }> {
  const file = await readFile(path);
  if (file.toString('latin1', 0, 8) !== '\x93NUMPY\x01\x00') {
    throw new Error(`${path} is no .npy file of version 1.0`);
  }
  const start = 10 + file.readUInt16LE(8);
  const header = file.toString('latin1', 10, start);
  const match = /^\{'descr': '<f4', 'fortran_order': False, 'shape': \(([\d, ]*)\), \} *\n$/.exec(
    header,
  );
  if (match === null || start % 64 !== 0) throw new Error(`${path} has the header ${header}`);
  const shape = match[1]!
    .split(',')
    .filter((size) => size.trim() !== '')
    .map(Number);
  const data = new Float32Array(new Uint8Array(file.subarray(start)).buffer);
  if (data.length !== shape.reduce((a, b) => a * b, 1)) {
    throw new Error(`${path} has ${data.length} values for the shape ${shape}`);
  }
  return { shape, data };
}
