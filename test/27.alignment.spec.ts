import assert from 'node:assert/strict';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { InferenceSession, Tensor as OrtTensor } from 'onnxruntime-node';
import sharp from 'sharp';
import { type AlignedFace, FaceAligner, type FaceAlignerOptions } from '../src/align/aligner.js';
import { type Box, overlap, type ScoredBox, suppress } from '../src/align/boxes.js';
import { tiles } from '../src/align/mtcnn.js';
import {
  encodeNetwork,
  type LayerTensor,
  NETWORKS,
  type NetworkName,
} from '../src/align/mtcnn-networks.js';
import {
  alignFace,
  faceTemplate,
  invert,
  type Point,
  similarityTransform,
  warp,
} from '../src/align/similarity.js';
import { decodePhotograph, mapBounded, type Pixels } from '../src/data/images.js';
import { RandomStream } from '../src/data/random.js';
import { HardmineError } from '../src/errors.js';
import { readNpyObject } from '../src/formats/npy.js';
import { shared } from './helpers/skip.js';

function errorLike(code: string, pattern: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof HardmineError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, pattern);
    return true;
  };
}

// ---------------------------------------------------------------------------------------------
// Independent references

/** Eigenvector angle by which a Jacobi rotation makes the symmetric [[p, q], [q, r]] diagonal. */
const jacobiAngle = (p: number, q: number, r: number) => Math.atan2(2 * q, p - r) / 2;

/** Umeyama's algorithm as published, by the singular value decomposition of the covariance. */
function umeyama(from: readonly Point[], to: readonly Point[]): number[] {
  const n = from.length;
  const mean = (points: readonly Point[]) => [
    points.reduce((sum, { x }) => sum + x, 0) / n,
    points.reduce((sum, { y }) => sum + y, 0) / n,
  ];
  const [fromMean, toMean] = [mean(from), mean(to)];
  const covariance = [0, 0, 0, 0];
  let variance = 0;
  for (let i = 0; i < n; i++) {
    const z = [from[i]!.x - fromMean[0]!, from[i]!.y - fromMean[1]!];
    const w = [to[i]!.x - toMean[0]!, to[i]!.y - toMean[1]!];
    for (let r = 0; r < 2; r++)
      for (let c = 0; c < 2; c++) covariance[2 * r + c]! += (w[r]! * z[c]!) / n;
    variance += (z[0]! ** 2 + z[1]! ** 2) / n;
  }
  const [a, b, c, d] = covariance as [number, number, number, number];
  // V from C^T C, then C V = U D with orthogonal columns.
  const angle = jacobiAngle(a * a + c * c, a * b + c * d, b * b + d * d);
  const v = [Math.cos(angle), -Math.sin(angle), Math.sin(angle), Math.cos(angle)];
  const cv = [
    a * v[0]! + b * v[2]!,
    a * v[1]! + b * v[3]!,
    c * v[0]! + d * v[2]!,
    c * v[1]! + d * v[3]!,
  ];
  const singular = [Math.hypot(cv[0]!, cv[2]!), Math.hypot(cv[1]!, cv[3]!)];
  const u = [
    cv[0]! / singular[0]!,
    cv[1]! / singular[1]!,
    cv[2]! / singular[0]!,
    cv[3]! / singular[1]!,
  ];
  const det = (m: number[]) => m[0]! * m[3]! - m[1]! * m[2]!;
  const sign = Math.sign(det(u) * det(v));
  const scale = (singular[0]! + sign * singular[1]!) / variance;
  const entry = (r: number, k: number) =>
    scale * (u[2 * r]! * v[2 * k]! + sign * u[2 * r + 1]! * v[2 * k + 1]!);
  const [xx, xy, yx, yy] = [entry(0, 0), entry(0, 1), entry(1, 0), entry(1, 1)];
  return [
    ...[xx, xy, toMean[0]! - xx * fromMean[0]! - xy * fromMean[1]!],
    ...[yx, yy, toMean[1]! - yx * fromMean[0]! - yy * fromMean[1]!],
  ];
}

type Weights = Map<string, Map<string, LayerTensor>>;

/** A map [height, width, channels] in double. */
interface Feature {
  height: number;
  width: number;
  channels: number;
  at: (y: number, x: number, c: number) => number;
}

function feature(height: number, width: number, channels: number, values: number[]): Feature {
  const at = (y: number, x: number, c: number) => values[(y * width + x) * channels + c]!;
  return { height, width, channels, at };
}

