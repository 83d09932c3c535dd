/** What this process takes of physical memory, in bytes; Linux alone tells. */
import { readFileSync, writeFileSync } from 'node:fs';

function status(field: 'VmRSS' | 'VmHWM'): number {
  const text = readFileSync('/proc/self/status', 'latin1');
  return 1024 * Number(new RegExp(`^${field}:\\s+(\\d+) kB$`, 'm').exec(text)![1]);
}

export const residentBytes = (): number => status('VmRSS');

/**
 * The most since the process began or `forgetPeak` was called. Not getrusage's: the peak that it gives a
 * new program begins with that of the program which started it, and hides whatever stays below.
 */
export const peakBytes = (): number => status('VmHWM');

/** From here on the peak is counted anew (man 5 proc, clear_refs). */
export function forgetPeak(): void {
  writeFileSync('/proc/self/clear_refs', '5');
}
