/** What a run is judged on at its end, once, by the best model: LFW and YouTube Faces. */
import { join } from 'node:path';
import type { Config } from '../config.js';
import { decodeImages } from '../data/images.js';
import { evaluateLfw, type LfwResult, readLfwPairs } from '../evaluate/lfw.js';
import { readList } from '../evaluate/lists.js';
import { evaluateYtf, findVideos, parseYtfSplits, type YtfResult } from '../evaluate/ytf.js';
import { FaceModel } from '../model.js';

export type FinalResult = LfwResult | YtfResult;

/** Whether `validation` names a list of pairs over LFW's images. */
export function isPairsFile(config: Pick<Config, 'validation'>): boolean {
  return config.validation !== 'identities' && config.validation !== 'none';
}

/** Whether LFW is evaluated at the end; `lfw` may also be given for a validation on its pairs alone. */
function evaluatesLfw(config: Pick<Config, 'lfw' | 'lfwPairs' | 'validation'>): boolean {
  return config.lfw !== undefined && (config.lfwPairs !== undefined || !isPairsFile(config));
}

/** What is evaluated at the end. */
export function evaluatedSets(
  config: Pick<Config, 'lfw' | 'lfwPairs' | 'ytf' | 'validation'>,
): ('lfw' | 'ytf')[] {
  return [
    ...(evaluatesLfw(config) ? (['lfw'] as const) : []),
    ...(config.ytf === undefined ? [] : (['ytf'] as const)),
  ];
}

/**
 * What the end of a long run needs is looked at before its start: lists, that no image and no video is
 * missing, and of each data set one image's size.
 */
export async function checkEvaluation(
  config: Pick<Config, 'lfw' | 'lfwPairs' | 'ytf' | 'ytfSplits' | 'validation'>,
): Promise<void> {
  const { lfw, lfwPairs, ytf, ytfSplits } = config;
  if (lfw !== undefined && evaluatesLfw(config)) {
    const { paths } = await readLfwPairs(lfw, lfwPairs, '--lfw-pairs');
    await decodeImages(paths.slice(0, 1));
  }
  if (ytf !== undefined) {
    const list = ytfSplits ?? join(ytf, 'splits.txt');
    const { videos } = parseYtfSplits(await readList(list, '--ytf-splits'), list);
    const found = await findVideos(ytf, videos, false);
    await decodeImages(found.videos[0]!.frames.slice(0, 1));
  }
}

/** LFW and then YouTube Faces by the model at `path`, those of them that the configuration names. */
export async function* evaluateBest(
  path: string,
  config: Config,
  signal: AbortSignal | undefined,
): AsyncGenerator<FinalResult, void, void> {
  const { device, threads, lfw, lfwPairs, ytf, ytfSplits } = config;
  if (evaluatedSets(config).length === 0) return;
  const model = await FaceModel.load(path, { device, precision: 'fp32', threads });
  const stop = { ...(signal && { signal }) };
  try {
    if (lfw !== undefined && evaluatesLfw(config)) {
      yield await evaluateLfw(model, { root: lfw, ...(lfwPairs && { pairs: lfwPairs }), ...stop });
    }
    if (ytf !== undefined) {
      yield await evaluateYtf(model, {
        root: ytf,
        ...(ytfSplits && { splits: ytfSplits }),
        ...stop,
      });
    }
  } finally {
    await model.dispose();
  }
}

/**
 * Results as evaluation.json and `train --json` hold them: LFW alone as `evaluate --json` prints it, with
 * YouTube Faces an object by data set; null when nothing was evaluated.
 */
export function evaluationFigures(results: readonly FinalResult[], model: string) {
  const figures = results.map(({ details: _, ...result }) => ({ ...result, model }));
  const ytf = figures.find(({ dataset }) => dataset === 'ytf');
  const lfw = figures.find(({ dataset }) => dataset !== 'ytf');
  if (!ytf) return lfw ?? null;
  return { ...(lfw && { lfw }), ytf };
}
