import { constants } from 'node:fs';
import { type FileHandle, mkdir, open, stat } from 'node:fs/promises';
import { dirname } from 'node:path';
import { HardmineError, oneLine } from '../errors.js';

/** How far some work on a data set is. */
export interface DataProgress {
  phase: 'scanning' | 'packing' | 'checking';
  /** Images, identities or bytes, as `total`. */
  done: number;
  total: number;
}

export interface DataOptions {
  onProgress?: ((progress: DataProgress) => void) | undefined;
  /** Stops the work, which then throws ERR_ABORTED and leaves no half-written set. */
  signal?: AbortSignal | undefined;
}

/**
 * ERR_IO for what the operating system refused; an error that has its sentence already is passed on.
 * @param verb 'read' or 'written'
 */
export function ioError(path: string, verb: string, error: unknown, remedy: string): HardmineError {
  if (error instanceof HardmineError) return error;
  const reason = oneLine(error instanceof Error ? error.message : String(error));
  return new HardmineError('ERR_IO', `${path} could not be ${verb} (${reason}): ${remedy}.`, {
    cause: error,
  });
}

/**
 * Opens a file for reading; folders, pipes and devices are refused.
 * @param what the user should give instead: 'an image file'
 */
export async function openFile(path: string, what: string): Promise<FileHandle> {
  let file: FileHandle;
  try {
    // Non-blocking: opening a FIFO would otherwise wait for a writer for ever.
    file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    throw ioError(path, 'read', error, `give ${what} that exists and may be read`);
  }
  if ((await file.stat()).isFile()) return file;
  await file.close();
  throw new HardmineError('ERR_DATA', `${path} is not a file: give ${what}.`);
}

/**
 * Reads a whole file, refused before memory is taken when it is no file or has more than `maxBytes`.
 * @param what it should be: 'an image file'
 */
export async function readFileBounded(
  path: string,
  maxBytes: number,
  what: string,
): Promise<Buffer> {
  const file = await openFile(path, what);
  try {
    const { size } = await file.stat();
    if (size > maxBytes) {
      throw new HardmineError(
        'ERR_DATA',
        `${path} has ${size} bytes where ${what} has at most ${maxBytes}: remove it.`,
      );
    }
    return await file.readFile();
  } catch (error) {
    throw ioError(path, 'read', error, `give ${what} that exists and may be read`);
  } finally {
    await file.close();
  }
}

/** Whether anything stands at `path`. */
export async function exists(path: string): Promise<boolean> {
  try {
    await stat(path);
    return true;
  } catch {
    return false;
  }
}

/** Throws ERR_ABORTED when the caller has stopped `what`. */
export function throwIfAborted(signal: AbortSignal | undefined, what: string): void {
  if (signal?.aborted) {
    throw new HardmineError('ERR_ABORTED', `${what} was stopped by the caller.`, {
      cause: signal.reason,
    });
  }
}

/**
 * Makes a folder and those above it, as `mkdir` with `recursive` should: Node's never returns where the
 * folder above exists and cannot hold another, as in /proc.
 * @returns the topmost folder made; undefined when `path` was there
 */
export async function makeFolders(path: string): Promise<string | undefined> {
  try {
    await stat(path);
    return undefined; // if it is a file, whoever uses the folder is told so
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
  }
  const made = await makeFolders(dirname(path));
  try {
    await mkdir(path);
  } catch (error) {
    // Made by somebody else meanwhile: theirs to remove.
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return undefined;
    throw error;
  }
  return made ?? path;
}
