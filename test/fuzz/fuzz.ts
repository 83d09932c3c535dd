/**
 * Feeds one reader with damaged files, in a process of its own that it may take down: the inputs number
 * `from` up to `to`, or until `seconds` have passed. Prints a JSON object a line: how far it is twice a
 * second, each defect with its input, and a summary. With `keep`, every input stands in that file while
 * it is read, to be found after the process has died.
 */
import { mkdtempSync, rmSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { forgetPeak, peakBytes, residentBytes } from '../helpers/memory.js';
import { attempt } from './attempt.js';
import { readCorpus } from './corpus.js';
import { Mutator } from './mutator.js';
import { type Reader, TARGETS } from './targets.js';

/** What a reader may take beside four times its input. */
const SPARE_BYTES = 64 * 2 ** 20;
/** Inputs between two looks at the memory, which cost as much as an input. */
const GROUP = 64;
/** Inputs between two collections of garbage, which would count as taken. */
const COLLECT = 1024;
const REPORT_MS = 500;

const { values } = parseArgs({
  options: {
    target: { type: 'string' },
    from: { type: 'string', default: '0' },
    to: { type: 'string', default: 'Infinity' },
    seconds: { type: 'string', default: 'Infinity' },
    keep: { type: 'string' },
  },
});
const [from, to, seconds] = [Number(values.from), Number(values.to), Number(values.seconds)];
const name = values.target!;
const target = TARGETS[name]!;
const collect = globalThis.gc!;

const say = (line: object): void => {
  writeSync(1, `${JSON.stringify(line)}\n`);
};
const allowed = (bytes: number): number => SPARE_BYTES + 4 * bytes;

/** Which of a group of inputs takes more memory than it may, if one alone does. */
async function findGreedy(reader: Reader, group: readonly Buffer[]): Promise<Buffer | undefined> {
  for (const input of group) {
    collect();
    forgetPeak();
    const before = residentBytes();
    await attempt(reader, input);
    if (peakBytes() - before > allowed(input.length)) return input;
  }
  return undefined;
}

// In memory where there is a file system for it: a disk would be worn by millions of files.
const folder = mkdtempSync(
  join(process.platform === 'linux' ? '/dev/shm' : tmpdir(), 'hardmine-fuzz-'),
);
try {
  const reader = await target.open(folder);
  const seeds = readCorpus(name).map(({ bytes }) => bytes);
  const mutator = new Mutator(seeds, target.words);
  for (const seed of seeds) await attempt(reader, seed); // what is loaded once counts for nobody
  collect();
  forgetPeak();
  const resident = residentBytes();
  let peak = 0;
  let defects = 0;
  const counts = { value: 0, refused: 0, defect: 0 };
  const defect = (index: number, sort: string, what: string, input: Buffer): void => {
    defects += 1;
    say({ type: 'defect', index, sort, what, input: input.toString('base64') });
  };

  const started = performance.now();
  let reported = started;
  let group: Buffer[] = [];
  let index = from;
  for (; index < to; index += 1) {
    const now = performance.now();
    if (now - started > 1000 * seconds) break;
    if (now - reported > REPORT_MS) {
      reported = now;
      say({ type: 'at', index });
    }
    const input = mutator.input(index);
    if (values.keep !== undefined) writeFileSync(values.keep, input);
    const outcome = await attempt(reader, input);
    counts[outcome.kind] += 1;
    if (outcome.kind === 'defect') defect(index, outcome.sort, outcome.what, input);
    group.push(input);
    if (group.length === GROUP) {
      const taken = peakBytes() - resident;
      if (taken > allowed(Math.max(...group.map(({ length }) => length)))) {
        const greedy = await findGreedy(reader, group);
        if (greedy !== undefined) defect(index, 'memory', `took ${taken} bytes of memory`, greedy);
        forgetPeak();
      }
      peak = Math.max(peak, taken);
      group = [];
    }
    if (index % COLLECT === 0) collect();
  }
  await reader.close?.();
  say({
    type: 'done',
    inputs: index - from,
    seconds: (performance.now() - started) / 1000,
    counts,
    defects,
    peak: Math.max(peak, peakBytes() - resident),
    resident,
  });
} finally {
  rmSync(folder, { recursive: true, force: true });
}
