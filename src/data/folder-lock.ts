/**
 * One process at a time in a folder that runs write into. The kernel keeps the lock and takes it back
 * however its holder ends, so that none is ever to be removed by hand.
 */
import { readdir, rm, rmdir } from 'node:fs/promises';
import { hostname } from 'node:os';
import { dirname, join } from 'node:path';
import { z } from 'zod';
import { HardmineError, oneLine } from '../errors.js';
import { INSTANCE } from '../formats/processes.js';
import { loadAddon, type NativeAddon, type NativeLock } from '../native.js';
import { exists, ioError, makeFolders, readFileBounded } from './files.js';

/** core/folder_lock.h has it as FolderLock::kFile. */
const LOCK_FILE = '.hardmine.lock';
/** A note of more than this is none of ours. */
const MAX_NOTE_BYTES = 4096;
/** Of finding that the folder went between making and locking it. Once is rare. */
const ATTEMPTS = 100;

/** What the file of a lock says of its holder; nothing but the message to others depends on it. */
const noteSchema = z.object({
  instance: z.string(),
  pid: z.int(),
  host: z.string(),
  /** ISO 8601. */
  since: z.string(),
});
type Note = z.output<typeof noteSchema>;

export class FolderLock {
  /** Why nobody is kept out, in a sentence for people; null where everybody else is. */
  readonly warning: string | null;
  readonly #folder: string;
  /** The topmost folder that was made for it. */
  readonly #made: string | undefined;
  readonly #lock: NativeLock | null;

  private constructor(
    folder: string,
    made: string | undefined,
    lock: NativeLock | null,
    warning: string | null,
  ) {
    this.#folder = folder;
    this.#made = made;
    this.#lock = lock;
    this.warning = warning;
  }

  /**
   * Locks `folder`, which is made where it is not there, against other processes and other locks of this one,
   * without waiting. On a file system without locks, or without the native addon, it says so in `warning`.
   *
   * @throws HardmineError ERR_BUSY, naming the holder, while it is locked; ERR_IO where it cannot be made or
   *   written
   */
  static async take(folder: string): Promise<FolderLock> {
    const note: Note = {
      instance: INSTANCE,
      pid: process.pid,
      host: hostname(),
      since: new Date().toISOString(),
    };
    let made: string | undefined;
    try {
      const addon = lockingAddon();
      for (let attempt = 1; ; attempt++) {
        try {
          made ??= await makeFolders(folder);
          if (addon instanceof HardmineError) {
            return new FolderLock(folder, made, null, unlocked(folder, addon.message));
          }
          const lock = await addon.lockFolder(folder, JSON.stringify(note));
          const { unsupported } = lock;
          const warning = unsupported === null ? null : unlocked(folder, unsupported);
          return new FolderLock(folder, made, lock, warning);
        } catch (error) {
          // Who made the folder, or one above it, may have removed it again, empty as it was; and another
          // may have made it anew since.
          const { code } = error as NodeJS.ErrnoException;
          if (attempt === ATTEMPTS || (code !== 'ERR_IO' && code !== 'ENOENT')) throw error;
          if (!(await exists(folder))) made = undefined;
        }
      }
    } catch (error) {
      await removeEmpty(folder, made);
      if (error instanceof HardmineError && error.code === 'ERR_BUSY') {
        throw inUse(folder, await readNote(folder), error);
      }
      throw ioError(folder, 'written', error, 'choose a folder that you may write to');
    }
  }

  /** Removes all that the folder holds, the lock aside. */
  async clear(): Promise<void> {
    for (const name of await readdir(this.#folder)) {
      if (name !== LOCK_FILE) await rm(join(this.#folder, name), { recursive: true, force: true });
    }
  }

  /** Gives the folder back; it goes again where it was made for the lock and is empty. May be called twice. */
  async release(): Promise<void> {
    await this.#lock?.dispose();
    await removeEmpty(this.#folder, this.#made);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.release();
  }
}

/** The addon that every installation has, or why it cannot be loaded: aligning, for one, needs it for nothing else. */
function lockingAddon(): NativeAddon | HardmineError {
  try {
    return loadAddon('cpu');
  } catch (error) {
    if (error instanceof HardmineError) return error;
    throw error;
  }
}

function unlocked(folder: string, why: string): string {
  return `${folder} cannot be locked (${oneLine(why)}), so nothing keeps a second process out of it: see to it that none writes there`;
}

/** Removes `folder` and those above it up to `made`, as far as they are empty. */
async function removeEmpty(folder: string, made: string | undefined): Promise<void> {
  if (made === undefined) return;
  try {
    for (let path = folder; ; path = dirname(path)) {
      await rmdir(path);
      if (path === made) return;
    }
  } catch {
    // Somebody has put something there, or removed it.
  }
}

/** What the holder has written, or null where it has not yet, or cannot be read. */
async function readNote(folder: string): Promise<Note | null> {
  try {
    const text = await readFileBounded(join(folder, LOCK_FILE), MAX_NOTE_BYTES, 'a lock');
    return noteSchema.parse(JSON.parse(text.toString('utf8')));
  } catch {
    return null;
  }
}

function inUse(folder: string, note: Note | null, cause: HardmineError): HardmineError {
  if (note?.instance === INSTANCE && note.host === hostname()) {
    return new HardmineError(
      'ERR_BUSY',
      `${folder} is in use by this very process since ${oneLine(note.since)}: dispose of what uses it, or give another folder`,
      { cause },
    );
  }
  const holder =
    note === null
      ? 'another process'
      : `process ${note.pid} on ${oneLine(note.host)} since ${oneLine(note.since)}`;
  return new HardmineError(
    'ERR_BUSY',
    `${folder} is in use by ${holder}: wait until it ends, or stop it, or give another folder`,
    { cause },
  );
}
