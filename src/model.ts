/** A trained network as a file and as something that embeds faces. */
import { throwIfAborted } from './data/files.js';
import { decodeImages, PIXEL_BYTES, SIDE } from './data/images.js';
import { RandomStream } from './data/random.js';
import { HardmineError } from './errors.js';
import { writeFileAtomic } from './formats/atomic.js';
import { BATCH_NORM_EPSILON, encodeOnnx } from './formats/onnx.js';
import { loadOnnxRuntime } from './formats/onnx-runtime.js';
import {
  readSafetensors,
  type Tensor,
  type TensorMap,
  writeSafetensors,
} from './formats/safetensors.js';
import {
  chooseDevice,
  type DeviceName,
  type NativeAddon,
  type NativeEmbedder,
  type NativeExecution,
  type NativeNode,
  type Precision,
} from './native.js';

const ARCHITECTURE = 'resnet18';
/** Images embedded in one native call: large enough to fill the device, small enough to keep in memory. */
const CHUNK = 64;
/** What export --check allows between ONNX Runtime and our own inference, of the greatest value or of 1. */
const ONNX_MAX_DIFFERENCE = 1e-4;
const ONNX_MIN_COSINE = 0.99999;
const ONNX_CHECK_IMAGES = 64;

/** What every model file says of its input; a file that says something else is refused. */
const INPUT_METADATA: ReadonlyMap<string, string> = new Map([
  ['architecture', ARCHITECTURE],
  ['input_size', `${SIDE}x${SIDE}`],
  ['channel_order', 'RGB'],
  ['normalisation', '(x - 127.5) / 128'],
]);

/** What a model file says of its model beyond its tensors. */
export interface ModelInfo {
  /** Cosine similarity from which on two faces are the same person's, found on validation. */
  threshold?: number;
  /** Hash of the configuration it was trained with. */
  configHash?: string;
}

export interface ModelOptions {
  /** Default 'auto'. */
  device?: DeviceName;
  /** Of products and activations; default 'fp32', so that embeddings are those of other runtimes. */
  precision?: Precision;
  /** CPU threads; default 0: physical cores. */
  threads?: number;
}

export interface EmbedOptions {
  /** Embed the images with left and right exchanged. Default false. */
  mirror?: boolean;
  /** Stops the work before the next 64 images. */
  signal?: AbortSignal;
}

/** How far ONNX Runtime's embeddings are from ours. */
export interface OnnxCheck {
  /** How many were compared. */
  images: number;
  /** Greatest difference of a value of an embedding. */
  maxAbsDifference: number;
  /** Least cosine of an image's two embeddings, -1 to 1. */
  minCosine: number;
  /**
   * Whether the former is at most 1e-4, of embeddings with values above 1 that share of the greatest, and
   * the latter at least 0.99999.
   */
  passed: boolean;
}

/**
 * A ResNet18 (He et al. 2016, as torchvision has it) that turns aligned faces into embeddings. Calls run
 * one after the other, off the event loop. After dispose() every call fails with ERR_DISPOSED, those
 * under way too.
 */
export class FaceModel {
  /** Length of an embedding. */
  readonly embedding: number;
  /** What the file says of the model. */
  readonly info: Readonly<ModelInfo>;
  readonly #addon: NativeAddon;
  readonly #execution: NativeExecution;
  readonly #nodes: readonly NativeNode[];
  readonly #tensors: TensorMap;
  readonly #embedder: NativeEmbedder;
  #disposed = false;

  private constructor(parts: {
    addon: NativeAddon;
    execution: NativeExecution;
    nodes: readonly NativeNode[];
    tensors: TensorMap;
    info: ModelInfo;
    embedder: NativeEmbedder;
  }) {
    this.#addon = parts.addon;
    this.#execution = parts.execution;
    this.#nodes = parts.nodes;
    this.#tensors = parts.tensors;
    this.#embedder = parts.embedder;
    this.info = parts.info;
    this.embedding = parts.nodes.at(-1)!.outChannels;
  }

  /**
   * Loads a safetensors file with the keys and shapes of torchvision's
   * resnet18(num_classes=embedding).state_dict(), saved by hardmine or from PyTorch.
   *
   * @throws HardmineError ERR_IO for a file that cannot be read; ERR_FORMAT for one that is none, lacks a
   *   tensor or has one too many, and for weights that are not finite; ERR_CONFIG for a name that is no
   *   device, ERR_DEVICE_UNAVAILABLE for one that is not there, ERR_ADDON when its addon does not load.
   */
  static async load(path: string, options: ModelOptions = {}): Promise<FaceModel> {
    const { tensors, metadata } = await readSafetensors(path);
    return FaceModel.#create(path, tensors, parseMetadata(path, tensors, metadata), options);
  }

