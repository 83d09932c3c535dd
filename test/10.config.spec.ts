import assert from 'node:assert/strict';
import { resolve } from 'node:path';
import { Command } from 'commander';
import { addConfigOptions, overlay } from '../src/cli/config-options.js';
import {
  changedOnResume,
  configHash,
  configSchema,
  kebab,
  lossSettings,
  resolveConfig,
} from '../src/config.js';
import { HardmineError } from '../src/errors.js';
import { resolveLoss } from '../src/loss.js';
import { learningRate, marginFactor, stepSettings, stepsPerCall } from '../src/train/schedule.js';

const MINIMUM = { data: 'faces', out: 'run' };

/** The message of the configuration error that an input causes. */
function complaint(input: unknown): string {
  try {
    resolveConfig(input);
  } catch (error) {
    assert(error instanceof HardmineError);
    assert.equal(error.code, 'ERR_CONFIG');
    assert.doesNotMatch(error.message, /\n/);
    return error.message;
  }
  return assert.fail(`${JSON.stringify(input)} was accepted`);
}

/** Options of `train` on a command line, as a partial configuration. */
function fromOptions(...argv: string[]): Record<string, unknown> {
  const command = new Command().exitOverride().configureOutput({ writeErr: () => undefined });
  const read = addConfigOptions(command);
  command.parse(argv, { from: 'user' });
  return read(command.opts());
}

