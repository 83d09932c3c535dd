import type { Command } from 'commander';
import { HardmineError } from '../errors.js';
import { readExperiment, resolveExperiment } from '../reproduce/experiment.js';
import { presets } from '../reproduce/presets.js';
import { listRuns, reproduce } from '../reproduce/run.js';
import { type CommonOptions, makeCommand, output, percent } from './command.js';
import { addConfigOptions } from './config-options.js';
import { stopOnInterrupt } from './interrupt.js';
import { TrainingLog } from './training-log.js';

/** Keys of the configuration that the rows or the experiment itself decide. */
const DECIDED = [
  ...['data', 'out', 'validation', 'lfw', 'lfwPairs', 'seed', 'resume', 'validateEvery'],
  ...['loss', 'scale', 'margin', 'm1', 'm2', 'm3', 'lambda', 'marginWarmUp'],
  ...['marginGradient', 'beyondPi', 'weighting'],
];

interface Options extends CommonOptions {
  preset?: string;
  out: string;
  data?: string;
  lfw?: string;
  lfwPairs?: string;
  seeds?: number[];
}

export function reproduceCommand(): Command {
  const command = makeCommand(
    'reproduce',
    "Run an experiment to its end: every row under every seed, evaluated and compared; started again, it goes on where it was. Presets have the paper's rows and the controls that it lacks.",
    'hardmine reproduce --preset paper-casia --data casia.rec --lfw lfw/ --out runs/paper',
  )
    .argument('[experiment]', 'experiment (JSON), instead of --preset')
    .option('--preset <name>', `one of ${Object.keys(presets).join(', ')}`)
    .requiredOption('--out <dir>', 'folder of its runs, tables and report')
    .option('--data <path>', 'training data')
    .option('--lfw <dir>', 'folder of aligned LFW images')
    .option('--lfw-pairs <file>', "LFW's pairs.txt (default: the one in the folder)")
    .option('--seeds <list>', 'seeds, such as 1,2,3', (text: string) =>
      text.split(',').map(Number),
    );
  const configFrom = addConfigOptions(command, DECIDED);
  return command.action(async (file: string | undefined, options: Options) => {
    await run(await experimentOf(file, options, configFrom(command.opts())), options);
  });
}

async function experimentOf(
  file: string | undefined,
  { preset, data, lfw, lfwPairs, seeds }: Options,
  config: Record<string, unknown>,
) {
  if ((file === undefined) === (preset === undefined)) {
    throw new HardmineError('ERR_CONFIG', 'give either an experiment (JSON) or --preset');
  }
  const given = { data, lfw, lfwPairs, seeds };
  const base = preset === undefined ? await readExperiment(file!) : presets[preset];
  if (base === undefined || base === null || typeof base !== 'object') {
    throw new HardmineError(
      'ERR_CONFIG',
      preset === undefined
        ? `the experiment ${file} is no JSON object of keys and values: mend it there`
        : `there is no preset "${preset}": choose ${Object.keys(presets).join(', ')}`,
    );
  }
  const shared: unknown = Reflect.get(base, 'config');
  return resolveExperiment({
    ...base,
    ...Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined)),
    config: { ...(shared as object | undefined), ...config },
  });
}

async function run(
  experiment: ReturnType<typeof resolveExperiment>,
  { out, json }: Options,
): Promise<void> {
  using interrupt = stopOnInterrupt('the run stops after this step and writes a checkpoint');
  const runs = await listRuns(experiment, out);
  let log = new TrainingLog();
  const events = reproduce(experiment, runs, out, {
    onProgress: (progress) => log.preparing(progress),
    signal: interrupt.signal,
  });
  try {
    for await (const event of events) {
      switch (event.type) {
        case 'run': {
          const { run, number, of } = event;
          output.note(`run ${number} of ${of}: ${run.row}, seed ${run.seed}, in ${run.folder}`);
          log = new TrainingLog();
          log.start(event.plan, event.step);
          break;
        }
        case 'training':
          log.event(event.event);
          break;
        case 'finished': {
          log.end();
          const { failure, measures } = event.run.outcome!;
          const figures = Object.entries(measures).map(
            ([set, measure]) => `${set} ${percent(measure.accuracy)}`,
          );
          output.note(failure ?? figures.join(', '));
          break;
        }
      }
    }
  } finally {
    log.end();
  }
  if (json) output.json(runs);
}
