// What run.sh of the GPU kit starts once it has unpacked: runs the parts one after another, each of
// their commands under a time limit of its own, and rewrites result.json after every command, so that
// neither a failure nor a hang nor a host that is taken away loses what was measured before.
//
//   run.mjs FOLDER [--device cuda|cuda:N|cpu] [--only PART,PART...]

import { spawn, spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { cpus, homedir, release } from 'node:os';
import { basename, join } from 'node:path';

const PARTS = ['doctor', 'tests', 'head', 'step', 'data', 'peers', 'compiled', 'sanitizer'];
/** Characters kept of what a command prints beside its JSON: of a test that fails, hundreds of lines. */
const KEPT = 40_000;

const [folder, ...given] = process.argv.slice(2);
const kit = join(folder, 'kit');
const { device, only } = parseArguments(given);
const onCpu = device === 'cpu';

const say = (text) => process.stderr.write(`${text}\n`);
const readJson = (path) => JSON.parse(fs.readFileSync(path, 'utf8'));

function parseArguments(args) {
  const options = { device: 'cuda', only: PARTS };
  for (let i = 0; i < args.length; i += 2) {
    const [name, value] = [args[i], args[i + 1]];
    if (name === '--device' && value !== undefined) options.device = value;
    else if (name === '--only' && value !== undefined) options.only = value.split(',');
    else fail(`Cannot read ${name}: give --device NAME or --only PART,PART...`);
  }
  const unknown = options.only.find((part) => !PARTS.includes(part));
  if (unknown !== undefined)
    fail(`There is no part ${unknown}: the parts are ${PARTS.join(', ')}.`);
  return options;
}

function fail(sentence) {
  process.stderr.write(`${sentence}\n`);
  process.exit(2);
}

// --- surroundings ---

/** The host's own environment, for its own programs. */
const hostEnv = { ...process.env };
hostEnv.LD_LIBRARY_PATH = process.env.HARDMINE_KIT_HOST_LIBRARIES ?? '';
if (hostEnv.LD_LIBRARY_PATH === '') delete hostEnv.LD_LIBRARY_PATH;
delete hostEnv.HARDMINE_KIT_LIBRARIES;
delete hostEnv.HARDMINE_KIT_HOST_LIBRARIES;

/** First line of what a program of the host prints; null where it is not there or fails. */
function ask(command, args) {
  const { status, stdout } = spawnSync(command, args, {
    env: hostEnv,
    encoding: 'utf8',
    timeout: 120_000, // milliseconds; importing torch from a cold disk takes half a minute
  });
  return status === 0 ? stdout.trim() : null;
}

const TORCH = `
import json, torch
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version()}))`;
const NVIDIA_PACKAGES = `
import importlib.util, json
spec = importlib.util.find_spec("nvidia")
print(json.dumps(list(spec.submodule_search_locations or []) if spec else []))`;

/**
 * A cache folder for hardmine that links to every `nvidia` package with libraries that the host's
 * set-up or its python3 has, where cuda/libraries.cpp looks for those of `npm run setup:cuda`.
 */
function linkCudaLibraries() {
  const ownCache = join(
    process.env.XDG_CACHE_HOME || join(homedir(), '.cache'),
    'hardmine',
    'cuda',
  );
  const fromPython = JSON.parse(ask('python3', ['-c', NVIDIA_PACKAGES]) ?? '[]');
  const cache = join(folder, 'cache');
  const links = join(cache, 'hardmine', 'cuda', 'nvidia');
  fs.rmSync(links, { recursive: true, force: true });
  fs.mkdirSync(links, { recursive: true });
  const linked = [];
  for (const site of [join(ownCache, 'nvidia'), ...fromPython]) {
    const names = fs.existsSync(site) ? fs.readdirSync(site).sort() : [];
    for (const name of names) {
      if (!fs.existsSync(join(site, name, 'lib')) || fs.existsSync(join(links, name))) continue;
      fs.symlinkSync(join(site, name), join(links, name));
      linked.push(join(site, name));
    }
  }
  return { cache, linked };
}

function findSanitizer(linked) {
  const places = ['/usr/local/cuda/bin', ...linked.map((path) => join(path, 'bin'))];
  const found = places.map((path) => join(path, 'compute-sanitizer')).find(fs.existsSync);
  return ask('compute-sanitizer', ['--version']) !== null ? 'compute-sanitizer' : (found ?? null);
}

function describeHost() {
  const query = 'name,driver_version,memory.total,compute_cap';
  const gpus = ask('nvidia-smi', [`--query-gpu=${query}`, '--format=csv,noheader']);
  const torch = ask('python3', ['-c', TORCH]);
  return {
    gpus: (gpus ?? '')
      .split('\n')
      .filter(Boolean)
      .map((line) => {
        const [name, driver, memory, computeCapability] = line.split(', ');
        return { name, driver, memory, computeCapability };
      }),
    cpu: cpus()[0]?.model ?? null,
    threads: cpus().length,
    kernel: release(),
    glibc: process.report.getReport().header.glibcVersionRuntime ?? null,
    node: process.versions.node,
    python: torch && JSON.parse(torch),
  };
}

// --- running ---

const outFile = join(process.env.OUT || folder, 'result.json');
const { cache, linked } = linkCudaLibraries();
const kitEnv = { ...process.env, XDG_CACHE_HOME: cache };
const result = {
  kit: readJson(join(kit, 'kit.json')),
  started: new Date().toISOString(),
  device,
  host: describeHost(),
  cudaLibraries: linked,
  runs: [],
};

function save() {
  // Beside it and renamed, so that the file is whole whenever the host goes away.
  fs.writeFileSync(`${outFile}.tmp`, `${JSON.stringify(result, null, 2)}\n`);
  fs.renameSync(`${outFile}.tmp`, outFile);
}

/** Runs a command to its end or its limit, whichever is first; ends all that it started. */
function spawnLimited(command, args, { env, seconds }) {
  return new Promise((done) => {
    const child = spawn(command, args, {
      env,
      cwd: kit,
      detached: true, // a process group, so that the programs that it starts end with it
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let [stdout, stderr, timedOut] = ['', '', false];
    child.stdout.setEncoding('utf8').on('data', (text) => {
      stdout += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text) => {
      stderr = (stderr + text).slice(-KEPT);
    });
    const signal = (name) => {
      try {
        process.kill(-child.pid, name);
      } catch {
        // it ended in the meantime
      }
    };
    const limit = setTimeout(() => {
      timedOut = true;
      signal('SIGKILL'); // a program that hangs in the driver hears nothing gentler
      // It may stay in the driver even so: its pipes are given up with it.
      setTimeout(() => finish(null, 'SIGKILL'), 5000).unref();
    }, seconds * 1000);
    let finished = false;
    const finish = (code, ended, error) => {
      if (finished) return;
      finished = true;
      clearTimeout(limit);
      child.stdout.destroy();
      child.stderr.destroy();
      child.unref();
      done({ code, signal: ended, timedOut, stdout, stderr: error?.message ?? stderr });
    };
    child.on('error', (error) => finish(null, null, error));
    child.on('close', (code, ended) => finish(code, ended));
  });
}

// Parts with a command that ran over its limit: what hangs once would take the host's time again.
const hung = new Set();

/** One command of a part: its outcome and, where it prints JSON, its figures go into the result. */
async function run(
  part,
  name,
  command,
  args,
  { env = kitEnv, seconds, json = false, slow = false },
) {
  if (hung.has(part)) return skipped(part, `${name}: a command before it hung`);
  say(`[${part}] ${name}`);
  const startMs = performance.now();
  const outcome = await spawnLimited(command, args, { env, seconds });
  const entry = {
    part,
    name,
    ok: outcome.code === 0,
    seconds: Number(((performance.now() - startMs) / 1000).toFixed(1)),
  };
  if (json && entry.ok) {
    try {
      entry.output = JSON.parse(outcome.stdout);
    } catch {
      entry.ok = false;
      outcome.stderr = `printed no JSON: ${outcome.stdout.slice(-KEPT)}`;
    }
  } else if (!json) {
    entry.text = outcome.stdout.slice(-KEPT);
  }
  if (!entry.ok) {
    entry.exit = outcome.timedOut
      ? `over its limit of ${seconds} s`
      : (outcome.signal ?? outcome.code);
    entry.stderr = outcome.stderr;
    if (outcome.timedOut && !slow) hung.add(part);
    say(`    failed (${entry.exit}): ${lastLine(outcome.stderr) || lastLine(outcome.stdout)}`);
  }
  result.runs.push(entry);
  save();
}

const lastLine = (text) => text.trim().split('\n').at(-1) ?? '';

function skipped(part, reason) {
  say(`[${part}] skipped: ${reason}`);
  result.runs.push({ part, name: part, ok: true, skipped: reason });
  save();
}

const hardmine = join(folder, 'hardmine');

/** Writes FOLDER/hardmine, which runs the kit's hardmine by hand too, for a training say. */
function writeCommand() {
  const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const { LD_LIBRARY_PATH } = process.env;
  fs.writeFileSync(
    hardmine,
    `#!/bin/sh
export LD_LIBRARY_PATH=${quote(LD_LIBRARY_PATH ?? '')} XDG_CACHE_HOME=${quote(cache)}
exec ${quote(join(kit, 'bin', 'node'))} ${quote(join(kit, 'dist', 'cli', 'main.js'))} "$@"
`,
    { mode: 0o755 },
  );
}

// --- the parts ---

const precisions = onCpu ? ['fp32'] : ['fp16', 'bf16', 'fp32'];
const stepPrecisions = onCpu ? ['fp32'] : ['fp16', 'bf16'];
const shapes = onCpu ? ['8x64x100'] : ['64x512x10575', '512x512x85742', '1024x512x1000000'];
const batches = onCpu ? [4] : [64, 256, 1024];
/** Fewer on a CPU, where a repeat takes as long as a thousand on a GPU. */
const repeats = ['--repeats', onCpu ? '2' : '30'];
const classes = onCpu ? ['--classes', '100'] : [];

/** The same work in PyTorch. */
async function runPeers(part, compiled) {
  if (result.host.python === null) return skipped(part, 'python3 has no torch here');
  const python = async (script, given) => {
    const args = [...given, ...compiled, '--device', device, ...repeats];
    if (script === 'step.py') args.push(...classes);
    await run(
      part,
      `${script} ${[...given, ...compiled].join(' ')}`,
      'python3',
      [join(kit, 'bench', 'peers', script), ...args],
      { env: hostEnv, json: true, seconds: compiled.length > 0 ? 180 : 90, slow: true },
    );
  };
  for (const precision of precisions) {
    for (const shape of shapes) {
      await python('head.py', ['--precision', precision, '--shapes', shape]);
    }
  }
  for (const precision of stepPrecisions) {
    for (const batch of batches) {
      await python('step.py', ['--precision', precision, '--batch', String(batch)]);
    }
  }
}

const parts = {
  async doctor() {
    await run('doctor', 'doctor', hardmine, ['doctor', '--json'], { seconds: 60, json: true });
  },

  async tests() {
    const { tests } = result.kit;
    if (tests.length === 0) return skipped('tests', 'the kit has no native GPU tests');
    if (onCpu) return skipped('tests', 'the native GPU tests need a GPU');
    for (const test of tests) {
      await run('tests', basename(test), join(kit, test), [], { seconds: 180 });
    }
  },

  async head() {
    for (const precision of precisions) {
      for (const shape of shapes) {
        const args = ['--device', device, '--precision', precision, '--shapes', shape, ...repeats];
        await run('head', `${precision} ${shape}`, hardmine, ['bench', 'head', '--json', ...args], {
          seconds: 240,
          json: true,
        });
      }
    }
  },

  async step() {
    for (const precision of stepPrecisions) {
      for (const batch of batches) {
        const args = ['--device', device, '--precision', precision, '--batch', batch, ...classes];
        const command = ['bench', 'step', '--json', ...args, ...repeats].map(String);
        // The first also times cuDNN's engines, from a cold disk.
        const options = { seconds: 240, json: true };
        await run('step', `${precision} batch ${batch}`, hardmine, command, options);
      }
    }
  },

  async data() {
    const names = fs.existsSync(join(folder, 'data')) ? fs.readdirSync(join(folder, 'data')) : [];
    const rec = names.find((name) => name.endsWith('.rec'));
    if (rec === undefined) return skipped('data', 'no whole data set was carried (gpu:kit --data)');
    const path = join(folder, 'data', rec);
    const options = { seconds: 120, json: true };
    for (const threads of onCpu ? [1] : [1, 4, 16]) {
      const args = ['--data', path, '--batch', '256', '--threads', String(threads), ...repeats];
      const command = ['bench', 'data', '--json', '--device', 'cpu', ...args];
      await run('data', `input, ${threads} threads`, hardmine, command, options);
    }
    for (const batch of batches) {
      const args = ['--data', path, '--device', device, '--precision', stepPrecisions[0]];
      const command = [
        'bench',
        'step',
        '--json',
        ...args,
        '--batch',
        batch,
        ...classes,
        ...repeats,
      ];
      const name = `${stepPrecisions[0]} batch ${batch} from JPEG`;
      await run('data', name, hardmine, command.map(String), options);
    }
  },

  async peers() {
    await runPeers('peers', []);
  },

  async compiled() {
    // Takes minutes on a CPU and says nothing about the kit.
    if (onCpu) return skipped('compiled', 'torch.compile is timed on a GPU');
    await runPeers('compiled', ['--compile']);
  },

  async sanitizer() {
    const { tests } = result.kit;
    if (onCpu) return skipped('sanitizer', 'compute-sanitizer needs a GPU');
    if (tests.length === 0) return skipped('sanitizer', 'the kit has no native GPU tests');
    const sanitizer = findSanitizer(linked);
    if (sanitizer === null) return skipped('sanitizer', 'compute-sanitizer is not on this host');
    for (const tool of ['memcheck', 'racecheck', 'initcheck', 'synccheck']) {
      for (const test of tests) {
        const args = ['--tool', tool, '--error-exitcode', '1', join(kit, test)];
        const options = { seconds: 240, slow: true };
        await run('sanitizer', `${tool} ${basename(test)}`, sanitizer, args, options);
      }
    }
  },
};

/** The medians, a line a measurement: what is read first, and the end of what a caller sees. */
function summary() {
  const lines = [];
  for (const { name, output } of result.runs.filter(({ output }) => output?.results)) {
    for (const row of output.results) {
      const median = (key, unit) => row[key] && `${row[key].median.toPrecision(4)} ${unit}`;
      const figures = [
        median('forwardBackwardMs', 'ms forward+backward'),
        median('stepMs', 'ms step'),
        median('productsMs', 'ms products'),
        median('imagesPerSecond', 'images/s'),
      ];
      const who = row.peer ?? (row.implementation ? `hardmine ${row.implementation}` : 'hardmine');
      lines.push(`${who} | ${name} | ${figures.filter(Boolean).join(', ')}`);
    }
  }
  return lines;
}

/** What the sessions found by timing: engines of convolutions, ways of batch-norms and lanes. */
function choices() {
  const kept = join(cache, 'hardmine', 'convolutions');
  if (!fs.existsSync(kept)) return [];
  return fs.readdirSync(kept).map((name) => {
    const [what, way] = fs.readFileSync(join(kept, name), 'utf8').split('\n');
    return { what, way };
  });
}

writeCommand();
save();
for (const part of PARTS.filter((name) => only.includes(name))) await parts[part]();
result.choices = choices();
result.ended = new Date().toISOString();
save();

const failed = result.runs.filter(({ ok }) => !ok);
for (const line of summary()) say(line);
for (const { part, name, exit } of failed) say(`failed: [${part}] ${name} (${exit})`);
const skips = result.runs.filter((entry) => entry.skipped !== undefined).length;
say(
  `${result.runs.length - failed.length - skips} ran, ${failed.length} failed, ${skips} skipped; ${outFile}`,
);
// Not exitCode: a killed program that hangs in the driver may still hold a handle open.
process.exit(failed.length > 0 ? 1 : 0);