/**
 * A network the way facenet runs it: image transposed and normalised, one layer after the other over
 * maps in height, width, channel order, linear layers over the flattened map, softmax.
 */
function referenceForward(name: NetworkName, weights: Weights, image: Feature) {
  const tensor = (layer: string, part: string) => weights.get(layer)!.get(part)!.data;
  const convolve = (input: Feature, layer: string, kernel: number, outputs: number): Feature => {
    const [w, b] = [tensor(layer, 'weights'), tensor(layer, 'biases')];
    const [height, width] = [input.height - kernel + 1, input.width - kernel + 1];
    const values: number[] = [];
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        for (let o = 0; o < outputs; o++) {
          let sum = b[o]!;
          for (let ky = 0; ky < kernel; ky++)
            for (let kx = 0; kx < kernel; kx++)
              for (let c = 0; c < input.channels; c++)
                sum +=
                  input.at(y + ky, x + kx, c) *
                  w[((ky * kernel + kx) * input.channels + c) * outputs + o]!;
          values.push(sum);
        }
      }
    }
    return feature(height, width, outputs, values);
  };
  const map = (input: Feature, change: (value: number, c: number) => number): Feature => {
    const values: number[] = [];
    for (let y = 0; y < input.height; y++)
      for (let x = 0; x < input.width; x++)
        for (let c = 0; c < input.channels; c++) values.push(change(input.at(y, x, c), c));
    return feature(input.height, input.width, input.channels, values);
  };
  const prelu = (input: Feature, layer: string) => {
    const alpha = tensor(layer, 'alpha');
    return map(input, (value, c) => (value > 0 ? value : alpha[c]! * value));
  };
  const pool = (input: Feature, size: number, padding: 'SAME' | 'VALID'): Feature => {
    const extent = (n: number) =>
      padding === 'SAME' ? Math.ceil(n / 2) : Math.floor((n - size) / 2) + 1;
    const before = (n: number) =>
      padding === 'SAME' ? Math.floor(Math.max(0, (Math.ceil(n / 2) - 1) * 2 + size - n) / 2) : 0;
    const [height, width] = [extent(input.height), extent(input.width)];
    const values: number[] = [];
    for (let y = 0; y < height; y++)
      for (let x = 0; x < width; x++)
        for (let c = 0; c < input.channels; c++) {
          let most = Number.NEGATIVE_INFINITY;
          for (let ky = 0; ky < size; ky++)
            for (let kx = 0; kx < size; kx++) {
              const [iy, ix] = [
                2 * y + ky - before(input.height),
                2 * x + kx - before(input.width),
              ];
              if (iy >= 0 && ix >= 0 && iy < input.height && ix < input.width)
                most = Math.max(most, input.at(iy, ix, c));
            }
          values.push(most);
        }
    return feature(height, width, input.channels, values);
  };
  const linear = (input: Feature, layer: string, outputs: number): Feature => {
    const flat: number[] = [];
    map(input, (value) => flat.push(value));
    return convolve(feature(1, 1, flat.length, flat), layer, 1, outputs);
  };

  const transposed = feature(
    image.width,
    image.height,
    3,
    Array.from({ length: image.width * image.height * 3 }, (_, i) => {
      const [pixel, c] = [Math.floor(i / 3), i % 3];
      const value = image.at(pixel % image.height, Math.floor(pixel / image.height), c);
      return (value - 127.5) * 0.0078125;
    }),
  );
  let value = transposed;
  const outputs: Record<string, Feature> = {};
  if (name === 'det1') {
    value = pool(prelu(convolve(value, 'conv1', 3, 10), 'PReLU1'), 2, 'SAME');
    value = prelu(convolve(value, 'conv2', 3, 16), 'PReLU2');
    value = prelu(convolve(value, 'conv3', 3, 32), 'PReLU3');
    outputs['face'] = convolve(value, 'conv4-1', 1, 2);
    outputs['box'] = convolve(value, 'conv4-2', 1, 4);
  } else if (name === 'det2') {
    value = pool(prelu(convolve(value, 'conv1', 3, 28), 'prelu1'), 3, 'SAME');
    value = pool(prelu(convolve(value, 'conv2', 3, 48), 'prelu2'), 3, 'VALID');
    value = prelu(convolve(value, 'conv3', 2, 64), 'prelu3');
    value = prelu(linear(value, 'conv4', 128), 'prelu4');
    outputs['face'] = linear(value, 'conv5-1', 2);
    outputs['box'] = linear(value, 'conv5-2', 4);
  } else {
    value = pool(prelu(convolve(value, 'conv1', 3, 32), 'prelu1'), 3, 'SAME');
    value = pool(prelu(convolve(value, 'conv2', 3, 64), 'prelu2'), 3, 'VALID');
    value = pool(prelu(convolve(value, 'conv3', 3, 64), 'prelu3'), 2, 'SAME');
    value = prelu(convolve(value, 'conv4', 2, 128), 'prelu4');
    value = prelu(linear(value, 'conv5', 256), 'prelu5');
    outputs['face'] = linear(value, 'conv6-1', 2);
    outputs['box'] = linear(value, 'conv6-2', 4);
    outputs['landmarks'] = linear(value, 'conv6-3', 10);
  }
  const { height, width, at } = outputs['face']!;
  const certainty: number[] = [];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++) {
      const [no, yes] = [Math.exp(at(y, x, 0)), Math.exp(at(y, x, 1))];
      certainty.push(yes / (no + yes));
    }
  outputs['face'] = feature(height, width, 1, certainty);
  return outputs;
}

