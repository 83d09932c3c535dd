// The glue between JavaScript and the native code: arguments, lifetimes, threads and exits. Whether
// the numbers are right is the business of the specs from 30 on.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { readFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { devices } from '../src/devices.js';
import { HardmineError } from '../src/errors.js';
import {
  chooseDevice,
  loadAddon,
  type NativeAddon,
  type NativeBatches,
  type NativeHead,
  type NativeLoss,
  type NativeRecords,
  type NativeSession,
} from '../src/native.js';
import {
  ADDON,
  BATCH,
  CLASSES,
  DIM,
  EXECUTION,
  fails,
  HEAD,
  handleKinds,
  IMAGE_BYTES,
  LOSS,
  type Loose,
  loose,
  NETWORK,
  openBatches,
  outcome,
  ramp,
  rows,
  SESSION,
  STEP,
} from './helpers/native-handles.js';
import { packColours } from './helpers/packed-colours.js';
import { skip } from './helpers/skip.js';

const ROOT = fileURLToPath(new URL('..', import.meta.url));

describe('the native addon', () => {
  let addon: NativeAddon;
  let folder: string;
  let rec: string;
  let idx: string;

  before(async () => {
    addon = loadAddon('cpu');
    folder = mkdtempSync(join(tmpdir(), 'hardmine-binding-'));
    ({ rec, idx } = await packColours(folder, CLASSES, 4));
  });
  after(() => rmSync(folder, { recursive: true, force: true }));

  describe('its loader', () => {
    it('loads once and knows its backend', () => {
      assert.equal(loadAddon('cpu'), addon);
      assert.equal(addon.backend, 'cpu');
    });

    it('lists the CPU with the name that --device takes', () => {
      const cpu = devices().find(({ backend }) => backend === 'cpu');
      assert.ok(cpu);
      assert.equal(cpu.id, 'cpu');
      assert.ok(cpu.name.length > 0 && cpu.threads >= 1);
      assert.ok(cpu.memoryBytes >= cpu.freeBytes && cpu.freeBytes > 0);
      assert.ok(cpu.precisions.includes('fp32'));
    });

    it('chooses devices and says why', () => {
      const { execution, why } = chooseDevice({ device: 'cpu', threads: 1 });
      assert.deepEqual(execution, {
        device: 0,
        precision: addon.device(0).precisions[0],
        threads: 1,
        deterministic: false,
      });
      assert.match(why, /CPU/);
      assert.ok(chooseDevice({ device: 'auto' }).why.length > 0);
      assert.throws(() => chooseDevice({ device: 'gpu' }), { code: 'ERR_CONFIG' });
      assert.throws(() => chooseDevice({ device: 'cuda:x' }), { code: 'ERR_CONFIG' });
    });

    it('refuses cuda in one sentence where there is no CUDA addon', function () {
      if (existsSync(join(ROOT, 'build/Release/hardmine_cuda.node'))) {
        skip(this, 'the CUDA addon is built here');
      }
      assert.throws(() => chooseDevice({ device: 'cuda:1' }), {
        code: 'ERR_DEVICE_UNAVAILABLE',
        message: /^Device cuda:1 was asked for but .* use --device cpu/,
      });
    });

    // A copy of the package whose addon is broken in one way each.
    const broken: [string, (path: string) => void, RegExp][] = [
      ['absent', () => {}, /there is no such file\. To mend it, run `npm run build` in /],
      [
        'not a library',
        (path) => writeFileSync(path, 'no ELF header'),
        /file too short|invalid ELF header.*npm run build/,
      ],
      [
        'without oneDNN',
        (path) => {
          // The same length, so that the file stays valid: a version that nobody has.
          const text = readFileSync(ADDON, 'latin1');
          writeFileSync(path, text.replace(/libdnnl\.so\.\d/, 'libdnnl.so.x'), 'latin1');
        },
        /libdnnl\.so\.x: cannot open.*run `sudo apt-get install libdnnl-dev`/,
      ],
    ];
    for (const [name, damage, message] of broken) {
      it(`explains an addon that is ${name}`, async () => {
        const copy = mkdtempSync(join(folder, 'package-'));
        mkdirSync(join(copy, 'src'));
        mkdirSync(join(copy, 'build/Release'), { recursive: true });
        for (const file of ['native.ts', 'addon-file.ts', 'errors.ts']) {
          copyFileSync(join(ROOT, 'src', file), join(copy, 'src', file));
        }
        writeFileSync(join(copy, 'package.json'), '{"type": "module"}');
        damage(join(copy, 'build/Release/hardmine_cpu.node'));
        const url = pathToFileURL(join(copy, 'src/native.ts')).href;
        const copied = (await import(url)) as { loadAddon: typeof loadAddon };
        assert.throws(
          () => copied.loadAddon('cpu'),
          (error: HardmineError) => {
            assert.equal(error.code, 'ERR_ADDON');
            assert.match(error.message, message);
            assert.match(error.message, /on linux-\w+ \(Node [\d.]+, Node-API \d+/);
            assert.ok(error.cause instanceof Error);
            return true;
          },
        );
      });
    }
  });

  it('refuses losses that no head can have', async () => {
    const make = (loss: Partial<NativeLoss>) =>
      addon.createHead({ ...HEAD, loss: { ...LOSS, ...loss } }, EXECUTION);
    const knot = { ...LOSS.weighting, kind: 'knot-magnify' } as const;
    const wrong: [Partial<NativeLoss>, RegExp][] = [
      [{ weighting: { ...knot, gamma: -1 } }, /gamma is -1/],
      [{ weighting: { ...knot, reduction: 'batch' } }, /knot-magnify .* reduction sample/],
      [{ base: 'euclidean-margin', euclidean: { margin: -1, pull: 0 } }, /margin is -1/],
      [{ base: 'euclidean-margin', euclidean: { margin: 0, pull: -1 } }, /pull is -1/],
      [{ center: { weight: -1, rate: 0 } }, /center weight is -1/],
      [{ center: { weight: 1, rate: 2 } }, /center rate is 2/],
    ];
    for (const [loss, message] of wrong) await fails(() => make(loss), 'ERR_CONFIG', message);
  });

  it('refuses what the memory does not hold, before it is taken', async () => {
    const most = { ...HEAD, classes: 2 ** 31 - 1, dim: 4096 }; // 35 TB
    await fails(
      () => addon.createHead(most, EXECUTION),
      'ERR_DEVICE_OOM',
      /^The margin head needs 35\d{12} bytes more and \d+ are available: use .* fewer classes/,
    );
    const network = { ...NETWORK, embedding: most.dim };
    await fails(
      () => addon.createSession({ ...SESSION, classes: most.classes, network }, EXECUTION),
      'ERR_DEVICE_OOM',
      /^The margin head needs 35\d{12} bytes more/,
    );
  });

  describe('arguments', () => {
    let head: NativeHead;
    before(async () => {
      head = await addon.createHead(HEAD, EXECUTION);
      await head.setWeights(ramp(CLASSES * DIM), null);
    });
    after(() => head.dispose());

    const [x, y] = rows(3);
    const wrong: [string, (a: Loose, h: Loose) => unknown, RegExp][] = [
      [
        'no spec',
        (a) => a['createHead']?.(),
        /^Expected an object for spec but received undefined\.$/,
      ],
      [
        'an Array for a spec',
        (a) => a['createHead']?.([], EXECUTION),
        /spec but received an Array/,
      ],
      [
        'classes 0',
        (a) => a['createHead']?.({ ...HEAD, classes: 0 }, EXECUTION),
        /integer from 1 to 2147483647 for spec\.classes but received 0/,
      ],
      [
        'classes 1.5',
        (a) => a['createHead']?.({ ...HEAD, classes: 1.5 }, EXECUTION),
        /spec\.classes but received 1\.5/,
      ],
      [
        'classes NaN',
        (a) => a['createHead']?.({ ...HEAD, classes: Number.NaN }, EXECUTION),
        /spec\.classes but received NaN/,
      ],
      [
        'a bigint',
        (a) => a['createHead']?.({ ...HEAD, dim: 8n }, EXECUTION),
        /spec\.dim but received a bigint/,
      ],
      [
        'an unknown word',
        (a) => a['createHead']?.({ ...HEAD, implementation: 'fast' }, EXECUTION),
        /'fused' or 'unfused' for spec\.implementation but received 'fast'/,
      ],
      [
        'a nested member',
        (a) => a['createHead']?.({ ...HEAD, loss: { ...LOSS, weighting: null } }, EXECUTION),
        /an object for spec\.loss\.weighting but received null/,
      ],
      [
        'a loss without its centers',
        (a) => a['createHead']?.({ ...HEAD, loss: { ...LOSS, center: undefined } }, EXECUTION),
        /an object for spec\.loss\.center but received undefined/,
      ],
      [
        'a pull that is no number',
        (a) =>
          a['createHead']?.(
            { ...HEAD, loss: { ...LOSS, euclidean: { margin: 0.4, pull: '1' } } },
            EXECUTION,
          ),
        /a finite number for spec\.loss\.euclidean\.pull but received '1'/,
      ],
      [
        'an unknown base',
        (a) => a['createHead']?.({ ...HEAD, loss: { ...LOSS, base: 'triplet' } }, EXECUTION),
        /'softmax' or 'margin' or 'euclidean-margin' for spec\.loss\.base but received 'triplet'/,
      ],
      [
        'a weighting without gamma',
        (a) => a['weightLosses']?.(new Float64Array(2), { ...LOSS.weighting, gamma: undefined }),
        /weighting\.gamma but received undefined/,
      ],
      [
        'centers of a head that has none',
        (_, h) => h['setCenters']?.(ramp(CLASSES * DIM)),
        /a Float32Array of 0 elements for centers but received a Float32Array of 40/,
      ],
      [
        'an infinite scale',
        (a) => a['createHead']?.({ ...HEAD, loss: { ...LOSS, scale: 1 / 0 } }, EXECUTION),
        /a finite number for spec\.loss\.scale but received Infinity/,
      ],
      ['no execution', (a) => a['createHead']?.(HEAD), /an object for execution/],
      [
        'threads below 0',
        (a) => a['createHead']?.(HEAD, { ...EXECUTION, threads: -1 }),
        /execution\.threads but received -1/,
      ],
      [
        'an Array for embeddings',
        (_, h) => h['forwardBackward']?.([...x], y),
        /a Float32Array of 24 elements for embeddings but received an Array/,
      ],
      [
        'doubles',
        (_, h) => h['forwardBackward']?.(new Float64Array(24), y),
        /received a Float64Array of 24 elements/,
      ],
      [
        'too few embeddings',
        (_, h) => h['forwardBackward']?.(x.subarray(1), y),
        /received a Float32Array of 23 elements/,
      ],
      [
        'no rows',
        (_, h) => h['forwardBackward']?.(new Float32Array(), new Int32Array()),
        /at least one row for labels/,
      ],
      [
        'a label beyond the classes',
        (_, h) => h['forwardBackward']?.(x, new Int32Array([0, CLASSES, 0])),
        /label.*\b5\b/,
      ],
      ['a negative label', (_, h) => h['step']?.(x, new Int32Array([0, 0, -1]), STEP), /label.*-1/],
      [
        'a bias that margin heads lack',
        (_, h) => h['setWeights']?.(ramp(CLASSES * DIM), ramp(CLASSES)),
        /null .* for bias/,
      ],
      [
        'weights of another size',
        (_, h) => h['setWeights']?.(ramp(7), null),
        /of 40 elements for weights/,
      ],
      [
        'a step without lr',
        (_, h) => h['step']?.(x, y, { ...STEP, lr: undefined }),
        /settings\.lr but received undefined/,
      ],
      [
        'an unknown timing',
        (_, h) => h['time']?.('all', 1, 1),
        /'forwardBackward' or 'step' or 'products' for what/,
      ],
      ['repeats 0', (_, h) => h['time']?.('step', 1, 0), /repeats but received 0/],
      ['a path with NUL', (a) => a['openRecords']?.('a\0b', idx), /NUL/],
      [
        'a path that is a URL',
        (a) => a['openRecords']?.(new URL('file:///'), idx),
        /a string for recPath but received an object/,
      ],
      [
        'floats for losses',
        (a) => a['weightLosses']?.(new Float32Array(2), LOSS.weighting),
        /a Float64Array for losses/,
      ],
      [
        'a folder that is none',
        (a) => a['lockFolder']?.(1, ''),
        /a string for folder but received 1/,
      ],
      ['a lock without a note', (a) => a['lockFolder']?.('.'), /a string for note/],
      ['a Promise for bytes', (a) => a['readJpegInfo']?.(Promise.resolve()), /is an await missing/],
    ];
    for (const [name, call, message] of wrong) {
      it(`refuses ${name}`, () =>
        fails(() => call(loose(addon), loose(head)), 'ERR_INPUT', message));
    }

    it('refuses a network it does not know, as a setting', () =>
      fails(
        () => addon.describeNetwork({ ...NETWORK, architecture: 'resnet19' }),
        'ERR_CONFIG',
        /resnet19/,
      ));

    it('refuses bytes that are no JPEG, as data', () =>
      fails(() => addon.readJpegInfo(new Uint8Array(100)), 'ERR_DATA', /JPEG/));

    it('names what is not finite', async () => {
      const spoiled = Float32Array.from(x);
      spoiled[9] = Number.NaN;
      await fails(() => head.forwardBackward(spoiled, y), 'ERR_NON_FINITE', /./);
      await fails(() => head.step(spoiled, y, STEP), 'ERR_NON_FINITE', /./);
    });

    it('copies arrays before it returns, so the caller may change or transfer them', async () => {
      const expected = await head.forwardBackward(x, y);
      const embeddings = Float32Array.from(x);
      const labels = Int32Array.from(y);
      const pending = head.forwardBackward(embeddings, labels);
      embeddings.fill(Number.NaN);
      structuredClone(labels, { transfer: [labels.buffer as ArrayBuffer] });
      assert.deepEqual((await pending).gradWeights, expected.gradWeights);
      await fails(
        () => head.forwardBackward(x, labels),
        'ERR_INPUT',
        /at least one row for labels but received an Int32Array of 0 elements/,
      );
    });

    it('takes views with an offset and of shared memory', async () => {
      const expected = await head.forwardBackward(x, y);
      const shared = new Float32Array(new SharedArrayBuffer(4 * (x.length + 3)), 12);
      shared.set(x);
      const offset = Int32Array.from([9, ...y, 9]).subarray(1, -1);
      const found = await head.forwardBackward(shared, offset);
      assert.deepEqual(found.gradEmbeddings, expected.gradEmbeddings);
    });

    it('hands out arrays that belong to the caller', async () => {
      const { weights } = await head.readWeights();
      const moved = structuredClone(weights, { transfer: [weights.buffer as ArrayBuffer] });
      assert.equal(moved.length, CLASSES * DIM);
      moved.fill(0);
      assert.ok((await head.readWeights()).weights.every((value) => value !== 0));
    });

    it('passes on what a getter of the caller throws', async () => {
      const planted = new Error('planted');
      const spec = {
        ...HEAD,
        get dim(): number {
          throw planted;
        },
      };
      await assert.rejects(addon.createHead(spec, EXECUTION), planted);
    });
  });

  describe('handles', () => {
    const [x, y] = rows(2);
    for (const kind of ['head', 'session', 'embedder', 'records', 'batches', 'lock']) {
      it(`${kind}: every method works, knows its own kind, and ends with dispose()`, async () => {
        const kinds = handleKinds(addon, { rec, idx });
        const { make, calls } = kinds[kind] ?? assert.fail(`of ${Object.keys(kinds)}`);
        const { handle, also } = await make();
        const names = Object.getOwnPropertyNames(handle).filter(
          (name) => typeof loose(handle)[name] === 'function',
        );
        assert.deepEqual(names.sort(), [...Object.keys(calls), 'dispose'].sort());
        const stranger = loose(await addon.createHead(HEAD, EXECUTION));
        const other = kind === 'head' ? addon : stranger;
        for (const [name, args] of Object.entries(calls)) {
          const method = loose(handle)[name] ?? assert.fail(name);
          const result = await outcome(() => method.call(handle, ...args(also)));
          assert.ok(!(result instanceof HardmineError), `${name}: ${String(result)}`);
          if (name === 'batches') await (result as NativeBatches).dispose();
          for (const foreign of [
            other,
            {},
            undefined,
            1,
            new Proxy(handle, {}),
            Object.create(handle),
          ]) {
            await fails(() => method.call(foreign, ...args(also)), 'ERR_INPUT', /for this/);
          }
        }
        const dispose = loose(handle)['dispose'] ?? assert.fail();
        await fails(() => dispose.call(other), 'ERR_INPUT', /for this/);
        await Promise.all([dispose.call(handle), dispose.call(handle)]);
        await dispose.call(handle);
        for (const [name, args] of Object.entries(calls)) {
          await fails(() => loose(handle)[name]?.(...args(also)), 'ERR_DISPOSED', /disposed/);
        }
        for (const one of also) await one.dispose();
        await stranger['dispose']?.();
      });
    }

    it('run their calls in the order in which they were made', async () => {
      const head = await addon.createHead(HEAD, EXECUTION);
      const order: string[] = [];
      const note = (name: string) => (): void => void order.push(name);
      const first = head.setWeights(ramp(CLASSES * DIM), null).then(note('set'));
      const second = head.step(x, y, STEP).then(note('step'));
      const third = head.readWeights().then(note('read'));
      await Promise.all([third, second, first]);
      assert.deepEqual(order, ['set', 'step', 'read']);
      await head.dispose();
    });

    it('reject what is pending when they are disposed in the middle of work', async () => {
      const head = await addon.createHead({ ...HEAD, classes: 2000, dim: 512 }, EXECUTION);
      await head.setWeights(ramp(2000 * 512), null);
      const work = [
        head.time('forwardBackward', 64, 1000),
        head.readWeights(),
        head.time('step', 64, 1000),
      ];
      const settled = Promise.allSettled(work);
      await new Promise((resolve) => setTimeout(resolve, 20));
      await head.dispose();
      for (const result of await settled) {
        assert.ok(result.status === 'rejected');
        assert.equal(result.reason.code, 'ERR_DISPOSED');
      }
    });

    describe('of a session in training', () => {
      let records: NativeRecords;
      let batches: NativeBatches;
      let session: NativeSession;
      beforeEach(async () => {
        records = await addon.openRecords(rec, idx);
        batches = await openBatches(records);
        session = await addon.createSession(SESSION, EXECUTION);
      });
      afterEach(() => Promise.all([session, batches, records].map((one) => one.dispose())));
      const steps = (count: number) => new Array(count).fill(STEP);

      it('cancel() gives back the steps that were done', async () => {
        await session.train(batches, steps(1));
        const pending = session.train(batches, steps(100_000));
        setTimeout(() => session.cancel(), 50);
        const done = await pending;
        assert.ok(done.length < 100_000);
        assert.ok(done.every(({ rows }) => rows === BATCH));
        assert.equal((await session.train(batches, steps(2))).length, 2);
      });

      it('a ring serves one call at a time', async () => {
        const pending = session.train(batches, steps(3));
        await fails(() => session.train(batches, steps(1)), 'ERR_BUSY', /batches/);
        await fails(() => batches.drain(1), 'ERR_BUSY', /batches\.drain/);
        await fails(() => batches.seek(1, 0), 'ERR_BUSY', /batches\.seek/);
        assert.ok(batches.waitedMs() >= 0);
        assert.equal((await pending).length, 3);
        await batches.seek(1, 0);
      });

      it('what it trains from may be disposed meanwhile', async () => {
        const pending = session.train(batches, steps(3));
        await Promise.all([batches.dispose(), records.dispose()]);
        assert.equal((await pending).length, 3);
        await fails(() => session.train(batches, steps(1)), 'ERR_DISPOSED', /disposed/);
      });

      it('dispose() does not wait for the steps that remain', async () => {
        const pending = assert.rejects(session.train(batches, steps(100_000)), {
          code: 'ERR_DISPOSED',
        });
        await session.dispose();
        await pending;
        assert.ok((await batches.drain(1)) >= 0); // the ring is free again
      });

      it('a handle of another kind is no ring', () =>
        fails(
          () => loose(session)['train']?.(records, steps(1)),
          'ERR_INPUT',
          /a native batches handle for batches/,
        ));
    });

    it('leave the thread pool of Node to Node', async () => {
      // More than the four threads of libuv's pool: on it, no file could be read before they end.
      const heads = await Promise.all(
        Array.from({ length: 6 }, () => addon.createHead(HEAD, EXECUTION)),
      );
      await Promise.all(heads.map((head) => head.setWeights(ramp(CLASSES * DIM), null)));
      const ended = heads.map((head) =>
        assert.rejects(head.time('step', 64, 1_000_000), { code: 'ERR_DISPOSED' }),
      );
      assert.ok((await readFile(rec)).length > 0);
      await Promise.all(heads.map((head) => head.dispose()));
      await Promise.all(ended);
    });
  });

  describe('when the process ends', () => {
    /** Runs a program that has the raw addon as `addon` and a busy() that keeps it computing. */
    function child(program: string, ...flags: string[]) {
      const source = `
        import { readFileSync } from 'node:fs';
        import { Worker } from 'node:worker_threads';
        const module = { exports: {} };
        process.dlopen(module, ${JSON.stringify(ADDON)});
        const addon = module.exports;
        const execution = ${JSON.stringify(EXECUTION)};
        const head = await addon.createHead(${JSON.stringify({ ...HEAD, classes: 2000, dim: 512 })}, execution);
        await head.setWeights(Float32Array.from({ length: 2000 * 512 }, (_, i) => Math.sin(i)), null);
        const records = await addon.openRecords(${JSON.stringify(rec)}, ${JSON.stringify(idx)});
        const batches = await records.batches({
          images: Int32Array.from(records.labels.keys()), labels: records.labels, batch: ${BATCH},
          seed: 1, mirror: true, crop: 0, decodeThreads: 2, execution: null,
          skip: null });
        let session;
        const busy = async () => {
          session = await addon.createSession(${JSON.stringify(SESSION)}, execution);
          return [
            head.time('step', 64, 100000),
            session.train(batches, new Array(100000).fill(${JSON.stringify(STEP)})),
            records.verify(),
          ];
        };
        const later = (action) => setTimeout(() => {
          process.stdout.write('asked ' + Date.now());
          action();
        }, 100);
        ${program}`;
      const started = spawn(process.execPath, [...flags, '--input-type=module', '--eval', source], {
        stdio: ['ignore', 'pipe', 'pipe'],
      });
      let stdout = '';
      let stderr = '';
      started.stdout.on('data', (chunk) => (stdout += chunk));
      started.stderr.on('data', (chunk) => (stderr += chunk));
      return new Promise<{ code: number | null; stdout: string; stderr: string; tookMs: number }>(
        (resolve) => {
          started.on('close', (code, signal) => {
            assert.equal(signal, null, stderr);
            const asked = Number(/asked (\d+)/.exec(stdout)?.[1] ?? Date.now());
            resolve({ code, stdout, stderr, tookMs: Date.now() - asked });
          });
        },
      );
    }

    // A step of the session takes some 10 ms; the rest allows for a machine with other work on it.
    const EXIT_MS = 3000;
    const exits: [string, string, number, RegExp][] = [
      ['at its end, with idle handles', '', 0, /^$/],
      ['by process.exit, idle', 'process.exit(3)', 3, /^$/],
      ['by process.exit in mid-step', 'await busy(); later(() => process.exit(3));', 3, /^$/],
      [
        'by an exception in mid-step',
        "await busy(); later(() => { throw new Error('planted'); });",
        1,
        /planted/,
      ],
      [
        'by process.exit while handles are made',
        `for (let i = 0; i < 2; i++) addon.createSession(${JSON.stringify(SESSION)}, execution); process.exit(0)`,
        0,
        /^$/,
      ],
      [
        'by dispose() in mid-step',
        '(await busy()).map((one) => one.catch(() => {})); later(() => [head, session, batches, records].map((one) => one.dispose()));',
        0,
        /^$/,
      ],
      [
        'by cancel() in mid-step',
        'const [time] = await busy(); time.catch(() => {}); later(() => { session.cancel(); head.dispose(); });',
        0,
        /^$/,
      ],
    ];
    for (const [name, program, expected, errors] of exits) {
      it(name, async () => {
        const { code, stderr, tookMs } = await child(program);
        assert.equal(code, expected, stderr);
        assert.match(stderr, errors);
        assert.ok(tookMs < EXIT_MS, `${tookMs} ms`);
      });
    }

    it('by worker.terminate in mid-step, of several threads at once', async () => {
      const program = `
        import { parentPort } from 'node:worker_threads';
        const module = { exports: {} };
        process.dlopen(module, ${JSON.stringify(ADDON)});
        const addon = module.exports;
        const execution = ${JSON.stringify(EXECUTION)};
        const head = await addon.createHead(${JSON.stringify(HEAD)}, execution);
        await head.setWeights(new Float32Array(${CLASSES * DIM}).fill(1), null);
        const embedder = await addon.createEmbedder(${JSON.stringify(NETWORK)}, execution);
        head.time('step', 64, 1000000);
        embedder.embed(new Uint8Array(256 * ${IMAGE_BYTES}), false);
        parentPort.postMessage('busy');`;
      const { code, stderr, stdout } = await child(`
        const workers = [0, 1, 2].map(() => new Worker(${JSON.stringify(program)}, { eval: true }));
        await Promise.all(workers.map((one) => new Promise((resolve) => one.once('message', resolve))));
        await Promise.all(workers.map((one) => one.terminate()));
        process.stdout.write('done');`);
      assert.equal(code, 0, stderr);
      assert.equal(stdout, 'done');
      assert.equal(stderr, '');
    });

    it('handles that nobody holds give back their threads', async () => {
      const { code, stdout, stderr } = await child(
        `
        const threads = () => Number(/Threads:\\s+(\\d+)/.exec(readFileSync('/proc/self/status'))[1]);
        const before = threads();
        for (let i = 0; i < 50; i++) await addon.createHead(${JSON.stringify(HEAD)}, execution);
        const most = threads();
        for (let i = 0; i < 100 && threads() > before; i++) {
          gc();
          await new Promise((resolve) => setTimeout(resolve, 20));
        }
        process.stdout.write(JSON.stringify({ before, most, after: threads() }));`,
        '--expose-gc',
      );
      assert.equal(code, 0, stderr);
      const { before, most, after } = JSON.parse(stdout);
      assert.ok(most > before && after <= before, stdout);
    });
  });
});
