/** What the lists of all protocols share: how they are read, and what is said of files that they miss. */

import { join } from 'node:path';
import { exists, readFileBounded } from '../data/files.js';
import { HardmineError } from '../errors.js';

/** How many missing things an error names. */
const LISTED = 10;
/** Twenty times YouTube Faces' list, the longest of them; cut into lines, it takes up to 13 times as much. */
const MAX_BYTES = 2 ** 22;

/**
 * The text of a list.
 *
 * @param option the command line's name for it
 * @throws HardmineError ERR_PROTOCOL when it cannot be read, ERR_DATA when it is no file or too large
 */
export async function readList(path: string, option: string): Promise<string> {
  try {
    return (await readFileBounded(path, MAX_BYTES, 'a list of pairs')).toString('utf8');
  } catch (error) {
    if (!(error instanceof HardmineError) || error.code !== 'ERR_IO') throw error;
    const { cause } = error;
    throw new HardmineError(
      'ERR_PROTOCOL',
      `The list ${path} could not be read (${cause instanceof Error ? cause.message : String(cause)}); name it with ${option}.`,
      { cause },
    );
  }
}

/** Lines without a byte order mark, white space at their ends and empty lines at the end. */
export function linesOf(text: string): string[] {
  const lines = text
    .replace(/^\uFEFF/, '')
    .split('\n')
    .map((line) => line.trim());
  while (lines.at(-1) === '') lines.pop();
  return lines;
}

/** The image `stem`.jpg, else .png, in `root`; null when there is neither. */
export async function findImage(root: string, stem: string): Promise<string | null> {
  for (const extension of ['.jpg', '.png']) {
    const path = join(root, stem + extension);
    if (await exists(path)) return path;
  }
  return null;
}

/**
 * @param missing what was not found, relative to `root`
 * @throws HardmineError ERR_PROTOCOL with their number and the first ten by name, unless there is none
 */
export function refuseMissing(
  missing: readonly string[],
  total: number,
  what: 'images' | 'videos',
  root: string,
): void {
  if (missing.length === 0) return;
  const more = missing.length > LISTED ? ` and ${missing.length - LISTED} more` : '';
  throw new HardmineError(
    'ERR_PROTOCOL',
    `${missing.length} of ${total} ${what} are missing under ${root}: ${[...missing].sort().slice(0, LISTED).join(', ')}${more}; the protocol needs every one.`,
  );
}

/** Whether a name from a list is a folder's or a file's and does not lead out of the data set. */
export function isPlainName(name: string): boolean {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: names go into messages and reports
  const strange = /[/\\\u0000-\u001f\u007f-\u009f]/;
  return name !== '' && name !== '.' && name !== '..' && !strange.test(name);
}
