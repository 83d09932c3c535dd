// What progress bar, events, metrics, TensorBoard's file and the growing report cost: training with all of
// them against the bare steps of the same Trainer, in turn in one process. Run it on a terminal for the bar:
//
//   node bench/logging.mjs [--rounds 7] [--seconds 8]

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { generateFaces, Trainer } from 'hardmine';
import { TrainingLog } from '../dist/cli/training-log.js';

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '7' },
    seconds: { type: 'string', default: '8' },
  },
});
const seconds = Number(values.seconds);

const folder = await mkdtemp(join(tmpdir(), 'hardmine-bench-'));
const data = await generateFaces({
  identities: 32,
  imagesPerIdentity: 32,
  seed: 1,
  out: join(folder, 'faces'),
});
const make = (name) =>
  Trainer.create({ data, out: join(folder, name), validation: 'none', epochs: 1000, scale: 16 });

/** Images a second without anything around the steps. */
async function bare(name) {
  const trainer = await make(name);
  const { imagesPerSecond } = await trainer.estimate();
  await trainer.dispose();
  return imagesPerSecond;
}

/** Images a second with everything that `train` does, from the end of the first step on. */
async function logged(name) {
  const trainer = await make(name);
  const log = new TrainingLog();
  log.start(trainer.plan, 0);
  let first = null;
  let last = null;
  for await (const event of trainer.run()) {
    log.event(event);
    if (event.type !== 'step') continue;
    last = { step: event.step, ms: performance.now() };
    first ??= last;
    if (last.ms - first.ms > 1000 * seconds) break;
  }
  log.end();
  const { batch } = trainer.config;
  await trainer.dispose();
  return (1000 * batch * (last.step - first.step)) / (last.ms - first.ms);
}

const median = (list) => [...list].sort((a, b) => a - b)[Math.floor(list.length / 2)];
try {
  const rounds = [];
  for (let i = 0; i < Number(values.rounds); i++) {
    // Each goes first as often as the other.
    const order = i % 2 === 0 ? [bare, logged] : [logged, bare];
    const speeds = {};
    for (const measure of order) speeds[measure.name] = await measure(`${measure.name}-${i}`);
    rounds.push(speeds);
  }
  const ratios = rounds.map((speeds) => speeds.logged / speeds.bare);
  console.log(
    JSON.stringify({
      imagesPerSecond: {
        bare: median(rounds.map((speeds) => speeds.bare)),
        logged: median(rounds.map((speeds) => speeds.logged)),
      },
      loggedOverBare: {
        median: median(ratios),
        least: Math.min(...ratios),
        most: Math.max(...ratios),
      },
      rounds: rounds.length,
    }),
  );
} finally {
  await rm(folder, { recursive: true, force: true });
}
