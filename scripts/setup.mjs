// Sets up whatever a clone lacks: npm packages, compiler and libraries, the native addon, dist/.
// Plain Node without dependencies, since it runs before there are any. Says each step on stderr and
// does nothing, silently, when all is there.
//
//   node scripts/setup.mjs [--only packages|native|dist] [--tests] [--cuda]
//
// --tests also builds the native unit tests; --cuda also the CUDA addon, where nvcc is. A machine with
// an NVIDIA driver gets that addon without being asked.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import * as fs from 'node:fs';
import { createServer } from 'node:net';
import { availableParallelism, constants, homedir } from 'node:os';
import { dirname, join, relative } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
const BUILD = join(ROOT, 'build');
const ADDON = join(BUILD, 'Release', 'hardmine_cpu.node');
const CUDA_ADDON = join(BUILD, 'Release', 'hardmine_cuda.node');

/** A failure that a person can mend: printed without a stack trace. */
class SetupError extends Error {}

const say = (text) => process.stderr.write(`set-up: ${text}\n`);
const read = (path) => fs.readFileSync(path, 'utf8');
const readIfThere = (path) => (fs.existsSync(path) ? read(path) : null);

/** Runs a command with its output on stderr. */
const spawn = (command, args, env) =>
  spawnSync(command, args, {
    cwd: ROOT,
    stdio: ['ignore', 2, 2],
    env: { ...process.env, ...env },
  });

const runs = (command, args, env) => spawn(command, args, env).status === 0;

/** Runs a command that must succeed; `mend` says what to do when it does not. */
function run(command, args, { env, mend }) {
  const result = spawn(command, args, env);
  if (result.status === 0) return;
  const how = result.error?.message ?? result.signal ?? `exit code ${result.status}`;
  throw new SetupError(`\`${[command, ...args].join(' ')}\` failed (${how}): ${mend}`);
}

const succeeds = (command, args) => spawnSync(command, args, { stdio: 'ignore' }).status === 0;

function checkNode() {
  const [major, minor] = process.versions.node.split('.').map(Number);
  const fits = (major === 20 && minor >= 19) || (major === 22 && minor >= 12) || major > 22;
  if (fits) return;
  throw new SetupError(
    `Node ${process.versions.node} was found but hardmine needs 20.19 or later in that line, or 22.12 or later: install it from your package manager or nodejs.org.`,
  );
}

/**
 * Runs `work` while no other set-up works on this clone. The lock is a socket in Linux's abstract
 * namespace: it ends with its process, however that ends, so there is no stale lock to find.
 */
async function withLock(work) {
  if (process.platform !== 'linux') return work();
  const name = `\0hardmine set-up ${createHash('sha256').update(ROOT).digest('hex')}`;
  for (let waiting = false; ; waiting = true) {
    const server = createServer();
    try {
      server.listen(name);
      await once(server, 'listening');
    } catch (error) {
      if (error.code !== 'EADDRINUSE') throw error;
      if (!waiting) say('waiting for another set-up of this clone');
      await setTimeout(200); // milliseconds between looks
      continue;
    }
    try {
      return work();
    } finally {
      server.close();
    }
  }
}

// --- npm packages ---

/**
 * Whether node_modules holds what package-lock.json asks for, by the list that npm keeps of what it
 * installed. Compared by content: file times say nothing in a fresh clone.
 */
function packagesComplete() {
  const installed = readIfThere(join(ROOT, 'node_modules', '.package-lock.json'));
  if (installed === null) return false;
  const have = JSON.parse(installed).packages;
  const wanted = Object.entries(JSON.parse(read(join(ROOT, 'package-lock.json'))).packages);
  return wanted.every(
    ([path, entry]) =>
      path === '' ||
      !isForThisMachine(entry) ||
      (have[path]?.version === entry.version && fs.existsSync(join(ROOT, path, 'package.json'))),
  );
}

function isForThisMachine({ optional, os, cpu, libc }) {
  if (!optional) return true;
  // An optional package that names no platform belongs to one that does: npm decides.
  if (!os && !cpu) return false;
  const matches = (list, value) => !list || list.includes(value);
  return (
    matches(os, process.platform) &&
    matches(cpu, process.arch) &&
    matches(libc, process.report.getReport().header.glibcVersionRuntime ? 'glibc' : 'musl')
  );
}

