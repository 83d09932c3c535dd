/** A montage of a set's images, to see at a glance what is in it. */
import sharp from 'sharp';
import { HardmineError } from '../errors.js';
import { writeFileAtomic } from '../formats/atomic.js';
import type { ImageSet } from './image-source.js';
import { decodeAny, mapBounded, SIDE } from './images.js';

/** Images along each side of the sheet. */
const ACROSS = 8;
const GAP = 4; // pixels

/**
 * Draws up to 8x8 images, spread evenly over the identities, as a PNG. What cannot be decoded leaves its
 * place empty; images of other sizes are fitted into 112x112, here alone.
 * @throws ERR_IO where `path` cannot be written
 */
export async function writeContactSheet(set: ImageSet, path: string): Promise<void> {
  const chosen = spread(set, ACROSS * ACROSS);
  const tiles = await mapBounded(chosen, async (index, place) => {
    const tile = await thumbnail(set, index);
    const at = (cell: number): number => GAP + cell * (SIDE + GAP);
    return tile && { input: tile, left: at(place % ACROSS), top: at(Math.floor(place / ACROSS)) };
  });
  const across = Math.min(ACROSS, chosen.length);
  const down = Math.ceil(chosen.length / ACROSS);
  const side = (cells: number): number => GAP + cells * (SIDE + GAP);
  const sheet = await sharp({
    create: { width: side(across), height: side(down), channels: 3, background: '#ffffff' },
  })
    .composite(tiles.filter((tile) => tile !== undefined))
    .png()
    .toBuffer();
  await writeFileAtomic(path, [sheet]);
}

async function thumbnail(set: ImageSet, index: number): Promise<Buffer | undefined> {
  try {
    const { pixels, width, height } = await decodeAny(await set.read(index), set.name(index));
    return await sharp(pixels, { raw: { width, height, channels: 3 } })
      .resize(SIDE, SIDE, { fit: 'contain', background: '#808080' })
      .png()
      .toBuffer();
  } catch (error) {
    if (error instanceof HardmineError) return undefined; // inspection lists it among the damaged
    throw error;
  }
}

/** Up to `most` images: of as many identities as there are places, then the next image of each. */
function spread(set: ImageSet, most: number): number[] {
  const classes = new Map<number, number[]>();
  for (let i = 0; i < set.count; i += 1) {
    const label = set.label(i);
    const images = classes.get(label);
    if (images === undefined) classes.set(label, [i]);
    else if (images.length < most) images.push(i);
  }
  const groups = [...classes.values()];
  if (groups.length >= most) {
    return Array.from(
      { length: most },
      (_, i) => groups[Math.floor((i * groups.length) / most)]![0]!,
    );
  }
  const turns: number[] = [];
  for (let turn = 0; turn < most; turn += 1) {
    for (const group of groups) if (turn < group.length) turns.push(group[turn]!);
  }
  return turns.slice(0, most).sort((a, b) => a - b);
}