describe('configuration', () => {
  it("has the paper's values and those of the contract as defaults", () => {
    assert.deepEqual(resolveConfig(MINIMUM), {
      data: resolve('faces'),
      out: resolve('run'),
      validation: 'identities',
      loss: 'arcface',
      scale: 64,
      margin: 0.5,
      marginWarmUp: 0,
      marginGradient: 'exact',
      beyondPi: 'mirror',
      weighting: {
        kind: 'hard-mining',
        alpha: 1.5,
        beta: 1.1,
        A: 35,
        B: 0.75,
        form: 'equation',
        reduction: 'sample',
      },
      network: 'resnet18',
      embedding: 512,
      embeddingNorm: 'batch',
      batch: 64,
      epochs: 20,
      lr: 0.01,
      milestones: [8, 12, 16],
      lrGamma: 0.1,
      momentum: 0.9,
      weightDecay: 5e-4,
      decayAll: false,
      augment: { flip: true, crop: 0 },
      seed: 1,
      deterministic: false,
      device: 'auto',
      threads: 0,
      validateEvery: 1,
      keep: 3,
      onBadRecord: 'fail',
      restarts: 0,
      resume: false,
    });
  });

  it('gives each loss its own margin, and none what it does not have', () => {
    assert.equal(resolveConfig({ ...MINIMUM, loss: 'cosface' }).margin, 0.35);
    const aSoftmax = resolveConfig({ ...MINIMUM, loss: 'a-softmax' });
    assert.equal(aSoftmax.margin, 4);
    assert.deepEqual(aSoftmax.lambda, { start: 1000, decay: 0.12, floor: 5 });
    const softmax = resolveConfig({ ...MINIMUM, loss: 'softmax' });
    for (const key of ['scale', 'margin', 'm1', 'lambda', 'beyondPi'] as const) {
      assert(!(key in softmax), key);
    }
    assert.match(complaint({ ...MINIMUM, loss: 'softmax', scale: 30 }), /"scale".*softmax/);
    assert.match(complaint({ ...MINIMUM, m1: 2 }), /"m1".*arcface.*combined/);
    assert.match(complaint({ ...MINIMUM, loss: 'a-softmax', beyondPi: 'none' }), /mirror/);
  });

  it('knows the range of each loss, and numbers that are none', () => {
    assert.match(complaint({ ...MINIMUM, margin: 4 }), /margin is 4: .*<=3\.14/);
    assert.match(complaint({ ...MINIMUM, loss: 'a-softmax', margin: 0.5 }), /margin is 0\.5/);
    for (const lr of [Number.NaN, Number.POSITIVE_INFINITY]) {
      assert.match(complaint({ ...MINIMUM, lr }), new RegExp(`"lr" is ${lr}:`));
    }
  });

  it('takes shorthands for nested settings', () => {
    assert.deepEqual(resolveConfig({ ...MINIMUM, weighting: 'none' }).weighting, { kind: 'none' });
    const { lambda } = resolveConfig({ ...MINIMUM, loss: 'a-softmax', lambda: 3 });
    assert.deepEqual(lambda, { start: 3, decay: 0, floor: 3 });
    const partly = resolveConfig({ ...MINIMUM, loss: 'a-softmax', lambda: { floor: 7 } });
    assert.deepEqual(partly.lambda, { start: 1000, decay: 0.12, floor: 7 });
    const weighting = { kind: 'none', alpha: 2 };
    assert.match(complaint({ ...MINIMUM, weighting }), /weighting\.alpha.*none/);
  });

  it('has Knot Magnify with its gamma, which has no default', () => {
    const knot = { kind: 'knot-magnify', gamma: 2 };
    assert.deepEqual(resolveConfig({ ...MINIMUM, weighting: knot }).weighting, knot);
    assert.match(
      complaint({ ...MINIMUM, weighting: 'knot-magnify' }),
      /lacks "weighting\.gamma".*--gamma/,
    );
    const strangers: [object, RegExp][] = [
      [{ ...knot, alpha: 2 }, /weighting\.alpha.*knot-magnify: remove it or choose hard-mining/],
      [
        { ...knot, reduction: 'batch' },
        /weighting\.reduction.*knot-magnify: remove it or choose hard-mining/,
      ],
      [{ gamma: 2 }, /weighting\.gamma.*hard-mining: remove it or choose knot-magnify/],
      [{ kind: 'none', gamma: 2 }, /weighting\.gamma.*none: remove it or choose knot-magnify/],
      [{ ...knot, gamma: -1 }, /"weighting\.gamma" is -1/],
    ];
    for (const [weighting, pattern] of strangers) {
      assert.match(complaint({ ...MINIMUM, weighting }), pattern);
    }
  });

  it('has a center loss where one of its settings is given', () => {
    assert.equal('center' in resolveConfig(MINIMUM), false);
    const center = (given: object) => resolveConfig({ ...MINIMUM, center: given }).center;
    assert.deepEqual(center({}), { weight: 0.003, rate: 0.5 });
    assert.deepEqual(center({ rate: 1 }), { weight: 0.003, rate: 1 });
    assert.match(complaint({ ...MINIMUM, center: { weight: 0 } }), /"center\.weight" is 0/);
    assert.match(complaint({ ...MINIMUM, center: { wight: 1 } }), /"center\.wight".*"weight"/);
  });

  it('has the Euclidean margin without what only angles have', () => {
    const base = { ...MINIMUM, loss: 'euclidean-margin' };
    const config = resolveConfig(base);
    assert.deepEqual([config.margin, config.pull, config.marginWarmUp], [0.4, 0.5, 0]);
    for (const [key, value] of [
      ['scale', 64],
      ['marginGradient', 'exact'],
      ['beyondPi', 'none'],
      ['lambda', 5],
      ['m2', 0.5],
    ] as const) {
      assert.equal(key in config, false);
      assert.match(
        complaint({ ...base, [key]: value }),
        new RegExp(`"${key}" has no meaning with the loss euclidean-margin`),
      );
    }
    assert.match(complaint({ ...MINIMUM, pull: 1 }), /"pull".*arcface.*euclidean-margin/);
  });

  it('names the nearest known key for one that it does not know', () => {
    assert.match(complaint({ ...MINIMUM, epoch: 3 }), /"epoch".*"epochs"/);
    assert.match(complaint({ ...MINIMUM, 'weight-decay': 0 }), /"weight-decay".*"weightDecay"/);
    assert.match(complaint({ ...MINIMUM, weighting: { alfa: 1 } }), /"weighting\.alfa".*"alpha"/);
    assert.match(complaint({ ...MINIMUM, augment: { flipp: true } }), /"augment\.flipp".*"flip"/);
    // An unknown key is told even where something else is missing too.
    assert.match(complaint({ dta: 'faces', out: 'run' }), /"dta".*"data"/);
  });

  it('refuses what is out of range or of another type, naming key and value', () => {
    assert.match(complaint({ out: 'run' }), /"data".*--data/);
    for (const [key, value] of [
      ['lr', 'fast'],
      ['lr', 0],
      ['lr', Number.NaN],
      ['lr', Number.POSITIVE_INFINITY],
      ['batch', 1],
      ['batch', 2.5],
      ['epochs', 0],
      ['momentum', 1],
      ['device', 'gpu'],
      ['device', 'cuda:'],
      ['precision', 'fp64'],
      ['loss', 'triplet'],
      ['milestones', '8,12'],
      ['decayAll', 'yes'],
      ['seed', -1],
    ] as const) {
      assert.match(complaint({ ...MINIMUM, [key]: value }), new RegExp(`"${key}"`));
    }
    assert.match(complaint({ ...MINIMUM, batch: 1 }), /"batch" is 1: expected >=2$/);
    assert.match(complaint({ ...MINIMUM, milestones: [8, 8] }), /ascend/);
    for (const input of [null, 3, 'text', []]) assert.match(complaint(input), /JSON object/);
  });

  it('asks for the images that a list of pairs is about', () => {
    assert.match(complaint({ ...MINIMUM, validation: 'pairs.txt' }), /"lfw"/);
    assert.match(complaint({ ...MINIMUM, lfwPairs: 'pairs.txt' }), /"lfw"/);
    assert.match(complaint({ ...MINIMUM, ytfSplits: 'splits.txt' }), /"ytf"/);
    const { validation } = resolveConfig({ ...MINIMUM, validation: 'pairs.txt', lfw: 'lfw' });
    assert.equal(validation, resolve('pairs.txt'));
  });

  it('becomes the loss that the backend takes', () => {
    const native = (input: object) =>
      resolveLoss(lossSettings(resolveConfig({ ...MINIMUM, ...input }))).native;
    const arcface = native({ margin: 0.3, scale: 30, marginGradient: 'detached' });
    assert.deepEqual(
      [arcface.base, arcface.m1, arcface.m2, arcface.m3, arcface.scale, arcface.detached],
      ['margin', 1, 0.3, 0, 30, true],
    );
    assert.equal(arcface.weighting.kind, 'hard-mining');
    assert.equal(native({ loss: 'softmax', weighting: 'none' }).weighting.kind, 'none');
    const combined = native({ loss: 'combined', m1: 1.5, m2: 0.3, m3: 0.2, beyondPi: 'none' });
    assert.deepEqual(
      [combined.m1, combined.m2, combined.m3, combined.mirror],
      [1.5, 0.3, 0.2, false],
    );
    const euclidean = native({
      loss: 'euclidean-margin',
      pull: 1,
      weighting: { kind: 'knot-magnify', gamma: 3 },
      center: { rate: 0.25 },
    });
    assert.equal(euclidean.base, 'euclidean-margin');
    assert.deepEqual(euclidean.euclidean, { margin: 0.4, pull: 1 });
    assert.deepEqual(euclidean.center, { weight: 0.003, rate: 0.25 });
    assert.deepEqual([euclidean.weighting.kind, euclidean.weighting.gamma], ['knot-magnify', 3]);
    assert.equal(arcface.center.weight, 0);
    const aSoftmax = native({ loss: 'a-softmax' });
    assert.deepEqual([aSoftmax.m1, aSoftmax.normScale, aSoftmax.lambda], [4, true, 1000]);
  });

  it('hashes the settings, not where things lie or how the work is done', () => {
    const base = resolveConfig(MINIMUM);
    const same = resolveConfig({
      ...MINIMUM,
      out: 'elsewhere',
      threads: 3,
      keep: 1,
      device: 'cpu',
    });
    assert.equal(configHash(same), configHash(base));
    assert.notEqual(configHash(resolveConfig({ ...MINIMUM, lr: 0.02 })), configHash(base));
    assert.notEqual(configHash(resolveConfig({ ...MINIMUM, epochs: 21 })), configHash(base));
  });

  it('knows which changes would make a resumed run another one', () => {
    const base = resolveConfig(MINIMUM);
    const changed = (input: object) =>
      changedOnResume(base, resolveConfig({ ...MINIMUM, ...input }));
    assert.equal(
      changed({
        epochs: 30,
        threads: 1,
        keep: 9,
        resume: true,
        out: 'moved',
        restarts: 2,
        onBadRecord: 'skip',
      }),
      null,
    );
    assert.equal(changed({ lr: 0.02 }), 'lr');
    assert.equal(changed({ weighting: { alpha: 2 } }), 'weighting');
    assert.equal(changed({ center: {} }), 'center');
    assert.equal(changed({ batch: 32 }), 'batch');
    assert.equal(changed({ augment: { crop: 2 } }), 'augment');
  });
});

