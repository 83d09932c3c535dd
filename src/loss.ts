/** What a loss is to a user, checked and turned into what the addon takes; and what to expect of it. */
import { z } from 'zod';
import { HardmineError, nearest } from './errors.js';
import type { NativeLoss, NativeWeighting } from './native.js';

/** A-Softmax's lambda falls with the steps: max(floor, start / (1 + decay step)). */
export interface LambdaAnnealing {
  start: number;
  decay: number;
  floor: number;
}

/**
 * The loss of one sample before any weighting, all but the last with the cross-entropy over the
 * classes. theta_j is the angle between the embedding and the weights of class j, y the sample's
 * class; the logits of the margin losses are scale cos(theta_j), that of y is scale psi(theta_y).
 *
 * - softmax: logits x . w_j + b_j.
 * - a-softmax (SphereFace, Liu et al. 2017): psi = cos(margin theta), the embedding's norm is the
 *   scale, and the target is (lambda cos + psi) / (1 + lambda). `lambda` is a number (0: the formula
 *   as printed) or falls with the steps; default { start: 1000, decay: 0.12, floor: 5 }. Margin at
 *   least 1, default 4.
 * - arcface (Deng et al. 2019): psi = cos(theta + margin), margin in radians, default 0.5.
 * - cosface (Wang et al. 2018): psi = cos(theta) - margin, default 0.35.
 * - combined (ArcFace's Equation 4): psi = cos(m1 theta + m2) - m3, by default 1, 0 and 0.
 * - euclidean-margin, our reading of "Making Faces More Separable", of which only the abstract is
 *   public to us: with d_j = 2 - 2 cos(theta_j), the squared distance of the normalised vectors, the
 *   mean of max(0, margin + d_y - d_j) over the classes j other than y where it is above 0 (one that
 *   is exactly 0 does not count), plus pull d_y. Defaults 0.4 and 0.5; it has no scale, and
 *   `gradient` and `beyondPi` mean nothing to it.
 *
 * `scale` is 64 by default.
 */
export type BaseLoss =
  | { kind: 'softmax' }
  | { kind: 'a-softmax'; margin?: number; lambda?: number | LambdaAnnealing }
  | { kind: 'arcface'; scale?: number; margin?: number }
  | { kind: 'cosface'; scale?: number; margin?: number }
  | { kind: 'combined'; scale?: number; m1?: number; m2?: number; m3?: number }
  | { kind: 'euclidean-margin'; margin?: number; pull?: number };

/**
 * Weighting by the loss itself.
 *
 * - hard-mining, the paper's: HM = alpha L / (1 + exp(-A (beta L - B))) (form 'equation', its
 *   Equation 2), or beta times that ('algorithm', its Algorithm 1). Reduction 'sample' weights every
 *   sample, 'batch' the mean of the batch. Defaults: alpha 1.5, beta 1.1, A 35, B 0.75 (the paper's),
 *   'equation', 'sample'.
 * - knot-magnify (Rao et al.): KM = L / (gamma p + 1)^2 with p = exp(-L), sample by sample. `gamma`,
 *   0 (no weighting) to 1e6, has no default: its authors name none.
 */
export type Weighting =
  | {
      kind: 'hard-mining';
      alpha?: number;
      beta?: number;
      A?: number;
      B?: number;
      form?: 'equation' | 'algorithm';
      reduction?: 'sample' | 'batch';
    }
  | { kind: 'knot-magnify'; gamma: number }
  | { kind: 'none' };

/**
 * Center loss (Wen et al. 2016): weight / (2 N) sum_i |x_i - c_y|^2 on raw embeddings is added to the
 * mean weighted loss. The centers c start at 0; every step moves that of class j by
 * -rate sum_i (c_j - x_i) / (1 + n) over its n rows of the batch. Defaults: weight 0.003, rate 0.5.
 */
export interface CenterLoss {
  weight?: number;
  /** 0 to 1. */
  rate?: number;
}

export interface LossSettings {
  base: BaseLoss;
  /** Left out: none. */
  weighting?: Weighting;
  /** Left out: none. */
  center?: CenterLoss;
  /** d psi / d cos as it is ('exact', the default), or taken as 1 ('detached', as arcface_torch does). */
  gradient?: 'exact' | 'detached';
  /**
   * With phi = m1 theta + m2 and k = floor(phi / pi): psi = (-1)^k cos(phi) - 2k - m3, monotone and
   * continuous ('mirror', the default), or the formula as printed ('none'; not for a-softmax).
   */
  beyondPi?: 'mirror' | 'none';
}

const scale = z.number().positive().max(1000).default(64);
const annealing = z.strictObject({
  start: z.number().min(0),
  decay: z.number().min(0),
  floor: z.number().min(0),
});

