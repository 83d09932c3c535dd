// Makes a machine that has only NVIDIA's driver ready to build and run the CUDA backend: brings nvcc
// with its headers, cuDNN 9, cuBLASLt and NVRTC from NVIDIA's wheels into
// $XDG_CACHE_HOME/hardmine/cuda (~/.cache/hardmine/cuda), where the build and cuda/libraries.cpp look.
// Nothing of the system is touched; removing that folder undoes it. Plain Node.
//
//   node scripts/setup-cuda.mjs [--yes] [--headers-only]
//
// Says what it will fetch and asks; --yes answers. --headers-only fetches what compiling needs and no
// more: the libraries are opened at run time and hardmine declares what it uses of them.

import { spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join } from 'node:path';
import { createInterface } from 'node:readline/promises';

const CACHE = process.env.XDG_CACHE_HOME || join(homedir(), '.cache');
const TARGET = join(CACHE, 'hardmine', 'cuda');
const PARTIAL = `${TARGET}.partial`;
const OLD = `${TARGET}.old`;

/** The oldest compiler that CMakeLists.txt takes. */
const OLDEST_NVCC = [12, 4];
/** NVIDIA's driver branches and the CUDA version that each runs, where the driver does not say. */
const BRANCHES = [
  { branch: 580, cuda: [13, 0] },
  { branch: 550, cuda: [12, 4] },
  { branch: 525, cuda: [12, 0] },
];

/** A failure that a person can mend: printed without a stack trace. */
class SetupError extends Error {}

const say = (text) => process.stderr.write(`setup-cuda: ${text}\n`);
const atLeast = ([major, minor], [wantedMajor, wantedMinor]) =>
  major > wantedMajor || (major === wantedMajor && minor >= wantedMinor);

function output(command, args) {
  const { status, stdout } = spawnSync(command, args, { encoding: 'utf8' });
  return status === 0 ? stdout : null;
}

// --- what is here ---

/** The newest CUDA that the driver runs, as [major, minor]; null without a driver. */
function cudaOfDriver() {
  // The header's words changed with the branches: "CUDA Version: 13.0", "CUDA UMD Version: 13.1".
  const said = /CUDA (?:\w+ )?Version\s*:\s*(\d+)\.(\d+)/.exec(output('nvidia-smi', []) ?? '');
  if (said !== null) return [Number(said[1]), Number(said[2])];
  const file = '/proc/driver/nvidia/version';
  if (!fs.existsSync(file)) return null;
  const branch = Number(/\s(\d{3})\.\d+/.exec(fs.readFileSync(file, 'utf8'))?.[1] ?? 0);
  return BRANCHES.find((known) => branch >= known.branch)?.cuda ?? [11, 0];
}

/** An nvcc of this machine that can compile hardmine: { path, version }, or null. */
function findCompiler() {
  const homes = [process.env.CUDA_HOME, process.env.CUDA_PATH].filter(Boolean);
  const places = [process.env.CUDACXX, 'nvcc', ...homes.map((home) => join(home, 'bin', 'nvcc'))];
  for (const path of places.filter(Boolean)) {
    const version = compilerVersion(path);
    if (version !== null && atLeast(version, OLDEST_NVCC)) return { path, version };
  }
  return null;
}

function compilerVersion(path) {
  const release = /release (\d+)\.(\d+)/.exec(output(path, ['--version']) ?? '');
  return release && [Number(release[1]), Number(release[2])];
}

// --- what to fetch ---

/**
 * The wheels with the megabytes that each was to download when this was written (nvcc 13.0.88, cuDNN
 * 9.20, cuBLAS 13.1 and 12.8): to say what comes, not to check it. Compiler and NVRTC are kept to the
 * driver's own minor version: an older driver runs no PTX of a newer compiler.
 */
function wheelsFor([major, minor], { compiler, libraries }) {
  const wheels = [];
  if (major >= 13) {
    const range = `>=13.0,<13.${major > 13 ? 99 : minor + 1}`;
    if (compiler) {
      wheels.push(
        { name: 'nvidia-cuda-nvcc', range, megabytes: 37, what: 'nvcc, ptxas, nvlink' },
        { name: 'nvidia-nvvm', range, megabytes: 62, what: "nvcc's code generator" },
        { name: 'nvidia-cuda-crt', range, megabytes: 1, what: "nvcc's own headers" },
        { name: 'nvidia-cuda-runtime', range, megabytes: 2, what: 'cudart and its headers' },
        { name: 'nvidia-cuda-cccl', range, megabytes: 3, what: "CCCL's headers" },
      );
    }
    if (libraries) {
      wheels.push(
        { name: 'nvidia-cudnn-cu13', range: '>=9,<10', megabytes: 366, what: 'cuDNN 9' },
        { name: 'nvidia-cublas', range: '>=13,<14', megabytes: 423, what: 'cuBLASLt' },
        { name: 'nvidia-cuda-nvrtc', range, megabytes: 90, what: 'NVRTC' },
      );
    }
    return wheels;
  }
  // There is no nvcc in the wheels of CUDA 12, only ptxas: the compiler has to be there.
  if (libraries) {
    wheels.push(
      { name: 'nvidia-cudnn-cu12', range: '>=9,<10', megabytes: 707, what: 'cuDNN 9' },
      { name: 'nvidia-cublas-cu12', range: '>=12,<13', megabytes: 594, what: 'cuBLASLt' },
      { name: 'nvidia-cuda-nvrtc-cu12', range: '>=12,<13', megabytes: 90, what: 'NVRTC' },
    );
  }
  return wheels;
}

