/** A margin-softmax head on its own, its class weights kept on the device. */
import { HardmineError } from './errors.js';
import { type LambdaAnnealing, type LossSettings, lambdaAt, resolveLoss } from './loss.js';
import {
  chooseDevice,
  type DeviceName,
  type Implementation,
  type NativeHead,
  type Precision,
} from './native.js';

export interface MarginHeadOptions {
  /** Number of classes, at least 2. */
  classes: number;
  /** Length of an embedding, 1 to 65536; classes * dim at most 2^32. */
  dim: number;
  /** Base loss, weighting over it, center loss beside it. */
  loss: LossSettings;
  /** Default 'auto'. */
  device?: DeviceName;
  /** Of the products; losses and softmax are fp32 always. Default 'fp32'. */
  precision?: Precision;
  /** 'fused' (default): in class chunks, never the N x classes matrix whole; 'unfused': the textbook chain. */
  implementation?: Implementation;
  /** CPU threads; default 0: physical cores. */
  threads?: number;
  /** Same device, threads and input: same bits. Default false. */
  deterministic?: boolean;
}

/** Arrays are read, never written or kept; all values must be finite. */
export type HeadInput = {
  /** [N, dim], row after row. */
  readonly embeddings: Float32Array;
  /** [N], 0 to classes - 1. */
  readonly labels: Int32Array;
} & (
  | {
      /** [classes, dim], row after row. They stay on the device. */
      readonly weights: Float32Array;
      /** [classes], for softmax alone; left out: zeros. */
      readonly bias?: Float32Array;
    }
  /** Left out: those on the device. */
  | { readonly weights?: undefined; readonly bias?: undefined }
);

export interface HeadOutput {
  /** Mean of weightedLoss, plus the center loss where there is one; the gradients are its. */
  loss: number;
  /** [N], of each sample before any weighting. */
  baseLoss: Float32Array;
  /** [N], HM or KM of it (see weightLosses); without a weighting the same. */
  weightedLoss: Float32Array;
  /** [N, dim] */
  gradEmbeddings: Float32Array;
  /** [classes, dim] */
  gradWeights: Float32Array;
  /** [classes], softmax alone. */
  gradBias?: Float32Array;
}

export interface HeadStepSettings {
  /** Learning rate, from 0. */
  lr: number;
  /** 0 to 1, default 0.9. */
  momentum?: number;
  /** Of the class weights, from 0, default 5e-4. */
  weightDecay?: number;
}

export interface HeadStep {
  /** Mean weighted loss, and the center loss, before the step. */
  loss: number;
  /** Mean base loss before the step. */
  baseLoss: number;
  /** Share of the rows whose greatest logit before the margin is the label's. */
  accuracy: number;
  /** [N, dim], to go on with into what made the embeddings. */
  gradEmbeddings: Float32Array;
}

/**
 * The class weights of a margin softmax, its loss and its SGD: what comes after a network of your own.
 * Calls run one after the other, off the event loop; arrays given are copied before a call returns. After
 * dispose() every call fails with ERR_DISPOSED, those under way too.
 */
export class MarginHead {
  /** As created. */
  readonly classes: number;
  /** As created. */
  readonly dim: number;
  readonly #native: NativeHead;
  readonly #annealing: LambdaAnnealing;
  readonly #hasBias: boolean;
  readonly #hasCenters: boolean;
  #weightsSet = false;
  #steps = 0;
  #disposed = false;

  private constructor(
    native: NativeHead,
    annealing: LambdaAnnealing,
    { classes, dim, loss }: MarginHeadOptions,
  ) {
    this.#native = native;
    this.#annealing = annealing;
    this.#hasBias = loss.base.kind === 'softmax';
    this.#hasCenters = loss.center !== undefined;
    this.classes = classes;
    this.dim = dim;
  }

