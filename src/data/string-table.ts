/**
 * Whole numbers by text, for lists of millions: the text itself is not kept, only 64 bits of its MD5, so
 * that an entry takes 12 bytes (24 at most, before the table grows). Ten million texts share a value by
 * chance once in 300,000 tables (n^2 / 2^65).
 */
import { hash } from 'node:crypto';

export class StringTable {
  #high = new Uint32Array(1024);
  #low = new Uint32Array(1024);
  /** Value + 1; 0: free. */
  #values = new Uint32Array(1024);
  #size = 0;

  get size(): number {
    return this.#size;
  }

  /** @returns the value of `text`, or undefined */
  get(text: string): number | undefined {
    const { slot } = this.#find(text);
    const value = this.#values[slot]!;
    return value === 0 ? undefined : value - 1;
  }

  /** @param value 0 to 2^32 - 2 */
  set(text: string, value: number): void {
    if (2 * (this.#size + 1) > this.#values.length) this.#grow();
    const { slot, high, low } = this.#find(text);
    if (this.#values[slot] === 0) this.#size += 1;
    this.#high[slot] = high;
    this.#low[slot] = low;
    this.#values[slot] = value + 1;
  }

  #find(text: string): { slot: number; high: number; low: number } {
    const digest = hash('md5', text, 'buffer');
    const high = digest.readUInt32LE(0);
    const low = digest.readUInt32LE(4);
    return { slot: this.#slot(high, low), high, low };
  }

  /** Where an entry stands or would stand: linear probing. */
  #slot(high: number, low: number): number {
    const mask = this.#values.length - 1;
    let slot = low & mask;
    while (this.#values[slot] !== 0 && (this.#high[slot] !== high || this.#low[slot] !== low)) {
      slot = (slot + 1) & mask;
    }
    return slot;
  }

  #grow(): void {
    const [high, low, values] = [this.#high, this.#low, this.#values];
    this.#high = new Uint32Array(2 * high.length);
    this.#low = new Uint32Array(2 * low.length);
    this.#values = new Uint32Array(2 * values.length);
    for (const [old, value] of values.entries()) {
      if (value === 0) continue;
      const slot = this.#slot(high[old]!, low[old]!);
      this.#high[slot] = high[old]!;
      this.#low[slot] = low[old]!;
      this.#values[slot] = value;
    }
  }
}
