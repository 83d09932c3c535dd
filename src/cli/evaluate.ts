import type { Command } from 'commander';
import { evaluateLfw, type LfwResult } from '../evaluate/lfw.js';
import { FaceModel } from '../model.js';
import { writeReport } from '../report/report.js';
import { reportFaces } from '../train/run-report.js';
import { type CommonOptions, makeCommand, output, percent, progressNote } from './command.js';
import { addDeviceOptions, type DeviceOptions, deviceOf } from './device-options.js';
import { stopOnInterrupt } from './interrupt.js';

interface Options extends CommonOptions, DeviceOptions {
  model: string;
  lfw: string;
  pairs?: string;
  report?: string;
}

export function evaluateCommand(): Command {
  const command = makeCommand(
    'evaluate',
    'Evaluate a model by the LFW protocol: ten folds, the threshold of each from the other nine.',
    'hardmine evaluate --model runs/first/best.safetensors --lfw lfw/ --pairs pairs.txt --report lfw.html',
  )
    .requiredOption('--model <file>', 'model (.safetensors)')
    .requiredOption('--lfw <dir>', 'folder of aligned LFW images')
    .option('--pairs <file>', 'list of pairs (default: pairs.txt in the folder)')
    .option('--report <file>', 'write a report (.html)');
  addDeviceOptions(command);
  return command.action(evaluate);
}

async function evaluate(options: Options): Promise<void> {
  using interrupt = stopOnInterrupt('the evaluation ends without a result');
  const model = await FaceModel.load(options.model, deviceOf(options));
  let result: LfwResult;
  try {
    result = await evaluateLfw(model, {
      root: options.lfw,
      ...(options.pairs && { pairs: options.pairs }),
      onProgress: progressNote('embedding'),
      signal: interrupt.signal,
    });
  } finally {
    await model.dispose();
  }
  const { details, ...figures } = result;
  if (options.report) {
    await writeReport(options.report, {
      title: `${options.model} on ${result.dataset}`,
      created: new Date().toISOString(),
      config: { model: options.model, lfw: options.lfw, pairs: options.pairs ?? 'pairs.txt' },
      environment: {},
      metrics: [],
      evaluatedOn: `${result.pairs} pairs of ${result.dataset}`,
      evaluations: [{ name: 'model', result }],
      hardest: await reportFaces(result),
    });
  }
  if (options.json) {
    output.json({ ...figures, model: options.model });
    return;
  }
  for (const note of details.notes) output.note(note);
  const { accuracy, confidence95, tarAtFar } = figures;
  output.result(
    [
      `${result.dataset}: ${percent(accuracy.mean)} over ${accuracy.perFold.length} folds (std ${percent(accuracy.std)}, standard error ${percent(accuracy.standardError)})`,
      `95% interval ${percent(confidence95.low)} to ${percent(confidence95.high)}, AUC ${figures.auc.toFixed(4)}, EER ${percent(figures.eer)}`,
      `TAR at FAR 1e-2 ${percent(tarAtFar['1e-2'])}, at FAR 1e-3 ${percent(tarAtFar['1e-3'])}`,
    ].join('\n'),
  );
}
