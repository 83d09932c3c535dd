/**
 * Reads hostile files in a process of its own, after a sound one of each kind, and prints for each what
 * came of it, how long it took and how far the peak of memory rose.
 * Arguments: KIND PATH ..., with a KIND of `READERS`.
 */
import { readFile } from 'node:fs/promises';
import { decodeImages, decodePhotograph } from '../../src/data/images.js';
import { openRecords } from '../../src/data/packed-set.js';
import { parseLfwPairs } from '../../src/evaluate/lfw.js';
import { readList } from '../../src/evaluate/lists.js';
import { parseYtfSplits } from '../../src/evaluate/ytf.js';
import { readSafetensors } from '../../src/formats/safetensors.js';
import { readVerificationBin } from '../../src/formats/verification-bin.js';
import { forgetPeak, peakBytes, residentBytes } from './memory.js';

const READERS: Readonly<Record<string, (path: string) => Promise<unknown>>> = {
  safetensors: readSafetensors,
  bin: readVerificationBin,
  pairs: async (path) => parseLfwPairs(await readList(path, '--pairs'), path),
  splits: async (path) => parseYtfSplits(await readList(path, '--splits'), path),
  image: (path) => decodeImages([path]),
  photograph: async (path) => decodePhotograph(await readFile(path), path),
  async records(path) {
    const records = await openRecords(path, path.replace(/rec$/, 'idx'));
    try {
      return await records.decode(Int32Array.of(0));
    } finally {
      await records.dispose();
    }
  },
};

const results: { message: string; milliseconds: number; grown: number }[] = [];
const [...argv] = process.argv.slice(2);
for (let i = 0; i < argv.length; i += 2) {
  const read = READERS[argv[i]!]!;
  globalThis.gc!();
  forgetPeak();
  const before = residentBytes();
  const start = process.cpuUsage(); // not the clock: other programs may hold the processor
  let message = '';
  try {
    await read(argv[i + 1]!);
  } catch (error) {
    message = String(error);
  }
  const { user, system } = process.cpuUsage(start);
  results.push({ message, milliseconds: (user + system) / 1000, grown: peakBytes() - before });
}
process.stdout.write(JSON.stringify(results));
