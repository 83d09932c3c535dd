/**
 * MTCNN (Zhang, Zhang, Li, Qiao 2016): P-Net slides over a pyramid of the image and proposes windows,
 * R-Net refuses most of them, O-Net judges the rest and finds five landmarks. Thresholds, overlaps and
 * the order of the steps are those of facenet's detect_face.py, whose weights it runs.
 */
import type { InferenceSession } from 'onnxruntime-node';
import sharp from 'sharp';
import type { Pixels } from '../data/images.js';
import { HardmineError } from '../errors.js';
import { loadOnnxRuntime, type OnnxRuntime } from '../formats/onnx-runtime.js';
import { type Box, type ScoredBox, squared, suppress } from './boxes.js';
import { type NetworkName, outputsOf, WINDOW } from './mtcnn-networks.js';
import { readNetworks } from './mtcnn-weights.js';
import { LANDMARKS, type Point, warp } from './similarity.js';

/** A face in an image, in pixels of the upright image. */
export interface DetectedFace extends ScoredBox {
  /** Left eye, right eye, nose, left and right corner of the mouth; left as seen in the image. */
  landmarks: Point[];
}

/** P-Net's window: on a smaller face the image would have to be enlarged. */
export const SMALLEST_FACE = WINDOW.det1;

/** Least certainty after each network; facenet's. */
const THRESHOLDS = { det1: 0.6, det2: 0.7, det3: 0.7 } as const;
/** From one level of the pyramid to the next: about 1 / sqrt(2), half the area. */
const PYRAMID_FACTOR = 0.709;
/** The most that two windows may overlap: within a level, over levels and after R-Net, of O-Net's. */
const OVERLAP = { level: 0.5, image: 0.7, faces: 0.7 } as const;
/** Pixels between P-Net's neighbouring windows. */
const STRIDE = 2;
/** P-Net's windows in one call, each way: its widest map then takes 43 MB, whatever the image. */
const TILE = 512;
/** Windows in one call; the widest maps take about 15 MB. */
const BATCH = { det2: 256, det3: 64 } as const;
/**
 * Windows kept of a level and of an image, the most certain ones. A crowd of a thousand faces has some
 * thousand; an image made to look like faces everywhere would have millions.
 */
const MAX_WINDOWS = 10_000;

/** A window with what a network says of it. */
interface Judged extends ScoredBox {
  /** x1 y1 x2 y2, relative to the window. */
  regression: readonly number[];
}

function wrongNetwork(path: string, what: string, cause?: unknown): HardmineError {
  return new HardmineError(
    'ERR_FORMAT',
    `${path} ${what}: write it anew with hardmine export --mtcnn from det1.npy, det2.npy and det3.npy.`,
    { cause },
  );
}

export class Mtcnn {
  readonly #runtime: OnnxRuntime;
  readonly #sessions: Record<NetworkName, InferenceSession>;
  readonly #minFace: number;

  private constructor(
    runtime: OnnxRuntime,
    sessions: Record<NetworkName, InferenceSession>,
    minFace: number,
  ) {
    this.#runtime = runtime;
    this.#sessions = sessions;
    this.#minFace = minFace;
  }

  /**
   * @param folder holds det1.npy, det2.npy and det3.npy, or the same as .onnx
   * @param minFace side of the smallest face to look for, in pixels, from 12 up
   * @param threads of ONNX Runtime; 0: physical cores
   */
  static async load(folder: string, minFace: number, threads: number): Promise<Mtcnn> {
    const networks = await readNetworks(folder);
    const runtime = await loadOnnxRuntime('Finding faces');
    const open = async (name: NetworkName): Promise<InferenceSession> => {
      const { path, onnx } = networks[name];
      let session: InferenceSession;
      try {
        session = await runtime.InferenceSession.create(onnx, {
          intraOpNumThreads: threads,
          // Plans of memory are kept for each shape of input, and photographs come in all shapes.
          enableMemPattern: false,
          // A thread that waits would otherwise spin and take the core from those that decode images.
          extra: { session: { intra_op: { allow_spinning: '0' } } },
        });
      } catch (cause) {
        throw wrongNetwork(path, 'is no model that ONNX Runtime can run', cause);
      }
      const { inputNames, outputNames } = session;
      if (
        inputNames.join() !== 'image' ||
        [...outputNames].sort().join() !== outputsOf(name).sort().join()
      ) {
        await session.release();
        throw wrongNetwork(
          path,
          `goes from ${inputNames.join(', ')} to ${outputNames.join(', ')}, another network`,
        );
      }
      return session;
    };
    const sessions = {
      det1: await open('det1'),
      det2: await open('det2'),
      det3: await open('det3'),
    };
    return new Mtcnn(runtime, sessions, minFace);
  }

