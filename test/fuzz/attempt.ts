/** What may come of a damaged file, and what may not. */
import { HardmineError } from '../../src/errors.js';
import type { Reader } from './targets.js';

/** Of processor time, for 64 KiB at most; a hundred times what the slowest of them takes. */
const MAX_SECONDS = 2;
/** Longer than any of ours: paths, a quotation, what was expected. */
const MAX_MESSAGE = 2000;

/** `sort` groups defects that are the same mistake. */
export type Outcome =
  | { kind: 'value' }
  | { kind: 'refused' }
  | { kind: 'defect'; sort: string; what: string };

/** Reads one input; a defect is any error but a HardmineError of one plain line, and a waste of time. */
export async function attempt(reader: Reader, input: Buffer): Promise<Outcome> {
  const start = process.cpuUsage();
  let outcome: Outcome = { kind: 'value' };
  try {
    await reader.read(Buffer.from(input)); // a copy: whatever it keeps or writes is its own
  } catch (error) {
    outcome = judge(error);
  }
  const { user, system } = process.cpuUsage(start);
  const seconds = (user + system) / 1e6;
  return seconds > MAX_SECONDS && outcome.kind !== 'defect'
    ? { kind: 'defect', sort: 'time', what: `took ${seconds.toFixed(1)} s of processor time` }
    : outcome;
}

function judge(error: unknown): Outcome {
  const defect = (sort: string, what: string): Outcome => ({ kind: 'defect', sort, what });
  if (!(error instanceof HardmineError)) {
    const stack = error instanceof Error ? String(error.stack) : String(error);
    return defect(/\n +at (.*)/.exec(stack)?.[1] ?? stack, stack);
  }
  const { code, message } = error;
  if (code === 'ERR_INTERNAL') return defect(code, message);
  // biome-ignore lint/suspicious/noControlCharactersInRegex: terminals obey them
  if (/[\u0000-\u001f\u007f-\u009f]/.test(message)) {
    return defect('control characters', JSON.stringify(message));
  }
  if (message.length > MAX_MESSAGE) return defect('a long message', message.slice(0, 300));
  return { kind: 'refused' };
}
