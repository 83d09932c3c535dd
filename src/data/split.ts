/** Held-out identities, and the verification pairs drawn from them. */
import { HardmineError } from '../errors.js';
import { RandomStream } from './random.js';

/** Streams of randomBits under the run's seed, so that one draw never follows from another. */
const STREAM_IDENTITIES = 1;
const STREAM_PAIRS = 2;

/** A verification needs two people, and so does training. */
const FEWEST = 2;

/** Of validation pairs. */
const FOLDS = 10;

export interface IdentitySplit {
  /** `images` index the data set; `labels` are classes 0..classes-1, one for each of `images`. */
  train: { images: Int32Array; labels: Int32Array; classes: number };
  /** Images of people whom training never sees; `labels` number these people from 0. */
  validation: { images: Int32Array; labels: Int32Array };
}

/**
 * Holds out whole identities: round(share * identities), at least 2 and at most `max`, drawn by
 * `seed` among those with two images or more, since the others have no pair of the same person. Where
 * these have too few images for validationPairs, further ones follow, up to a third of all identities.
 * @throws ERR_DATA when fewer than two such identities, or fewer than two to train on, would remain
 */
export function splitIdentities(
  dataset: { labels: Int32Array; identities: number; path: string },
  { share = 0.05, max = 200, seed }: { share?: number; max?: number; seed: number },
): IdentitySplit {
  const { labels, identities } = dataset;
  const counts = new Int32Array(identities);
  for (const label of labels) counts[label]! += 1;
  const candidates = [...counts.keys()].filter((identity) => counts[identity]! >= 2);
  const wanted = Math.max(FEWEST, Math.min(max, Math.round(share * identities)));
  if (candidates.length < wanted || identities - wanted < FEWEST) {
    throw new HardmineError(
      'ERR_DATA',
      `${dataset.path} holds ${identities} identities, ${candidates.length} with two images or more, and validation would hold out ${wanted} of those and leave ${identities - wanted}: add identities or set validation to none.`,
    );
  }
  const random = new RandomStream(seed, STREAM_IDENTITIES);
  const drawn = random.shuffle(candidates);
  const held = new Set(drawn.slice(0, enoughForPairs(drawn, counts, wanted)));
  const newLabel = new Int32Array(identities);
  const sizes = { train: 0, validation: 0 };
  for (let identity = 0; identity < identities; identity += 1) {
    newLabel[identity] = held.has(identity) ? sizes.validation++ : sizes.train++;
  }
  const images = [...labels.keys()];
  const part = (validation: boolean): { images: Int32Array; labels: Int32Array } => {
    const chosen = Int32Array.from(images.filter((i) => held.has(labels[i]!) === validation));
    return { images: chosen, labels: chosen.map((i) => newLabel[labels[i]!]!) };
  };
  return { train: { ...part(false), classes: sizes.train }, validation: part(true) };
}

/**
 * How many of the `drawn` people to hold out: the least number from `wanted` to a third of all that gives
 * one same and one different pair a fold; `wanted` where none does.
 */
function enoughForPairs(drawn: readonly number[], counts: Int32Array, wanted: number): number {
  const most = Math.min(drawn.length, counts.length - FEWEST, Math.ceil(counts.length / 3));
  for (let people = wanted; people <= most; people += 1) {
    const sizes = drawn.slice(0, people).map((identity) => counts[identity]!);
    if (capacity(sizes) >= FOLDS) return people;
  }
  return wanted;
}

/** Verification pairs: image `a[k]` against `b[k]`, the same person where `same[k]` is 1. */
export interface VerificationPairs {
  /** Positions in the `labels` given. */
  a: Int32Array;
  b: Int32Array;
  same: Uint8Array;
  fold: Uint8Array;
  /** Whether no identity appears in two folds. */
  disjoint: boolean;
}

/**
 * Draws balanced pairs in folds of equal size, each fold half same and half different, no pair twice.
 * Folds share no identity when there are people enough (two a fold, one of them with two images);
 * with fewer, identities are shared and `disjoint` is false. Same pairs are spread evenly over the
 * identities of a fold, different ones are uniform. Where the images do not give `pairs`, there are
 * fewer.
 * @param labels class of each image
 * @param options.pairs wanted in all, rounded down to an even number a fold
 * @param options.folds 1 to 255
 * @throws ERR_DATA when no fold could have one same and one different pair
 */