  /**
   * The model of a network's tensors by name: those of a model file, or those of a training session,
   * whose batch-norm over the embedding is folded and whose num_batches_tracked may be absent.
   *
   * @throws HardmineError as load() does, but for ERR_IO.
   */
  static async fromTensors(
    tensors: TensorMap,
    info: ModelInfo = {},
    options: ModelOptions = {},
  ): Promise<FaceModel> {
    return FaceModel.#create('The network', modelTensors(tensors), info, options);
  }

  static async #create(
    name: string,
    tensors: TensorMap,
    info: ModelInfo,
    { device = 'auto', precision = 'fp32', threads = 0 }: ModelOptions,
  ): Promise<FaceModel> {
    const { addon, execution } = chooseDevice({ device, precision, threads });
    const network = networkOf(name, tensors);
    const nodes = addon.describeNetwork(network);
    checkTensors(name, tensors, nodes);
    const embedder = await createEmbedder(addon, execution, network.embedding, tensors);
    return new FaceModel({ addon, execution, nodes, tensors, info, embedder });
  }

  /**
   * Raw embeddings, row after row [N, embedding], by running statistics. A score of two images is the
   * cosine of embedding plus mirror image's embedding, as embedForPairs() gives them; `info.threshold`
   * was found on such scores.
   *
   * @param images RGB bytes [N, 112, 112, 3], of which pixels are (x - 127.5) / 128 to the network, or
   *   paths of 112x112 JPEG or PNG files, read as they are needed. Without images, an empty array.
   * @throws HardmineError ERR_INPUT for bytes that are no whole images; ERR_IO or ERR_DATA naming the
   *   file that cannot be read or is no image of 112x112; ERR_ABORTED after `signal`, ERR_DISPOSED.
   */
  async embed(
    images: Uint8Array | readonly string[],
    { mirror = false, signal }: EmbedOptions = {},
  ): Promise<Float32Array> {
    const embedder = this.#open();
    const total = Array.isArray(images) ? images.length : wholeImages(images);
    const read = async (from: number): Promise<Uint8Array> =>
      images instanceof Uint8Array
        ? images.subarray(from * PIXEL_BYTES, (from + CHUNK) * PIXEL_BYTES)
        : decodeImages(images.slice(from, from + CHUNK));
    const embeddings = new Float32Array(total * this.embedding);
    for (let from = 0; from < total; from += CHUNK) {
      throwIfAborted(signal, 'embedding');
      embeddings.set(await embedder.embed(await read(from), mirror), from * this.embedding);
    }
    return embeddings;
  }

  /**
   * Cosine of the angle between two embeddings, -1 to 1: a.b / (|a| |b|). Compare it with
   * `info.threshold`. An embedding of zeros is at right angles to all: 0.
   *
   * @param a [embedding]
   * @param b [embedding]
   * @throws HardmineError ERR_INPUT for another length, ERR_NON_FINITE for NaN or infinity, ERR_DISPOSED.
   */
  similarity(a: Float32Array, b: Float32Array): number {
    this.#open();
    for (const embedding of [a, b]) {
      if (!(embedding instanceof Float32Array) || embedding.length !== this.embedding) {
        const found =
          embedding instanceof Float32Array ? `${embedding.length} values` : 'no Float32Array';
        throw new HardmineError(
          'ERR_INPUT',
          `An embedding has ${found} where this model's have ${this.embedding}: give one row of what embed() returned.`,
        );
      }
      const wrong = embedding.findIndex((value) => !Number.isFinite(value));
      if (wrong < 0) continue;
      throw new HardmineError(
        'ERR_NON_FINITE',
        `An embedding has ${embedding[wrong]} as its element ${wrong} where finite numbers are expected: the model's weights are damaged or its training diverged.`,
      );
    }
    return cosine(a, b);
  }

  /**
   * Writes the model as safetensors, whole or not at all, for FaceModel.load and PyTorch's strict
   * load_state_dict; `info` goes into the file's metadata.
   *
   * @throws HardmineError ERR_IO when writing fails, ERR_DISPOSED.
   */
  async save(path: string): Promise<void> {
    this.#open();
    await writeModel(path, this.#tensors, this.info);
  }

  /**
   * Writes the model as ONNX, opset 17: input 'input', float [N, 3, 112, 112] of RGB as
   * (x - 127.5) / 128, output 'embedding', float [N, embedding], batch-norm folded.
   *
   * @throws HardmineError ERR_IO when writing fails, ERR_DISPOSED.
   */
  async exportOnnx(path: string): Promise<void> {
    this.#open();
    const metadata = modelMetadata(this.embedding, this.info);
    await writeFileAtomic(path, [encodeOnnx(this.#nodes, this.#tensors, metadata)]);
  }

  /**
   * Runs an ONNX file in ONNX Runtime beside our own fp32 inference.
   *
   * @param path what exportOnnx wrote.
   * @param images RGB bytes [N, 112, 112, 3]; 64 generated ones by default.
   * @throws HardmineError ERR_INPUT for no images or bytes that are no whole ones, ERR_ADDON when
   *   onnxruntime-node is not installed, ERR_FORMAT when it refuses the file, ERR_DISPOSED.
   */
  async checkOnnx(
    path: string,
    images: Uint8Array = patternImages(ONNX_CHECK_IMAGES),
  ): Promise<OnnxCheck> {
    this.#open();
    if (wholeImages(images) === 0) {
      throw new HardmineError('ERR_INPUT', 'There are no images to compare: give at least one.');
    }
    const theirs = await runOnnx(path, images);
    const exact = await createEmbedder(
      this.#addon,
      { ...this.#execution, precision: 'fp32' },
      this.embedding,
      this.#tensors,
    );
    let ours: Float32Array;
    try {
      ours = await exact.embed(images, false);
    } finally {
      await exact.dispose();
    }
    if (theirs.length !== ours.length) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${path} gives ${theirs.length} values for ${images.length / PIXEL_BYTES} images where this model gives ${ours.length}: export it from this model.`,
      );
    }
    let maxAbsDifference = 0;
    let minCosine = 1;
    // Running statistics of a few steps make embeddings of thousands, and fp32 rounds by shares.
    let greatest = 1;
    for (let row = 0; row < ours.length; row += this.embedding) {
      const a = ours.subarray(row, row + this.embedding);
      const b = theirs.subarray(row, row + this.embedding);
      for (const [i, value] of a.entries()) {
        maxAbsDifference = Math.max(maxAbsDifference, Math.abs(value - b[i]!));
        greatest = Math.max(greatest, Math.abs(value));
      }
      minCosine = Math.min(minCosine, cosine(a, b));
    }
    return {
      images: ours.length / this.embedding,
      maxAbsDifference,
      minCosine,
      passed: maxAbsDifference <= ONNX_MAX_DIFFERENCE * greatest && minCosine >= ONNX_MIN_COSINE,
    };
  }

  /** Frees the network's memory; may be called twice. */
  async dispose(): Promise<void> {
    this.#disposed = true;
    await this.#embedder.dispose();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  #open(): NativeEmbedder {
    if (this.#disposed) {
      throw new HardmineError('ERR_DISPOSED', 'This FaceModel was disposed: load the model again.');
    }
    return this.#embedder;
  }
}

/**
 * Writes a network's tensors (as FaceModel.fromTensors takes them) as a model file.
 *
 * @throws HardmineError ERR_IO when writing fails.
 */
export async function writeModel(path: string, tensors: TensorMap, info: ModelInfo): Promise<void> {
  const complete = modelTensors(tensors);
  const { embedding } = networkOf('The network', complete);
  await writeSafetensors(path, complete, modelMetadata(embedding, info));
}

/**
 * Folds the batch-norm over the embedding, whose scale is 1, into the linear layer:
 * (W x + b - mean) / sqrt(var + eps) + beta, reckoned in double. Maps without `embedding_bn.` tensors
 * are returned as they are.
 */
export function foldEmbeddingNorm(tensors: TensorMap): TensorMap {
  const prefix = 'embedding_bn.';
  const values = (name: string) => {
    const tensor = tensors.get(name);
    if (tensor?.dtype !== 'F32') throw incomplete('The network', name);
    return tensor;
  };
  const folded: TensorMap = new Map([...tensors].filter(([name]) => !name.startsWith(prefix)));
  if (folded.size === tensors.size) return tensors;
  const weight = values('fc.weight');
  const bias = values('fc.bias');
  const beta = values(`${prefix}bias`).data;
  const mean = values(`${prefix}running_mean`).data;
  const variance = values(`${prefix}running_var`).data;
  const newWeight = weight.data.slice();
  const newBias = bias.data.slice();
  const columns = newWeight.length / newBias.length;
  for (const [row, value] of bias.data.entries()) {
    const factor = 1 / Math.sqrt(variance[row]! + BATCH_NORM_EPSILON);
    newBias[row] = (value - mean[row]!) * factor + beta[row]!;
    for (let i = row * columns; i < (row + 1) * columns; i++) newWeight[i]! *= factor;
  }
  folded.set('fc.weight', { ...weight, data: newWeight });
  folded.set('fc.bias', { ...bias, data: newBias });
  return folded;
}

/** Folded, and with the num_batches_tracked that PyTorch's strict load_state_dict asks for. */
function modelTensors(tensors: TensorMap): TensorMap {
  const complete: TensorMap = new Map();
  for (const [name, tensor] of foldEmbeddingNorm(tensors)) {
    complete.set(name, tensor);
    const counter = name.replace(/\.running_var$/, '.num_batches_tracked');
    if (counter !== name && !tensors.has(counter)) {
      // PyTorch reads it only where a batch-norm has no momentum, which none here is.
      complete.set(counter, { dtype: 'I64', shape: [], data: new BigInt64Array(1) });
    }
  }
  return complete;
}

function modelMetadata(
  embedding: number,
  { threshold, configHash }: ModelInfo,
): Map<string, string> {
  const metadata = new Map([
    ['format', 'pt'],
    ...INPUT_METADATA,
    ['embedding_size', `${embedding}`],
  ]);
  if (threshold !== undefined) metadata.set('verification_threshold', String(threshold));
  if (configHash !== undefined) metadata.set('config_hash', configHash);
  return metadata;
}

/** A file from elsewhere says nothing of its input and is taken to want ours. */
function parseMetadata(
  path: string,
  tensors: TensorMap,
  metadata: ReadonlyMap<string, string>,
): ModelInfo {
  const expected = new Map(INPUT_METADATA).set(
    'embedding_size',
    String(tensors.get('fc.weight')?.shape[0]),
  );
  for (const [key, value] of expected) {
    const found = metadata.get(key);
    if (found !== undefined && found !== value) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${path} says that its ${key} is ${JSON.stringify(found)} where hardmine has ${JSON.stringify(value)}: give a model that hardmine trained, or one saved from PyTorch without that entry.`,
      );
    }
  }
  const info: ModelInfo = {};
  const threshold = metadata.get('verification_threshold');
  if (threshold !== undefined) {
    info.threshold = Number(threshold);
    if (threshold.trim() === '' || !(Math.abs(info.threshold) <= 1)) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${path} says that its verification_threshold is ${JSON.stringify(threshold)} where a cosine from -1 to 1 is expected: save the model again.`,
      );
    }
  }
  const configHash = metadata.get('config_hash');
  if (configHash !== undefined) info.configHash = configHash;
  return info;
}

function networkOf(name: string, tensors: TensorMap) {
  const embedding = tensors.get('fc.weight')?.shape[0];
  if (embedding === undefined || embedding < 1) throw incomplete(name, 'fc.weight');
  return { architecture: ARCHITECTURE, embedding, embeddingBatchNorm: false };
}

/** The network's tensors with torchvision's names, in the order of its state_dict. */
function expectedTensors(
  nodes: readonly NativeNode[],
): Map<string, Pick<Tensor, 'dtype' | 'shape'>> {
  const expected = new Map<string, Pick<Tensor, 'dtype' | 'shape'>>();
  for (const { op, name, inChannels, outChannels, kernel } of nodes) {
    const add = (part: string, ...shape: number[]) =>
      expected.set(`${name}.${part}`, { dtype: 'F32', shape });
    if (op === 'convolution') add('weight', outChannels, inChannels, kernel, kernel);
    if (op === 'linear')
      add('weight', outChannels, inChannels).set(`${name}.bias`, {
        dtype: 'F32',
        shape: [outChannels],
      });
    if (op === 'batch_norm') {
      for (const part of ['weight', 'bias', 'running_mean', 'running_var']) add(part, outChannels);
      expected.set(`${name}.num_batches_tracked`, { dtype: 'I64', shape: [] });
    }
  }
  return expected;
}

/** Exactly the network's tensors, of the right shape and type, all finite and no variance negative. */
function checkTensors(name: string, tensors: TensorMap, nodes: readonly NativeNode[]): void {
  const expected = expectedTensors(nodes);
  const described = (tensor: Pick<Tensor, 'dtype' | 'shape'>) =>
    `${tensor.dtype} [${tensor.shape.join(', ')}]`;
  for (const [key, wanted] of expected) {
    const tensor = tensors.get(key);
    if (tensor === undefined) throw incomplete(name, key);
    if (described(tensor) !== described(wanted)) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${name} has the tensor ${key} as ${described(tensor)} where ${described(wanted)} is expected: give a ${ARCHITECTURE} as torchvision has it.`,
      );
    }
    if (tensor.dtype !== 'F32') continue;
    const least = key.endsWith('.running_var') ? 0 : Number.NEGATIVE_INFINITY;
    const wrong = tensor.data.findIndex((value) => !(Number.isFinite(value) && value >= least));
    if (wrong >= 0) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${name} has ${tensor.data[wrong]} in ${key} (element ${wrong}): a network that was trained without fault has finite weights and no negative variance; give an earlier one.`,
      );
    }
  }
  for (const key of tensors.keys()) {
    if (!expected.has(key)) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${name} has the tensor ${key}, which ${ARCHITECTURE} lacks: give a ${ARCHITECTURE} as torchvision has it.`,
      );
    }
  }
}

