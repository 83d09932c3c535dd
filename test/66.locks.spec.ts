// One process at a time in a run directory and in what align writes: who comes second is told so at once, and
// nothing that ends a holder leaves a lock behind.
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import {
  cp,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { Worker } from 'node:worker_threads';
import sharp from 'sharp';
import { alignFolder } from '../src/align/align-folder.js';
import { faceTemplate } from '../src/align/similarity.js';
import { FolderLock } from '../src/data/folder-lock.js';
import { HardmineError } from '../src/errors.js';
import { checkpointName } from '../src/train/checkpoint.js';
import { readStatus } from '../src/train/run-files.js';
import { Trainer } from '../src/trainer.js';
import { finish, MAIN, ROOT } from './helpers/built.js';
import { type LogLine, watch } from './helpers/children.js';
import { endOf, holding, LOCK_MODULE, startHolder } from './helpers/lock-holder.js';
import { skip } from './helpers/skip.js';
import { drawFaces, smallConfig } from './helpers/small-training.js';

const LOCK_FILE = '.hardmine.lock';
/** For ever, until it is killed. */
const STAY = 'setInterval(() => {}, 1000);';

/** Everything below a folder with size and time of change, in nanoseconds. */
async function snapshot(folder: string): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  for (const name of await readdir(folder, { recursive: true })) {
    const { size, mtimeNs } = await stat(join(folder, name), { bigint: true });
    found[name] = `${size} ${mtimeNs}`;
  }
  return found;
}

async function refusal(work: Promise<unknown>): Promise<HardmineError> {
  const error = await work.then(
    () => assert.fail('it was not refused'),
    (caught: unknown) => caught,
  );
  assert.ok(error instanceof HardmineError, String(error));
  assert.equal(error.code, 'ERR_BUSY', error.message);
  return error;
}

async function inUse(folder: string, pattern: RegExp): Promise<void> {
  const { message } = await refusal(FolderLock.take(folder));
  assert.ok(message.startsWith(`${folder} is in use by `), message);
  assert.match(message, pattern);
}

const isFree = async (folder: string): Promise<void> => (await FolderLock.take(folder)).release();