describe('options of the command line', () => {
  it('are every key of the schema, in kebab-case', () => {
    const command = new Command();
    addConfigOptions(command);
    const flags = new Set(command.options.map(({ long }) => long));
    for (const key of Object.keys(configSchema.shape)) {
      if (key !== 'augment' && key !== 'center') assert(flags.has(`--${kebab(key)}`), key);
    }
    for (const nested of [
      'alpha',
      'beta',
      'A',
      'B',
      'form',
      'reduction',
      'gamma',
      'flip',
      'crop',
    ]) {
      assert(flags.has(`--${nested}`), nested);
    }
    for (const nested of ['weight', 'rate']) assert(flags.has(`--center-${nested}`), nested);
  });

  it('give nothing that was not given', () => {
    assert.deepEqual(fromOptions(), {});
  });

  it('give what was given, typed', () => {
    assert.deepEqual(
      fromOptions(
        ...['--data', 'faces', '--lr', '1e-2', '--milestones', '5,7,10', '--decay-all'],
        ...['--no-flip', '--crop', '2', '--weighting', 'hard-mining', '--alpha', '2', '--A', '30'],
        ...['--lambda-floor', '3', '--no-deterministic', '--margin-warm-up', '3'],
      ),
      {
        data: 'faces',
        lr: 0.01,
        milestones: [5, 7, 10],
        decayAll: true,
        augment: { flip: false, crop: 2 },
        weighting: { kind: 'hard-mining', alpha: 2, A: 30 },
        lambda: { floor: 3 },
        deterministic: false,
        marginWarmUp: 3,
      },
    );
    assert.deepEqual(fromOptions('--lambda', '0'), { lambda: 0 });
    assert.deepEqual(fromOptions('--no-hard-mining'), { weighting: { kind: 'none' } });
    assert.deepEqual(fromOptions('--hard-mining'), { weighting: { kind: 'hard-mining' } });
    assert.deepEqual(fromOptions('--weighting', 'knot-magnify', '--gamma', '2'), {
      weighting: { kind: 'knot-magnify', gamma: 2 },
    });
    assert.deepEqual(
      fromOptions(
        ...['--loss', 'euclidean-margin', '--margin', '0.3', '--pull', '1'],
        ...['--center-weight', '0.01'],
      ),
      { loss: 'euclidean-margin', margin: 0.3, pull: 1, center: { weight: 0.01 } },
    );
  });

  it('refuse what is no number or none of the choices', () => {
    assert.throws(() => fromOptions('--lr', 'fast'), /--lr.*number/s);
    assert.throws(() => fromOptions('--loss', 'triplet'), /--loss.*arcface/s);
    assert.throws(() => fromOptions('--learning-rate', '1'), /unknown option/);
  });

  it('refuse two that contradict each other', () => {
    for (const [argv, pattern] of [
      [['--hard-mining', '--weighting', 'none'], /--hard-mining and --weighting none contradict/],
      [
        ['--weighting', 'knot-magnify', '--no-hard-mining'],
        /--no-hard-mining and --weighting knot/,
      ],
      [
        ['--lambda', '5', '--lambda-floor', '3'],
        /--lambda and the options --lambda-\.\.\. contradict/,
      ],
    ] as const) {
      assert.throws(() => fromOptions(...argv), { code: 'ERR_CONFIG', message: pattern });
    }
    const both = fromOptions('--hard-mining', '--weighting', 'hard-mining', '--alpha', '2');
    assert.deepEqual(both, { weighting: { kind: 'hard-mining', alpha: 2 } });
  });

  it('are laid over the file, nested settings one by one', () => {
    const file = { lr: 1, weighting: { alpha: 2, beta: 3 }, augment: { flip: false } };
    assert.deepEqual(overlay(file, { lr: 2, weighting: { beta: 4 }, augment: { crop: 1 } }), {
      lr: 2,
      weighting: { alpha: 2, beta: 4 },
      augment: { flip: false, crop: 1 },
    });
    // Parameters of hard mining mean nothing without it.
    assert.deepEqual(overlay(file, { weighting: { kind: 'none' } }).weighting, { kind: 'none' });
    assert.deepEqual(overlay({ weighting: 'hard-mining' }, { weighting: { alpha: 2 } }).weighting, {
      kind: 'hard-mining',
      alpha: 2,
    });
  });
});