/** Ranges: a margin outside them would make the target greater than the others or pass -1 by more than one turn. */
const baseSchemas = {
  softmax: z.strictObject({ kind: z.literal('softmax') }),
  'a-softmax': z.strictObject({
    kind: z.literal('a-softmax'),
    margin: z.number().min(1).max(16).default(4),
    // SphereFace's schedule, as evoLVe has it.
    lambda: z
      .union(
        [z.number().min(0), annealing],
        'expected a number of at least 0 or { start, decay, floor }',
      )
      .default({ start: 1000, decay: 0.12, floor: 5 }),
  }),
  arcface: z.strictObject({
    kind: z.literal('arcface'),
    scale,
    margin: z.number().min(0).max(Math.PI).default(0.5),
  }),
  cosface: z.strictObject({
    kind: z.literal('cosface'),
    scale,
    margin: z.number().min(0).max(2).default(0.35),
  }),
  combined: z.strictObject({
    kind: z.literal('combined'),
    scale,
    m1: z.number().positive().max(16).default(1),
    m2: z.number().min(0).max(Math.PI).default(0),
    m3: z.number().min(0).max(2).default(0),
  }),
  'euclidean-margin': z.strictObject({
    kind: z.literal('euclidean-margin'),
    // Squared distances of unit vectors end at 4.
    margin: z.number().min(0).max(4).default(0.4),
    pull: z.number().min(0).max(1000).default(0.5),
  }),
};

const hardMiningSchema = z.strictObject({
  kind: z.literal('hard-mining'),
  alpha: z.number().positive().default(1.5),
  beta: z.number().positive().default(1.1),
  A: z.number().positive().default(35),
  B: z.number().positive().default(0.75),
  form: z.enum(['equation', 'algorithm']).default('equation'),
  reduction: z.enum(['sample', 'batch']).default('sample'),
});
const weightingSchemas = {
  'hard-mining': hardMiningSchema,
  'knot-magnify': z.strictObject({
    kind: z.literal('knot-magnify'),
    // At 1e6 a sample of p = 1 keeps 1e-12 of its loss.
    gamma: z.number().min(0).max(1e6),
  }),
  none: z.strictObject({ kind: z.literal('none') }),
};

const centerSchema = z.strictObject({
  weight: z.number().positive().default(0.003),
  rate: z.number().min(0).max(1).default(0.5),
});

const settingsSchema = z.strictObject({
  base: z.unknown().optional(),
  weighting: z.unknown().optional(),
  center: z.unknown().optional(),
  gradient: z.enum(['exact', 'detached']).default('exact'),
  beyondPi: z.enum(['mirror', 'none']).default('mirror'),
});

/**
 * Checks a loss and fills in its defaults. `native.lambda` is that of the first step.
 *
 * @throws HardmineError ERR_CONFIG naming the setting that is wrong; for an unknown one the nearest.
 */
export function resolveLoss(settings: LossSettings): {
  native: NativeLoss;
  annealing: LambdaAnnealing;
} {
  const { gradient, beyondPi, ...parts } = check(settingsSchema, settings, 'loss');
  const base = checkKind(baseSchemas, parts.base, 'loss.base');
  const weighting = resolveWeighting((parts.weighting ?? { kind: 'none' }) as Weighting);
  const native: NativeLoss = {
    base: base.kind === 'softmax' || base.kind === 'euclidean-margin' ? base.kind : 'margin',
    m1: 1,
    m2: 0,
    m3: 0,
    scale: 'scale' in base ? base.scale : 1,
    normScale: false,
    lambda: 0,
    mirror: beyondPi === 'mirror',
    detached: gradient === 'detached',
    euclidean: { margin: 0, pull: 0 },
    weighting,
    center:
      parts.center === undefined
        ? { weight: 0, rate: 0 }
        : check(centerSchema, parts.center, 'loss.center'),
  };
  let lambda: LambdaAnnealing = { start: 0, decay: 0, floor: 0 };
  switch (base.kind) {
    case 'softmax':
      break;
    case 'a-softmax':
      if (beyondPi === 'none') {
        throw new HardmineError(
          'ERR_CONFIG',
          'loss.beyondPi is "none", which a-softmax cannot use because its angle always passes pi: leave it at "mirror".',
        );
      }
      if (typeof base.lambda === 'number') {
        lambda = { start: base.lambda, decay: 0, floor: base.lambda };
      } else {
        lambda = base.lambda;
      }
      native.m1 = base.margin;
      native.normScale = true;
      native.lambda = lambdaAt(lambda, 0);
      break;
    case 'arcface':
      native.m2 = base.margin;
      break;
    case 'cosface':
      native.m3 = base.margin;
      break;
    case 'combined':
      native.m1 = base.m1;
      native.m2 = base.m2;
      native.m3 = base.m3;
      break;
    case 'euclidean-margin':
      native.euclidean = { margin: base.margin, pull: base.pull };
      break;
  }
  return { native, annealing: lambda };
}

/** Checks a weighting and fills in its defaults. @throws HardmineError ERR_CONFIG, as resolveLoss. */
export function resolveWeighting(weighting: Weighting): NativeWeighting {
  const resolved = checkKind(weightingSchemas, weighting, 'weighting');
  return { ...hardMiningSchema.parse({ kind: 'hard-mining' }), gamma: 0, ...resolved };
}

