/** Where the pixels of an evaluation come from: memory, aligned files, or files whose faces are cut out. */

import type { Box } from '../align/boxes.js';
import { decodeImage, decodeImages, mapBounded, PIXEL_BYTES, SIDE } from '../data/images.js';
import { HardmineError } from '../errors.js';

/** Photographs in work at a time; decoded, the largest takes 192 MB. */
const PHOTOGRAPHS_IN_FLIGHT = 4;

/**
 * Cuts the face out of an image file and aligns it: RGB [112, 112, 3], or null where none is found.
 * `box` is where the data set says that the face is.
 */
export type AlignFace = (path: string, box?: Box) => Promise<Uint8Array | null>;

export interface ImageSource {
  readonly count: number;
  /** RGB [to - from, 112, 112, 3] of the images from `from` to before `to`; each is read once. */
  read(from: number, to: number): Promise<Uint8Array>;
  /** Images read so far in which no face was found, rising; their pixels are black. */
  readonly withoutFace: readonly number[];
}

/** RGB bytes [n, 112, 112, 3]. */
export class PixelImages implements ImageSource {
  readonly count: number;
  readonly withoutFace = [];

  constructor(private readonly pixels: Uint8Array) {
    this.count = pixels.length / PIXEL_BYTES;
    if (!Number.isInteger(this.count)) {
      throw new HardmineError(
        'ERR_INPUT',
        `${pixels.length} bytes are no whole images of ${PIXEL_BYTES} bytes (${SIDE}x${SIDE} RGB).`,
      );
    }
  }

  async read(from: number, to: number): Promise<Uint8Array> {
    return this.pixels.subarray(from * PIXEL_BYTES, to * PIXEL_BYTES);
  }
}

/** Image files of 112x112 pixels, or of any size where `align` cuts out their faces. */
export class ImageFiles implements ImageSource {
  readonly withoutFace: number[] = [];

  constructor(
    private readonly paths: readonly string[],
    private readonly align?: AlignFace,
    private readonly boxes: readonly (Box | undefined)[] = [],
  ) {}

  get count(): number {
    return this.paths.length;
  }

  async read(from: number, to: number): Promise<Uint8Array> {
    const { align } = this;
    const paths = this.paths.slice(from, to);
    if (!align) return decodeImages(paths);
    const pixels = new Uint8Array(paths.length * PIXEL_BYTES);
    const alignOne = async (path: string, i: number): Promise<boolean> => {
      const face = await align(path, this.boxes[from + i]);
      if (face !== null && face.length !== PIXEL_BYTES) {
        throw new HardmineError(
          'ERR_INPUT',
          `The alignment of ${path} gave ${face.length} bytes, expected ${PIXEL_BYTES} (${SIDE}x${SIDE} RGB).`,
        );
      }
      if (face) pixels.set(face, i * PIXEL_BYTES);
      return face !== null;
    };
    const faces = await mapBounded(paths, alignOne, PHOTOGRAPHS_IN_FLIGHT);
    faces.forEach((found, i) => {
      if (!found) this.withoutFace.push(from + i);
    });
    return pixels;
  }
}

/** JPEG or PNG files in memory, 112x112; `name` is what errors call the file that they came in. */
export class EncodedImages implements ImageSource {
  readonly withoutFace = [];

  constructor(
    private readonly images: readonly Uint8Array[],
    private readonly name: string,
  ) {}

  get count(): number {
    return this.images.length;
  }

  async read(from: number, to: number): Promise<Uint8Array> {
    const pixels = new Uint8Array((to - from) * PIXEL_BYTES);
    await mapBounded(this.images.slice(from, to), async (bytes, i) => {
      const file = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
      pixels.set(await decodeImage(file, `${this.name}, image ${from + i}`), i * PIXEL_BYTES);
    });
    return pixels;
  }
}
