/** The matrix of ends and activities: each run in a process of its own. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const PROGRAM = fileURLToPath(new URL('lifetimes.ts', import.meta.url));

export const ENDS = [
  'end',
  'process.exit',
  'throw',
  'SIGINT',
  'SIGTERM',
  'terminate',
  'dispose',
] as const;
export const ACTIVITIES = ['idle', 'step', 'save', 'evaluation'] as const;

/**
 * How a process ends: no signal but the one that was sent, which Node leaves to its default where the
 * program has no handler (hardmine installs none for its users; the command line has its own).
 */
const EXPECTED: Record<(typeof ENDS)[number], { code: number | null; signal: string | null }> = {
  end: { code: 0, signal: null },
  'process.exit': { code: 3, signal: null },
  throw: { code: 1, signal: null },
  SIGINT: { code: null, signal: 'SIGINT' },
  SIGTERM: { code: null, signal: 'SIGTERM' },
  terminate: { code: 0, signal: null },
  dispose: { code: 0, signal: null },
};

/** Runs one cell; returns the milliseconds from the request to the end of the process. */
export async function endProcess(
  end: (typeof ENDS)[number],
  activity: (typeof ACTIVITIES)[number],
  data: string,
  folder: string,
): Promise<number> {
  const own = mkdtempSync(join(folder, `${activity}-`));
  const child = spawn(process.execPath, ['--import=tsx', PROGRAM, end, activity, data, own], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk) => (stdout += chunk));
  child.stderr.on('data', (chunk) => (stderr += chunk));
  const closed = await new Promise<{ code: number | null; signal: string | null; at: number }>(
    (resolve) => {
      let at = 0;
      child.on('exit', () => (at = Date.now()));
      child.on('close', (code, signal) => resolve({ code, signal, at }));
    },
  );
  const { at, ...found } = closed;
  assert.deepEqual(found, EXPECTED[end], `${end}, ${activity}: ${stderr}`);
  if (end === 'throw') assert.match(stderr, /Error: planted/);
  else assert.equal(stderr, '', `${end}, ${activity}`);
  rmSync(own, { recursive: true });
  const asked = /asked (\d+)/.exec(stdout);
  return asked === null ? 0 : at - Number(asked[1]);
}
