/**
 * What a trainer watches for: a first loss that is not what the formulas promise, and the ways in
 * which training fails to start or comes to harm. Each is said once, with the setting to change.
 */
import type { Config } from '../config.js';
import { plateauLoss } from '../loss.js';
import type { NativeLoss } from '../native.js';

export type WarningKind =
  | 'first-loss'
  | 'plateau'
  | 'collapse'
  | 'silenced'
  | 'outlier'
  | 'loss-scale'
  | 'checkpoint'
  | 'disk'
  | 'environment'
  | 'lock'
  | 'report'
  | 'identity';

/** Means over the rows of some steps. */
export interface Progress {
  steps: number;
  rows: number;
  loss: number;
  baseLoss: number;
  accuracy: number;
  silenced: number;
  kept: number;
  amplified: number;
  meanCosine: number;
  embeddingNorm: number;
}

export interface HealthWarning {
  kind: WarningKind;
  message: string;
}

/** A verdict needs at least this many steps: fewer are noise and warm-up. */
const WINDOW_STEPS = 100;
/** Nothing is said about a start before this many steps, nor before the first epoch has ended. */
const START_STEPS = 300;

/** Twelve halvings below where it starts, and four above 1, at which the session gives up. */
const COLLAPSED_LOSS_SCALE = 16;

/**
 * Checks the mean base loss of the first step against `expected` (see expectedFirstLoss). The
 * expectation is the limit of many classes and dimensions: the log-sum over few of them falls short of
 * it by some percent, and the mean over a batch scatters by about `scale` / sqrt(dim batch), where
 * `scale` is what a cosine is multiplied by (see cosineWeight).
 */
export function checkFirstLoss(
  found: number,
  expected: number,
  scale: number,
  config: Config,
): HealthWarning | null {
  const { loss, embedding, batch } = config;
  const tolerance = 0.1 * expected + (4 * scale) / Math.sqrt(embedding * batch);
  if (Math.abs(found - expected) <= tolerance) return null;
  return {
    kind: 'first-loss',
    message: `the first loss is ${found.toFixed(2)} where about ${expected.toFixed(2)} is expected of ${loss} at its start: check ${config.scale === undefined ? '' : 'scale, '}margin and the labels of the data`,
  };
}

/** The settings that help a margin loss to start, as far as they are not set yet. */
function startingAdvice(config: Config): string {
  const advice: string[] = [];
  if (config.embeddingNorm === 'none') advice.push('embeddingNorm batch');
  if (config.loss !== 'softmax' && (config.marginWarmUp ?? 0) < 3) advice.push('marginWarmUp 3');
  if ((config.scale ?? 0) > 32) advice.push('scale 32');
  if (config.lr < 0.05) advice.push('lr 0.05');
  if (advice.length === 0) advice.push('a smaller margin', 'later milestones');
  return `try ${advice.join(', ')}`;
}

/** Steps behind the mean and the deviation that an outlier is measured by: llm.c's. */
const OUTLIER_STEPS = 128;
/** Deviations from the mean beyond which a figure is one. */
const OUTLIER_SCORE = 6;
/**
 * The deviation is taken as at least this share of the greatest mean so far. A loss that has come down to
 * nearly nothing, or a norm that hardly moves, is far from its mean at every hard batch.
 */
const OUTLIER_FLOOR = 0.01;

/** The running mean of one figure of each step. */
class RunningFigure {
  private readonly last: number[] = [];
  private greatestMean = 0;

  /** The mean and the score of `value` against the steps before it; null while they are too few. */
  observe(value: number): { mean: number; score: number } | null {
    const { last } = this;
    let found = null;
    if (last.length === OUTLIER_STEPS) {
      const mean = last.reduce((sum, x) => sum + x, 0) / last.length;
      const variance = last.reduce((sum, x) => sum + (x - mean) ** 2, 0) / last.length;
      this.greatestMean = Math.max(this.greatestMean, Math.abs(mean));
      const deviation = Math.max(Math.sqrt(variance), OUTLIER_FLOOR * this.greatestMean);
      found = { mean, score: deviation === 0 ? 0 : (value - mean) / deviation };
      last.shift();
    }
    last.push(value);
    return found;
  }
}

/** Watches the figures of a run; tell it every call's steps and progress. */
export class Health {
  private window: Progress[] = [];
  private readonly figures = {
    'base loss': new RunningFigure(),
    'norm of the embeddings': new RunningFigure(),
  };
  private readonly said = new Set<WarningKind>();

  constructor(
    private readonly config: Config,
    private readonly loss: NativeLoss,
    private readonly classes: number,
    private readonly stepsPerEpoch: number,
  ) {}

