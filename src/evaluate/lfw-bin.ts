/** A verification .bin of own aligned images, from a list of pairs in LFW's form. */
import { stat } from 'node:fs/promises';
import { type DataOptions, exists, throwIfAborted } from '../data/files.js';
import { decodeImage, mapBounded, readImageFile } from '../data/images.js';
import { HardmineError } from '../errors.js';
import { writeVerificationBin } from '../formats/verification-bin.js';
import { findImages, parseLfwPairs } from './lfw.js';
import { readList } from './lists.js';

/** Images read and checked together. */
const CHUNK = 64;

export interface PackedPairs {
  binPath: string;
  pairs: number;
  same: number;
  bytes: number;
}

/**
 * Writes the pairs of a list in their order as InsightFace's verification sets hold them, the image
 * files byte for byte.
 * @param root folder of `Name/Name_0001.jpg` (or .png), aligned to 112x112
 * @throws ERR_PROTOCOL for a bad list and for images that are missing; ERR_DATA for an image that is
 *   damaged or not 112x112; ERR_IO when `out` exists or cannot be written; nothing is left behind then
 */
export async function packLfwPairs(
  root: string,
  list: string,
  out: string,
  { onProgress, signal }: DataOptions = {},
): Promise<PackedPairs> {
  if (await exists(out)) {
    throw new HardmineError(
      'ERR_IO',
      `${out} exists already and packing overwrites nothing: give another name or delete it.`,
    );
  }
  const text = await readList(list, '--pairs');
  const { images, pairs } = parseLfwPairs(text, list);
  const paths = await findImages(root, images);
  const rows = pairs.flatMap(({ a, b }) => [a, b]);

  async function* encoded(): AsyncGenerator<Buffer> {
    for (let start = 0; start < rows.length; start += CHUNK) {
      throwIfAborted(signal, 'packing');
      const chunk = rows.slice(start, start + CHUNK);
      yield* await mapBounded(chunk, async (row) => {
        const path = paths[row]!;
        const bytes = await readImageFile(path);
        await decodeImage(bytes, path);
        return bytes;
      });
      onProgress?.({ phase: 'packing', done: start + chunk.length, total: rows.length });
    }
  }

  const same = pairs.map((pair) => pair.same);
  await writeVerificationBin(out, encoded(), same);
  return {
    binPath: out,
    pairs: pairs.length,
    same: same.filter(Boolean).length,
    bytes: (await stat(out)).size,
  };
}