/** Weights of the published shapes whose activations stay near 1, or the published ones themselves. */
function randomWeights(name: NetworkName): Weights {
  const random = new RandomStream(11, 0);
  const weights: Weights = new Map();
  const { trunk, face, regressions } = NETWORKS[name];
  const draw = (shape: number[], spread: number): LayerTensor => ({
    shape,
    data: Float32Array.from(
      { length: shape.reduce((a, b) => a * b) },
      () => spread * random.normal(),
    ),
  });
  for (const layer of [...trunk, face, ...Object.values(regressions)]) {
    const { kernel, inputs, outputs } = layer;
    const fanIn = kernel * kernel * inputs;
    const shape = 'linear' in layer ? [fanIn, outputs] : [kernel, kernel, inputs, outputs];
    weights.set(
      layer.name,
      new Map([
        ['weights', draw(shape, Math.sqrt(2 / fanIn))],
        ['biases', draw([outputs], 0.3)],
      ]),
    );
    if ('prelu' in layer) weights.set(layer.prelu, new Map([['alpha', draw([outputs], 0.3)]]));
  }
  return weights;
}

const randomPixels = (length: number, stream: number) => {
  const random = new RandomStream(12, stream);
  return Uint8Array.from({ length }, () => random.below(256));
};

// ---------------------------------------------------------------------------------------------

describe('the similarity transform', () => {
  it("is Umeyama's, to 1e-9", () => {
    const random = new RandomStream(1, 0);
    for (let trial = 0; trial < 500; trial++) {
      const points = () =>
        Array.from({ length: 5 }, () => ({
          x: random.uniform(-250, 250),
          y: random.uniform(0, 250),
        }));
      const from = points();
      // Every third is a mirrored face, to which Umeyama without reflection comes as near as it can.
      const to =
        trial % 3 === 0 ? from.map(({ x, y }) => ({ x: -0.4 * x, y: 0.4 * y + 3 })) : points();
      const { xx, xy, dx, yx, yy, dy } = similarityTransform(from, to, 'x.jpg');
      for (const [i, value] of umeyama(from, to).entries()) {
        const found = [xx, xy, dx, yx, yy, dy][i]!;
        assert.ok(Math.abs(found - value) <= 1e-9, `${found} for ${value}, trial ${trial}`);
      }
      const back = invert(invert({ xx, xy, dx, yx, yy, dy }));
      assert.ok(Math.abs(back.dx - dx) <= 1e-6 * Math.max(1, Math.abs(dx)), `${back.dx} for ${dx}`);
    }
  });

  it('has the templates of InsightFace', () => {
    const wide = faceTemplate('112x112').map(({ x, y }) => [x, y]);
    assert.deepEqual(wide.flat(), [
      ...[38.2946, 51.6963, 73.5318, 51.5014, 56.0252, 71.7366],
      ...[41.5493, 92.3655, 70.7299, 92.2041],
    ]);
    const narrow = faceTemplate('112x96');
    for (const [i, x] of [30.2946, 65.5318, 48.0252, 33.5493, 62.7299].entries()) {
      assert.ok(Math.abs(narrow[i]!.x - x) < 1e-9);
      assert.equal(narrow[i]!.y, wide[i]![1]);
    }
  });

  it('leaves a face that lies on the template as it is', () => {
    for (const [size, width] of [
      ['112x112', 112],
      ['112x96', 96],
    ] as const) {
      const image = { pixels: randomPixels(112 * width * 3, 0), width, height: 112 };
      const face = alignFace(image, faceTemplate(size), size, 'x.jpg');
      assert.deepEqual([face.width, face.height], [width, 112]);
      assert.deepEqual(face.pixels, image.pixels);
    }
  });

  it('refuses landmarks that span no face', () => {
    const template = faceTemplate('112x112');
    const refused = errorLike('ERR_DATA', /The landmarks of x\.jpg .*span no face/);
    for (const point of [
      { x: 3, y: 4 },
      { x: Number.NaN, y: 0 },
      { x: Number.POSITIVE_INFINITY, y: 0 },
    ]) {
      const from = template.map(() => point);
      assert.throws(() => similarityTransform(from, template, 'x.jpg'), refused);
    }
    const huge = template.map(({ x, y }) => ({ x: x * 1e200, y: y * 1e200 }));
    assert.throws(() => similarityTransform(huge, template, 'x.jpg'), refused);
  });
});

