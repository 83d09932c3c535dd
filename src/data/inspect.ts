/** What a data set holds: every image is read and decoded, and nothing is written. */
import { HardmineError } from '../errors.js';
import { checkWritable } from '../formats/atomic.js';
import { writeContactSheet } from './contact-sheet.js';
import { type EvaluationFacts, openEvaluationSet } from './evaluation-sets.js';
import { type DataOptions, throwIfAborted } from './files.js';
import { countIdentities, type Identities, type ImageSet, type Place } from './image-source.js';
import { decodeAny, imageInfo, mapBounded, SIDE, wrongSize } from './images.js';
import { openSource } from './pack.js';
import { type Dataset, openPacked, recordSource, type TrainingKind } from './packed-set.js';
import { type EvaluationSet, recognise } from './recognise.js';

/** An image that cannot be used, by where it stands. */
export type DamagedImage = { reason: string } & Place;

/** How many images have one size, in pixels. */
export interface SizeCount {
  width: number;
  height: number;
  images: number;
}

interface Inspected {
  images: number;
  /** Of the .rec, the .tsv or the .bin, or of all image files. */
  bytes: number;
  /** The most frequent first; images whose header cannot be read are in none. */
  sizes: SizeCount[];
  damaged: DamagedImage[];
}

export interface TrainingInspection extends Inspected, Identities {
  kind: TrainingKind;
  /** Of RecordIO, who packs so; of a folder, whether its files are named as LFW's are. */
  layout?: Dataset['layout'] | 'lfw';
}

/** What `hardmine inspect --json` prints; `damaged` are images that training or evaluation would refuse. */
export type Inspection = TrainingInspection | (Inspected & EvaluationFacts);

export interface InspectOptions extends DataOptions {
  /** A PNG to draw with up to 8x8 of the images; the one thing that is written. */
  contactSheet?: string | undefined;
}

/**
 * Reads and decodes every image of a set.
 * @throws ERR_DATA, ERR_FORMAT, ERR_IO for what is no data set at all; ERR_ABORTED
 */
export async function inspectDataset(
  path: string,
  options: InspectOptions = {},
): Promise<Inspection> {
  if (options.contactSheet !== undefined) await checkWritable(options.contactSheet);
  const found = await recognise(path);
  switch (found.kind) {
    case 'recordio': {
      const dataset = await openPacked(found, found.rec);
      const set = await recordSource(dataset);
      return inspectSet(set, options, async () => ({
        kind: 'recordio' as const,
        layout: dataset.layout,
        ...countIdentities(set),
        ...(await inspectRecords(set, dataset, options)),
      }));
    }
    case 'folder':
    case 'tsv':
    case 'lst': {
      const set = await openSource(found, {}, options);
      return inspectSet(set, options, async () => ({
        kind: found.kind,
        ...(found.kind === 'folder' && isLfw(set) && { layout: 'lfw' as const }),
        ...countIdentities(set),
        ...(await inspectImages(set, SIDE, options)),
      }));
    }
    default:
      return inspectEvaluationSet(found, options);
  }
}

/** Draws the sheet where one is asked for, and closes the set whatever happens. */
async function inspectSet<T>(
  set: ImageSet,
  { contactSheet }: InspectOptions,
  inspect: () => Promise<T>,
): Promise<T> {
  try {
    const inspection = await inspect();
    if (contactSheet !== undefined && set.count > 0) await writeContactSheet(set, contactSheet);
    return inspection;
  } finally {
    await set.dispose();
  }
}

async function inspectEvaluationSet(
  found: EvaluationSet,
  options: InspectOptions,
): Promise<Inspection> {
  const { set, facts } = await openEvaluationSet(found);
  // Frames and photographs of any size are aligned when they are evaluated; a .bin's images are not.
  const side = found.kind === 'verification-bin' ? SIDE : undefined;
  return inspectSet(set, options, async () => ({
    ...facts,
    ...(await inspectImages(set, side, options)),
  }));
}

/** Every file of LFW is Name/Name_0001.jpg. */
function isLfw(set: ImageSet): boolean {
  for (let i = 0; i < set.count; i += 1) {
    const place = set.place(i);
    const name = set.names[set.label(i)]!;
    if (!('file' in place) || !place.file.startsWith(`${name}/${name}_`)) return false;
    if (!/_\d{4}\.(jpg|png)$/.test(place.file)) return false;
  }
  return true;
}

/** Images looked at together. */
const CHUNK = 64;

/** @param side what width and height must be; undefined: any */
async function inspectImages(
  set: ImageSet,
  side: number | undefined,
  options: DataOptions,
): Promise<Inspected> {
  const sizes = new Sizes();
  const damaged: DamagedImage[] = [];
  for (let start = 0; start < set.count; start += CHUNK) {
    throwIfAborted(options.signal, 'inspecting');
    const chunk = Array.from({ length: Math.min(CHUNK, set.count - start) }, (_, i) => start + i);
    const reasons = await mapBounded(chunk, async (index) => {
      const place = set.place(index);
      const name = 'file' in place ? place.file : set.name(index);
      try {
        const bytes = await set.read(index);
        const { width, height } = await imageInfo(bytes, name);
        sizes.add(width, height);
        if (side !== undefined && (width !== side || height !== side)) {
          throw wrongSize(name, width, height);
        }
        await decodeAny(bytes, name);
        return undefined;
      } catch (error) {
        if (!(error instanceof HardmineError)) throw error;
        return error.message;
      }
    });
    for (const [i, reason] of reasons.entries()) {
      if (reason !== undefined) damaged.push({ ...set.place(start + i), reason });
    }
    options.onProgress?.({ phase: 'checking', done: start + chunk.length, total: set.count });
  }
  return { images: set.count, bytes: set.bytes, sizes: sizes.counts(), damaged };
}

/** The native reader decodes every image, at 112x112; the headers of those it refuses are looked at here. */
async function inspectRecords(
  set: ImageSet,
  { records, verify }: Dataset,
  options: DataOptions,
): Promise<Inspected> {
  const found = await verify(options);
  const sizes = new Sizes();
  sizes.add(SIDE, SIDE, set.count - found.length);
  await mapBounded(found, async ({ index }) => {
    try {
      const { width, height } = await imageInfo(Buffer.from(await records.jpeg(index)), '');
      sizes.add(width, height);
    } catch (error) {
      if (!(error instanceof HardmineError)) throw error; // no header: no size
    }
  });
  return {
    images: set.count,
    bytes: set.bytes,
    sizes: sizes.counts(),
    damaged: found.map(({ index, reason }) => ({ key: records.keys[index]!, reason })),
  };
}

class Sizes {
  readonly #counts = new Map<string, SizeCount>();

  add(width: number, height: number, images = 1): void {
    if (images === 0) return;
    const key = `${width}x${height}`;
    const known = this.#counts.get(key);
    if (known === undefined) this.#counts.set(key, { width, height, images });
    else known.images += images;
  }

  counts(): SizeCount[] {
    return [...this.#counts.values()].sort(
      (a, b) => b.images - a.images || a.width - b.width || a.height - b.height,
    );
  }
}
