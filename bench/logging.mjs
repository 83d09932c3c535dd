// What progress bar, events, metrics, TensorBoard's file and the growing report cost: training with all of
// them against the bare native steps in calls of the same length, in turn in one process. Run it on a terminal for the bar:
//
//   node bench/logging.mjs [--rounds 7] [--seconds 8]

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { generateFaces, openDataset, Trainer } from 'hardmine';
import { TrainingLog } from '../dist/cli/training-log.js';
import { lossSettings, resolveConfig } from '../dist/config.js';
import { resolveLoss } from '../dist/loss.js';
import { chooseDevice } from '../dist/native.js';
import { stepSettings, stepsPerCall } from '../dist/train/schedule.js';

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
// Saving is no logging: no model and no checkpoint while it is measured.
const input = {
  ...{ data, validation: 'none', epochs: 1000, scale: 16 },
  ...{ validateEvery: 1000, checkpointEvery: 100_000 },
};

/** Images a second of the native steps, as the Trainer calls them, from the end of the first one on. */
async function bare(name) {
  const config = resolveConfig({ ...input, out: join(folder, name) });
  const { addon, execution } = chooseDevice({ device: config.device });
  const dataset = await openDataset(data);
  const session = await addon.createSession(
    {
      network: { architecture: 'resnet18', embedding: 512, embeddingBatchNorm: true },
      classes: dataset.identities,
      loss: resolveLoss(lossSettings(config)).native,
      implementation: 'fused',
      batch: config.batch,
      seed: config.seed,
    },
    execution,
  );
  const batches = await dataset.records.batches({
    images: Int32Array.from(dataset.labels.keys()),
    labels: dataset.labels,
    ...{ batch: config.batch, seed: config.seed, mirror: true, crop: 0, decodeThreads: 1 },
    ...{ execution: null, skip: null },
  });
  const train = async (step, count) => {
    const settings = Array.from({ length: count }, (_, i) =>
      stepSettings(config, step + i, batches.stepsPerEpoch),
    );
    const startMs = performance.now();
    await session.train(batches, settings);
    return performance.now() - startMs;
  };
  let step = 1;
  let msPerStep = await train(0, 1);
  const startMs = performance.now();
  while (performance.now() - startMs < 1000 * seconds) {
    const left = batches.stepsPerEpoch - (step % batches.stepsPerEpoch);
    const count = stepsPerCall(msPerStep, left);
    msPerStep = (await train(step, count)) / count;
    step += count;
  }
  const speed = (1000 * config.batch * (step - 1)) / (performance.now() - startMs);
  for (const handle of [session, batches, dataset]) await handle.dispose();
  return speed;
}

/** Images a second with everything that `train` does, from the end of the first step on. */
async function logged(name) {
  const trainer = await Trainer.create({ ...input, out: join(folder, name) });
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
