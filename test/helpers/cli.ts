/** The command line as users run it: dist/, which is compiled first where the sources have changed since. */
import { execFileSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));

// From the sources through tsx each start would take seconds longer.
execFileSync(process.execPath, ['scripts/setup.mjs', '--only', 'dist'], {
  cwd: ROOT,
  stdio: ['ignore', 'ignore', 'inherit'],
});

export const MAIN = `${ROOT}dist/cli/main.js`;
