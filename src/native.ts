/**
 * The typed contract of the native addons, and the loader that picks one.
 *
 * Calls that return a promise never throw, they reject; the others throw. Both give HardmineError:
 * ERR_INPUT for an argument of the wrong type, length or range, ERR_DISPOSED after dispose(),
 * ERR_DEVICE_OOM when memory runs out. Typed arrays passed in are copied before the call returns, so
 * the caller may change or transfer them at once; those handed out belong to the caller. Calls on one
 * handle run in the order in which they were made, each handle on a native thread of its own. Pending
 * calls keep the process alive, handles do not.
 */
import { constants } from 'node:os';
import {
  type Backend,
  CUDA_ADDON_REMEDY,
  checkVersion,
  explainFailure,
  findAddon,
  hasNvidiaDriver,
} from './addon-file.js';
import { HardmineError } from './errors.js';

export type Precision = 'fp32' | 'bf16' | 'fp16';
export type Implementation = 'fused' | 'unfused';
/** 'auto': the first CUDA device where there is one, else the CPU; N of 'cuda:N' counts from 0. */
export type DeviceName = 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;

/** core/loss.h's LossSpec. */
export interface NativeLoss {
  base: 'softmax' | 'margin' | 'euclidean-margin';
  m1: number;
  m2: number;
  m3: number;
  scale: number;
  normScale: boolean;
  lambda: number;
  mirror: boolean;
  detached: boolean;
  /** Of 'euclidean-margin'. */
  euclidean: { margin: number; pull: number };
  weighting: NativeWeighting;
  /** A weight of 0: none. */
  center: { weight: number; rate: number };
}

export interface NativeWeighting {
  kind: 'none' | 'hard-mining' | 'knot-magnify';
  alpha: number;
  beta: number;
  A: number;
  B: number;
  gamma: number;
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
  role: 'parameter' | 'statistic' | 'optimizer';
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
  /** The row with the highest base loss; `image` is its index in the records, -1 where there are none. */
  hardest: { image: number; baseLoss: number; gradientWeight: number };
}

export interface NativeDevice {
  name: string;
  memoryBytes: number;
  freeBytes: number;
  threads: number;
  precisions: Precision[];
  details: Record<string, string>;
}

/** Native handles: every method fails with ERR_DISPOSED after dispose(), which may be called twice. */
interface NativeHandle {
  /**
   * Stops work under way at the next step, frees the memory, resolves when done. Calls that are still
   * pending reject with ERR_DISPOSED.
   */
  dispose(): Promise<void>;
}

export interface NativeHead extends NativeHandle {
  setWeights(weights: Float32Array, bias: Float32Array | null): Promise<void>;
  readWeights(): Promise<{ weights: Float32Array; bias: Float32Array | null }>;
  /** [classes, dim]; empty without a center loss. */
  setCenters(centers: Float32Array): Promise<void>;
  readCenters(): Promise<Float32Array>;
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
  time(
    what: 'forwardBackward' | 'step' | 'products',
    rows: number,
    repeats: number,
  ): Promise<Float64Array>;
}

export interface NativeSession extends NativeHandle {
  readonly tensors: NativeTensor[];
  /** core/backend.h's engines(). */
  readonly engines: string;
  /**
   * Trains settings.length steps; fewer when cancelled. Rejects with ERR_BUSY while another call uses
   * `batches`; disposing `batches` meanwhile is safe, its memory goes when this call ends.
   */
  train(batches: NativeBatches, settings: NativeStepSettings[]): Promise<NativeStepStats[]>;
  /**
   * Trains one step on a batch of the caller's own, or none when cancelled.
   *
   * @param images [n, 112, 112, 3], n being the session's batch; labels [n].
   * @param augment what a ring draws for the images `first`, `first` + 1, ... of `epoch` (from 1).
   */
  trainOwn(
    images: Uint8Array,
    labels: Int32Array,
    augment: { seed: number; mirror: boolean; crop: number; epoch: number; first: number },
    settings: NativeStepSettings,
  ): Promise<NativeStepStats[]>;
  /** Makes every pending train() and trainOwn() return after the present step with what it has done. */
  cancel(): void;
  /** Steps done by all calls of train() and trainOwn() that have ended, those before an error included. */
  stepsDone(): number;
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
  /** Reads and decodes the images from `from` (0) to before `to` (all); the damaged ones with the reason. */
  verify(from?: number, to?: number): Promise<{ index: number; reason: string }[]>;
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
    /**
     * Leave out damaged images, at most `most` with those `known` already, and take the next sound one
     * of the epoch's order instead; null: the first one is an error.
     */
    skip: { most: number; known: Int32Array } | null;
  }): Promise<NativeBatches>;
}

