import { join } from 'node:path';
import type { Command } from 'commander';
import { FolderLock } from '../data/folder-lock.js';
import { HardmineError } from '../errors.js';
import { writeFileAtomic } from '../formats/atomic.js';
import { writeExperimentReport } from '../report/experiment-report.js';
import { timeText } from '../report/page.js';
import {
  EVALUATION_SETS,
  type Experiment,
  PATHS,
  readExperiment,
  resolveExperiment,
} from '../reproduce/experiment.js';
import { presets } from '../reproduce/presets.js';
import { summarise } from '../reproduce/results.js';
import { listRuns, type Run, reproduce } from '../reproduce/run.js';
import { markdown } from '../reproduce/tables.js';
import { type MetricsLine, readMetrics } from '../train/run-directory.js';
import { type CommonOptions, makeCommand, output, percent } from './command.js';
import { addConfigOptions } from './config-options.js';
import { stopOnInterrupt } from './interrupt.js';
import { TrainingLog } from './training-log.js';

/** Keys of the configuration that the rows or the experiment itself decide. */
const DECIDED = [
  ...['data', 'out', 'validation', 'lfw', 'lfwPairs', 'ytf', 'ytfSplits', 'seed', 'resume'],
  ...['validateEvery', 'restarts'],
  ...['loss', 'scale', 'margin', 'm1', 'm2', 'm3', 'lambda', 'marginWarmUp'],
  ...['marginGradient', 'beyondPi', 'pull', 'weighting', 'center'],
];

type Given = Partial<Record<(typeof PATHS)[number], string>> & {
  seeds?: number[];
  evaluate?: string[];
};

interface Options extends CommonOptions, Given {
  preset?: string;
  out: string;
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
    .option('--ytf <dir>', 'folder of YouTube Faces with aligned frames')
    .option('--ytf-splits <file>', 'its list of pairs (default: splits.txt in the folder)')
    .option('--cfp <dir>', 'folder of aligned CFP images')
    .option('--cfp-protocol <dir>', "folder of CFP's lists (default: Protocol in the folder)")
    .option(
      '--evaluate <list>',
      `what to judge by, of ${EVALUATION_SETS.join(', ')} (default: all that the experiment names)`,
      (text: string) => text.split(','),
    )
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
  { preset, seeds, evaluate, ...options }: Options,
  config: Record<string, unknown>,
) {
  if ((file === undefined) === (preset === undefined)) {
    throw new HardmineError('ERR_CONFIG', 'give either an experiment (JSON) or --preset');
  }
  const given = {
    seeds,
    evaluate,
    ...Object.fromEntries(PATHS.map((key) => [key, options[key]])),
  };
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

async function run(experiment: Experiment, { out, json }: Options): Promise<void> {
  using interrupt = stopOnInterrupt('the run stops after this step and writes a checkpoint');
  // The runs' folders and the tables belong together.
  await using lock = await FolderLock.take(out);
  if (lock.warning !== null) output.warning(lock.warning);
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
          await writeResult(experiment, runs, out);
          break;
        }
      }
    }
  } finally {
    log.end();
    if (runs.some(({ outcome }) => outcome !== null)) await writeResult(experiment, runs, out);
  }
  const result = summarise(experiment, runs);
  if (json) output.json(result);
  else output.result(markdown(result));
}

/** Tables, figures and report; after every run, so that what is there can be read while the rest goes on. */
async function writeResult(
  experiment: Experiment,
  runs: readonly Run[],
  out: string,
): Promise<void> {
  const result = summarise(experiment, runs);
  await writeFileAtomic(join(out, 'tables.md'), [markdown(result)]);
  await writeFileAtomic(join(out, 'result.json'), [`${JSON.stringify(result, null, 2)}\n`]);
  const metrics = new Map<string, MetricsLine[]>();
  for (const { row, outcome, folder } of runs) {
    if (outcome === null || metrics.has(row)) continue;
    metrics.set(row, await readMetrics(join(folder, 'metrics.jsonl')));
  }
  const report = join(out, 'report.html');
  await writeExperimentReport(report, result, metrics, timeText(new Date()));
}