/** Whether this is a clone, and not the package as npm installs it: without src/, lock file and tests. */
const IS_CLONE = fs.existsSync(join(ROOT, 'package-lock.json'));

/** What the native build takes from npm, which a package as installed lacks, and where it lies. */
const BUILD_PACKAGES = ['cmake-js', 'node-addon-api', 'node-api-headers'];
const BUILD_TOOLS = IS_CLONE ? ROOT : join(BUILD, 'tools');

function setUpBuildTools() {
  const folder = join(BUILD_TOOLS, 'node_modules');
  if (BUILD_PACKAGES.every((name) => fs.existsSync(join(folder, name)))) return;
  const { devDependencies } = JSON.parse(read(join(ROOT, 'package.json')));
  const wanted = BUILD_PACKAGES.map((name) => `${name}@${devDependencies[name]}`);
  say(`installing what the build needs from npm: ${wanted.join(' ')}`);
  const options = ['--prefix', BUILD_TOOLS, '--ignore-scripts', '--no-audit', '--no-fund'];
  run('npm', ['install', ...options, ...wanted], {
    mend: 'npm needs its registry; see its message above.',
  });
}

function setUpPackages() {
  if (!IS_CLONE) return setUpBuildTools();
  if (packagesComplete()) return;
  say('installing npm packages (npm ci)');
  run('npm', ['ci', '--no-audit', '--no-fund'], {
    // onnxruntime-node's install script would download CUDA files that hardmine never uses.
    env: { ONNXRUNTIME_NODE_INSTALL: 'skip' },
    mend: 'npm needs its registry; see its message above.',
  });
}

// --- Debian packages ---

/** What the native build needs: how to see that it is there, and Debian's package for it. */
function buildRequirements(withTests) {
  const header = (path) => includeFolders().some((folder) => fs.existsSync(join(folder, path)));
  return [
    { package: 'g++', name: 'a C++20 compiler (g++ 11 or later)', there: hasCompiler() },
    { package: 'cmake', name: 'CMake 3.20 or later', there: succeeds('cmake', ['--version']) },
    {
      package: 'make',
      name: 'make or ninja',
      there: hasNinja() || succeeds('make', ['--version']),
    },
    { package: 'libdnnl-dev', name: 'oneDNN', there: header('oneapi/dnnl/dnnl.hpp') },
    { package: 'libjpeg-dev', name: 'libjpeg-turbo', there: header('jpeglib.h') },
    ...(withTests
      ? [{ package: 'doctest-dev', name: 'doctest', there: header('doctest/doctest.h') }]
      : []),
  ];
}

const hasNinja = () => succeeds('ninja', ['--version']);

function hasCompiler() {
  const version = spawnSync('g++', ['-dumpversion'], { encoding: 'utf8' });
  return version.status === 0 && Number.parseInt(version.stdout, 10) >= 11;
}

/** Where CMake looks for headers. */
function includeFolders() {
  const prefixes = [...(process.env.CMAKE_PREFIX_PATH ?? '').split(/[:;]/), '/usr/local', '/usr'];
  return [
    ...(process.env.CPATH ?? '').split(':'),
    ...prefixes.filter(Boolean).map((prefix) => join(prefix, 'include')),
  ].filter(Boolean);
}

function setUpSystem(withTests) {
  const missing = buildRequirements(withTests).filter(({ there }) => !there);
  if (missing.length === 0) return;
  const packages = missing.map((requirement) => requirement.package);
  if (!succeeds('apt-get', ['--version'])) {
    const names = missing.map(({ name }) => name).join(', ');
    throw new SetupError(
      `The native build needs ${names}: install them with this system's package manager (Debian calls them ${packages.join(' ')}) and run this again.`,
    );
  }
  const install = ['install', '-y', '--no-install-recommends', ...packages];
  if (process.getuid() !== 0) {
    throw new SetupError(
      `Debian packages are missing and only root may install them. Run these commands, then this one again:\n  sudo apt-get update\n  sudo apt-get ${install.join(' ')}`,
    );
  }
  say(`installing Debian packages: ${packages.join(' ')}`);
  const env = { DEBIAN_FRONTEND: 'noninteractive' };
  const mend = 'apt-get needs its package mirror; see its message above.';
  // The lists that are there may be enough; where they are absent or old they are fetched.
  const known = packages.every((name) => succeeds('apt-cache', ['show', name]));
  const installed = known && runs('apt-get', install, env);
  if (!installed) {
    run('apt-get', ['update'], { env, mend });
    run('apt-get', install, { env, mend });
  }
  const absent = buildRequirements(withTests).filter(({ there }) => !there);
  if (absent.length === 0) return;
  throw new SetupError(
    `After apt-get installed ${packages.join(' ')} there is still no ${absent.map(({ name }) => name).join(', ')}: this distribution is too old, use Debian 12 or Ubuntu 22.04 or later.`,
  );
}