function incomplete(name: string, tensor: string): HardmineError {
  return new HardmineError(
    'ERR_FORMAT',
    `${name} lacks the tensor ${tensor}: give a ${ARCHITECTURE} as torchvision has it, num_classes being the embedding's size.`,
  );
}

/** How many images there are. */
function wholeImages(images: unknown): number {
  const count = images instanceof Uint8Array ? images.length / PIXEL_BYTES : Number.NaN;
  if (Number.isInteger(count)) return count;
  const found =
    images instanceof Uint8Array
      ? `${images.length} bytes, which is no multiple of ${PIXEL_BYTES}`
      : 'no Uint8Array';
  throw new HardmineError(
    'ERR_INPUT',
    `The images have ${found}: give RGB bytes [N, ${SIDE}, ${SIDE}, 3], or an array of paths to embed().`,
  );
}

async function createEmbedder(
  addon: NativeAddon,
  execution: NativeExecution,
  embedding: number,
  tensors: TensorMap,
): Promise<NativeEmbedder> {
  const embedder = await addon.createEmbedder(
    { architecture: ARCHITECTURE, embedding, embeddingBatchNorm: false },
    execution,
  );
  try {
    for (const [name, tensor] of tensors) {
      if (tensor.dtype === 'F32') await embedder.write(name, tensor.data);
    }
  } catch (error) {
    await embedder.dispose();
    throw error;
  }
  return embedder;
}