  /** `step` is the number of steps done in all; `marginFactor` that of the last of them. */
  observe(progress: Progress, step: number, marginFactor: number): HealthWarning[] {
    this.window.push(progress);
    const mean = meanProgress(this.window);
    if (mean.steps < WINDOW_STEPS) return [];
    this.window = [];
    const nearChance = mean.accuracy < 1 / this.classes + 0.01;
    const started = step >= Math.max(START_STEPS, this.stepsPerEpoch) && !nearChance;
    const overdue = step >= Math.max(START_STEPS, 2 * this.stepsPerEpoch) && marginFactor === 1;
    const warnings: HealthWarning[] = [];
    if (nearChance && !started && step >= START_STEPS && mean.meanCosine > 0.9) {
      warnings.push({
        kind: 'collapse',
        message: `the embeddings have collapsed: those of different identities have a mean cosine of ${mean.meanCosine.toFixed(3)} (0 is healthy) and training accuracy is ${mean.accuracy.toFixed(4)}; ${startingAdvice(this.config)}`,
      });
    }
    if (nearChance && overdue) {
      const plateau = plateauLoss(this.loss, this.classes);
      const rests =
        plateau === null
          ? ''
          : ` (a collapsed network rests near ${plateau.toFixed(1)}, all embeddings and class weights pulled together)`;
      warnings.push({
        kind: 'plateau',
        message: `training has not started after ${step} steps: the base loss is ${mean.baseLoss.toFixed(2)}${rests} and training accuracy ${mean.accuracy.toFixed(4)}; ${startingAdvice(this.config)}`,
      });
    }
    if (mean.silenced > 0.95 && mean.accuracy < 0.5) {
      const { kind } = this.config.weighting;
      const remedy =
        kind === 'knot-magnify'
          ? 'lower gamma'
          : 'lower B or A, or raise beta, so that the gate opens at a smaller loss';
      warnings.push({
        kind: 'silenced',
        message: `the weighting ${kind} silences ${(100 * mean.silenced).toFixed(1)}% of the samples though training accuracy is only ${mean.accuracy.toFixed(3)}: ${remedy}, or set weighting none`,
      });
    }
    return this.unsaid(warnings);
  }

  /** Figures of single steps, `first` being the number of the first of them, from 1. */
  observeSteps(
    stats: readonly { baseLoss: number; embeddingNorm: number }[],
    first: number,
  ): HealthWarning[] {
    const warnings: HealthWarning[] = [];
    for (const [i, { baseLoss, embeddingNorm }] of stats.entries()) {
      const values = { 'base loss': baseLoss, 'norm of the embeddings': embeddingNorm };
      for (const name of ['base loss', 'norm of the embeddings'] as const) {
        const found = this.figures[name].observe(values[name]);
        if (found === null || found.score <= OUTLIER_SCORE) continue;
        warnings.push({
          kind: 'outlier',
          message: `the ${name} is ${values[name].toPrecision(4)} at step ${first + i}, ${found.score.toFixed(1)} standard deviations above its mean of ${found.mean.toPrecision(4)} over the ${OUTLIER_STEPS} steps before: if it does not come down, lower lr or go back to an earlier checkpoint, and look for wrong labels in the data`,
        });
      }
    }
    return this.unsaid(warnings);
  }

  /** The scale of fp16's gradients after `step` steps; see core/backend.h's "loss_scale". */
  observeLossScale(scale: number, step: number): HealthWarning[] {
    if (scale > COLLAPSED_LOSS_SCALE) return [];
    return this.unsaid([
      {
        kind: 'loss-scale',
        message: `the loss scale of fp16 has fallen to ${scale} after ${step} steps (it starts at 65536): gradients overflow again and again and their steps are skipped; lower lr or scale, or train with --precision bf16 or fp32`,
      },
    ]);
  }

  private unsaid(warnings: readonly HealthWarning[]): HealthWarning[] {
    return warnings.filter(({ kind }) => {
      const isNew = !this.said.has(kind);
      this.said.add(kind);
      return isNew;
    });
  }
}

/** The mean of several progresses, weighted by their rows. */
export function meanProgress(parts: readonly Progress[]): Progress {
  const mean: Progress = {
    steps: 0,
    rows: 0,
    loss: 0,
    baseLoss: 0,
    accuracy: 0,
    silenced: 0,
    kept: 0,
    amplified: 0,
    meanCosine: 0,
    embeddingNorm: 0,
  };
  for (const part of parts) {
    mean.steps += part.steps;
    mean.rows += part.rows;
  }
  for (const key of MEAN_KEYS) {
    let sum = 0;
    for (const part of parts) sum += part.rows * part[key];
    mean[key] = mean.rows === 0 ? 0 : sum / mean.rows;
  }
  return mean;
}

const MEAN_KEYS = [
  'loss',
  'baseLoss',
  'accuracy',
  'silenced',
  'kept',
  'amplified',
  'meanCosine',
  'embeddingNorm',
] as const;
