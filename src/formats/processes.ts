/** Which processes run: a number alone tells little, since another process has it in time. */
import { readFileSync } from 'node:fs';

/** When a process began, in ticks since its machine did; null where that cannot be read. */
function startOf(pid: number): string | null {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1');
    // Field 22 of proc(5), counted behind field 2: that is the program's name, which may hold anything.
    return text.slice(text.lastIndexOf(')') + 2).split(' ')[19] ?? null;
  } catch {
    return null;
  }
}

/**
 * This process, for names of files: its number and when it began, NUMBER-TICKS. In a container every run
 * may have the same number.
 */
export const INSTANCE = `${process.pid}-${startOf(process.pid) ?? 0}`;

/** Whether a process of that number runs on this machine. */
export function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH';
  }
}

/** Whether the very process whose INSTANCE that is runs on this machine. */
export function isInstanceRunning(instance: string): boolean {
  const [pid, start] = instance.split('-');
  if (!isRunning(Number(pid))) return false;
  const found = startOf(Number(pid));
  return found === null || found === start;
}