describe('schedule', () => {
  const config = resolveConfig({ ...MINIMUM, marginWarmUp: 2 });

  it('counts epochs from 1: milestone 8 leaves epochs 1 to 8 at the first rate', () => {
    const rates = [1, 8, 9, 12, 13, 16, 17, 20].map((epoch) => learningRate(config, epoch));
    const expected = [0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5];
    for (const [i, rate] of rates.entries()) {
      // Powers of 0.1 are rounded: a few units in the last place.
      assert(Math.abs(rate / expected[i]! - 1) < 1e-15 * 8, `${rate}`);
    }
  });

  it('applies the rate of the epoch that a step is in', () => {
    assert.equal(stepSettings(config, 8 * 100 - 1, 100).lr, learningRate(config, 8));
    assert.equal(stepSettings(config, 8 * 100, 100).lr, learningRate(config, 9));
  });

  it('lets the margin grow step by step and then stay', () => {
    const factors = [0, 50, 100, 199, 200, 900].map((step) => marginFactor(config, step, 100));
    assert.deepEqual(factors, [0, 0.25, 0.5, 0.995, 1, 1]);
    assert.equal(marginFactor({}, 0, 100), 1);
  });

  it("lowers A-Softmax's lambda with the steps", () => {
    const aSoftmax = resolveConfig({ ...MINIMUM, loss: 'a-softmax' });
    assert.equal(stepSettings(aSoftmax, 0, 10).lambda, 1000);
    assert.equal(stepSettings(aSoftmax, 100, 10).lambda, 1000 / 13);
    assert.equal(stepSettings(aSoftmax, 1e6, 10).lambda, 5);
    assert.equal(stepSettings(config, 0, 10).lambda, 0);
  });

  it('makes a native call last about a quarter of a second and never cross a boundary', () => {
    assert.equal(stepsPerCall(null, 100), 1);
    assert.equal(stepsPerCall(50, 100), 5);
    assert.equal(stepsPerCall(1000, 100), 1);
    assert.equal(stepsPerCall(1, 100), 100);
    assert.equal(stepsPerCall(1, 7), 7);
  });
});
