// Shows that the tests notice bugs in losses, trainer, metrics and readers: plants them one at a time in
// a copy of the tree and runs the tests that should see them, TypeScript through mocha, C++ as the native
// unit tests. Prints a table; exits 1 when more than one goes unnoticed or one has lost its line. Needs a
// set-up clone (npm test) and doctest. `node scripts/mutate.mjs [REGEXP]` plants only the bugs whose
// description it matches; with --check none, it only looks whether their lines still stand.

import { cpSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import {
  checkPlaces,
  compile,
  doctest,
  inTemporaryFolder,
  link,
  plant,
  ROOT,
  run,
} from './mutants.mjs';

/** C++: `mutated` is compiled for each bug, `fixed` once. */
const UNITS = {
  'loss maths': { mutated: 'test/native/loss_maths_test.cpp', fixed: ['test/native/main.cpp'] },
  records: {
    mutated: 'core/records.cpp',
    fixed: ['test/native/main.cpp', 'test/native/records_test.cpp', 'core/jpeg.cpp'],
  },
  jpeg: {
    mutated: 'core/jpeg.cpp',
    fixed: ['test/native/main.cpp', 'test/native/records_test.cpp', 'core/records.cpp'],
  },
};
const LIBRARIES = ['-ljpeg', '-lpthread'];

const MATHS = 'core/loss_maths.h';
const VERIFICATION = 'test/70.verification.spec.ts';

// `tests`: what mocha is given; a bug without them is one of C++ and names its unit.
const BUGS = [
  // Losses
  {
    bug: "hard mining: beta lost from the gate's derivative",
    unit: 'loss maths',
    file: MATHS,
    from: 'ratio * (T(1) + beta * A * (loss * closed))',
    to: 'ratio * (T(1) + A * loss * closed)',
  },
  {
    bug: "cross-entropy: the sign of the target's derivative",
    unit: 'loss maths',
    file: MATHS,
    from: 'return {loss, -sigmoid(d)};',
    to: 'return {loss, sigmoid(d)};',
  },
  {
    bug: 'margin: no step of 2 where the angle passes pi',
    unit: 'loss maths',
    file: MATHS,
    from: 'psi.value = sign * std::cos(phi) - T(2) * k - m3;',
    to: 'psi.value = sign * std::cos(phi) - m3;',
  },
  {
    bug: 'a-softmax: lambda rises to its floor and no further',
    tests: ['test/31.weighting.spec.ts'],
    file: 'src/loss.ts',
    from: 'return Math.max(floor, start / (1 + decay * step));',
    to: 'return Math.min(floor, start / (1 + decay * step));',
  },
  {
    bug: "arcface: the margin taken from the cosine, as cosface's",
    tests: ['test/10.config.spec.ts', 'test/31.weighting.spec.ts'],
    file: 'src/loss.ts',
    from: 'native.m2 = base.margin;',
    to: 'native.m3 = base.margin;',
  },
  {
    bug: 'the plateau of a collapsed network counts the own class',
    tests: ['test/31.weighting.spec.ts'],
    file: 'src/loss.ts',
    from: 'Math.log(classes - 1) + loss.scale',
    to: 'Math.log(classes) + loss.scale',
  },
  // Trainer
  {
    bug: 'the learning rate falls an epoch early',
    tests: ['test/10.config.spec.ts'],
    file: 'src/train/schedule.ts',
    from: 'epoch > milestone',
    to: 'epoch >= milestone',
  },
  {
    bug: 'the margin grows beyond its value',
    tests: ['test/10.config.spec.ts'],
    file: 'src/train/schedule.ts',
    from: 'Math.min(1, step / (marginWarmUp * stepsPerEpoch))',
    to: 'step / (marginWarmUp * stepsPerEpoch)',
  },
  {
    bug: 'means over calls instead of rows',
    tests: ['test/60.trainer.spec.ts', '--grep', 'health of a run'],
    file: 'src/train/health.ts',
    from: 'sum += part.rows * part[key];',
    to: 'sum += (mean.rows / parts.length) * part[key];',
  },
  {
    bug: 'a resumed epoch begins anew',
    tests: ['test/60.trainer.spec.ts', '--grep', 'two runs of one seed|stopped in mid-epoch'],
    file: 'src/trainer.ts',
    from: 'await batches.seek(start.epoch, start.step);',
    to: 'await batches.seek(start.epoch, 0);',
  },
  {
    bug: 'a checkpoint whose bytes differ from its manifest',
    tests: ['test/61.checkpoint.spec.ts'],
    file: 'src/train/checkpoint.ts',
    from: 'if ((await sha256OfFile(join(path, name))) !== sha256) {',
    to: 'if ((await sha256OfFile(join(path, name))).length !== sha256.length) {',
  },
  {
    bug: 'identities of the validation among those that train',
    tests: ['test/21.dataset.spec.ts', '--grep', 'splitIdentities'],
    file: 'src/data/split.ts',
    from: 'images.filter((i) => held.has(labels[i]!) === validation)',
    to: 'images.filter((i) => !validation || held.has(labels[i]!))',
  },
  // Metrics
  {
    bug: 'a distance on the threshold is one person',
    tests: [VERIFICATION],
    file: 'src/evaluate/protocols.ts',
    from: 'return value < threshold === same;',
    to: 'return value <= threshold === same;',
  },
  {
    bug: 'the last of equally good thresholds',
    tests: [VERIFICATION],
    file: 'src/evaluate/protocols.ts',
    from: 'if (right > most) [most, best] = [right, threshold];',
    to: 'if (right >= most) [most, best] = [right, threshold];',
  },
  {
    bug: 'a fold has a say in its own threshold',
    tests: [VERIFICATION],
    file: 'src/evaluate/verification.ts',
    from: 'const train = { genuine: kind(1, false), impostor: kind(0, false) };',
    to: 'const train = { genuine: scored.filter((_, i) => same[i] === 1).sort(), impostor: kind(0, false) };',
  },
  {
    bug: 'the sample deviation where the population one is meant',
    tests: [VERIFICATION],
    file: 'src/evaluate/verification.ts',
    from: 'Math.sqrt(squares / figures.length)',
    to: 'Math.sqrt(squares / (figures.length - 1))',
  },
  {
    bug: "one row brought to length 1 by another's norm",
    tests: [VERIFICATION],
    file: 'src/evaluate/pairs.ts',
    from: '(embeddings[b * dim + i]! - mean[i]!) * inverseNorms[b]!',
    to: '(embeddings[b * dim + i]! - mean[i]!) * inverseNorms[a]!',
  },
  {
    bug: 'the mirror image left out of the score',
    tests: ['test/71.lfw.spec.ts'],
    file: 'src/evaluate/pairs.ts',
    from: 'rows[at + i] = raw[from + i]! + mirrored![from + i]!;',
    to: 'rows[at + i] = raw[from + i]!;',
  },
  // Readers
  {
    bug: 'safetensors: a hole between two tensors',
    tests: ['test/50.safetensors.spec.ts'],
    file: 'src/formats/safetensors.ts',
    from: 'if (entry.begin !== covered) {',
    to: 'if (entry.begin < covered) {',
  },
  {
    bug: "pickle: an array with more bytes than its shape's",
    tests: ['test/23.verification-bin.spec.ts'],
    file: 'src/formats/pickle.ts',
    from: 'if (stored !== expected) {',
    to: 'if (stored < expected) {',
  },
  {
    bug: 'lists of images: a path that leads out',
    tests: ['test/26.hostile-files.spec.ts', '--grep', 'lead out'],
    file: 'src/data/image-list.ts',
    from: "plain === '..' || plain.startsWith('../')",
    to: "plain === '..'",
  },
  {
    bug: 'RecordIO: cut at a magic word that is not aligned',
    tests: ['test/20.recordio.spec.ts', '--grep', 'encodeRecord'],
    file: 'src/formats/recordio.ts',
    from: 'if (found % 4 === 0) {',
    to: 'if (found % 2 === 0) {',
  },
  {
    bug: 'RecordIO: a payload whose checksum is another',
    unit: 'records',
    file: 'core/records.cpp',
    from: 'if (found != checksums_[i]) {',
    to: 'if (found == 0) {',
  },
  {
    bug: 'RecordIO: records that lie inside one another',
    unit: 'records',
    file: 'core/records.cpp',
    from: 'if (entry.offset < previous_end) {',
    to: 'if (entry.offset + 8 < previous_end && entry.offset == 0) {',
  },
  {
    bug: 'JPEG: damaged data filled with grey',
    unit: 'jpeg',
    file: 'core/jpeg.cpp',
    from: 'if (level < 0) fail(info);',
    to: 'if (level < -1) fail(info);',
  },
];

/** Times what a spec takes when nothing is wrong. */
const SPEC_SECONDS = 600;

/** Runs specs in the copy of the tree; undefined when they pass, else the first test that failed. */
async function mocha(tree, tests) {
  const { status, signal, output } = await run(
    process.execPath,
    [join(ROOT, 'node_modules/mocha/bin/mocha.js'), '--bail', '--fail-zero', ...tests],
    { seconds: SPEC_SECONDS, cwd: tree },
  );
  if (status === 0) return undefined;
  const name = /^ +1\) (.*)/m.exec(output)?.[1];
  return { by: name ?? `its end by ${signal ?? `status ${status}`}`, output };
}

