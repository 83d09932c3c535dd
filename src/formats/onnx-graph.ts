/** Collects the nodes and weights of an ONNX graph (opset 17) and writes the model's bytes. */
import { AttributeType, DataType, ModelProto } from './onnx-schema.js';

const OPSET = 17;
/** The IR version that came with opset 17 (ONNX 1.12); runtimes refuse files newer than themselves. */
const IR_VERSION = 8;

interface Attribute {
  name: string;
  type: number;
  i?: number;
  ints?: readonly number[];
}

/** An input or output of the graph; a size in words is free. */
export interface OnnxValue {
  name: string;
  type: keyof typeof DataType;
  sizes: readonly (number | string)[];
}

export class OnnxGraph {
  readonly #nodes: object[] = [];
  readonly #initializers: object[] = [];

  /** Adds a weight; returns its name. */
  initializer(name: string, dims: readonly number[], data: Float32Array): string {
    const rawData = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    this.#initializers.push({ name, dataType: DataType.float, dims, rawData });
    return name;
  }

  /** Adds a node with one output; returns the output's name. */
  add(
    opType: string,
    name: string,
    input: readonly string[],
    attributes: Readonly<Record<string, number | readonly number[]>> = {},
    output = name,
  ): string {
    const attribute = Object.entries(attributes).map(
      ([name, value]): Attribute =>
        typeof value === 'number'
          ? { name, type: AttributeType.int, i: value }
          : { name, type: AttributeType.ints, ints: value },
    );
    this.#nodes.push({ opType, name, input, output: [output], attribute });
    return output;
  }

  encode(
    name: string,
    inputs: readonly OnnxValue[],
    outputs: readonly OnnxValue[],
    metadata: ReadonlyMap<string, string> = new Map(),
  ): Uint8Array {
    return ModelProto.encode(
      ModelProto.fromObject({
        irVersion: IR_VERSION,
        producerName: 'hardmine',
        opsetImport: [{ domain: '', version: OPSET }],
        metadataProps: [...metadata].map(([key, value]) => ({ key, value })),
        graph: {
          name,
          node: this.#nodes,
          initializer: this.#initializers,
          input: inputs.map(valueInfo),
          output: outputs.map(valueInfo),
        },
      }),
    ).finish();
  }
}

function valueInfo({ name, type, sizes }: OnnxValue) {
  const dim = sizes.map((size) =>
    typeof size === 'number' ? { dimValue: size } : { dimParam: size },
  );
  return { name, type: { tensorType: { elemType: DataType[type], shape: { dim } } } };
}
