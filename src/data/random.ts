/**
 * Counter-based random numbers, as core/random.h has them but in 32 bits, which JavaScript
 * multiplies without BigInt: a value is a function of (seed, stream, index), so any element can be
 * drawn without the ones before it.
 */

/** The finaliser "lowbias32" of C. Wellons' hash prospector (2018): a bijection of 32 bits with low bias. */
function mix32(x: number): number {
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d);
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b);
  return (x ^ (x >>> 16)) >>> 0;
}

/** 2^32 over the golden ratio: keeps index 0 of stream 0 under seed 0 away from mix32's fixed point. */
const GOLDEN = 0x9e3779b9;

/** 32 random bits of element `index` of `stream` under `seed` (integers from 0 to 2^53 - 1). */
export function randomBits(seed: number, stream: number, index: number): number {
  let state = GOLDEN;
  for (const value of [seed, stream, index]) {
    state = mix32(state ^ (value >>> 0));
    state = mix32((state + GOLDEN) ^ Math.floor(value / 0x1_0000_0000));
  }
  return state;
}

/** Draws one after another from (seed, stream). */
export class RandomStream {
  readonly #state: number;
  #index = 0;

  constructor(seed: number, stream: number) {
    this.#state = randomBits(seed, stream, 0);
  }

  bits(): number {
    this.#index += 1;
    return mix32(this.#state ^ mix32(Math.imul(this.#index, GOLDEN)));
  }

  /** Uniform in [low, high). */
  uniform(low = 0, high = 1): number {
    return low + (this.bits() / 0x1_0000_0000) * (high - low);
  }

  /** Uniform integer in [0, bound), bound up to 2^53; the bias, below bound / 2^53, is invisible here. */
  below(bound: number): number {
    const high = this.bits();
    const low = this.bits() >>> 11;
    return Math.floor(((high * 0x20_0000 + low) / 0x20_0000_0000_0000) * bound);
  }

  /** Standard normal by Box and Muller's transform. */
  normal(): number {
    const u = (this.bits() + 1) / 0x1_0000_0000; // in (0, 1]: the log is finite
    return Math.sqrt(-2 * Math.log(u)) * Math.cos(2 * Math.PI * this.uniform());
  }

  chance(probability: number): boolean {
    return this.uniform() < probability;
  }

  pick<T>(items: readonly T[]): T {
    const item = items[this.below(items.length)];
    if (item === undefined) throw new RangeError('pick needs at least one item');
    return item;
  }

  /** Shuffles in place (Fisher and Yates). */
  shuffle<T extends { length: number; [index: number]: unknown }>(items: T): T {
    for (let i = items.length - 1; i > 0; i -= 1) {
      const j = this.below(i + 1);
      const held = items[i];
      items[i] = items[j];
      items[j] = held;
    }
    return items;
  }

  /** `count` distinct integers of [0, bound), ascending, each set equally likely (Floyd's algorithm). */
  distinct(count: number, bound: number): number[] {
    const chosen = new Set<number>();
    for (let top = bound - count; top < bound; top += 1) {
      const draw = this.below(top + 1);
      chosen.add(chosen.has(draw) ? top : draw);
    }
    return [...chosen].sort((a, b) => a - b);
  }
}
