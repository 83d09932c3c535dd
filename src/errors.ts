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

/** Text from outside for an error's sentence: it may be long or hold control characters. */
export function quote(text: string): string {
  return JSON.stringify(text.length > 80 ? `${text.slice(0, 80)}...` : text);
}
