/** Hard mining and Knot Magnify over any per-sample loss. */
import { HardmineError } from './errors.js';
import { resolveWeighting, type Weighting } from './loss.js';
import { loadAddon } from './native.js';

/**
 * Weights losses of your own, as the margin heads weight theirs. With g(L) = 1 / (1 + exp(-A (beta L - B)))
 * and c = alpha ('equation', the paper's Equation 2) or alpha beta ('algorithm', its Algorithm 1):
 * HM(L) = c L g(L) and dHM/dL = c (g + beta A L g (1 - g)). Knot Magnify, with q = 1 / (gamma p + 1)
 * and p = exp(-L), is KM(L) = L q^2 and dKM/dL = q^2 + 2 gamma p L q^3.
 *
 * @param losses one finite loss a sample, at least one.
 * @returns `weighted`: HM or KM of each loss, or with reduction 'batch' L_i HM(mean L) / mean L, whose
 *   mean is HM of the mean; `gradientWeight`: what to multiply each sample's gradient with, the
 *   derivative at its loss, or with 'batch' at the mean.
 * @throws HardmineError ERR_INPUT for no losses or one that is not finite, ERR_CONFIG for the weighting.
 */
export function weightLosses(
  losses: Float32Array | Float64Array | readonly number[],
  weighting: Weighting,
): { weighted: Float64Array; gradientWeight: Float64Array } {
  const native = resolveWeighting(weighting);
  if (!Array.isArray(losses) && !ArrayBuffer.isView(losses)) {
    throw new HardmineError(
      'ERR_INPUT',
      `The losses are ${typeof losses}: give an array of numbers.`,
    );
  }
  const values = Float64Array.from(losses);
  if (values.length === 0) {
    throw new HardmineError('ERR_INPUT', 'There are no losses to weight: give at least one.');
  }
  const wrong = values.findIndex((loss) => !Number.isFinite(loss));
  if (wrong >= 0) {
    throw new HardmineError(
      'ERR_INPUT',
      `Loss ${wrong} is ${losses[wrong]} where a finite number is expected: mend or leave out that sample.`,
    );
  }
  return loadAddon('cpu').weightLosses(values, native);
}