describe('the warp', () => {
  it('is bilinear with black around, as a double loop over all pixels has it', () => {
    const random = new RandomStream(2, 0);
    const [width, height] = [9, 7];
    const pixels = randomPixels(width * height * 3, 1);
    for (let trial = 0; trial < 60; trial++) {
      const angle = random.uniform(0, 2 * Math.PI);
      const scale = random.uniform(0.2, 3);
      const transform = {
        xx: scale * Math.cos(angle),
        xy: -scale * Math.sin(angle),
        dx: random.uniform(-4, 12),
        yx: scale * Math.sin(angle),
        yy: scale * Math.cos(angle),
        dy: random.uniform(-4, 10),
      };
      const face = { pixels: new Uint8Array(8 * 6 * 3).fill(77), width: 8, height: 6 };
      warp({ pixels, width, height }, transform, face);
      for (const [i, found] of face.pixels.entries()) {
        const [u, v, c] = [Math.floor(i / 3) % 8, Math.floor(i / 24), i % 3];
        const x = transform.xx * u + transform.xy * v + transform.dx;
        const y = transform.yx * u + transform.yy * v + transform.dy;
        let expected = 0;
        for (let sy = 0; sy < height; sy++)
          for (let sx = 0; sx < width; sx++)
            expected +=
              Math.max(0, 1 - Math.abs(x - sx)) *
              Math.max(0, 1 - Math.abs(y - sy)) *
              pixels[(sy * width + sx) * 3 + c]!;
        // Rounded to the nearest, whichever way a tie falls.
        assert.ok(Math.abs(found - expected) <= 0.5 + 1e-9, `${found} for ${expected}`);
      }
    }
  });
});

describe('boxes', () => {
  /** Shared and whole areas by counting unit squares; boxes have whole numbers. */
  function counted(a: Box, b: Box, over: 'union' | 'min'): number {
    let [shared, together] = [0, 0];
    for (let y = 0; y < 40; y++)
      for (let x = 0; x < 40; x++) {
        const inside = [a, b].filter(
          (box) => x >= box.x && x < box.x + box.width && y >= box.y && y < box.y + box.height,
        ).length;
        if (inside === 2) shared += 1;
        if (inside > 0) together += 1;
      }
    return (
      shared / (over === 'union' ? together : Math.min(a.width * a.height, b.width * b.height))
    );
  }

  it('overlap and suppress each other as by brute force', () => {
    const random = new RandomStream(3, 0);
    for (let trial = 0; trial < 30; trial++) {
      const boxes: ScoredBox[] = Array.from({ length: 14 }, () => ({
        x: random.below(20),
        y: random.below(20),
        width: 1 + random.below(19),
        height: 1 + random.below(19),
        score: random.below(6) / 6, // ties are frequent
      }));
      for (const over of ['union', 'min'] as const) {
        assert.equal(overlap(boxes[0]!, boxes[1]!, over), counted(boxes[0]!, boxes[1]!, over));
        // Takes the best of what is left, then throws out what it covers; until nothing is left.
        let left = [...boxes];
        const expected: ScoredBox[] = [];
        while (left.length > 0) {
          const best = left.reduce((a, b) => (b.score > a.score ? b : a));
          expected.push(best);
          left = left.filter((box) => box !== best && counted(best, box, over) <= 0.4);
        }
        assert.deepEqual(suppress(boxes, 0.4, over), expected);
      }
    }
  });
});