/** What is to be fetched for this machine; throws where nothing that can be fetched would do. */
function makePlan(headersOnly) {
  const driver = cudaOfDriver();
  if (driver === null && !headersOnly) {
    throw new SetupError(
      'No NVIDIA driver was found (nvidia-smi does not run and there is no /proc/driver/nvidia/version): install the driver first, version 580 or later, or give --headers-only to compile here for another machine.',
    );
  }
  const cuda = driver ?? [13, 0];
  if (cuda[0] < 12) {
    throw new SetupError(
      `The driver runs CUDA ${cuda.join('.')} and hardmine needs 12.4 or later: install driver 580 or later and run this again.`,
    );
  }
  const found = findCompiler();
  // cudart is linked into the addon, and a newer one than the driver's major version does not start.
  const compiler = found !== null && found.version[0] <= cuda[0] ? found : null;
  if (compiler === null && cuda[0] === 12) {
    throw new SetupError(
      `The driver runs CUDA ${cuda.join('.')}, no nvcc of CUDA 12.4 or later in that line was found, and there is none to fetch (the wheels of CUDA 12 have no nvcc): install driver 580 or later, or the distribution's nvidia-cuda-toolkit, and run this again.`,
    );
  }
  if (compiler !== null) say(`nvcc ${compiler.version.join('.')} is there (${compiler.path})`);
  const needs = { compiler: compiler === null, libraries: !headersOnly };
  const lacks = (need) =>
    needs[need] && missingIn(TARGET, { cuda, needs: { [need]: true } }).length > 0;
  const wheels = wheelsFor(cuda, { compiler: lacks('compiler'), libraries: lacks('libraries') });
  return { cuda, needs, wheels };
}

// --- checking what came ---

/** What a folder with the wheels' files lacks, in words; empty: nothing. */
function missingIn(folder, { cuda, needs }) {
  const major = Math.min(cuda[0], 13);
  const nvidia = join(folder, 'nvidia');
  const packages = fs.existsSync(nvidia) ? fs.readdirSync(nvidia) : [];
  const missing = [];
  if (needs.libraries) {
    const names = ['libcudnn.so.9', `libcublasLt.so.${major}`, `libnvrtc.so.${major}`];
    for (const name of names) {
      const there = packages.some((each) => fs.existsSync(join(nvidia, each, 'lib', name)));
      if (!there) missing.push(name);
    }
  }
  if (needs.compiler) {
    const toolkit = join(nvidia, 'cu13');
    const files = [
      'include/cuda_runtime.h',
      'include/crt/host_config.h',
      'include/cccl/nv/target',
      'lib64/libcudart_static.a',
      'nvvm/bin/cicc',
    ];
    missing.push(...files.filter((file) => !fs.existsSync(join(toolkit, file))));
    if (compilerVersion(join(toolkit, 'bin', 'nvcc')) === null) missing.push('an nvcc that runs');
  }
  return missing;
}

// --- fetching ---

function checkPip() {
  if (output('python3', ['--version']) === null) {
    throw new SetupError(
      'There is no python3, whose pip fetches the wheels: install python3 and python3-pip and run this again.',
    );
  }
  if (output('python3', ['-m', 'pip', '--version']) === null) {
    throw new SetupError(
      'python3 has no pip, which fetches the wheels: install python3-pip and run this again.',
    );
  }
}

/** Unpacked the wheels are about twice as large, and pip keeps both for a while. */
const DISK_PER_DOWNLOAD = 3;

function checkDisk(megabytes) {
  fs.mkdirSync(dirname(TARGET), { recursive: true });
  const { bavail, bsize } = fs.statfsSync(dirname(TARGET));
  const free = Math.floor((bavail * bsize) / 1e6);
  const wanted = megabytes * DISK_PER_DOWNLOAD;
  if (free >= wanted) return;
  throw new SetupError(
    `${dirname(TARGET)} has ${free} MB free and about ${wanted} MB are needed: free some, or set XDG_CACHE_HOME to a folder with more.`,
  );
}

