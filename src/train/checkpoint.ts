/**
 * Checkpoints that are whole or absent: written into step-00001200.tmp-PROCESS, flushed, then renamed. A
 * manifest with the size and SHA-256 of each file tells a sound one from a damaged one.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { exists, readFileBounded } from '../data/files.js';
import { HardmineError, oneLine } from '../errors.js';
import { syncFolder } from '../formats/atomic.js';
import { INSTANCE, isInstanceRunning } from '../formats/processes.js';
import {
  encodeSafetensors,
  readSafetensors,
  type Tensor,
  type TensorMap,
} from '../formats/safetensors.js';
import type { NativeTensor } from '../native.js';

const TENSOR_FILES = ['model', 'head', 'optimizer'] as const;
type TensorFile = (typeof TENSOR_FILES)[number];
const FILES = [...TENSOR_FILES.map((name) => `${name}.safetensors`), 'state.json'] as const;
const FORMAT = 'hardmine checkpoint 1';
/** Written and hashed in pieces, so that the event loop is never held for long. */
const PIECE_BYTES = 4 << 20;
/** Taken anew for every file, however small it is. */
const READ_BYTES = 1 << 18;
/** A manifest or state of more than this is none of ours. */
const MAX_JSON_BYTES = 16 << 20;

const progressSchema = z.strictObject({
  steps: z.int().min(0),
  rows: z.int().min(0),
  loss: z.number(),
  baseLoss: z.number(),
  accuracy: z.number(),
  silenced: z.number(),
  kept: z.number(),
  amplified: z.number(),
  meanCosine: z.number(),
  embeddingNorm: z.number(),
});

const stateSchema = z.strictObject({
  format: z.literal(FORMAT),
  /** Steps done in all. */
  step: z.int().min(0),
  /** The epoch under way, from 1, and the steps done in it. */
  epoch: z.int().min(1),
  stepInEpoch: z.int().min(0),
  /** Seconds of training so far. */
  seconds: z.number().min(0),
  /** Means over the steps done in the epoch under way. */
  epochProgress: progressSchema.nullable(),
  /** All validations so far. */
  validations: z.array(z.strictObject({ epoch: z.int(), step: z.int(), accuracy: z.number() })),
  config: z.record(z.string(), z.unknown()),
  configHash: z.string(),
  /** What the training data were: see Trainer. */
  data: z.strictObject({ images: z.int(), identities: z.int(), sha256: z.string() }),
  /** Where the bits were made: device, instruction set, library, threads, precision. */
  environment: z.record(z.string(), z.string()),
});

export type CheckpointState = z.output<typeof stateSchema>;

const manifestSchema = z.strictObject({
  files: z.record(z.string(), z.strictObject({ bytes: z.int().min(0), sha256: z.string() })),
});
type Manifest = z.output<typeof manifestSchema>;

export interface CheckpointTensors {
  model: TensorMap;
  head: TensorMap;
  optimizer: TensorMap;
}

export interface FoundCheckpoint {
  path: string;
  state: CheckpointState;
}

export function checkpointName(step: number): string {
  return `step-${String(step).padStart(8, '0')}`;
}

function ioFailure(path: string, cause: unknown): HardmineError {
  const reason = cause instanceof Error ? cause.message : String(cause);
  return new HardmineError(
    'ERR_IO',
    `the checkpoint ${path} could not be written (${reason}): free space or permissions on its folder`,
    { cause },
  );
}

function* pieces(chunks: readonly Uint8Array[]): Iterable<Uint8Array> {
  for (const chunk of chunks) {
    for (let at = 0; at < chunk.length; at += PIECE_BYTES)
      yield chunk.subarray(at, at + PIECE_BYTES);
  }
}

async function writeFlushed(
  path: string,
  chunks: readonly Uint8Array[],
): Promise<{ bytes: number; sha256: string }> {
  const hash = createHash('sha256');
  let bytes = 0;
  const file = await open(path, 'wx');
  try {
    for (const piece of pieces(chunks)) {
      hash.update(piece);
      await file.writeFile(piece);
      bytes += piece.length;
    }
    await file.sync();
  } finally {
    await file.close();
  }
  return { bytes, sha256: hash.digest('hex') };
}

/** Moves a folder out of the way under one rename, so that it is never seen half removed. */
async function discard(path: string): Promise<void> {
  const doomed = `${path}.tmp-${INSTANCE}-old`;
  await rename(path, doomed);
  await rm(doomed, { recursive: true, force: true });
}

/** Names of finished checkpoints, newest first. */
async function checkpointNames(folder: string): Promise<string[]> {
  const names = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw error;
  });
  return names
    .filter((name) => /^step-\d{8,}$/.test(name))
    .sort((a, b) => Number(b.slice(5)) - Number(a.slice(5)));
}

/** Removes all but the newest `keep`. */
async function prune(folder: string, keep: number): Promise<void> {
  try {
    for (const name of (await checkpointNames(folder)).slice(keep)) {
      await discard(join(folder, name));
    }
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new HardmineError(
      'ERR_IO',
      `an old checkpoint in ${folder} could not be removed (${reason}): mend the permissions or the disk, then go on with --resume`,
      { cause },
    );
  }
}

/**
 * Writes a checkpoint into `folder` and then removes all but the newest `keep`. A failure leaves the
 * newest older one untouched, and of this one nothing or, when it comes after the rename, the whole.
 *
 * @returns the checkpoint's folder
 * @throws HardmineError ERR_IO when the operating system refuses
 */