describe("MTCNN's networks", function () {
  this.timeout(120_000); // seconds when alone; the suite may share its cores

  for (const [name, height, width] of [
    ['det1', 13, 18],
    ['det2', 24, 24],
    ['det3', 48, 48],
  ] as const) {
    it(`compute what plain loops over the transposed image compute: ${name}`, async () => {
      const weights = randomWeights(name);
      const pixels = randomPixels(2 * height * width * 3, 3);
      const session = await InferenceSession.create(encodeNetwork(name, weights, 'x.npy'));
      const found = await session.run({
        image: new OrtTensor('uint8', pixels, [2, height, width, 3]),
      });
      await session.release();
      for (let n = 0; n < 2; n++) {
        const image = feature(height, width, 3, [
          ...pixels.subarray(n * height * width * 3, (n + 1) * height * width * 3),
        ]);
        const expected = referenceForward(name, weights, image);
        assert.deepEqual(Object.keys(found).sort(), Object.keys(expected).sort());
        for (const [output, reference] of Object.entries(expected)) {
          const { dims, data } = found[output]!;
          const [, channels, rows, columns] = dims as [number, number, number, number];
          // The reference's map is that of the transposed image.
          assert.deepEqual(
            [channels, rows, columns],
            [reference.channels, reference.width, reference.height],
          );
          for (let c = 0; c < channels; c++)
            for (let y = 0; y < rows; y++)
              for (let x = 0; x < columns; x++) {
                const value = (data as Float32Array)[
                  ((n * channels + c) * rows + y) * columns + x
                ]!;
                const wanted = reference.at(x, y, c);
                // fp32 sums of up to 1,152 products through five layers, with bytes of up to 255 that
                // the folded normalisation brings back to 1.
                assert.ok(
                  Math.abs(value - wanted) <= 2e-5 * Math.max(1, Math.abs(wanted)),
                  `${output}: ${value} for ${wanted}`,
                );
              }
        }
      }
    });
  }

  it('see a large image tile by tile as they see it whole', async () => {
    const session = await InferenceSession.create(
      encodeNetwork('det1', randomWeights('det1'), 'x.npy'),
    );
    const run = async ({ pixels, width, height }: Pixels) => {
      const image = new OrtTensor('uint8', new Uint8Array(pixels), [1, height, width, 3]);
      const { face } = await session.run({ image });
      const [, , rows, columns] = face!.dims as [number, number, number, number];
      return { rows, columns, values: face!.data as Float32Array };
    };
    // One tile, two and three of them, ends of every parity, one that holds a single column.
    for (const [width, height] of [
      [30, 21],
      [1034, 13],
      [1035, 12],
      [1036, 15],
      [16, 1101],
      [2061, 14],
      [1050, 1043],
    ] as const) {
      const image = { pixels: randomPixels(width * height * 3, width), width, height };
      const whole = await run(image);
      const seen = new Set<number>();
      for (const tile of tiles(image)) {
        assert.ok(tile.width <= 1034 && tile.height <= 1034);
        const { rows, columns, values } = await run(tile);
        for (const [i, value] of values.entries()) {
          const row = tile.y / 2 + Math.floor(i / columns);
          const cell = row * whole.columns + tile.x / 2 + (i % columns);
          assert.ok(rows > 0 && !seen.has(cell), `${width}x${height}: cell ${cell} twice`);
          seen.add(cell);
          // Sums in another order.
          assert.ok(Math.abs(value - whole.values[cell]!) <= 1e-5, `${width}x${height}: ${cell}`);
        }
      }
      assert.equal(seen.size, whole.values.length, `${width}x${height}`);
    }
    await session.release();
  });

  it('refuse weights that are missing, of another shape or no numbers', () => {
    const change = (part: string, tensor: LayerTensor | null) => {
      const weights = randomWeights('det2');
      const layer = weights.get('conv3')!;
      if (tensor === null) layer.delete(part);
      else layer.set(part, tensor);
      return () => encodeNetwork('det2', weights, 'd/det2.npy');
    };
    assert.throws(
      change('biases', null),
      errorLike('ERR_FORMAT', /^d\/det2\.npy has nothing as biases of conv3 where \[64\]/),
    );
    assert.throws(
      change('weights', { shape: [2, 2, 64, 48], data: new Float32Array(2 * 2 * 48 * 64) }),
      errorLike('ERR_FORMAT', /\[2, 2, 64, 48\] as weights of conv3 where \[2, 2, 48, 64\]/),
    );
    assert.throws(
      change('biases', { shape: [64], data: new Float32Array(64).fill(Number.NaN) }),
      errorLike('ERR_FORMAT', /has NaN in the biases of conv3/),
    );
  });
});

