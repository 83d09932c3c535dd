/** Training sets: recognised, packed to RecordIO once where they are not yet, and opened. */
import { join, resolve } from 'node:path';
import { packedFiles } from '../formats/recordio.js';
import { type DataOptions, exists } from './files.js';
import { dataError } from './image-source.js';
import { openSource, packSource } from './pack.js';
import { type Dataset, openPacked } from './packed-set.js';
import { recognise, type TrainingSet, trainingOnly } from './recognise.js';

export type { DataOptions, DataProgress } from './files.js';
export type { Dataset } from './packed-set.js';

export interface OpenOptions extends DataOptions {
  /** A cleaned list of MS-Celeb-1M: what to keep of a .tsv, and under which labels. */
  keep?: string | undefined;
  /** Where packed sets are kept, `.hardmine-cache` by default. */
  cacheDir?: string | undefined;
}

/**
 * Opens a training set: a .rec with its .idx, a folder that holds one (train.rec, or a single .rec), or
 * what is packed to RecordIO on first use: an image folder with one sub-folder of JPEG and PNG files per
 * identity (LFW's tree is one), a table of MS-Celeb-1M (.tsv) or a list of images for im2rec (.lst).
 * Identities of a folder are labelled in the byte order of their names, those of a .tsv in that of their
 * MIDs unless `keep` labels them; labels of a .rec or .lst become 0..n-1 in ascending order. Hidden
 * entries are left out. What was packed is used again until an image or a list is added, removed,
 * renamed or written.
 * @throws ERR_DATA for anything that cannot be trained on, naming it, and for evaluation data with the
 *   command that takes them; ERR_IO; ERR_ABORTED
 */
export async function openDataset(path: string, options: OpenOptions = {}): Promise<Dataset> {
  const found = trainingOnly(await recognise(path));
  const isPacked = found.kind === 'recordio' && options.keep === undefined;
  const recPath = isPacked ? found.rec : await packOnce(found, options);
  const dataset = await openPacked(found, recPath);
  try {
    refuseOneIdentity(found.path, dataset.identities);
  } catch (error) {
    await dataset.dispose();
    throw error;
  }
  return dataset;
}

/** Packs a set into the cache, unless it is there. */
async function packOnce(found: TrainingSet, options: OpenOptions): Promise<string> {
  const source = await openSource(found, options, options);
  try {
    refuseOneIdentity(found.path, source.names.length);
    const prefix = join(options.cacheDir ?? '.hardmine-cache', source.fingerprint, 'train');
    const recPath = resolve(packedFiles(prefix).rec);
    // The .rec comes last into its place, so where it stands the set is whole.
    if (!(await exists(recPath))) await packSource(source, prefix, options);
    return recPath;
  } finally {
    await source.dispose();
  }
}

function refuseOneIdentity(path: string, identities: number): void {
  if (identities < 2) {
    throw dataError(
      `${path} holds ${identities} identity where training needs at least 2: add images of other people.`,
    );
  }
}
