/** Photographs to aligned faces: MTCNN finds them, the five-point similarity cuts them out. */
import sharp from 'sharp';
import { decodePhotograph, type Pixels, readImageFile } from '../data/images.js';
import { HardmineError, oneOf } from '../errors.js';
import { type Box, overlap } from './boxes.js';
import { type DetectedFace, Mtcnn, SMALLEST_FACE } from './mtcnn.js';
import { alignFace, FACE_SIZES, type FaceSize, faceDimensions, type Point } from './similarity.js';

/**
 * Which of several faces: 'center-large' has the greatest area less twice the squared distance of the
 * middles of box and image (facenet's and InsightFace's rule), 'largest' the greatest area,
 * 'most-certain' the highest score.
 */
export const FACE_CHOICES = ['center-large', 'largest', 'most-certain'] as const;
export type FaceChoice = (typeof FACE_CHOICES)[number];

/**
 * What becomes of an image without a face: 'skip' gives none, 'center' the middle of the image, as
 * large as its shape allows, reduced or enlarged to the size of a face.
 */
export const FALLBACKS = ['skip', 'center'] as const;
export type Fallback = (typeof FALLBACKS)[number];

export interface FaceAlignerOptions {
  /** Folder with det1.npy, det2.npy and det3.npy, as the facenet project publishes them. */
  mtcnn: string;
  /** Height x width of the crops; default '112x112'. */
  size?: FaceSize;
  /** Side of the smallest face to look for, in pixels, from 12 up; default 20. */
  minFace?: number;
  /** Default 'center-large'. */
  face?: FaceChoice;
  /** Default 'skip'. */
  fallback?: Fallback;
  /** CPU threads of the detector; default 0: physical cores. */
  threads?: number;
}

export const ALIGNER_DEFAULTS = {
  size: '112x112',
  minFace: 20,
  face: 'center-large',
  fallback: 'skip',
} as const satisfies Partial<FaceAlignerOptions>;

/**
 * Images to align at a time: while one is in the networks, others are read, decoded and written. Decoded,
 * the largest photograph takes 192 MB.
 */
export const IMAGES_IN_FLIGHT = 4;

export interface AlignedFace extends Pixels {
  /** RGB bytes [height, width, 3]: [112, 112, 3] or [112, 96, 3]. */
  pixels: Uint8Array;
  /** Of the face that was cut out, as `DetectedFace` has them; null for a fallback. */
  landmarks: Point[] | null;
  box: Box | null;
  /** Faces found in the image. */
  faces: number;
  /** Whether it is the middle of an image without a face. */
  fallback: boolean;
}

type Choices = Required<Pick<FaceAlignerOptions, 'size' | 'face' | 'fallback'>>;

/**
 * Finds faces and aligns them to the five-point template. Not to be used after dispose().
 *
 * ONNX Runtime's package for Node computes on the calling thread, so each call holds the event loop up
 * for as long as one network runs: some milliseconds in a small image, tenths of a second in a photograph
 * of many megapixels. Where that matters, use it in a worker thread.
 */
export class FaceAligner {
  readonly #options: Choices;
  readonly #mtcnn: Mtcnn;
  readonly #pending = new Set<Promise<unknown>>();
  #disposal: Promise<void> | null = null;

  private constructor(mtcnn: Mtcnn, options: Choices) {
    this.#mtcnn = mtcnn;
    this.#options = options;
  }

  /**
   * @throws HardmineError ERR_INPUT for an option that is not known; ERR_DATA, ERR_IO or ERR_FORMAT for
   *   weights that are not there or damaged; ERR_ADDON when onnxruntime-node is not installed.
   */
  static async load(options: FaceAlignerOptions): Promise<FaceAligner> {
    const {
      size = ALIGNER_DEFAULTS.size,
      minFace = ALIGNER_DEFAULTS.minFace,
      face = ALIGNER_DEFAULTS.face,
      fallback = ALIGNER_DEFAULTS.fallback,
      threads = 0,
    } = options;
    oneOf('size', size, FACE_SIZES);
    oneOf('face', face, FACE_CHOICES);
    oneOf('fallback', fallback, FALLBACKS);
    if (!(Number.isInteger(minFace) && minFace >= SMALLEST_FACE)) {
      throw new HardmineError(
        'ERR_INPUT',
        `minFace is ${minFace}: give whole pixels from ${SMALLEST_FACE} up.`,
      );
    }
    const mtcnn = await Mtcnn.load(options.mtcnn, minFace, threads);
    return new FaceAligner(mtcnn, { size, face, fallback });
  }

