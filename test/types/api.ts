/**
 * Programs that the compiler must refuse, each line with @ts-expect-error above it, beside right ones. It is
 * compiled with the tests, and never run: an error that no longer comes is an error of its own.
 */
import {
  type BaseLoss,
  type DataSource,
  devices,
  embedForPairs,
  evaluateLfw,
  evaluateYtf,
  FaceModel,
  generateFaces,
  HardmineError,
  MarginHead,
  openDataset,
  type Samples,
  Trainer,
  type TrainerEvent,
  verification,
  type Weighting,
  weightLosses,
} from '../../src/index.js';

export async function heads(): Promise<void> {
  const loss = { base: { kind: 'arcface', scale: 64, margin: 0.5 } } as const;
  const head = await MarginHead.create({ classes: 10, dim: 4, loss, device: 'cuda:1' });
  // @ts-expect-error: no such device
  await MarginHead.create({ classes: 10, dim: 4, loss, device: 'gpu' });
  // @ts-expect-error: no such precision
  await MarginHead.create({ classes: 10, dim: 4, loss, precision: 'fp64' });
  // @ts-expect-error: no such implementation
  await MarginHead.create({ classes: 10, dim: 4, loss, implementation: 'fast' });
  // @ts-expect-error: a number of classes is needed
  await MarginHead.create({ dim: 4, loss });
  // @ts-expect-error: an option is misspelt
  await MarginHead.create({ classes: 10, dim: 4, loss, thread: 2 });
  // @ts-expect-error: made by create()
  new MarginHead();

  const embeddings = new Float32Array(8);
  const labels = Int32Array.of(0, 1);
  const weights = new Float32Array(40);
  const output = await head.forwardBackward({ embeddings, weights, labels });
  const gradient: Float32Array = output.gradWeights;
  // @ts-expect-error: only softmax has one, so it may be absent
  const bias: Float32Array = output.gradBias;
  await head.forwardBackward({ embeddings, labels });
  // @ts-expect-error: a bias belongs to weights
  await head.forwardBackward({ embeddings, labels, bias });
  // @ts-expect-error: doubles
  await head.forwardBackward({ embeddings: new Float64Array(8), weights, labels });
  // @ts-expect-error: labels are Int32Array
  await head.forwardBackward({ embeddings, weights, labels: [0, 1] });
  await head.step(embeddings, labels, { lr: 0.1 });
  // @ts-expect-error: a step needs its learning rate
  await head.step(embeddings, labels, {});
  // @ts-expect-error: read-only
  head.classes = 11;
  void gradient;
}

export function losses(): void {
  const right: BaseLoss[] = [
    { kind: 'softmax' },
    { kind: 'a-softmax', margin: 4, lambda: { start: 1000, decay: 0.12, floor: 5 } },
    { kind: 'combined', m1: 1, m2: 0.3, m3: 0.2 },
    { kind: 'euclidean-margin', margin: 0.4, pull: 0.5 },
    // @ts-expect-error: softmax has no scale
    { kind: 'softmax', scale: 64 },
    // @ts-expect-error: the combined margins have names of their own
    { kind: 'combined', margin: 0.5 },
    // @ts-expect-error: A-Softmax's scale is the embedding's norm
    { kind: 'a-softmax', scale: 64 },
    // @ts-expect-error: only the Euclidean margin pulls
    { kind: 'cosface', pull: 0.5 },
    // @ts-expect-error: no such loss
    { kind: 'sphereface' },
    // @ts-expect-error: a schedule has all three
    { kind: 'a-softmax', lambda: { start: 1000 } },
  ];
  const weightings: Weighting[] = [
    { kind: 'hard-mining', alpha: 1.5, beta: 1.1, A: 35, B: 0.75 },
    { kind: 'knot-magnify', gamma: 2 },
    { kind: 'none' },
    // @ts-expect-error: Knot Magnify has no default
    { kind: 'knot-magnify' },
    // @ts-expect-error: gamma is Knot Magnify's
    { kind: 'hard-mining', gamma: 2 },
    // @ts-expect-error: nothing to set
    { kind: 'none', alpha: 1 },
    // @ts-expect-error: no such form
    { kind: 'hard-mining', form: 'paper' },
  ];
  const { weighted } = weightLosses([0.1, 2] as const, { kind: 'hard-mining' });
  const values: Float64Array = weighted;
  // @ts-expect-error: a weighting is needed
  weightLosses([0.1, 2]);
  // @ts-expect-error: losses are numbers
  weightLosses(['0.1'], { kind: 'hard-mining' });
  void [right, weightings, values];
}

const source: DataSource = {
  name: 'mine',
  images: 100,
  identities: 10,
  async *samples(epoch, from, signal): AsyncGenerator<Samples> {
    const numbers: number[] = [epoch, from];
    const stop: AbortSignal = signal;
    void [numbers, stop];
    yield { images: new Uint8Array(37632), labels: Int32Array.of(0) };
  },
};

