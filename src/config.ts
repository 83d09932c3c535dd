/**
 * The settings of a training run: one strict schema with the paper's values as defaults, from which
 * the command line's options are generated too.
 */
import { createHash } from 'node:crypto';
import { resolve } from 'node:path';
import { z } from 'zod';
import { HardmineError, nearest, oneLine, quote } from './errors.js';
import { type BaseLoss, type LossSettings, resolveLoss, type Weighting } from './loss.js';
import type { DeviceName } from './native.js';

/** A configuration file has one or two kilobytes; what is much larger is none. */
export const MAX_CONFIG_BYTES = 2 ** 20;

const positive = () => z.number().positive();
const count = () => z.int().min(1);

const weightingSchema = z.strictObject({
  kind: z
    .enum(['hard-mining', 'knot-magnify', 'none'])
    .default('hard-mining')
    .describe('weighting over the base loss'),
  alpha: positive().exactOptional().describe('hard mining: factor of the loss (1.5)'),
  beta: positive()
    .exactOptional()
    .describe('hard mining: factor of the loss inside the gate (1.1)'),
  A: positive().exactOptional().describe('hard mining: steepness of the gate (35)'),
  B: positive()
    .exactOptional()
    .describe('hard mining: the gate opens at a loss of B / beta (0.75)'),
  form: z
    .enum(['equation', 'algorithm'])
    .exactOptional()
    .describe("hard mining: the paper's Equation 2 (equation) or Algorithm 1, greater by beta"),
  reduction: z
    .enum(['sample', 'batch'])
    .exactOptional()
    .describe('hard mining of every sample (sample) or of the mean loss'),
  gamma: z
    .number()
    .min(0)
    .max(1e6)
    .exactOptional()
    .describe('Knot Magnify: strength, 0 is no weighting; needed'),
});

const centerSchema = z.strictObject({
  weight: positive()
    .exactOptional()
    .describe('center loss, off unless one of its settings is given: factor (0.003)'),
  rate: z
    .number()
    .min(0)
    .max(1)
    .exactOptional()
    .describe('center loss: how far a step moves the centers (0.5)'),
});

const lambdaSchema = z.strictObject({
  start: z.number().min(0).exactOptional().describe('A-Softmax: lambda at the first step (1000)'),
  decay: z
    .number()
    .min(0)
    .exactOptional()
    .describe('A-Softmax: lambda falls as 1 / (1 + decay step) (0.12)'),
  floor: z.number().min(0).exactOptional().describe('A-Softmax: least lambda (5)'),
});

const augmentSchema = z.strictObject({
  flip: z.boolean().default(true).describe('mirror half of the images'),
  crop: z.int().min(0).max(32).default(0).describe('shift images by up to this many pixels'),
});

