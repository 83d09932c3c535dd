/** The package as users run it: dist/, and programs and commands on it as processes of their own. */
import { type ChildProcess, execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('../..', import.meta.url));

// Compiled first where the sources have changed since. From them through tsx each start would take
// seconds longer.
execFileSync(process.execPath, [join(ROOT, 'scripts/setup.mjs'), '--only', 'dist'], {
  stdio: ['ignore', 'ignore', 'inherit'],
});

/** The command line. */
export const MAIN = join(ROOT, 'dist/cli/main.js');

export interface Finished {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** What a process with pipes has printed when it has ended. */
export function finish(child: ChildProcess): Promise<Finished> {
  const printed = { stdout: '', stderr: '' };
  for (const stream of ['stdout', 'stderr'] as const) {
    child[stream]?.on('data', (chunk: Buffer) => {
      printed[stream] += chunk.toString();
    });
  }
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code) => resolve({ code, ...printed }));
  });
}
