import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { configHash } from '../src/config.js';
import { HardmineError } from '../src/errors.js';
import { renderExperiment } from '../src/report/experiment-report.js';
import { type Experiment, resolveExperiment, runConfig } from '../src/reproduce/experiment.js';
import { presets } from '../src/reproduce/presets.js';
import { summarise } from '../src/reproduce/results.js';
import {
  listRuns,
  type Outcome,
  type ReproduceEvent,
  type Run,
  reproduce,
} from '../src/reproduce/run.js';
import { markdown } from '../src/reproduce/tables.js';
import { drawFaces, writeLfw } from './helpers/small-training.js';

const PLACES = { data: 'faces.rec', lfw: 'lfw', ytf: 'ytf', cfp: 'cfp' };
const MINIMAL = {
  name: 'two losses',
  ...PLACES,
  evaluate: ['lfw'],
  seeds: [1, 2],
  config: { epochs: 2 },
  rows: [
    { name: 'CE', config: { loss: 'softmax', weighting: 'none' } },
    { name: 'HM-CE', config: { loss: 'softmax' }, against: 'CE' },
  ],
};

function refused(value: object, message: RegExp): void {
  assert.throws(
    () => resolveExperiment(value),
    (error) =>
      error instanceof HardmineError && error.code === 'ERR_CONFIG' && message.test(error.message),
    String(message),
  );
}

describe('an experiment', () => {
  it('names what is wrong with it', () => {
    const [base, mined] = MINIMAL.rows;
    refused({ ...MINIMAL, seed: [1] }, /unknown key "seed".*"seeds"/);
    refused({ ...MINIMAL, rows: [{ ...base, agianst: 'CE' }] }, /"rows\.0\.agianst".*"against"/);
    refused({ ...MINIMAL, rows: [] }, /"rows"/);
    refused({ ...MINIMAL, data: undefined }, /lacks "data": give it as --data or in its file/);
    refused({ ...MINIMAL, seeds: undefined }, /lacks "seeds": give it in its file/);
    refused({ ...MINIMAL, seeds: [1, 1] }, /\[1,1\]: name each once/);
    const { lfw: _, ...nowhere } = MINIMAL;
    refused(nowhere, /judged by lfw .* give it as --lfw, or name other sets/);
    refused({ ...MINIMAL, rows: [base, { ...mined, against: 'CD' }] }, /"CD".* nearest is "CE"/);
    refused({ ...MINIMAL, rows: [base, { ...base, name: 'ce' }] }, /"CE" and "ce" .*folder/);
    refused(
      { ...MINIMAL, rows: [base, { name: 'x', config: { loss: 'softmax', scale: 3 } }] },
      /in the row "x", .*"scale" has no meaning with the loss softmax/,
    );
    refused(
      { ...MINIMAL, rows: [base, { name: 'x', config: { loss: 'arcface', margin: 4 } }] },
      /in the row "x", .*margin is 4/,
    );
    refused({ ...MINIMAL, config: { seed: 4 } }, /"seed", which the experiment sets itself/);
    refused({ ...MINIMAL, rows: [{ ...base, name: '../x' }] }, /rows\.0\.name/);
  });

  it("changes a row's learning rate by its factor and leaves the rest", () => {
    const experiment = resolveExperiment({
      ...MINIMAL,
      config: { lr: 0.01 },
      rows: [
        ...MINIMAL.rows,
        { name: 'control', config: { loss: 'softmax', weighting: 'none' }, lrFactor: 1.65 },
      ],
    });
    const [base, , control] = experiment.rows.map((row) => runConfig(experiment, row, 7, 'out'));
    assert.equal(control!.lr, 0.0165);
    assert.deepEqual({ ...control!, lr: 0.01 }, base);
    assert.equal(control!.seed, 7);
  });

  it('comes as presets with the rows of the paper, its figures and the controls that it lacks', () => {
    for (const [name, preset] of Object.entries(presets)) {
      const { rows, evaluate } = resolveExperiment({ ...PLACES, ...preset });
      assert.ok(evaluate.includes('lfw'), name);
      if (name === 'knot-magnify') continue;
      const configs = new Map(rows.map((row) => [row.name, row]));
      for (const base of ['CE', 'A-Softmax', 'ArcFace']) {
        assert.equal(configs.get(`HM-${base}`)!.against, base);
        assert.equal(configs.get(`${base}, lr x1.5`)!.lrFactor, 1.5);
        assert.deepEqual(configs.get(`HM-${base}, batch mean`)!.config['weighting'], {
          kind: 'hard-mining',
          reduction: 'batch',
        });
      }
    }
    const posters = resolveExperiment({ ...PLACES, ...presets['knot-magnify'] });
    const [plain, magnified, centered] = posters.rows.map((row) =>
      runConfig(posters, row, 1, 'out'),
    );
    assert.deepEqual(plain!.weighting, { kind: 'none' });
    assert.deepEqual(magnified!.weighting, { kind: 'knot-magnify', gamma: 2 });
    assert.deepEqual(
      [magnified!.center, centered!.center],
      [undefined, { weight: 0.003, rate: 0.5 }],
    );
    const published = (preset: string, row: string) =>
      resolveExperiment({ ...PLACES, ...presets[preset] }).rows.find(({ name }) => name === row)!
        .published.lfw;
    assert.equal(published('paper-casia', 'HM-ArcFace'), 0.979);
    assert.equal(published('paper-ms1m', 'HM-ArcFace'), 0.98);
    const { seeds, rows, ...rest } = resolveExperiment({ ...PLACES, ...presets['paper-casia'] });
    const { batch, lr, milestones, epochs } = runConfig(
      { seeds, rows, ...rest },
      rows[0]!,
      1,
      'out',
    );
    assert.deepEqual(
      { batch, lr, milestones, epochs },
      { batch: 64, lr: 0.01, milestones: [8, 12, 16], epochs: 20 },
    );
  });
});