/** Keys in the order in which `train --help` lists them. */
export const configSchema = z.strictObject({
  data: z.string().min(1).describe('training data: a folder of identities or a .rec file'),
  out: z.string().min(1).describe('run directory'),
  validation: z
    .string()
    .min(1)
    .default('identities')
    .describe(
      "what `best` is chosen on: held-out identities of `data` (identities: 5%, at most 200; more of few people with few images), a pairs file in LFW's format over the images of `lfw`, or none",
    ),
  lfw: z
    .string()
    .min(1)
    .exactOptional()
    .describe('folder of aligned LFW images, evaluated once at the end'),
  lfwPairs: z
    .string()
    .min(1)
    .exactOptional()
    .describe("LFW's pairs.txt (default: the one in `lfw`)"),
  ytf: z
    .string()
    .min(1)
    .exactOptional()
    .describe('folder of aligned YouTube Faces frames, evaluated once at the end'),
  ytfSplits: z
    .string()
    .min(1)
    .exactOptional()
    .describe("YouTube Faces' splits.txt (default: the one in `ytf`)"),

  loss: z
    .enum(['softmax', 'a-softmax', 'arcface', 'cosface', 'combined', 'euclidean-margin'])
    .default('arcface')
    .describe('base loss'),
  scale: positive().max(1000).exactOptional().describe('scale s of the logits (64)'),
  margin: z
    .number()
    .min(0)
    .max(16)
    .exactOptional()
    .describe('margin (arcface 0.5 radians, cosface 0.35, a-softmax 4, euclidean-margin 0.4)'),
  m1: z.number().min(1).max(16).exactOptional().describe('combined: factor of the angle (1)'),
  m2: z
    .number()
    .min(0)
    .max(Math.PI)
    .exactOptional()
    .describe('combined: added to the angle, radians (0)'),
  m3: z.number().min(0).max(2).exactOptional().describe('combined: taken from the cosine (0)'),
  pull: z
    .number()
    .min(0)
    .max(1000)
    .exactOptional()
    .describe('euclidean-margin: factor of the distance to the own class (0.5)'),
  lambda: lambdaSchema
    .exactOptional()
    .describe('A-Softmax annealing; a number holds lambda there')
    .meta({ optionPrefix: 'lambda-', shorthand: 'number' }),
  marginWarmUp: z
    .number()
    .min(0)
    .exactOptional()
    .describe('epochs over which the margin grows from 0 to its value (0)'),
  marginGradient: z
    .enum(['exact', 'detached'])
    .exactOptional()
    .describe('derivative of the margin: exact, or taken as 1 as arcface_torch does'),
  beyondPi: z
    .enum(['mirror', 'none'])
    .exactOptional()
    .describe('angle beyond pi: continued monotonely (mirror) or the formula as printed (none)'),
  weighting: weightingSchema
    .default({ kind: 'hard-mining' })
    .describe('weighting over the base loss')
    .meta({ optionPrefix: '', shorthand: 'kind' }),
  center: centerSchema
    .exactOptional()
    .describe('center loss beside the base loss')
    .meta({ optionPrefix: 'center-' }),

  network: z.enum(['resnet18']).default('resnet18').describe('architecture'),
  embedding: z.int().min(2).max(4096).default(512).describe('size of the embedding'),
  embeddingNorm: z
    .enum(['batch', 'none'])
    .default('batch')
    .describe('batch-norm over the embedding (batch), or the plain network'),

  batch: z.int().min(2).max(65536).default(64).describe('images a step'),
  epochs: count().max(1_000_000).default(20).describe('passes over the training images'),
  lr: positive().max(1000).default(0.01).describe('learning rate'),
  milestones: z
    .array(count())
    .default([8, 12, 16])
    .describe('epochs after which the learning rate is multiplied by lrGamma'),
  lrGamma: positive().max(1).default(0.1).describe('factor of the learning rate at a milestone'),
  momentum: z.number().min(0).lt(1).default(0.9).describe('momentum of SGD'),
  weightDecay: z.number().min(0).max(1).default(5e-4).describe('weight decay'),
  decayAll: z.boolean().default(false).describe('decay biases and batch-norm parameters too'),
  augment: augmentSchema
    .default({ flip: true, crop: 0 })
    .describe('augmentation')
    .meta({ optionPrefix: '' }),
  seed: z.int().min(0).default(1).describe('seed of weights, order and augmentation'),
  deterministic: z.boolean().default(false).describe('same device, threads and seed: same bits'),

  device: z
    .string()
    .regex(/^(auto|cpu|cuda(:\d{1,4})?)$/, 'must be auto, cpu, cuda or cuda:N')
    .default('auto')
    .describe('auto, cpu, cuda or cuda:N'),
  precision: z
    .enum(['fp32', 'bf16', 'fp16'])
    .exactOptional()
    .describe("number type of products and activations (default: the device's fastest)"),
  threads: z.int().min(0).max(1024).default(0).describe('CPU threads (0: physical cores)'),

  validateEvery: count().default(1).describe('epochs between validations'),
  checkpointEvery: count()
    .exactOptional()
    .describe('steps between checkpoints (default: once an epoch)'),
  keep: count().default(3).describe('checkpoints kept'),
  onBadRecord: z
    .enum(['fail', 'skip'])
    .default('fail')
    .describe(
      'a damaged image: stop (fail), or leave it out, say so and train on the next sound one (skip), for at most 0.1% of the images',
    ),
  restarts: z
    .int()
    .min(0)
    .max(1000)
    .default(0)
    .describe('times that `train` goes on by itself after a crash or the loss of its device'),
  resume: z.boolean().default(false).describe('go on from the newest sound checkpoint in `out`'),
});

