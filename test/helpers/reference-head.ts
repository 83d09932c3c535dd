/**
 * The margin head in double precision, written from the formulas alone: angles by acos, sums by plain
 * loops, nothing shared with the native code.
 */

export interface ReferenceLaw {
  base: 'softmax' | 'margin' | 'euclidean-margin';
  m1: number;
  m2: number;
  m3: number;
  /** 'norm': each embedding's own norm. */
  scale: number | 'norm';
  lambda: number;
  beyondPi: 'mirror' | 'none';
  gradient: 'exact' | 'detached';
  /** Euclidean margin. */
  hinge: { margin: number; pull: number };
}

export type ReferenceWeighting = HardMining | { kind: 'knot-magnify'; gamma: number };

export interface HardMining {
  kind: 'hard-mining';
  alpha: number;
  beta: number;
  A: number;
  B: number;
  form: 'equation' | 'algorithm';
  reduction: 'sample' | 'batch';
}

export interface ReferenceInput {
  rows: number;
  dim: number;
  classes: number;
  embeddings: ArrayLike<number>;
  weights: ArrayLike<number>;
  /** Softmax alone. */
  bias: ArrayLike<number> | null;
  labels: ArrayLike<number>;
}

/** Base loss and its gradients row by row, before any weighting. */
export interface ReferenceRows {
  baseLoss: Float64Array;
  /** dL_i / dx_i [rows, dim] */
  rowGradients: Float64Array;
  /** cos(theta_y) of each row; 0 for softmax. */
  targetCosine: Float64Array;
  /** Gradients of sum_i factor_i L_i with respect to weights and bias. */
  classGradients(factors: ArrayLike<number>): { weights: Float64Array; bias: Float64Array };
}

export interface ReferenceOutput {
  loss: number;
  baseLoss: Float64Array;
  weightedLoss: Float64Array;
  gradEmbeddings: Float64Array;
  gradWeights: Float64Array;
  gradBias: Float64Array;
}

/** psi(theta) of the combined margin law. */
export function psi(theta: number, { m1, m2, m3, beyondPi }: ReferenceLaw): number {
  const phi = m1 * theta + m2;
  if (beyondPi === 'none') return Math.cos(phi) - m3;
  const k = Math.floor(phi / Math.PI);
  return (-1) ** k * Math.cos(phi) - 2 * k - m3;
}

/** d psi / d cos(theta) = psi'(theta) / -sin(theta), sin taken at a cosine clamped to +-(1 - 1e-7). */
function psiSlope(cosine: number, law: ReferenceLaw): number {
  if (law.gradient === 'detached') return 1;
  const limit = 1 - 1e-7;
  const theta = Math.acos(Math.max(-limit, Math.min(limit, cosine)));
  const phi = law.m1 * theta + law.m2;
  const k = law.beyondPi === 'none' ? 0 : Math.floor(phi / Math.PI);
  return ((-1) ** k * law.m1 * Math.sin(phi)) / Math.sin(theta);
}

/** HM(L) and dHM/dL of the paper. */
export function hardMining(
  loss: number,
  { alpha, beta, A, B, form }: HardMining,
): { value: number; slope: number } {
  const factor = form === 'equation' ? alpha : alpha * beta;
  const gate = 1 / (1 + Math.exp(-A * (beta * loss - B)));
  return {
    value: factor * loss * gate,
    slope: factor * (gate + beta * A * loss * gate * (1 - gate)),
  };
}

/** KM(L) = L / (gamma e^-L + 1)^2 and its derivative, by the quotient rule. */
export function knotMagnify(loss: number, gamma: number): { value: number; slope: number } {
  const p = Math.exp(-loss);
  const denominator = (gamma * p + 1) ** 2;
  const dDenominator = -2 * gamma * p * (gamma * p + 1);
  return {
    value: loss / denominator,
    slope: (denominator - loss * dDenominator) / denominator ** 2,
  };
}

/** The Euclidean margin loss of one row from its squared distances to all classes, and its slopes by them. */
export function euclideanRow(
  distances: Float64Array,
  y: number,
  { margin, pull }: ReferenceLaw['hinge'],
): { loss: number; slopes: Float64Array; hinges: Float64Array } {
  const own = distances[y]!;
  const hinges = distances.map((distance, j) => (j === y ? 0 : margin + own - distance));
  const active = hinges.filter((hinge) => hinge > 0);
  const count = Math.max(1, active.length);
  const slopes = hinges.map((hinge) => (hinge > 0 ? -1 / count : 0));
  slopes[y] = (active.length > 0 ? 1 : 0) + pull;
  return { loss: active.reduce((a, b) => a + b, 0) / count + pull * own, slopes, hinges };
}

/**
 * Base loss of one row from its products with the classes, and what its gradient needs.
 *
 * @param products logits of softmax, cosines of a margin loss.
 * @param scale s of this row.
 * @param detachedShift psi - cos at another point: the target is then cos + shift, whose true
 *   gradient is the detached one.
 */