  /**
   * The faces of an image, the most certain first.
   *
   * @param image path or bytes of a JPEG or PNG of at most 64 megapixels; EXIF rotation is applied.
   * @throws HardmineError ERR_IO, ERR_DATA naming the file that is no such image.
   */
  detect(image: string | Uint8Array): Promise<DetectedFace[]> {
    return this.#track(async (mtcnn) => mtcnn.detect((await load(image)).pixels));
  }

  /**
   * One face of an image, aligned; null where there is none and the fallback is 'skip'.
   *
   * @param image as for detect().
   * @param hint where the face is known to be, in pixels of the upright image: the face that overlaps
   *   the box most is taken, null when none does (the fallback would show something else).
   * @throws HardmineError as detect().
   */
  align(image: string | Uint8Array, hint?: { box: Box }): Promise<AlignedFace | null> {
    return this.#track(async (mtcnn) => {
      const { size, face: choice, fallback } = this.#options;
      const { pixels, name } = await load(image);
      const found = await mtcnn.detect(pixels);
      const face = hint ? nearest(found, hint.box) : choose(found, choice, pixels);
      if (face !== null) {
        const { landmarks, x, y, width, height } = face;
        const box = { x, y, width, height };
        const crop = alignFace(pixels, landmarks, size, name);
        return { ...crop, landmarks, box, faces: found.length, fallback: false };
      }
      if (hint !== undefined || fallback === 'skip') return null;
      const crop = await middle(pixels, size);
      return { ...crop, landmarks: null, box: null, faces: 0, fallback: true };
    });
  }

  /**
   * Calls under way end as they would have; then the networks are freed. May be called twice: neither call
   * comes back before that.
   */
  async dispose(): Promise<void> {
    this.#disposal ??= Promise.allSettled(this.#pending).then(() => this.#mtcnn.dispose());
    await this.#disposal;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  async #track<T>(work: (mtcnn: Mtcnn) => Promise<T>): Promise<T> {
    if (this.#disposal !== null) {
      throw new HardmineError('ERR_DISPOSED', 'This FaceAligner was disposed: load it again.');
    }
    const promise = work(this.#mtcnn);
    this.#pending.add(promise);
    try {
      return await promise;
    } finally {
      this.#pending.delete(promise);
    }
  }
}

async function load(image: string | Uint8Array): Promise<{ pixels: Pixels; name: string }> {
  const name = typeof image === 'string' ? image : 'The image';
  const bytes = typeof image === 'string' ? await readImageFile(image) : Buffer.from(image);
  return { pixels: await decodePhotograph(bytes, name), name };
}

function choose(
  faces: readonly DetectedFace[],
  choice: FaceChoice,
  { width, height }: Pixels,
): DetectedFace | null {
  return best(faces, (face) => {
    if (choice === 'most-certain') return face.score;
    const area = face.width * face.height;
    if (choice === 'largest') return area;
    const dx = face.x + face.width / 2 - width / 2;
    const dy = face.y + face.height / 2 - height / 2;
    return area - 2 * (dx * dx + dy * dy);
  });
}

function nearest(faces: readonly DetectedFace[], box: Box): DetectedFace | null {
  const touching = faces.filter((face) => overlap(face, box, 'union') > 0);
  return best(touching, (face) => overlap(face, box, 'union'));
}

function best(
  faces: readonly DetectedFace[],
  value: (face: DetectedFace) => number,
): DetectedFace | null {
  let found: DetectedFace | null = null;
  for (const face of faces) if (found === null || value(face) > value(found)) found = face;
  return found;
}

async function middle({ pixels, width, height }: Pixels, size: FaceSize): Promise<Pixels> {
  const face = faceDimensions(size);
  const buffer = await sharp(pixels, { raw: { width, height, channels: 3 } })
    .resize({ ...face, fit: 'cover', position: 'centre' })
    .raw()
    .toBuffer();
  return { pixels: buffer, ...face };
}