export interface NativeBatches extends NativeHandle {
  readonly stepsPerEpoch: number;
  seek(epoch: number, step: number): Promise<void>;
  /** Milliseconds that training has waited for this ring so far. */
  waitedMs(): number;
  /** Images left out of the batches taken so far, each once, in order; without those `known` before. */
  skipped(): { index: number; reason: string }[];
  /** Takes n batches and drops them, for `bench data`; milliseconds in all. */
  drain(n: number): Promise<number>;
}

export interface NativeLock extends NativeHandle {
  /** Null; or why nobody is kept out: the file system has no locks. */
  readonly unsupported: string | null;
}

export interface NativeAddon {
  readonly backend: Backend;
  deviceCount(): number;
  device(ordinal: number): NativeDevice;
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
  /**
   * Locks a folder against other processes and other calls of this one, until dispose() or the end of the
   * process; without waiting. `note` is what its `.hardmine.lock` holds meanwhile. ERR_BUSY while it is
   * locked, ERR_IO where that file cannot be made.
   */
  lockFolder(folder: string, note: string): Promise<NativeLock>;
  /** Header of a JPEG: throws ERR_DATA for anything else. */
  readJpegInfo(jpeg: Uint8Array): { width: number; height: number; components: number };
}

/** A device as a user asks for it. */
export interface DeviceRequest {
  /** 'auto', 'cpu', 'cuda' or 'cuda:N'. */
  device: string;
  /** Left out: the device's fastest. */
  precision?: Precision;
  /** 0 or left out: physical cores. */
  threads?: number;
  deterministic?: boolean;
}

export interface ChosenDevice {
  addon: NativeAddon;
  device: NativeDevice;
  execution: NativeExecution;
  /** One sentence for people: which device was taken and why. */
  why: string;
}

const loaded = new Map<Backend, NativeAddon>();

/**
 * The addon of a backend, loaded once per thread.
 *
 * @throws HardmineError ERR_ADDON that names the platform, what was tried, what went wrong and the
 *   command that mends it.
 */
export function loadAddon(backend: Backend): NativeAddon {
  const present = loaded.get(backend);
  if (present !== undefined) return present;
  const found = findAddon(backend);
  const module: { exports: unknown } = { exports: {} };
  // libgomp reads this once, when the addon brings it in. Its default lets a thread that waits for
  // its team spin for milliseconds, which on a machine with other work takes the core from the very
  // thread it waits for. A user's own setting stands.
  if (process.env['OMP_WAIT_POLICY'] === undefined) process.env['GOMP_SPINCOUNT'] ??= '1000';
  try {
    if (found === null) throw new Error('there is no such file');
    if (found.prebuilt !== null) checkVersion(found.prebuilt);
    // RTLD_NOW: a symbol that is missing is found here, not in the middle of training.
    process.dlopen(module, found.path, constants.dlopen.RTLD_NOW);
  } catch (cause) {
    if (cause instanceof HardmineError) throw cause;
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new HardmineError('ERR_ADDON', explainFailure(backend, found, reason), { cause });
  }
  const addon = module.exports as NativeAddon & { setErrorClass(type: unknown): void };
  addon.setErrorClass(HardmineError);
  loaded.set(backend, addon);
  return addon;
}

