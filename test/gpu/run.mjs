// What run.sh of the GPU kit starts once it has unpacked: runs the parts one after another, each of
// their commands under a time limit of its own, and rewrites result.json after every command, so that
// neither a failure nor a hang nor a host that is taken away loses what was measured before. What
// sessions found by timing goes into ways.tgz beside it; in FOLDER, on a fresh host, it is used again.
//
//   run.mjs FOLDER [--device cuda|cuda:N|cpu] [--only PART,PART...] [--seconds N]
//
// --seconds is what all of it may take: a command gets what is left of it, and the last do not start.

import { spawn, spawnSync } from 'node:child_process';
import * as fs from 'node:fs';
import { cpus, homedir, release } from 'node:os';
import { basename, join } from 'node:path';

const PARTS = [
  ...['doctor', 'tests', 'agree', 'step', 'head', 'data', 'peers', 'compiled', 'sanitizer'],
];
/** The native tests run a source file at a time: what hangs or loses the device spares the others. */
const TEST_FILES = ['network_kernels', 'head', 'session'];
/** Characters kept of the start, and of the end, of what a command prints beside its JSON. */
const KEPT = 20_000;
/** Less is not worth starting a command for. */
const LEAST_SECONDS = 5;

const [folder, ...given] = process.argv.slice(2);
const kit = join(folder, 'kit');
const { device, only, seconds: secondsInAll } = parseArguments(given);
const onCpu = device === 'cpu';

const say = (text) => process.stderr.write(`${text}\n`);
const readJson = (path) => JSON.parse(fs.readFileSync(path, 'utf8'));