type Parsed = z.output<typeof configSchema>;
export type LossKind = Parsed['loss'];

/** A weighting with all its parameters, or none. */
export type WeightingConfig =
  | {
      kind: 'hard-mining';
      alpha: number;
      beta: number;
      A: number;
      B: number;
      form: 'equation' | 'algorithm';
      reduction: 'sample' | 'batch';
    }
  | { kind: 'knot-magnify'; gamma: number }
  | { kind: 'none' };

/** A configuration with every default filled in; keys without a meaning for `loss` are absent. */
export type Config = Omit<Parsed, 'device' | 'weighting' | 'lambda' | 'center'> & {
  device: DeviceName;
  weighting: WeightingConfig;
  lambda?: { start: number; decay: number; floor: number };
  /** Absent: no center loss. */
  center?: { weight: number; rate: number };
};

/** What a user writes: every key but `data` and `out` may be left out. */
export type ConfigInput = Omit<z.input<typeof configSchema>, 'device' | 'weighting' | 'lambda'> & {
  device?: DeviceName;
  /** By its kind alone only where every parameter has a default: not knot-magnify. */
  weighting?: Exclude<WeightingConfig['kind'], 'knot-magnify'> | Weighting;
  lambda?: number | z.input<typeof lambdaSchema>;
};

/** Those whose margin is one of the angle. */
const ANGULAR_LOSSES: readonly LossKind[] = ['a-softmax', 'arcface', 'cosface', 'combined'];

const DEFAULT_MARGINS: Partial<Record<LossKind, number>> = {
  'a-softmax': 4,
  arcface: 0.5,
  cosface: 0.35,
  'euclidean-margin': 0.4,
};

/** Keys that mean something for some losses alone, with their defaults there. */
const LOSS_KEYS = {
  scale: { losses: ['arcface', 'cosface', 'combined'], value: () => 64 },
  margin: {
    losses: ['a-softmax', 'arcface', 'cosface', 'euclidean-margin'],
    value: (loss: LossKind) => DEFAULT_MARGINS[loss],
  },
  m1: { losses: ['combined'], value: () => 1 },
  m2: { losses: ['combined'], value: () => 0 },
  m3: { losses: ['combined'], value: () => 0 },
  pull: { losses: ['euclidean-margin'], value: () => 0.5 },
  // SphereFace's schedule, as evoLVe has it.
  lambda: { losses: ['a-softmax'], value: () => ({ start: 1000, decay: 0.12, floor: 5 }) },
  marginWarmUp: { losses: [...ANGULAR_LOSSES, 'euclidean-margin'], value: () => 0 },
  marginGradient: { losses: ANGULAR_LOSSES, value: () => 'exact' },
  beyondPi: { losses: ANGULAR_LOSSES, value: () => 'mirror' },
} satisfies Record<string, { losses: readonly LossKind[]; value: (loss: LossKind) => unknown }>;

/** The paper's constants. */
const HARD_MINING = {
  alpha: 1.5,
  beta: 1.1,
  A: 35,
  B: 0.75,
  form: 'equation',
  reduction: 'sample',
} as const;

/** Which parameters each weighting has. */
const WEIGHTING_KEYS: Record<WeightingConfig['kind'], readonly string[]> = {
  'hard-mining': Object.keys(HARD_MINING),
  'knot-magnify': ['gamma'],
  none: [],
};

/** Wen et al.'s. */
const CENTER = { weight: 0.003, rate: 0.5 } as const;

const PATH_KEYS = ['data', 'out', 'lfw', 'lfwPairs', 'ytf', 'ytfSplits'] as const;

/**
 * Keys that may differ between a run and its resumption: where things lie, how the work is done and
 * how long it goes on. All others would make one run out of two different ones.
 */
const FREE_ON_RESUME: ReadonlySet<keyof Config> = new Set<keyof Config>([
  'data', // compared by its content
  'out',
  'lfw',
  'lfwPairs',
  'ytf',
  'ytfSplits',
  'epochs',
  'device',
  'threads',
  'validateEvery',
  'checkpointEvery',
  'keep',
  'onBadRecord', // no batch is another until an image is left out
  'restarts',
  'resume',
]);

