import assert from 'node:assert/strict';
import { InferenceSession, Tensor as OrtTensor } from 'onnxruntime-node';
import { RandomStream } from '../src/data/random.js';
import { HardmineError } from '../src/errors.js';
import { encodeOnnx } from '../src/formats/onnx.js';
import { ModelProto } from '../src/formats/onnx-schema.js';
import type { TensorMap } from '../src/formats/safetensors.js';
import type { NativeNode } from '../src/native.js';

const base = {
  input: -1,
  residual: -1,
  kernel: 1,
  stride: 1,
  padding: 0,
  activation: 'none',
  fixedScale: false,
} as const;

/** A small network with everything that ResNet18 has: stem, pool, a block with a projected shortcut, head. */
const NODES: NativeNode[] = [
  {
    ...base,
    op: 'convolution',
    name: 'conv1',
    inChannels: 3,
    outChannels: 4,
    inSize: 15,
    outSize: 8,
    kernel: 7,
    stride: 2,
    padding: 3,
  },
  {
    ...base,
    op: 'batch_norm',
    name: 'bn1',
    input: 0,
    inChannels: 4,
    outChannels: 4,
    inSize: 8,
    outSize: 8,
    activation: 'relu',
  },
  {
    ...base,
    op: 'max_pool',
    name: 'maxpool',
    input: 1,
    inChannels: 4,
    outChannels: 4,
    inSize: 8,
    outSize: 4,
    kernel: 3,
    stride: 2,
    padding: 1,
  },
  {
    ...base,
    op: 'convolution',
    name: 'block.conv1',
    input: 2,
    inChannels: 4,
    outChannels: 6,
    inSize: 4,
    outSize: 2,
    kernel: 3,
    stride: 2,
    padding: 1,
  },
  {
    ...base,
    op: 'batch_norm',
    name: 'block.bn1',
    input: 3,
    inChannels: 6,
    outChannels: 6,
    inSize: 2,
    outSize: 2,
    activation: 'relu',
  },
  {
    ...base,
    op: 'convolution',
    name: 'block.downsample.0',
    input: 2,
    inChannels: 4,
    outChannels: 6,
    inSize: 4,
    outSize: 2,
    stride: 2,
  },
  {
    ...base,
    op: 'batch_norm',
    name: 'block.downsample.1',
    input: 5,
    inChannels: 6,
    outChannels: 6,
    inSize: 2,
    outSize: 2,
  },
  {
    ...base,
    op: 'convolution',
    name: 'block.conv2',
    input: 4,
    inChannels: 6,
    outChannels: 6,
    inSize: 2,
    outSize: 2,
    kernel: 3,
    padding: 1,
  },
  {
    ...base,
    op: 'batch_norm',
    name: 'block.bn2',
    input: 7,
    residual: 6,
    inChannels: 6,
    outChannels: 6,
    inSize: 2,
    outSize: 2,
    activation: 'relu',
  },
  {
    ...base,
    op: 'global_average_pool',
    name: 'avgpool',
    input: 8,
    inChannels: 6,
    outChannels: 6,
    inSize: 2,
    outSize: 1,
  },
  {
    ...base,
    op: 'linear',
    name: 'fc',
    input: 9,
    inChannels: 6,
    outChannels: 5,
    inSize: 1,
    outSize: 1,
  },
];

function randomTensors(): TensorMap {
  const random = new RandomStream(7, 0);
  const tensors: TensorMap = new Map();
  const add = (name: string, shape: number[], draw: () => number) => {
    const length = shape.reduce((a, b) => a * b);
    tensors.set(name, { dtype: 'F32', shape, data: Float32Array.from({ length }, draw) });
  };
  for (const { op, name, inChannels, outChannels, kernel } of NODES) {
    if (op === 'convolution')
      add(`${name}.weight`, [outChannels, inChannels, kernel, kernel], () => 0.3 * random.normal());
    if (op === 'linear') {
      add(`${name}.weight`, [outChannels, inChannels], () => random.normal());
      add(`${name}.bias`, [outChannels], () => random.normal());
    }
    if (op === 'batch_norm') {
      for (const part of ['weight', 'bias', 'running_mean'])
        add(`${name}.${part}`, [outChannels], () => random.normal());
      add(`${name}.running_var`, [outChannels], () => random.uniform(0.1, 2));
    }
  }
  return tensors;
}

