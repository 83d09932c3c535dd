// Feeds the readers of files from outside with damaged files (test/fuzz/): each target in a process of
// its own, which is replaced when it dies.
//
//   node scripts/fuzz.mjs [TARGET...] [--minutes M | --inputs N] [--from N]
//
// One minute a target by default. Prints inputs, inputs a second, what came of them and the peak of
// memory; saves an input that made a reader fail to test/fuzz/corpus/TARGET/, where `npm test` replays
// it, and exits 1. The same numbers are the same inputs: --from goes on behind those of an earlier run.

import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { register } from 'tsx/esm/api';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
/** A reader that is silent for so long hangs: an input takes milliseconds. */
const SILENCE_SECONDS = 120;
/** Kinds of defect after which a target has told enough. */
const ENOUGH = 20;

register();
const { TARGETS, corpusOf } = await import('../test/fuzz/targets.ts');

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    minutes: { type: 'string' },
    inputs: { type: 'string' },
    from: { type: 'string', default: '0' },
  },
});

/** Runs test/fuzz/fuzz.ts; resolves with the numbers it reached and how it ended. */
function run(options, onDefect) {
  const argv = Object.entries(options).map(([name, value]) => `--${name}=${value}`);
  return new Promise((resolve, reject) => {
    const child = spawn(
      process.execPath,
      // Small young generations: garbage that nobody collects yet looks like memory that is taken.
      ['--expose-gc', '--max-semi-space-size=1', '--import=tsx', 'test/fuzz/fuzz.ts', ...argv],
      { cwd: ROOT, stdio: ['ignore', 'pipe', 'pipe'] },
    );
    let hangs = false;
    let stderr = '';
    let reached = options.from;
    let done;
    const silence = setTimeout(() => {
      hangs = true;
      child.kill('SIGKILL');
    }, 1000 * SILENCE_SECONDS);
    child.stderr.on('data', (data) => (stderr += data));
    createInterface(child.stdout).on('line', (line) => {
      silence.refresh();
      const message = JSON.parse(line);
      if (message.type === 'at') reached = message.index;
      else if (message.type === 'done') done = message;
      else onDefect(message.sort, message.what, Buffer.from(message.input, 'base64'));
    });
    child.on('error', reject);
    child.on('close', (status, signal) => {
      clearTimeout(silence);
      const end = hangs ? `${SILENCE_SECONDS} s of silence` : (signal ?? `status ${status}`);
      resolve({ done, reached, end, stderr });
    });
  });
}

async function fuzz(target, { from, inputs, seconds }) {
  const kinds = new Map();
  const save = (sort, what, input) => {
    if (kinds.has(sort)) return;
    const digest = createHash('sha256').update(input).digest('hex').slice(0, 12);
    const path = join(corpusOf(target), `defect-${digest}`);
    kinds.set(sort, path);
    writeFileSync(path, input);
    console.log(`${target}: ${what}\n  saved as ${path}`);
  };
  const folder = mkdtempSync(join(tmpdir(), 'hardmine-fuzz-'));
  const total = { target, inputs: 0, seconds: 0, value: 0, refused: 0, peak: 0, resident: 0 };
  let deaths = 0;
  try {
    const began = performance.now();
    for (let next = from; kinds.size + deaths < ENOUGH; ) {
      const left = seconds - (performance.now() - began) / 1000;
      if (next >= from + inputs || left <= 0) break;
      const { done, reached, end, stderr } = await run(
        { target, from: next, to: from + inputs, seconds: left },
        save,
      );
      if (done) {
        total.value += done.counts.value;
        total.refused += done.counts.refused;
        total.peak = Math.max(total.peak, done.peak);
        total.resident = Math.max(total.resident, done.resident);
        next += done.inputs;
        total.inputs = next - from;
        break;
      }
      deaths += 1;
      // Once more, slowly, to see which input it was.
      const keep = join(folder, 'input');
      rmSync(keep, { force: true });
      const again = await run(
        { target, from: reached, to: from + inputs, seconds: left, keep },
        save,
      );
      if (again.done || next === again.reached)
        throw new Error(`${target} ended by ${end}: ${stderr}`);
      save(
        again.end,
        `the process ended by ${again.end}\n${again.stderr.slice(0, 4000)}`,
        readFileSync(keep),
      );
      next = again.reached + 1;
      total.inputs = next - from;
    }
    total.seconds = (performance.now() - began) / 1000;
  } finally {
    rmSync(folder, { recursive: true });
  }
  return { ...total, defects: kinds.size };
}

function printRow(cells) {
  const widths = [20, 9, 9, 9, 9, 8, 11, 11];
  console.log(
    cells.map((cell, i) => String(cell)[i === 0 ? 'padEnd' : 'padStart'](widths[i])).join(' '),
  );
}

const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(0)} MiB`;

const wanted = positionals.length > 0 ? positionals : Object.keys(TARGETS);
const unknown = wanted.filter((name) => !(name in TARGETS));
if (unknown.length > 0) {
  console.log(`There is no target ${unknown.join(', ')}: ${Object.keys(TARGETS).join(', ')}.`);
  process.exit(2);
}
const inputs = values.inputs === undefined ? Number.POSITIVE_INFINITY : Number(values.inputs);
const minutes = Number(
  values.minutes ?? (values.inputs === undefined ? 1 : Number.POSITIVE_INFINITY),
);
printRow(['target', 'inputs', 'a second', 'read', 'refused', 'defects', 'grew by', 'from']);
for (const target of wanted) {
  const row = await fuzz(target, { from: Number(values.from), inputs, seconds: 60 * minutes });
  printRow([
    ...[target, row.inputs, Math.round(row.inputs / row.seconds), row.value, row.refused],
    ...[row.defects, mib(row.peak), mib(row.resident)],
  ]);
  if (row.defects > 0) process.exitCode = 1;
}