/** A copy of what mocha runs; what is large or built is linked. */
function copyTree(folder) {
  const tree = join(folder, 'tree');
  mkdirSync(tree);
  const copied = ['src', 'test', 'scripts', 'npm', 'package.json', 'package-lock.json'];
  for (const name of [...copied, 'tsconfig.json', '.mocharc.json']) {
    cpSync(join(ROOT, name), join(tree, name), { recursive: true });
  }
  for (const name of ['node_modules', 'build']) symlinkSync(join(ROOT, name), join(tree, name));
  return tree;
}

async function plantAll(bugs) {
  await inTemporaryFolder(async (folder) => {
    const objectOf = (source) => join(folder, `${basename(source)}.o`);
    const units = Object.keys(UNITS).filter((name) => bugs.some(({ unit }) => unit === name));
    for (const source of new Set(
      units.flatMap((name) => [UNITS[name].mutated, ...UNITS[name].fixed]),
    )) {
      await compile(source, objectOf(source));
    }
    for (const name of units) {
      const program = join(folder, 'test');
      await link([UNITS[name].mutated, ...UNITS[name].fixed].map(objectOf), program, LIBRARIES);
      const failure = await doctest(program);
      if (failure) throw new Error(`The tests fail without any planted bug:\n${failure.output}`);
    }
    const tree = copyTree(folder);
    for (const tests of new Set(bugs.flatMap(({ tests }) => (tests ? [tests.join('\t')] : [])))) {
      const failure = await mocha(tree, tests.split('\t'));
      if (failure) throw new Error(`The tests fail without any planted bug:\n${failure.output}`);
    }
    await plant(bugs, {
      folder,
      inFlight: 1, // the copy of the tree holds one bug at a time
      mayMiss: 1,
      async judge({ unit, tests, file }, copy, text) {
        if (unit !== undefined) {
          const object = join(copy, 'mutated.o');
          const program = join(copy, 'test');
          const { mutated, fixed } = UNITS[unit];
          const source = mutated === file ? join(copy, file) : mutated;
          await compile(source, object, { first: copy });
          await link([object, ...fixed.map(objectOf)], program, LIBRARIES);
          return (await doctest(program))?.by;
        }
        writeFileSync(join(tree, file), text);
        const failure = await mocha(tree, tests);
        cpSync(join(ROOT, file), join(tree, file));
        return failure?.by;
      },
    });
  });
}

if (process.argv[2] === '--check') checkPlaces(BUGS);
else await plantAll(BUGS.filter(({ bug }) => new RegExp(process.argv[2] ?? '').test(bug)));
