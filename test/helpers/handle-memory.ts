/**
 * What handles leave behind, in a process of its own: `handle-memory.ts KIND cycles N` makes and disposes N
 * handles after as many to warm up and prints the slope of the memory in bytes a cycle;
 * `handle-memory.ts KIND undisposed N` drops N without disposing them and prints the peak above the base.
 * KIND is one of handleKinds(). Run it with --expose-gc and, for a slope, --max-semi-space-size=1 and
 * MALLOC_ARENA_MAX=1: V8's young generation and glibc's arenas, one for each of the first 8 threads a core,
 * grow for some thousands of cycles and then no more.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { loadAddon } from '../../src/native.js';
import { handleKinds } from './native-handles.js';
import { packColours } from './packed-colours.js';

const [kind = '', mode, count = '0'] = process.argv.slice(2);
const cycles = Number(count);

/** Bytes of this process that no file backs. */
function anonymous(): number {
  const kibibytes = /^Anonymous:\s+(\d+)/m.exec(readFileSync('/proc/self/smaps_rollup', 'utf8'));
  return 1024 * Number(kibibytes?.[1]);
}

async function collect(): Promise<void> {
  for (let i = 0; i < 3; i++) {
    globalThis.gc?.();
    await setTimeout(5); // for the finalizers, which run as tasks
  }
}

const folder = mkdtempSync(join(tmpdir(), 'hardmine-memory-'));
const files = await packColours(folder, 5, 4);
const { make } = handleKinds(loadAddon('cpu'), files)[kind]!;

async function cycle(): Promise<void> {
  const { handle, also } = await make();
  for (const one of [handle, ...also]) await one.dispose();
}

async function slope(): Promise<number> {
  for (let i = 0; i < cycles; i++) await cycle();
  await collect();
  const before = anonymous();
  for (let i = 0; i < cycles; i++) await cycle();
  await collect();
  return (anonymous() - before) / cycles;
}

async function peak(): Promise<number> {
  await cycle();
  await collect();
  const base = process.memoryUsage().rss;
  for (let i = 0; i < cycles; i++) {
    await make();
    if (i % 50 === 0) await setTimeout(1); // as a program that awaits something else now and then
  }
  return 1024 * process.resourceUsage().maxRSS - base;
}

process.stdout.write(String(mode === 'cycles' ? await slope() : await peak()));
rmSync(folder, { recursive: true });
process.exit(0);
