/** Image files to pixels, by sharp: JPEG and PNG, EXIF rotation applied, sRGB, without alpha. */
import sharp, { type Metadata, type Sharp } from 'sharp';
import { HardmineError } from '../errors.js';
import { readFileBounded } from './files.js';

/** Side of the network's input in pixels. */
export const SIDE = 112;
/** Bytes of one decoded image: [112, 112, 3]. */
export const PIXEL_BYTES = SIDE * SIDE * 3;

/** A photograph of today's cameras fits; a file that does not is no face image. */
const MAX_FILE_BYTES = 64 * 2 ** 20;
/** 16 megapixels: what is larger is a decompression bomb or a photograph that was never aligned. */
const MAX_PIXELS = 16 * 2 ** 20;
/** 64 megapixels: what cameras make today; decoded, such a photograph takes 192 MB. */
const MAX_PHOTOGRAPH_PIXELS = 64 * 2 ** 20;
/** A face of 112x112 pixels takes about 3 KB and shows no blocks. */
const THUMBNAIL_QUALITY = 80;
/** Images in work at a time: libuv's pool has four threads, and twice that keeps them busy. */
const IN_FLIGHT = 8;

export const readImageFile = (path: string): Promise<Buffer> =>
  readFileBounded(path, MAX_FILE_BYTES, 'an image file');

/** sharp on an image in memory; the first bytes decide, so that no loader but JPEG's and PNG's runs. */
function openImage(bytes: Buffer, name: string, maxPixels: number | false = MAX_PIXELS): Sharp {
  const jpeg = bytes.length > 3 && bytes.readUIntBE(0, 3) === 0xffd8ff;
  const png = bytes.length > 8 && bytes.toString('latin1', 0, 8) === '\x89PNG\r\n\x1a\n';
  if (!jpeg && !png) {
    const found = bytes.length === 0 ? 'is empty' : `begins with ${bytes.toString('hex', 0, 4)}`;
    throw new HardmineError(
      'ERR_DATA',
      `${name} is not a JPEG or PNG image (it ${found}): convert, replace or remove it.`,
    );
  }
  return sharp(bytes, { failOn: 'warning', limitInputPixels: maxPixels });
}

function undecodable(name: string, error: unknown): HardmineError {
  if (error instanceof HardmineError) return error;
  const reason = (error instanceof Error ? error.message : String(error)).trim().split('\n')[0];
  return new HardmineError(
    'ERR_DATA',
    `${name} cannot be decoded (${reason}): replace or remove it.`,
    { cause: error },
  );
}

/** What an image's header says; width and height after EXIF rotation. */
export interface ImageInfo {
  width: number;
  height: number;
  /** An RGB JPEG that needs no rotation: training can decode its bytes as they are. */
  plainJpeg: boolean;
}

/** @throws ERR_DATA for anything but a JPEG or PNG of at most 16 megapixels; `name` is its name there */
export async function imageInfo(
  bytes: Buffer,
  name: string,
  maxPixels: number | false = MAX_PIXELS,
): Promise<ImageInfo> {
  let metadata: Metadata;
  try {
    metadata = await openImage(bytes, name, maxPixels).metadata();
  } catch (error) {
    throw undecodable(name, error);
  }
  const { format, width, height, space, orientation = 1, channels } = metadata;
  // EXIF orientations 5 to 8 turn the image by a quarter.
  const turned = orientation >= 5;
  return {
    width: turned ? height : width,
    height: turned ? width : height,
    plainJpeg: format === 'jpeg' && space === 'srgb' && channels === 3 && orientation === 1,
  };
}

export function wrongSize(name: string, width: number, height: number): HardmineError {
  return new HardmineError(
    'ERR_DATA',
    `${name} is ${width}x${height} pixels where ${SIDE}x${SIDE} is needed: cut and align the faces first with hardmine align.`,
  );
}

/**
 * Decodes one 112x112 image in memory to RGB [112, 112, 3].
 * @throws ERR_DATA for what is no JPEG or PNG, is damaged or has another size; `name` is its name there
 */
export async function decodeImage(bytes: Buffer, name: string): Promise<Uint8Array> {
  const { width, height } = await imageInfo(bytes, name);
  if (width !== SIDE || height !== SIDE) throw wrongSize(name, width, height);
  return (await decodeAny(bytes, name)).pixels;
}

