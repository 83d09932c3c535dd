import { join } from 'node:path';
import type { Command } from 'commander';
import { resolveConfig } from '../config.js';
import { readConfigFile } from '../config-file.js';
import { exists } from '../data/files.js';
import { HardmineError } from '../errors.js';
import { mayBeGuessed } from '../evaluate/statistics.js';
import { formatBytes } from '../train/estimate.js';
import { evaluationFigures } from '../train/evaluation.js';
import { Trainer } from '../trainer.js';
import { type CommonOptions, makeCommand, output, percent } from './command.js';
import { addConfigOptions, overlay } from './config-options.js';
import { stopOnInterrupt } from './interrupt.js';
import { isSupervised, reportFailure, supervise, whenAbandoned } from './supervisor.js';
import { duration, TrainingLog } from './training-log.js';

interface TrainOptions extends CommonOptions {
  printConfig?: true;
  dryRun?: true;
}

export function trainCommand(): Command {
  const command = makeCommand(
    'train',
    'Train a network. Every key of the configuration file is an option too; options win.',
    'hardmine train --data faces/ --out runs/first --scale 32 --margin-warm-up 3 --lr 0.05',
  )
    .argument('[config]', 'configuration file (JSON, with comments if you like)')
    .option('--print-config', 'print the configuration with every default filled in, and end')
    .option('--dry-run', 'check everything, say what the run would take, and end without training');
  const configFrom = addConfigOptions(command);
  command.action(async (file: string | undefined, options: TrainOptions) => {
    const given = configFrom(command.opts());
    const config = overlay(await baseConfig(file, given), given);
    if (options.printConfig) return output.json(resolveConfig(config));
    if (options.dryRun) return dryRun(config, options);
    if (isSupervised()) return supervisedTrain(config, options);
    const { out, restarts } = resolveConfig(config);
    if (restarts === 0) return train(config, options);
    const log = new TrainingLog();
    // The child has said what there is to say; its exit code is this command's.
    process.exit(await supervise({ out, restarts }, (restart) => log.restart(restart)));
  });
  return command;
}

/** The configuration under the options: the file's, or for --resume alone that of the run. */
async function baseConfig(
  file: string | undefined,
  given: Record<string, unknown>,
): Promise<Record<string, unknown>> {
  const { out, resume } = given;
  if (file !== undefined) return readConfigFile(file);
  if (resume === true && typeof out === 'string') {
    const path = join(out, 'config.json');
    if (!(await exists(path))) {
      throw new HardmineError(
        'ERR_CONFIG',
        `${out} holds no run to go on with (there is no config.json): leave --resume away to begin one, or give the directory of a run as --out`,
      );
    }
    return { ...(await readConfigFile(path)), out };
  }
  return {};
}

function openTrainer(
  config: Record<string, unknown>,
  log: TrainingLog,
  signal: AbortSignal,
): Promise<Trainer> {
  // The schema inside Trainer.create is what checks it.
  return Trainer.create(config as Parameters<typeof Trainer.create>[0], {
    onProgress: (progress) => log.preparing(progress),
    signal,
  });
}

async function dryRun(config: Record<string, unknown>, options: CommonOptions): Promise<void> {
  using interrupt = stopOnInterrupt('the dry run ends');
  const { signal } = interrupt;
  const log = new TrainingLog();
  const trainer = await openTrainer(config, log, signal);
  try {
    const { plan, stepsDone } = trainer;
    const estimate = await trainer.estimate({ signal });
    if (options.json) return output.json({ ...plan, stepsDone, ...estimate });
    for (const warning of estimate.warnings) output.warning(warning);
    output.result(
      `data      ${plan.images} images of ${plan.identities} identities to train on, ${plan.heldOutImages} held out`,
    );
    output.result(
      `device    ${plan.device}, ${plan.precision}, ${plan.threads} threads, ${estimate.imagesPerSecond.toFixed(0)} images a second`,
    );
    output.result(
      `time      ${duration(estimate.seconds)} for ${plan.totalSteps - stepsDone} steps, without validation and evaluation`,
    );
    const onDevice = estimate.deviceMemoryBytes;
    output.result(
      `memory    ${formatBytes(estimate.memoryBytes)}${onDevice === null ? '' : `, and ${formatBytes(onDevice)} on the GPU`}`,
    );
    output.result(
      `disk      up to ${formatBytes(estimate.diskBytes)}, of it ${formatBytes(estimate.checkpointBytes)} a checkpoint; ${formatBytes(estimate.freeDiskBytes)} are free`,
    );
  } finally {
    await trainer.dispose();
  }
}

async function supervisedTrain(
  config: Record<string, unknown>,
  options: CommonOptions,
): Promise<void> {
  try {
    await train(config, options);
  } catch (error) {
    reportFailure(error);
    throw error;
  }
}

async function train(config: Record<string, unknown>, options: CommonOptions): Promise<void> {
  using interrupt = stopOnInterrupt('the run stops after this step and writes a checkpoint');
  if (isSupervised()) {
    whenAbandoned(() => {
      if (!interrupt.signal.aborted) interrupt.stop(); // twice would mean at once
    });
  }
  const log = new TrainingLog();
  const trainer = await openTrainer(config, log, interrupt.signal);
  try {
    const { plan } = trainer;
    const startedAt = trainer.stepsDone;
    const report = join(trainer.config.out, 'report.html');
    log.start(plan, startedAt, report);
    for await (const event of trainer.run({ signal: interrupt.signal })) log.event(event);
    log.end();
    const { out, epochs } = trainer.config;
    const finishedBefore = startedAt === plan.totalSteps;
    const summary = {
      out,
      finished: true,
      finishedBefore,
      epochs,
      steps: trainer.stepsDone,
      images: plan.images,
      identities: plan.identities,
      device: plan.device,
      precision: plan.precision,
      threads: plan.threads,
      training: log.lastEpoch,
      validation: log.bestValidation,
      evaluation: evaluationFigures(log.evaluations, join(out, 'best.safetensors')),
      model: join(out, 'best.safetensors'),
    };
    if (options.json) {
      output.json(summary);
      return;
    }
    if (finishedBefore) output.note(`${out} is finished: all ${epochs} epochs are done`);
    if (log.lastEpoch) {
      const { baseLoss, accuracy } = log.lastEpoch;
      output.result(
        `training    loss ${baseLoss.toFixed(3)}, accuracy ${percent(accuracy)} in the last epoch`,
      );
    }
    if (log.bestValidation) {
      const { accuracy, pairs, epoch } = log.bestValidation;
      const guess = mayBeGuessed(accuracy, pairs)
        ? ', which guessing may give too: more people, images or epochs are needed'
        : '';
      output.result(`validation  ${percent(accuracy)} on held-out pairs (epoch ${epoch})${guess}`);
    }
    for (const { dataset, accuracy, confidence95 } of log.evaluations) {
      output.result(
        `${dataset.padEnd(10)}  ${percent(accuracy.mean)} (std ${percent(accuracy.std)}, 95% ${percent(confidence95.low)} to ${percent(confidence95.high)})`,
      );
    }
    output.result(`model       ${summary.model}`);
    output.result(`report      ${report}`);
  } finally {
    log.end();
    await trainer.dispose();
  }
}
