/** Commands run as processes of their own, watched by the lines of their log. */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import { MAIN } from './built.js';

/** A line of a training log that is no terminal's. */
export interface LogLine {
  event: string;
  step?: number;
  [figure: string]: unknown;
}

export interface Watched {
  child: ChildProcess;
  /** Events so far, in order. */
  events: LogLine[];
  /** Resolves at the end. */
  ended: Promise<{ code: number | null; signal: NodeJS.Signals | null; stderr: string }>;
}

/** Starts a command line; `onEvent` is told of each line of its log. */
export function watch(argv: readonly string[], onEvent: (event: LogLine) => void): Watched {
  const child = spawn(process.execPath, [MAIN, ...argv], {
    stdio: ['ignore', 'ignore', 'pipe'],
  });
  const events: LogLine[] = [];
  const lines: string[] = [];
  createInterface({ input: child.stderr! }).on('line', (line) => {
    lines.push(line);
    if (!line.startsWith('{')) return;
    const event = JSON.parse(line) as LogLine;
    events.push(event);
    onEvent(event);
  });
  const ended = new Promise<Awaited<Watched['ended']>>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ code, signal, stderr: lines.join('\n') }));
  });
  return { child, events, ended };
}

/** The children of a process. */
export async function childrenOf(pid: number): Promise<number[]> {
  const text = await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8');
  return text.trim().split(' ').filter(Boolean).map(Number);
}