/**
 * Chooses where to compute: 'auto' takes the first CUDA device where the CUDA addon is built and
 * finds one, else the CPU.
 *
 * @throws HardmineError ERR_CONFIG for a name that is no device, ERR_DEVICE_UNAVAILABLE for one that
 *   is not there, ERR_ADDON when the addon does not load.
 */
export function chooseDevice(request: DeviceRequest): ChosenDevice {
  const { backend, ordinal, why } = resolveDevice(request.device);
  const addon = loadAddon(backend);
  const count = addon.deviceCount();
  if (ordinal >= count) {
    throw new HardmineError(
      'ERR_DEVICE_UNAVAILABLE',
      `Device ${request.device} was asked for but ` +
        (count === 0
          ? `${noGpu()}: use --device cpu.`
          : `${backend} has ${count} device(s): count from 0 to ${count - 1}.`),
    );
  }
  const device = addon.device(ordinal);
  const {
    precision = device.precisions[0] ?? 'fp32',
    threads = 0,
    deterministic = false,
  } = request;
  return { addon, device, execution: { device: ordinal, precision, threads, deterministic }, why };
}

export function devicesOf(addon: NativeAddon): NativeDevice[] {
  return Array.from({ length: addon.deviceCount() }, (_, ordinal) => addon.device(ordinal));
}

/** Why CUDA has no device, where its addon loads. */
function noGpu(): string {
  return hasNvidiaDriver()
    ? 'CUDA found no usable GPU, though the machine has an NVIDIA driver (see nvidia-smi)'
    : 'this machine has no NVIDIA driver';
}

function resolveDevice(name: string): { backend: Backend; ordinal: number; why: string } {
  if (name === 'auto') return chooseAutomatically();
  if (name === 'cpu') return { backend: 'cpu', ordinal: 0, why: 'The CPU was asked for.' };
  const cuda = /^cuda(?::(\d{1,4}))?$/.exec(name);
  if (cuda === null) {
    throw new HardmineError(
      'ERR_CONFIG',
      `Device '${name}' is not known: use auto, cpu, cuda or cuda:N with N counted from 0.`,
    );
  }
  if (findAddon('cuda') === null) {
    throw new HardmineError(
      'ERR_DEVICE_UNAVAILABLE',
      `Device ${name} was asked for but this installation has no CUDA addon: ` +
        `${hasNvidiaDriver() ? CUDA_ADDON_REMEDY : 'the machine has no NVIDIA driver either'}; or use --device cpu.`,
    );
  }
  return { backend: 'cuda', ordinal: Number(cuda[1] ?? 0), why: `Device ${name} was asked for.` };
}

function chooseAutomatically(): { backend: Backend; ordinal: number; why: string } {
  const cpu = (why: string) => ({ backend: 'cpu' as const, ordinal: 0, why });
  if (findAddon('cuda') === null) {
    return cpu(
      hasNvidiaDriver()
        ? `The CPU, because this installation has no CUDA addon, though the machine has an NVIDIA driver: ${CUDA_ADDON_REMEDY}.`
        : `The CPU, because ${noGpu()}.`,
    );
  }
  try {
    const addon = loadAddon('cuda');
    if (addon.deviceCount() === 0) return cpu(`The CPU, because ${noGpu()}.`);
    const device = addon.device(0);
    if (device.precisions.length === 0)
      return cpu(`The CPU, because ${device.name} lacks libraries: ${device.details.missing}`);
    return { backend: 'cuda', ordinal: 0, why: `CUDA found ${device.name}.` };
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    return cpu(`The CPU, because CUDA cannot be used here: ${reason}`);
  }
}

/** The backends of this installation, the preferred one first: the CPU always, CUDA where it is built. */
export function backends(): Backend[] {
  return findAddon('cuda') !== null ? ['cuda', 'cpu'] : ['cpu'];
}
