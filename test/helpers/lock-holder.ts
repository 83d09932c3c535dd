/** Processes that hold the lock of a folder, through dist/ as a user's program has it. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { ROOT } from './built.js';

/** Where it is. */
export const LOCK_MODULE = pathToFileURL(join(ROOT, 'dist/data/folder-lock.js')).href;

/** A program that locks `folder` as `lock`, goes on with `rest` and says 'held'. */
export const holding = (folder: string, rest = ''): string =>
  `const { FolderLock } = await import(${JSON.stringify(LOCK_MODULE)});
   let lock = await FolderLock.take(${JSON.stringify(folder)});
   process.stdout.write('held');
   ${rest}`;

/** Starts one; resolves once it holds the lock. */
export async function startHolder(
  folder: string,
  rest: string,
  { flags = [], env = {} }: { flags?: string[]; env?: Record<string, string> } = {},
): Promise<ChildProcess> {
  const program = holding(folder, rest);
  const child = spawn(process.execPath, [...flags, '--input-type=module', '--eval', program], {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...process.env, ...env },
  });
  await Promise.race([
    once(child.stdout!, 'data'),
    once(child, 'close').then(() => Promise.reject(new Error('it ended without the lock'))),
  ]);
  return child;
}

/** How a process ends. */
export async function endOf(
  child: ChildProcess,
): Promise<{ code: number | null; signal: NodeJS.Signals | null }> {
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
  return { code: child.exitCode, signal: child.signalCode };
}
