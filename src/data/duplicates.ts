/** Images of a set that are the same byte for byte, by SHA-256 of what is stored. */
import { createHash } from 'node:crypto';
import { writeFileAtomic } from '../formats/atomic.js';
import { type ImageSource, placeText } from './image-source.js';

const DIGEST_BYTES = 32;

export interface Duplicates {
  /** Images that repeat an earlier one. */
  copies: number;
  /** Different images that stand under two or more identities. */
  acrossIdentities: number;
}

/** Digests of images in the order of their keys; 32 bytes each. */
export class DigestList {
  #bytes = Buffer.alloc(1024 * DIGEST_BYTES);
  #count = 0;

  add(image: Uint8Array): void {
    if (this.#count * DIGEST_BYTES === this.#bytes.length) {
      this.#bytes = Buffer.concat([this.#bytes, Buffer.alloc(this.#bytes.length)]);
    }
    this.#bytes.set(createHash('sha256').update(image).digest(), this.#count * DIGEST_BYTES);
    this.#count += 1;
  }

  /** Groups of two or more images that are the same, each and all in ascending order. */
  groups(): number[][] {
    const order = Uint32Array.from({ length: this.#count }, (_, i) => i);
    order.sort((a, b) => this.#compare(a, b) || a - b);
    const groups: number[][] = [];
    for (let start = 0; start < order.length; ) {
      let end = start + 1;
      while (end < order.length && this.#compare(order[start]!, order[end]!) === 0) end += 1;
      if (end - start > 1) groups.push([...order.subarray(start, end)]);
      start = end;
    }
    return groups.sort((a, b) => a[0]! - b[0]!);
  }

  hex(image: number): string {
    return this.#bytes.toString('hex', image * DIGEST_BYTES, (image + 1) * DIGEST_BYTES);
  }

  #compare(a: number, b: number): number {
    const [at, bt] = [a * DIGEST_BYTES, b * DIGEST_BYTES];
    return this.#bytes.compare(this.#bytes, bt, bt + DIGEST_BYTES, at, at + DIGEST_BYTES);
  }
}

/**
 * Writes what is there more than once as a table: sha256, key in the .rec, identity, image. Nothing is
 * written where nothing is.
 */
export async function reportDuplicates(
  digests: DigestList,
  source: ImageSource,
  path: string,
): Promise<Duplicates> {
  const groups = digests.groups();
  if (groups.length > 0) await writeFileAtomic(path, table(groups, digests, source));
  return {
    copies: groups.reduce((sum, group) => sum + group.length - 1, 0),
    acrossIdentities: groups.filter(
      (group) => new Set(group.map((image) => source.label(image))).size > 1,
    ).length,
  };
}

function* table(
  groups: readonly (readonly number[])[],
  digests: DigestList,
  source: ImageSource,
): Generator<string> {
  yield 'sha256\tkey\tidentity\timage\n';
  for (const group of groups) {
    for (const image of group) {
      // Record 0 holds no image, so keys count from 1.
      yield `${digests.hex(image)}\t${image + 1}\t${source.names[source.label(image)]}\t${placeText(source.place(image))}\n`;
    }
  }
}