/** The network in double, batch-norm as its own step and not folded, by plain loops. */
function forward(image: ArrayLike<number>, tensors: TensorMap): number[] {
  const outputs: number[][] = [];
  const tensor = (name: string) => tensors.get(name)!.data as Float32Array;
  for (const node of NODES) {
    const { inChannels, outChannels, inSize, outSize, kernel, stride, padding } = node;
    const input: ArrayLike<number> = node.input < 0 ? image : outputs[node.input]!;
    const output: number[] = [];
    const at = (c: number, y: number, x: number) =>
      y < 0 || x < 0 || y >= inSize || x >= inSize
        ? undefined
        : input[(c * inSize + y) * inSize + x]!;
    for (let o = 0; o < outChannels; o++) {
      for (let y = 0; y < outSize; y++) {
        for (let x = 0; x < outSize; x++) {
          const seen: number[] = [];
          for (let c = 0; c < inChannels; c++) {
            for (let ky = 0; ky < kernel; ky++) {
              for (let kx = 0; kx < kernel; kx++) {
                const value = at(c, y * stride + ky - padding, x * stride + kx - padding);
                if (node.op === 'convolution') {
                  const index = ((o * inChannels + c) * kernel + ky) * kernel + kx;
                  seen.push((value ?? 0) * tensor(`${node.name}.weight`)[index]!);
                } else if (c === o && value !== undefined) seen.push(value);
              }
            }
          }
          if (node.op === 'max_pool') output.push(Math.max(...seen));
          if (node.op === 'convolution') output.push(seen.reduce((a, b) => a + b));
          if (node.op === 'batch_norm') {
            const part = (name: string) => tensor(`${node.name}.${name}`)[o]!;
            let value =
              (part('weight') * (at(o, y, x)! - part('running_mean'))) /
                Math.sqrt(part('running_var') + 1e-5) +
              part('bias');
            if (node.residual >= 0) value += outputs[node.residual]![output.length]!;
            output.push(node.activation === 'relu' ? Math.max(0, value) : value);
          }
          if (node.op === 'linear') {
            let sum = tensor('fc.bias')[o]!;
            for (let c = 0; c < inChannels; c++)
              sum += tensor('fc.weight')[o * inChannels + c]! * input[c]!;
            output.push(sum);
          }
          if (node.op === 'global_average_pool') {
            let sum = 0;
            for (let i = 0; i < inSize * inSize; i++) sum += input[o * inSize * inSize + i]!;
            output.push(sum / (inSize * inSize));
          }
        }
      }
    }
    outputs.push(output);
  }
  return outputs.at(-1)!;
}

describe('the ONNX writer', () => {
  const tensors = randomTensors();
  const metadata = new Map([
    ['normalisation', '(x - 127.5) / 128'],
    ['channel_order', 'RGB'],
  ]);
  const bytes = encodeOnnx(NODES, tensors, metadata);

  it('writes what ONNX Runtime runs, for any batch, and what the network computes', async () => {
    const session = await InferenceSession.create(bytes);
    try {
      assert.deepEqual(session.inputNames, ['input']);
      assert.deepEqual(session.outputNames, ['embedding']);
      const random = new RandomStream(8, 0);
      for (const n of [1, 3]) {
        const pixels = Float32Array.from({ length: n * 3 * 15 * 15 }, () => random.uniform(-1, 1));
        const input = new OrtTensor('float32', pixels, [n, 3, 15, 15]);
        const { embedding } = await session.run({ input });
        assert.deepEqual(embedding!.dims, [n, 5]);
        for (let i = 0; i < n; i++) {
          const expected = forward(pixels.subarray(i * 675, (i + 1) * 675), tensors);
          for (const [k, value] of expected.entries()) {
            const found = (embedding!.data as Float32Array)[i * 5 + k]!;
            // fp32 rounding of sums of at most 147 products, through four layers.
            assert.ok(
              Math.abs(found - value) <= 1e-5 * Math.max(1, Math.abs(value)),
              `${found} for ${value}`,
            );
          }
        }
      }
    } finally {
      await session.release();
    }
  });

  it('says opset 17, IR version 8, the shapes and how pixels are normalised', () => {
    // Field 1 (ir_version) as a varint comes first.
    assert.deepEqual([...bytes.subarray(0, 2)], [0x08, 8]);
    const model = ModelProto.toObject(ModelProto.decode(bytes), { longs: Number, bytes: Array });
    assert.deepEqual(model['opsetImport'], [{ domain: '', version: 17 }]);
    assert.deepEqual(model['metadataProps'], [
      { key: 'normalisation', value: '(x - 127.5) / 128' },
      { key: 'channel_order', value: 'RGB' },
    ]);
    const { graph } = model as {
      graph: Record<string, { opType: string; type: { tensorType: object } }[]>;
    };
    assert.deepEqual(graph['input']![0]!.type.tensorType, {
      elemType: 1,
      shape: { dim: [{ dimParam: 'N' }, { dimValue: 3 }, { dimValue: 15 }, { dimValue: 15 }] },
    });
    assert.deepEqual(graph['output']![0]!.type.tensorType, {
      elemType: 1,
      shape: { dim: [{ dimParam: 'N' }, { dimValue: 5 }] },
    });
    assert.deepEqual(
      graph['node']!.map(({ opType }) => opType),
      [
        'Conv',
        'Relu',
        'MaxPool',
        'Conv',
        'Relu',
        'Conv',
        'Conv',
        'Add',
        'Relu',
        'GlobalAveragePool',
        'Flatten',
        'Gemm',
      ],
    );
  });

  it('refuses a network that it cannot fold and tensors that are not there', () => {
    const internal = (pattern: RegExp) => (error: unknown) =>
      error instanceof HardmineError &&
      error.code === 'ERR_INTERNAL' &&
      pattern.test(error.message);
    assert.throws(() => encodeOnnx(NODES.slice(0, 3), tensors, metadata), internal(/linear/));
    // The shortcut reads the convolution beside its batch-norm: folding would change it.
    const branching = NODES.map((node) =>
      node.name === 'block.bn2' ? { ...node, residual: 5 } : node,
    );
    assert.throws(() => encodeOnnx(branching, tensors, metadata), internal(/block\.downsample\.0/));
    const incomplete = new Map(tensors);
    incomplete.delete('bn1.bias');
    assert.throws(() => encodeOnnx(NODES, incomplete, metadata), internal(/bn1\.bias/));
  });
});
