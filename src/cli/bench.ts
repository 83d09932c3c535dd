import { mkdtemp, rm } from 'node:fs/promises';
import { availableParallelism, tmpdir } from 'node:os';
import { join } from 'node:path';
import { Command, InvalidArgumentError, Option } from 'commander';
import sharp from 'sharp';
import { openDataset } from '../data/dataset.js';
import { RandomStream } from '../data/random.js';
import { RecordWriter } from '../formats/recordio.js';
import { resolveLoss } from '../loss.js';
import {
  chooseDevice,
  type NativeBatches,
  type NativeExecution,
  type NativeRecords,
  type NativeStepSettings,
  type Precision,
} from '../native.js';
import { type CommonOptions, makeCommand, output, table, wholeNumber } from './command.js';

/** The paper's loss. */
const LOSS = resolveLoss({
  base: { kind: 'arcface', scale: 64, margin: 0.5 },
  weighting: { kind: 'hard-mining' },
}).native;
const STEP: NativeStepSettings = {
  lr: 0.01,
  momentum: 0.9,
  weightDecay: 5e-4,
  decayAll: false,
  marginFactor: 1,
  lambda: 0,
};
/** CASIA-WebFace's identities, as the paper trains on. */
const CLASSES = 10_575;
const EMBEDDING = 512;
/** Untimed runs: the first ones make and warm what the later ones use. */
const WARM_UP = 2;
/** More of them on a GPU, whose clocks rise from a fifth of their height only under load. */
const GPU_WARM_UP_MS = 300;
const IMAGES = 512;
/** Of a timed run on a GPU: some 30 ms of an H100's time. */
const IMAGES_ON_GPU = 2048;

interface Options extends CommonOptions {
  device: string;
  precision?: Precision;
  threads: number;
  repeats: number;
  deterministic?: boolean;
}

interface Spread {
  median: number;
  min: number;
  max: number;
}

export function benchCommand(): Command {
  const command = new Command('bench')
    .description('Measure: the margin head, the whole training step, or the input pipeline.')
    .addHelpText('after', '\nExample:\n  $ hardmine bench step --precision bf16 --threads 2');
  const head = makeCommand(
    'head',
    'Forward and backward of the margin head (HM-ArcFace), fused against unfused, beside its bare matrix products.',
    'hardmine bench head --shapes 64x512x10575 --precision fp32',
  )
    .option('--shapes <list>', 'batch x dim x classes, comma-separated', parseShapes, [
      { batch: 64, dim: 512, classes: CLASSES },
      { batch: 512, dim: 512, classes: 85_742 },
    ])
    .option('--batch <number>', 'rows instead of those of the shapes', wholeNumber(1))
    .action(benchHead);
  const step = makeCommand(
    'step',
    'The whole training step: decoding, ResNet18, HM-ArcFace, SGD.',
    'hardmine bench step --data packed/train.rec --batch 64 --precision bf16',
  )
    .option('--data <path>', 'images of a data set (default: noise)')
    .option('--batch <number>', 'images a step', wholeNumber(2), 64)
    .option('--classes <number>', 'classes of the head', wholeNumber(2), CLASSES)
    .option('--deterministic', 'the same bits each time, as train has it')
    .action(benchStep);
  const data = makeCommand(
    'data',
    'The input pipeline alone: read, decode, batch.',
    'hardmine bench data --data packed/train.rec --threads 1',
  )
    .option('--data <path>', 'images of a data set (default: noise)')
    .option('--batch <number>', 'images a batch', wholeNumber(1), 64)
    .action(benchData);
  for (const one of [head, step, data]) {
    one
      .option('--device <name>', 'auto, cpu, cuda or cuda:N', 'auto')
      .addOption(
        new Option('--precision <type>', "number type (default: the device's fastest)").choices([
          'fp32',
          'bf16',
          'fp16',
        ]),
      )
      .option('--threads <number>', 'CPU threads (0: physical cores)', wholeNumber(0), 0)
      .option('--repeats <number>', 'timed runs', wholeNumber(1), 7);
    command.addCommand(one);
  }
  return command;
}

interface Shape {
  batch: number;
  dim: number;
  classes: number;
}

