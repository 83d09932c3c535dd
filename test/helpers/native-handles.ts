/**
 * The raw binding in tests: small specifications, and every kind of native handle with a call of each of
 * its methods.
 */
import assert from 'node:assert/strict';
import { mkdtempSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { HardmineError } from '../../src/errors.js';
import type {
  NativeAddon,
  NativeBatches,
  NativeExecution,
  NativeLoss,
  NativeRecords,
} from '../../src/native.js';

export const ADDON = fileURLToPath(
  new URL('../../build/Release/hardmine_cpu.node', import.meta.url),
);

export const EXECUTION: NativeExecution = {
  device: 0,
  precision: 'fp32',
  threads: 1,
  deterministic: false,
};
export const LOSS: NativeLoss = {
  base: 'margin',
  m1: 1,
  m2: 0.5,
  m3: 0,
  scale: 64,
  normScale: false,
  lambda: 0,
  mirror: true,
  detached: false,
  weighting: {
    kind: 'none',
    alpha: 1.5,
    beta: 1.1,
    A: 35,
    B: 0.75,
    gamma: 0,
    form: 'equation',
    reduction: 'sample',
  },
  euclidean: { margin: 0, pull: 0 },
  center: { weight: 0, rate: 0 },
};
export const NETWORK = { architecture: 'resnet18', embedding: 32, embeddingBatchNorm: true };
export const CLASSES = 5;
export const DIM = 8;
export const HEAD = { classes: CLASSES, dim: DIM, loss: LOSS, implementation: 'fused' } as const;
export const BATCH = 2;
export const SESSION = {
  network: NETWORK,
  classes: CLASSES,
  loss: LOSS,
  implementation: 'fused',
  batch: BATCH,
  seed: 1,
} as const;
export const STEP = {
  lr: 0.01,
  momentum: 0.9,
  weightDecay: 0,
  decayAll: false,
  marginFactor: 1,
  lambda: 0,
};
export const IMAGE_BYTES = 112 * 112 * 3;

export const ramp = (length: number): Float32Array =>
  Float32Array.from({ length }, (_, i) => Math.sin(i + 1));
export const rows = (count: number): [Float32Array, Int32Array] => [
  ramp(count * DIM),
  Int32Array.from({ length: count }, (_, i) => i % CLASSES),
];

/** The raw binding, for calls that its types forbid. */
export type Loose = Record<string, (...args: unknown[]) => unknown>;
export const loose = (handle: object): Loose => handle as Loose;

/** What a call does, whether it throws or rejects. */
export async function outcome(call: () => unknown): Promise<unknown> {
  try {
    return await call();
  } catch (error) {
    assert.ok(error instanceof HardmineError, `not a HardmineError: ${String(error)}`);
    return error;
  }
}

export async function fails(call: () => unknown, code: string, message: RegExp): Promise<void> {
  const error = await outcome(call);
  assert.ok(error instanceof HardmineError, 'nothing was thrown');
  assert.equal(error.code, code, error.message);
  assert.match(error.message, message);
}

export const RING = {
  batch: BATCH,
  seed: 1,
  mirror: true,
  crop: 2,
  decodeThreads: 1,
  execution: null,
  skip: null,
} satisfies Omit<Parameters<NativeRecords['batches']>[0], 'images' | 'labels'>;
/** A ring over all images of a record file, as training takes them. */
export const openBatches = (records: NativeRecords): Promise<NativeBatches> =>
  records.batches({
    images: Int32Array.from(records.labels.keys()),
    labels: records.labels,
    ...RING,
  });

export interface Disposable {
  dispose(): Promise<void>;
}

export interface HandleKind {
  /** A handle ready for all of `calls`, and the handles that those need. */
  make(): Promise<{ handle: Disposable; also: Disposable[] }>;
  /** Of every method but dispose(), arguments that it takes. */
  calls: Record<string, (also: object[]) => unknown[]>;
}

/** Every kind of handle, over a record file of packColours(). */
export function handleKinds(
  addon: NativeAddon,
  { rec, idx }: { rec: string; idx: string },
): Record<string, HandleKind> {
  const [x, y] = rows(2);
  const image = new Uint8Array(IMAGE_BYTES);
  const tensor = 'conv1.weight';
  const alone = async (handle: Promise<Disposable>) => ({ handle: await handle, also: [] });
  return {
    head: {
      make: async () => {
        const head = await addon.createHead(HEAD, EXECUTION);
        await head.setWeights(ramp(CLASSES * DIM), null);
        return { handle: head, also: [] };
      },
      calls: {
        setWeights: () => [ramp(CLASSES * DIM), null],
        readWeights: () => [],
        setCenters: () => [new Float32Array()],
        readCenters: () => [],
        forwardBackward: () => [x, y],
        step: () => [x, y, STEP],
        peakExtraBytes: () => [],
        time: () => ['forwardBackward', 2, 2],
      },
    },
    session: {
      make: async () => {
        const records = await addon.openRecords(rec, idx);
        const batches = await openBatches(records);
        const handle = await addon.createSession(SESSION, EXECUTION);
        return { handle, also: [batches, records] };
      },
      calls: {
        train: ([batches]) => [batches, [STEP]],
        trainOwn: () => [
          new Uint8Array(BATCH * IMAGE_BYTES),
          new Int32Array(BATCH),
          { seed: 1, mirror: true, crop: 1, epoch: 1, first: 0 },
          STEP,
        ],
        cancel: () => [],
        stepsDone: () => [],
        embed: () => [image, false],
        read: () => [tensor],
        write: () => [tensor, new Float32Array(64 * 3 * 7 * 7)],
      },
    },
    embedder: {
      make: () => alone(addon.createEmbedder(NETWORK, EXECUTION)),
      calls: {
        embed: () => [image, true],
        read: () => [tensor],
        write: () => [tensor, new Float32Array(64 * 3 * 7 * 7)],
      },
    },
    records: {
      make: () => alone(addon.openRecords(rec, idx)),
      calls: {
        jpeg: () => [0],
        decode: () => [new Uint32Array([1, 0])],
        verify: () => [0, 1],
        batches: () => [
          {
            images: new Int32Array([0, 1]),
            labels: new Int32Array(2),
            batch: 1,
            seed: 1,
            mirror: false,
            crop: 0,
            decodeThreads: 1,
            execution: EXECUTION,
            skip: { most: 1, known: new Int32Array([1]) },
          },
        ],
      },
    },
    batches: {
      make: async () => {
        const records = await addon.openRecords(rec, idx);
        return { handle: await openBatches(records), also: [records] };
      },
      calls: { seek: () => [2, 1], waitedMs: () => [], skipped: () => [], drain: () => [3] },
    },
    lock: {
      make: () => alone(addon.lockFolder(mkdtempSync(join(dirname(rec), 'lock-')), 'a note')),
      calls: {},
    },
  };
}
