// Formats the native sources with clang-format; --check changes nothing and fails where it would.

import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const files = ['binding', 'core', 'cpu', 'cuda', 'test/native', 'test/simt']
  .filter((folder) => existsSync(join(root, folder)))
  .flatMap((folder) =>
    readdirSync(join(root, folder), { recursive: true }).map((name) => join(folder, name)),
  )
  .filter((name) => /\.(h|cpp|cu|cuh)$/.test(name))
  .sort();
const mode = process.argv.includes('--check') ? ['--dry-run', '--Werror'] : ['-i'];
const binary = createRequire(import.meta.url)('clang-format').getNativeBinary();
const { status } = spawnSync(binary, [...mode, ...files], { cwd: root, stdio: 'inherit' });
process.exit(status ?? 1);