  /**
   * Makes a head without class weights: the first call gives them, setWeights() or forwardBackward().
   *
   * @throws HardmineError ERR_CONFIG for the loss or a name that is no device, ERR_INPUT for the sizes,
   *   ERR_DEVICE_UNAVAILABLE for a device that is not there, ERR_DEVICE_OOM for its memory, ERR_ADDON
   *   when its addon does not load.
   */
  static async create(options: MarginHeadOptions): Promise<MarginHead> {
    const { classes, dim, device = 'auto', precision = 'fp32', threads = 0 } = options;
    const { implementation = 'fused', deterministic = false } = options;
    checkSize('classes', classes, 2);
    checkSize('dim', dim, 1);
    if (classes * dim > MAX_ELEMENTS) {
      throw new HardmineError(
        'ERR_INPUT',
        `classes * dim is ${classes * dim}, more than the ${MAX_ELEMENTS} values that a typed array holds.`,
      );
    }
    const { native: loss, annealing } = resolveLoss(options.loss);
    const { addon, execution } = chooseDevice({ device, precision, threads, deterministic });
    const native = await addon.createHead({ classes, dim, loss, implementation }, execution);
    return new MarginHead(native, annealing, options);
  }

  /**
   * Loss and gradients (formulas: BaseLoss, Weighting, CenterLoss); no step is taken. A-Softmax uses the
   * lambda of its first step.
   *
   * @throws HardmineError ERR_INPUT for lengths that do not fit, labels outside the classes, and where no
   *   weights were ever given; ERR_NON_FINITE for NaN or infinity in what was given; ERR_DISPOSED.
   */
  async forwardBackward({ embeddings, weights, bias, labels }: HeadInput): Promise<HeadOutput> {
    this.#checkOpen();
    this.#checkRows(embeddings, labels);
    if (weights === undefined && bias !== undefined) {
      throw new HardmineError('ERR_INPUT', 'bias was given without weights: give both or neither.');
    }
    if (weights === undefined) this.#checkWeightsSet();
    else this.#checkWeights(weights, bias);
    // Both are queued before anything is awaited, so that no other call comes between.
    const set = weights === undefined ? undefined : this.setWeights(weights, bias);
    const run = this.#native.forwardBackward(embeddings, labels);
    const [, { gradBias, ...output }] = await Promise.all([set, run]);
    return gradBias === null ? output : { ...output, gradBias };
  }