/** RGB bytes [height, width, 3], EXIF rotation applied, sRGB of 8 bits, transparent parts black. */
export interface Pixels {
  pixels: Uint8Array;
  width: number;
  height: number;
}

/**
 * Decodes a photograph of any size up to 64 megapixels: grey, CMYK and 16 bits a channel too.
 * @throws ERR_DATA for what is no JPEG or PNG, is damaged or larger; `name` is its name there
 */
export async function decodePhotograph(bytes: Buffer, name: string): Promise<Pixels> {
  const { width, height } = await imageInfo(bytes, name, false);
  if (width * height > MAX_PHOTOGRAPH_PIXELS) {
    throw new HardmineError(
      'ERR_DATA',
      `${name} is ${width}x${height} pixels where a photograph has at most ${MAX_PHOTOGRAPH_PIXELS / 2 ** 20} megapixels: reduce it first.`,
    );
  }
  return decodeAny(bytes, name, MAX_PHOTOGRAPH_PIXELS);
}

/**
 * Decodes one image of any size, by default of up to 16 megapixels.
 * @throws ERR_DATA for what is no JPEG or PNG, is damaged or larger; `name` is its name there
 */
export async function decodeAny(
  bytes: Buffer,
  name: string,
  maxPixels = MAX_PIXELS,
): Promise<Pixels> {
  try {
    const { data, info } = await openImage(bytes, name, maxPixels)
      .autoOrient()
      .toColourspace('srgb')
      .flatten()
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true });
    const { width, height } = info;
    if (data.length !== width * height * 3) throw new Error(`${data.length} bytes of pixels`);
    return { pixels: data, width, height };
  } catch (error) {
    throw undecodable(name, error);
  }
}

/** The JPEG of RGB pixels that loses least: quality 100, colour at full resolution. */
export const encodeJpeg = ({ pixels, width, height }: Pixels): Promise<Buffer> =>
  sharp(pixels, { raw: { width, height, channels: 3 } })
    .jpeg({ quality: 100, chromaSubsampling: '4:4:4' })
    .toBuffer();

/**
 * A picture for a page: a JPEG of at most 112 pixels a side without what else the file carries.
 * @throws ERR_DATA for what is no JPEG or PNG, is damaged or larger than 16 megapixels
 */
export async function thumbnail(bytes: Buffer, name: string): Promise<Buffer> {
  try {
    return await openImage(bytes, name)
      .autoOrient()
      .resize(SIDE, SIDE, { fit: 'inside', withoutEnlargement: true })
      .toColourspace('srgb')
      .flatten()
      .jpeg({ quality: THUMBNAIL_QUALITY })
      .toBuffer();
  } catch (error) {
    throw undecodable(name, error);
  }
}

/**
 * Decodes 112x112 JPEG or PNG files.
 * @returns RGB [paths.length, 112, 112, 3] in the order of `paths`
 * @throws ERR_IO for what cannot be read; ERR_DATA naming the file for what is no JPEG or PNG, is
 *   damaged, or is not 112x112 (nothing is ever resized)
 */
export async function decodeImages(paths: readonly string[]): Promise<Uint8Array> {
  const pixels = new Uint8Array(paths.length * PIXEL_BYTES);
  await mapBounded(paths, async (path, i) => {
    pixels.set(await decodeImage(await readImageFile(path), path), i * PIXEL_BYTES);
  });
  return pixels;
}

/**
 * Runs `work` on every item, `inFlight` at a time; the first failure stops the rest and is thrown when
 * what had begun has ended.
 */
export async function mapBounded<T, R>(
  items: readonly T[],
  work: (item: T, index: number) => Promise<R>,
  inFlight = IN_FLIGHT,
): Promise<R[]> {
  const results = new Array<R>(items.length);
  const entries = items.entries();
  const failures: unknown[] = [];
  const lane = async (): Promise<void> => {
    for (const [index, item] of entries) {
      if (failures.length > 0) return;
      try {
        results[index] = await work(item, index);
      } catch (error) {
        failures.push(error);
      }
    }
  };
  await Promise.all(Array.from({ length: inFlight }, lane));
  if (failures.length > 0) throw failures[0];
  return results;
}
