/** What a path given as a data set is, told from its name and from what lies in it. */
import { readdir, stat } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import { checkPath } from '../errors.js';
import { exists } from './files.js';
import { dataError } from './image-source.js';

/** Sets that have images of known people, to be trained on, and sets that have pairs to verify. */
export type Recognised = TrainingSet | EvaluationSet;

export type TrainingSet = { path: string } & (
  | { kind: 'folder' }
  | { kind: 'recordio'; rec: string }
  | { kind: 'tsv' }
  | { kind: 'lst' }
);

export type EvaluationSet = { path: string } & (
  | { kind: 'verification-bin' }
  /** `frames`: the folder of people. */
  | { kind: 'ytf'; frames: string }
  /** `protocol`: the folder that holds Split/ and the two lists. */
  | { kind: 'cfp'; protocol: string }
);

const FORMS =
  "a .rec, a folder with one sub-folder per identity, MS-Celeb-1M's .tsv, im2rec's .lst, a verification .bin, or the folders of LFW, YouTube Faces or CFP";

/** Folders under which YouTube Faces keeps its frames: as filmed, and aligned by its authors. */
const YTF_FOLDERS = ['frame_images_DB', 'aligned_images_DB'];

/** @throws ERR_DATA for what is not there and for what is none of the known forms */
export async function recognise(given: string): Promise<Recognised> {
  checkPath(given, 'the data set');
  const path = resolve(given);
  if (path.endsWith('.rec')) return { kind: 'recordio', path, rec: path };
  if (!(await exists(path))) {
    if (await exists(`${path}.rec`)) return { kind: 'recordio', path, rec: `${path}.rec` };
    throw dataError(`${path} does not exist: give ${FORMS}.`);
  }
  return (await isDirectory(path)) ? recogniseFolder(path) : recogniseFile(path);
}

/** Whether a folder stands at `path`. */
export async function isDirectory(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory();
  } catch {
    return false; // absent: whoever opens it next says so
  }
}

async function recogniseFile(path: string): Promise<Recognised> {
  if (/\.tsv$/i.test(path)) return { kind: 'tsv', path };
  if (/\.lst$/i.test(path)) return { kind: 'lst', path };
  if (/\.bin$/i.test(path)) return { kind: 'verification-bin', path };
  const rec = path.replace(/\.(idx|crc)$/, '.rec');
  if (rec !== path && (await exists(rec))) {
    throw dataError(`${path} belongs to a packed set: give ${rec}, which stands beside it.`);
  }
  throw dataError(`${path} is no data set that hardmine knows: give ${FORMS}.`);
}

async function recogniseFolder(path: string): Promise<Recognised> {
  const names = (await readdir(path)).filter((name) => !name.startsWith('.'));
  const records = names.filter((name) => name.endsWith('.rec'));
  if (records.length > 0) return chooseRecords(path, records);
  const frames = YTF_FOLDERS.find((name) => names.includes(name));
  if (frames !== undefined) return { kind: 'ytf', path, frames: join(path, frames) };
  if (YTF_FOLDERS.includes(basename(path))) return { kind: 'ytf', path, frames: path };
  for (const protocol of [path, join(path, 'Protocol')]) {
    if (
      (await exists(join(protocol, 'Pair_list_F.txt'))) &&
      (await exists(join(protocol, 'Split')))
    ) {
      return { kind: 'cfp', path, protocol };
    }
  }
  // CFP's own images: Data/Images/001/{frontal,profile}, beside Protocol/.
  const protocol = join(dirname(path), 'Protocol');
  if (names.includes('Images') && (await exists(join(protocol, 'Pair_list_F.txt')))) {
    return { kind: 'cfp', path, protocol };
  }
  return { kind: 'folder', path };
}

function chooseRecords(path: string, records: readonly string[]): Recognised {
  const chosen = records.includes('train.rec') ? 'train.rec' : records[0]!;
  if (records.length > 1 && chosen !== 'train.rec') {
    const sorted = [...records].sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
    throw dataError(
      `${path} holds ${records.length} .rec files (${sorted.join(', ')}) and none is train.rec: give the path of one of them.`,
    );
  }
  return { kind: 'recordio', path, rec: join(path, chosen) };
}

const EVALUATION: Readonly<Record<EvaluationSet['kind'], { what: string; option: string }>> = {
  'verification-bin': { what: 'a verification set of pairs', option: '--bin' },
  ytf: { what: "YouTube Faces' videos", option: '--ytf' },
  cfp: { what: "CFP's pairs of frontal and profile faces", option: '--cfp' },
};

/** @throws ERR_DATA for what is evaluation data only, with the command that takes it */
export function trainingOnly(found: Recognised): TrainingSet {
  if (found.kind === 'verification-bin' || found.kind === 'ytf' || found.kind === 'cfp') {
    const { what, option } = EVALUATION[found.kind];
    throw dataError(
      `${found.path} holds ${what}, which is evaluation data and is not trained on or packed: give it to hardmine evaluate ${option}, and to hardmine inspect to see what it holds.`,
    );
  }
  return found;
}
