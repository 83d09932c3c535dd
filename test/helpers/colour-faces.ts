/** "Faces" of one colour, and a model that sees nothing but colour: what an evaluation does can be told by hand. */
import assert from 'node:assert/strict';
import { mkdir, writeFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import sharp from 'sharp';
import type { ScoreModel } from '../../src/evaluate/pairs.js';

export const IMAGE_BYTES = 112 * 112 * 3;

export type Colour = readonly [r: number, g: number, b: number];

/** A JPEG of one colour; flat colours survive JPEG within a level or two. */
export async function writeColour(path: string, [r, g, b]: Colour, side = 112): Promise<void> {
  await mkdir(dirname(path), { recursive: true });
  const image = sharp({
    create: { width: side, height: side, channels: 3, background: { r, g, b } },
  });
  await writeFile(path, await image.jpeg({ quality: 95 }).toBuffer());
}

/** Three numbers an image, its mean colour less 120; counts what it is given. */
export class MeanColour implements ScoreModel {
  readonly embedding = 3;
  images = 0;
  mirrored = 0;

  async embed(images: Uint8Array | string[], { mirror = false } = {}): Promise<Float32Array> {
    assert.ok(images instanceof Uint8Array);
    const n = images.length / IMAGE_BYTES;
    const sums = new Float64Array(n * 3);
    for (let i = 0; i < images.length; i++) {
      sums[Math.floor(i / IMAGE_BYTES) * 3 + (i % 3)]! += images[i]! - 120;
    }
    if (mirror) this.mirrored += n;
    else this.images += n;
    return Float32Array.from(sums, (sum) => sum / (112 * 112));
  }
}