function parseArguments(args) {
  const options = { device: 'cuda', only: PARTS, seconds: Infinity };
  for (let i = 0; i < args.length; i += 2) {
    const [name, value] = [args[i], args[i + 1]];
    if (name === '--device' && value !== undefined) options.device = value;
    else if (name === '--only' && value !== undefined) options.only = value.split(',');
    else if (name === '--seconds' && Number(value) > 0) options.seconds = Number(value);
    else fail(`Cannot read ${name}: give --device NAME, --only PART,PART... or --seconds N.`);
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
function ask(command, args, seconds = 120) {
  const { status, stdout } = spawnSync(command, args, {
    env: hostEnv,
    encoding: 'utf8',
    timeout: seconds * 1000, // importing torch from a cold disk takes half a minute
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
  const libraries = fs.readdirSync(links).map((name) => join(links, name, 'lib'));
  return { cache, linked, libraries };
}

function findSanitizer(linked) {
  const places = ['/usr/local/cuda/bin', ...linked.map((path) => join(path, 'bin'))];
  const found = places.map((path) => join(path, 'compute-sanitizer')).find(fs.existsSync);
  return ask('compute-sanitizer', ['--version']) !== null ? 'compute-sanitizer' : (found ?? null);
}

const askGpu = (query) => ask('nvidia-smi', [`--query-gpu=${query}`, '--format=csv,noheader'], 10);

function describeHost() {
  const gpus = askGpu('name,driver_version,memory.total,compute_cap');
  const peers = only.includes('peers') || only.includes('compiled');
  const torch = peers ? ask('python3', ['-c', TORCH]) : null;
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

const out = process.env.OUT || folder;
const outFile = join(out, 'result.json');
const deadlineMs = performance.now() + secondsInAll * 1000;
const { cache, linked, libraries } = linkCudaLibraries();
// Tests with a cache of their own find the libraries too.
const kitEnv = { ...process.env, XDG_CACHE_HOME: cache };
kitEnv.LD_LIBRARY_PATH = [process.env.LD_LIBRARY_PATH ?? '', ...libraries].join(':');
const result = {
  kit: readJson(join(kit, 'kit.json')),
  started: new Date().toISOString(),
  device,
  host: describeHost(),
  cudaLibraries: linked,
  runs: [],
};

function save() {
  result.choices = choices();
  // Beside it and renamed, so that the file is whole whenever the host goes away.
  fs.writeFileSync(`${outFile}.tmp`, `${JSON.stringify(result, null, 2)}\n`);
  fs.renameSync(`${outFile}.tmp`, outFile);
}

/** What a program prints, in full while it is short: else its start and its end. */
class Printed {
  text = '';
  #left = '';
  add(text) {
    const room = KEPT - this.text.length;
    this.text += text.slice(0, Math.max(0, room));
    this.#left = (this.#left + text.slice(Math.max(0, room))).slice(-KEPT);
  }
  get kept() {
    return this.#left === '' ? this.text : `${this.text}\n[...]\n${this.#left}`;
  }
}

/** Ends the command under way, with all that it started. */
let endCommand = () => undefined;
process.on('SIGTERM', () => {
  endCommand();
  fail('ended by SIGTERM');
});

/**
 * Runs a command to its end or its limit, whichever is first; ends all that it started. What it prints
 * goes into `log` as it comes. `timeout` ends it even where this process was killed before.
 */
function spawnLimited(command, args, { env, seconds, log }) {
  return new Promise((done) => {
    const limited = ['-s', 'KILL', String(Math.ceil(seconds) + 1), command, ...args];
    const child = spawn('timeout', limited, {
      env,
      cwd: kit,
      detached: true, // a process group, so that the programs that it starts end with it
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    const [stdout, stderr] = [[], new Printed()];
    let timedOut = false;
    child.stdout.setEncoding('utf8').on('data', (text) => {
      stdout.push(text);
      if (log !== null) fs.appendFileSync(log, text);
    });
    child.stderr.setEncoding('utf8').on('data', (text) => stderr.add(text));
    endCommand = () => {
      try {
        process.kill(-child.pid, 'SIGKILL'); // a program that hangs in the driver hears nothing gentler
      } catch {
        // it ended in the meantime
      }
    };
    const limit = setTimeout(() => {
      timedOut = true;
      endCommand();
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
      const text = error?.message ?? stderr.kept;
      done({ code, signal: ended, timedOut, stdout: stdout.join(''), stderr: text });
    };
    child.on('error', (error) => finish(null, null, error));
    child.on('close', (code, ended) => finish(code, ended));
  });
}

// Parts with a command that ran over its limit: what hangs once would take the host's time again.
const hung = new Set();

/**
 * One command of a part: its outcome and, where it prints JSON, its figures go into the result.
 * Returns that, or null where it was not started.
 */
async function run(
  part,
  name,
  command,
  args,
  { env = kitEnv, seconds: most, json = false, slow = false },
) {
  if (hung.has(part)) return skipped(part, `${name}: a command before it hung`);
  const startMs = performance.now();
  const seconds = Math.min(most, Math.floor((deadlineMs - startMs) / 1000));
  if (seconds < LEAST_SECONDS && seconds < most) return skipped(part, `${name}: no time is left`);
  say(`[${part}] ${name}`);
  const log = json ? null : join(out, `${part}-${name.replaceAll(/[^\w.-]+/g, '-')}.log`);
  const outcome = await spawnLimited(command, args, { env, seconds, log });
  const printed = new Printed();
  printed.add(outcome.stdout);
  const entry = {
    part,
    name,
    ok: outcome.code === 0,
    seconds: Number(((performance.now() - startMs) / 1000).toFixed(1)),
  };
  // As the command left it: idle clocks would show that what is timed has to wake it.
  if (!onCpu) entry.gpu = askGpu('clocks.sm,temperature.gpu,clocks_throttle_reasons.active');
  if (json && entry.ok) {
    try {
      entry.output = JSON.parse(outcome.stdout);
    } catch {
      entry.ok = false;
      outcome.stderr = `printed no JSON: ${printed.kept}`;
    }
  } else {
    entry.text = printed.kept;
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
  return entry;
}

const lastLine = (text) => text.trim().split('\n').at(-1) ?? '';

function skipped(part, reason) {
  say(`[${part}] skipped: ${reason}`);
  result.runs.push({ part, name: part, ok: true, skipped: reason });
  save();
  return null;
}

const hardmine = join(folder, 'hardmine');

/** Writes FOLDER/hardmine, which runs the kit's hardmine by hand too, for a training say. */
function writeCommand() {
  const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const { LD_LIBRARY_PATH } = kitEnv;
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
/** Fewer on a CPU, where a repeat takes as long as a thousand on a GPU, and of what takes long. */
const repeats = (long = false) => ['--repeats', onCpu ? '2' : long ? '7' : '30'];
const isLong = (shape) => Number(shape.split('x').at(-1)) >= 1e6;
const classes = onCpu ? ['--classes', '100'] : [];

const bench = (part, name, what, args, seconds) =>
  run(part, name, hardmine, ['bench', what, '--json', ...args.map(String)], {
    seconds,
    json: true,
    slow: true,
  });

/** The same work in PyTorch; the step first, whose figures count most. */
async function runPeers(part, compiled) {
  if (result.host.python === null) return skipped(part, 'python3 has no torch here');
  const python = async (script, given, seconds) => {
    const name = `${script} ${[...given, ...compiled].join(' ')}`;
    const args = [...given, ...compiled, '--device', device];
    await run(part, name, 'python3', [join(kit, 'bench', 'peers', script), ...args], {
      env: hostEnv,
      json: true,
      seconds,
      slow: true,
    });
  };
  const isCompiled = compiled.length > 0;
  for (const precision of stepPrecisions) {
    for (const batch of batches) {
      const args = ['--precision', precision, '--batch', String(batch), ...classes, ...repeats()];
      await python('step.py', args, isCompiled ? 120 : 60);
    }
  }
  // Importing torch takes as long as the timing: one process for all shapes.
  for (const precision of isCompiled ? precisions.slice(0, 1) : precisions) {
    const args = ['--precision', precision, '--shapes', shapes.join(','), ...repeats(true)];
    await python('head.py', args, isCompiled ? 150 : 90);
  }
}

/** A file of the native tests; where a test takes the process along, those after it in another one. */
async function runTestFile(test, file) {
  let first = 1;
  for (let start = 1; start <= 4; start += 1) {
    const args = [`--source-file=*${file}_test*`, '--duration=true', `--first=${first}`];
    const name = `${basename(test)} ${file}${start > 1 ? ` from test ${first}` : ''}`;
    const entry = await run('tests', name, join(kit, test), args, { seconds: 300, slow: true });
    if (entry === null || entry.text.includes('[doctest] Status')) return;
    const ended = entry.text.match(/^\d+\.\d+ s: /gm)?.length ?? 0;
    first += ended + 1; // past the one that did not end
  }
}

const parts = {
  async doctor() {
    await run('doctor', 'doctor', hardmine, ['doctor', '--json'], { seconds: 120, json: true });
  },

  async tests() {
    const { tests } = result.kit;
    if (tests.length === 0) return skipped('tests', 'the kit has no native GPU tests');
    if (onCpu) return skipped('tests', 'the native GPU tests need a GPU');
    for (const test of tests) {
      for (const file of TEST_FILES) await runTestFile(test, file);
    }
  },

  async agree() {
    const program = [join(kit, 'agree.mjs'), device];
    const options = { seconds: 240, json: true, slow: true };
    // What is compared with the CPU multiplies plain fp32.
    const env = { ...kitEnv, NVIDIA_TF32_OVERRIDE: '0' };
    const node = join(kit, 'bin', 'node');
    for (const what of ['losses', 'repeats', 'head']) {
      const args = [...program, what, ...(what === 'head' ? shapes : [])];
      await run('agree', what, node, args, { ...options, env });
    }
    await run('agree', 'together', node, [...program, 'together'], { ...options, seconds: 90 });
  },

  async step() {
    // Deterministic ones first: nothing is timed before them, so there are figures soon.
    for (const [precision, most] of [[stepPrecisions[0], 2], ...stepPrecisions.map((p) => [p])]) {
      for (const batch of batches.slice(0, most)) {
        const fixed = most === undefined ? [] : ['--deterministic'];
        const args = ['--device', device, '--precision', precision, '--batch', batch, ...classes];
        const name = `${precision} batch ${batch}${most === undefined ? '' : ' deterministic'}`;
        await bench('step', name, 'step', [...args, ...fixed, ...repeats()], 150);
      }
    }
  },

  async head() {
    for (const precision of precisions) {
      for (const shape of shapes) {
        const args = ['--device', device, '--precision', precision, '--shapes', shape];
        const long = isLong(shape);
        const name = `${precision} ${shape}`;
        await bench('head', name, 'head', [...args, ...repeats(long)], long ? 150 : 60);
      }
    }
  },

  async data() {
    const names = fs.existsSync(join(folder, 'data')) ? fs.readdirSync(join(folder, 'data')) : [];
    const rec = names.find((name) => name.endsWith('.rec'));
    if (rec === undefined) return skipped('data', 'no whole data set was carried (gpu:kit --data)');
    const path = join(folder, 'data', rec);
    for (const threads of onCpu ? [1] : [1, 4, 16]) {
      const args = ['--data', path, '--batch', 256, '--threads', threads, '--device', 'cpu'];
      await bench('data', `input, ${threads} threads`, 'data', [...args, ...repeats()], 60);
    }
    for (const batch of batches) {
      const args = ['--data', path, '--device', device, '--precision', stepPrecisions[0]];
      const name = `${stepPrecisions[0]} batch ${batch} from JPEG`;
      await bench('data', name, 'step', [...args, '--batch', batch, ...classes, ...repeats()], 150);
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
    // Our own kernels: those of the libraries would take most of the time.
    for (const tool of ['memcheck', 'racecheck', 'synccheck', 'initcheck']) {
      for (const test of tests) {
        for (const file of ['network_kernels', 'head']) {
          const what = ['--tool', tool, '--error-exitcode', '1', join(kit, test)];
          const args = [...what, `--source-file=*${file}_test*`, '--duration=true'];
          const options = { seconds: 120, slow: true };
          await run('sanitizer', `${tool} ${basename(test)} ${file}`, sanitizer, args, options);
        }
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
      const shown = figures.filter(Boolean).join(', ');
      if (shown !== '') lines.push(`${who} | ${name} | ${shown}`);
    }
  }
  return lines;
}

/** What the sessions found by timing: engines of convolutions, ways of batch-norms and lanes. */
const found = join(cache, 'hardmine', 'convolutions');
function choices() {
  if (!fs.existsSync(found)) return [];
  return fs.readdirSync(found).map((name) => {
    const [what, way] = fs.readFileSync(join(found, name), 'utf8').split('\n');
    return { what, way };
  });
}
const tar = (...args) => spawnSync('tar', args, { stdio: 'ignore' });
const carried = join(folder, 'ways.tgz');
if (!fs.existsSync(found) && fs.existsSync(carried)) {
  fs.mkdirSync(join(cache, 'hardmine'), { recursive: true });
  tar('xzf', carried, '-C', join(cache, 'hardmine'));
}

writeCommand();
save();
for (const part of PARTS.filter((name) => only.includes(name))) {
  await parts[part]();
  if (fs.existsSync(found)) {
    tar('czf', join(out, 'ways.tgz'), '-C', join(cache, 'hardmine'), 'convolutions');
  }
}
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
