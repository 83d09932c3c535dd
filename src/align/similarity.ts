/**
 * The five-point alignment of InsightFace: a similarity that takes the landmarks to a template by least
 * squares, and the warp by it.
 */
import type { Pixels } from '../data/images.js';
import { HardmineError } from '../errors.js';

/** In pixels, x to the right and y down, the middle of the first pixel being (0, 0). */
export interface Point {
  x: number;
  y: number;
}

/** (x, y) goes to (xx x + xy y + dx, yx x + yy y + dy). */
export interface Affine {
  xx: number;
  xy: number;
  dx: number;
  yx: number;
  yy: number;
  dy: number;
}

/** Height x width of an aligned face. */
export const FACE_SIZES = ['112x112', '112x96'] as const;
export type FaceSize = (typeof FACE_SIZES)[number];

/** Left eye, right eye, nose, left and right corner of the mouth; left as seen in the image. */
export const LANDMARKS = 5;

/** InsightFace's arcface_src for 112x112; the 112x96 crop of older work is its middle 96 columns. */
const TEMPLATE: readonly Point[] = [
  { x: 38.2946, y: 51.6963 },
  { x: 73.5318, y: 51.5014 },
  { x: 56.0252, y: 71.7366 },
  { x: 41.5493, y: 92.3655 },
  { x: 70.7299, y: 92.2041 },
];

export function faceDimensions(size: FaceSize): { width: number; height: number } {
  return { width: size === '112x96' ? 96 : 112, height: 112 };
}

/** Where the landmarks of an aligned face lie. */
export function faceTemplate(size: FaceSize): Point[] {
  const cut = (112 - faceDimensions(size).width) / 2;
  return TEMPLATE.map(({ x, y }) => ({ x: x - cut, y }));
}

/**
 * The similarity without reflection that takes `from` nearest to `to` in the sense of least squares
 * (Umeyama 1991). In the plane it has a closed form in complex numbers: with the means taken off, the
 * factor is sum(w conj(z)) / sum(|z|^2).
 *
 * @throws HardmineError ERR_DATA when the points of `from` coincide, are not finite, or have no
 *   similarity to `to`; `name` is what they belong to
 */
export function similarityTransform(
  from: readonly Point[],
  to: readonly Point[],
  name: string,
): Affine {
  const [fromX, fromY] = mean(from);
  const [toX, toY] = mean(to);
  let real = 0;
  let imaginary = 0;
  let squares = 0;
  for (const [i, { x, y }] of from.entries()) {
    const zx = x - fromX;
    const zy = y - fromY;
    const wx = to[i]!.x - toX;
    const wy = to[i]!.y - toY;
    real += wx * zx + wy * zy;
    imaginary += wy * zx - wx * zy;
    squares += zx * zx + zy * zy;
  }
  const a = real / squares;
  const b = imaginary / squares;
  const inverse = 1 / (a * a + b * b);
  if (!(Number.isFinite(a) && Number.isFinite(b) && Number.isFinite(inverse))) {
    throw new HardmineError(
      'ERR_DATA',
      `The landmarks of ${name} (${from.map(({ x, y }) => `${x},${y}`).join(' ')}) span no face: give five different points in pixels of the image.`,
    );
  }
  return {
    xx: a,
    xy: -b,
    dx: toX - (a * fromX - b * fromY),
    yx: b,
    yy: a,
    dy: toY - (b * fromX + a * fromY),
  };
}

function mean(points: readonly Point[]): [number, number] {
  let x = 0;
  let y = 0;
  for (const point of points) {
    x += point.x / points.length;
    y += point.y / points.length;
  }
  return [x, y];
}

/** The transform that undoes another. */
export function invert({ xx, xy, dx, yx, yy, dy }: Affine): Affine {
  const determinant = xx * yy - xy * yx;
  return {
    xx: yy / determinant,
    xy: -xy / determinant,
    dx: (xy * dy - yy * dx) / determinant,
    yx: -yx / determinant,
    yy: xx / determinant,
    dy: (yx * dx - xx * dy) / determinant,
  };
}

/**
 * Draws an image through a transform: the pixel at (x, y) of the result is `source` at
 * `toSource`(x, y), bilinear between the four pixels around, black outside. Nothing is smoothed when
 * that reduces: a face much larger than the result is sampled as cv2.warpAffine samples it in
 * InsightFace, which is what public models were trained on.
 *
 * @param into where the result goes, RGB bytes [height, width, 3]
 */
export function warp(
  source: Pixels,
  toSource: Affine,
  { pixels: into, width, height }: Pixels,
): void {
  const { pixels, width: sourceWidth, height: sourceHeight } = source;
  const { xx, xy, dx, yx, yy, dy } = toSource;
  const row = 3 * sourceWidth;
  let out = 0;
  for (let v = 0; v < height; v++) {
    for (let u = 0; u < width; u++, out += 3) {
      const x = xx * u + xy * v + dx;
      const y = yx * u + yy * v + dy;
      const left = Math.floor(x);
      const top = Math.floor(y);
      if (!(left >= -1 && top >= -1 && left < sourceWidth && top < sourceHeight)) {
        into[out] = into[out + 1] = into[out + 2] = 0;
        continue;
      }
      const right = x - left;
      const below = y - top;
      const hasLeft = left >= 0;
      const hasRight = left + 1 < sourceWidth;
      const hasTop = top >= 0;
      const hasBottom = top + 1 < sourceHeight;
      const topLeft = hasTop && hasLeft ? (1 - right) * (1 - below) : 0;
      const topRight = hasTop && hasRight ? right * (1 - below) : 0;
      const bottomLeft = hasBottom && hasLeft ? (1 - right) * below : 0;
      const bottomRight = hasBottom && hasRight ? right * below : 0;
      const at = top * row + 3 * left;
      for (let c = 0; c < 3; c++) {
        // An index outside is read with weight 0, where `?? 0` stands for what is not there.
        into[out + c] =
          topLeft * (pixels[at + c] ?? 0) +
          topRight * (pixels[at + 3 + c] ?? 0) +
          bottomLeft * (pixels[at + row + c] ?? 0) +
          bottomRight * (pixels[at + row + 3 + c] ?? 0) +
          0.5; // a Uint8Array cuts off: this rounds
      }
    }
  }
}

/**
 * Cuts a face out of an image: its landmarks come to lie where the template of `size` has them.
 *
 * @throws HardmineError ERR_DATA when the landmarks span no face; `name` is the image's
 */
export function alignFace(
  image: Pixels,
  landmarks: readonly Point[],
  size: FaceSize,
  name: string,
): Pixels {
  const { width, height } = faceDimensions(size);
  const toSource = invert(similarityTransform(landmarks, faceTemplate(size), name));
  const face = { pixels: new Uint8Array(width * height * 3), width, height };
  warp(image, toSource, face);
  return face;
}
