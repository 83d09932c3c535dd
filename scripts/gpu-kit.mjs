// Packs into .gpu-kit/ what an offline GPU host without Node needs to run hardmine's GPU tests and
// benchmarks: kit.tar.xz and run.sh, which unpacks and runs it (test/gpu/run.sh). Plain Node.
//
//   node scripts/gpu-kit.mjs [--data FILE.rec] [--limit MIB] [--node FILE]
//
// --data splits a packed data set into .gpu-kit/data-NN/, each small enough to be carried alone;
// run.sh joins those that it finds. --limit is what the kit, and each data-NN, may weigh (60 MiB).
// --node packs another Node binary than the one that runs this.

import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import * as fs from 'node:fs';
import { basename, dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
const KIT = join(ROOT, '.gpu-kit');
const ARCHIVE = join(KIT, 'kit.tar.xz');
const MIB = 2 ** 20;

/** A failure that a person can mend: printed without a stack trace. */
class KitError extends Error {}

const say = (text) => process.stderr.write(`gpu-kit: ${text}\n`);
const mib = (bytes) => `${(bytes / MIB).toFixed(1)} MiB`;

function output(command, args) {
  const { status, stdout } = spawnSync(command, args, { cwd: ROOT, encoding: 'utf8' });
  return status === 0 ? stdout.trim() : null;
}

function sizeOf(path) {
  const stat = fs.lstatSync(path);
  if (!stat.isDirectory()) return stat.size;
  return fs.readdirSync(path).reduce((sum, name) => sum + sizeOf(join(path, name)), 0);
}

// --- the kit ---

/** Copies ROOT/path, where it is, to stage/path; declarations, maps and prose stay behind. */
function copyTree(stage, path) {
  const from = join(ROOT, path);
  if (!fs.existsSync(from)) return;
  const needless = /\.(?:[cm]?ts|map|md|markdown)$/;
  fs.cpSync(from, join(stage, path), {
    recursive: true,
    dereference: true,
    filter: (file) => !needless.test(file) || fs.statSync(file).isDirectory(),
  });
}

/** Folders of the packages that dist/ runs on: those that npm installed for more than development. */
function productionPackages() {
  const list = join(ROOT, 'node_modules', '.package-lock.json');
  if (!fs.existsSync(list)) {
    throw new KitError('node_modules/ was not installed by npm: run `npm run build` first.');
  }
  const { packages } = JSON.parse(fs.readFileSync(list, 'utf8'));
  return Object.entries(packages)
    .filter(([, entry]) => !entry.dev && !entry.devOptional && !entry.peer)
    .map(([path]) => path)
    .filter((path) => fs.existsSync(join(ROOT, path)));
}

/** Libraries that every Linux with glibc has, or that belong to the GPU's driver. */
const OF_THE_HOST =
  /^(?:linux-vdso|ld-linux|libc|libm|libdl|librt|libpthread|libutil|libresolv|libcuda|libnvidia)[-.]/;
/** A host's own are newer as a rule, and its CUDA libraries may need them: used only where they fail. */
const FALLBACK = /^(?:libstdc\+\+|libgcc_s)\./;

/** The shared libraries that `binaries` load, name -> file, without those that travel anyway. */
function librariesOf(binaries) {
  const found = new Map();
  for (const binary of binaries) {
    const text = output('ldd', [binary]);
    if (text === null) continue; // not a dynamic executable
    for (const [, name, file] of text.matchAll(/^\s*(\S+) => (not found|\S+)/gm)) {
      if (OF_THE_HOST.test(name)) continue;
      if (file === 'not found') {
        throw new KitError(
          `${relative(ROOT, binary)} needs ${name}, which is not on this machine: run \`npm run build\`.`,
        );
      }
      if (!file.startsWith(join(ROOT, 'node_modules'))) found.set(name, file);
    }
  }
  return found;
}

function filesBelow(folder, wanted) {
  if (!fs.existsSync(folder)) return [];
  return fs
    .readdirSync(folder, { recursive: true })
    .map((name) => join(folder, String(name)))
    .filter((file) => wanted.test(basename(file)) && fs.statSync(file).isFile());
}

function copyNode(node, target) {
  fs.mkdirSync(dirname(target), { recursive: true });
  fs.copyFileSync(node, target);
  fs.chmodSync(target, 0o755);
  // Only makes it smaller: a binary that cannot be stripped travels as it is.
  spawnSync('strip', ['--strip-all', target], { stdio: 'ignore' });
}

/** Lays out under `stage` what the archive holds. */
function assemble(stage, node) {
  const addons = ['cpu', 'cuda'].map((name) => `build/Release/hardmine_${name}.node`);
  for (const path of ['dist/cli/main.js', addons[0]]) {
    if (!fs.existsSync(join(ROOT, path))) {
      throw new KitError(`There is no ${path}: run \`npm run build\` first.`);
    }
  }
  if (!fs.existsSync(join(ROOT, addons[1]))) {
    say(`there is no ${addons[1]}: this kit runs on the CPU alone (run.sh --device cpu)`);
  }
  const tests = filesBelow(join(ROOT, 'build'), /^test_gpu[^.]*$/).filter(
    (file) => dirname(file) === join(ROOT, 'build'),
  );
  if (tests.length === 0) say('there is no build/test_gpu*: this kit has no native GPU tests');

  const packages = productionPackages();
  const trees = ['package.json', 'dist', 'bench/peers', ...addons, ...packages];
  for (const path of [...trees, ...tests.map((file) => relative(ROOT, file))]) {
    copyTree(stage, path);
  }
  copyNode(node, join(stage, 'bin', 'node'));
  for (const name of ['run.mjs', 'agree.mjs']) {
    fs.copyFileSync(join(ROOT, 'test', 'gpu', name), join(stage, name));
  }

  const natives = filesBelow(join(stage, 'node_modules'), /\.node$/);
  const binaries = [node, ...addons.map((path) => join(ROOT, path)), ...tests];
  const carried = librariesOf([
    ...binaries.filter((file) => fs.existsSync(file)),
    ...natives.map((file) => join(ROOT, relative(stage, file))),
  ]);
  for (const [name, file] of carried) {
    const folder = join(stage, FALLBACK.test(name) ? 'lib-fallback' : 'lib');
    fs.mkdirSync(folder, { recursive: true });
    fs.copyFileSync(file, join(folder, name));
  }
  const { version } = JSON.parse(fs.readFileSync(join(ROOT, 'package.json'), 'utf8'));
  const about = {
    version,
    commit: output('git', ['describe', '--always', '--dirty', '--abbrev=12']),
    packed: new Date().toISOString(),
    tests: tests.map((file) => relative(ROOT, file)),
  };
  fs.writeFileSync(join(stage, 'kit.json'), `${JSON.stringify(about, null, 2)}\n`);
}

/** The sizes of what is in `stage`, largest first: the libraries one by one, the rest by folder. */
function partsOf(stage) {
  const each = (folder) =>
    fs.existsSync(join(stage, folder))
      ? fs.readdirSync(join(stage, folder)).map((name) => join(folder, name))
      : [];
  const single = ['lib', 'build/Release', 'node_modules'];
  const paths = [...each('.').filter((path) => !['lib', 'build', 'node_modules'].includes(path))];
  paths.push(...single.flatMap(each), ...each('build').filter((path) => path !== 'build/Release'));
  return paths
    .map((path) => ({ path, bytes: sizeOf(join(stage, path)) }))
    .sort((a, b) => b.bytes - a.bytes);
}

/** Builds the native GPU tests, where the build knows them: only a kit has a use for them. */
function buildTests() {
  const build = join(ROOT, 'build');
  const targets = output('cmake', ['--build', build, '--target', 'help']) ?? '';
  if (!/\btest_gpu\b/.test(targets)) return;
  say('building the native GPU tests (minutes)');
  const { status } = spawnSync('cmake', ['--build', build, '--target', 'test_gpu'], {
    stdio: ['ignore', 2, 2],
  });
  if (status !== 0) throw new KitError('The native GPU tests could not be built; see above.');
}

function pack(node, limit) {
  if (output('xz', ['--version']) === null) {
    throw new KitError('There is no xz on this machine: install xz-utils and run this again.');
  }
  const stage = join(KIT, 'stage.tmp');
  const packed = `${ARCHIVE}.tmp`;
  const clean = () => {
    for (const path of [stage, packed]) fs.rmSync(path, { recursive: true, force: true });
  };
  clean();
  buildTests();
  fs.rmSync(ARCHIVE, { force: true }); // a kit that fails must not leave an older one to be taken for it
  fs.mkdirSync(stage, { recursive: true });
  try {
    assemble(stage, node);
    const parts = partsOf(stage);
    const whole = parts.reduce((sum, { bytes }) => sum + bytes, 0);
    for (const { path, bytes } of parts.filter(({ bytes }) => bytes >= 0.05 * MIB)) {
      say(`${mib(bytes).padStart(10)}  ${path}`);
    }
    say(`${mib(whole).padStart(10)}  unpacked; compressing (a minute)`);
    // The same files give the same archive: fixed order, owner and time.
    const tar = spawnSync(
      'tar',
      [
        ...['--sort=name', '--owner=0', '--group=0', '--numeric-owner', '--mtime=@0'],
        ...['-I', 'xz -6 -T2', '-cf', packed, '-C', stage, '.'],
      ],
      { stdio: ['ignore', 2, 2] },
    );
    if (tar.status !== 0) throw new KitError('tar could not pack the kit: see its message above.');
    const bytes = fs.statSync(packed).size;
    if (bytes > limit) {
      const largest = parts.slice(0, 3).map(({ path, bytes }) => `${path} (${mib(bytes)})`);
      throw new KitError(
        `The kit is ${mib(bytes)} and may be ${mib(limit)}: make its largest parts smaller, ${largest.join(', ')}.`,
      );
    }
    fs.renameSync(packed, ARCHIVE);
    fs.copyFileSync(join(ROOT, 'test', 'gpu', 'run.sh'), join(KIT, 'run.sh'));
    fs.chmodSync(join(KIT, 'run.sh'), 0o755);
    say(`${mib(bytes).padStart(10)}  ${relative(ROOT, ARCHIVE)} (at most ${mib(limit)})`);
  } finally {
    clean();
  }
}

// --- data ---

const PIECE = 8 * MIB; // read at once

function sha256(file) {
  const hash = createHash('sha256');
  const handle = fs.openSync(file, 'r');
  const buffer = Buffer.alloc(PIECE);
  for (;;) {
    const bytes = fs.readSync(handle, buffer);
    if (bytes === 0) break;
    hash.update(buffer.subarray(0, bytes));
  }
  fs.closeSync(handle);
  return hash.digest('hex');
}

/**
 * Splits the data set of a .rec into data-NN/FILE.part-NN of at most `limit` bytes a folder. Each
 * folder has the sums of the whole files, by which run.sh sees whether all folders have come.
 */
function split(rec, limit) {
  if (!rec.endsWith('.rec') || !fs.existsSync(rec)) {
    throw new KitError(
      `--data needs the .rec file of a packed data set, not ${rec}: \`hardmine pack\` makes one.`,
    );
  }
  const stem = rec.slice(0, -'.rec'.length);
  const files = [`${stem}.idx`, `${stem}.crc`, join(dirname(rec), 'property'), rec].filter((file) =>
    fs.existsSync(file),
  );
  for (const name of fs.readdirSync(KIT)) {
    if (/^data-\d+$/.test(name)) fs.rmSync(join(KIT, name), { recursive: true });
  }
  const sums = files.map((file) => `${sha256(file)}  ${basename(file)}\n`).join('');
  const room = limit - sums.length;
  if (room < 1) throw new KitError(`A limit of ${limit} bytes leaves no room for data.`);
  const total = files.reduce((sum, file) => sum + fs.statSync(file).size, 0);
  // Equal widths, so that the shell's order of names is the order of the parts.
  const digits = Math.max(2, String(Math.ceil(total / room)).length);
  let shard = -1;
  let left = 0;
  const open = () => {
    shard += 1;
    left = room;
    const number = String(shard).padStart(digits, '0');
    const folder = join(KIT, `data-${number}`);
    fs.mkdirSync(folder, { recursive: true });
    fs.writeFileSync(join(folder, 'SHA256SUMS'), sums);
  };
  const buffer = Buffer.alloc(PIECE);
  for (const file of files) {
    const handle = fs.openSync(file, 'r');
    for (;;) {
      if (left === 0) open();
      const bytes = fs.readSync(handle, buffer, 0, Math.min(PIECE, left));
      if (bytes === 0) break;
      const number = String(shard).padStart(digits, '0');
      const part = join(KIT, `data-${number}`, `${basename(file)}.part-${number}`);
      fs.appendFileSync(part, buffer.subarray(0, bytes));
      left -= bytes;
    }
    fs.closeSync(handle);
  }
  const folders = fs.readdirSync(KIT).filter((name) => /^data-\d+$/.test(name));
  for (const name of folders.sort()) {
    say(`${mib(sizeOf(join(KIT, name))).padStart(10)}  .gpu-kit/${name}`);
  }
}

function parseArguments(args) {
  const options = { data: null, limit: 60 * MIB, node: process.execPath };
  for (let i = 0; i < args.length; i += 2) {
    const [name, value] = [args[i], args[i + 1]];
    if (!['--data', '--limit', '--node'].includes(name) || value === undefined) {
      throw new KitError(
        `Cannot read ${name}: give --data FILE.rec, --limit MIB or --node FILE, each with its value.`,
      );
    }
    if (name === '--data') options.data = resolve(value);
    if (name === '--node') options.node = resolve(value);
    if (name === '--limit') {
      options.limit = Math.floor(Number(value) * MIB);
      if (!(options.limit > 0)) {
        throw new KitError(`--limit needs a number of MiB above 0, not ${value}.`);
      }
    }
  }
  return options;
}

try {
  const { data, limit, node } = parseArguments(process.argv.slice(2));
  pack(node, limit);
  if (data !== null) split(data, limit);
} catch (error) {
  if (!(error instanceof KitError)) throw error;
  say(error.message);
  process.exitCode = 1;
}