// --- native build and dist ---

/** A hash over files and folders: of what they are called and what they hold. */
function hashOf(paths) {
  const hash = createHash('sha256');
  const add = (path) => {
    if (!fs.existsSync(path)) return;
    if (fs.statSync(path).isDirectory()) {
      for (const entry of fs.readdirSync(path).sort()) add(join(path, entry));
      return;
    }
    const content = fs.readFileSync(path);
    hash.update(`${relative(ROOT, path)}\0${content.length}\0`).update(content);
  };
  for (const path of paths) add(join(ROOT, path));
  return hash.digest('hex');
}

const NATIVE_SOURCES = ['CMakeLists.txt', 'binding', 'core', 'cpu', 'package-lock.json'];
const TEST_SOURCES = ['test/native', 'test/simt', 'cuda'];

/** Stamps: what each product was built from, written when it was built. */
const stampPath = (product) => join(BUILD, `.${product}.stamp`);
const isCurrent = (product, hash) => readIfThere(stampPath(product)) === hash;
function setStamp(product, hash) {
  fs.mkdirSync(BUILD, { recursive: true });
  fs.writeFileSync(stampPath(product), hash);
}

function loads(addon) {
  try {
    process.dlopen({ exports: {} }, addon, constants.dlopen.RTLD_NOW);
    return true;
  } catch {
    return false; // not built, or a library of it was removed since
  }
}

/** Where NVIDIA's kernel module says that it is there. */
const hasGpu = () => fs.existsSync('/proc/driver/nvidia/version');

/** The CUDA compiler: on the path, in the toolkit's usual place, or brought by setup:cuda. */
function findNvcc() {
  const cache = process.env.XDG_CACHE_HOME || join(homedir(), '.cache');
  const places = [
    process.env.CUDACXX,
    ...(process.env.PATH ?? '').split(':').map((folder) => join(folder, 'nvcc')),
    '/usr/local/cuda/bin/nvcc',
    join(cache, 'hardmine', 'cuda', 'nvidia', 'cu13', 'bin', 'nvcc'),
  ];
  return places.find((place) => place && fs.existsSync(place)) ?? null;
}