function parseShapes(text: string): Shape[] {
  return text.split(',').map((shape) => {
    const match = /^([1-9]\d{0,8})x([1-9]\d{0,5})x([1-9]\d{0,8})$/.exec(shape.trim());
    if (match === null) {
      throw new InvalidArgumentError('Give batch x dim x classes, for instance 64x512x10575.');
    }
    const [batch, dim, classes] = match.slice(1).map(Number) as [number, number, number];
    return { batch, dim, classes };
  });
}

function spread(values: ArrayLike<number>): Spread {
  const sorted = Array.from(values).sort((a, b) => a - b);
  return {
    median: sorted[sorted.length >> 1]!,
    min: sorted[0]!,
    max: sorted.at(-1)!,
  };
}

function deviceFor({ device, precision, threads, deterministic = false }: Options) {
  const chosen = chooseDevice({
    device,
    threads,
    deterministic,
    ...(precision && { precision }),
  });
  const { name, threads: cores } = chosen.device;
  return { ...chosen, name, threads: chosen.execution.threads || cores };
}

const show = ({ median, min, max }: Spread): string =>
  `${median.toFixed(2)} (${min.toFixed(2)}-${max.toFixed(2)})`;

/** The same numbers again and again: half a billion draws would take longer than what is timed. */
function classWeights(count: number): Float32Array {
  const random = new RandomStream(1, 0);
  const drawn = Float32Array.from({ length: Math.min(count, 2 ** 20) }, () =>
    random.uniform(-0.01, 0.01),
  );
  const weights = new Float32Array(count);
  for (let at = 0; at < count; at += drawn.length) {
    weights.set(drawn.subarray(0, Math.min(drawn.length, count - at)), at);
  }
  return weights;
}

async function benchHead(options: Options & { shapes: Shape[]; batch?: number }): Promise<void> {
  const { addon, execution, name, threads } = deviceFor(options);
  const results = [];
  for (const shape of options.shapes) {
    const { dim, classes } = shape;
    const batch = options.batch ?? shape.batch;
    for (const implementation of ['fused', 'unfused'] as const) {
      output.note(`${implementation} ${batch}x${dim}x${classes}`);
      const head = await addon.createHead({ classes, dim, loss: LOSS, implementation }, execution);
      try {
        await head.setWeights(classWeights(classes * dim), null);
        const time = async (what: 'forwardBackward' | 'step' | 'products'): Promise<Spread> => {
          const warmMs = performance.now() + (addon.backend === 'cuda' ? GPU_WARM_UP_MS : 0);
          do {
            await head.time(what, batch, WARM_UP);
          } while (performance.now() < warmMs);
          return spread(await head.time(what, batch, options.repeats));
        };
        results.push({
          implementation,
          precision: execution.precision,
          batch,
          dim,
          classes,
          threads,
          forwardBackwardMs: await time('forwardBackward'),
          stepMs: await time('step'),
          productsMs: await time('products'),
          peakExtraBytes: await head.peakExtraBytes(),
        });
      } finally {
        await head.dispose();
      }
    }
  }
  if (options.json) {
    output.json({ device: name, results });
    return;
  }
  output.result(
    table([
      ['head', 'shape', 'forward+backward ms', 'step ms', 'products ms', 'extra MiB'],
      ...results.map((row) => [
        `${row.implementation} ${row.precision}`,
        `${row.batch}x${row.dim}x${row.classes}`,
        show(row.forwardBackwardMs),
        show(row.stepMs),
        show(row.productsMs),
        (row.peakExtraBytes / 2 ** 20).toFixed(1),
      ]),
    ]),
  );
}

interface DataBench extends Options {
  data?: string;
  batch: number;
}

