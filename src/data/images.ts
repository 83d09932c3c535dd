/** Image files to pixels, by sharp: JPEG and PNG, EXIF rotation applied, sRGB, without alpha. */
import sharp, { type Metadata, type Sharp } from 'sharp';
import { HardmineError } from '../errors.js';
import { ioError, openFile } from './files.js';

/** Side of the network's input in pixels. */
export const SIDE = 112;
/** Bytes of one decoded image: [112, 112, 3]. */
export const PIXEL_BYTES = SIDE * SIDE * 3;

/** A photograph of today's cameras fits; a file that does not is no face image. */
const MAX_FILE_BYTES = 64 * 2 ** 20;
/** 16 megapixels: what is larger is a decompression bomb or a photograph that was never aligned. */
const MAX_PIXELS = 16 * 2 ** 20;
/** Images in work at a time: libuv's pool has four threads, and twice that keeps them busy. */
const IN_FLIGHT = 8;

/** Reads a whole file, refused before memory is taken when it is no file or too large. */
export async function readImageFile(path: string): Promise<Buffer> {
  const file = await openFile(path, 'an image file');
  try {
    const { size } = await file.stat();
    if (size > MAX_FILE_BYTES) {
      throw new HardmineError(
        'ERR_DATA',
        `${path} has ${size} bytes where an image has at most ${MAX_FILE_BYTES}: remove it.`,
      );
    }
    return await file.readFile();
  } catch (error) {
    throw ioError(path, 'read', error, 'give an image file that exists and may be read');
  } finally {
    await file.close();
  }
}

/** sharp on an image in memory; the first bytes decide, so that no loader but JPEG's and PNG's runs. */
function openImage(bytes: Buffer, name: string): Sharp {
  const jpeg = bytes.length > 3 && bytes.readUIntBE(0, 3) === 0xffd8ff;
  const png = bytes.length > 8 && bytes.toString('latin1', 0, 8) === '\x89PNG\r\n\x1a\n';
  if (!jpeg && !png) {
    const found = bytes.length === 0 ? 'is empty' : `begins with ${bytes.toString('hex', 0, 4)}`;
    throw new HardmineError(
      'ERR_DATA',
      `${name} is not a JPEG or PNG image (it ${found}): replace or remove it.`,
    );
  }
  return sharp(bytes, { failOn: 'warning', limitInputPixels: MAX_PIXELS });
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
export async function imageInfo(bytes: Buffer, name: string): Promise<ImageInfo> {
  let metadata: Metadata;
  try {
    metadata = await openImage(bytes, name).metadata();
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
export async function decodeImage(bytes: Buffer, name: string): Promise<Buffer> {
  const { width, height } = await imageInfo(bytes, name);
  if (width !== SIDE || height !== SIDE) throw wrongSize(name, width, height);
  return (await decodeAny(bytes, name)).data;
}

/**
 * Decodes one image of up to 16 megapixels in memory to RGB [height, width, 3].
 * @throws ERR_DATA for what is no JPEG or PNG or is damaged; `name` is its name there
 */
export async function decodeAny(
  bytes: Buffer,
  name: string,
): Promise<{ data: Buffer; width: number; height: number }> {
  try {
    const { data, info } = await openImage(bytes, name)
      .autoOrient()
      .toColourspace('srgb')
      .flatten()
      .raw({ depth: 'uchar' })
      .toBuffer({ resolveWithObject: true });
    const { width, height } = info;
    if (data.length !== width * height * 3) throw new Error(`${data.length} bytes of pixels`);
    return { data, width, height };
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

/** Runs `work` on every item, a few at a time; the first failure stops the rest and is thrown. */
export async function mapBounded<T, R>(
  items: readonly T[],
  work: (item: T, index: number) => Promise<R>,
): Promise<R[]> {
  const results = new Array<R>(items.length);
  const entries = items.entries();
  let failed = false;
  const lane = async (): Promise<void> => {
    for (const [index, item] of entries) {
      if (failed) return;
      try {
        results[index] = await work(item, index);
      } catch (error) {
        failed = true;
        throw error;
      }
    }
  };
  await Promise.all(Array.from({ length: IN_FLIGHT }, lane));
  return results;
}
