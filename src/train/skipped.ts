/** Damaged images that a run leaves out (`onBadRecord: skip`): which, how many may be, and who is left. */
import type { Dataset } from '../data/packed-set.js';
import { HardmineError } from '../errors.js';
import type { HealthWarning } from './health.js';
import type { SkippedLine } from './run-directory.js';

/** Share of the images that may be left out; more is a damaged data set, not a few damaged images. */
const BUDGET = 0.001;
/** An identity with fewer images has no pair to learn from. */
const FEWEST = 2;

export interface Damage {
  /** In the data set. */
  index: number;
  reason: string;
}

export class SkippedImages {
  /** Images that may be left out: 0.1% of all, rounded up. */
  readonly most: number;
  readonly lines: SkippedLine[] = [];
  private readonly indices = new Set<number>();
  /** Sound images of each identity. */
  private readonly left: Int32Array;

  constructor(private readonly dataset: Dataset) {
    this.most = Math.ceil(BUDGET * dataset.images);
    this.left = new Int32Array(dataset.identities);
    for (const label of dataset.labels) this.left[label]! += 1;
  }

  /** Takes up what a run that is resumed has left out already. */
  resume(lines: readonly SkippedLine[]): void {
    for (const { key, reason, step } of lines) {
      const index = this.dataset.records.keys.indexOf(key);
      if (index >= 0) this.add([{ index, reason }], step);
    }
  }

  /** Images left out so far, in the order in which they were found. */
  get known(): Int32Array {
    return Int32Array.from(this.indices);
  }

  /**
   * Counts images as left out after `step` steps, those that were not before.
   *
   * @returns a line for each new one, and a warning for each identity that they leave too few of
   * @throws HardmineError ERR_DATA when there are more than may be
   */
  add(
    damaged: readonly Damage[],
    step: number,
  ): { lines: SkippedLine[]; warnings: HealthWarning[] } {
    const { labels, names, records, recPath } = this.dataset;
    const lines: SkippedLine[] = [];
    const warnings: HealthWarning[] = [];
    for (const { index, reason } of damaged) {
      if (this.indices.has(index)) continue;
      this.indices.add(index);
      const label = labels[index]!;
      const identity = names[label]!;
      lines.push({ step, file: recPath, key: records.keys[index]!, identity, reason });
      this.left[label]! -= 1;
      if (this.left[label]! >= FEWEST) continue;
      warnings.push({
        kind: 'identity',
        message: `the identity ${identity} has ${this.left[label]} sound image(s) left where at least ${FEWEST} are needed to learn from: restore its images in ${recPath} or pack the set without it`,
      });
    }
    this.lines.push(...lines);
    if (this.lines.length > this.most) {
      throw new HardmineError(
        'ERR_DATA',
        `more than the ${this.most} images that may be skipped are damaged in ${recPath} (the last: ${this.lines.at(-1)!.reason}): restore the file or pack the data set again`,
      );
    }
    return { lines, warnings };
  }

  /** Those of some images that cannot be read. */
  async damagedOf(images: Int32Array): Promise<Damage[]> {
    const damaged: Damage[] = [];
    for (const index of images) {
      try {
        await this.dataset.records.decode(Int32Array.of(index));
      } catch (error) {
        if (!(error instanceof HardmineError) || error.code !== 'ERR_DATA') throw error;
        damaged.push({ index, reason: error.message });
      }
    }
    return damaged;
  }
}
