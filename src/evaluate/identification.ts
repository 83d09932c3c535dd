/** Closed-set identification on LFW, unsupervised: whose gallery image is most like a probe? */

import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { ioError } from '../data/files.js';
import { checkPath, HardmineError } from '../errors.js';
import { type AlignFace, ImageFiles } from './image-source.js';
import { embedForPairs, type ScoreModel } from './pairs.js';
import { type ProtocolName, protocolOf, rowLength } from './protocols.js';
import { type Interval, wilsonInterval } from './statistics.js';

/** What LFW holds, and of how many people there is more than one image (its README). */
const LFW_PEOPLE = 5749;
const LFW_IMAGES = 13233;
/** Probes between two turns of the event loop: some 50 ms against LFW's gallery. */
const PROBES_A_TURN = 32;

export interface EvaluateIdentification {
  /** Folder with one folder a person: `Name/Name_0001.jpg` (or .png), aligned to 112x112. */
  root: string;
  /** Images a call of the model, 64 by default. */
  batch?: number;
  /** What an embedding is; the score is the cosine whatever the protocol. 'insightface' by default. */
  protocol?: ProtocolName;
  /** For images that are not aligned yet. */
  align?: AlignFace;
  onProgress?: (done: number, total: number) => void;
  signal?: AbortSignal;
}

export interface IdentificationResult {
  dataset: 'lfw';
  task: 'identification';
  protocol: ProtocolName;
  /** One image a person, the one with the least number, of all people in the folder. */
  gallery: number;
  /** All other images. */
  probes: number;
  /** People who have probes. */
  people: number;
  /** Share of the probes whose own person's gallery image alone has the greatest cosine; ties are wrong. */
  rank1: number;
  confidence95: Interval;
  flip: boolean;
  score: 'cosine';
  /** Images in which `align` found no face: a probe is then wrong, a gallery image is like nothing. */
  missing: number;
  details: { right: Uint8Array; notes: string[] };
}

/**
 * Rank-1 identification with all people in the gallery, those without probes as distractors. Every image
 * of the folder takes part, so the counts say which lists were used: of the whole LFW 5,749 in the
 * gallery and 7,484 probes of 1,680 people.
 *
 * @throws HardmineError ERR_PROTOCOL without a probe, or without a second person; ERR_DATA for an image
 *   that cannot be read or is not 112x112, ERR_NON_FINITE for a damaged model, ERR_ABORTED after `signal`
 */
export async function evaluateIdentification(
  model: ScoreModel,
  options: EvaluateIdentification,
): Promise<IdentificationResult> {
  checkPath(options?.root, 'LFW');
  const { root, protocol = 'insightface', align, ...embedding } = options;
  const people = await listPeople(root);
  const paths = people.flat();
  const probePeople = people.filter(({ length }) => length > 1).length;
  if (probePeople === 0 || people.length < 2) {
    throw new HardmineError(
      'ERR_PROTOCOL',
      `${root} holds ${paths.length} images of ${people.length} people: identification needs two people, and of one of them two images (Name/Name_0001.jpg, Name/Name_0002.jpg).`,
    );
  }
  const images = new ImageFiles(paths, align);
  const embeddings = await embedForPairs(model, { images, protocol, ...embedding });
  const dim = rowLength(model.embedding, protocol);
  const absent = new Set(images.withoutFace);
  normaliseRows(embeddings, dim, paths, absent);

  const owners = people.flatMap((files, person) => files.map(() => person));
  const first = people.map(() => 0);
  for (let person = 1; person < people.length; person++) {
    first[person] = first[person - 1]! + people[person - 1]!.length;
  }
  const gallery = new Float32Array(people.length * dim);
  for (const [person, row] of first.entries()) {
    gallery.set(embeddings.subarray(row * dim, (row + 1) * dim), person * dim);
  }
  const probes = [...paths.keys()].filter((row) => row !== first[owners[row]!]);
  const right = new Uint8Array(probes.length);
  for (const [k, row] of probes.entries()) {
    if (k % PROBES_A_TURN === 0) {
      await new Promise(setImmediate);
      if (options.signal?.aborted) {
        throw new HardmineError(
          'ERR_ABORTED',
          `The identification was stopped after ${k} of ${probes.length} probes.`,
        );
      }
    }
    const probe = embeddings.subarray(row * dim, (row + 1) * dim);
    right[k] = !absent.has(row) && isNearest(probe, gallery, owners[row]!) ? 1 : 0;
  }
  const found = right.reduce((sum, one) => sum + one, 0);
  return {
    dataset: 'lfw',
    task: 'identification',
    protocol,
    gallery: people.length,
    probes: probes.length,
    people: probePeople,
    rank1: found / probes.length,
    confidence95: wilsonInterval(found, probes.length),
    flip: protocolOf(protocol).mirror !== 'none',
    score: 'cosine',
    missing: absent.size,
    details: { right, notes: notesOn(people.length, paths.length, absent.size) },
  };
}

