/** The training samples with the highest base loss of an epoch: hard ones, and those with a wrong label. */
import type { NativeStepStats } from '../native.js';

/** As many as a person looks at. */
const KEPT = 12;

export interface HardSample {
  /** Index in the data set. */
  image: number;
  /** The step that it was part of, counted from 1. */
  step: number;
  baseLoss: number;
  /** dHM/dL: what the gate multiplied its gradient by. */
  gradientWeight: number;
}

export interface HardestOf {
  epoch: number;
  /** Worst first. */
  samples: HardSample[];
}

/** Of every step the sample with the highest base loss is looked at, and of these the worst are kept. */
export class HardestSamples {
  private present: HardestOf | null = null;
  private finished: HardestOf | null = null;

  /** @param firstStep of `stats`, counted from 1; all of them belong to `epoch` */
  add(stats: readonly NativeStepStats[], firstStep: number, epoch: number): void {
    this.present ??= { epoch, samples: [] };
    const found = stats.flatMap(({ hardest }, i): HardSample[] =>
      hardest.image < 0 ? [] : [{ ...hardest, step: firstStep + i }],
    );
    // With `onBadRecord: skip` an image may stand in two batches of an epoch.
    const images = new Set<number>();
    this.present.samples = [...this.present.samples, ...found]
      .sort((a, b) => b.baseLoss - a.baseLoss)
      .filter(({ image }) => !images.has(image) && images.add(image))
      .slice(0, KEPT);
  }

  /** Takes the present epoch as finished. */
  endEpoch(): void {
    this.finished = this.present;
    this.present = null;
  }

  /** Of the last finished epoch; in the first one, of what was seen so far. */
  get worst(): HardestOf | null {
    return this.finished ?? this.present;
  }
}