  /**
   * @param weights [classes, dim], row after row; NaN and infinity are found by the next pass.
   * @param bias [classes], for softmax alone; left out: zeros.
   * @throws HardmineError ERR_INPUT for lengths that do not fit and a bias that the loss has not,
   *   ERR_DISPOSED.
   */
  async setWeights(weights: Float32Array, bias?: Float32Array): Promise<void> {
    this.#checkOpen();
    this.#checkWeights(weights, bias);
    await this.#native.setWeights(
      weights,
      this.#hasBias ? (bias ?? new Float32Array(this.classes)) : null,
    );
    this.#weightsSet = true;
  }

  /**
   * One step of SGD on the class weights: v = momentum v + (g + weightDecay w), w -= lr v; the bias
   * does not decay. Then the centers of a center loss move. A-Softmax's lambda falls with the steps of
   * this head.
   *
   * @param embeddings [N, dim], row after row.
   * @param labels [N], 0 to classes - 1.
   * @throws HardmineError ERR_INPUT for lengths, labels or settings, and where no weights were ever
   *   given; ERR_NON_FINITE for NaN or infinity, the weights then being as before; ERR_DISPOSED.
   */
  async step(
    embeddings: Float32Array,
    labels: Int32Array,
    { lr, momentum = 0.9, weightDecay = 5e-4 }: HeadStepSettings,
  ): Promise<HeadStep> {
    this.#checkOpen();
    this.#checkRows(embeddings, labels);
    this.#checkWeightsSet();
    checkRange('lr', lr, Number.MAX_VALUE);
    checkRange('momentum', momentum, 1);
    checkRange('weightDecay', weightDecay, Number.MAX_VALUE);
    const lambda = lambdaAt(this.#annealing, this.#steps++);
    const { stats, gradEmbeddings } = await this.#native.step(embeddings, labels, {
      lr,
      momentum,
      weightDecay,
      decayAll: false,
      marginFactor: 1,
      lambda,
    });
    const { loss, baseLoss, rows, correct } = stats;
    return { loss, baseLoss, accuracy: correct / rows, gradEmbeddings };
  }

  /**
   * Copies of the class weights [classes, dim] and, for softmax, the bias [classes].
   *
   * @throws HardmineError ERR_INPUT where no weights were ever given, ERR_DISPOSED.
   */
  async readWeights(): Promise<{ weights: Float32Array; bias?: Float32Array }> {
    this.#checkOpen();
    this.#checkWeightsSet();
    const { weights, bias } = await this.#native.readWeights();
    return bias === null ? { weights } : { weights, bias };
  }

  /**
   * @param centers [classes, dim] of the center loss, row after row; 0 until they are set or moved.
   * @throws HardmineError ERR_INPUT where the loss has none and for another length, ERR_DISPOSED.
   */
  async setCenters(centers: Float32Array): Promise<void> {
    this.#checkOpen();
    this.#checkCenters();
    checkLength('centers', centers, this.classes * this.dim, 'classes * dim');
    await this.#native.setCenters(centers);
  }

  /**
   * A copy of the centers [classes, dim].
   *
   * @throws HardmineError ERR_INPUT where the loss has none, ERR_DISPOSED.
   */
  async readCenters(): Promise<Float32Array> {
    this.#checkOpen();
    this.#checkCenters();
    return this.#native.readCenters();
  }

  /** Frees the memory; may be called twice. */
  async dispose(): Promise<void> {
    this.#disposed = true;
    await this.#native.dispose();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.dispose();
  }

  #checkOpen(): void {
    if (this.#disposed) {
      throw new HardmineError('ERR_DISPOSED', 'This MarginHead was disposed: create a new one.');
    }
  }

  #checkWeights(weights: Float32Array, bias: Float32Array | undefined): void {
    checkLength('weights', weights, this.classes * this.dim, 'classes * dim');
    if (!this.#hasBias && bias !== undefined) {
      throw new HardmineError(
        'ERR_INPUT',
        'bias was given, but only softmax has one: leave it out for a margin loss.',
      );
    }
    if (bias !== undefined) checkLength('bias', bias, this.classes, 'classes');
  }

  #checkCenters(): void {
    if (!this.#hasCenters) {
      throw new HardmineError(
        'ERR_INPUT',
        'This MarginHead has no centers: create it with a center loss, { center: { weight, rate } }.',
      );
    }
  }

  #checkWeightsSet(): void {
    if (!this.#weightsSet) {
      throw new HardmineError(
        'ERR_INPUT',
        'This MarginHead has no class weights yet: give them to setWeights or forwardBackward.',
      );
    }
  }

  #checkRows(embeddings: Float32Array, labels: Int32Array): void {
    if (!(labels instanceof Int32Array) || labels.length === 0) {
      throw new HardmineError('ERR_INPUT', 'labels must be an Int32Array of at least one class.');
    }
    checkLength('embeddings', embeddings, labels.length * this.dim, 'labels.length * dim');
    const wrong = labels.findIndex((label) => label < 0 || label >= this.classes);
    if (wrong >= 0) {
      throw new HardmineError(
        'ERR_INPUT',
        `Label ${wrong} is ${labels[wrong]} where 0 to ${this.classes - 1} is expected: number the classes from 0, or create the head with more.`,
      );
    }
  }
}

/** Of a Float32Array in V8. */
const MAX_ELEMENTS = 2 ** 32;

function checkSize(name: string, value: number, least: number): void {
  if (!Number.isSafeInteger(value) || value < least) {
    throw new HardmineError(
      'ERR_INPUT',
      `${name} is ${value} where a whole number of at least ${least} is expected.`,
    );
  }
}

function checkRange(name: string, value: number, most: number): void {
  if (!(value >= 0 && value <= most)) {
    throw new HardmineError(
      'ERR_INPUT',
      `${name} is ${value} where a finite number from 0${most === Number.MAX_VALUE ? '' : ` to ${most}`} is expected.`,
    );
  }
}

function checkLength(name: string, values: Float32Array, expected: number, formula: string): void {
  if (!(values instanceof Float32Array) || values.length !== expected) {
    const found = values instanceof Float32Array ? `${values.length} values` : 'no Float32Array';
    throw new HardmineError(
      'ERR_INPUT',
      `${name} has ${found} where ${formula} = ${expected} are expected.`,
    );
  }
}
