/**
 * A program that ends in the middle of work, for the tests of exits:
 * `lifetimes.ts END ACTIVITY DATA FOLDER`. It writes "asked" and the time to stdout when it asks for its
 * end, of which it has made sure that it comes in the middle of the activity.
 */
import { once } from 'node:events';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { Trainer } from '../../src/trainer.js';

const [end, activity, data, folder] = (isMainThread ? process.argv.slice(2) : workerData) as [
  string,
  string,
  string,
  string,
];

/** Calls `then` once `holds`. */
function when(holds: () => boolean, then: () => void): void {
  const look = (): void => void (holds() ? then() : setImmediate(look));
  look();
}

function ask(trainer: Trainer): void {
  process.stdout.write(`asked ${Date.now()}\n`);
  if (end === 'process.exit') process.exit(3);
  if (end === 'throw') throw new Error('planted');
  if (end === 'SIGINT' || end === 'SIGTERM') process.kill(process.pid, end);
  if (end === 'terminate') parentPort?.postMessage('terminate');
  if (end === 'dispose') void trainer.dispose();
}

async function main(): Promise<void> {
  const out = join(folder, 'run');
  const trainer = await Trainer.create({
    ...{ data, out, embedding: 64, batch: 8, device: 'cpu', threads: 1, precision: 'fp32' },
    // Saves follow each other; the evaluation of the held-out people is the validation.
    ...{ epochs: 1000, validation: activity === 'evaluation' ? 'identities' : 'none' },
    ...(activity === 'save' && { checkpointEvery: 1 }),
  });
  if (activity === 'idle') {
    if (end === 'end') return trainer.dispose();
    return ask(trainer);
  }
  const saving = (): boolean => {
    try {
      return readdirSync(join(out, 'checkpoints')).some((name) => name.includes('.tmp-'));
    } catch {
      return false; // not made yet
    }
  };
  let last = '';
  const moments: Record<string, () => boolean> = {
    step: () => last === 'step',
    save: saving,
    evaluation: () => last === 'epoch', // the validation comes between this event and the next
  };
  const asked = new AbortController();
  when(moments[activity] ?? (() => true), () => {
    if (end !== 'end') return ask(trainer);
    process.stdout.write(`asked ${Date.now()}\n`);
    asked.abort();
  });
  try {
    for await (const event of trainer.run({ signal: asked.signal })) last = event.type;
  } catch (error) {
    const { code } = error as { code?: string };
    if (code !== (end === 'dispose' ? 'ERR_DISPOSED' : 'ERR_ABORTED')) throw error;
  } finally {
    await trainer.dispose();
  }
}

if (end === 'terminate' && isMainThread) {
  // A thread has no tsx of its own in Node 20.
  const program = `import('tsx/esm/api').then(({ register }) => {
    register();
    return import(${JSON.stringify(import.meta.url)});
  });`;
  const worker = new Worker(program, { eval: true, workerData: [end, activity, data, folder] });
  await once(worker, 'message');
  await worker.terminate();
} else {
  await main();
}
