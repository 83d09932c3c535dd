/** A report with something in every place, and names that would do harm. */
import sharp from 'sharp';
import { verification } from '../../src/evaluate/verification.js';
import type { ComparedRun } from '../../src/report/comparison.js';
import type { MetricsLine } from '../../src/report/curves.js';
import type { ReportData } from '../../src/report/report.js';

export const HOSTILE = `<script>document.title='owned'</script>"><img src=x onerror=alert(1)>'&amp;`;

export const metrics = (n: number): MetricsLine[] =>
  Array.from({ length: n }, (_, i) => ({
    step: i + 1,
    epoch: 1 + Math.floor(i / 100),
    loss: 40 / (1 + i / 50),
    baseLoss: 30 / (1 + i / 50),
    accuracy: i / n,
    lr: i < n / 2 ? 0.1 : 0.001,
    imagesPerSecond: 200,
    silenced: 0.5,
    kept: 0.2,
    amplified: 0.3,
  }));

/** 60 pairs in ten folds; the first `wrong` of them are judged wrongly. */
export function judged(wrong: number) {
  const same = Array.from({ length: 60 }, (_, i) => i % 2 === 0);
  return verification({
    distances: same.map((label, i) => (label !== i < wrong ? 0.5 : 1.5)),
    same,
    fold: same.map((_, i) => Math.floor(i / 6)),
  });
}

export async function reportData(): Promise<ReportData> {
  const jpeg = await sharp({
    create: { width: 112, height: 112, channels: 3, background: '#c08060' },
  })
    .jpeg()
    .toBuffer();
  const face = (label: string) => ({ label, jpeg });
  const result = verification({
    distances: Array.from({ length: 60 }, (_, i) => (i % 2 ? 1.5 : 0.5) + (i % 7) / 8),
    same: Array.from({ length: 60 }, (_, i) => i % 2 === 0),
    fold: Array.from({ length: 60 }, (_, i) => Math.floor(i / 6)),
  });
  return {
    title: `Report of ${HOSTILE}`,
    created: HOSTILE,
    summary: HOSTILE,
    note: HOSTILE,
    progress: { running: true, step: 300, totalSteps: 1200 },
    config: { loss: HOSTILE, weighting: { alpha: 1.5, [HOSTILE]: 1 }, milestones: [8, 12, 16] },
    environment: { device: HOSTILE, [HOSTILE]: 'value' },
    metrics: metrics(300),
    validations: [{ step: 100, accuracy: 0.8 }],
    trainingSeconds: 4000,
    evaluatedOn: HOSTILE,
    evaluations: [
      { name: `trained ${HOSTILE}`, result },
      { name: 'untrained', result },
    ],
    hardest: {
      impostors: [{ a: face(HOSTILE), b: face('Bob'), distance: 0.4, wrong: true }],
      genuine: [{ a: face('Ann'), b: face('Ann'), distance: 1.8, wrong: false }],
    },
    samples: {
      epoch: 3,
      shown: [
        { face: face(HOSTILE), step: 290, baseLoss: 21.125, gradientWeight: 1.5 },
        { face: { label: 'Cid', jpeg: null }, step: 210, baseLoss: 0.5, gradientWeight: 0.04 },
        { face: face('Dan'), step: 211, baseLoss: 0.7, gradientWeight: 0.99 },
      ],
    },
  };
}

export function comparedRun(name: string, wrong: number, settings: object = {}): ComparedRun {
  return {
    name,
    config: { loss: 'arcface', scale: 16, ...settings },
    environment: { device: 'one' },
    metrics: metrics(300),
    validations: [
      { step: 100, accuracy: 0.75 },
      { step: 200, accuracy: 0.5 },
    ],
    summary: `What ${name} is`,
    seconds: 75,
    step: 300,
    totalSteps: 1200,
    results: [{ dataset: 'lfw', list: 'one', result: judged(wrong) }],
  };
}
