/**
 * Writes a network as ONNX, batch-norm folded into the convolutions, so that what it
 * computes is the network's inference and nothing else.
 */
import { HardmineError } from '../errors.js';
import type { NativeNode } from '../native.js';
import { OnnxGraph } from './onnx-graph.js';
import type { TensorMap } from './safetensors.js';

/** torch's default, as core/network.h has it. */
export const BATCH_NORM_EPSILON = 1e-5;

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
  const graph = new OnnxGraph();
  /** Name of the value that each node gives. */
  const values: string[] = [];

  for (const [index, node] of nodes.entries()) {
    const input = node.input < 0 ? 'input' : values[node.input]!;
    switch (node.op) {
      case 'convolution': {
        const norm = foldedNorm(nodes, index);
        const { weight, bias } = foldBatchNorm(node, norm, tensors);
        const dims = [node.outChannels, node.inChannels, node.kernel, node.kernel];
        values[index] = graph.add(
          'Conv',
          node.name,
          [
            input,
            graph.initializer(`${node.name}.weight`, dims, weight),
            graph.initializer(`${node.name}.bias`, [node.outChannels], bias),
          ],
          window(node),
        );
        break;
      }
      case 'batch_norm': {
        let value = input; // the convolution's, which holds the batch-norm already
        if (node.residual >= 0) {
          value = graph.add('Add', `${node.name}.add`, [value, values[node.residual]!]);
        }
        if (node.activation === 'relu') value = graph.add('Relu', `${node.name}.relu`, [value]);
        values[index] = value;
        break;
      }
      case 'max_pool':
        values[index] = graph.add('MaxPool', node.name, [input], window(node));
        break;
      case 'global_average_pool':
        values[index] = graph.add('Flatten', `${node.name}.flatten`, [
          graph.add('GlobalAveragePool', node.name, [input]),
        ]);
        break;
      case 'linear':
        values[index] = graph.add(
          'Gemm',
          node.name,
          [
            input,
            graph.initializer(
              `${node.name}.weight`,
              [node.outChannels, node.inChannels],
              values32(tensors, `${node.name}.weight`),
            ),
            graph.initializer(
              `${node.name}.bias`,
              [node.outChannels],
              values32(tensors, `${node.name}.bias`),
            ),
          ],
          { transB: 1 },
          'embedding',
        );
        break;
    }
  }
  const { inChannels, inSize } = first;
  return graph.encode(
    'embedding',
    [{ name: 'input', type: 'float', sizes: ['N', inChannels, inSize, inSize] }],
    [{ name: 'embedding', type: 'float', sizes: ['N', last.outChannels] }],
    metadata,
  );
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

function window({ kernel, stride, padding }: NativeNode): Record<string, readonly number[]> {
  return {
    kernel_shape: [kernel, kernel],
    strides: [stride, stride],
    pads: [padding, padding, padding, padding],
  };
}
