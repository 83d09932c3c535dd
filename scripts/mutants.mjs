// What the mutation scripts share: planting bugs, each an exact piece of text put in place of another,
// and telling what noticed them.

import { spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const ROOT = fileURLToPath(new URL('..', import.meta.url));

/** Runs a program; resolves with its exit status (null: ended by a signal) and all it printed. */
export function run(program, args, { seconds = 600, cwd = ROOT } = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { cwd, timeout: seconds * 1000 });
    let output = '';
    child.stdout.on('data', (data) => (output += data));
    child.stderr.on('data', (data) => (output += data));
    child.on('error', reject);
    child.on('close', (status, signal) => resolve({ status, signal, output }));
  });
}

/** Does `work` on every item, `inFlight` at once. */
export async function each(items, inFlight, work) {
  const left = [...items];
  const worker = async () => {
    for (let item = left.shift(); item !== undefined; item = left.shift()) await work(item);
  };
  await Promise.all(Array.from({ length: inFlight }, worker));
}

/** Calls `work` with a temporary folder and takes it away again. */
export async function inTemporaryFolder(work) {
  const folder = mkdtempSync(join(tmpdir(), 'hardmine-mutants-'));
  try {
    return await work(folder);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** The text of `file` with the bug in it; undefined, and the reason told, where its line is not there once. */
function mutated({ file, from, to }) {
  const text = readFileSync(join(ROOT, file), 'utf8');
  const times = text.split(from).length - 1;
  if (times !== 1) {
    return { problem: `NOT PLANTED: its line is ${times > 1 ? 'twice' : 'no longer'} in ${file}` };
  }
  return { text: text.replace(from, () => to) };
}

/** Whether every bug's line is still there, once; told, and the exit status, where one is not. */
export function checkPlaces(bugs) {
  for (const bug of bugs) {
    const { problem } = mutated(bug);
    if (problem === undefined) continue;
    console.log(`${bug.bug}: ${problem}`);
    process.exitCode = 1;
  }
}

/** Compiles one C++ file; `first` is searched before the tree, for a file that takes another's place. */
export async function compile(source, object, { first, flags = [] } = {}) {
  const args = ['-std=c++20', '-O1', '-Wno-unknown-pragmas', ...flags];
  if (first !== undefined) args.push('-I', first);
  args.push('-I', '.', '-x', 'c++', '-c', source, '-o', object);
  const { status, output } = await run(process.env.CXX ?? 'g++', args);
  if (status !== 0) throw new Error(`${source} does not compile:\n${output}`);
}

export async function link(objects, program, libraries) {
  const { status, output } = await run(process.env.CXX ?? 'g++', [
    ...objects,
    ...['-o', program, ...libraries],
  ]);
  if (status !== 0) throw new Error(`${program} does not link:\n${output}`);
}

const TEST_SECONDS = 600; // many times what a suite takes; a bug may make a kernel wait for ever

/** Runs a doctest program; undefined when it passes, else the first test that failed and all it printed. */
export async function doctest(program) {
  const { status, signal, output } = await run(program, ['--abort-after=1'], {
    seconds: TEST_SECONDS,
  });
  if (status === 0) return undefined;
  const name = /TEST CASE: +(.*)/.exec(output)?.[1];
  return { by: name ?? `its end by ${signal ?? `status ${status}`}`, output };
}

/**
 * Plants every bug in a copy of its file, below a folder of its own, and prints what noticed it.
 * @param judge given the bug, that folder and the whole mutated text, resolves with the name of the test
 *   that failed, or undefined
 * @param mayMiss how many may go unnoticed
 */
export async function plant(bugs, { folder, inFlight, judge, mayMiss = 0 }) {
  const missed = [];
  console.log(`${'planted bug'.padEnd(64)} caught by`);
  await each(bugs.entries(), inFlight, async ([index, bug]) => {
    const { text, problem } = mutated(bug);
    let verdict = problem;
    if (text !== undefined) {
      const copy = join(folder, String(index));
      mkdirSync(join(copy, dirname(bug.file)), { recursive: true });
      writeFileSync(join(copy, bug.file), text);
      verdict = (await judge(bug, copy, text)) ?? 'NOTHING';
      rmSync(copy, { recursive: true });
    }
    if (/^NO/.test(verdict)) missed.push(bug.bug);
    console.log(`${bug.bug.padEnd(64)} ${verdict}`);
  });
  console.log(`${bugs.length - missed.length} of ${bugs.length} planted bugs were caught.`);
  if (missed.length > mayMiss || bugs.length === 0) process.exitCode = 1;
}