describe('.npy of a Python object', () => {
  const file = (header: string, payload: number[], version = 1) => {
    const length = version === 1 ? [header.length, 0] : [header.length, 0, 0, 0];
    return Buffer.concat([
      Buffer.from('\x93NUMPY', 'latin1'),
      Buffer.from([version, 0, ...length]),
      Buffer.from(header, 'latin1'),
      Buffer.from(payload),
    ]);
  };
  const header = "{'descr': '|O', 'fortran_order': False, 'shape': (), }\n";

  it('is refused when it is anything else', () => {
    const refused = (bytes: Uint8Array, pattern: RegExp) =>
      assert.throws(() => readNpyObject(bytes, 'd.npy'), errorLike('ERR_FORMAT', pattern));
    refused(Buffer.alloc(0), /^d\.npy is no \.npy file/);
    refused(Buffer.from('PK\x03\x04 and what follows'), /is no \.npy file/);
    refused(file(header, [], 3), /version 3\.0/);
    refused(file(header, []).subarray(0, 40), /announces a header of \d+ bytes but has 30 left/);
    refused(file(header.replace('|O', '<f4'), []), /'<f4'.*where one Python object is expected/);
    refused(file(header.replace('()', '(3,)'), []), /\(3,\)/);
    refused(file(header, []), /^d\.npy/);
    // A pickle of the number 1.
    for (const version of [1, 2]) {
      refused(file(header, [0x80, 2, 0x4b, 1, 0x2e], version), /holds something else/);
    }
  });
});

describe('photographs', () => {
  const plain = (r: number, g: number, b: number) =>
    sharp({ create: { width: 40, height: 30, channels: 3, background: { r, g, b } } });

  it('become upright sRGB of 8 bits, whatever they are', async () => {
    const cases: [string, Promise<Buffer>, [number, number, number], number][] = [
      ['RGB', plain(200, 100, 50).jpeg({ quality: 100 }).toBuffer(), [200, 100, 50], 2],
      ['grey', plain(90, 90, 90).greyscale().jpeg().toBuffer(), [90, 90, 90], 2],
      [
        'grey of 16 bits',
        plain(90, 90, 90).toColourspace('grey16').png().toBuffer(),
        [90, 90, 90],
        1,
      ],
      [
        'RGB of 16 bits',
        plain(9, 90, 200).toColourspace('rgb16').png().toBuffer(),
        [9, 90, 200],
        1,
      ],
      ['palette', plain(9, 90, 200).png({ palette: true }).toBuffer(), [9, 90, 200], 1],
      ['half transparent', plain(200, 100, 50).ensureAlpha(0.5).png().toBuffer(), [100, 50, 25], 2],
      // Printing inks do not reach every colour: near is all that can be asked.
      ['CMYK', plain(200, 100, 50).toColourspace('cmyk').jpeg().toBuffer(), [200, 100, 50], 35],
    ];
    for (const [name, bytes, colour, tolerance] of cases) {
      const { pixels, width, height } = await decodePhotograph(await bytes, name);
      assert.deepEqual([width, height, pixels.length], [40, 30, 40 * 30 * 3], name);
      for (const i of [0, 600 * 3]) {
        for (const [c, value] of colour.entries()) {
          const found = pixels[i + c]!;
          assert.ok(Math.abs(found - value) <= tolerance, `${name}: ${found} for ${value}`);
        }
      }
    }
    // Red above blue, to be turned by a quarter: red comes to lie right.
    const halves = await plain(0, 0, 255)
      .composite([
        { input: await plain(255, 0, 0).resize(40, 15).png().toBuffer(), gravity: 'north' },
      ])
      .withMetadata({ orientation: 6 })
      .png()
      .toBuffer();
    const { pixels, width, height } = await decodePhotograph(halves, 'turned');
    assert.deepEqual([width, height], [30, 40]);
    assert.deepEqual(
      [...pixels.subarray(0, 3), ...pixels.subarray(87, 90)],
      [0, 0, 255, 255, 0, 0],
    );
  });

  it('are refused when they are larger than 64 megapixels or no images', async () => {
    const jpeg = await plain(1, 2, 3).jpeg().toBuffer();
    const large = Buffer.from(jpeg);
    const frame = large.indexOf(Buffer.from([0xff, 0xc0]));
    large.writeUInt16BE(65_500, frame + 5);
    large.writeUInt16BE(65_500, frame + 7);
    const refused = (bytes: Buffer, pattern: RegExp) =>
      assert.rejects(decodePhotograph(bytes, 'x.jpg'), errorLike('ERR_DATA', pattern));
    await refused(large, /^x\.jpg is 65500x65500 pixels where .* at most 64 megapixels/);
    await refused(Buffer.from('a text'), /^x\.jpg is not a JPEG or PNG image/);
    await refused(Buffer.alloc(0), /it is empty/);
    await refused(jpeg.subarray(0, jpeg.length - 60), /^x\.jpg cannot be decoded/);
  });
});

