/** What a run writes for people and programs while it goes on, when it is stopped and at its end. */
import assert from 'node:assert/strict';
import { mkdir, mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ConfigInput } from '../src/config.js';
import { HardmineError } from '../src/errors.js';
import { loadAddon, type NativeStepStats } from '../src/native.js';
import { HardestSamples } from '../src/train/hardest.js';
import { readScores, readStatus } from '../src/train/run-files.js';
import { Trainer, type TrainerEvent } from '../src/trainer.js';
import { skip } from './helpers/skip.js';
import { drawFaces, runTraining, smallConfig } from './helpers/small-training.js';

const RELOADS = /http-equiv="refresh"/;

describe('the report of a run', function () {
  this.timeout(60_000); // seconds when alone; the suite may share its cores
  let folder: string;
  let data: string;
  const config = (name: string, more: Partial<ConfigInput> = {}): ConfigInput => ({
    ...smallConfig(data, join(folder, name)),
    validation: 'identities',
    epochs: 2,
    ...more,
  });
  const read = (name: string, file: string) => readFile(join(folder, name, file), 'utf8');
  const status = async (name: string) => (await readStatus(join(folder, name, 'status.json')))!;
  const scores = (name: string) => readScores(join(folder, name, 'scores-validation.json'));

  before(async function () {
    try {
      loadAddon('cpu');
    } catch (error) {
      return skip(this, (error as Error).message);
    }
    folder = await mkdtemp(join(tmpdir(), 'hardmine-run-report-'));
    data = await drawFaces(join(folder, 'faces'));
  });
  after(async () => {
    if (folder) await rm(folder, { recursive: true, force: true });
  });

  it('stands from the first steps on, reloads itself, and no more at the end', async () => {
    const trainer = await Trainer.create(config('run'));
    const during: string[] = [];
    const events: TrainerEvent[] = [];
    try {
      for await (const event of trainer.run()) {
        events.push(event);
        if (event.type !== 'checkpoint') continue;
        during.push(await read('run', 'report.html'));
        assert.equal((await status('run')).state, 'running');
      }
    } finally {
      await trainer.dispose();
    }
    assert.equal(during.length, 2);
    for (const page of during) {
      assert.match(page, RELOADS);
      assert.match(page, /Running: step \d+ of 20/);
    }
    const page = await read('run', 'report.html');
    assert.ok(!RELOADS.test(page));
    const { written, seconds, environment, summary, ...rest } = await status('run');
    assert.ok(Date.now() - Date.parse(written) < 60_000 && seconds > 0);
    assert.equal(environment['backend'], 'cpu');
    assert.match(summary, /80 images of 10 people \(16 more held out\), 2 epochs of 10 steps/);
    const validations = events.filter((event) => event.type === 'validation');
    assert.deepEqual(rest, {
      state: 'finished',
      step: 20,
      totalSteps: 20,
      epoch: 2,
      validations: validations.map(({ epoch, step, accuracy }) => ({ epoch, step, accuracy })),
    });

    // The best epoch's scores give its figures again; its pairs and samples are there as pictures.
    const best = validations.filter((event) => event.best).at(-1)!;
    const saved = (await scores('run'))!;
    assert.equal(saved.model, `network of epoch ${best.epoch}`);
    assert.equal(saved.result.accuracy.mean, best.accuracy);
    assert.match(page, new RegExp(`<caption>${best.pairs} pairs of held-out people</caption>`));
    const [, hardest] = page.split('<h2>The pairs it finds hardest</h2>');
    const [pairs, samples] = hardest!.split('<h2>The training samples it finds hardest</h2>');
    const pictures = (html: string) => html.match(/<img src="data:image\/jpeg;base64,/g)!.length;
    assert.ok(pictures(pairs!) > 2 && pictures(pairs!) <= 24);
    // One a step of the last epoch; ten steps.
    assert.equal(pictures(samples!), 10);
    const steps = [...samples!.matchAll(/in step (\d+)/g)].map(([, step]) => Number(step));
    assert.deepEqual(
      steps.sort((a, b) => a - b),
      [11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    );
    const losses = [...samples!.matchAll(/base loss ([\d.]+)/g)].map(([, loss]) => Number(loss));
    assert.deepEqual(
      losses,
      [...losses].sort((a, b) => b - a),
      'worst first',
    );
    const epoch = events.filter((event) => event.type === 'epoch').at(-1)!;
    assert.ok(losses.at(-1)! > 0 && losses[0]! > epoch.baseLoss, 'above the mean');
    assert.ok(page.length < 400_000, `${page.length} bytes`);
  });

  it('of a run that is stopped says so; taken up again, it goes on with its curves', async () => {
    const first = await runTraining(
      config('stopped', { checkpointEvery: 5 }),
      (event) => event.type === 'step' && event.step >= 12,
    );
    assert.ok(first.error instanceof HardmineError && first.error.code === 'ERR_ABORTED');
    const stopped = await status('stopped');
    assert.equal(stopped.state, 'stopped');
    const page = await read('stopped', 'report.html');
    assert.ok(!RELOADS.test(page));
    assert.match(page, new RegExp(`Stopped at step ${stopped.step} of 20`));
    const before = (await scores('stopped'))!;

    let resumed = '';
    const trainer = await Trainer.create({ ...config('stopped'), resume: true });
    try {
      for await (const event of trainer.run()) {
        if (event.type === 'epoch') resumed = await read('stopped', 'report.html');
      }
    } finally {
      await trainer.dispose();
    }
    // What the first process judged is shown until the second has judged something.
    assert.match(resumed, new RegExp(`<th scope="row">${before.model}</th>`));
    assert.match(resumed, RELOADS);
    const end = await status('stopped');
    assert.equal(end.state, 'finished');
    assert.equal(end.validations.length, 2);
  });

  it('of a finished run is left alone; what is damaged stops no training', async () => {
    const done = config('done', { epochs: 1 });
    assert.ifError((await runTraining(done)).error);
    const written = (await stat(join(folder, 'done', 'report.html'))).mtimeMs;
    assert.ifError((await runTraining({ ...done, resume: true })).error);
    assert.equal((await stat(join(folder, 'done', 'report.html'))).mtimeMs, written);

    for (const file of ['status.json', 'scores-validation.json']) {
      await writeFile(join(folder, 'done', file), '{"state":');
    }
    await assert.rejects(status('done'), { code: 'ERR_DATA', message: /status\.json is not what/ });
    assert.ifError((await runTraining({ ...done, resume: true })).error);
    assert.equal((await status('done')).state, 'finished');
    assert.equal(await scores('done'), null);
  });

  it('that cannot be written is a warning while training goes on, and an error at its end', async () => {
    const trainer = await Trainer.create(config('blocked'));
    // A file cannot take the place of a folder.
    await mkdir(join(folder, 'blocked', 'report.html'), { recursive: true });
    const warnings: string[] = [];
    const reached: TrainerEvent['type'][] = [];
    const run = async (): Promise<void> => {
      for await (const event of trainer.run()) {
        reached.push(event.type);
        if (event.type === 'warning' && event.kind === 'report') warnings.push(event.message);
      }
    };
    try {
      await assert.rejects(run, { code: 'ERR_IO', message: /report\.html could not be written/ });
    } finally {
      await trainer.dispose();
    }
    assert.equal(reached.filter((type) => type === 'epoch').length, 2, 'training went on');
    assert.ok(warnings.length > 0 && warnings.length < 5, 'not at every step');
    assert.match(warnings[0]!, /the report falls behind: .*report\.html could not be written/);
  });
});

describe('the hardest samples of an epoch', () => {
  const stats = (...losses: [image: number, baseLoss: number][]): NativeStepStats[] =>
    losses.map(([image, baseLoss]) => ({
      ...{ loss: 1, baseLoss: 1, rows: 1, correct: 1, silenced: 0, kept: 1, amplified: 0 },
      ...{ meanCosine: 0, embeddingNorm: 1 },
      hardest: { image, baseLoss, gradientWeight: 1.5 },
    }));

  it('are the worst of its steps, each image once; a finished epoch is shown until the next is', () => {
    const samples = new HardestSamples();
    assert.equal(samples.worst, null);
    samples.add(stats([3, 1], [4, 9], [3, 5], [-1, 99]), 1, 1);
    const shown = () =>
      samples.worst!.samples.map(({ image, baseLoss, step }) => [image, baseLoss, step]);
    assert.deepEqual(shown(), [
      [4, 9, 2],
      [3, 5, 3],
    ]);
    samples.endEpoch();
    samples.add(stats([7, 100]), 5, 2);
    assert.equal(samples.worst!.epoch, 1);
    samples.endEpoch();
    assert.deepEqual(shown(), [[7, 100, 5]]);
    samples.add(stats(...Array.from({ length: 40 }, (_, i): [number, number] => [i, i])), 6, 3);
    samples.endEpoch();
    assert.deepEqual(
      samples.worst!.samples.map(({ image }) => image),
      [39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28],
    );
  });
});