export function validationPairs(
  labels: Int32Array,
  { pairs, seed, folds = FOLDS }: { pairs: number; seed: number; folds?: number },
): VerificationPairs {
  const random = new RandomStream(seed, STREAM_PAIRS);
  const people = random.shuffle(groupByLabel(labels));
  const wanted = Math.floor(pairs / folds / 2);

  const groups = assignFolds(people, folds);
  const each = Math.min(wanted, ...groups.map((group) => capacity(sizesOf(group))));
  if (each > 0) {
    const drawn = groups.map((group) => ({
      same: drawSame(group, each, random),
      different: drawDifferent(group, each, random),
    }));
    return collect(drawn, true);
  }

  const inAll = Math.min(wanted, Math.floor(capacity(sizesOf(people)) / folds));
  if (inAll < 1) {
    throw new HardmineError(
      'ERR_DATA',
      `${labels.length} images of ${people.length} identities do not give ${folds} folds of verification pairs: add images or identities, or set validation to none.`,
    );
  }
  const same = random.shuffle(drawSame(people, inAll * folds, random));
  const different = random.shuffle(drawDifferent(people, inAll * folds, random));
  const drawn = Array.from({ length: folds }, (_, fold) => ({
    same: same.slice(fold * inAll, (fold + 1) * inAll),
    different: different.slice(fold * inAll, (fold + 1) * inAll),
  }));
  return collect(drawn, false);
}

type Pair = readonly [number, number];

/** Images of each identity. */
function groupByLabel(labels: Int32Array): number[][] {
  const groups = new Map<number, number[]>();
  for (const [image, label] of labels.entries()) {
    const group = groups.get(label);
    if (group === undefined) groups.set(label, [image]);
    else group.push(image);
  }
  return [...groups.values()];
}

/** Deals people out, those with most images first, each to the fold with the fewest same pairs so far. */
function assignFolds(people: readonly number[][], folds: number): number[][][] {
  const groups = Array.from({ length: folds }, () => ({ people: [] as number[][], pairs: 0 }));
  const byImages = [...people].sort((a, b) => b.length - a.length);
  for (const person of byImages) {
    const target = groups.reduce((least, group) =>
      group.pairs < least.pairs ||
      (group.pairs === least.pairs && group.people.length < least.people.length)
        ? group
        : least,
    );
    target.people.push(person);
    target.pairs += pairsWithin(person.length);
  }
  return groups.map((group) => group.people);
}

const sizesOf = (people: readonly number[][]): number[] => people.map(({ length }) => length);

const pairsWithin = (images: number): number => (images * (images - 1)) / 2;

/** How many same and as many different pairs people with these numbers of images give. */
function capacity(sizes: readonly number[]): number {
  const images = sizes.reduce((sum, size) => sum + size, 0);
  const same = sizes.reduce((sum, size) => sum + pairsWithin(size), 0);
  return Math.min(same, pairsWithin(images) - same);
}

/** `count` pairs within identities, spread over them as evenly as their images allow. */
function drawSame(people: readonly number[][], count: number, random: RandomStream): Pair[] {
  const quota = new Array<number>(people.length).fill(0);
  for (let left = count; left > 0; ) {
    for (const [i, person] of people.entries()) {
      if (left > 0 && quota[i]! < pairsWithin(person.length)) {
        quota[i]! += 1;
        left -= 1;
      }
    }
  }
  return people.flatMap((person, i) =>
    random.distinct(quota[i]!, pairsWithin(person.length)).map((index): Pair => {
      // Pair number j (j - 1) / 2 + k is (j, k), k < j.
      let j = Math.floor((1 + Math.sqrt(1 + 8 * index)) / 2);
      if ((j * (j - 1)) / 2 > index) j -= 1; // the root was rounded up
      return [person[index - (j * (j - 1)) / 2]!, person[j]!];
    }),
  );
}

/** `count` pairs across identities, uniformly. */
function drawDifferent(people: readonly number[][], count: number, random: RandomStream): Pair[] {
  const images = people.flat();
  /** starts[i]: number of pairs whose first image comes before position i; partners follow its person. */
  const starts: number[] = [];
  const partners: number[] = [];
  let total = 0;
  let end = 0;
  for (const person of people) {
    end += person.length;
    for (const _ of person) {
      starts.push(total);
      partners.push(end);
      total += images.length - end;
    }
  }
  let first = 0;
  return random.distinct(count, total).map((index): Pair => {
    while (first + 1 < starts.length && starts[first + 1]! <= index) first += 1;
    return [images[first]!, images[partners[first]! + index - starts[first]!]!];
  });
}

function collect(
  folds: readonly { same: readonly Pair[]; different: readonly Pair[] }[],
  disjoint: boolean,
): VerificationPairs {
  const all = folds.flatMap(({ same, different }, fold) => [
    ...same.map((pair) => ({ pair, same: 1, fold })),
    ...different.map((pair) => ({ pair, same: 0, fold })),
  ]);
  return {
    a: Int32Array.from(all, (entry) => entry.pair[0]),
    b: Int32Array.from(all, (entry) => entry.pair[1]),
    same: Uint8Array.from(all, (entry) => entry.same),
    fold: Uint8Array.from(all, (entry) => entry.fold),
    disjoint,
  };
}
