/** What an experiment says: means over seeds, and each row against the one it is compared with. */
import { type McNemar, mcnemar } from '../evaluate/statistics.js';
import type { EvaluationSet, Experiment } from './experiment.js';
import type { Outcome, Run } from './run.js';

export type Verdict = 'better' | 'worse' | 'not decided';

/** A row against the row named by `against`, over the seeds that both have. */
export interface Comparison {
  against: string;
  /** Accuracy of the row minus that of the other, for each seed. */
  differences: number[];
  /** Over the pairs of all seeds together; `onlyFirst` are those that this row alone judged rightly. */
  test: McNemar;
  verdict: Verdict;
}

export interface Figure {
  /** Fractions, in the order of `seeds`. */
  perSeed: number[];
  seeds: number[];
  mean: number;
  /** Sample standard deviation over the seeds; null with a single one. */
  std: number | null;
  /** What a paper printed, a fraction. */
  published: number | null;
  comparison: Comparison | null;
}

export interface RowResult {
  name: string;
  figures: Partial<Record<EvaluationSet, Figure>>;
  /** What went wrong or was warned of, with the seed. */
  remarks: string[];
  /** Mean over seeds of the last epoch's base loss and training accuracy; null before any is finished. */
  training: { baseLoss: number; accuracy: number } | null;
}

export interface ExperimentResult {
  name: string;
  note: string;
  publishedData: string;
  data: string;
  /** Of the first finished run. */
  trainedOn: Outcome['trainedOn'] | null;
  evaluate: EvaluationSet[];
  finished: number;
  runs: number;
  rows: RowResult[];
}

/** The figures of whatever is finished. */
export function summarise(experiment: Experiment, runs: readonly Run[]): ExperimentResult {
  const finished = runs.filter(({ outcome }) => outcome !== null);
  const of = (row: string) => finished.filter((run) => run.row === row);
  return {
    name: experiment.name,
    note: experiment.note,
    publishedData: experiment.publishedData,
    data: experiment.data,
    trainedOn: finished[0]?.outcome?.trainedOn ?? null,
    evaluate: experiment.evaluate,
    finished: finished.length,
    runs: runs.length,
    rows: experiment.rows.map(({ name, against, published }): RowResult => {
      const own = of(name);
      const figures: RowResult['figures'] = {};
      for (const set of experiment.evaluate) {
        const judged = own.filter(({ outcome }) => outcome!.measures[set] !== undefined);
        if (judged.length === 0) continue;
        const perSeed = judged.map(({ outcome }) => outcome!.measures[set]!.accuracy);
        const other = against === undefined ? null : compare(set, judged, of(against), against);
        figures[set] = {
          perSeed,
          seeds: judged.map(({ seed }) => seed),
          mean: mean(perSeed),
          std: sampleStd(perSeed),
          published: published[set] ?? null,
          comparison: other,
        };
      }
      const lasts = own.flatMap(({ outcome }) => outcome!.lastEpoch ?? []);
      return {
        name,
        figures,
        remarks: own.flatMap(({ seed, outcome }) =>
          [...outcome!.warnings, ...(outcome!.failure === null ? [] : [outcome!.failure])].map(
            (sentence) => `seed ${seed}: ${sentence}`,
          ),
        ),
        training:
          lasts.length === 0
            ? null
            : {
                baseLoss: mean(lasts.map(({ baseLoss }) => baseLoss)),
                accuracy: mean(lasts.map(({ accuracy }) => accuracy)),
              },
      };
    }),
  };
}

/**
 * A row is better (or worse) only where every one of at least two seeds says so and McNemar's test over
 * the pairs of all seeds agrees. The test takes the pairs as independent, which those of one list
 * under several seeds are not quite: hence the condition on the seeds.
 */
function compare(
  set: EvaluationSet,
  own: readonly Run[],
  others: readonly Run[],
  against: string,
): Comparison | null {
  const differences: number[] = [];
  const first: number[] = [];
  const second: number[] = [];
  for (const { seed, outcome } of own) {
    const other = others.find((run) => run.seed === seed)?.outcome?.measures[set];
    const mine = outcome!.measures[set]!;
    if (other === undefined || other.decisions.length !== mine.decisions.length) continue;
    differences.push(mine.accuracy - other.accuracy);
    for (const decision of mine.decisions) first.push(Number(decision));
    for (const decision of other.decisions) second.push(Number(decision));
  }
  if (differences.length === 0) return null;
  const test = mcnemar(first, second);
  const decided = differences.length > 1 && test.distinguishable;
  const all = (sign: number) => differences.every((difference) => sign * difference > 0);
  const verdict = decided && all(1) ? 'better' : decided && all(-1) ? 'worse' : 'not decided';
  return { against, differences, test, verdict };
}

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

function sampleStd(values: readonly number[]): number | null {
  if (values.length < 2) return null;
  const centre = mean(values);
  const squares = values.reduce((sum, value) => sum + (value - centre) ** 2, 0);
  return Math.sqrt(squares / (values.length - 1));
}