function setUpNative(withTests, cudaAsked) {
  const nvcc = findNvcc();
  const withCuda = nvcc !== null && (cudaAsked || hasGpu() || fs.existsSync(CUDA_ADDON));
  const products = [
    { name: 'native', sources: NATIVE_SOURCES, there: () => loads(ADDON) },
    withTests && {
      name: 'native-tests',
      sources: [...NATIVE_SOURCES, ...TEST_SOURCES],
      there: () => true,
    },
    withCuda && {
      name: 'cuda',
      sources: [...NATIVE_SOURCES, 'cuda'],
      there: () => loads(CUDA_ADDON),
    },
  ].filter(Boolean);
  const hashes = products.map(({ sources }) => hashOf(sources));
  if (products.every(({ name, there }, i) => isCurrent(name, hashes[i]) && there())) return;
  setUpSystem(withTests);
  const what = ['the native addon', withCuda && 'the CUDA addon', withTests && 'their tests'];
  say(
    `building ${what.filter(Boolean).join(', ')} (${withCuda ? 'some minutes' : 'a minute or two'})`,
  );
  dropForeignCache();
  const cmakeJs = (command, ...args) =>
    run(
      process.execPath,
      [
        join(BUILD_TOOLS, 'node_modules/cmake-js/bin/cmake-js'),
        command,
        '--log-level',
        'warn',
        '--out',
        BUILD,
        ...args,
      ],
      {
        // It looks for node-addon-api from this folder upwards, or there.
        env: { NODE_PATH: join(BUILD_TOOLS, 'node_modules'), ...(nvcc && { CUDACXX: nvcc }) },
        mend: 'see the message of the compiler or of CMake above.',
      },
    );
  // For the GPUs of this machine where there are any, else for all that CMakeLists.txt names.
  const architectures = process.env.HARDMINE_CUDA_ARCHITECTURES ?? (hasGpu() ? 'native' : null);
  cmakeJs(
    'configure',
    `--CDHARDMINE_TESTS=${withTests ? 'ON' : 'OFF'}`,
    `--CDHARDMINE_CUDA=${withCuda ? 'ON' : 'OFF'}`,
    ...(architectures === null ? [] : [`--CDHARDMINE_CUDA_ARCHITECTURES=${architectures}`]),
  );
  cmakeJs('build', '--parallel', String(availableParallelism()));
  for (const addon of [ADDON, ...(withCuda ? [CUDA_ADDON] : [])]) {
    if (!loads(addon)) process.dlopen({ exports: {} }, addon, constants.dlopen.RTLD_NOW);
  }
  for (const [i, { name }] of products.entries()) setStamp(name, hashes[i]);
}

/** CMake refuses a cache that was made in another folder or for a generator that has gone. */
function dropForeignCache() {
  const cache = readIfThere(join(BUILD, 'CMakeCache.txt'));
  if (cache === null) return;
  const entry = (name) => new RegExp(`^${name}:[A-Z]+=(.*)$`, 'm').exec(cache)?.[1];
  const generator = hasNinja() ? 'Ninja' : 'Unix Makefiles';
  if (entry('CMAKE_HOME_DIRECTORY') === ROOT && entry('CMAKE_GENERATOR') === generator) return;
  fs.rmSync(join(BUILD, 'CMakeCache.txt'));
  fs.rmSync(join(BUILD, 'CMakeFiles'), { recursive: true, force: true });
}

function setUpDist() {
  const hash = hashOf(['src', 'tsconfig.json', 'package-lock.json']);
  const main = join(ROOT, 'dist', 'cli', 'main.js');
  if (isCurrent('dist', hash) && fs.existsSync(main)) return;
  say('compiling TypeScript to dist/');
  // Beside dist/ and renamed, so that dist/ is never half written.
  const fresh = join(ROOT, 'dist.new');
  fs.rmSync(fresh, { recursive: true, force: true });
  try {
    run(process.execPath, ['node_modules/typescript/bin/tsc', '--outDir', fresh], {
      mend: 'see the messages of the compiler above.',
    });
    fs.rmSync(join(ROOT, 'dist'), { recursive: true, force: true });
    fs.renameSync(fresh, join(ROOT, 'dist'));
  } finally {
    fs.rmSync(fresh, { recursive: true, force: true });
  }
  fs.chmodSync(main, 0o755);
  setStamp('dist', hash);
}

function parseArguments(args) {
  const options = { only: null, tests: false, cuda: false };
  for (let i = 0; i < args.length; i++) {
    if (args[i] === '--tests') options.tests = true;
    else if (args[i] === '--cuda') options.cuda = true;
    else if (args[i] === '--only') options.only = args[++i];
    else
      throw new SetupError(
        `Unknown argument ${args[i]}: give --only packages|native|dist, --tests or --cuda.`,
      );
  }
  if (options.only !== null && !['packages', 'native', 'dist'].includes(options.only)) {
    throw new SetupError(`--only takes packages, native or dist, not ${options.only}.`);
  }
  return options;
}

try {
  const { only, tests, cuda } = parseArguments(process.argv.slice(2));
  checkNode();
  await withLock(() => {
    setUpPackages();
    if (only === null || only === 'native') setUpNative(tests, cuda);
    if (IS_CLONE && (only === null || only === 'dist')) setUpDist();
  });
} catch (error) {
  if (!(error instanceof SetupError)) throw error;
  say(error.message);
  process.exitCode = 1;
}