async function benchStep(options: DataBench & { classes: number }): Promise<void> {
  const { addon, execution, name, threads } = deviceFor(options);
  const { batch, classes, repeats } = options;
  const result = await withImages(options, async (records) => {
    const session = await addon.createSession(
      {
        network: { architecture: 'resnet18', embedding: EMBEDDING, embeddingBatchNorm: true },
        classes,
        loss: LOSS,
        implementation: 'fused',
        batch,
        seed: 1,
      },
      execution,
    );
    const onCpu = addon.backend === 'cpu';
    const batches = await makeBatches(records, batch, classes, {
      decodeThreads: onCpu ? 1 : Math.min(16, availableParallelism()),
      execution: onCpu ? null : execution,
    });
    // On a GPU as in training, where nothing waits between the steps of a run.
    const steps = new Array(onCpu ? 1 : Math.max(4, Math.ceil(IMAGES_ON_GPU / batch))).fill(STEP);
    try {
      await session.train(batches, new Array(WARM_UP).fill(STEP));
      const warmMs = performance.now() + (onCpu ? 0 : GPU_WARM_UP_MS);
      while (performance.now() < warmMs) await session.train(batches, steps);
      const speeds: number[] = [];
      for (let i = 0; i < repeats; i++) {
        const startMs = performance.now();
        await session.train(batches, steps);
        speeds.push((1000 * batch * steps.length) / (performance.now() - startMs));
      }
      return {
        precision: execution.precision,
        batch,
        classes,
        threads,
        deterministic: execution.deterministic,
        imagesPerSecond: spread(speeds),
        waitedForDataMs: batches.waitedMs(),
      };
    } finally {
      await session.dispose();
      await batches.dispose();
    }
  });
  if (options.json) {
    output.json({ device: name, results: [result] });
    return;
  }
  output.result(
    table([
      ['step', 'batch', 'classes', 'threads', 'images/s', 'waited for data ms'],
      [
        result.precision,
        String(batch),
        String(classes),
        String(threads),
        show(result.imagesPerSecond),
        result.waitedForDataMs.toFixed(1),
      ],
    ]),
  );
}

async function benchData(options: DataBench): Promise<void> {
  const { name } = deviceFor(options);
  const threads = options.threads || 1;
  const { batch, repeats } = options;
  const perRun = Math.max(1, Math.ceil(IMAGES / batch));
  const imagesPerSecond = await withImages(options, async (records) => {
    const batches = await makeBatches(records, batch, 2, {
      decodeThreads: threads,
      execution: null,
    });
    try {
      await batches.drain(perRun);
      const speeds: number[] = [];
      for (let i = 0; i < repeats; i++) {
        speeds.push((1000 * perRun * batch) / (await batches.drain(perRun)));
      }
      return spread(speeds);
    } finally {
      await batches.dispose();
    }
  });
  if (options.json) {
    output.json({ device: name, results: [{ batch, threads, imagesPerSecond }] });
    return;
  }
  output.result(
    table([
      ['input', 'batch', 'threads', 'images/s'],
      [options.data ?? 'noise', String(batch), String(threads), show(imagesPerSecond)],
    ]),
  );
}

/** Images of the records in turn, as many as a batch needs, with labels of all classes. */
function makeBatches(
  records: NativeRecords,
  batch: number,
  classes: number,
  by: { decodeThreads: number; execution: NativeExecution | null },
): Promise<NativeBatches> {
  const random = new RandomStream(1, 0);
  const count = Math.max(records.images, batch);
  return records.batches({
    images: Int32Array.from({ length: count }, (_, i) => i % records.images),
    labels: Int32Array.from({ length: count }, () => Math.floor(random.uniform(0, classes))),
    batch,
    seed: 1,
    mirror: true,
    crop: 0,
    ...by,
    skip: null,
  });
}

/** Opens the data set given, or one of smooth noise made for the occasion. */
async function withImages<T>(
  { data }: { data?: string },
  use: (records: NativeRecords) => Promise<T>,
): Promise<T> {
  const folder = data === undefined ? await mkdtemp(join(tmpdir(), 'hardmine-bench-')) : null;
  try {
    const path = data ?? (await writeNoise(join(folder!, 'train')));
    const dataset = await openDataset(path);
    try {
      return await use(dataset.records);
    } finally {
      await dataset.dispose();
    }
  } finally {
    if (folder !== null) await rm(folder, { recursive: true, force: true });
  }
}

/** Noise enlarged eight times: about as many bytes as a JPEG of a face. */
async function writeNoise(prefix: string): Promise<string> {
  const side = 14;
  const random = new RandomStream(1, 1);
  const writer = await RecordWriter.create(prefix);
  try {
    for (let i = 0; i < IMAGES; i++) {
      const noise = Uint8Array.from({ length: side * side * 3 }, () => random.uniform(0, 256));
      const image = await sharp(noise, { raw: { width: side, height: side, channels: 3 } })
        .resize(112, 112)
        .jpeg({ quality: 95 })
        .toBuffer();
      await writer.add(Math.floor((2 * i) / IMAGES), image);
    }
    return (await writer.finish(['0', '1'])).rec;
  } catch (error) {
    await writer.abort();
    throw error;
  }
}