describe('FaceAligner', function () {
  this.timeout(300_000); // seconds when alone; the suite may share its cores
  let root: string;
  let mtcnn: string;
  /** Image and hand-checked landmarks, x and y in turn. */
  let faces: [name: string, landmarks: number[]][];
  const image = (i: number) => join(root, 'images', faces[i]![0]);
  const using = async <T>(
    options: Omit<FaceAlignerOptions, 'mtcnn'>,
    work: (aligner: FaceAligner) => Promise<T>,
  ): Promise<T> => {
    const aligner = await FaceAligner.load({ mtcnn, ...options });
    try {
      return await work(aligner);
    } finally {
      await aligner.dispose();
    }
  };
  /** A grey canvas with images at given places. */
  const canvas = (
    width: number,
    height: number,
    parts: readonly { input: Buffer; left: number; top: number }[],
  ) =>
    sharp({ create: { width, height, channels: 3, background: '#808080' } })
      .composite([...parts])
      .png()
      .toBuffer();

  before(async function () {
    root = shared(this, 'faces/lfw-raw150');
    mtcnn = shared(this, 'mtcnn');
    const lines = (await readFile(join(root, 'landmarks.tsv'), 'utf8')).trim().split('\n').slice(1);
    faces = lines.map((line) => {
      const [name, ...numbers] = line.split('\t');
      return [name!, numbers.map(Number)];
    });
  });

  it('finds faces and landmarks where people have marked them', async () => {
    const errors: number[] = [];
    const bias = { x: 0, y: 0 };
    const every = 3;
    await using({}, async (aligner) => {
      const some = faces.filter((_, i) => i % every === 0);
      await mapBounded(some, async ([name, marked]) => {
        const face = await aligner.align(join(root, 'images', name));
        if (face === null) return;
        const eyes = Math.hypot(marked[2]! - marked[0]!, marked[3]! - marked[1]!);
        const distances = face.landmarks!.map(({ x, y }, k) =>
          Math.hypot(x - marked[2 * k]!, y - marked[2 * k + 1]!),
        );
        for (const [k, { x, y }] of face.landmarks!.entries()) {
          bias.x += (x - marked[2 * k]!) / eyes / 5 / some.length;
          bias.y += (y - marked[2 * k + 1]!) / eyes / 5 / some.length;
        }
        errors.push(distances.reduce((a, b) => a + b) / distances.length / eyes);
      });
    });
    errors.sort((a, b) => a - b);
    const [median, worst] = [0.5, 0.9].map((share) => errors[Math.floor(share * errors.length)]!);
    assert.ok(errors.length >= (295 / 300) * Math.ceil(faces.length / every), `${errors.length}`);
    assert.ok(median! <= 0.05, `median ${median} of the distance between the eyes`);
    assert.ok(worst! <= 0.1, `90th percentile ${worst}`);
    // Half a pixel too much to the right or below would be 0.02 here.
    assert.ok(Math.abs(bias.x) <= 0.01 && Math.abs(bias.y) <= 0.01, JSON.stringify(bias));
  });

  it('takes the face that the rule names, or the one under the hint', async () => {
    const large = await sharp(image(0)).resize(240, 240).png().toBuffer();
    const small = await readFile(image(3));
    const both = await canvas(700, 300, [
      { input: large, left: 0, top: 30 },
      { input: await sharp(small).png().toBuffer(), left: 310, top: 75 },
    ]);
    const isLeft = (face: AlignedFace | null) => face!.box!.x < 240;
    for (const [face, left] of [
      ['largest', true],
      ['center-large', false],
      ['most-certain', null],
    ] as const) {
      await using({ face }, async (aligner) => {
        const found = await aligner.detect(both);
        assert.ok(found.length >= 2);
        const chosen = await aligner.align(both);
        assert.equal(chosen!.faces, found.length);
        assert.equal(isLeft(chosen), left ?? found[0]!.x < 240);
        for (const [x, hintLeft] of [
          [80, true],
          [340, false],
        ] as const) {
          const hint = { box: { x, y: 100, width: 80, height: 80 } };
          assert.equal(isLeft(await aligner.align(both, hint)), hintLeft);
        }
        const nowhere = { box: { x: 600, y: 0, width: 50, height: 50 } };
        assert.equal(await aligner.align(both, nowhere), null);
        for (const [a, b] of found.slice(1).map((face, i) => [found[i]!, face] as const)) {
          assert.ok(a.score >= b.score, 'the most certain first');
        }
      });
    }
  });

  it('finds small faces anywhere in a large image', async () => {
    // Level 0.6 of 2,400 x 1,900 goes through P-Net in four tiles, which meet at pixel 1,707.
    const parts: { input: Buffer; left: number; top: number }[] = [];
    for (let i = 0; i < 24; i++) {
      // In the 150 pixels of an image a face has some 65: here 26.
      const input = await sharp(image(4 * i))
        .resize(60, 60)
        .png()
        .toBuffer();
      const along = 40 + 95 * i;
      parts.push(
        i % 2 === 0
          ? { input, left: 1707 - 30, top: Math.min(along, 1800) }
          : { input, left: along, top: 1707 - 30 },
      );
    }
    const apart = parts.filter(
      (a, i) => !parts.some((b, k) => k < i && Math.hypot(a.left - b.left, a.top - b.top) < 85),
    );
    const found = await using({}, async (aligner) =>
      aligner.detect(await canvas(2400, 1900, apart)),
    );
    const missed = apart.filter(
      ({ left, top }) =>
        !found.some(
          (face) =>
            Math.hypot(face.x + face.width / 2 - left - 30, face.y + face.height / 2 - top - 30) <
            10,
        ),
    );
    assert.ok(apart.length >= 18);
    // Some faces of 26 pixels are below what MTCNN knows even alone.
    assert.ok(missed.length <= apart.length / 6, `${missed.length} of ${apart.length} missed`);
  });

  it('gives nothing, or the middle, where there is no face', async () => {
    const bars = await sharp({
      create: { width: 300, height: 200, channels: 3, background: '#204080' },
    })
      .composite([
        {
          input: await sharp({
            create: { width: 200, height: 200, channels: 3, background: '#f0f0f0' },
          })
            .png()
            .toBuffer(),
        },
      ])
      .png()
      .toBuffer();
    await using({}, async (aligner) => {
      assert.deepEqual(await aligner.detect(bars), []);
      assert.equal(await aligner.align(bars), null);
      // Smaller than what P-Net sees at once.
      const tiny = await sharp(bars).resize(15, 10).png().toBuffer();
      assert.equal(await aligner.align(tiny), null);
    });
    await using({ fallback: 'center', size: '112x96' }, async (aligner) => {
      const face = await aligner.align(bars);
      const { pixels, width, height, ...rest } = face!;
      assert.deepEqual(rest, { landmarks: null, box: null, faces: 0, fallback: true });
      assert.deepEqual([width, height, pixels.length], [96, 112, 96 * 112 * 3]);
      const hint = { box: { x: 0, y: 0, width: 50, height: 50 } };
      assert.equal(await aligner.align(bars, hint), null);
    });
  });

  it('refuses options that it does not know and calls after dispose', async () => {
    const refused = (options: object, pattern: RegExp) =>
      assert.rejects(FaceAligner.load({ mtcnn, ...options }), errorLike('ERR_INPUT', pattern));
    await refused({ minFace: 11 }, /minFace is 11/);
    await refused({ size: '96x112' }, /size is 96x112: give 112x112 or 112x96/);
    await refused({ face: 'first' }, /face is first/);
    await refused({ fallback: 'none' }, /fallback is none/);
    const aligner = await FaceAligner.load({ mtcnn });
    const pending = aligner.align(image(0));
    await aligner.dispose();
    await aligner.dispose();
    assert.equal((await pending)!.faces, 1, 'what was under way is finished');
    await assert.rejects(aligner.detect(image(0)), errorLike('ERR_DISPOSED', /disposed/));
    await assert.rejects(aligner.align(image(0)), { code: 'ERR_DISPOSED' });
  });
});
