// Runs what takes longer than `npm test` may: test/soak. Sets up what is missing first. Arguments go to
// mocha: file names, --grep and the like.

import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const run = (script, args) =>
  spawnSync(process.execPath, [join(root, script), ...args], { cwd: root, stdio: 'inherit' });

const setup = run('scripts/setup.mjs', []);
if (setup.status !== 0) process.exit(setup.status ?? 1);

const given = process.argv.slice(2);
const namesFiles = given.some((argument) => argument.endsWith('.spec.ts'));
const mocha = run('node_modules/mocha/bin/mocha.js', [
  '--fail-zero', // a suite that ran nothing has not passed
  '--forbid-only',
  ...given,
  ...(namesFiles ? [] : ['test/soak/*.spec.ts']),
]);
process.exit(mocha.status ?? 1);
