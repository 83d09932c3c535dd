/** A small packed data set for tests that need records and care nothing for what they show. */
import { join } from 'node:path';
import sharp from 'sharp';
import { type PackedFiles, RecordWriter } from '../../src/formats/recordio.js';

const SIDE = 112; // pixels

/** Writes `identities` classes of `each` images, every one of another plain colour. */
export async function packColours(
  folder: string,
  identities: number,
  each: number,
): Promise<PackedFiles> {
  const writer = await RecordWriter.create(join(folder, 'colours'));
  for (let i = 0; i < identities * each; i++) {
    const background = { r: (37 * i) % 256, g: (91 * i) % 256, b: (53 * i) % 256 };
    const jpeg = await sharp({ create: { width: SIDE, height: SIDE, channels: 3, background } })
      .jpeg()
      .toBuffer();
    await writer.add(Math.floor(i / each), jpeg);
  }
  return writer.finish(Array.from({ length: identities }, (_, i) => `person ${i}`));
}