  /** The faces of an image, the most certain first. */
  async detect(image: Pixels): Promise<DetectedFace[]> {
    const levels = await buildPyramid(image, WINDOW.det1 / this.#minFace);
    const proposed: Judged[] = [];
    for (const level of levels.slice(1)) {
      const found = await this.#propose(level, image);
      proposed.push(...suppress(found, OVERLAP.level, 'union'));
    }
    let windows = corrected(suppress(mostCertain(proposed), OVERLAP.image, 'union'));

    const refined: Judged[] = [];
    await this.#judge('det2', levels, windows, (window, values) => {
      refined.push({ ...window, regression: values('box') });
    });
    windows = corrected(suppress(refined, OVERLAP.image, 'union'));

    const faces: DetectedFace[] = [];
    await this.#judge('det3', levels, windows, (window, values) => {
      const { score, ...box } = regressed({ ...window, regression: values('box') });
      const at = values('landmarks');
      // From edges of pixels to their middles. facenet leaves the half out; hand-checked landmarks say
      // that it belongs there.
      const landmarks = Array.from({ length: LANDMARKS }, (_, i) => ({
        x: window.x + window.width * at[i]! - 0.5,
        y: window.y + window.height * at[LANDMARKS + i]! - 0.5,
      }));
      faces.push({ ...box, score, landmarks });
    });
    return suppress(faces, OVERLAP.faces, 'min');
  }

  async dispose(): Promise<void> {
    for (const session of Object.values(this.#sessions)) await session.release();
  }

  /** P-Net over one level, tile by tile; windows in pixels of the image. */
  async #propose(level: Pixels, image: Pixels): Promise<Judged[]> {
    const scaleX = image.width / level.width;
    const scaleY = image.height / level.height;
    let found: Judged[] = [];
    for (const tile of tiles(level)) {
      const { width, height } = tile;
      const { face, box } = await this.#run('det1', tile.pixels, [1, height, width, 3]);
      const [, , rows, columns] = face!.dims as [number, number, number, number];
      const cells = rows * columns;
      const scores = face!.data as Float32Array;
      const offsets = box!.data as Float32Array;
      for (let cell = 0; cell < cells; cell++) {
        if (!(scores[cell]! >= THRESHOLDS.det1)) continue;
        found.push({
          x: (tile.x + STRIDE * (cell % columns)) * scaleX,
          y: (tile.y + STRIDE * Math.floor(cell / columns)) * scaleY,
          width: WINDOW.det1 * scaleX,
          height: WINDOW.det1 * scaleY,
          score: scores[cell]!,
          regression: [0, 1, 2, 3].map((i) => offsets[i * cells + cell]!),
        });
      }
      found = mostCertain(found);
    }
    return found;
  }

  /** R- or O-Net on the windows; calls `keep` for each that passes its threshold, with its new score. */
  async #judge(
    name: 'det2' | 'det3',
    levels: readonly Pixels[],
    windows: readonly ScoredBox[],
    keep: (window: ScoredBox, values: (output: string) => number[]) => void,
  ): Promise<void> {
    const side = WINDOW[name];
    const bytes = side * side * 3;
    for (let from = 0; from < windows.length; from += BATCH[name]) {
      const batch = windows.slice(from, from + BATCH[name]);
      const pixels = new Uint8Array(batch.length * bytes);
      for (const [i, window] of batch.entries()) {
        cut(levels, window, side, pixels.subarray(i * bytes, (i + 1) * bytes));
      }
      const outputs = await this.#run(name, pixels, [batch.length, side, side, 3]);
      const scores = outputs['face']!.data as Float32Array;
      for (const [i, window] of batch.entries()) {
        if (!(scores[i]! > THRESHOLDS[name])) continue;
        keep({ ...window, score: scores[i]! }, (output) => {
          const { data, dims } = outputs[output]!;
          return [...(data as Float32Array).subarray(i * dims[1]!, (i + 1) * dims[1]!)];
        });
      }
    }
  }

  async #run(
    name: NetworkName,
    pixels: Uint8Array,
    dims: number[],
  ): Promise<InferenceSession.OnnxValueMapType> {
    try {
      const image = new this.#runtime.Tensor('uint8', pixels, dims);
      return await this.#sessions[name].run({ image });
    } catch (cause) {
      throw new HardmineError(
        'ERR_BACKEND',
        `ONNX Runtime could not run ${name} on [${dims.join(', ')}] (${cause instanceof Error ? cause.message : String(cause)}): free some memory and try again.`,
        { cause },
      );
    }
  }
}

