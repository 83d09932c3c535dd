/** The package as its users have it: compiled to dist/. */
import { spawnSync } from 'node:child_process';
import { dirname } from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

/** Compiles src/ to dist/ where that is not of these sources. */
export function buildDist(): void {
  const args = ['scripts/setup.mjs', '--only', 'dist'];
  const { status, stderr } = spawnSync(process.execPath, args, { cwd: ROOT, encoding: 'utf8' });
  if (status !== 0) throw new Error(`node ${args.join(' ')} failed:\n${stderr}`);
}
