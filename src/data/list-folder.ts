/** What folders of images hold, with names that can be trusted and links that stay inside. */
import { isUtf8 } from 'node:buffer';
import type { BigIntStats, Dirent } from 'node:fs';
import { readdir, realpath, stat } from 'node:fs/promises';
import { join, sep } from 'node:path';
import { HardmineError } from '../errors.js';
import { ioError } from './files.js';
import { mapBounded } from './images.js';

/** What counts as an image. */
export const IMAGE_NAME = /\.(jpe?g|png)$/i;

export interface Entry {
  name: string;
  stats: BigIntStats;
}

/** What a folder holds, hidden entries left out, in byte order; links are followed within `root` alone. */
export async function listFolder(folder: string, root: string): Promise<Entry[]> {
  let listed: Dirent<Buffer>[];
  try {
    listed = await readdir(folder, { withFileTypes: true, encoding: 'buffer' });
  } catch (error) {
    throw ioError(folder, 'read', error, 'give a folder that exists and may be read');
  }
  const named: Dirent<Buffer>[] = [];
  for (const entry of listed) {
    // Byte 0x2e is the leading dot of hidden files (.DS_Store, .git).
    if (entry.name[0] === 0x2e) continue;
    // biome-ignore lint/suspicious/noControlCharactersInRegex: names go into line-based files
    if (!isUtf8(entry.name) || /[\u0000-\u001f\u007f-\u009f]/.test(entry.name.toString())) {
      throw new HardmineError(
        'ERR_DATA',
        `${folder} holds a name that is not plain UTF-8 text (bytes ${entry.name.toString('hex')}): rename it.`,
      );
    }
    named.push(entry);
  }
  named.sort((a, b) => Buffer.compare(a.name, b.name));
  return mapBounded(named, async (entry) => {
    const name = entry.name.toString();
    const path = join(folder, name);
    try {
      if (entry.isSymbolicLink() && !(await realpath(path)).startsWith(root + sep)) {
        throw new HardmineError(
          'ERR_DATA',
          `${path} is a symbolic link that leaves ${root}: copy the files there or remove the link.`,
        );
      }
      return { name, stats: await stat(path, { bigint: true }) };
    } catch (error) {
      throw ioError(path, 'read', error, 'remove it or give the right to read it');
    }
  });
}
