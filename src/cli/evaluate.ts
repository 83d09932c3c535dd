import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { basename } from 'node:path';
import { type Command, Option } from 'commander';
import { FaceAligner } from '../align/aligner.js';
import { readNetworks } from '../align/mtcnn-weights.js';
import { HardmineError } from '../errors.js';
import { evaluateBin } from '../evaluate/bin.js';
import { evaluateCfp } from '../evaluate/cfp.js';
import { evaluateIdentification, type IdentificationResult } from '../evaluate/identification.js';
import type { AlignFace } from '../evaluate/image-source.js';
import { evaluateLfw } from '../evaluate/lfw.js';
import type { PairsResult } from '../evaluate/pairs.js';
import { PROTOCOLS, type ProtocolName } from '../evaluate/protocols.js';
import { type McNemar, mcnemar } from '../evaluate/statistics.js';
import { AGGREGATES, type Aggregate, evaluateYtf, type YtfResult } from '../evaluate/ytf.js';
import { checkWritable } from '../formats/atomic.js';
import { FaceModel } from '../model.js';
import { timeText } from '../report/page.js';
import { type ReportFace, writeReport } from '../report/report.js';
import { faceFiles, pairsOf, reportFace, reportFaces } from '../train/run-report.js';
import {
  type CommonOptions,
  makeCommand,
  output,
  percent,
  progressNote,
  wholeNumber,
} from './command.js';
import { addDeviceOptions, type DeviceOptions, deviceOf } from './device-options.js';
import { stopOnInterrupt } from './interrupt.js';

interface Options extends CommonOptions, DeviceOptions {
  model: string;
  compare?: string;
  lfw?: string;
  ytf?: string;
  cfp?: string;
  bin?: string;
  identification?: true;
  pairs?: string;
  splits?: string;
  frames?: number;
  aggregate?: Aggregate;
  cache?: string;
  cfpProtocol?: string;
  mtcnn?: string;
  protocol: ProtocolName;
  report?: string;
}

/** What a protocol's own code prints, so that figures are held against the right one. */
const SPREADS = {
  std: ', whose code reports the std',
  standardError: ', whose code reports the standard error',
  none: ', whose code reports no spread',
};

const DATASETS = ['lfw', 'ytf', 'cfp', 'bin'] as const;
type Dataset = (typeof DATASETS)[number];

/** Options that mean something for some data sets alone. */
const ONLY_FOR: readonly [keyof Options, string, readonly Dataset[]][] = [
  ['identification', '--identification', ['lfw']],
  ['pairs', '--pairs', ['lfw']],
  ['splits', '--splits', ['ytf']],
  ['frames', '--frames', ['ytf']],
  ['aggregate', '--aggregate', ['ytf']],
  ['cache', '--cache', ['ytf']],
  ['cfpProtocol', '--cfp-protocol', ['cfp']],
  ['mtcnn', '--mtcnn', ['lfw', 'ytf', 'cfp']],
];

export function evaluateCommand(): Command {
  const command = makeCommand(
    'evaluate',
    'Evaluate a model by a verification protocol: ten folds, the threshold of each from the other nine.',
    'hardmine evaluate --model runs/first/best.safetensors --lfw lfw/ --pairs pairs.txt --report lfw.html',
  )
    .requiredOption('--model <file>', 'model (.safetensors)')
    .option('--compare <file>', 'another model on the same pairs, by the paired test of McNemar')
    .option('--lfw <dir>', 'Labeled Faces in the Wild: Name/Name_0001.jpg')
    .option('--pairs <file>', "LFW's list of pairs (default: pairs.txt in the folder)")
    .option('--identification', 'LFW: rank-1 identification instead of verification')
    .option('--ytf <dir>', 'YouTube Faces: the folder of frame_images_DB or aligned_images_DB')
    .option('--splits <file>', "YouTube Faces' list of pairs (default: splits.txt in the folder)")
    .option('--frames <number>', 'frames of a video, evenly spaced (default: all)', wholeNumber(1))
    .addOption(
      new Option('--aggregate <rule>', 'how two videos compare (default: mean-embedding)').choices(
        AGGREGATES,
      ),
    )
    .option('--cache <dir>', 'keep the embeddings of videos here and use those that are there')
    .option('--cfp <dir>', 'Celebrities in Frontal-Profile: both FF and FP')
    .option('--cfp-protocol <dir>', "CFP's lists (default: Protocol in the folder)")
    .option('--bin <file>', "a verification set in InsightFace's .bin")
    .option(
      '--mtcnn <dir>',
      'find and align the faces first, by MTCNN with the weights in this folder',
    )
    .addOption(
      new Option('--protocol <name>', 'whose way of scoring and choosing thresholds')
        .choices(PROTOCOLS)
        .default('insightface'),
    )
    .option('--report <file>', 'write a report (.html)');
  addDeviceOptions(command);
  return command.action(evaluate);
}