export async function training(): Promise<void> {
  const signal = new AbortController().signal;
  const trainer = await Trainer.create({ data: 'faces', out: 'runs/first', lr: 0.05 }, { signal });
  await Trainer.create({ data: source, out: 'runs/first' });
  await Trainer.create({ data: 'faces', out: 'runs/first', weighting: 'none', device: 'cuda:0' });
  const paths = { data: 'faces', out: 'runs/first' };
  // @ts-expect-error: a run needs its directory
  await Trainer.create({ data: 'faces' });
  // @ts-expect-error: a key is misspelt
  await Trainer.create({ ...paths, learningRate: 0.05 });
  // @ts-expect-error: no such device
  await Trainer.create({ ...paths, device: 'gpu' });
  // @ts-expect-error: no such loss
  await Trainer.create({ ...paths, loss: 'triplet' });
  // @ts-expect-error: Knot Magnify has no default
  await Trainer.create({ ...paths, weighting: 'knot-magnify' });
  // @ts-expect-error: gamma is Knot Magnify's
  await Trainer.create({ ...paths, weighting: { kind: 'hard-mining', gamma: 2 } });
  // @ts-expect-error: a source says how many images it has
  await Trainer.create({ ...paths, data: { ...source, images: undefined } });
  const plain = () => [{ images: [0], labels: [0] }];
  // @ts-expect-error: a source gives typed arrays
  await Trainer.create({ ...paths, data: { ...source, samples: plain } });
  // @ts-expect-error: read-only
  trainer.stepsDone = 0;

  for await (const event of trainer.run({ signal })) describe(event);
  await trainer.dispose();
}

function describe(event: TrainerEvent): string {
  switch (event.type) {
    case 'step':
      // @ts-expect-error: of a validation
      return `${event.threshold}`;
    case 'validation':
      return `${event.threshold.toFixed(2)} ${event.best}`;
    case 'checkpoint':
      return event.path;
    case 'evaluation':
      return `${event.result.dataset} ${event.result.accuracy.mean}`;
    case 'skipped':
      return event.reason;
    case 'warning':
      return `${event.kind} ${event.message}`;
    case 'epoch':
      return `${event.accuracy}`;
    // @ts-expect-error: no such event
    case 'batch':
      return '';
    default:
      return event satisfies never;
  }
}

export async function models(): Promise<void> {
  const model = await FaceModel.load('model.safetensors', { device: 'auto', precision: 'fp32' });
  const signal = new AbortController().signal;
  const paths: readonly string[] = ['a.png', 'b.png'];
  const embeddings: Float32Array = await model.embed(paths, { mirror: true, signal });
  await model.embed(new Uint8Array(37632));
  // @ts-expect-error: pixels are bytes
  await model.embed(new Float32Array(37632));
  // @ts-expect-error: a list of paths
  await model.embed('a.png');
  // @ts-expect-error: no such option
  await model.embed(paths, { flip: true });
  const cosine: number = model.similarity(embeddings, embeddings);
  // @ts-expect-error: two embeddings
  model.similarity(embeddings);
  // @ts-expect-error: it may be absent
  const threshold: number = model.info.threshold;
  // @ts-expect-error: read-only
  model.info.threshold = 0.3;
  await model.dispose();

  await embedForPairs(model, { images: paths, signal });
  const { accuracy, dataset } = await evaluateLfw(model, { root: 'lfw', signal });
  const figures: [number, 'lfw' | 'lfw-view1'] = [accuracy.mean, dataset];
  await evaluateYtf(model, { root: 'ytf', aggregate: 'mean', signal });
  // @ts-expect-error: no such aggregate
  await evaluateYtf(model, { root: 'ytf', aggregate: 'median' });
  // @ts-expect-error: no such protocol
  await evaluateLfw(model, { root: 'lfw', protocol: 'lfw' });
  // @ts-expect-error: an object that embeds nothing
  await evaluateLfw({ embedding: 512 }, { root: 'lfw' });
  verification({ distances: [0.1, 3], same: [1, 0], fold: [0, 1] });
  // @ts-expect-error: folds are needed
  verification({ distances: [0.1, 3], same: [1, 0] });
  void [cosine, threshold, figures];
}

export async function data(): Promise<void> {
  const dataset = await openDataset('faces', { signal: new AbortController().signal });
  const damaged: { index: number; reason: string }[] = await dataset.verify();
  // @ts-expect-error: read-only
  dataset.names.push('nobody');
  await generateFaces({ identities: 4, imagesPerIdentity: 2, seed: 1, out: 'faces' });
  // @ts-expect-error: a seed is needed
  await generateFaces({ identities: 4, imagesPerIdentity: 2, out: 'faces' });
  const [device] = devices();
  await FaceModel.load('model.safetensors', { ...(device && { device: device.id }) });
  try {
    await dataset.dispose();
  } catch (error) {
    // @ts-expect-error: no such code
    if (error instanceof HardmineError && error.code === 'ERR_OOPS') throw error;
  }
  void damaged;
}

export async function handles(): Promise<void> {
  await using model = await FaceModel.load('model.safetensors');
  await using dataset = await openDataset('faces');
  await using trainer = await Trainer.create({ data: 'faces', out: 'runs/first' });
  // @ts-expect-error: what ends asynchronously needs `await using`
  using unawaited = await FaceModel.load('model.safetensors');
  void [model, dataset, trainer, unawaited];
}
