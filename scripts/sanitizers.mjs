// Builds the core, the CPU backend, the binding and their unit tests with AddressSanitizer and
// UndefinedBehaviorSanitizer, and the reader's tests with ThreadSanitizer, both under build-asan/, and
// runs them; then a short training in Node with the sanitized addon (test/sanitizers/training.mjs). The
// last line is `N parts clean, N with reports`; the status is 1 where any has one. Needs g++ with its
// sanitizers (Debian's g++ brings them).

import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
/** Laid out as the repository is: dist/native.js looks for the addon in ../build/Release. */
const OUT = join(ROOT, 'build-asan');
const BUILD = join(OUT, 'build');
const THREADS_BUILD = join(OUT, 'build-tsan');
const PARALLEL = process.env.CMAKE_BUILD_PARALLEL_LEVEL ?? '2';

/** Asserts of ours and of the library stay on; without any optimisation the networks take an hour. */
const FLAGS = '-O1 -g -UNDEBUG -D_GLIBCXX_ASSERTIONS';

/** Reports go to stderr and end the program, so that its status tells. */
const SANITIZED = {
  // Node and V8 keep what they took until the end of the process: no leak of ours can be told from it.
  ASAN_OPTIONS: 'detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1',
  UBSAN_OPTIONS: 'halt_on_error=1:print_stacktrace=1',
  TSAN_OPTIONS: 'halt_on_error=1:second_deadlock_stack=1',
};

function run(program, args, env = {}) {
  const result = spawnSync(program, args, {
    cwd: ROOT,
    stdio: 'inherit',
    env: { ...process.env, ...SANITIZED, ...env },
  });
  if (result.error !== undefined) console.log(`${program} did not run: ${result.error.message}`);
  return result.status === 0;
}

function need(done, what) {
  if (done) return;
  console.log(`sanitizers: ${what} failed; see above.`);
  process.exit(1);
}

const cmakeJs = (...args) =>
  run(process.execPath, [
    ...['node_modules/cmake-js/bin/cmake-js', ...args, '--out', BUILD, '--log-level', 'warn'],
  ]);

need(run(process.execPath, ['scripts/setup.mjs', '--only', 'packages']), 'the set-up');
need(
  cmakeJs(
    'configure',
    '--CDHARDMINE_TESTS=ON',
    '--CDHARDMINE_SANITIZE=address,undefined',
    `--CDCMAKE_CXX_FLAGS_RELEASE=${FLAGS}`,
  ),
  'the configuration',
);
const targets = ['hardmine_cpu_addon', 'test_data', 'test_head', 'test_network'];
need(
  run('cmake', ['--build', BUILD, '--parallel', PARALLEL, '--target', ...targets]),
  'the build with AddressSanitizer',
);
need(
  run('cmake', [
    ...['-S', '.', '-B', THREADS_BUILD, '-DHARDMINE_TESTS=ON', '-DHARDMINE_SANITIZE=thread'],
    `-DCMAKE_CXX_FLAGS_RELEASE=${FLAGS}`,
  ]) && run('cmake', ['--build', THREADS_BUILD, '--parallel', PARALLEL, '--target', 'test_data']),
  'the build with ThreadSanitizer',
);
need(
  run(process.execPath, ['node_modules/typescript/bin/tsc', '--outDir', join(OUT, 'dist')]),
  'the compilation of src/',
);

/** Node itself is not sanitized, so the libraries have to be there before the addon is. */
const libraries = ['libasan.so', 'libubsan.so'].map((name) =>
  spawnSync('g++', [`-print-file-name=${name}`], { encoding: 'utf8' }).stdout.trim(),
);
const parts = [
  ['test_data with AddressSanitizer', () => run(join(BUILD, 'test_data'), [])],
  ['test_head with AddressSanitizer', () => run(join(BUILD, 'test_head'), [])],
  ['test_network with AddressSanitizer', () => run(join(BUILD, 'test_network'), [])],
  ['test_data with ThreadSanitizer', () => run(join(THREADS_BUILD, 'test_data'), [])],
  [
    'a training in Node with AddressSanitizer',
    () =>
      run(process.execPath, ['test/sanitizers/training.mjs', join(OUT, 'dist')], {
        LD_PRELOAD: libraries.join(' '),
      }),
  ],
];
const results = parts.map(([name, work]) => {
  const clean = work();
  console.log(`${clean ? 'clean' : 'REPORTS'}: ${name}`);
  return clean;
});
const clean = results.filter(Boolean).length;
console.log(`${clean} parts clean, ${results.length - clean} with reports`);
process.exitCode = clean === results.length ? 0 : 1;
