/** The seeds of a target, and the inputs that once made it fail, which are kept beside them. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { corpusOf } from './targets.js';

export interface Seed {
  name: string;
  bytes: Buffer;
}

export function readCorpus(target: string): Seed[] {
  const folder = corpusOf(target);
  return readdirSync(folder)
    .sort()
    .map((name) => ({ name, bytes: readFileSync(join(folder, name)) }));
}