describe('the result of an experiment', () => {
  const experiment = resolveExperiment(MINIMAL);
  const outcome = (decisions: string): Outcome => ({
    configHash: '',
    trainedOn: { images: 10, identities: 2, device: 'a CPU', precision: 'fp32' },
    seconds: 1,
    lastEpoch: { baseLoss: 2, accuracy: 0.5 },
    warnings: [],
    failure: null,
    measures: {
      lfw: {
        accuracy: [...decisions].filter((bit) => bit === '1').length / decisions.length,
        decisions,
      },
    },
  });
  /** `wrong` pairs of 40 wrong, from `first` on. */
  const decisions = (first: number, wrong: number) =>
    Array.from({ length: 40 }, (_, i) => (i >= first && i < first + wrong ? '0' : '1')).join('');
  const runs = (given: Record<string, (string | null)[]>): Run[] =>
    Object.entries(given).flatMap(([row, seeds]) =>
      seeds.map((bits, i) => ({
        row,
        seed: i + 1,
        folder: '',
        outcome: bits === null ? null : outcome(bits),
      })),
    );
  const comparison = (given: Record<string, (string | null)[]>) =>
    summarise(experiment, runs(given)).rows[1]!.figures.lfw?.comparison;

  it('has means and spreads over the seeds', () => {
    const { rows, finished } = summarise(
      experiment,
      runs({ CE: [decisions(0, 4), decisions(0, 8)], 'HM-CE': [decisions(0, 2), null] }),
    );
    assert.equal(finished, 3);
    const [base, mined] = rows.map(({ figures }) => figures.lfw!);
    assert.deepEqual(base!.perSeed, [0.9, 0.8]);
    assert.ok(Math.abs(base!.mean - 0.85) < 1e-12);
    // |0.9 - 0.8| / sqrt(2)
    assert.ok(Math.abs(base!.std! - 0.1 / Math.SQRT2) < 1e-12);
    assert.deepEqual([mined!.mean, mined!.std, mined!.seeds], [0.95, null, [1]]);
  });

  it('calls a row better only where all seeds and the pooled test say so', () => {
    // 6 and 4 pairs that this row alone has right, none that the other has: 2 / 2^10 = 0.002.
    const clear = comparison({
      CE: [decisions(0, 6), decisions(3, 4)],
      'HM-CE': [decisions(0, 0), decisions(0, 0)],
    })!;
    assert.deepEqual([clear.test.onlyFirst, clear.test.onlySecond], [10, 0]);
    assert.equal(clear.test.p, 2 / 2 ** 10);
    assert.equal(clear.verdict, 'better');
    // The other way round.
    const worse = comparison({
      CE: [decisions(0, 0), decisions(0, 0)],
      'HM-CE': [decisions(0, 6), decisions(3, 4)],
    })!;
    assert.equal(worse.verdict, 'worse');
    // Ten against one pair pooled is significant, but the second seed disagrees.
    const split = comparison({
      CE: [decisions(0, 10), decisions(0, 0)],
      'HM-CE': [decisions(0, 0), decisions(0, 1)],
    })!;
    assert.ok(split.test.distinguishable);
    assert.equal(split.verdict, 'not decided');
    // All seeds agree, but 2 against 0 is chance.
    const few = comparison({
      CE: [decisions(0, 1), decisions(0, 1)],
      'HM-CE': [decisions(0, 0), decisions(0, 0)],
    })!;
    assert.equal(few.verdict, 'not decided');
    // One seed decides nothing.
    const single = comparison({ CE: [decisions(0, 10)], 'HM-CE': [decisions(0, 0)] })!;
    assert.ok(single.test.distinguishable);
    assert.equal(single.verdict, 'not decided');
  });

  it('compares the seeds that both rows have', () => {
    const shared = comparison({
      CE: [null, decisions(0, 6)],
      'HM-CE': [decisions(0, 9), decisions(0, 0)],
    })!;
    assert.deepEqual(shared.differences, [1 - 34 / 40]);
    assert.equal(
      comparison({ CE: [null, decisions(0, 6)], 'HM-CE': [decisions(0, 9), null] }),
      null,
    );
  });

  it('is a report that escapes text from outside, with the curves of rows that are compared together', () => {
    const result = summarise(
      { ...experiment, note: '<script>alert(1)</script>', data: '/faces/<b>.rec' },
      runs({ CE: [decisions(0, 4)], 'HM-CE': [decisions(0, 2)] }),
    );
    const lines = [1, 2, 3].map((step) => ({
      step,
      epoch: 1,
      baseLoss: 4 / step,
      accuracy: step / 4,
    }));
    const metrics = new Map([
      ['CE', lines],
      ['HM-CE', lines.map((line) => ({ ...line, baseLoss: line.baseLoss / 2 }))],
    ]);
    const html = renderExperiment(result, metrics, 'today');
    assert.doesNotMatch(html, /<script|<b>/);
    assert.match(html, /&#60;script&#62;alert\(1\)/);
    assert.match(html, /<th scope="row">HM-CE<\/th><td>95\.00% \(one seed\)<\/td>/);
    // One family, whose base loss and accuracy are drawn with both rows.
    assert.equal(html.match(/<svg /g)?.length, 2);
    assert.match(html, /CE ends at 1\.33; HM-CE ends at 0\.667/);
    assert.equal(renderExperiment(result, metrics, 'today'), html);
  });

  it('is written as a table with the published figures beside ours', () => {
    const text = markdown(
      summarise(
        {
          ...experiment,
          publishedData: 'CASIA-WebFace',
          rows: [{ ...experiment.rows[0]!, published: { lfw: 0.9535 } }, experiment.rows[1]!],
        },
        runs({
          CE: [decisions(0, 6), decisions(3, 4)],
          'HM-CE': [decisions(0, 0), decisions(0, 0)],
        }),
      ),
    );
    assert.match(text, /published \(CASIA-WebFace\)/);
    assert.match(text, /\| CE \| 87\.50% ± 3\.54 \(85\.00%, 90\.00%\) \| 95\.35% \| {2}\|/);
    assert.match(
      text,
      /\| HM-CE \| 100\.00% ± 0\.00 .*\| CE \| \+15\.00, \+10\.00 \| 10 \/ 0 \| 0\.0020 \| better \|/,
    );
    assert.match(text, /10 images of 2 identities/);
  });
});

describe('running an experiment', function () {
  this.timeout(300_000); // a dozen small trainings, on a machine that may be shared
  let folder: string;
  let experiment: Experiment;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-reproduce-'));
    const data = await drawFaces(join(folder, 'faces.rec'));
    await writeLfw(data, join(folder, 'lfw'));
    experiment = resolveExperiment({
      ...MINIMAL,
      seeds: [1],
      data,
      lfw: join(folder, 'lfw'),
      config: {
        epochs: 1,
        batch: 8,
        embedding: 32,
        device: 'cpu',
        deterministic: true,
        threads: 1,
        validation: 'none',
      },
    });
  });
  after(() => rm(folder, { recursive: true, force: true }));

  async function runAll(
    out: string,
    stopAt: (event: ReproduceEvent) => boolean = () => false,
  ): Promise<{ runs: Run[]; trained: string[]; error: unknown }> {
    const runs = await listRuns(experiment, out);
    const controller = new AbortController();
    const trained: string[] = [];
    let error: unknown = null;
    try {
      for await (const event of reproduce(experiment, runs, out, { signal: controller.signal })) {
        if (event.type === 'run')
          trained.push(`${event.run.row} ${event.run.seed} from ${event.step}`);
        if (stopAt(event)) controller.abort();
      }
    } catch (caught) {
      error = caught;
    }
    return { runs, trained, error };
  }

  it('takes every row under the first seed before the second', async () => {
    const runs = await listRuns({ ...experiment, seeds: [3, 1] }, join(folder, 'none'));
    assert.deepEqual(
      runs.map(({ row, seed }) => `${row} ${seed}`),
      ['CE 3', 'HM-CE 3', 'CE 1', 'HM-CE 1'],
    );
  });

  it('stopped, goes on in the middle of a run to the same decisions', async () => {
    const whole = await runAll(join(folder, 'whole'));
    assert.equal(whole.error, null);
    assert.deepEqual(whole.trained, ['CE 1 from 0', 'HM-CE 1 from 0']);
    const out = join(folder, 'stopped');
    let running = '';
    const stopped = await runAll(out, (event) => {
      if (event.type === 'run') running = `${event.run.row} ${event.run.seed}`;
      return running === 'HM-CE 1' && event.type === 'training' && event.event.type === 'step';
    });
    assert.equal((stopped.error as HardmineError).code, 'ERR_ABORTED');
    const resumed = await runAll(out);
    assert.equal(resumed.error, null);
    const [middle, ...rest] = resumed.trained;
    assert.match(middle!, /^HM-CE 1 from ([1-9]|1[01])$/); // of 12 steps
    assert.deepEqual(rest, []);
    for (const [i, run] of resumed.runs.entries()) {
      assert.deepEqual(
        run.outcome!.measures,
        whole.runs[i]!.outcome!.measures,
        `${run.row} ${run.seed}`,
      );
      assert.equal(run.outcome!.measures.lfw!.decisions.length, 24);
    }
    // Finished: nothing is trained again, and checkpoints are gone.
    assert.deepEqual((await runAll(out)).trained, []);
    const [first] = resumed.runs;
    await assert.rejects(stat(join(first!.folder, 'checkpoints')));
    assert.ok((await stat(join(first!.folder, 'best.safetensors'))).size > 0);
  });

  it('refuses finished runs of other settings, and what is no outcome', async () => {
    const out = join(folder, 'changed');
    const runs = await listRuns(experiment, out);
    const [row] = experiment.rows;
    const run = { ...runs[0]!, outcome: null };
    const { folder: place } = run;
    const small: Experiment = { ...experiment, seeds: [1], rows: [row!] };
    const list = await listRuns(small, out);
    for await (const _ of reproduce(small, list, out)) {
      // to the end
    }
    assert.equal(list[0]!.outcome!.configHash, configHash(runConfig(small, row!, 1, place)));
    await assert.rejects(
      listRuns({ ...small, config: { ...small.config, lr: 0.5 } }, out),
      (error: HardmineError) => error.code === 'ERR_CONFIG' && /other settings/.test(error.message),
    );
    const file = join(place, 'outcome.json');
    await writeFile(
      file,
      (await readFile(file, 'utf8')).replace('"decisions":"', '"decisions":"x'),
    );
    await assert.rejects(listRuns(small, out), (error: HardmineError) => error.code === 'ERR_DATA');
  });

  it('records a run whose loss leaves the range of numbers and goes on with the next', async () => {
    const wild: Experiment = {
      ...experiment,
      seeds: [1],
      rows: [{ ...experiment.rows[0]!, lrFactor: 50_000 }, experiment.rows[1]!],
    };
    const out = join(folder, 'wild');
    const runs = await listRuns(wild, out);
    for await (const _ of reproduce(wild, runs, out)) {
      // to the end
    }
    assert.match(runs[0]!.outcome!.failure!, /NaN|infinit|finite/);
    assert.deepEqual(runs[0]!.outcome!.measures, {});
    assert.equal(runs[1]!.outcome!.failure, null);
    const { rows } = summarise(wild, await listRuns(wild, out));
    assert.equal(rows[0]!.figures.lfw, undefined);
    assert.match(rows[0]!.remarks.join(), /seed 1: /);
    assert.match(markdown(summarise(wild, runs)), /\| CE \| not finished \|/);
  });
});