function configError(message: string): HardmineError {
  return new HardmineError('ERR_CONFIG', message);
}

function knownKeys(path: readonly PropertyKey[]): string[] {
  if (path[0] === 'weighting') return Object.keys(weightingSchema.shape);
  if (path[0] === 'lambda') return Object.keys(lambdaSchema.shape);
  if (path[0] === 'center') return Object.keys(centerSchema.shape);
  if (path[0] === 'augment') return Object.keys(augmentSchema.shape);
  return Object.keys(configSchema.shape);
}

/** Of a value that may be anything; a deep one would take JSON.stringify beyond the stack. */
function shortJson(value: unknown): string {
  if (typeof value === 'string') return quote(value);
  if (typeof value !== 'object' || value === null) return oneLine(String(value));
  return Array.isArray(value) ? `a list of ${value.length}` : 'an object';
}

function issueSentence(issue: z.core.$ZodIssue, found: unknown): string {
  if (issue.code === 'unrecognized_keys') {
    const key = issue.keys[0] ?? '';
    const shown = [...issue.path, key].map(String).join('.');
    const suggestion = nearest(key, knownKeys(issue.path));
    return `the configuration has an unknown key ${quote(shown)}: the nearest known one is "${suggestion}"`;
  }
  const name = issue.path.map(String).join('.');
  let value: unknown = found;
  for (const part of issue.path) {
    value = value !== null && typeof value === 'object' ? Reflect.get(value, part) : undefined;
  }
  if (value === undefined) return `the configuration lacks "${name}": give it as --${kebab(name)}`;
  const expectation = issue.message
    .replace(/^Invalid (input|option|string): /, '')
    .replace(/^Too (?:small|big): expected \w+ to be /, 'expected ');
  return `the configuration's "${name}" is ${shortJson(value)}: ${oneLine(expectation)}`;
}

/** camelCase to kebab-case; the single letters A and B stay as they are. */
export function kebab(name: string): string {
  return name.length === 1 ? name : name.replace(/[A-Z]/g, (c) => `-${c.toLowerCase()}`);
}

function expandShorthands(input: object): Record<string, unknown> {
  const expanded: Record<string, unknown> = Object.fromEntries(
    Object.entries(input).filter(([, value]) => value !== undefined),
  );
  const { weighting, lambda } = expanded;
  if (typeof weighting === 'string') expanded['weighting'] = { kind: weighting };
  if (typeof lambda === 'number') expanded['lambda'] = { start: lambda, decay: 0, floor: lambda };
  return expanded;
}

function resolveWeighting(weighting: Parsed['weighting']): WeightingConfig {
  const { kind, gamma, ...parameters } = weighting;
  const stranger = Object.keys(weighting).find(
    (key) => key !== 'kind' && !WEIGHTING_KEYS[kind].includes(key),
  );
  if (stranger !== undefined) {
    const its = stranger === 'gamma' ? 'knot-magnify' : 'hard-mining';
    throw configError(
      `the configuration's "weighting.${stranger}" has no meaning with the weighting ${kind}: remove it or choose ${its}`,
    );
  }
  if (kind === 'none') return { kind };
  if (kind === 'hard-mining') return { kind, ...HARD_MINING, ...parameters };
  if (gamma === undefined) {
    throw configError(
      'the configuration lacks "weighting.gamma", for which knot-magnify has no default: give it as --gamma, 0 for no weighting and more for more',
    );
  }
  return { kind, gamma };
}

/**
 * Checks a configuration and fills in every default. Relative paths are taken from the working
 * directory. Throws ERR_CONFIG with the first thing that is wrong; an unknown key is answered with
 * the nearest known one.
 */