export async function writeCheckpoint(
  folder: string,
  tensors: CheckpointTensors,
  state: Omit<CheckpointState, 'format'>,
  keep: number,
): Promise<string> {
  const path = join(folder, checkpointName(state.step));
  const temporary = `${path}.tmp-${INSTANCE}`;
  try {
    await rm(temporary, { recursive: true, force: true });
    await mkdir(temporary, { recursive: true });
    const manifest: Manifest = { files: {} };
    for (const name of TENSOR_FILES) {
      const file = `${name}.safetensors`;
      manifest.files[file] = await writeFlushed(
        join(temporary, file),
        encodeSafetensors(tensors[name]),
      );
    }
    const text = Buffer.from(`${JSON.stringify({ format: FORMAT, ...state }, null, 2)}\n`);
    manifest.files['state.json'] = await writeFlushed(join(temporary, 'state.json'), [text]);
    await writeFlushed(join(temporary, 'MANIFEST.json'), [
      Buffer.from(`${JSON.stringify(manifest, null, 2)}\n`),
    ]);
    await syncFolder(temporary);
    // One of the same step stands here only when it was damaged and training came by again.
    if (await exists(path)) await discard(path);
    await rename(temporary, path);
    await syncFolder(folder);
  } catch (cause) {
    await rm(temporary, { recursive: true, force: true }).catch(() => undefined);
    throw cause instanceof HardmineError ? cause : ioFailure(path, cause);
  }
  await prune(folder, keep);
  return path;
}

async function sha256OfFile(path: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const piece of createReadStream(path, { highWaterMark: READ_BYTES })) {
    hash.update(piece as Buffer);
  }
  return hash.digest('hex');
}

async function readJson(path: string): Promise<unknown> {
  const text = await readFileBounded(path, MAX_JSON_BYTES, 'a file of a checkpoint');
  try {
    return JSON.parse(text.toString('utf8'));
  } catch (error) {
    throw new Error(`it is no JSON (${oneLine((error as Error).message)})`);
  }
}

/** Throws an Error whose message says what is wrong. */
async function verify(path: string): Promise<CheckpointState> {
  const manifest = manifestSchema.safeParse(
    await readJson(join(path, 'MANIFEST.json')).catch((error: Error) => {
      throw new Error(`MANIFEST.json cannot be read: ${error.message}`);
    }),
  );
  if (!manifest.success) throw new Error('MANIFEST.json is not a manifest of files');
  const expected = FILES.map((name) => {
    const listed = manifest.data.files[name];
    if (listed === undefined) throw new Error(`MANIFEST.json does not list ${name}`);
    return { name, ...listed };
  });
  // Sizes first: they cost nothing, and what was cut off is the commonest damage.
  for (const { name, bytes } of expected) {
    const found = await stat(join(path, name)).catch(() => null);
    if (found === null) throw new Error(`${name} is missing`);
    if (!found.isFile()) throw new Error(`${name} is not a file`);
    if (found.size !== bytes) {
      throw new Error(`${name} has ${found.size} bytes where its manifest says ${bytes}`);
    }
  }
  for (const { name, sha256 } of expected) {
    if ((await sha256OfFile(join(path, name))) !== sha256) {
      throw new Error(`${name} differs from the SHA-256 in its manifest`);
    }
  }
  const state = stateSchema.safeParse(await readJson(join(path, 'state.json')));
  if (!state.success) {
    const issue = state.error.issues[0];
    throw new Error(
      `state.json is not one of this version (${oneLine(`${issue?.path.join('.')}: ${issue?.message}`)})`,
    );
  }
  return state.data;
}

/**
 * The newest checkpoint in `folder` whose manifest verifies, or null where there is none at all;
 * `rejected` says of every newer one why it was passed over.
 *
 * @throws HardmineError ERR_CHECKPOINT when there are checkpoints but none is sound
 */
export async function findCheckpoint(
  folder: string,
): Promise<{ found: FoundCheckpoint | null; rejected: string[] }> {
  const rejected: string[] = [];
  for (const name of await checkpointNames(folder)) {
    const path = join(folder, name);
    try {
      return { found: { path, state: await verify(path) }, rejected };
    } catch (error) {
      rejected.push(
        `${path} was rejected: ${error instanceof Error ? error.message : String(error)}`,
      );
    }
  }
  if (rejected.length > 0) {
    throw new HardmineError(
      'ERR_CHECKPOINT',
      `no checkpoint in ${folder} is sound (${rejected.join('; ')}): restore one from a copy, or start anew in another run directory`,
    );
  }
  return { found: null, rejected };
}

/** All tensors of a verified checkpoint, by name. */
export async function readCheckpointTensors(path: string): Promise<Map<string, Tensor>> {
  const all = new Map<string, Tensor>();
  for (const name of TENSOR_FILES) {
    const { tensors } = await readSafetensors(join(path, `${name}.safetensors`));
    for (const [key, tensor] of tensors) all.set(key, tensor);
  }
  return all;
}

/** Which of the three files a session's tensor belongs to. */
export function fileOfTensor({ name, role }: Pick<NativeTensor, 'name' | 'role'>): TensorFile {
  if (role === 'optimizer') return 'optimizer';
  return name.startsWith('head.') ? 'head' : 'model';
}

/**
 * Removes what processes that no longer run left of checkpoints they were writing, and what this one has:
 * it locks the run directory, so nothing of it is writing now.
 */
export async function removeStale(folder: string): Promise<void> {
  const names = await readdir(folder).catch(() => []);
  for (const name of names) {
    const writer = /^step-\d{8,}\.tmp-(\d+-\d+)(-old)?$/.exec(name)?.[1];
    if (writer !== undefined && (writer === INSTANCE || !isInstanceRunning(writer))) {
      await rm(join(folder, name), { recursive: true, force: true });
    }
  }
}
