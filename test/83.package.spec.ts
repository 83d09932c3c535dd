// What npm would publish, installed into an empty folder as a user installs it: from the tarballs, without
// install scripts.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { skip } from './helpers/skip.js';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const PLATFORM = `@hardmine/${process.platform}-${process.arch}`;

/** A head of three classes, and where the process has oneDNN from. */
const PROGRAM = `
const { readFileSync } = await import('node:fs');
const head = await MarginHead.create({
  classes: 3, dim: 2, device: 'cpu', precision: 'fp32', implementation: 'fused', loss: { base: { kind: 'softmax' } },
});
const { loss } = await head.forwardBackward({
  embeddings: Float32Array.of(1, 0), weights: new Float32Array(6), bias: new Float32Array(3), labels: Int32Array.of(1),
});
await head.dispose();
const maps = readFileSync('/proc/self/maps', 'utf8').split('\\n');
const dnnl = maps.find((line) => line.includes('libdnnl')).replace(/^[^/]*/, '');
console.log(JSON.stringify({ loss, dnnl }));
`;

describe('the published packages', function () {
  // npm packs and installs some 60 MB; a busy machine takes many times as long.
  this.timeout(600_000);
  let folder: string;
  let installed: string;

  const run = (command: string, ...args: string[]) => {
    // npm's own configuration, and what mocha's process was given, are not the user's.
    const { PATH, HOME } = process.env;
    const { status, stdout, stderr } = spawnSync(command, args, {
      cwd: folder,
      encoding: 'utf8',
      env: { PATH, HOME },
    });
    return { status, stdout, stderr };
  };
  /** One program that must succeed and keep stderr empty. */
  const output = (command: string, ...args: string[]): string => {
    const { status, stdout, stderr } = run(command, ...args);
    assert.deepEqual({ status, stderr }, { status: 0, stderr: '' }, stdout);
    return stdout;
  };
  const program = (name: string, text: string): string => {
    writeFileSync(join(folder, name), text);
    return join(folder, name);
  };

  before(function () {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-package-'));
    if (PLATFORM !== '@hardmine/linux-x64')
      skip(this, `there is no prebuilt addon for ${PLATFORM}`);
    const made = spawnSync(process.execPath, ['scripts/package.mjs'], {
      cwd: ROOT,
      encoding: 'utf8',
    });
    assert.equal(made.status, 0, made.stderr);
    const packages = join(ROOT, 'build', 'packages');
    const tarballs = readdirSync(packages)
      .filter((name) => name.endsWith('.tgz') && !name.includes('cuda'))
      .map((name) => join(packages, name));
    assert.equal(tarballs.length, 2);
    writeFileSync(join(folder, 'package.json'), '{"private": true}');
    const quiet = ['--ignore-scripts', '--no-audit', '--no-fund', '--prefer-offline'];
    const npm = spawnSync('npm', ['install', ...quiet, ...tarballs], {
      cwd: folder,
      encoding: 'utf8',
    });
    if (/E(NOTFOUND|AI_AGAIN|CONNREFUSED|TIMEDOUT)/.test(npm.stderr)) {
      skip(this, 'npm does not reach its registry');
    }
    assert.equal(npm.status, 0, npm.stderr);
    installed = join(folder, 'node_modules', 'hardmine');
  });
  after(() => rmSync(folder, { recursive: true, force: true }));

  it('hold what a user needs and nothing else', () => {
    const top = readdirSync(installed).sort();
    for (const name of ['src', 'test', 'bench', 'node_modules', 'build', 'npm']) {
      assert.ok(!top.includes(name), name);
    }
    for (const name of [
      'dist',
      'CMakeLists.txt',
      'core',
      'LICENSE',
      'README.md',
      'config.schema.json',
    ]) {
      assert.ok(top.includes(name), name);
    }
    const { scripts } = JSON.parse(readFileSync(join(installed, 'package.json'), 'utf8'));
    for (const name of ['preinstall', 'install', 'postinstall', 'prepare']) {
      assert.equal(scripts[name], undefined, name);
    }
    const licences = readdirSync(join(folder, 'node_modules', PLATFORM, 'licenses'));
    const libraries = readdirSync(join(folder, 'node_modules', PLATFORM)).filter((name) =>
      name.includes('.so.'),
    );
    assert.ok(libraries.some((name) => name.startsWith('libdnnl.so')));
    assert.equal(licences.length, libraries.length + 1, `${licences} for ${libraries}`);
  });

  it('are imported and required, with the libraries of the package, and are silent', () => {
    const files = [
      program('a.mjs', `import { MarginHead } from 'hardmine';${PROGRAM}`),
      program('a.cjs', `const { MarginHead } = require('hardmine');(async()=>{${PROGRAM}})();`),
    ];
    for (const file of files) {
      const { loss, dnnl } = JSON.parse(output(process.execPath, file));
      // Cross entropy of three equal logits.
      assert.ok(Math.abs(loss - Math.log(3)) < 1e-6, `${loss}`);
      assert.match(dnnl, /node_modules\/@hardmine\/linux-x64\/libdnnl/);
    }
  });

  it('have a command line', () => {
    const bin = join(folder, 'node_modules', '.bin', 'hardmine');
    const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8'));
    assert.equal(output(bin, '--version').trim(), version);
    const { backends } = JSON.parse(output(bin, 'doctor', '--json'));
    assert.equal(backends[0].usable, true);
  });

  it('have types for ESM and CommonJS', () => {
    const use = (load: string) =>
      `${load}\nconst model: Promise<FaceModel> = FaceModel.load('m', { device: 'cpu' });\n// @ts-expect-error no such device\nFaceModel.load('m', { device: 1 });\nexport { model };\n`;
    program('b.mts', use(`import { FaceModel } from 'hardmine';`));
    program('b.cts', use(`import { FaceModel } from 'hardmine';`));
    const options = {
      ...{ module: 'nodenext', target: 'es2023', strict: true, noEmit: true, skipLibCheck: false },
      ...{ types: ['node'], typeRoots: [join(ROOT, 'node_modules', '@types')] },
    };
    program(
      'tsconfig.json',
      JSON.stringify({ compilerOptions: options, files: ['b.mts', 'b.cts'] }),
    );
    output(process.execPath, join(ROOT, 'node_modules/typescript/bin/tsc'), '-p', folder);
  });

  it('say in one message what to do without the addon, or with that of another version', () => {
    const file = program('c.mjs', "import { devices } from 'hardmine'; devices();");
    const where = join(folder, 'node_modules', PLATFORM);
    const aside = join(folder, 'aside');
    renameSync(where, aside);
    try {
      const { status, stderr } = run(process.execPath, file);
      assert.equal(status, 1);
      const message = stderr.split('\n').find((line) => line.includes('could not be loaded')) ?? '';
      assert.match(message, /on linux-x64 \(Node [\d.]+, Node-API \d+, glibc [\d.]+\)/);
      assert.match(message, /tried \S+hardmine_cpu\.node and the package @hardmine\/linux-x64/);
      assert.match(message, /To mend it, run `npm install @hardmine\/linux-x64`.*`npm run build`/);
      mkdirSync(where);
      cpSync(aside, where, { recursive: true });
      const manifest = readFileSync(join(where, 'package.json'), 'utf8');
      writeFileSync(join(where, 'package.json'), manifest.replace('"0.1.0"', '"0.0.9"'));
      const other = run(process.execPath, file);
      assert.equal(other.status, 1);
      assert.match(other.stderr, /has version 0\.0\.9, .*npm install @hardmine\/linux-x64@0\.1\.0/);
    } finally {
      rmSync(where, { recursive: true, force: true });
      if (existsSync(aside)) renameSync(aside, where);
    }
  });
});
