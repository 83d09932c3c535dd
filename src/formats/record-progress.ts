/**
 * What a killed pack leaves for the next one: its temporary folder with the records written so far and
 * a note of how many of their bytes are safely on the disk and what they were packed from.
 */
import type { FileHandle } from 'node:fs/promises';
import { mkdir, readdir, readFile, rename, rm } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { writeFileAtomic } from './atomic.js';
import { INSTANCE, isInstanceRunning } from './processes.js';

const NOTE = 'progress.json';

interface Progress {
  /** Fingerprint of what is packed. */
  source: string;
  /** Of the .rec, all of them durable and ending with a whole record. */
  bytes: number;
}

/** Temporary folders carry host and process, so that those of a killed process can be told. */
const stem = (name: string): string => `.${name}.tmp-${hostname()}-`;
/** Stands where the process does, for a folder whose process gave it up in good order. */
const STOPPED = 'stopped';

/** Makes a temporary folder for the set `name` in `folder`. */
export async function makeTemporary(folder: string, name: string): Promise<string> {
  for (let attempt = 0; ; attempt += 1) {
    const path = join(folder, `${stem(name)}${INSTANCE}-${attempt}`);
    try {
      await mkdir(path);
      return path;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
    }
  }
}

/** Notes that the first `bytes` of the .rec in a temporary folder are durable. */
export async function noteProgress(temporary: string, progress: Progress): Promise<void> {
  await writeFileAtomic(join(temporary, NOTE), [JSON.stringify(progress)]);
}

/** Leaves a temporary folder to whoever packs the same set next, this process or another. */
export async function leaveBehind(temporary: string, folder: string, name: string): Promise<void> {
  const path = join(folder, `${stem(name)}${STOPPED}`);
  await rm(path, { recursive: true, force: true });
  await rename(temporary, path);
}

/**
 * Takes over what another process left of packing `source`, and removes what others left for good.
 * @returns the temporary folder, by now this process's own, and the bytes that count
 */
export async function takeOver(
  folder: string,
  name: string,
  source: string | undefined,
): Promise<{ temporary: string; bytes: number } | undefined> {
  let taken: { temporary: string; bytes: number } | undefined;
  for (const entry of await readdir(folder)) {
    if (!entry.startsWith(stem(name)) || !isAbandoned(entry.slice(stem(name).length))) continue;
    const path = join(folder, entry);
    const progress = await readNote(path);
    if (taken === undefined && progress !== undefined && progress.source === source) {
      const temporary = await makeTemporary(folder, name);
      try {
        await rename(path, temporary); // over an empty folder; atomic, so that one process gets it
        taken = { temporary, bytes: progress.bytes };
      } catch {
        await rm(temporary, { recursive: true, force: true });
      }
    } else {
      await rm(path, { recursive: true, force: true });
    }
  }
  return taken;
}

function isAbandoned(owner: string): boolean {
  const writer = /^(\d+-\d+)-\d+$/.exec(owner)?.[1];
  return writer === undefined ? owner === STOPPED : !isInstanceRunning(writer);
}

async function readNote(temporary: string): Promise<Progress | undefined> {
  try {
    const note: unknown = JSON.parse(await readFile(join(temporary, NOTE), 'utf8'));
    if (typeof note !== 'object' || note === null) return undefined;
    const { source, bytes } = note as Record<string, unknown>;
    if (typeof source !== 'string' || !Number.isSafeInteger(bytes)) return undefined;
    return { source, bytes: Number(bytes) };
  } catch {
    return undefined; // killed before the first note, or no note of ours
  }
}

const READ_BYTES = 2 ** 20;

/** The first `bytes` bytes of a file at any place, a MiB in memory at a time. */
export class BlockReader {
  readonly #file: FileHandle;
  readonly #bytes: number;
  #block = Buffer.alloc(0);
  /** Of the block's first byte. */
  #start = 0;

  constructor(file: FileHandle, bytes: number) {
    this.#file = file;
    this.#bytes = bytes;
  }

  /** @returns undefined where the file does not reach so far */
  async read(offset: number, length: number): Promise<Buffer | undefined> {
    if (offset + length > this.#bytes) return undefined;
    if (offset < this.#start || offset + length > this.#start + this.#block.length) {
      const wanted = Math.min(Math.max(length, READ_BYTES), this.#bytes - offset);
      const block = Buffer.alloc(wanted);
      const { bytesRead } = await this.#file.read(block, 0, wanted, offset);
      if (bytesRead < length) return undefined;
      this.#block = block.subarray(0, bytesRead);
      this.#start = offset;
    }
    return this.#block.subarray(offset - this.#start, offset - this.#start + length);
  }
}
