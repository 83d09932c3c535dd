/**
 * Lists of five-point landmarks: TSV of image and ten numbers (hardmine's own has a header), or the
 * form of CelebA's list_landmarks_celeba.txt. Left is left as seen in the image.
 */
import { readRows } from '../data/rows.js';
import { HardmineError, quote } from '../errors.js';
import { LANDMARKS, type Point } from './similarity.js';

/** A million images, of which each takes some 400 bytes; a longer list is better cut up. */
const MAX_BYTES = 64 * 2 ** 20;
/** A path and ten numbers. */
const MAX_ROW_BYTES = 8192;

const NAMES = ['left_eye', 'right_eye', 'nose', 'left_mouth', 'right_mouth'];
const HEADER = ['image', ...NAMES.flatMap((name) => [`${name}_x`, `${name}_y`])].join('\t');

/** The lines of a TSV, the header first. */
export function* landmarkLines(
  images: Iterable<readonly [image: string, landmarks: readonly Point[]]>,
): Generator<string> {
  yield `${HEADER}\n`;
  for (const [image, points] of images) {
    // A hundredth of a pixel is far below what any detector tells.
    const numbers = points.flatMap(({ x, y }) => [x.toFixed(2), y.toFixed(2)]);
    yield `${[image, ...numbers].join('\t')}\n`;
  }
}

/**
 * Reads a list: image (its path below the folder of images) to landmarks in pixels of the upright image.
 *
 * @throws HardmineError ERR_DATA with the line's number for one that is not an image and ten numbers,
 *   for a path that leaves the folder and for an image listed twice; ERR_IO
 */
export async function readLandmarks(path: string): Promise<Map<string, Point[]>> {
  const images = new Map<string, Point[]>();
  let first = 1;
  for await (const { line: number, offset, bytes } of readRows(path, MAX_ROW_BYTES)) {
    const line = bytes.toString('utf8');
    // CelebA's list begins with the number of its images.
    if (number === 1 && /^\s*\d+\s*$/.test(line)) first = 2;
    if (number < first || line.trim() === '') continue;
    const fail = (what: string): never => {
      throw new HardmineError(
        'ERR_DATA',
        `${path}, line ${number}: ${what}; give one image a line with ten numbers, x and y of left eye, right eye, nose, left and right corner of the mouth.`,
      );
    };
    // Names in a TSV may hold spaces.
    const fields = line.includes('\t') ? line.trimEnd().split('\t') : line.trim().split(/\s+/);
    const numbers = fields.slice(-2 * LANDMARKS).map((field) => Number(field || Number.NaN));
    const isHeader = numbers.length === 2 * LANDMARKS && numbers.every(Number.isNaN);
    if (number === first && isHeader) continue;
    if (fields.length !== 1 + 2 * LANDMARKS || !numbers.every(Number.isFinite)) {
      fail(`found ${quote(line)}`);
    }
    if (offset > MAX_BYTES) fail(`the list is longer than ${MAX_BYTES} bytes`);
    const image = fields[0]!;
    if (image === '' || image.startsWith('/') || image.split('/').includes('..')) {
      fail(`the image ${quote(image)} is no path below the folder of images`);
    }
    if (images.has(image)) fail(`the image ${quote(image)} is listed twice`);
    images.set(
      image,
      Array.from({ length: LANDMARKS }, (_, i) => ({ x: numbers[2 * i]!, y: numbers[2 * i + 1]! })),
    );
  }
  if (images.size === 0) {
    throw new HardmineError('ERR_DATA', `${path} lists no image: give a list of landmarks.`);
  }
  return images;
}
