import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { verification } from '../src/evaluate/verification.js';
import { renderComparison } from '../src/report/comparison.js';
import { curve, type MetricsLine, orderedMetrics, trainingCharts } from '../src/report/curves.js';
import { MetricsHistory } from '../src/report/history.js';
import { type ReportData, renderReport, writeReport } from '../src/report/report.js';
import { drawChart, escapeText, niceRange, niceTicks, plainNumber } from '../src/report/svg.js';
import { comparedRun, HOSTILE, judged, metrics, reportData } from './helpers/report-data.js';

const bare = (lines: readonly MetricsLine[]): ReportData => ({
  title: 'bare',
  created: 'now',
  config: {},
  environment: {},
  metrics: lines,
  evaluations: [],
});

describe('report', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  it('is one file that asks for nothing, under a policy that allows nothing', async () => {
    const html = renderReport(await reportData());
    assert.ok(!html.includes('://'), 'an address of another place');
    assert.ok(!/@import|<script|<iframe|<object|<base/i.test(html));
    // Whatever is loaded at all is in the file itself.
    for (const [, url] of html.matchAll(/<[^>]*\s(?:src|href|clip-path)="([^"]*)"/g)) {
      assert.match(url!, /^(data:|url\(#)/);
    }
    const policy = /http-equiv="Content-Security-Policy" content="([^"]*)"/.exec(html)?.[1];
    const style = /<style>([\s\S]*?)<\/style>/.exec(html)?.[1];
    const hash = createHash('sha256').update(style!).digest('base64');
    assert.equal(
      policy,
      `default-src 'none'; style-src 'sha256-${hash}'; img-src data:; base-uri 'none'; form-action 'none'`,
    );
    assert.ok(html.indexOf(policy!) < html.indexOf('<style>'), 'the policy comes first');
    assert.ok(!/ style="/.test(html), 'the policy would block style attributes');
  });

  it('escapes every text from outside', async () => {
    const html = renderReport(await reportData());
    assert.ok(!html.includes('<img src=x'));
    assert.ok(!html.includes('"><'.concat('img')));
    const inert = html.split(escapeText(HOSTILE)).length - 1;
    // title twice, created, a setting and its key, the environment and its key, what was evaluated
    // twice, the model's name in the tables and charts, the face's caption and its alternative text
    assert.ok(inert >= 14, `${inert} escaped occurrences`);
  });

  it('shows the figures, tables and pictures it was given', async () => {
    const data = await reportData();
    const html = renderReport(data);
    const { accuracy } = data.evaluations[0]!.result;
    assert.ok(html.includes(`${(accuracy.mean * 100).toFixed(2)}%`));
    assert.equal(html.match(/<svg /g)?.length, 8); // five curves, histogram, ROC, DET
    assert.equal(html.match(/data:image\/jpeg;base64,/g)?.length, 6);
    assert.ok(html.includes('weighting.alpha'));
    assert.ok(html.includes('8, 12, 16'));
    assert.ok(html.includes('1 h 6 min'));
    // Everything that is not text says in words what it shows.
    assert.equal(html.match(/<img [^>]*alt="[^"]+"/g)?.length, html.match(/<img /g)?.length);
    assert.equal(html.match(/<svg [^>]*aria-labelledby="/g)?.length, 8);
    assert.equal(html.match(/<th>/g), null, 'a heading without its scope');
    const ids = [...html.matchAll(/ id="([^"]*)"/g)].map(([, id]) => id);
    assert.equal(new Set(ids).size, ids.length, 'an id stands twice');
  });

  it('says of a result that a coin might give that it may be guessed', async () => {
    const data = await reportData();
    const lead = (right: number): string => {
      const result = { ...judged(0), accuracy: { ...judged(0).accuracy, mean: right }, pairs: 860 };
      const html = renderReport({ ...data, evaluations: [{ name: 'model', result }] });
      return /<p class="lead">(.*?)<\/p>/.exec(html)![1]!;
    };
    assert.match(lead(0.5267), /^Right on 52\.67% .*\), which guessing may give too\.$/);
    assert.match(lead(0.6), /^Right on 60\.00% .*\)\.$/);
  });

  it('says whether two models on the same pairs can be told apart, and adds other pairs', async () => {
    const data = await reportData();
    const [model] = data.evaluations;
    const html = (others: number) =>
      renderReport({
        ...data,
        evaluations: [
          { name: 'good', result: judged(0) },
          { name: 'other', result: judged(others) },
        ],
        alsoEvaluated: [{ evaluatedOn: 'pairs of YTF', evaluations: [model!] }],
      });
    // 2 and 12 discordant pairs, all one way: exact p of 2 / 2^2 and 2 / 2^12.
    assert.match(html(2), /p = 0\.500, so these pairs cannot tell the two apart\)/);
    assert.match(html(12), /McNemar’s test: p &#60; 0\.001\)\./);
    assert.match(html(2), /<caption>pairs of YTF<\/caption>/);
    // Without other pairs there is nothing to pair.
    const bareHtml = renderReport(data);
    assert.ok(!bareHtml.includes('<caption>pairs of YTF'));
  });

  it('draws the detection error trade-off on normal quantiles', () => {
    const at = (value: number) => {
      const svg = drawChart({
        id: 'det',
        title: 't',
        description: 'd',
        width: 390,
        height: 290,
        x: { label: 'x', min: 0.01, max: 0.6, probit: true, ticks: [0.01] },
        y: { label: 'y', min: 0.01, max: 0.6, probit: true, ticks: [0.01] },
        series: [{ label: '', colour: 1, kind: 'dots', points: [[value, value]] }],
      });
      return Number(/cx="([\d.]+)"/.exec(svg)![1]);
    };
    // Quantiles of 0.01, 0.1, 0.5 and 0.6 as printed tables have them: -2.3263, -1.2816, 0, 0.2533.
    const [low, high] = [at(0.01), at(0.6)];
    for (const [share, quantile] of [
      [0.1, -1.2816],
      [0.5, 0],
    ] as const) {
      const expected = low + ((quantile + 2.3263) / (0.2533 + 2.3263)) * (high - low);
      // Coordinates are written to a hundredth of a pixel.
      assert.ok(Math.abs(at(share) - expected) < 0.03, `${share}: ${at(share)}, ${expected}`);
    }
    const perfect = verification({
      distances: [0.1, 3, 0.1, 3],
      same: [1, 0, 1, 0],
      fold: [0, 0, 1, 1],
    });
    const html = renderReport({ ...bare([]), evaluations: [{ name: 'm', result: perfect }] });
    assert.ok(!/NaN|Infinity/.test(html));
  });

  it('is the same bytes for the same data', async () => {
    assert.equal(renderReport(await reportData()), renderReport(await reportData()));
    const compared = () => renderComparison([comparedRun('a', 0), comparedRun('b', 2)], 'now');
    assert.equal(compared(), compared());
  });

  it('reloads itself while the run goes on, and says how far it is; not at its end', async () => {
    const data = await reportData();
    const running = renderReport(data);
    assert.match(running, /<meta http-equiv="refresh" content="30">/);
    assert.match(running, /Running: step 300 of 1,200 \(25%\) as of .*reloads itself/);
    assert.match(running, /<progress max="1200" value="300"/);
    const stopped = renderReport({
      ...data,
      progress: { running: false, step: 300, totalSteps: 1200 },
    });
    assert.match(stopped, /Stopped at step 300 of 1,200 \(25%\)\. .*--resume/);
    const { progress: _, ...rest } = data;
    const finished = renderReport(rest);
    for (const html of [stopped, finished]) assert.ok(!html.includes('http-equiv="refresh"'));
    assert.ok(!finished.includes('<progress'));
  });

  it('shows the hardest training samples with what the gate did to them', async () => {
    const html = renderReport(await reportData());
    const [, section] = html.split('<h2>The training samples it finds hardest</h2>');
    const cards = section!.match(/<li class="pair">.*?<\/li>/g)!;
    assert.match(cards[0]!, /base loss 21\.13.*amplified × 1\.50.*in step 290/);
    assert.match(cards[1]!, /no picture.*Cid.*base loss 0\.5<.*silenced × 0\.04/);
    assert.match(cards[2]!, /kept × 0\.99/);
    assert.equal(cards.length, 3);
    assert.match(section!, /epoch 3/);
  });

  it('compares runs: paired test on the same pairs, settings that differ, curves of each', () => {
    const runs = [
      comparedRun('plain', 12),
      comparedRun('mined', 0, { margin: 0.5 }),
      {
        ...comparedRun('other pairs', 0),
        results: [{ ...comparedRun('', 0).results[0]!, list: 'two' }],
      },
    ];
    const html = renderComparison(runs, 'now');
    const table = (caption: string) =>
      html.split('<table>').find((part) => part.includes(`<caption>${caption}`))!;
    const paired = table('Against plain, pair by pair');
    // 12 pairs of 60, all one way: exact p of 2 / 2^12.
    assert.match(
      paired,
      /mined<\/th><td>\+20\.00<\/td><td>12<\/td><td>0<\/td><td>0\.0005 \(exact\)<\/td><td>better</,
    );
    assert.ok(!paired.includes('other pairs'), 'another list is not paired');
    assert.equal(html.match(/<caption>60 pairs of lfw<\/caption>/g)?.length, 2);
    const settings = html.split('<h2>What was set otherwise</h2>')[1]!.split('</table>')[0]!;
    assert.match(settings, /margin<\/th><td>–<\/td><td>0\.5<\/td><td>–<\/td>/);
    assert.ok(!settings.includes('scale'), 'what is equal is left out');
    assert.equal(html.match(/<svg /g)?.length, 2 * 2 + 4); // ROC and DET of two lists, four curves
    const ids = [...html.matchAll(/ id="([^"]*)"/g)].map(([, id]) => id);
    assert.equal(new Set(ids).size, ids.length, 'an id stands twice');
    assert.equal(html.match(/<th>/g), null, 'a heading without its scope');
    assert.match(
      table('The runs'),
      /plain<\/th><td>300 of 1,200<\/td><td>1 min 15 s<.*<td>75\.00%</,
    );
    const hostile = renderComparison([comparedRun(HOSTILE, 0), comparedRun('b', 1)], HOSTILE);
    assert.ok(!hostile.includes('<img src=x') && !/<script/.test(hostile));
  });

  it('compares one run, and more than a chart has colours for', () => {
    const alone = renderComparison([comparedRun('alone', 3)], 'now');
    assert.ok(!alone.includes('McNemar') && !alone.includes('set otherwise'));
    const names = ['a', 'b', 'c', 'd', 'e', 'f'];
    const html = renderComparison(
      names.map((name, i) => comparedRun(name, i)),
      'now',
    );
    assert.match(html, /Of the first 4 runs/);
    assert.equal(html.match(/ \(exact\)</g)?.length, 5);
    assert.match(html, /Each test is taken on its own/);
  });

  it('draws few, no, damaged and very many metrics', () => {
    assert.match(renderReport(bare([])), /No step has been logged/);
    const one = renderReport(bare(metrics(1)));
    assert.equal(one.match(/<svg /g)?.length, 5);
    const odd: MetricsLine[] = [
      { step: 1, loss: Number.NaN, baseLoss: 2, lr: 0 },
      { step: 2, loss: null, baseLoss: Number.POSITIVE_INFINITY, lr: 0 },
      { step: 3, loss: 1e300, baseLoss: 1e-300, lr: 0.1 },
      { step: Number.NaN, loss: 1 },
    ];
    const many = metrics(50_000);
    const lines = [odd, odd.slice(0, 2), metrics(2), many];
    for (const html of [one, ...lines.map((list) => renderReport(bare(list)))]) {
      const drawn = html.replaceAll(/<(title|desc)[\s\S]*?<\/\1>/g, '');
      assert.ok(!/NaN|Infinity|undefined/.test(drawn));
    }
    assert.match(renderReport(bare(odd)), /At 2 of 3 logged steps the loss was not finite/);
    assert.ok(renderReport(bare(many)).length < 200_000, 'curves are thinned');
  });

  it('gives a failing write as one error and leaves no file', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'hardmine-report-'));
    try {
      await writeReport(join(folder, 'report.html'), bare([]));
      assert.match(await readFile(join(folder, 'report.html'), 'utf8'), /^<!doctype html>/);
      await assert.rejects(writeReport(join(folder, 'no', 'report.html'), bare([])), {
        name: 'HardmineError',
        code: 'ERR_IO',
      });
      assert.deepEqual(await readdir(folder), ['report.html']);
    } finally {
      await rm(folder, { recursive: true });
    }
  });

  it('has text of contrast 4.5 and lines of contrast 3 in both themes', () => {
    const html = renderReport(bare([]));
    const themes = [...html.matchAll(/:root\{([^}]*)\}/g)].map(([, rules]) =>
      Object.fromEntries([...rules!.matchAll(/--(\w+):(#\w{6})/g)].map(([, k, v]) => [k, v])),
    );
    assert.equal(themes.length, 2);
    for (const theme of themes) {
      for (const ground of ['page', 'surface']) {
        // Series colours also stand as text: right and wrong.
        for (const name of ['ink', 'muted', 's1', 's2', 's3']) {
          const ratio = contrast(theme[name]!, theme[ground]!);
          assert.ok(ratio >= 4.5, `${name} on ${ground}: ${ratio.toFixed(2)}`);
        }
      }
    }
  });
});

describe('charts', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  it('average neighbouring lines to at most 400 points and leave gaps', () => {
    const points = curve(metrics(1001), 'silenced');
    assert.ok(points.length <= 400 && points.length > 300);
    assert.ok(points.every(([, value]) => Math.abs(value - 0.5) < 1e-12)); // a mean of three halves
    const gap: MetricsLine[] = [1, null, 3, 4].map((loss, i) => ({ step: i, loss }));
    assert.deepEqual(curve(gap, 'loss'), [
      [0, 1],
      [1, Number.NaN],
      [2, 3],
      [3, 4],
    ]);
    const [chart] = trainingCharts(gap, []);
    const path = /<path class="line s1" d="(M[^"]*)" ?\/>\n<\/g>/.exec(drawChart(chart!))?.[1];
    assert.equal(path?.match(/M/g)?.length, 2, `two runs in ${path}`);
  });

  it('stay within 400 points however long a run is, and exact means', () => {
    const history = new MetricsHistory();
    const lines = metrics(20_000);
    for (const line of lines) history.add(line);
    // Groups of 64, the least power of two with at most 400 of them, and the last line.
    const kept = history.lines;
    assert.equal(kept.length, Math.ceil(20_000 / 64) + 1);
    const group = lines.slice(128, 192);
    const mean = group.reduce((sum, { loss }) => sum + loss!, 0) / 64;
    assert.ok(Math.abs(kept[2]!.loss! - mean) < 1e-9 * mean);
    assert.equal(kept[2]!.step, 161); // half-way between steps 129 and 192, rounded
    assert.equal(kept.at(-1), lines.at(-1));
    // What is no number is left out of a mean, and few lines stay as they are.
    const short = new MetricsHistory();
    for (const line of lines.slice(0, 3)) short.add(line);
    assert.deepEqual(short.lines, [...lines.slice(0, 3), lines[2]]);
    const gaps = new MetricsHistory();
    for (let step = 1; step <= 800; step++) gaps.add({ step, loss: step % 2 ? null : step });
    assert.equal(gaps.lines[0]!.loss, 2);
  });

  it('take the later line of a step that stands twice', () => {
    const lines = [
      { step: 1, loss: 5 },
      { step: 2, loss: 4 },
      { step: 3, loss: 3 },
      { step: 2, loss: 2 },
    ];
    assert.deepEqual(orderedMetrics(lines), [
      { step: 1, loss: 5 },
      { step: 2, loss: 2 },
      { step: 3, loss: 3 },
    ]);
  });

  it('have few ticks at round numbers', () => {
    assert.deepEqual(niceTicks(0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]);
    assert.deepEqual(niceTicks(0, 300), [0, 50, 100, 150, 200, 250, 300]);
    for (const [min, max] of [
      [0, 1e-9],
      [1e17, 1e17 + 64],
      [-3, 7],
      [0, 1e300],
      [17, 3001],
    ] as const) {
      const ticks = niceTicks(min, max);
      assert.ok(ticks.length >= 2 && ticks.length <= 11, `${min}..${max}: ${ticks}`);
    }
    assert.deepEqual(niceRange([]), { min: 0, max: 1 });
    assert.deepEqual(niceRange([Number.NaN, 0.13, 0.87]), { min: 0, max: 1 });
    const { min, max } = niceRange([5, 5]);
    assert.ok(min < 5 && max > 5);
  });

  it('write numbers alike in every locale', () => {
    assert.deepEqual([0, 1234567.5, -1234, 0.00012, 999.99999, 1e12, 0.5].map(plainNumber), [
      '0',
      '1,234,567.5',
      '-1,234',
      '1.2e-4',
      '1,000',
      '1e12',
      '0.5',
    ]);
  });
});

/** WCAG 2.1's contrast ratio of two #rrggbb colours. */
function contrast(a: string, b: string): number {
  const luminance = (colour: string) => {
    const [red, green, blue] = [1, 3, 5].map((at) => {
      const c = Number.parseInt(colour.slice(at, at + 2), 16) / 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red! + 0.7152 * green! + 0.0722 * blue!;
  };
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high! + 0.05) / (low! + 0.05);
}
