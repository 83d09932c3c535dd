/** What went wrong, for programs; the message is for people. */
export type ErrorCode =
  | 'ERR_INPUT'
  | 'ERR_CONFIG'
  | 'ERR_DATA'
  | 'ERR_IO'
  | 'ERR_FORMAT'
  | 'ERR_PROTOCOL'
  | 'ERR_CHECKPOINT'
  | 'ERR_ADDON'
  | 'ERR_BACKEND'
  | 'ERR_DEVICE_UNAVAILABLE'
  | 'ERR_DEVICE_OOM'
  | 'ERR_DEVICE_LOST'
  | 'ERR_NON_FINITE'
  | 'ERR_ABORTED'
  | 'ERR_BUSY'
  | 'ERR_DISPOSED'
  | 'ERR_INTERNAL';

/**
 * The one error class of hardmine. `message` is one sentence that names the thing, what was found,
 * what was expected and how to mend it; `cause` is the error beneath, where there was one.
 */
export class HardmineError extends Error {
  readonly code: ErrorCode;

  constructor(code: ErrorCode, message: string, options?: { cause?: unknown }) {
    super(message, options);
    this.name = 'HardmineError';
    this.code = code;
  }
}

/** What terminals obey, what breaks lines and what turns the direction of text. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const UNPRINTABLE = /[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]/g;
/** As much of a foreign text as a message shows. */
const MAX_QUOTED = 80;
/** A system's or a library's own sentence may be longer. */
const MAX_FOREIGN = 300;

const cut = (text: string, most: number): string =>
  text.length > most ? `${text.slice(0, most)}...` : text;

/** Text from outside in a message: in quotes, short, and harmless to a terminal. */
export function quote(text: string): string {
  return JSON.stringify(cut(text, MAX_QUOTED)).replace(
    UNPRINTABLE,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );
}

/** What another program says, as part of a message: one line that is not too long. */
export function oneLine(text: string): string {
  return cut(text.replace(UNPRINTABLE, ' '), MAX_FOREIGN);
}

/** More of a name than any of ours has. */
const MAX_COMPARED = 64;

/** Levenshtein's distance of `a`'s beginning from `b`, letters compared without case. */
function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (const [i, x] of [...a.slice(0, MAX_COMPARED).toLowerCase()].entries()) {
    const next = [i + 1];
    for (const [j, y] of [...b.toLowerCase()].entries()) {
      next.push(Math.min(row[j + 1]! + 1, next[j]! + 1, row[j]! + (x === y ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}

/** The known name nearest to `name`. */
export function nearest(name: string, known: readonly string[]): string {
  const distances = known.map((candidate) => editDistance(name, candidate));
  return known[distances.indexOf(Math.min(...distances))] ?? '';
}

/** @throws HardmineError ERR_INPUT for a value of an option that is none of `known` */
export function oneOf(option: string, value: string, known: readonly string[]): void {
  if (!known.includes(value)) {
    throw new HardmineError('ERR_INPUT', `${option} is ${value}: give ${known.join(' or ')}.`);
  }
}

/**
 * A missing argument is said to be one before Node says it in its own way.
 *
 * @param what whose path it is: 'the data set'
 * @throws HardmineError ERR_INPUT for what is no path
 */
export function checkPath(path: unknown, what: string): void {
  if (typeof path === 'string' && path !== '') return;
  const found = typeof path === 'string' ? 'empty' : path === null ? 'null' : typeof path;
  throw new HardmineError('ERR_INPUT', `The path of ${what} is ${found}: give one as a string.`);
}