async function runOnnx(path: string, images: Uint8Array): Promise<Float32Array> {
  const runtime = await loadOnnxRuntime('The check of an ONNX file');
  try {
    const session = await runtime.InferenceSession.create(path);
    try {
      const input = new runtime.Tensor('float32', normalised(images), [
        images.length / PIXEL_BYTES,
        3,
        SIDE,
        SIDE,
      ]);
      const { embedding } = await session.run({ input }, ['embedding']);
      return (embedding?.data ?? new Float32Array()) as Float32Array;
    } finally {
      await session.release();
    }
  } catch (cause) {
    throw new HardmineError(
      'ERR_FORMAT',
      `${path} was refused by ONNX Runtime (${cause instanceof Error ? cause.message : String(cause)}): export it again.`,
      { cause },
    );
  }
}

/** RGB bytes [N, 112, 112, 3] as (x - 127.5) / 128, [N, 3, 112, 112]. */
function normalised(images: Uint8Array): Float32Array {
  const planes = new Float32Array(images.length);
  const area = SIDE * SIDE;
  for (let i = 0; i < images.length; i++) {
    const pixel = Math.floor(i / 3);
    const image = Math.floor(pixel / area);
    planes[(image * 3 + (i % 3)) * area + (pixel % area)] = (images[i]! - 127.5) / 128;
  }
  return planes;
}

