/** Files that are whole or absent: temporary name, fsync, rename, fsync of the folder. */
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import { access, open, readdir, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { HardmineError } from '../errors.js';
import { INSTANCE, isInstanceRunning } from './processes.js';

/**
 * Writes `chunks` one after the other to `path`, replacing what stood there only when all of it is on
 * the disk. On any failure the temporary file is removed and `path` is as it was.
 *
 * @throws HardmineError ERR_IO when the operating system refuses.
 */
export async function writeFileAtomic(
  path: string,
  chunks: Iterable<Uint8Array | string> | AsyncIterable<Uint8Array | string>,
): Promise<void> {
  await refuseSpecial(path);
  const folder = dirname(path);
  // In the same folder, because rename is atomic within one file system only.
  const temporary = join(
    folder,
    `.${basename(path)}.${INSTANCE}-${randomBytes(4).toString('hex')}.tmp`,
  );
  try {
    const file = await open(temporary, 'wx');
    try {
      for await (const chunk of chunks) await file.writeFile(chunk);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(temporary, path);
    await syncFolder(folder);
  } catch (cause) {
    await rm(temporary, { force: true }).catch(() => undefined); // the first failure is the one to tell
    throw unwritable(path, cause);
  }
}

/**
 * Looks, before the work whose result it is to hold, whether writeFileAtomic could make `path` now.
 *
 * @throws HardmineError ERR_IO when it could not.
 */
export async function checkWritable(path: string): Promise<void> {
  try {
    // With the dot a file in the folder's place is found too.
    await access(`${dirname(path)}/.`, constants.W_OK);
  } catch (cause) {
    throw unwritable(path, cause);
  }
  await refuseSpecial(path);
}

/** A rename puts a file in the place of whatever stands there: as root of /dev/null too. */
async function refuseSpecial(path: string): Promise<void> {
  const standing = await stat(path).catch(() => null);
  if (standing === null || standing.isFile()) return;
  const what = standing.isDirectory() ? 'a folder' : 'no regular file';
  throw new HardmineError(
    'ERR_IO',
    `${path} could not be written (it is ${what}): give the path of a file.`,
  );
}

function unwritable(path: string, cause: unknown): unknown {
  if (!isSystemError(cause)) return cause;
  return new HardmineError(
    'ERR_IO',
    `${path} could not be written (${cause.message}): choose a folder that exists, that you may write to and that has room.`,
    { cause },
  );
}

/** Makes the names in a folder (new, renamed or removed files) survive a power failure. */
export async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, 'r');
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

function isSystemError(error: unknown): error is NodeJS.ErrnoException {
  return (
    error instanceof Error &&
    typeof (error as NodeJS.ErrnoException).code === 'string' &&
    'syscall' in error
  );
}

/** Removes from a folder what killed processes left of files that writeFileAtomic was writing. */
export async function removeAbandonedFiles(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    const writer = /^\..*\.(\d+-\d+)-[0-9a-f]{8}\.tmp$/.exec(name)?.[1];
    if (writer !== undefined && !isInstanceRunning(writer)) {
      await rm(join(folder, name), { force: true });
    }
  }
}