/** One model's result on one set of pairs. */
interface Verified {
  /** Its key in the JSON of several. */
  key: string;
  result: PairsResult & { dataset: string };
  face: (row: number) => Promise<ReportFace>;
  /** What people must know of how it was done. */
  note?: string;
}

async function evaluate(options: Options): Promise<void> {
  const dataset = datasetOf(options);
  if (options.report) await checkWritable(options.report);
  using interrupt = stopOnInterrupt('the evaluation ends without a result');
  const { mtcnn, threads } = options;
  await using aligner = mtcnn ? await FaceAligner.load({ mtcnn, threads }) : null;
  const models = [options.model, ...(options.compare ? [options.compare] : [])];
  const work = { options, align: aligner && alignWith(aligner), signal: interrupt.signal };
  if (options.identification) {
    const results = await inTurn(models, (path) => identify(path, work));
    printIdentification(results, models, options);
    return;
  }
  const results = await inTurn(models, (path) => verify(path, dataset, work));
  printVerification(results, models, options);
  if (options.report) await report(options.report, results, models, options);
}

/** The data set that is asked for; what does not go with it is refused. */
function datasetOf(options: Options): Dataset {
  const [dataset, ...others] = DATASETS.filter((name) => options[name] !== undefined);
  const usage = (sentence: string) => new HardmineError('ERR_CONFIG', sentence);
  if (dataset === undefined || others.length > 0) {
    const found = dataset ? `--${[dataset, ...others].join(' and --')}` : 'none';
    throw usage(`evaluate takes one of --lfw, --ytf, --cfp and --bin, found ${found}: give one`);
  }
  for (const [key, flag, datasets] of ONLY_FOR) {
    if (options[key] !== undefined && !datasets.includes(dataset)) {
      throw usage(
        `${flag} has no meaning with --${dataset}: leave it out, or give --${datasets.join(' or --')}`,
      );
    }
  }
  for (const [key, flag] of [
    ['pairs', '--pairs'],
    ['report', '--report'],
  ] as const) {
    if (options.identification && options[key] !== undefined) {
      throw usage(`${flag} has no meaning with --identification: leave it out`);
    }
  }
  return dataset;
}

async function inTurn<T, R>(items: readonly T[], work: (item: T) => Promise<R>): Promise<R[]> {
  const results: R[] = [];
  for (const item of items) results.push(await work(item));
  return results;
}

interface Work {
  options: Options;
  align: AlignFace | null;
  signal: AbortSignal;
}

async function withModel<T>(
  path: string,
  options: Options,
  work: (model: FaceModel) => Promise<T>,
): Promise<T> {
  const model = await FaceModel.load(path, deviceOf(options));
  try {
    return await work(model);
  } finally {
    await model.dispose();
  }
}

function identify(path: string, { options, align, signal }: Work): Promise<IdentificationResult> {
  return withModel(path, options, (model) =>
    evaluateIdentification(model, {
      root: options.lfw!,
      protocol: options.protocol,
      ...(align && { align }),
      onProgress: progressNote('embedding'),
      signal,
    }),
  );
}

