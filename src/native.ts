/**
 * The typed contract of the native addons, and the loader that picks one and explains every failure.
 * Nothing but this file knows where a .node file lies.
 */

export type Precision = 'fp32' | 'bf16' | 'fp16';
export type Implementation = 'fused' | 'unfused';

/** core/loss.h's LossSpec. */
export interface NativeLoss {
  base: 'softmax' | 'margin';
  m1: number;
  m2: number;
  m3: number;
  scale: number;
  normScale: boolean;
  lambda: number;
  mirror: boolean;
  detached: boolean;
  weighting: NativeWeighting;
}

export interface NativeWeighting {
  kind: 'none' | 'hard-mining';
  alpha: number;
  beta: number;
  A: number;
  B: number;
  form: 'equation' | 'algorithm';
  reduction: 'sample' | 'batch';
}

export interface NativeExecution {
  /** Ordinal among the addon's devices. */
  device: number;
  precision: Precision;
  /** 0: physical cores. */
  threads: number;
  deterministic: boolean;
}

export interface NativeNetwork {
  architecture: string;
  embedding: number;
  embeddingBatchNorm: boolean;
}

/** core/network.h's Node; `input` and `residual` are indices of earlier nodes, -1 the image or none. */
export interface NativeNode {
  op: 'convolution' | 'batch_norm' | 'max_pool' | 'global_average_pool' | 'linear';
  name: string;
  input: number;
  residual: number;
  inChannels: number;
  outChannels: number;
  inSize: number;
  outSize: number;
  kernel: number;
  stride: number;
  padding: number;
  activation: 'none' | 'relu';
  fixedScale: boolean;
}

export interface NativeTensor {
  name: string;
  shape: number[];
  role: 'parameter' | 'statistic' | 'momentum';
}

export interface NativeStepSettings {
  lr: number;
  momentum: number;
  weightDecay: number;
  decayAll: boolean;
  marginFactor: number;
  lambda: number;
}

/** core/backend.h's StepStats: counts over `rows` rows. */
export interface NativeStepStats {
  loss: number;
  baseLoss: number;
  rows: number;
  correct: number;
  silenced: number;
  kept: number;
  amplified: number;
  meanCosine: number;
  embeddingNorm: number;
}

export interface NativeDevice {
  name: string;
  memoryBytes: number;
  freeBytes: number;
  threads: number;
  precisions: Precision[];
  details: Record<string, string>;
}

/** Native handles: every method rejects with ERR_DISPOSED after dispose(), which may be called twice. */
interface NativeHandle {
  /** Stops work under way at the next step, frees the memory, resolves when done. */
  dispose(): Promise<void>;
}

export interface NativeHead extends NativeHandle {
  setWeights(weights: Float32Array, bias: Float32Array | null): Promise<void>;
  readWeights(): Promise<{ weights: Float32Array; bias: Float32Array | null }>;
  forwardBackward(
    embeddings: Float32Array,
    labels: Int32Array,
  ): Promise<{
    loss: number;
    baseLoss: Float32Array;
    weightedLoss: Float32Array;
    gradEmbeddings: Float32Array;
    gradWeights: Float32Array;
    gradBias: Float32Array | null;
  }>;
  step(
    embeddings: Float32Array,
    labels: Int32Array,
    settings: NativeStepSettings,
  ): Promise<{ stats: NativeStepStats; gradEmbeddings: Float32Array }>;
  peakExtraBytes(): Promise<number>;
  /** Runs one of 'forwardBackward' | 'step' | 'products' `repeats` times on fixed buffers of `rows` rows; milliseconds each. */
  time(what: 'forwardBackward' | 'step' | 'products', rows: number, repeats: number): Promise<Float64Array>;
}

export interface NativeSession extends NativeHandle {
  readonly tensors: NativeTensor[];
  /** Trains settings.length steps; fewer when cancelled. */
  train(batches: NativeBatches, settings: NativeStepSettings[]): Promise<NativeStepStats[]>;
  /** Makes a train() under way return after the present step. */
  cancel(): void;
  embed(images: Uint8Array, mirror: boolean): Promise<Float32Array>;
  read(name: string): Promise<Float32Array>;
  write(name: string, values: Float32Array): Promise<void>;
}

export interface NativeEmbedder extends NativeHandle {
  readonly tensors: NativeTensor[];
  embed(images: Uint8Array, mirror: boolean): Promise<Float32Array>;
  read(name: string): Promise<Float32Array>;
  write(name: string, values: Float32Array): Promise<void>;
}

export interface NativeRecords extends NativeHandle {
  readonly images: number;
  readonly labels: Int32Array;
  readonly offsets: Float64Array;
  readonly keys: Float64Array;
  readonly bytes: number;
  /** The encoded image. */
  jpeg(index: number): Promise<Uint8Array>;
  /** Decoded images [n, 112, 112, 3]. */
  decode(indices: Int32Array | Uint32Array): Promise<Uint8Array>;
  /** Reads and decodes every image; the damaged ones with the reason. */
  verify(): Promise<{ index: number; reason: string }[]>;
  batches(options: {
    images: Int32Array;
    labels: Int32Array;
    batch: number;
    seed: number;
    mirror: boolean;
    crop: number;
    decodeThreads: number;
    /** Whose page-locked memory the ring uses; null: plain memory. */
    execution: NativeExecution | null;
  }): Promise<NativeBatches>;
}

export interface NativeBatches extends NativeHandle {
  readonly stepsPerEpoch: number;
  seek(epoch: number, step: number): Promise<void>;
  /** Milliseconds that training has waited for this ring so far. */
  waitedMs(): number;
  /** Takes n batches and drops them, for `bench data`; milliseconds in all. */
  drain(n: number): Promise<number>;
}

export interface NativeAddon {
  readonly backend: 'cpu' | 'cuda';
  devices(): NativeDevice[];
  describeNetwork(network: NativeNetwork): NativeNode[];
  weightLosses(
    losses: Float64Array,
    weighting: NativeWeighting,
  ): { weighted: Float64Array; gradientWeight: Float64Array };
  createHead(
    spec: { classes: number; dim: number; loss: NativeLoss; implementation: Implementation },
    execution: NativeExecution,
  ): Promise<NativeHead>;
  createSession(
    spec: {
      network: NativeNetwork;
      classes: number;
      loss: NativeLoss;
      implementation: Implementation;
      batch: number;
      seed: number;
    },
    execution: NativeExecution,
  ): Promise<NativeSession>;
  createEmbedder(network: NativeNetwork, execution: NativeExecution): Promise<NativeEmbedder>;
  openRecords(recPath: string, idxPath: string): Promise<NativeRecords>;
  /** Header of a JPEG: throws ERR_DATA for anything else. */
  readJpegInfo(jpeg: Uint8Array): { width: number; height: number; components: number };
}
