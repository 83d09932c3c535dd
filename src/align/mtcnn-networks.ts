/**
 * MTCNN's three networks (Zhang, Zhang, Li, Qiao 2016) as ONNX, from the weights of the facenet project.
 *
 * Those were trained on images with x and y exchanged and on (x - 127.5) / 128. Both are undone in the
 * weights: kernels are transposed, the normalisation is folded into the first convolution. So the graphs
 * take the bytes of upright images, 'image' uint8 [N, height, width, 3], and all of a network is
 * convolutions, since a linear layer over a map is one whose kernel covers the map.
 */
import { HardmineError } from '../errors.js';
import { OnnxGraph } from '../formats/onnx-graph.js';

export interface LayerTensor {
  shape: readonly number[];
  /** In C order. */
  data: Float32Array;
}

/** Layer ('conv1', 'PReLU1') to part ('weights', 'biases', 'alpha') to values. */
export type LayerWeights = ReadonlyMap<string, ReadonlyMap<string, LayerTensor>>;

interface Convolution {
  name: string;
  kernel: number;
  inputs: number;
  outputs: number;
  /** Published as a matrix [kernel * kernel * inputs, outputs]. */
  linear?: true;
  prelu?: string;
  /** Side of the max-pool window behind it, stride 2. */
  pool?: { size: number; same: boolean };
}

interface Network {
  trunk: readonly Convolution[];
  /** Two logits, not a face and a face. */
  face: Convolution;
  /** What else it gives, by the name of the graph's output. */
  regressions: Readonly<Record<string, Convolution>>;
}

const head = (name: string, inputs: number, outputs: number, linear?: true): Convolution => ({
  name,
  kernel: 1,
  inputs,
  outputs,
  ...(linear && { linear }),
});

export const NETWORKS = {
  det1: {
    trunk: [
      { ...conv('conv1', 3, 3, 10, 'PReLU1'), pool: { size: 2, same: true } },
      conv('conv2', 3, 10, 16, 'PReLU2'),
      conv('conv3', 3, 16, 32, 'PReLU3'),
    ],
    face: head('conv4-1', 32, 2),
    regressions: { box: head('conv4-2', 32, 4) },
  },
  det2: {
    trunk: [
      { ...conv('conv1', 3, 3, 28, 'prelu1'), pool: { size: 3, same: true } },
      { ...conv('conv2', 3, 28, 48, 'prelu2'), pool: { size: 3, same: false } },
      conv('conv3', 2, 48, 64, 'prelu3'),
      { ...conv('conv4', 3, 64, 128, 'prelu4'), linear: true },
    ],
    face: head('conv5-1', 128, 2, true),
    regressions: { box: head('conv5-2', 128, 4, true) },
  },
  det3: {
    trunk: [
      { ...conv('conv1', 3, 3, 32, 'prelu1'), pool: { size: 3, same: true } },
      { ...conv('conv2', 3, 32, 64, 'prelu2'), pool: { size: 3, same: false } },
      { ...conv('conv3', 3, 64, 64, 'prelu3'), pool: { size: 2, same: true } },
      conv('conv4', 2, 64, 128, 'prelu4'),
      { ...conv('conv5', 3, 128, 256, 'prelu5'), linear: true },
    ],
    face: head('conv6-1', 256, 2, true),
    regressions: { box: head('conv6-2', 256, 4, true), landmarks: head('conv6-3', 256, 10, true) },
  },
} as const satisfies Record<string, Network>;

export type NetworkName = keyof typeof NETWORKS;
export const NETWORK_NAMES = ['det1', 'det2', 'det3'] as const satisfies NetworkName[];

/** Names of a network's outputs. */
export const outputsOf = (name: NetworkName): string[] => [
  'face',
  ...Object.keys(NETWORKS[name].regressions),
];

function conv(
  name: string,
  kernel: number,
  inputs: number,
  outputs: number,
  prelu: string,
): Convolution {
  return { name, kernel, inputs, outputs, prelu };
}

/**
 * The bytes of a network as an ONNX model with the outputs 'face', float [N, 1, ...], the probability of
 * a face, and 'box' [N, 4, ...] and 'landmarks' [N, 10, ...] as published: relative to the window,
 * x1 y1 x2 y2 and x1..x5 y1..y5.
 *
 * @param file names the weights in errors
 * @throws HardmineError ERR_FORMAT when a layer is missing, has another shape or is not finite
 */