/** A-Softmax's lambda at a step, counted from 0. */
export function lambdaAt({ start, decay, floor }: LambdaAnnealing, step: number): number {
  return Math.max(floor, start / (1 + decay * step));
}

/**
 * The mean base loss to expect of the first step, when embeddings and class weights have nothing to
 * do with each other: cosines are then normal around 0 with variance 1 / dim, so it is about
 * ln(classes) + s^2 / (2 dim) - s psi(pi / 2); for ArcFace the last term is + s sin(margin). Where logits
 * spread further than sqrt(2 ln(classes)), the largest of them is all that counts, and the first two terms
 * are s sqrt(2 ln(classes) / dim) (Derrida's random energy model, 1981). A trainer that starts far from it
 * has an error in its data or settings. The Euclidean margin loss, all of whose distances are about 2,
 * starts at about margin + 2 pull.
 *
 * @param embeddingNorm mean norm of the embeddings, which is A-Softmax's scale; by default that which
 *   a batch-norm over the embedding gives.
 */
export function expectedFirstLoss(
  loss: NativeLoss,
  classes: number,
  dim: number,
  embeddingNorm = Math.sqrt(dim),
): number {
  if (loss.base === 'softmax') return Math.log(classes);
  if (loss.base === 'euclidean-margin') return loss.euclidean.margin + 2 * loss.euclidean.pull;
  const s = cosineWeight(loss, embeddingNorm);
  const spread = s / Math.sqrt(dim);
  const widest = Math.sqrt(2 * Math.log(classes));
  const others = spread < widest ? (widest ** 2 + spread ** 2) / 2 : spread * widest;
  return others - s * targetCosine(loss, Math.PI / 2);
}

/**
 * What a change of the target's cosine is multiplied by in the base loss of the first step, up to the
 * slope of the margin.
 */
export function cosineWeight(loss: NativeLoss, embeddingNorm: number): number {
  // All hinges and pull d_y move with d_y = 2 - 2 cos.
  if (loss.base === 'euclidean-margin') return 2 * (1 + loss.euclidean.pull);
  return loss.normScale ? embeddingNorm : loss.scale;
}

/**
 * Where a margin loss rests when all embeddings and all class weights have collapsed into one
 * direction: every cosine is 1, so it is ln(classes - 1) + s (1 - psi(0)); for ArcFace psi(0) is
 * cos(margin). The Euclidean margin loss, all distances 0, rests at its margin. Null for softmax,
 * which has no such plateau.
 */
export function plateauLoss(loss: NativeLoss, classes: number): number | null {
  if (loss.base === 'softmax') return null;
  if (loss.base === 'euclidean-margin') return loss.euclidean.margin;
  // A-Softmax, whose scale is not known here, has no margin at an angle of 0.
  return Math.log(classes - 1) + loss.scale * (1 - targetCosine(loss, 0));
}

/** What stands in place of the target's cosine at an angle. */
function targetCosine({ m1, m2, m3, mirror, lambda }: NativeLoss, theta: number): number {
  const phi = m1 * theta + m2;
  const turns = mirror ? Math.floor(phi / Math.PI) : 0;
  const psi = (turns % 2 === 0 ? 1 : -1) * Math.cos(phi) - 2 * turns - m3;
  return (lambda * Math.cos(theta) + psi) / (1 + lambda);
}

/** Picks the schema that `kind` names and applies it. */
function checkKind<Schemas extends Record<string, z.ZodObject>>(
  schemas: Schemas,
  value: unknown,
  name: string,
): z.output<Schemas[keyof Schemas]> {
  const kind: unknown =
    value !== null && typeof value === 'object' ? Reflect.get(value, 'kind') : undefined;
  const kinds = Object.keys(schemas);
  if (typeof kind !== 'string' || !kinds.includes(kind)) {
    throw new HardmineError(
      'ERR_CONFIG',
      `${name}.kind is ${JSON.stringify(kind)}: expected ${kinds.map((known) => `"${known}"`).join(', ')}.`,
    );
  }
  return check(schemas[kind]!, value, name) as z.output<Schemas[keyof Schemas]>;
}

function check<Schema extends z.ZodObject>(
  schema: Schema,
  value: unknown,
  name: string,
): z.output<Schema> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0]!;
  if (issue.code === 'unrecognized_keys') {
    const key = issue.keys[0] ?? '';
    const suggestion = nearest(key, Object.keys(schema.shape));
    throw new HardmineError(
      'ERR_CONFIG',
      `${name} has an unknown key "${key}": the nearest known one is "${suggestion}".`,
    );
  }
  const path = [name, ...issue.path.map(String)].join('.');
  const found = issue.path.reduce<unknown>(
    (object, key) => (object as Record<PropertyKey, unknown>)[key],
    value,
  );
  throw new HardmineError(
    'ERR_CONFIG',
    `${path} is ${typeof found === 'number' ? found : JSON.stringify(found)}: ${issue.message.replace(/^Invalid (input|option): /, '')}.`,
  );
}
