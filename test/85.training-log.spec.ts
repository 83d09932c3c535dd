// The progress of a run on a terminal: what of it a terminal of some width shows.
import assert from 'node:assert/strict';
import { TrainingLog } from '../src/cli/training-log.js';
import type { TrainingPlan } from '../src/trainer.js';

const PLAN: TrainingPlan = {
  images: 320,
  identities: 10,
  heldOutImages: 20,
  stepsPerEpoch: 10,
  totalSteps: 200,
  backend: 'cpu',
  device: 'a CPU',
  precision: 'fp32',
  threads: 2,
};

/** What `log` writes to stderr, were that a terminal of `columns`. */
function onTerminal(columns: number, use: (log: TrainingLog) => void): string {
  const { stderr } = process;
  const before = ['isTTY', 'columns', 'write'].map(
    (name) => [name, Object.getOwnPropertyDescriptor(stderr, name)] as const,
  );
  let written = '';
  const write = (text: string): boolean => {
    written += text;
    return true;
  };
  for (const [name, value] of Object.entries({ isTTY: true, columns, write })) {
    Object.defineProperty(stderr, name, { value, configurable: true, writable: true });
  }
  try {
    use(new TrainingLog());
  } finally {
    for (const [name, descriptor] of before) {
      if (descriptor) Object.defineProperty(stderr, name, descriptor);
      else Reflect.deleteProperty(stderr, name);
    }
  }
  return written;
}

/** The last state of the bar, after steps that were told at these times in seconds. */
function lastBar(columns: number, imagesPerSecond: number, ...steps: [number, number?][]): string {
  const written = onTerminal(columns, (log) => {
    log.start(PLAN, 0, 'run/report.html');
    for (const [step, time = 0] of steps) {
      log.event({
        type: 'step',
        step,
        epoch: Math.ceil(step / PLAN.stepsPerEpoch),
        loss: 22.58,
        baseLoss: 15.053,
        accuracy: 0.4375,
        silenced: 0,
        kept: 0,
        amplified: 1,
        lr: 0.05,
        imagesPerSecond,
        time,
        meanCosine: 0,
        embeddingNorm: 1,
        marginFactor: 1,
        lambda: 0,
      });
    }
    log.end();
  });
  assert.ok(written.includes('\nreport: run/report.html\n'));
  const bars = written.match(/epoch \d+ \|[^\p{Cc}]*/gu);
  assert.ok(bars, written);
  return bars.at(-1)!;
}

describe('the progress bar', () => {
  it('fits into 80 columns, with hours to go too', () => {
    assert.equal(
      lastBar(80, 46, [100]),
      'epoch 10 |███░░░| 50% | 1:10 left | loss 15.053 | accuracy 43.75% | 46 img/s',
    );
    assert.ok(lastBar(80, 0.5, [100]).includes('| 1:46:40 left |'));
    assert.ok(lastBar(80, 0.5, [100]).length <= 80);
  });

  it('grows on a wide terminal, and keeps the time left in sight on a narrow one', () => {
    assert.match(lastBar(200, 46, [100]), /^epoch 10 \|█{12}░{12}\|/);
    assert.ok(lastBar(40, 46, [100]).slice(0, 40).includes('1:10 left'));
  });

  it('tells what is left by the whole run, not by its last steps', () => {
    // Resumed at step 40: 2 seconds a step since, however fast the last of them was.
    assert.ok(lastBar(80, 4000, [40, 700], [50, 720], [60, 740]).includes('| 4:40 left |'));
  });
});
