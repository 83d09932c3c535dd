/** The figures of a run for its curves, in memory and time that do not grow with it. */

import { FIGURES, type Figure, finite, type MetricsLine } from './curves.js';

/** Groups kept: as many as a chart has points. */
const MOST_GROUPS = 400;

/** Sums over neighbouring lines. */
interface Group {
  lines: number;
  first: MetricsLine;
  last: MetricsLine;
  sums: Record<Figure, { sum: number; count: number }>;
}

/**
 * Lines in groups of 2^k neighbours, k being the least with which there are at most 400 groups: what is
 * drawn of a group is its mean.
 */
export class MetricsHistory {
  private groups: Group[] = [];
  private size = 1;
  private latest: MetricsLine | null = null;

  add(line: MetricsLine): void {
    this.latest = line;
    const open = this.groups.at(-1);
    if (open && open.lines < this.size) {
      this.groups[this.groups.length - 1] = join(open, groupOf(line));
      return;
    }
    if (this.groups.length === MOST_GROUPS) {
      this.groups = Array.from({ length: MOST_GROUPS / 2 }, (_, i) =>
        join(this.groups[2 * i]!, this.groups[2 * i + 1]!),
      );
      this.size *= 2;
    }
    this.groups.push(groupOf(line));
  }

  /** The mean of each group at the step in its middle, and the latest line as it is. */
  get lines(): MetricsLine[] {
    const means = this.groups.map(meanOf);
    return this.latest === null ? [] : [...means, this.latest];
  }
}

function groupOf(line: MetricsLine): Group {
  const sums = Object.fromEntries(
    FIGURES.map((name) => {
      const value = finite(line[name]);
      return [name, Number.isNaN(value) ? { sum: 0, count: 0 } : { sum: value, count: 1 }];
    }),
  ) as Group['sums'];
  return { lines: 1, first: line, last: line, sums };
}

function join(a: Group, b: Group): Group {
  const sums = Object.fromEntries(
    FIGURES.map((name) => [
      name,
      {
        sum: a.sums[name].sum + b.sums[name].sum,
        count: a.sums[name].count + b.sums[name].count,
      },
    ]),
  ) as Group['sums'];
  return { lines: a.lines + b.lines, first: a.first, last: b.last, sums };
}

function meanOf({ lines, first, last, sums }: Group): MetricsLine {
  if (lines === 1) return first;
  const means = FIGURES.map((name) => [name, sums[name].sum / sums[name].count]);
  return {
    step: Math.round((first.step + last.step) / 2),
    epoch: last.epoch,
    ...Object.fromEntries(means),
  };
}