export function rowLoss(
  products: Float64Array,
  y: number,
  scale: number,
  law: ReferenceLaw,
  detachedShift?: number,
): { loss: number; target: number; probabilities: Float64Array } {
  const logits = Float64Array.from(products);
  let target = products[y]!;
  if (law.base === 'margin') {
    const bent = detachedShift === undefined ? psi(Math.acos(target), law) : target + detachedShift;
    target = (law.lambda * target + bent) / (1 + law.lambda);
    for (let j = 0; j < logits.length; j++) logits[j]! *= scale;
    logits[y] = scale * target;
  }
  const most = logits.reduce((a, b) => Math.max(a, b));
  const exponentials = logits.map((logit) => Math.exp(logit - most));
  const sum = exponentials.reduce((a, b) => a + b);
  return {
    loss: Math.log(sum) + most - logits[y]!,
    target,
    probabilities: exponentials.map((value) => value / sum),
  };
}

/** @param detachedShift as in rowLoss, row by row. */
export function referenceRows(
  { rows, dim, classes, embeddings, weights, bias, labels }: ReferenceInput,
  law: ReferenceLaw,
  detachedShift?: ArrayLike<number>,
): ReferenceRows {
  if (law.base === 'euclidean-margin') {
    return euclideanRows({ rows, dim, classes, embeddings, weights, bias, labels }, law);
  }
  const softmax = law.base === 'softmax';
  const x = rowsOf(embeddings, rows, dim);
  const w = rowsOf(weights, classes, dim);
  const xNorm = x.map((row) => Math.hypot(...row));
  const wNorm = w.map((row) => Math.hypot(...row));
  const xHat = x.map((row, i) => row.map((value) => value / xNorm[i]!));
  const wHat = w.map((row, j) => row.map((value) => value / wNorm[j]!));
  const baseLoss = new Float64Array(rows);
  const targetCosine = new Float64Array(rows);
  const rowGradients = new Float64Array(rows * dim);
  /** Logits of softmax, cosines of a margin loss. */
  const products = new Float64Array(rows * classes);
  /** dL_i / dproduct_ij */
  const slopes = new Float64Array(rows * classes);

  for (let i = 0; i < rows; i++) {
    const y = labels[i]!;
    const scale = law.scale === 'norm' ? xNorm[i]! : law.scale;
    for (let j = 0; j < classes; j++) {
      let product = softmax ? (bias?.[j] ?? 0) : 0;
      const left = softmax ? x[i]! : xHat[i]!;
      const right = softmax ? w[j]! : wHat[j]!;
      for (let d = 0; d < dim; d++) product += left[d]! * right[d]!;
      products[i * classes + j] = softmax ? product : Math.max(-1, Math.min(1, product));
    }
    const row = products.subarray(i * classes, (i + 1) * classes);
    const { loss, target, probabilities } = rowLoss(row, y, scale, law, detachedShift?.[i]);
    baseLoss[i] = loss;
    if (!softmax) targetCosine[i] = row[y]!;

    const gradient = rowGradients.subarray(i * dim, (i + 1) * dim);
    for (let j = 0; j < classes; j++) {
      const dLogit = probabilities[j]! - (j === y ? 1 : 0);
      if (softmax) {
        slopes[i * classes + j] = dLogit;
        for (let d = 0; d < dim; d++) gradient[d]! += dLogit * w[j]![d]!;
        continue;
      }
      const cosine = row[j]!;
      const dPsi = detachedShift === undefined ? psiSlope(cosine, law) : 1;
      const dTarget = (law.lambda + dPsi) / (1 + law.lambda);
      const dCosine = dLogit * scale * (j === y ? dTarget : 1);
      slopes[i * classes + j] = dCosine;
      // d cos / dx = (w^ - cos x^) / |x|; where |x| is the scale too, d|x| / dx = x^ is added.
      const dScale = law.scale === 'norm' ? dLogit * (j === y ? target : cosine) : 0;
      const step = dCosine / xNorm[i]!;
      const [along, towards] = [xHat[i]!, wHat[j]!];
      for (let d = 0; d < dim; d++) {
        gradient[d]! += step * (towards[d]! - cosine * along[d]!) + dScale * along[d]!;
      }
    }
  }

  const classGradients = (factors: ArrayLike<number>) => {
    const gradWeights = new Float64Array(classes * dim);
    const gradBias = new Float64Array(classes);
    for (let j = 0; j < classes; j++) {
      const gradient = gradWeights.subarray(j * dim, (j + 1) * dim);
      for (let i = 0; i < rows; i++) {
        const slope = factors[i]! * slopes[i * classes + j]!;
        if (softmax) {
          gradBias[j]! += slope;
          for (let d = 0; d < dim; d++) gradient[d]! += slope * x[i]![d]!;
          continue;
        }
        const cosine = products[i * classes + j]!;
        const step = slope / wNorm[j]!;
        const [along, towards] = [wHat[j]!, xHat[i]!];
        for (let d = 0; d < dim; d++) gradient[d]! += step * (towards[d]! - cosine * along[d]!);
      }
    }
    return { weights: gradWeights, bias: gradBias };
  };
  return { baseLoss, rowGradients, targetCosine, classGradients };
}