/** Of more windows than MAX_WINDOWS the most certain. */
function mostCertain(windows: Judged[]): Judged[] {
  if (windows.length <= MAX_WINDOWS) return windows;
  return windows.sort((a, b) => b.score - a.score).slice(0, MAX_WINDOWS);
}

/** Squares around where the networks put the faces; without those that the correction turned inside out. */
function corrected(windows: readonly Judged[]): ScoredBox[] {
  return windows
    .map(regressed)
    .map(squared)
    .filter(({ width }) => width > 0);
}

function regressed({ x, y, width, height, score, regression }: Judged): ScoredBox {
  const [left, top, right, bottom] = regression as [number, number, number, number];
  return {
    x: x + left * width,
    y: y + top * height,
    width: width * (1 + right - left),
    height: height * (1 + bottom - top),
    score,
  };
}

/** The image itself, then the levels over which P-Net slides, from large to small. */
async function buildPyramid(image: Pixels, largest: number): Promise<Pixels[]> {
  const scales: number[] = [];
  const side = Math.min(image.width, image.height);
  for (let scale = largest; side * scale >= WINDOW.det1; scale *= PYRAMID_FACTOR) {
    scales.push(scale);
  }
  return [image, ...(await Promise.all(scales.map((scale) => reduced(image, scale))))];
}

async function reduced({ pixels, width, height }: Pixels, scale: number): Promise<Pixels> {
  const size = { width: Math.ceil(width * scale), height: Math.ceil(height * scale) };
  const buffer = await sharp(pixels, { raw: { width, height, channels: 3 } })
    .resize({ ...size, fit: 'fill', kernel: 'linear' })
    .raw()
    .toBuffer();
  return { pixels: buffer, ...size };
}

/** A level in pieces of at most TILE x TILE of P-Net's windows, which overlap by what a window sees. */
export function* tiles(level: Pixels): Generator<Pixels & { x: number; y: number }> {
  const { pixels, width, height } = level;
  const step = STRIDE * TILE;
  const reach = WINDOW.det1 - STRIDE;
  // The least that gives a window of its own: at an odd end the max-pool pads by one.
  const least = WINDOW.det1 - 1;
  for (let y = 0; y + least <= height; y += step) {
    const rows = Math.min(step + reach, height - y);
    for (let x = 0; x + least <= width; x += step) {
      const columns = Math.min(step + reach, width - x);
      if (rows === height && columns === width) {
        yield { pixels, width, height, x, y };
        continue;
      }
      const piece = new Uint8Array(rows * columns * 3);
      for (let row = 0; row < rows; row++) {
        const from = 3 * ((y + row) * width + x);
        piece.set(pixels.subarray(from, from + 3 * columns), row * columns * 3);
      }
      yield { pixels: piece, width: columns, height: rows, x, y };
    }
  }
}

/** What a window shows, side x side, black beyond the image. */
function cut(levels: readonly Pixels[], window: Box, side: number, into: Uint8Array): void {
  const image = levels[0]!;
  // The smallest level that need not be enlarged for it: more than that would alias.
  const level =
    [...levels].reverse().find(({ width }) => (window.width * width) / image.width >= side) ??
    image;
  const scaleX = level.width / image.width;
  const scaleY = level.height / image.height;
  const xx = (window.width * scaleX) / side;
  const yy = (window.height * scaleY) / side;
  // Middles of pixels lie half a pixel behind their edges, here and there.
  const toLevel = {
    xx,
    xy: 0,
    dx: window.x * scaleX + (xx - 1) / 2,
    yx: 0,
    yy,
    dy: window.y * scaleY + (yy - 1) / 2,
  };
  warp(level, toLevel, { pixels: into, width: side, height: side });
}