function verify(path: string, dataset: Dataset, work: Work): Promise<Verified[]> {
  const { options, align, signal } = work;
  const common = {
    protocol: options.protocol,
    ...(align && { align }),
    onProgress: progressNote(dataset === 'ytf' ? 'video' : 'embedding'),
    signal,
  };
  return withModel(path, options, async (model) => {
    if (dataset === 'lfw') {
      const { pairs } = options;
      const result = await evaluateLfw(model, {
        root: options.lfw!,
        ...(pairs && { pairs }),
        ...common,
      });
      return [{ key: 'lfw', result, face: faceFiles(result.details.paths) }];
    }
    if (dataset === 'ytf') {
      const { splits, frames, aggregate, cache } = options;
      const result = await evaluateYtf(model, {
        root: options.ytf!,
        ...(splits && { splits }),
        ...(frames && { frames }),
        ...(aggregate && { aggregate }),
        ...(cache && { cache: { folder: cache, key: await cacheKey(path, options) } }),
        ...common,
      });
      const note = `${result.videos} videos, ${result.frames.used} frames (${perVideo(result)}, ${result.framesWithoutFace} without a face left out), compared by ${result.aggregate}`;
      return [{ key: 'ytf', result, face: faceFiles(result.details.paths), note }];
    }
    if (dataset === 'cfp') {
      const { cfpProtocol } = options;
      const { ff, fp } = await evaluateCfp(model, {
        root: options.cfp!,
        ...(cfpProtocol && { lists: cfpProtocol }),
        ...common,
      });
      return [
        { key: 'fp', result: fp, face: faceFiles(fp.details.paths) },
        { key: 'ff', result: ff, face: faceFiles(ff.details.paths) },
      ];
    }
    const result = await evaluateBin(model, { path: options.bin!, ...common });
    const name = basename(options.bin!);
    const { images } = result.details;
    const face = (row: number) => reportFace(`${name}, image ${row}`, async () => images[row]!);
    return [{ key: 'bin', result, face }];
  });
}

function alignWith(aligner: FaceAligner): AlignFace {
  return async (path, box) => (await aligner.align(path, box && { box }))?.pixels ?? null;
}

function perVideo({ frames }: YtfResult): string {
  return frames.perVideo === null ? 'all' : `at most ${frames.perVideo} a video, evenly spaced`;
}

/** What the embeddings of a frame depend on besides the frame: the model, its precision, the alignment. */
async function cacheKey(model: string, { precision, mtcnn }: Options): Promise<string> {
  const hash = createHash('sha256')
    .update(precision)
    .update(await readFile(model));
  if (mtcnn) {
    for (const { onnx } of Object.values(await readNetworks(mtcnn))) hash.update(onnx);
  }
  return hash.digest('hex');
}

async function report(
  path: string,
  results: readonly Verified[][],
  models: readonly string[],
  options: Options,
): Promise<void> {
  const evaluationsOf = (part: number) =>
    results.map((parts, i) => ({
      name: models.length > 1 ? models[i]! : 'model',
      result: parts[part]!.result,
    }));
  const [first, ...others] = results[0]!;
  const { result, face } = first!;
  await writeReport(path, {
    title: `${options.model} on ${result.dataset}`,
    created: timeText(new Date()),
    config: settingsOf(options),
    environment: {},
    metrics: [],
    evaluatedOn: pairsOf(result),
    evaluations: evaluationsOf(0),
    alsoEvaluated: others.map((other, i) => ({
      evaluatedOn: pairsOf(other.result),
      evaluations: evaluationsOf(i + 1),
    })),
    hardest: await reportFaces(result, face),
  });
}

/** Options that say what was evaluated and how. */
function settingsOf({ json: _, debug: _debug, report: _report, ...settings }: Options) {
  return settings;
}