function notesOn(people: number, images: number, missing: number): string[] {
  const notes: string[] = [];
  if (people !== LFW_PEOPLE || images !== LFW_IMAGES) {
    notes.push(
      `The folder holds ${images} images of ${people} people where LFW has ${LFW_IMAGES} of ${LFW_PEOPLE}, so the figure is not LFW's.`,
    );
  }
  if (missing > 0) notes.push(`No face was found in ${missing} of ${images} images.`);
  return notes;
}

/** Images of every person in the order of their numbers; people in byte order. */
async function listPeople(root: string): Promise<string[][]> {
  const list = (path: string) =>
    readdir(path, { withFileTypes: true }).catch((error: unknown) => {
      throw ioError(path, 'read', error, 'give a folder with one folder a person');
    });
  const folders = (await list(root)).filter((entry) => entry.isDirectory());
  const names = folders
    .map(({ name }) => name)
    .sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
  const people: string[][] = [];
  for (const name of names) {
    const numbered: { number: number; path: string }[] = [];
    for (const { name: file } of await list(join(root, name))) {
      const match = /^(.*)_(\d{4,9})\.(?:jpg|png)$/.exec(file);
      if (match?.[1] !== name) continue;
      numbered.push({ number: Number(match[2]), path: join(root, name, file) });
    }
    numbered.sort((a, b) => a.number - b.number);
    const twice = numbered.find(({ number }, i) => numbered[i + 1]?.number === number);
    if (twice) {
      throw new HardmineError(
        'ERR_PROTOCOL',
        `${join(root, name)} holds image ${twice.number} more than once: remove all but one.`,
      );
    }
    if (numbered.length > 0) people.push(numbered.map(({ path }) => path));
  }
  return people;
}

/** Brings rows to length 1 in place; those of `absent` to zero. */
function normaliseRows(
  embeddings: Float32Array,
  dim: number,
  names: readonly string[],
  absent: ReadonlySet<number>,
): void {
  for (const [row, name] of names.entries()) {
    const one = embeddings.subarray(row * dim, (row + 1) * dim);
    let squares = 0;
    for (let i = 0; i < dim; i++) squares += one[i]! ** 2;
    if (!Number.isFinite(squares)) {
      throw new HardmineError(
        'ERR_NON_FINITE',
        `The embedding of ${name} holds NaN or infinity; the model's weights are damaged or its training diverged.`,
      );
    }
    const inverseNorm = squares > 0 && !absent.has(row) ? 1 / Math.sqrt(squares) : 0;
    for (let i = 0; i < dim; i++) one[i]! *= inverseNorm;
  }
}

/** Whether the row `owner` of the gallery is more like the probe than every other one. */
function isNearest(probe: Float32Array, gallery: Float32Array, owner: number): boolean {
  const dim = probe.length;
  const cosine = (row: number): number => {
    const at = row * dim;
    let sum = 0;
    for (let i = 0; i < dim; i++) sum += probe[i]! * gallery[at + i]!;
    return sum;
  };
  const own = cosine(owner);
  for (let row = 0; row * dim < gallery.length; row++) {
    if (row !== owner && cosine(row) >= own) return false;
  }
  return true;
}
