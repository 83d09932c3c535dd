/** When a process began, read another way than src/formats/processes.ts has it. */
import { execFileSync } from 'node:child_process';

/** In ticks since the machine did, by awk: the program's name, in brackets, goes first. */
export function startOf(pid: number): string {
  const program = '{ sub(/^.*[)] /, ""); print $20 }';
  return execFileSync('awk', [program, `/proc/${pid}/stat`], { encoding: 'utf8' }).trim();
}