/** By way of the distances: d |x^ - w^|^2 / dx^ = 2 (x^ - w^), and dx^ / dx = (1 - x^ x^T) / |x|. */
function euclideanRows(
  { rows, dim, classes, embeddings, weights, labels }: ReferenceInput,
  law: ReferenceLaw,
): ReferenceRows {
  const unit = (values: Float64Array[]) => {
    const norms = values.map((row) => Math.hypot(...row));
    return { norms, hats: values.map((row, i) => row.map((value) => value / norms[i]!)) };
  };
  const x = unit(rowsOf(embeddings, rows, dim));
  const w = unit(rowsOf(weights, classes, dim));
  const baseLoss = new Float64Array(rows);
  const targetCosine = new Float64Array(rows);
  const rowGradients = new Float64Array(rows * dim);
  const allSlopes: Float64Array[] = [];
  /** Adds slope d |hat - other|^2 / d value to `into`, for hat = value / norm. */
  const addGradient = (
    into: Float64Array,
    slope: number,
    hat: Float64Array,
    other: Float64Array,
    norm: number,
  ) => {
    if (slope === 0) return;
    const along = hat.reduce((sum, value, d) => sum + value * (value - other[d]!), 0);
    for (let d = 0; d < dim; d++) {
      into[d]! += ((2 * slope) / norm) * (hat[d]! - other[d]! - along * hat[d]!);
    }
  };
  for (let i = 0; i < rows; i++) {
    const hat = x.hats[i]!;
    const distances = Float64Array.from(w.hats, (other) =>
      hat.reduce((sum, value, d) => sum + (value - other[d]!) ** 2, 0),
    );
    const { loss, slopes } = euclideanRow(distances, labels[i]!, law.hinge);
    baseLoss[i] = loss;
    targetCosine[i] = 1 - distances[labels[i]!]! / 2;
    allSlopes.push(slopes);
    const gradient = rowGradients.subarray(i * dim, (i + 1) * dim);
    for (let j = 0; j < classes; j++) {
      addGradient(gradient, slopes[j]!, hat, w.hats[j]!, x.norms[i]!);
    }
  }
  const classGradients = (factors: ArrayLike<number>) => {
    const gradWeights = new Float64Array(classes * dim);
    for (let j = 0; j < classes; j++) {
      const gradient = gradWeights.subarray(j * dim, (j + 1) * dim);
      for (let i = 0; i < rows; i++) {
        const slope = factors[i]! * allSlopes[i]![j]!;
        addGradient(gradient, slope, w.hats[j]!, x.hats[i]!, w.norms[j]!);
      }
    }
    return { weights: gradWeights, bias: new Float64Array(classes) };
  };
  return { baseLoss, rowGradients, targetCosine, classGradients };
}

/** Weighted losses, the loss that the gradients are of (their mean), and the gradients. */
export function weighted(
  { baseLoss, rowGradients, classGradients }: ReferenceRows,
  weighting: ReferenceWeighting | null,
): ReferenceOutput {
  const rows = baseLoss.length;
  const { values, slopes } = weightedLosses(baseLoss, weighting);
  const factors = slopes.map((slope) => slope / rows);
  const dim = rowGradients.length / rows;
  const { weights, bias } = classGradients(factors);
  return {
    loss: values.reduce((a, b) => a + b) / rows,
    baseLoss,
    weightedLoss: values,
    gradEmbeddings: rowGradients.map((value, i) => value * factors[Math.floor(i / dim)]!),
    gradWeights: weights,
    gradBias: bias,
  };
}

/** The weighted loss of each row and the factor of its gradient. */
export function weightedLosses(
  losses: Float64Array,
  weighting: ReferenceWeighting | null,
): { values: Float64Array; slopes: Float64Array } {
  if (weighting === null) return { values: losses, slopes: losses.map(() => 1) };
  if (weighting.kind === 'knot-magnify' || weighting.reduction === 'sample') {
    const rows = Array.from(losses, (loss) =>
      weighting.kind === 'knot-magnify'
        ? knotMagnify(loss, weighting.gamma)
        : hardMining(loss, weighting),
    );
    return {
      values: Float64Array.from(rows, ({ value }) => value),
      slopes: Float64Array.from(rows, ({ slope }) => slope),
    };
  }
  const mean = losses.reduce((a, b) => a + b) / losses.length;
  const { value, slope } = hardMining(mean, weighting);
  return { values: losses.map((loss) => (loss * value) / mean), slopes: losses.map(() => slope) };
}

function rowsOf(values: ArrayLike<number>, rows: number, dim: number): Float64Array[] {
  const all = Float64Array.from(values);
  return Array.from({ length: rows }, (_, row) => all.subarray(row * dim, (row + 1) * dim));
}
