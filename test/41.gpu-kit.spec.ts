// The GPU kit (scripts/gpu-kit.mjs, test/gpu/run.sh) on a small tree with stand-ins for Node's binary,
// the addon and hardmine; and scripts/setup-cuda.mjs with stand-ins for python3, nvidia-smi and nvcc.
// The kit of the real tree is tried by hand: `npm run gpu:kit && .gpu-kit/run.sh --device cpu`.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import * as fs from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { skip } from './helpers/skip.js';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const missing = ['bash', 'tar', 'xz', 'ldd', 'sha256sum', 'cksum', 'timeout'].filter(
  (tool) => spawnSync(tool, ['--version']).error !== undefined,
);

let folder: string;

function write(path: string, content: string | Buffer, mode = 0o644): string {
  const file = join(folder, path);
  fs.mkdirSync(dirname(file), { recursive: true });
  fs.writeFileSync(file, content, { mode });
  return file;
}

function start(command: string, args: string[], env: NodeJS.ProcessEnv = {}) {
  return spawnSync(command, args, {
    encoding: 'utf8',
    env: { ...process.env, OUT: '', ...env },
    timeout: 60_000, // milliseconds; each takes about one second
  });
}

beforeEach(() => {
  folder = fs.mkdtempSync(join(tmpdir(), 'hardmine-kit-'));
});
afterEach(() => fs.rmSync(folder, { recursive: true, force: true }));

