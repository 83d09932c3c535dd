// Makes what is published, into build/packages/: hardmine itself and, for the platform of this machine,
// the packages of its addons with the shared libraries they need and those libraries' licences. With
// --check also has publint and "are the types wrong?" look at the result, which npm fetches.
//
//   node scripts/package.mjs [--check]
//
// The libraries are those of the system that it runs on, so publish from the oldest one that is to be
// supported; it prints the least glibc and libstdc++ that they need.

import { execFileSync } from 'node:child_process';
import * as fs from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = dirname(dirname(fileURLToPath(import.meta.url)));
const OUT = join(ROOT, 'build', 'packages');
/** Those of glibc and of the compiler, which every system has. */
const OF_THE_SYSTEM =
  /^(linux-vdso|ld-linux|libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+)[-.]/;
const CHECKERS = ['publint@0.3.25', '@arethetypeswrong/cli@0.18.5'];

const say = (text) => process.stderr.write(`package: ${text}\n`);
const capture = (command, ...args) =>
  execFileSync(command, args, {
    cwd: ROOT,
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  });

/** Paths of the libraries that a file needs, and that those need. */
function librariesOf(file) {
  const lines = capture('ldd', file).split('\n');
  const missing = lines.find((line) => line.includes('not found'));
  if (missing) throw new Error(`${file}: ${missing.trim()}`);
  return lines
    .map((line) => /^\s*(\S+) => (\/\S+)/.exec(line))
    .filter((match) => match !== null && !OF_THE_SYSTEM.test(match[1]))
    .map(([, name, path]) => ({ name, path: fs.realpathSync(path) }));
}

/** Debian keeps a package's licence where its name says. */
function licenceOf(path) {
  const owner = capture('dpkg', '-S', path).split(':')[0];
  return { owner, licence: `/usr/share/doc/${owner}/copyright` };
}

/** The newest symbol versions that the files ask of the system, as "GLIBC_2.34". */
function floorOf(files) {
  const versions = files.flatMap(
    (file) => capture('objdump', '-T', file).match(/\bGLIBC(XX)?_[\d.]+/g) ?? [],
  );
  const newest = (prefix) =>
    versions
      .filter((version) => version.startsWith(`${prefix}_`))
      .sort((a, b) => a.localeCompare(b, 'en', { numeric: true }))
      .at(-1);
  return [newest('GLIBC'), newest('GLIBCXX')].filter(Boolean).join(', ');
}

/** A folder with a platform's package: its addon, the libraries of that and their licences; null where it is not built. */
function stage(platform, addon) {
  const source = join(ROOT, 'build', 'Release', addon);
  const manifest = join(ROOT, 'npm', platform, 'package.json');
  if (!fs.existsSync(source) || !fs.existsSync(manifest)) return null;
  const folder = join(OUT, platform);
  fs.mkdirSync(join(folder, 'licenses'), { recursive: true });
  fs.copyFileSync(manifest, join(folder, 'package.json'));
  fs.copyFileSync(join(ROOT, 'LICENSE'), join(folder, 'licenses', 'hardmine'));
  fs.copyFileSync(source, join(folder, addon));
  for (const { name, path } of librariesOf(source)) {
    fs.copyFileSync(path, join(folder, name));
    const { owner, licence } = licenceOf(path);
    fs.copyFileSync(licence, join(folder, 'licenses', owner));
  }
  const files = fs.readdirSync(folder).filter((name) => /\.(node|so\.\d+)$/.test(name));
  say(`${platform}: ${files.join(' ')}; needs ${floorOf(files.map((file) => join(folder, file)))}`);
  return folder;
}

function pack(folder) {
  const [{ filename, size }] = JSON.parse(
    execFileSync('npm', ['pack', '--json', '--pack-destination', OUT], {
      cwd: folder,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    }),
  );
  say(`${filename}, ${(size / 1e6).toFixed(1)} MB`);
  return join(OUT, filename);
}

execFileSync(process.execPath, [join(ROOT, 'scripts', 'setup.mjs')], { stdio: 'inherit' });
fs.rmSync(OUT, { recursive: true, force: true });
fs.mkdirSync(OUT, { recursive: true });
const main = pack(ROOT);
const platform = `${process.platform}-${process.arch}`;
for (const folder of [
  stage(platform, 'hardmine_cpu.node'),
  stage(`${platform}-cuda`, 'hardmine_cuda.node'),
]) {
  if (folder !== null) pack(folder);
}
if (process.argv.includes('--check')) {
  const npx = (...args) => execFileSync('npx', ['--yes', ...args], { cwd: ROOT, stdio: 'inherit' });
  npx('-p', CHECKERS[0], 'publint', 'run', main, '--strict');
  npx('-p', CHECKERS[1], 'attw', main, '--profile', 'esm-only');
}
