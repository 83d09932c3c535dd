/** What changes from step to step: learning rate, margin and A-Softmax's lambda. */
import type { Config } from '../config.js';
import { lambdaAt } from '../loss.js';
import type { NativeStepSettings } from '../native.js';

/**
 * The learning rate of an epoch, counted from 1: a milestone m counts from the epoch after it, so
 * that [8] leaves epochs 1 to 8 at `lr`.
 */
export function learningRate(
  { lr, lrGamma, milestones }: Pick<Config, 'lr' | 'lrGamma' | 'milestones'>,
  epoch: number,
): number {
  return lr * lrGamma ** milestones.filter((milestone) => epoch > milestone).length;
}

/** The share of the margin in force at a step, counted from 0: it grows linearly over `marginWarmUp` epochs. */
export function marginFactor(
  { marginWarmUp = 0 }: Pick<Config, 'marginWarmUp'>,
  step: number,
  stepsPerEpoch: number,
): number {
  return marginWarmUp === 0 ? 1 : Math.min(1, step / (marginWarmUp * stepsPerEpoch));
}

/** Settings of one step, counted from 0 over the whole run. */
export function stepSettings(
  config: Config,
  step: number,
  stepsPerEpoch: number,
): NativeStepSettings {
  return {
    lr: learningRate(config, 1 + Math.floor(step / stepsPerEpoch)),
    momentum: config.momentum,
    weightDecay: config.weightDecay,
    decayAll: config.decayAll,
    marginFactor: marginFactor(config, step, stepsPerEpoch),
    lambda: config.lambda ? lambdaAt(config.lambda, step) : 0,
  };
}

/** A call should last about this long: JavaScript then costs nothing and events still come often. */
const CALL_MS = 250;

/**
 * Steps of the next native call: about CALL_MS at the speed measured, and never past `boundary`, the
 * steps left until something else has to be done.
 */
export function stepsPerCall(msPerStep: number | null, boundary: number): number {
  const wanted = msPerStep === null ? 1 : Math.round(CALL_MS / msPerStep);
  return Math.max(1, Math.min(wanted, boundary));
}