function printVerification(
  results: readonly Verified[][],
  models: readonly string[],
  { json }: Options,
): void {
  const tests = results.map((parts) =>
    parts.map(({ result }, i) =>
      mcnemar(results[0]![i]!.result.details.right, result.details.right),
    ),
  );
  if (json) {
    const documents = results.map((parts, m) => {
      const figures = parts.map(({ key, result: { details: _, ...rest } }, i) => ({
        key,
        figures: { ...rest, ...(m > 0 && { mcnemar: tests[m]![i]! }) },
      }));
      const content =
        figures.length === 1
          ? figures[0]!.figures
          : Object.fromEntries(figures.map(({ key, figures }) => [key, figures]));
      return { ...content, model: models[m]! };
    });
    output.json({ ...documents[0]!, ...(documents[1] && { compare: documents[1] }) });
    return;
  }
  for (const [m, parts] of results.entries()) {
    if (models.length > 1) output.result(models[m]!);
    for (const { result, note } of parts) {
      for (const reservation of result.details.notes) output.note(reservation);
      output.result([summary(result), ...(note ? [note] : [])].join('\n'));
    }
  }
  const [, second] = results;
  for (const [i, { result }] of (second ?? []).entries()) {
    const first = results[0]![i]!.result;
    output.result(
      difference(result.dataset, [first.accuracy.mean, result.accuracy.mean], tests[1]![i]!),
    );
  }
}

function summary(result: PairsResult & { dataset: string }): string {
  const { accuracy, confidence95, bootstrap95, tarAtFar, valAtFar } = result;
  const range = ({ low, high }: { low: number; high: number }) =>
    `${percent(low)} to ${percent(high)}`;
  return [
    `${result.dataset}: ${percent(accuracy.mean)} over ${accuracy.perFold.length} folds (std ${percent(accuracy.std)}, standard error ${percent(accuracy.standardError)}), protocol ${result.protocol}${SPREADS[accuracy.spread ?? 'none']}`,
    `95% interval ${range(confidence95)} (bootstrap ${range(bootstrap95)}), AUC ${result.auc.toFixed(4)}, EER ${percent(result.eer)}`,
    `TAR at FAR 1e-2 ${percent(tarAtFar['1e-2'])}, at FAR 1e-3 ${percent(tarAtFar['1e-3'])}${valAtFar ? `; VAL at FAR 1e-3 ${percent(valAtFar['1e-3'].val)} (std ${percent(valAtFar['1e-3'].std)}, FAR ${percent(valAtFar['1e-3'].far)})` : ''}`,
  ].join('\n');
}

function difference(
  what: string,
  [first, second]: readonly [number, number],
  test: McNemar,
): string {
  const { p, onlyFirst, onlySecond, method } = test;
  const meaning = test.distinguishable
    ? `${onlyFirst > onlySecond ? 'the first' : 'the second'} is better`
    : 'they cannot be told apart';
  return `${what}: ${percent(first)} against ${percent(second)}; the first alone is right on ${onlyFirst}, the second alone on ${onlySecond}; McNemar's test (${method}) p = ${p.toPrecision(3)}: ${meaning}`;
}

function printIdentification(
  results: readonly IdentificationResult[],
  models: readonly string[],
  { json }: Options,
): void {
  const [first, second] = results;
  const test = second && mcnemar(first!.details.right, second.details.right);
  if (json) {
    const [document, other] = results.map(({ details: _, ...figures }, i) => ({
      ...figures,
      model: models[i]!,
    }));
    output.json({ ...document!, ...(other && { compare: { ...other, mcnemar: test! } }) });
    return;
  }
  for (const [i, result] of results.entries()) {
    if (models.length > 1) output.result(models[i]!);
    const { details, confidence95 } = result;
    for (const note of details.notes) output.note(note);
    output.result(
      `identification: rank-1 ${percent(result.rank1)} (95% interval ${percent(confidence95.low)} to ${percent(confidence95.high)}), ${result.probes} probes of ${result.people} people against a gallery of one image each of ${result.gallery} people`,
    );
  }
  if (second) output.result(difference('identification', [first!.rank1, second.rank1], test!));
}