export function encodeNetwork(name: NetworkName, weights: LayerWeights, file: string): Uint8Array {
  const { trunk, face, regressions }: Network = NETWORKS[name];
  const graph = new OnnxGraph();
  const values = (layer: string, part: string, shape: readonly number[]): Float32Array => {
    const tensor = weights.get(layer)?.get(part);
    const found = tensor === undefined ? 'nothing' : `[${tensor.shape.join(', ')}]`;
    if (tensor === undefined || found !== `[${shape.join(', ')}]`) {
      throw wrongWeights(file, `has ${found} as ${part} of ${layer} where [${shape.join(', ')}]`);
    }
    const wrong = tensor.data.findIndex((value) => !Number.isFinite(value));
    if (wrong >= 0) {
      throw wrongWeights(
        file,
        `has ${tensor.data[wrong]} in the ${part} of ${layer} where a number`,
      );
    }
    return tensor.data;
  };
  const read = (layer: Convolution) => {
    const { kernel, inputs, outputs } = layer;
    const shape = layer.linear
      ? [kernel * kernel * inputs, outputs]
      : [kernel, kernel, inputs, outputs];
    return {
      weight: transposedKernel(values(layer.name, 'weights', shape), layer),
      bias: values(layer.name, 'biases', [outputs]),
    };
  };
  const convolve = (
    input: string,
    { name, kernel, inputs, outputs }: Convolution,
    { weight, bias }: { weight: Float32Array; bias: Float32Array },
    output = name,
  ): string =>
    graph.add(
      'Conv',
      name,
      [
        input,
        graph.initializer(`${name}.weight`, [outputs, inputs, kernel, kernel], weight),
        graph.initializer(`${name}.bias`, [outputs], bias),
      ],
      {},
      output,
    );

  let value = graph.add('Cast', 'float', ['image'], { to: 1 });
  value = graph.add('Transpose', 'planes', [value], { perm: [0, 3, 1, 2] });
  for (const [index, layer] of trunk.entries()) {
    const { weight, bias } = read(layer);
    value = convolve(value, layer, index === 0 ? ofBytes(weight, bias) : { weight, bias });
    if (layer.prelu !== undefined) {
      const alpha = values(layer.prelu, 'alpha', [layer.outputs]);
      const slope = graph.initializer(`${layer.prelu}.alpha`, [layer.outputs, 1, 1], alpha);
      value = graph.add('PRelu', layer.prelu, [value, slope]);
    }
    if (layer.pool !== undefined) {
      const { size, same } = layer.pool;
      value = graph.add('MaxPool', `${layer.name}.pool`, [value], {
        kernel_shape: [size, size],
        strides: [2, 2],
        // On the sizes that occur (even ones where the window is 3), SAME pads at the far end alone,
        // as ceil_mode does.
        ceil_mode: same ? 1 : 0,
      });
    }
  }
  // The softmax over two logits is the sigmoid of their difference, which is one convolution.
  const logit = convolve(value, { ...face, outputs: 1 }, difference(read(face)));
  graph.add('Sigmoid', 'face', [logit]);
  const isMap = name === 'det1';
  const sizes = isMap ? ['cells y', 'cells x'] : [1, 1];
  const outputs = [{ name: 'face', type: 'float' as const, sizes: ['N', 1, ...sizes] }];
  for (const [output, layer] of Object.entries(regressions)) {
    convolve(value, layer, read(layer), output);
    outputs.push({ name: output, type: 'float', sizes: ['N', layer.outputs, ...sizes] });
  }
  const side = isMap ? ['height', 'width'] : [WINDOW[name], WINDOW[name]];
  return graph.encode(name, [{ name: 'image', type: 'uint8', sizes: ['N', ...side, 3] }], outputs);
}

/** Side in pixels of what each network sees at once. */
export const WINDOW = { det1: 12, det2: 24, det3: 48 } as const satisfies Record<
  NetworkName,
  number
>;

function wrongWeights(file: string, what: string): HardmineError {
  return new HardmineError(
    'ERR_FORMAT',
    `${file} ${what} is expected: give MTCNN's weights as the facenet project publishes them in src/align.`,
  );
}

/** [height, width, in, out] over transposed images as [out, in, height, width] over upright ones. */
function transposedKernel(
  weights: Float32Array,
  { kernel, inputs, outputs }: Convolution,
): Float32Array {
  const upright = new Float32Array(weights.length);
  let at = 0;
  for (let x = 0; x < kernel; x++) {
    for (let y = 0; y < kernel; y++) {
      for (let i = 0; i < inputs; i++) {
        for (let o = 0; o < outputs; o++) {
          upright[((o * inputs + i) * kernel + y) * kernel + x] = weights[at++]!;
        }
      }
    }
  }
  return upright;
}

/** W ((x - 127.5) / 128) + b as W' x + b', reckoned in double. */
function ofBytes(
  weight: Float32Array,
  bias: Float32Array,
): { weight: Float32Array; bias: Float32Array } {
  const perOutput = weight.length / bias.length;
  return {
    weight: weight.map((value) => value / 128),
    bias: bias.map((value, output) => {
      let sum = 0;
      for (let i = output * perOutput; i < (output + 1) * perOutput; i++) sum += weight[i]!;
      return value - (sum * 127.5) / 128;
    }),
  };
}

/** The second output less the first. */
function difference({ weight, bias }: { weight: Float32Array; bias: Float32Array }): {
  weight: Float32Array;
  bias: Float32Array;
} {
  const half = weight.length / 2;
  return {
    weight: Float32Array.from({ length: half }, (_, i) => weight[half + i]! - weight[i]!),
    bias: Float32Array.of(bias[1]! - bias[0]!),
  };
}
