/**
 * Writes a network as ONNX (opset 17), batch-norm folded into the convolutions, so that what it
 * computes is the network's inference and nothing else.
 */
import { HardmineError } from '../errors.js';
import type { NativeNode } from '../native.js';
import { AttributeType, DataType, ModelProto } from './onnx-schema.js';
import type { TensorMap } from './safetensors.js';

const OPSET = 17;
/** The IR version that came with opset 17 (ONNX 1.12); runtimes refuse files newer than themselves. */
const IR_VERSION = 8;
/** torch's default, as core/network.h has it. */
export const BATCH_NORM_EPSILON = 1e-5;

interface Attribute {
  name: string;
  type: number;
  i?: number;
  ints?: number[];
}

interface GraphNode {
  opType: string;
  name: string;
  input: string[];
  output: string[];
  attribute?: Attribute[];
}

interface Initializer {
  name: string;
  dataType: number;
  dims: number[];
  rawData: Uint8Array;
}

/**
 * The bytes of an ONNX model with the input 'input', float [N, 3, size, size] of normalised RGB, and
 * the output 'embedding', float [N, embedding]; N is free.
 *
 * @param nodes the network, as the addon describes it: every convolution is followed by its own
 *   batch-norm, the last node is the linear one that gives the embedding.
 * @param tensors the network's, with torchvision's names.
 * @param metadata what is written into metadata_props.
 */
export function encodeOnnx(
  nodes: readonly NativeNode[],
  tensors: TensorMap,
  metadata: ReadonlyMap<string, string>,
): Uint8Array {
  const first = nodes[0];
  const last = nodes.at(-1);
  if (first === undefined || last === undefined || last.op !== 'linear') {
    throw new HardmineError(
      'ERR_INTERNAL',
      'The ONNX writer needs a network that ends in a linear layer.',
    );
  }
  const graph: GraphNode[] = [];
  const initializers: Initializer[] = [];
  /** Name of the value that each node gives. */
  const values: string[] = [];

  const initializer = (name: string, dims: number[], data: Float32Array): string => {
    const rawData = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    initializers.push({ name, dataType: DataType.float, dims, rawData });
    return name;
  };
  const add = (
    opType: string,
    name: string,
    input: string[],
    attribute: Attribute[] = [],
    output = name,
  ): string => {
    graph.push({ opType, name, input, output: [output], attribute });
    return output;
  };

  for (const [index, node] of nodes.entries()) {
    const input = node.input < 0 ? 'input' : values[node.input]!;
    switch (node.op) {
      case 'convolution': {
        const norm = foldedNorm(nodes, index);
        const { weight, bias } = foldBatchNorm(node, norm, tensors);
        const dims = [node.outChannels, node.inChannels, node.kernel, node.kernel];
        values[index] = add(
          'Conv',
          node.name,
          [
            input,
            initializer(`${node.name}.weight`, dims, weight),
            initializer(`${node.name}.bias`, [node.outChannels], bias),
          ],
          window(node),
        );
        break;
      }
      case 'batch_norm': {
        let value = input; // the convolution's, which holds the batch-norm already
        if (node.residual >= 0) {
          value = add('Add', `${node.name}.add`, [value, values[node.residual]!]);
        }
        if (node.activation === 'relu') value = add('Relu', `${node.name}.relu`, [value]);
        values[index] = value;
        break;
      }
      case 'max_pool':
        values[index] = add('MaxPool', node.name, [input], window(node));
        break;
      case 'global_average_pool':
        values[index] = add('Flatten', `${node.name}.flatten`, [
          add('GlobalAveragePool', node.name, [input]),
        ]);
        break;
      case 'linear':
        values[index] = add(
          'Gemm',
          node.name,
          [
            input,
            initializer(
              `${node.name}.weight`,
              [node.outChannels, node.inChannels],
              values32(tensors, `${node.name}.weight`),
            ),
            initializer(
              `${node.name}.bias`,
              [node.outChannels],
              values32(tensors, `${node.name}.bias`),
            ),
          ],
          [{ name: 'transB', type: AttributeType.int, i: 1 }],
          'embedding',
        );
        break;
    }
  }
  return ModelProto.encode(
    ModelProto.fromObject({
      irVersion: IR_VERSION,
      producerName: 'hardmine',
      opsetImport: [{ domain: '', version: OPSET }],
      metadataProps: [...metadata].map(([key, value]) => ({ key, value })),
      graph: {
        name: 'embedding',
        node: graph,
        initializer: initializers,
        input: [floatValue('input', [first.inChannels, first.inSize, first.inSize])],
        output: [floatValue('embedding', [last.outChannels])],
      },
    }),
  ).finish();
}

/** The batch-norm into which alone the convolution at `index` leads. */
function foldedNorm(nodes: readonly NativeNode[], index: number): NativeNode {
  const readers = nodes.filter(({ input, residual }) => input === index || residual === index);
  const [norm] = readers;
  if (norm?.op !== 'batch_norm' || norm.residual === index || readers.length > 1) {
    throw new HardmineError(
      'ERR_INTERNAL',
      `The ONNX writer folds batch-norm, but ${nodes[index]?.name} does not lead into one of its own.`,
    );
  }
  return norm;
}

/** gamma (W x - mean) / sqrt(var + eps) + beta as W' x + b', reckoned in double. */
function foldBatchNorm(
  { name, outChannels }: NativeNode,
  norm: NativeNode,
  tensors: TensorMap,
): { weight: Float32Array; bias: Float32Array } {
  const gamma = values32(tensors, `${norm.name}.weight`);
  const beta = values32(tensors, `${norm.name}.bias`);
  const mean = values32(tensors, `${norm.name}.running_mean`);
  const variance = values32(tensors, `${norm.name}.running_var`);
  const weight = values32(tensors, `${name}.weight`).slice();
  const bias = new Float32Array(outChannels);
  const perChannel = weight.length / outChannels;
  for (let channel = 0; channel < outChannels; channel++) {
    const factor = gamma[channel]! / Math.sqrt(variance[channel]! + BATCH_NORM_EPSILON);
    bias[channel] = beta[channel]! - mean[channel]! * factor;
    for (let i = channel * perChannel; i < (channel + 1) * perChannel; i++) weight[i]! *= factor;
  }
  return { weight, bias };
}

function values32(tensors: TensorMap, name: string): Float32Array {
  const tensor = tensors.get(name);
  if (tensor?.dtype !== 'F32') {
    throw new HardmineError('ERR_INTERNAL', `The network's float32 tensor ${name} is missing.`);
  }
  return tensor.data;
}

function window({ kernel, stride, padding }: NativeNode): Attribute[] {
  const ints = (name: string, values: number[]) => ({
    name,
    type: AttributeType.ints,
    ints: values,
  });
  return [
    ints('kernel_shape', [kernel, kernel]),
    ints('strides', [stride, stride]),
    ints('pads', [padding, padding, padding, padding]),
  ];
}

/** A float tensor whose first dimension is the batch. */
function floatValue(name: string, sizes: number[]) {
  const dim = [{ dimParam: 'N' }, ...sizes.map((dimValue) => ({ dimValue }))];
  return { name, type: { tensorType: { elemType: DataType.float, shape: { dim } } } };
}