/** Images of waves and noise, different enough for embeddings to differ. */
function patternImages(count: number): Uint8Array {
  const images = new Uint8Array(count * PIXEL_BYTES);
  for (let image = 0; image < count; image++) {
    const random = new RandomStream(0, image);
    const waves = [0, 1, 2].map(() => ({
      x: random.uniform(-0.2, 0.2),
      y: random.uniform(-0.2, 0.2),
      phase: random.uniform(0, 2 * Math.PI),
    }));
    for (let i = 0; i < PIXEL_BYTES; i++) {
      const wave = waves[i % 3]!;
      const pixel = Math.floor(i / 3);
      const angle = wave.x * (pixel % SIDE) + wave.y * Math.floor(pixel / SIDE) + wave.phase;
      images[image * PIXEL_BYTES + i] = 127.5 + 100 * Math.sin(angle) + random.uniform(-25, 25);
    }
  }
  return images;
}

function cosine(a: Float32Array, b: Float32Array): number {
  let dot = 0;
  let squaresA = 0;
  let squaresB = 0;
  for (const [i, x] of a.entries()) {
    const y = b[i]!;
    dot += x * y;
    squaresA += x * x;
    squaresB += y * y;
  }
  const squares = squaresA * squaresB;
  return squares === 0 ? 0 : dot / Math.sqrt(squares);
}