describe('gpu:kit', () => {
  before(function () {
    if (missing.length > 0) skip(this, `${missing.join(', ')} not installed`);
  });

  /** Doctor answers, fp16 fails, the CPU hangs, bench step prints no JSON; args are noted. */
  const PROGRAM = `
    import { spawn } from 'node:child_process';
    import { appendFileSync } from 'node:fs';
    const args = process.argv.slice(2);
    appendFileSync(process.env.CALLS, args.join(' ') + '\\n');
    if (args[0] === 'doctor') {
      console.log(JSON.stringify({ libraries: process.env.LD_LIBRARY_PATH }));
    } else if (args.includes('cpu')) {
      spawn('sleep', ['600'], { stdio: 'inherit' }); // keeps the pipes open, and this process
    } else if (args.includes('fp16')) {
      console.error('no such kernel');
      process.exit(1);
    } else if (args[1] === 'head') {
      const [batch, dim, classes] = args[args.indexOf('--shapes') + 1].split('x').map(Number);
      console.log(JSON.stringify({ results: [
        { implementation: 'fused', batch, dim, classes, stepMs: { median: 1.25, min: 1, max: 2 } },
      ] }));
    } else {
      console.log('not JSON');
    }`;

  function makeTree(): { kit: (...args: string[]) => ReturnType<typeof start>; home: string } {
    for (const name of ['run.sh', 'run.mjs', 'agree.mjs']) {
      write(join('test/gpu', name), fs.readFileSync(join(ROOT, 'test/gpu', name)));
    }
    write('scripts/gpu-kit.mjs', fs.readFileSync(join(ROOT, 'scripts/gpu-kit.mjs')));
    write('package.json', '{ "version": "9.8.7", "type": "module" }');
    write('dist/cli/main.js', PROGRAM);
    write('dist/cli/main.d.ts', 'export {};');
    write('build/Release/hardmine_cpu.node', 'no library');
    write('bench/peers/head.py', 'raise SystemExit(1)');
    const packages = { 'node_modules/used': {}, 'node_modules/tool': { dev: true } };
    write('node_modules/.package-lock.json', JSON.stringify({ packages }));
    write('node_modules/used/index.js', '');
    write('node_modules/tool/index.js', '');
    const node = write('node', `#!/bin/sh\nexec '${process.execPath}' "$@"\n`, 0o755);
    const script = join(folder, 'scripts', 'gpu-kit.mjs');
    return {
      kit: (...args) => start(process.execPath, [script, '--node', node, ...args]),
      home: join(folder, '.gpu-kit'),
    };
  }

  it('packs what runs and no more, and runs it elsewhere', () => {
    const { kit, home } = makeTree();
    const packed = kit();
    assert.equal(packed.status, 0, packed.stderr);
    assert.match(packed.stderr, /no build\/Release\/hardmine_cuda\.node/);
    assert.deepEqual(fs.readdirSync(home).sort(), ['kit.tar.xz', 'run.sh']);

    const host = join(folder, 'host with spaces');
    fs.cpSync(home, host, { recursive: true });
    const calls = join(folder, 'calls');
    const site = dirname(dirname(dirname(write('site/nvidia/cudnn/lib/libcudnn.so.9', ''))));
    const asked = `case "$2" in *nvidia*) echo '["${site}"]';; *) exit 1;; esac`; // no torch
    write('bin/python3', `#!/bin/sh\n${asked}\n`, 0o755);
    write('bin/nvidia-smi', "#!/bin/sh\necho 'A GPU, 580.1, 81559 MiB, 9.0'\n", 0o755);
    const ran = start(join(host, 'run.sh'), ['--device', 'cuda', '--only', 'doctor,head,step'], {
      CALLS: calls,
      PATH: `${join(folder, 'bin')}:${process.env['PATH']}`,
    });
    assert.equal(ran.status, 1, ran.stderr); // fp16 fails here
    assert.ok(fs.existsSync(join(host, 'kit', 'node_modules', 'used', 'index.js')));
    assert.ok(!fs.existsSync(join(host, 'kit', 'node_modules', 'tool')));
    assert.ok(!fs.existsSync(join(host, 'kit', 'dist', 'cli', 'main.d.ts')));

    const result = JSON.parse(fs.readFileSync(join(host, 'result.json'), 'utf8')) as {
      kit: { version: string };
      host: { gpus: { driver: string }[] };
      runs: { part: string; name: string; ok: boolean; stderr?: string; output?: unknown }[];
    };
    assert.equal(result.kit.version, '9.8.7');
    assert.equal(result.host.gpus[0]!.driver, '580.1');
    const linked = join(host, 'cache', 'hardmine', 'cuda', 'nvidia', 'cudnn', 'lib');
    assert.deepEqual(fs.readdirSync(linked), ['libcudnn.so.9']);
    const of = (part: string) => result.runs.filter((run) => run.part === part);
    const { libraries } = of('doctor')[0]!.output as { libraries: string };
    assert.ok(libraries.startsWith(join(host, 'kit', 'lib')), libraries);
    assert.equal(of('head').length, 9); // three precisions, three shapes
    assert.deepEqual(
      of('head').map(({ name, ok }) => ok === !name.startsWith('fp16')),
      new Array(9).fill(true),
    );
    assert.match(of('head')[0]!.stderr!, /no such kernel/);
    assert.match(of('step').at(-1)!.stderr!, /printed no JSON: not JSON/);
    assert.match(ran.stderr, /hardmine fused \| fp32 1024x512x1000000 \| 1\.250 ms step/);
    const noted = fs.readFileSync(calls, 'utf8');
    for (const shape of ['64x512x10575', '512x512x85742', '1024x512x1000000']) {
      assert.match(noted, new RegExp(`bench head --json --device cuda --precision bf16.*${shape}`));
    }
    for (const batch of [64, 256, 1024]) {
      assert.match(noted, new RegExp(`bench step --json .*--precision bf16 --batch ${batch} `));
    }
  });

  it('ends a command that hangs, with all that it started, keeps the rest and tries no other like it', () => {
    const { kit, home } = makeTree();
    const runner = fs.readFileSync(join(ROOT, 'test/gpu/run.mjs'), 'utf8');
    const slow = /(const bench =[\s\S]*?)slow: true/;
    assert.match(runner, slow);
    write('test/gpu/run.mjs', runner.replace(slow, '$1slow: false'));
    assert.equal(kit().status, 0);
    const options = ['--device', 'cpu', '--only', 'doctor,step', '--seconds', '7'];
    const ran = start(join(home, 'run.sh'), options, { CALLS: join(folder, 'calls') });
    assert.equal(ran.status, 1, ran.stderr);
    const { runs } = JSON.parse(fs.readFileSync(join(home, 'result.json'), 'utf8')) as {
      runs: { part: string; ok: boolean; exit?: string; skipped?: string }[];
    };
    assert.deepEqual(
      runs.map(({ part, ok, exit, skipped }) => [
        part,
        ok,
        exit?.replace(/[67] s$/, 'N s') ?? skipped,
      ]),
      [
        ['doctor', true, undefined],
        ['step', false, 'over its limit of N s'],
        ['step', true, 'fp32 batch 4: a command before it hung'],
      ],
    );
  });

  it('goes on after a test that takes the process along, and starts nothing without time', () => {
    const { kit, home } = makeTree();
    // As doctest: two tests; the second one of the first file ends the process.
    const tests = write(
      'build/test_gpu',
      `#!/bin/sh
      echo "$*" >> "$CALLS"
      case "$*" in
        *network_kernels*--first=1) echo '0.1 s: one'; kill -SEGV $$;;
      esac
      echo '0.1 s: another'
      echo '[doctest] Status: SUCCESS!'
      `,
      0o755,
    );
    assert.ok(fs.existsSync(tests));
    assert.equal(kit().status, 0);
    const calls = join(folder, 'calls');
    const out = join(folder, 'out');
    fs.mkdirSync(out);
    const env = { CALLS: calls, OUT: out };
    const ran = start(join(home, 'run.sh'), ['--device', 'cuda', '--only', 'tests'], env);
    assert.equal(ran.status, 1, ran.stderr);
    const { runs } = JSON.parse(fs.readFileSync(join(out, 'result.json'), 'utf8')) as {
      runs: { name: string; ok: boolean; text?: string }[];
    };
    assert.deepEqual(
      runs.map(({ name, ok }) => [name, ok]),
      [
        ['test_gpu network_kernels', false],
        ['test_gpu network_kernels from test 3', true],
        ['test_gpu head', true],
        ['test_gpu session', true],
      ],
    );
    assert.match(runs[0]!.text!, /0\.1 s: one/);
    const log = fs.readFileSync(join(out, 'tests-test_gpu-network_kernels.log'), 'utf8');
    assert.equal(log, '0.1 s: one\n');
    assert.match(fs.readFileSync(calls, 'utf8'), /network_kernels_test\* .*--first=3\n/);

    const late = ['--device', 'cuda', '--only', 'tests', '--seconds', '2'];
    assert.equal(start(join(home, 'run.sh'), late, env).status, 0);
    assert.match(fs.readFileSync(join(out, 'result.json'), 'utf8'), /no time is left/);
  });

  it('brings back what sessions found by timing, and uses it on a fresh host', () => {
    const { kit, home } = makeTree();
    assert.equal(kit().status, 0);
    const host = join(folder, 'host');
    fs.cpSync(home, host, { recursive: true });
    const run = () =>
      start(join(host, 'run.sh'), ['--device', 'cpu', '--only', 'doctor'], {
        CALLS: join(folder, 'calls'),
      });
    assert.equal(run().status, 0);
    const ways = join(host, 'cache', 'hardmine', 'convolutions');
    fs.mkdirSync(ways, { recursive: true });
    fs.writeFileSync(join(ways, 'abc'), 'a convolution\nengine 3\n');
    assert.equal(run().status, 0);
    fs.rmSync(join(host, 'cache'), { recursive: true });
    assert.equal(run().status, 0);
    const { choices } = JSON.parse(fs.readFileSync(join(host, 'result.json'), 'utf8')) as {
      choices: unknown;
    };
    assert.deepEqual(choices, [{ what: 'a convolution', way: 'engine 3' }]);
  });

  it('splits data into shards that join to the same bytes, and tells when one is absent', () => {
    const { kit, home } = makeTree();
    const rec = randomBytes(700_001);
    const data = write('packed/train.rec', rec);
    write('packed/train.idx', '0\t0\n');
    write('packed/property', '2,112,112\n');
    const limit = 0.25; // MiB: the small kit fits, the data needs three
    const packed = kit('--data', data, '--limit', String(limit));
    assert.equal(packed.status, 0, packed.stderr);
    const shards = fs.readdirSync(home).filter((name) => name.startsWith('data-'));
    assert.deepEqual(shards, ['data-00', 'data-01', 'data-02']);
    for (const shard of shards) {
      const files = fs.readdirSync(join(home, shard)).map((name) => join(home, shard, name));
      const bytes = files.reduce((sum, file) => sum + fs.statSync(file).size, 0);
      assert.ok(bytes <= limit * 2 ** 20, `${shard} has ${bytes} bytes`);
    }
    const away = join(folder, 'data-01');
    fs.renameSync(join(home, 'data-01'), away);
    const run = () =>
      start(join(home, 'run.sh'), ['--device', 'cpu', '--only', 'doctor'], {
        CALLS: join(folder, 'calls'),
      });
    const partial = run();
    assert.equal(partial.status, 0, partial.stderr);
    assert.match(partial.stderr, /only 2 shards are here/);
    assert.ok(!fs.existsSync(join(home, 'data')));
    fs.renameSync(away, join(home, 'data-01'));
    const whole = run();
    assert.equal(whole.status, 0, whole.stderr);
    assert.ok(fs.readFileSync(join(home, 'data', 'train.rec')).equals(rec));
    assert.equal(fs.readFileSync(join(home, 'data', 'train.idx'), 'utf8'), '0\t0\n');
    assert.equal(fs.readFileSync(join(home, 'data', 'property'), 'utf8'), '2,112,112\n');
  });

  it('refuses a kit over the limit, names what is large and leaves nothing', () => {
    const { kit, home } = makeTree();
    write('node_modules/used/large.bin', randomBytes(300_000)); // does not compress
    const packed = kit('--limit', '0.125');
    assert.equal(packed.status, 1);
    assert.match(packed.stderr, /The kit is 0\.3 MiB and may be 0\.1 MiB: .*node_modules\/used \(/);
    assert.deepEqual(fs.readdirSync(home), []);
  });

  it('says what is not built', () => {
    const { kit } = makeTree();
    fs.rmSync(join(folder, 'dist'), { recursive: true });
    const packed = kit();
    assert.equal(packed.status, 1);
    assert.match(packed.stderr, /There is no dist\/cli\/main\.js: run `npm run build` first\./);
  });
});

describe('setup:cuda', () => {
  const target = () => join(folder, 'cache', 'hardmine', 'cuda');

  function program(name: string, body: string): void {
    write(join('bin', name), `#!/bin/sh\n${body}\n`, 0o755);
  }

  const DRIVER = (cuda: string) => program('nvidia-smi', `echo '| CUDA Version: ${cuda}  |'`);

  /** A pip that lays out what the wheels hold, or, told to, less or nothing. */
  function fakePip(mode: 'whole' | 'no cudnn' | 'fails' | 'absent'): void {
    const cudnn = mode === 'no cudnn' ? ': cudnn' : 'put nvidia/cudnn/lib/libcudnn.so.9';
    program(
      'python3',
      `PATH=$PATH:/usr/bin:/bin
      echo "$*" >> '${join(folder, 'calls')}'
      case "$*" in
        *--version*) ${mode === 'absent' ? 'case "$*" in *pip*) exit 1;; esac;' : ''} exit 0;;
      esac
      ${mode === 'fails' ? 'exit 1' : ''}
      while [ "$1" != --target ]; do shift; done
      put() { mkdir -p "$(dirname "$to/$1")"; echo "\${2-}" > "$to/$1"; chmod 755 "$to/$1"; }
      to=$2
      case "$*" in *nvidia-cudnn-cu13*)
        ${cudnn}; put nvidia/cu13/lib/libcublasLt.so.13; put nvidia/cu13/lib/libnvrtc.so.13;;
      *nvidia-cudnn-cu12*)
        ${cudnn}; put nvidia/cublas/lib/libcublasLt.so.12; put nvidia/cuda_nvrtc/lib/libnvrtc.so.12;;
      esac
      case "$*" in *nvidia-cuda-nvcc*)
        put nvidia/cu13/bin/nvcc '#!/bin/sh
echo Cuda compilation tools, release 13.0, V13.0.88'
        put nvidia/cu13/nvvm/bin/cicc; put nvidia/cu13/lib/libcudart_static.a
        put nvidia/cu13/include/cuda_runtime.h; put nvidia/cu13/include/crt/host_config.h
        put nvidia/cu13/include/cccl/nv/target;;
      esac`,
    );
  }

  function setUp(...args: string[]) {
    return start(process.execPath, [join(ROOT, 'scripts', 'setup-cuda.mjs'), ...args], {
      PATH: join(folder, 'bin'),
      XDG_CACHE_HOME: join(folder, 'cache'),
      ...{ CUDACXX: '', CUDA_HOME: '', CUDA_PATH: '' },
    });
  }

  /** The arguments of the last call of python3. */
  const lastCall = () => fs.readFileSync(join(folder, 'calls'), 'utf8').trim().split('\n').at(-1)!;

  beforeEach(() => fs.mkdirSync(join(folder, 'bin')));

  it('fetches compiler and libraries for the driver, then finds them and fetches nothing', () => {
    DRIVER('13.0');
    fakePip('whole');
    const first = setUp('--yes');
    assert.equal(first.status, 0, first.stderr);
    assert.match(first.stderr, /366 MB {2}nvidia-cudnn-cu13 >=9,<10/);
    assert.match(lastCall(), /pip install --target \S+\.partial --no-deps/);
    assert.match(lastCall(), /nvidia-cuda-nvcc>=13\.0,<13\.1 nvidia-nvvm>=13\.0,<13\.1 /);
    for (const file of ['cu13/lib64/libcublasLt.so.13', 'cudnn/lib/libcudnn.so.9']) {
      assert.ok(fs.existsSync(join(target(), 'nvidia', file)), file);
    }
    assert.deepEqual(fs.readdirSync(dirname(target())), ['cuda']);
    fs.rmSync(join(folder, 'calls'));
    const second = setUp('--yes');
    assert.equal(second.status, 0, second.stderr);
    assert.match(second.stderr, /nothing to fetch/);
    assert.ok(!fs.existsSync(join(folder, 'calls')));
  });

  it('--headers-only needs no driver; the libraries join them later', function () {
    if (fs.existsSync('/proc/driver/nvidia/version')) skip(this, 'this machine has a driver');
    fakePip('whole');
    const compiler = setUp('--headers-only', '--yes');
    assert.equal(compiler.status, 0, compiler.stderr);
    assert.doesNotMatch(lastCall(), /cudnn|cublas|nvrtc/);
    DRIVER('13.2');
    const libraries = setUp('--yes');
    assert.equal(libraries.status, 0, libraries.stderr);
    assert.doesNotMatch(lastCall(), /nvcc|nvvm/);
    assert.match(lastCall(), /nvidia-cuda-nvrtc>=13\.0,<13\.3/);
    for (const file of ['bin/nvcc', 'lib/libcudart_static.a', 'lib/libnvrtc.so.13']) {
      assert.ok(fs.existsSync(join(target(), 'nvidia', 'cu13', file)), file);
    }
  });

  it('for a driver of CUDA 12 fetches the libraries beside an nvcc that is there', () => {
    DRIVER('12.8');
    fakePip('whole');
    const without = setUp('--yes');
    assert.equal(without.status, 1);
    assert.match(without.stderr, /the wheels of CUDA 12 have no nvcc/);
    program('nvcc', 'echo release 12.4, V12.4.131');
    const beside = setUp('--yes');
    assert.equal(beside.status, 0, beside.stderr);
    assert.match(lastCall(), /nvidia-cudnn-cu12>=9,<10 nvidia-cublas-cu12>=12,<13/);
    assert.ok(fs.existsSync(join(target(), 'nvidia', 'cublas', 'lib', 'libcublasLt.so.12')));
  });

  it('leaves what was there when pip fails or brings less', () => {
    DRIVER('13.0');
    write('cache/hardmine/cuda/kept', '');
    for (const [mode, sentence] of [
      ['fails', /pip could not fetch the wheels/],
      ['no cudnn', /they lack libcudnn\.so\.9/],
    ] as const) {
      fakePip(mode);
      const { status, stderr } = setUp('--yes');
      assert.equal(status, 1);
      assert.match(stderr, sentence);
      assert.deepEqual(fs.readdirSync(dirname(target())), ['cuda']);
      assert.deepEqual(fs.readdirSync(target()), ['kept']);
    }
  });

  it('says in a sentence what is missing', () => {
    const refused = (sentence: RegExp, ...args: string[]): void => {
      const { status, stderr } = setUp(...args);
      assert.equal(status, 1);
      assert.match(stderr, sentence);
      assert.ok(!fs.existsSync(target()));
    };
    refused(/Unknown argument --all/, '--all');
    DRIVER('11.8');
    refused(/The driver runs CUDA 11\.8 and hardmine needs 12\.4/, '--yes');
    DRIVER('13.0');
    refused(/There is no python3/, '--yes');
    fakePip('absent');
    refused(/python3 has no pip/, '--yes');
    fakePip('whole');
    refused(/give --yes to fetch this/); // asked, with nobody there to answer
    if (fs.existsSync('/proc/driver/nvidia/version')) return;
    fs.rmSync(join(folder, 'bin', 'nvidia-smi'));
    refused(/No NVIDIA driver was found/, '--yes');
  });
});