export function resolveConfig(input: unknown): Config {
  if (input === null || typeof input !== 'object' || Array.isArray(input)) {
    throw configError('the configuration must be a JSON object of keys and values');
  }
  const expanded = expandShorthands(input);
  const result = configSchema.safeParse(expanded);
  if (!result.success) {
    // An unknown key is most often the cause of whatever else is missing.
    const { issues } = result.error;
    const issue = issues.find(({ code }) => code === 'unrecognized_keys') ?? issues[0]!;
    throw configError(issueSentence(issue, expanded));
  }
  const parsed = result.data;
  const filled: Record<string, unknown> = { ...parsed };
  for (const [key, { losses, value }] of Object.entries(LOSS_KEYS)) {
    if ((losses as readonly LossKind[]).includes(parsed.loss)) {
      filled[key] =
        key === 'lambda'
          ? { ...(value(parsed.loss) as object), ...parsed.lambda }
          : (filled[key] ?? value(parsed.loss));
    } else if (filled[key] !== undefined) {
      throw configError(
        `the configuration's "${key}" has no meaning with the loss ${parsed.loss}: remove it or choose ${losses.join(', ')}`,
      );
    }
  }
  if (parsed.loss === 'a-softmax' && filled['beyondPi'] === 'none') {
    throw configError(
      'the configuration\'s "beyondPi" is "none", which a-softmax cannot use because its angle always passes pi: leave it at mirror',
    );
  }
  for (const [i, milestone] of parsed.milestones.entries()) {
    if (i > 0 && milestone <= parsed.milestones[i - 1]!) {
      throw configError(
        `the configuration's "milestones" are ${oneLine(JSON.stringify(parsed.milestones))}: they must ascend`,
      );
    }
  }
  filled['weighting'] = resolveWeighting(parsed.weighting);
  if (parsed.center) filled['center'] = { ...CENTER, ...parsed.center };
  resolveLoss(lossSettings(filled as Config)); // ranges that differ from loss to loss
  for (const key of PATH_KEYS) {
    const path = parsed[key];
    if (path !== undefined) filled[key] = resolve(path);
  }
  if (parsed.validation !== 'identities' && parsed.validation !== 'none') {
    filled['validation'] = resolve(parsed.validation);
    if (parsed.lfw === undefined) {
      throw configError(
        `the configuration's "validation" is the pairs file ${oneLine(parsed.validation)}, whose images are those of "lfw": give it as --lfw, or choose identities or none`,
      );
    }
  }
  if (parsed.lfwPairs !== undefined && parsed.lfw === undefined) {
    throw configError(
      'the configuration has "lfwPairs" but lacks "lfw": give the folder of LFW images as --lfw',
    );
  }
  if (parsed.ytfSplits !== undefined && parsed.ytf === undefined) {
    throw configError(
      'the configuration has "ytfSplits" but lacks "ytf": give the folder of YouTube Faces as --ytf',
    );
  }
  return filled as Config;
}

/** The loss of a configuration, as MarginHead takes it. */
export function lossSettings(config: Config): LossSettings {
  // resolveConfig has left out the keys that the loss does not have.
  const { loss, scale, margin, m1, m2, m3, pull, lambda } = config;
  const parameters = { scale, margin, m1, m2, m3, pull, lambda };
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined);
  return {
    base: { kind: loss, ...Object.fromEntries(given) } as BaseLoss,
    weighting: config.weighting,
    ...(config.center && { center: config.center }),
    ...(config.marginGradient && { gradient: config.marginGradient }),
    ...(config.beyondPi && { beyondPi: config.beyondPi }),
  };
}

/** JSON with the keys of every object in order: equal settings give equal text. */
function canonicalJson(value: unknown): string {
  return JSON.stringify(value, (_key, item: unknown) =>
    item !== null && typeof item === 'object' && !Array.isArray(item)
      ? Object.fromEntries(Object.entries(item).sort(([a], [b]) => (a < b ? -1 : 1)))
      : item,
  );
}

/** SHA-256 (hexadecimal) of the settings that shape the result: no path, and nothing about how the work is done. */
export function configHash(config: Config): string {
  const shaping = Object.entries(config).filter(
    ([key]) => key === 'epochs' || !FREE_ON_RESUME.has(key as keyof Config),
  );
  return createHash('sha256')
    .update(canonicalJson(Object.fromEntries(shaping)))
    .digest('hex');
}

/** The first key whose change would make the resumed run another one, or null. */
export function changedOnResume(before: Config, now: Config): keyof Config | null {
  const keys = new Set([...Object.keys(before), ...Object.keys(now)]) as Set<keyof Config>;
  for (const key of keys) {
    if (!FREE_ON_RESUME.has(key) && canonicalJson(before[key]) !== canonicalJson(now[key])) {
      return key;
    }
  }
  return null;
}
