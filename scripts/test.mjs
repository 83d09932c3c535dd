// Runs the test suite: sets up what is missing, then mocha (.mocharc.json) with our reporter, whose
// last line is `N passed, N failed, N skipped`. Arguments go to mocha: file names, --grep and the like.

import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const run = (script, args) =>
  spawnSync(process.execPath, [join(root, script), ...args], { cwd: root, stdio: 'inherit' });

const setup = run('scripts/setup.mjs', ['--tests']);
if (setup.status !== 0) process.exit(setup.status ?? 1);

const given = process.argv.slice(2);
const namesFiles = given.some((argument) => argument.endsWith('.spec.ts'));
const mocha = run('node_modules/mocha/bin/mocha.js', [
  '--fail-zero', // a suite that ran nothing has not passed
  '--forbid-only',
  ...given,
  // Two files at a time: each spends much of its time in one thread.
  ...(namesFiles ? [] : ['--parallel', '--jobs', '2', 'test/*.spec.ts']),
]);
if (mocha.signal !== null) {
  process.stdout.write(`The test process was ended by ${mocha.signal} in the test named last.\n`);
}
process.exit(mocha.status ?? 1);
