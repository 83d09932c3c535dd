/** Damaged files: the corpora are read again, and some of the mutator's; `npm run test:fuzz` goes on for hours. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { HardmineError } from '../src/errors.js';
import { loadAddon } from '../src/native.js';
import { attempt } from './fuzz/attempt.js';
import { readCorpus } from './fuzz/corpus.js';
import { Mutator } from './fuzz/mutator.js';
import { type Reader, TARGETS } from './fuzz/targets.js';
import { skip } from './helpers/skip.js';

/** Mutated inputs a target; most take a tenth of a millisecond, those that become files one. */
const MUTATED = 150;

const reader = (read: Reader['read']): Reader => ({ read });
const input = Buffer.from('x');

describe('damaged files', function () {
  this.timeout(30_000); // two seconds a target at most, alone on a machine
  before(function () {
    try {
      loadAddon('cpu');
    } catch (error) {
      skip(this, (error as Error).message);
    }
  });

  for (const [name, target] of Object.entries(TARGETS)) {
    if (target.slow) continue;
    it(`give a value or a sentence: ${name}`, async () => {
      const folder = await mkdtemp(join(tmpdir(), 'hardmine-fuzz-'));
      try {
        const reader = await target.open(folder);
        const seeds = readCorpus(name);
        const kinds = new Set<string>();
        for (const { name: seed, bytes } of seeds) {
          const outcome = await attempt(reader, bytes);
          assert.notEqual(outcome.kind, 'defect', `${seed}: ${JSON.stringify(outcome)}`);
          kinds.add(outcome.kind);
        }
        // A corpus of which nothing is read tests the first check and no other.
        assert.ok(kinds.has('value'), 'no seed is sound');
        const bytes = seeds.map((seed) => seed.bytes);
        const mutator = new Mutator(bytes, target.words);
        for (let index = 0; index < MUTATED; index += 1) {
          const outcome = await attempt(reader, mutator.input(index));
          assert.notEqual(outcome.kind, 'defect', `input ${index}: ${JSON.stringify(outcome)}`);
        }
        await reader.close?.();
      } finally {
        await rm(folder, { recursive: true });
      }
    });
  }

  it('are the same on every run, and differ from number to number', () => {
    const seeds = [Buffer.from('{"a":[1,2,3]}'.repeat(20)), Buffer.from([...Array(300).keys()])];
    const [one, two] = [new Mutator(seeds, ['word']), new Mutator(seeds, ['word'])];
    const inputs = Array.from({ length: 500 }, (_, index) => one.input(index).toString('latin1'));
    assert.deepEqual(
      inputs,
      Array.from(inputs, (_, index) => two.input(index).toString('latin1')),
    );
    // One in eighty is cut to nothing, and a change may change nothing.
    assert.ok(new Set(inputs).size > 450, `${new Set(inputs).size} of 500 are different`);
    assert.deepEqual(seeds[1], Buffer.from([...Array(300).keys()]), 'seeds stay as they are');
  });

  it('are told apart from what they find', async () => {
    const fails = (error: unknown) => reader(() => Promise.reject(error));
    const sorts: [Reader, RegExp][] = [
      [fails(new TypeError('x is undefined')), /29\.fuzz/],
      [fails('text'), /text/],
      [fails(new HardmineError('ERR_INTERNAL', 'report this')), /ERR_INTERNAL/],
      [fails(new HardmineError('ERR_DATA', 'a\nb')), /control characters/],
      [fails(new HardmineError('ERR_DATA', '\x1b[2J')), /control characters/],
      [fails(new HardmineError('ERR_DATA', 'a'.repeat(5000))), /long message/],
    ];
    for (const [broken, sort] of sorts) {
      const outcome = await attempt(broken, input);
      assert.equal(outcome.kind, 'defect');
      assert.match(outcome.sort, sort);
    }
    assert.deepEqual(
      await attempt(
        reader(() => 1),
        input,
      ),
      { kind: 'value' },
    );
    assert.deepEqual(await attempt(fails(new HardmineError('ERR_DATA', 'no.')), input), {
      kind: 'refused',
    });
  });

  it('are read from the command line', async () => {
    const script = fileURLToPath(new URL('../scripts/fuzz.mjs', import.meta.url));
    const { stdout } = await promisify(execFile)(process.execPath, [
      ...[script, 'pickle', '--inputs', '300'],
    ]);
    assert.match(stdout, /^target +inputs .*\npickle +300 +\d+ +\d+ +\d+ +0 +\d+ MiB +\d+ MiB\n$/);
  });
});
