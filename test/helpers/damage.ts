/** Checkpoints cut and with bits flipped. */
import assert from 'node:assert/strict';
import { open, readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { RandomStream } from '../../src/data/random.js';
import { findCheckpoint } from '../../src/train/checkpoint.js';

/** A file system's block: where a file is cut when the machine stops. */
const BLOCK_BYTES = 4096;

/**
 * Cuts every file of the newest checkpoint in `folder` at every block and flips `bits` random bits of it,
 * one at a time, and demands each time that it is rejected by its name and that the checkpoint of
 * `fallback` steps is found instead. Leaves the checkpoint as it was.
 */
export async function damageEverywhere(
  folder: string,
  newest: string,
  fallback: number,
  bits: number,
): Promise<{ cuts: number; flips: number }> {
  const rejects = async (about: string): Promise<void> => {
    const { found, rejected } = await findCheckpoint(folder);
    assert.equal(found?.state.step, fallback, about);
    assert.equal(rejected.length, 1, about);
    assert.ok(rejected[0]!.includes(newest), about);
  };
  const files = (await readdir(join(folder, newest)))
    .sort()
    .map((name) => join(folder, newest, name));
  const sizes = await Promise.all(files.map(async (path) => (await stat(path)).size));
  let cuts = 0;
  for (const [i, path] of files.entries()) {
    const file = await open(path, 'r+');
    try {
      // From the end on, so that each cut takes one block more; what was cut off is written back.
      const whole = Buffer.alloc(sizes[i]!);
      await file.read(whole, 0, whole.length, 0);
      const last = Math.floor((whole.length - 1) / BLOCK_BYTES) * BLOCK_BYTES;
      for (let at = last; at >= 0; at -= BLOCK_BYTES) {
        await file.truncate(at);
        await rejects(`${path} cut at ${at}`);
        cuts++;
      }
      await file.write(whole, 0, whole.length, 0);
    } finally {
      await file.close();
    }
  }
  const random = new RandomStream(7, 0);
  const total = sizes.reduce((sum, size) => sum + size, 0);
  for (let n = 0; n < bits; n++) {
    let at = Math.floor(random.uniform(0, total));
    // Every other flip is in a small file, which a share of the bytes would hardly ever hit.
    let i = n % 2 === 0 ? n % files.length : 0;
    if (n % 2 === 0) at %= sizes[i]!;
    else while (at >= sizes[i]!) at -= sizes[i++]!;
    const file = await open(files[i]!, 'r+');
    try {
      const byte = Buffer.alloc(1);
      await file.read(byte, 0, 1, at);
      const bit = 1 << Math.floor(random.uniform(0, 8));
      const flip = async (): Promise<void> => {
        byte[0]! ^= bit;
        await file.write(byte, 0, 1, at);
      };
      await flip();
      await rejects(`${files[i]} byte ${at} bit ${bit}`);
      await flip();
    } finally {
      await file.close();
    }
  }
  const { found, rejected } = await findCheckpoint(folder);
  assert.deepEqual([rejected, found?.path], [[], join(folder, newest)]);
  return { cuts, flips: bits };
}