describe('the lock of a folder', function () {
  this.timeout(120_000); // seconds; a machine with other work starts processes slowly
  let root: string;
  let folder: string;
  beforeEach(async () => {
    root = await mkdtemp(join(tmpdir(), 'hardmine-lock-'));
    folder = join(root, 'a', 'run');
  });
  afterEach(() => rm(root, { recursive: true, force: true }));

  it('is had once in a process, and says since when', async () => {
    const before = Date.now();
    const lock = await FolderLock.take(folder);
    assert.equal(lock.warning, null);
    const { message } = await refusal(FolderLock.take(folder));
    const since = /^.*run is in use by this very process since (\S+Z): dispose/.exec(message);
    const at = Date.parse(since?.[1] ?? '');
    assert.ok(at >= before && at <= Date.now(), message);
    // Another folder is another lock.
    await isFree(join(root, 'b'));
    await Promise.all([lock.release(), lock.release()]);
    await lock.release();
    // What was made for it is gone, and what was there is not.
    assert.deepEqual(await readdir(root), []);
    await mkdir(folder, { recursive: true });
    await isFree(folder);
    assert.deepEqual(await readdir(join(root, 'a')), ['run']);
  });

  it('stays with what was written meanwhile', async () => {
    const lock = await FolderLock.take(folder);
    await writeFile(join(folder, 'result'), '');
    await lock.release();
    assert.deepEqual(await readdir(folder), ['result']);
  });

  it('goes to one of many that ask at once, time after time', async () => {
    for (let round = 0; round < 10; round++) {
      const asked = await Promise.allSettled(
        Array.from({ length: 8 }, () => FolderLock.take(folder)),
      );
      const had = asked.flatMap((one) => (one.status === 'fulfilled' ? [one.value] : []));
      assert.equal(had.length, 1);
      for (const one of asked) {
        if (one.status === 'rejected') await refusal(Promise.reject(one.reason));
      }
      await had[0]!.release();
      assert.ok(!existsSync(join(folder, LOCK_FILE)));
    }
  });

  it('is never had twice while processes take it and give it back, the folder with it', async () => {
    // Who has it makes a file, which must not be there yet, and removes it.
    const program = `
      const { FolderLock } = await import(${JSON.stringify(LOCK_MODULE)});
      const { rmSync, writeFileSync } = await import('node:fs');
      const inside = ${JSON.stringify(join(folder, 'inside'))};
      let had = 0;
      for (const until = Date.now() + 1500; had === 0 || Date.now() < until; ) {
        try {
          const lock = await FolderLock.take(${JSON.stringify(folder)});
          writeFileSync(inside, '', { flag: 'wx' });
          rmSync(inside);
          had++;
          await lock.release();
        } catch (error) {
          if (error.code !== 'ERR_BUSY') throw error;
        }
      }
      process.stdout.write(String(had));`;
    const children = Array.from({ length: 3 }, () =>
      finish(
        spawn(process.execPath, ['--input-type=module', '--eval', program], {
          stdio: ['ignore', 'pipe', 'pipe'],
        }),
      ),
    );
    const counts = [];
    for (const { code, stdout, stderr } of await Promise.all(children)) {
      assert.equal(code, 0, stderr);
      counts.push(Number(stdout));
    }
    console.log(`      taken ${counts.join(', ')} times`);
    assert.ok(counts.every((count) => count > 0));
  });

  it('is free as soon as its holder is killed, and says who holds it until then', async () => {
    for (let round = 0; round < 3; round++) {
      const child = await startHolder(folder, STAY);
      const host = hostname().replace(/[^\w.-]/g, '.');
      await inUse(folder, new RegExp(`by process ${child.pid} on ${host} since \\S+Z: wait until`));
      child.kill('SIGKILL');
      assert.equal((await endOf(child)).signal, 'SIGKILL');
      assert.ok(existsSync(join(folder, LOCK_FILE)));
      const lock = await FolderLock.take(folder);
      // Nothing of the longer or shorter text before.
      const note = JSON.parse(await readFile(join(folder, LOCK_FILE), 'utf8'));
      assert.equal(note.pid, process.pid);
      await lock.release();
      assert.ok(!existsSync(join(folder, LOCK_FILE)));
    }
  });

  const ends: [string, string, { code: number | null; signal: NodeJS.Signals | null }][] = [
    ['the end of its program', '', { code: 0, signal: null }],
    ['process.exit', 'process.exit(3)', { code: 3, signal: null }],
    [
      'an exception',
      "setTimeout(() => { throw new Error('planted'); })",
      { code: 1, signal: null },
    ],
    ['an abort', 'process.abort()', { code: null, signal: 'SIGABRT' }],
  ];
  for (const [name, rest, end] of ends) {
    it(`is free after ${name}, and keeps no process alive`, async () => {
      const child = await startHolder(folder, rest);
      assert.deepEqual(await endOf(child), end);
      assert.equal(existsSync(join(folder, LOCK_FILE)), end.signal !== null);
      await isFree(folder);
    });
  }

  it('is free when a worker thread is terminated, and kept from it before', async () => {
    const program = `(async () => { ${holding(folder, "require('node:worker_threads').parentPort.postMessage('held');")} ${STAY} })();`;
    const worker = new Worker(program, { eval: true, stdout: true });
    await once(worker, 'message');
    await inUse(folder, /by this very process since/);
    await worker.terminate();
    assert.ok(!existsSync(join(folder, LOCK_FILE)));
    await isFree(folder);
  });

  it('is free when nobody has a hold of it any more', async () => {
    const child = await startHolder(
      folder,
      `lock = null;
       const { existsSync } = await import('node:fs');
       const file = ${JSON.stringify(join(folder, LOCK_FILE))};
       for (let i = 0; i < 200 && existsSync(file); i++) {
         gc();
         await new Promise((resolve) => setTimeout(resolve, 20));
       }
       process.exit(existsSync(file) ? 1 : 0);`,
      { flags: ['--expose-gc'] },
    );
    assert.equal((await endOf(child)).code, 0);
  });

  it('is not inherited by the processes that its holder starts', async () => {
    const child = await startHolder(
      folder,
      `const { spawn } = await import('node:child_process');
       const started = spawn(process.execPath, ['--eval', "process.stdout.write('up'); setInterval(() => {}, 1000)"]);
       started.stdout.once('data', () => process.stdout.write(' ' + started.pid));`,
    );
    const [text] = await once(child.stdout!, 'data');
    const pid = Number(String(text));
    child.kill('SIGKILL');
    await endOf(child);
    process.kill(pid, 0); // it runs
    await isFree(folder);
    process.kill(pid, 'SIGKILL');
  });

  it('names no holder that it does not know', async () => {
    const lock = await FolderLock.take(folder);
    const note = { instance: '1-1', pid: 1, host: 'h', since: 's' };
    const notes: [string, RegExp][] = [
      ['', /by another process: wait/],
      ['{', /by another process/],
      ['null', /by another process/],
      [JSON.stringify({ ...note, pid: '1' }), /by another process/],
      [JSON.stringify({ ...note, more: 'x'.repeat(5000) }), /by another process/],
      [
        JSON.stringify({ ...note, host: 'a\u001b[31m\nb' }),
        /by process 1 on a \[31m b since s: wait/,
      ],
      // The same numbers in another container, which has a name of its own.
      [
        await readFile(join(folder, LOCK_FILE), 'utf8').then((text) =>
          JSON.stringify({ ...JSON.parse(text), host: 'elsewhere' }),
        ),
        /by process \d+ on elsewhere since/,
      ],
    ];
    for (const [text, pattern] of notes) {
      await writeFile(join(folder, LOCK_FILE), text);
      await inUse(folder, pattern);
    }
    await lock.release();
  });

  it('goes through no link and into no file', async () => {
    await writeFile(join(root, 'kept'), 'kept');
    await mkdir(folder, { recursive: true });
    await symlink(join(root, 'kept'), join(folder, LOCK_FILE));
    const refused = {
      code: 'ERR_IO',
      message: /(run|kept) could not be locked \(.*\): give a folder/,
    };
    await assert.rejects(FolderLock.take(folder), refused);
    assert.equal(await readFile(join(root, 'kept'), 'utf8'), 'kept');
    await assert.rejects(FolderLock.take(join(root, 'kept')), refused);
    await assert.rejects(FolderLock.take(join(root, 'kept', 'run')), {
      code: 'ERR_IO',
      message: /kept\/run could not be written \(ENOTDIR/,
    });
    await assert.rejects(FolderLock.take('/proc/nowhere/run'), { code: 'ERR_IO' });
  });

  it('is a warning where the file system has none', async function () {
    const source = join(root, 'no-locks.c');
    const library = join(root, 'no-locks.so');
    await writeFile(
      source,
      '#include <errno.h>\nint flock(int fd, int how) { (void)fd; (void)how; errno = ENOLCK; return -1; }\n',
    );
    const compiled = spawnSync('g++', ['-x', 'c', '-shared', '-fPIC', '-o', library, source]);
    if (compiled.status !== 0) skip(this, 'g++ is not there');
    const program = holding(folder, "process.stdout.write(' ' + lock.warning);");
    const { code, stdout, stderr } = await finish(
      spawn(process.execPath, ['--input-type=module', '--eval', program], {
        stdio: ['ignore', 'pipe', 'pipe'],
        env: { ...process.env, LD_PRELOAD: library },
      }),
    );
    assert.equal(code, 0, stderr);
    assert.match(
      stdout,
      /run cannot be locked \(No locks available\), so nothing keeps a second process out of it: see to it/,
    );
    assert.ok(!existsSync(join(folder, LOCK_FILE)));
  });
});

describe('a run directory', function () {
  // Each process starts Node and trains; a busy machine takes many times as long.
  this.timeout(600_000);
  let folder: string;
  let data: string;
  const at = (...names: string[]) => join(folder, ...names);
  const config = (out: string, more = {}) => ({
    ...smallConfig(data, at(out)),
    checkpointEvery: 3,
    epochs: 1,
    threads: 1,
    ...more,
  });
  const argv = (out: string, ...more: string[]) => [
    ...['train', '--data', data, '--out', at(out), '--validation', 'none', '--device', 'cpu'],
    ...['--batch', '8', '--embedding', '32', '--scale', '16', '--lr', '0.02', '--deterministic'],
    ...['--checkpoint-every', '6', '--epochs', '2', '--threads', '1', ...more],
  ];
  const run = (...args: string[]) =>
    finish(spawn(process.execPath, [MAIN, ...args], { stdio: ['ignore', 'pipe', 'pipe'] }));
  const left = async (out: string): Promise<string[]> =>
    (await readdir(at(out), { recursive: true })).filter((name) =>
      /\.tmp|\.hardmine\.lock/.test(name),
    );

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-locks-'));
    data = await drawFaces(at('faces'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it("is one Trainer's from create() to dispose(), and then as it was", async () => {
    const first = await Trainer.create(config('trainers'));
    const { message } = await refusal(Trainer.create(config('trainers')));
    assert.match(message, /trainers is in use by this very process since/);
    await refusal(Trainer.create(config('trainers', { resume: true })));
    await first.dispose();
    await assert.rejects(stat(at('trainers')), { code: 'ENOENT' });
    const second = await Trainer.create(config('trainers'));
    await second.dispose();
    await assert.rejects(stat(at('trainers')), { code: 'ENOENT' });
  });

  it('is refused without a change to it while a Trainer trains there, and free after its end', async () => {
    const trainer = await Trainer.create(config('busy'));
    const events = trainer.run();
    while ((await events.next()).value?.type !== 'checkpoint');
    await setTimeout(50); // the report is written beside the training
    const before = await snapshot(at('busy'));
    await refusal(Trainer.create(config('busy', { resume: true })));
    assert.deepEqual(await snapshot(at('busy')), before);
    for await (const _ of events);
    // Not disposed of yet.
    const again = await Trainer.create(config('busy', { resume: true }));
    assert.equal(again.stepsDone, 12);
    await again.dispose();
    await trainer.dispose();
    assert.deepEqual(await left('busy'), []);
  });

  const endings: [string, (trainer: Trainer) => Promise<void>][] = [
    [
      'an abort',
      (trainer) =>
        assert.rejects(
          async () => {
            for await (const _ of trainer.run({ signal: AbortSignal.abort() }));
          },
          { code: 'ERR_ABORTED' },
        ),
    ],
    [
      'leaving the loop',
      async (trainer) => {
        for await (const event of trainer.run()) if (event.type === 'checkpoint') break;
      },
    ],
    [
      'dispose() between two events',
      async (trainer) => {
        const events = trainer.run();
        while ((await events.next()).value?.type !== 'checkpoint');
        await trainer.dispose();
        const status = await readStatus(join(trainer.config.out, 'status.json'));
        assert.equal(status?.state, 'stopped');
        await assert.rejects(events.next(), { code: 'ERR_DISPOSED' });
      },
    ],
    [
      'dispose() in the middle of a save',
      async (trainer) => {
        const events = trainer.run();
        const ended = assert.rejects(
          async () => {
            for await (const _ of events);
          },
          { code: 'ERR_DISPOSED' },
        );
        const checkpoints = join(trainer.config.out, 'checkpoints');
        const saving = async () =>
          (await readdir(checkpoints).catch(() => [])).some((name) => name.includes('.tmp-'));
        while (!(await saving()));
        await trainer.dispose();
        assert.ok(!(await saving()), 'it is written to its end, or not at all');
        await ended;
      },
    ],
  ];
  for (const [name, end] of endings) {
    it(`is free after ${name}`, async () => {
      const out = name.replaceAll(/\W/g, '-');
      const trainer = await Trainer.create(config(out));
      await end(trainer);
      const next = await Trainer.create(config(out, { resume: true }));
      const { value } = await next.run().next();
      assert.equal(value?.type, 'step');
      await next.dispose();
      await trainer.dispose();
      assert.deepEqual(await left(out), []);
    });
  }

  it('keeps a second process out, not its readers, until it is killed', async () => {
    const held = watch(argv('held', '--epochs', '100'), () => undefined);
    const { pid } = held.child;
    const reached = async (events: LogLine[], step: number): Promise<void> => {
      while (!events.some((line) => line.event === 'checkpoint' && line.step! >= step)) {
        assert.equal(held.child.exitCode, null);
        await setTimeout(20);
      }
    };
    await reached(held.events, 6);
    const complaint = new RegExp(`^error: .*held is in use by process ${pid} on .* since `, 'm');
    for (const more of [[], ['--resume', '--restarts', '3'], ['--resume', '--dry-run']]) {
      const { code, stderr } = await run(...argv('held', '--epochs', '100', ...more));
      assert.equal(code, 1, stderr);
      assert.match(stderr, complaint);
      assert.doesNotMatch(stderr, /restart/);
    }
    const page = at('comparison.html');
    const read = await run('report', at('held'), '--out', page);
    assert.equal(read.code, 0, read.stderr);
    await stat(page);
    // It has not noticed anything.
    const steps = held.events.filter((line) => line.event === 'checkpoint').at(-1)!.step!;
    await reached(held.events, steps + 6);
    held.child.kill('SIGKILL');
    await held.ended;
    assert.ok(existsSync(at('held', LOCK_FILE)));
    const lines = (await readFile(at('held', 'metrics.jsonl'), 'utf8')).trim().split('\n');
    const logged = lines.slice(0, -1).map((line) => (JSON.parse(line) as { step: number }).step);
    assert.deepEqual(
      logged,
      [...new Set(logged)].sort((a, b) => a - b),
      'one has written',
    );

    const checkpoints = await readdir(at('held', 'checkpoints'));
    const newest = checkpoints
      .filter((name) => /^step-\d+$/.test(name))
      .sort()
      .at(-1)!;
    // To the end of the epoch under way.
    const epochs = String(Math.floor(Number(newest.slice(5)) / 12) + 1);
    const resumed = await run(...argv('held', '--resume', '--epochs', epochs, '--json'));
    assert.equal(resumed.code, 0, resumed.stderr);
    assert.deepEqual(await left('held'), []);
    const again = await run(...argv('held', '--resume', '--epochs', epochs));
    assert.equal(again.code, 0, again.stderr);
    assert.match(again.stderr, /held is finished/);
    const anew = await run(...argv('held'));
    assert.equal(anew.code, 2, anew.stderr);
    assert.match(anew.stderr, /already holds a run/);
    assert.deepEqual(await left('held'), []);
    await stat(at('held', 'checkpoints', checkpointName(12 * Number(epochs))));
  });

  it("is a worker thread's until that is terminated", async () => {
    const program = `(async () => {
      const { Trainer } = await import(${JSON.stringify(`file://${ROOT}dist/index.js`)});
      const trainer = await Trainer.create(${JSON.stringify(config('thread', { epochs: 1000 }))});
      for await (const { type } of trainer.run()) {
        if (type === 'checkpoint') require('node:worker_threads').parentPort.postMessage(type);
      }
    })();`;
    const worker = new Worker(program, { eval: true });
    await once(worker, 'message');
    await refusal(Trainer.create(config('thread', { resume: true, epochs: 1000 })));
    await worker.terminate();
    const next = await Trainer.create(config('thread', { resume: true, epochs: 1000 }));
    assert.ok(next.stepsDone >= 3);
    await next.dispose();
  });

  it('of an experiment, and that of the demo, are refused before anything in them changes', async () => {
    await mkdir(at('whole'));
    await writeFile(at('whole', 'kept'), 'kept');
    const lock = await FolderLock.take(at('whole'));
    const before = await snapshot(at('whole'));
    for (const args of [
      ['demo', '--out', at('whole'), '--device', 'cpu'],
      [
        'reproduce',
        '--preset',
        'faces-small',
        '--data',
        data,
        '--lfw',
        folder,
        '--out',
        at('whole'),
      ],
    ]) {
      const { code, stderr } = await run(...args);
      assert.equal(code, 1, stderr);
      assert.match(
        stderr,
        new RegExp(`^error: .*whole is in use by process ${process.pid} on`, 'm'),
      );
      assert.deepEqual(await snapshot(at('whole')), before);
    }
    await lock.release();
    assert.deepEqual(await readdir(at('whole')), ['kept']);
  });
});

describe('the output of align', function () {
  this.timeout(120_000);
  let folder: string;
  const at = (...names: string[]) => join(folder, ...names);
  let list: string;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-align-lock-'));
    await mkdir(at('in'));
    const points = faceTemplate('112x112').flatMap(({ x, y }) => [x, y]);
    const names = Array.from({ length: 24 }, (_, i) => `${i}.jpg`);
    for (const name of names) {
      await sharp({ create: { width: 130, height: 120, channels: 3, background: 'red' } })
        .jpeg()
        .toFile(at('in', name));
    }
    list = at('list.tsv');
    await writeFile(list, names.map((name) => `${[name, ...points].join('\t')}\n`).join(''));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it("is one call's at a time, which does all of it", async () => {
    let during: Promise<unknown> = Promise.resolve();
    const { aligned, earlier } = await alignFolder(at('in'), at('out'), {
      landmarks: list,
      onProgress: (done) => {
        if (done === 3) during = refusal(alignFolder(at('in'), at('out'), { landmarks: list }));
      },
      onWarning: (message) => assert.fail(message),
    });
    await during;
    assert.deepEqual([aligned, earlier], [24, 0]);
    assert.ok(!existsSync(at('out', LOCK_FILE)));
    const again = await alignFolder(at('in'), at('out'), { landmarks: list });
    assert.equal(again.earlier, 24);
  });

  it("is another process's until that is killed", async () => {
    const child = await startHolder(at('held'), STAY);
    const align = () => alignFolder(at('in'), at('held'), { landmarks: list });
    const { message } = await refusal(align());
    assert.match(message, new RegExp(`held is in use by process ${child.pid} on`));
    assert.deepEqual(await readdir(at('held')), [LOCK_FILE]);
    child.kill('SIGKILL');
    await endOf(child);
    assert.equal((await align()).aligned, 24);
    assert.ok(!existsSync(at('held', LOCK_FILE)));
  });

  it('is written all the same, with a warning, where the native addon is missing', async () => {
    await mkdir(at('package'));
    for (const name of ['dist', 'package.json']) {
      await cp(join(ROOT, name), at('package', name), { recursive: true });
    }
    await symlink(join(ROOT, 'node_modules'), at('package', 'node_modules'));
    const child = spawn(
      process.execPath,
      [at('package/dist/cli/main.js'), 'align', at('in'), at('bare'), '--landmarks', list],
      { stdio: ['ignore', 'pipe', 'pipe'] },
    );
    const { code, stdout, stderr } = await finish(child);
    assert.equal(code, 0, stderr);
    assert.match(stdout, /24 crops of 24 images/);
    assert.match(stderr, /^warning: .*bare cannot be locked \(The native addon .* could not be/m);
    assert.equal((await readdir(at('bare'))).length, 26);
  });
});
