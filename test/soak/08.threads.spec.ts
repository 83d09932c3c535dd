// Worker threads of Node that train at once, and that are ended in the middle of it.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ADDON, EXECUTION, RING, SESSION, STEP } from '../helpers/native-handles.js';
import { packColours } from '../helpers/packed-colours.js';

describe('threads that train', function () {
  this.timeout(1_800_000);
  let folder: string;
  let files: { rec: string; idx: string };
  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-threads-'));
    files = await packColours(folder, 5, 4);
  });
  after(() => rmSync(folder, { recursive: true, force: true }));

  /** A thread that trains `workerData` steps and posts the losses; it says "busy" before. */
  const thread = (): string => `
    import { parentPort, workerData } from 'node:worker_threads';
    const module_ = { exports: {} };
    process.dlopen(module_, ${JSON.stringify(ADDON)});
    const addon = module_.exports;
    const execution = ${JSON.stringify({ ...EXECUTION, deterministic: true })};
    (async () => {
      const records = await addon.openRecords(${JSON.stringify(files.rec)}, ${JSON.stringify(files.idx)});
      const batches = await records.batches({
        images: Int32Array.from(records.labels.keys()), labels: records.labels,
        ...${JSON.stringify(RING)} });
      const session = await addon.createSession(${JSON.stringify(SESSION)}, execution);
      const pending = session.train(batches, new Array(workerData).fill(${JSON.stringify(STEP)}));
      parentPort.postMessage('busy');
      const losses = (await pending).map(({ loss }) => loss);
      for (const one of [session, batches, records]) await one.dispose();
      parentPort.postMessage(losses);
    })();`;

  function run(program: string): Promise<string> {
    const child = spawn(process.execPath, ['--input-type=module', '--eval', program], {
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let stdout = '';
    let stderr = '';
    child.stdout.on('data', (chunk) => (stdout += chunk));
    child.stderr.on('data', (chunk) => (stderr += chunk));
    return new Promise((resolve, reject) =>
      child.on('close', (code, signal) =>
        code === 0 && stderr === ''
          ? resolve(stdout)
          : reject(new Error(`${signal ?? code}: ${stderr}`)),
      ),
    );
  }

  it('four at once train what one trains alone, to the last bit', async () => {
    const stdout = await run(`
      import { Worker } from 'node:worker_threads';
      const train = () => new Promise((resolve, reject) => {
        const worker = new Worker(${JSON.stringify(thread())}, { eval: true, workerData: 6 });
        worker.on('message', (message) => message !== 'busy' && resolve(message));
        worker.on('error', reject);
      });
      const alone = await train();
      const together = await Promise.all([train(), train(), train(), train()]);
      process.stdout.write(JSON.stringify([alone, ...together]));`);
    const [alone, ...together] = JSON.parse(stdout) as number[][];
    assert.equal(alone?.length, 6);
    for (const losses of together) assert.deepEqual(losses, alone);
  });

  it('a hundred are started and terminated in mid-step, one after the other', async () => {
    const stdout = await run(`
      import { once } from 'node:events';
      import { Worker } from 'node:worker_threads';
      for (let i = 0; i < 100; i++) {
        const worker = new Worker(${JSON.stringify(thread())}, { eval: true, workerData: 100000 });
        await once(worker, 'message');
        await worker.terminate();
      }
      process.stdout.write('done');`);
    assert.equal(stdout, 'done');
  });
});