async function confirm(yes) {
  if (yes) return;
  if (!process.stdin.isTTY) {
    throw new SetupError('Nobody is there to ask: give --yes to fetch this. Nothing was changed.');
  }
  const terminal = createInterface({ input: process.stdin, output: process.stderr });
  const answer = await terminal.question('setup-cuda: fetch it? [y/N] ');
  terminal.close();
  if (!/^y(es)?$/i.test(answer.trim())) throw new SetupError('Nothing was changed.');
}

function fetchWheels(wheels) {
  const args = [
    ...['-m', 'pip', 'install', '--target', PARTIAL, '--no-deps', '--only-binary=:all:'],
    ...['--no-compile', '--no-cache-dir', '--disable-pip-version-check'],
    ...wheels.map(({ name, range }) => `${name}${range}`),
  ];
  say(`python3 ${args.join(' ')}`);
  // A --user of pip's own configuration would clash with --target.
  const env = { ...process.env, PIP_USER: '0' };
  const { status } = spawnSync('python3', args, { stdio: ['ignore', 2, 2], env });
  if (status === 0) return;
  throw new SetupError(
    'pip could not fetch the wheels (see its message above): it needs its package index, over the network or a mirror that PIP_INDEX_URL names. Nothing was changed.',
  );
}

/** nvcc looks for cudart in lib64, the wheels have it in lib. */
function linkLib64() {
  const toolkit = join(PARTIAL, 'nvidia', 'cu13');
  if (!fs.existsSync(join(toolkit, 'lib')) || fs.existsSync(join(toolkit, 'lib64'))) return;
  fs.symlinkSync('lib', join(toolkit, 'lib64'));
}

/** Keeps what an earlier set-up brought and this one did not: the same files under a second name. */
function linkMissing(from, to) {
  for (const entry of fs.readdirSync(from, { withFileTypes: true })) {
    const [source, target] = [join(from, entry.name), join(to, entry.name)];
    if (entry.isDirectory()) {
      fs.mkdirSync(target, { recursive: true });
      linkMissing(source, target);
    } else if (!fs.existsSync(target)) {
      fs.linkSync(source, target);
    }
  }
}

const remove = (path) => fs.rmSync(path, { recursive: true, force: true });

function install(plan) {
  remove(PARTIAL); // of a set-up that was killed
  try {
    fetchWheels(plan.wheels);
    if (fs.existsSync(TARGET)) linkMissing(TARGET, PARTIAL);
    linkLib64();
    say('checking what arrived');
    const missing = missingIn(PARTIAL, plan);
    if (missing.length > 0) {
      throw new SetupError(
        `pip fetched the wheels but they lack ${missing.join(', ')}, so they are laid out otherwise than hardmine knows. Nothing was changed; install NVIDIA's CUDA toolkit instead.`,
      );
    }
    remove(OLD);
    if (fs.existsSync(TARGET)) fs.renameSync(TARGET, OLD);
    fs.renameSync(PARTIAL, TARGET);
  } finally {
    remove(PARTIAL);
    remove(OLD);
  }
}

function parseArguments(args) {
  const known = ['--yes', '--headers-only'];
  const unknown = args.find((argument) => !known.includes(argument));
  if (unknown !== undefined) {
    throw new SetupError(`Unknown argument ${unknown}: give --yes or --headers-only.`);
  }
  return { yes: args.includes('--yes'), headersOnly: args.includes('--headers-only') };
}

// Ctrl-C ends pip; this process then clears away what pip left.
process.on('SIGINT', () => {});

try {
  const { yes, headersOnly } = parseArguments(process.argv.slice(2));
  const plan = makePlan(headersOnly);
  if (plan.wheels.length === 0) {
    say('nothing to fetch: all that is needed is there');
  } else {
    checkPip();
    const megabytes = plan.wheels.reduce((sum, wheel) => sum + wheel.megabytes, 0);
    say(`for CUDA ${plan.cuda.join('.')}, from NVIDIA's wheels and under NVIDIA's licences:`);
    for (const { name, range, what, ...wheel } of plan.wheels) {
      say(`${String(wheel.megabytes).padStart(7)} MB  ${name} ${range}  (${what})`);
    }
    say(`${String(megabytes).padStart(7)} MB  to download, about; goes to ${TARGET}`);
    checkDisk(megabytes);
    await confirm(yes);
    install(plan);
    say(`done: it is in ${TARGET}. Next: npm run build`);
  }
} catch (error) {
  if (!(error instanceof SetupError)) throw error;
  say(error.message);
  process.exitCode = 1;
}
