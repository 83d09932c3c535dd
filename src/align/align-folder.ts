/** A folder of photographs to a folder of aligned faces: `hardmine align`. */
import type { BigIntStats } from 'node:fs';
import { type FileHandle, open, readdir, readFile, realpath, rm, stat } from 'node:fs/promises';
import { basename, dirname, extname, join, relative, resolve, sep } from 'node:path';
import { z } from 'zod';
import { exists, ioError, makeFolders, throwIfAborted } from '../data/files.js';
import { FolderLock } from '../data/folder-lock.js';
import {
  decodePhotograph,
  encodeJpeg,
  mapBounded,
  type Pixels,
  readImageFile,
} from '../data/images.js';
import { IMAGE_NAME, listFolder } from '../data/list-folder.js';
import { HardmineError } from '../errors.js';
import { removeAbandonedFiles, writeFileAtomic } from '../formats/atomic.js';
import {
  ALIGNER_DEFAULTS,
  FACE_CHOICES,
  FALLBACKS,
  FaceAligner,
  type FaceAlignerOptions,
  IMAGES_IN_FLIGHT,
} from './aligner.js';
import { landmarkLines, readLandmarks } from './landmarks.js';
import { WEIGHTS_SOURCE } from './mtcnn-weights.js';
import { alignFace, FACE_SIZES, type FaceSize, type Point } from './similarity.js';

export interface AlignFolderOptions extends Omit<FaceAlignerOptions, 'mtcnn'> {
  /** Folder with MTCNN's weights; or `landmarks`, one of the two. */
  mtcnn?: string;
  /** List of landmarks to take instead of looking for faces; `minFace`, `face`, `fallback` then say nothing. */
  landmarks?: string;
  onProgress?: (done: number, total: number) => void;
  /** Told, in a sentence, where a second process cannot be kept out of `out`. */
  onWarning?: (message: string) => void;
  /** Stops the work; the next run goes on with it. */
  signal?: AbortSignal;
}

/** What `hardmine align --json` prints. */
export interface AlignFolderResult {
  images: number;
  /** Crops in OUT. */
  aligned: number;
  /** Of `images`, those that an earlier run had done. */
  earlier: number;
  /** Images with more than one face. */
  several: number;
  /** Images without a face, of which the middle was taken. */
  fallback: string[];
  /** Images without a face, of which there is no crop. */
  withoutFace: string[];
  /** Files in the folder that are no .jpg, .jpeg or .png. */
  otherFiles: string[];
  /** Of this run; null when there was nothing left to do. */
  imagesPerSecond: number | null;
  size: FaceSize;
  /** The list of landmarks that was written. */
  landmarks: string;
}

const LANDMARKS_FILE = 'landmarks.tsv';
/** What was done, a line each, so that a run that was killed goes on where it was. */
const JOURNAL_FILE = 'align.jsonl';
const JOURNAL_FORMAT = 'hardmine align 1';

const settingsSchema = z.strictObject({
  format: z.literal(JOURNAL_FORMAT),
  source: z.enum(['mtcnn', 'landmarks']),
  size: z.enum(FACE_SIZES),
  minFace: z.number().exactOptional(),
  face: z.enum(FACE_CHOICES).exactOptional(),
  fallback: z.enum(FALLBACKS).exactOptional(),
});
type Settings = z.infer<typeof settingsSchema>;

/** What people know the settings as. */
const SETTING_NAMES: Record<keyof Settings, string> = {
  format: 'the format',
  source: 'the source of landmarks',
  size: '--size',
  minFace: '--min-face',
  face: '--face',
  fallback: '--fallback',
};

const entrySchema = z.strictObject({
  image: z.string(),
  /** Size and time of change in nanoseconds: another image of that name is done anew. */
  bytes: z.number(),
  modified: z.string(),
  faces: z.number(),
  result: z.enum(['face', 'fallback', 'none']),
  landmarks: z.array(z.strictObject({ x: z.number(), y: z.number() })).nullable(),
});
type Entry = z.infer<typeof entrySchema>;

interface Photograph {
  /** Path below the folder, with '/'. */
  name: string;
  bytes: number;
  modified: string;
}

/** What became of one image: a crop, or null where there is no face to cut out. */
interface Outcome extends Pick<Entry, 'faces' | 'result' | 'landmarks'> {
  crop: Pixels | null;
}

/** Where landmarks come from: MTCNN, or a list. */
interface Source {
  /** Landmarks that are known before, by which an earlier crop of the image can be told to be another. */
  given(name: string): Point[] | null;
  align(path: string, name: string): Promise<Outcome>;
  dispose(): Promise<void>;
}

/**
 * Aligns every JPEG and PNG below `input`, or the one image that it is, into the same places below
 * `out` as JPEGs of quality 100, and writes `landmarks.tsv` there, which lists every face cut out into
 * `out`. What an earlier run with the same settings has done is not done again. An image that cannot be
 * read does not stop the others and is told at the end.
 *
 * @throws HardmineError ERR_BUSY while another process, or another call, writes into `out`; ERR_CONFIG for settings that do not fit together or not to those of an earlier
 *   run in `out`; ERR_DATA, ERR_IO when an image cannot be read or lacks landmarks, or no face was found
 *   at all; ERR_ABORTED; what FaceAligner.load throws
 */
export async function alignFolder(
  input: string,
  out: string,
  options: AlignFolderOptions,
): Promise<AlignFolderResult> {
  const settings = settingsOf(options);
  const { root, photographs, otherFiles } = await findPhotographs(input, out);
  const crops = cropPaths(input, photographs, out);
  await using lock = await FolderLock.take(out);
  if (lock.warning !== null) options.onWarning?.(lock.warning);
  const journal = await Journal.read(out, settings);
  const source = await openSource(input, options, photographs);
  const failures: { name: string; error: HardmineError }[] = [];
  const work = async (photograph: Photograph): Promise<void> => {
    const { name } = photograph;
    let outcome: Outcome;
    try {
      outcome = await source.align(join(root, name), name);
    } catch (error) {
      if (!(error instanceof HardmineError && /^ERR_(DATA|IO)$/.test(error.code))) throw error;
      failures.push({ name, error });
      return;
    }
    const { crop, ...entry } = outcome;
    const path = crops.get(name)!;
    // The crop first: what the journal lacks is done again.
    if (crop === null) await rm(path, { force: true });
    else await writeFileAtomic(path, [await encodeJpeg(crop)]);
    await journal.add({ ...identify(photograph), ...entry });
  };
  let todo: Photograph[];
  let seconds: number;
  try {
    const done = await mapBounded(photographs, async (photograph) => {
      const entry = journal.find(photograph, source.given(photograph.name));
      return entry?.result === 'none' || (entry && (await exists(crops.get(photograph.name)!)));
    });
    todo = photographs.filter((_, i) => !done[i]);
    await prepareFolder(out);
    await journal.start();
    for (const folder of new Set(todo.map(({ name }) => dirname(crops.get(name)!)))) {
      await prepareFolder(folder);
    }
    const started = performance.now();
    let finished = photographs.length - todo.length;
    await mapBounded(
      todo,
      async (photograph) => {
        throwIfAborted(options.signal, 'aligning');
        await work(photograph);
        finished += 1;
        options.onProgress?.(finished, photographs.length);
      },
      IMAGES_IN_FLIGHT,
    );
    seconds = (performance.now() - started) / 1000;
  } finally {
    await source.dispose();
    await journal.close();
  }
  const landmarks = join(out, LANDMARKS_FILE);
  await writeFileAtomic(landmarks, landmarkLines(journal.landmarks()));
  if (failures.length > 0) throw unreadable(input, photographs, failures);
  const entries = photographs.map(({ name }) => journal.entry(name)!);
  const named = (result: Entry['result']): string[] =>
    entries.filter((entry) => entry.result === result).map(({ image }) => image);
  const withoutFace = named('none');
  if (withoutFace.length === entries.length) throw noFace(input, entries.length);
  return {
    images: entries.length,
    aligned: entries.length - withoutFace.length,
    earlier: photographs.length - todo.length,
    several: entries.filter(({ faces }) => faces > 1).length,
    fallback: named('fallback'),
    withoutFace,
    otherFiles,
    imagesPerSecond: todo.length > 0 ? todo.length / seconds : null,
    size: settings.size,
    landmarks,
  };
}

function settingsOf(options: AlignFolderOptions): Settings {
  const {
    mtcnn,
    landmarks,
    onProgress: _,
    onWarning: __,
    signal: ___,
    threads: ____,
    ...given
  } = options;
  if ((mtcnn === undefined) === (landmarks === undefined)) {
    throw new HardmineError(
      'ERR_CONFIG',
      mtcnn === undefined
        ? `Neither MTCNN's weights nor a list of landmarks was given: give --mtcnn DIR or --landmarks FILE; ${WEIGHTS_SOURCE}.`
        : 'Both --mtcnn and --landmarks were given: give one of the two.',
    );
  }
  const chosen = { ...ALIGNER_DEFAULTS, ...given };
  return landmarks === undefined
    ? { format: JOURNAL_FORMAT, source: 'mtcnn', ...chosen }
    : { format: JOURNAL_FORMAT, source: 'landmarks', size: chosen.size };
}

async function openSource(
  input: string,
  options: AlignFolderOptions,
  photographs: readonly Photograph[],
): Promise<Source> {
  const { mtcnn, landmarks: list, size = ALIGNER_DEFAULTS.size } = options;
  if (list === undefined) {
    const aligner = await FaceAligner.load({ ...options, mtcnn: mtcnn! });
    return {
      given: () => null,
      align: async (path) => {
        const face = await aligner.align(path);
        if (face === null) return { crop: null, faces: 0, result: 'none', landmarks: null };
        const { faces, landmarks, fallback } = face;
        return { crop: face, faces, result: fallback ? 'fallback' : 'face', landmarks };
      },
      dispose: () => aligner.dispose(),
    };
  }
  const listed = await readLandmarks(list);
  const missing = photographs.filter(({ name }) => !listed.has(name));
  if (missing.length > 0) {
    throw new HardmineError(
      'ERR_DATA',
      `${list} lacks ${missing.length} of the ${photographs.length} images of ${input}, beginning with ${missing[0]!.name}: add their landmarks, or move these images away.`,
    );
  }
  return {
    given: (name) => listed.get(name)!,
    align: async (path, name) => {
      const landmarks = listed.get(name)!;
      const image = await decodePhotograph(await readImageFile(path), path);
      const crop = alignFace(image, landmarks, size, path);
      return { crop, faces: 1, result: 'face', landmarks };
    },
    dispose: async () => undefined,
  };
}

function unreadable(
  input: string,
  photographs: readonly Photograph[],
  failures: { name: string; error: HardmineError }[],
): HardmineError {
  const { error } = failures.reduce((a, b) => (a.name < b.name ? a : b));
  if (failures.length === 1) return error;
  return new HardmineError(
    error.code,
    `${failures.length} of the ${photographs.length} images of ${input} could not be aligned, the others are done; the first: ${error.message}`,
    { cause: error },
  );
}

function noFace(input: string, images: number): HardmineError {
  return new HardmineError(
    'ERR_DATA',
    `No face was found in ${images === 1 ? '' : `any of the ${images} images of `}${input}: give photographs that show faces, look for smaller ones with --min-face, or take the middle of each with --fallback center.`,
  );
}

// ---------------------------------------------------------------------------------------------
// What is there

/** The images below a folder, in byte order of each folder's names, or the one that `input` is. */
async function findPhotographs(
  input: string,
  out: string,
): Promise<{ root: string; photographs: Photograph[]; otherFiles: string[] }> {
  let root: string;
  try {
    root = await realpath(input);
    const stats = await stat(root, { bigint: true });
    if (!stats.isDirectory()) {
      return {
        root: dirname(root),
        photographs: [photograph(basename(root), stats)],
        otherFiles: [],
      };
    }
  } catch (error) {
    throw ioError(input, 'read', error, 'give an image or a folder of images');
  }
  if (`${await realPlace(out)}${sep}`.startsWith(`${root}${sep}`)) {
    throw new HardmineError(
      'ERR_CONFIG',
      `${out} lies in ${input}, whose images it would be taken for at the next run: give a folder beside it.`,
    );
  }
  const photographs: Photograph[] = [];
  const otherFiles: string[] = [];
  const walk = async (folder: string, above: readonly string[]): Promise<void> => {
    for (const { name, stats } of await listFolder(folder, root)) {
      const path = join(folder, name);
      if (stats.isDirectory()) {
        const inode = `${stats.dev} ${stats.ino}`;
        if (above.includes(inode)) {
          throw new HardmineError(
            'ERR_DATA',
            `${path} is a symbolic link to a folder that holds it: remove the link.`,
          );
        }
        await walk(path, [...above, inode]);
      } else if (stats.isFile() && IMAGE_NAME.test(name)) {
        photographs.push(photograph(relative(root, path), stats));
      } else {
        otherFiles.push(relative(root, path));
      }
    }
  };
  const { dev, ino } = await stat(root, { bigint: true });
  await walk(root, [`${dev} ${ino}`]);
  if (photographs.length === 0) {
    throw new HardmineError(
      'ERR_DATA',
      `${input} holds no .jpg, .jpeg or .png: give an image or a folder of images.`,
    );
  }
  return { root, photographs, otherFiles };
}

const photograph = (name: string, { size, mtimeNs }: BigIntStats): Photograph => ({
  name,
  bytes: Number(size),
  modified: String(mtimeNs),
});

const identify = ({ name, bytes, modified }: Photograph) => ({ image: name, bytes, modified });

/** Where `path` is or would be, links followed. */
async function realPlace(path: string): Promise<string> {
  const absolute = resolve(path);
  try {
    return await realpath(absolute);
  } catch {
    const above = dirname(absolute);
    return above === absolute ? absolute : join(await realPlace(above), basename(absolute));
  }
}

/** Where each image's crop goes. */
function cropPaths(
  input: string,
  photographs: readonly Photograph[],
  out: string,
): Map<string, string> {
  const crops = new Map<string, string>();
  const names = new Map<string, string>();
  for (const { name } of photographs) {
    const crop = `${name.slice(0, name.length - extname(name).length)}.jpg`;
    const other = names.get(crop);
    if (other !== undefined) {
      throw new HardmineError(
        'ERR_DATA',
        `${other} and ${name} of ${input} would both become ${crop}: rename one of them.`,
      );
    }
    names.set(crop, name);
    crops.set(name, join(out, crop));
  }
  return crops;
}

async function prepareFolder(path: string): Promise<void> {
  try {
    await makeFolders(path);
    await removeAbandonedFiles(path);
  } catch (error) {
    throw ioError(path, 'written', error, 'choose a folder that you may write to');
  }
}

// ---------------------------------------------------------------------------------------------
// What was done

class Journal {
  readonly #path: string;
  readonly #settings: Settings;
  readonly #entries = new Map<string, Entry>();
  #file: FileHandle | null = null;

  private constructor(path: string, settings: Settings) {
    this.#path = path;
    this.#settings = settings;
  }

  /** What earlier runs in `out` have done; writes nothing. */
  static async read(out: string, settings: Settings): Promise<Journal> {
    const journal = new Journal(join(out, JOURNAL_FILE), settings);
    let names: string[] = [];
    try {
      names = await readdir(out);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
        throw ioError(out, 'read', error, 'give a folder to write the crops into');
      }
    }
    if (names.includes(JOURNAL_FILE)) {
      await journal.#load(out);
    } else if (names.some((name) => !name.startsWith('.'))) {
      throw new HardmineError(
        'ERR_CONFIG',
        `${out} holds files that hardmine align did not write: give a folder that is empty or does not exist yet.`,
      );
    }
    return journal;
  }

  async #load(out: string): Promise<void> {
    const text = await readFile(this.#path, 'utf8').catch((error: unknown) => {
      throw ioError(this.#path, 'read', error, 'give another folder for the crops');
    });
    const lines = text.split('\n');
    lines.pop(); // empty, or the half of a line of a run that was killed
    const parse = <T>(schema: z.ZodType<T>, index: number): T => {
      try {
        return schema.parse(JSON.parse(lines[index] ?? ''));
      } catch (cause) {
        throw new HardmineError(
          'ERR_DATA',
          `${this.#path}, line ${index + 1} is not what hardmine align wrote: give another folder, or delete ${out} and start anew.`,
          { cause },
        );
      }
    };
    const earlier = parse(settingsSchema, 0);
    for (const key of Object.keys(SETTING_NAMES) as (keyof Settings)[]) {
      if (earlier[key] !== this.#settings[key]) {
        throw new HardmineError(
          'ERR_CONFIG',
          `${out} was begun with ${SETTING_NAMES[key]} ${earlier[key]} where it is ${this.#settings[key]} now: give the same settings, or another folder.`,
        );
      }
    }
    for (let index = 1; index < lines.length; index++) {
      const entry = parse(entrySchema, index);
      this.#entries.set(entry.image, entry);
    }
  }

  /** Writes what is known so far and opens the journal for more. */
  async start(): Promise<void> {
    const lines = [this.#settings, ...this.#entries.values()];
    await writeFileAtomic(
      this.#path,
      lines.map((line) => `${JSON.stringify(line)}\n`),
    );
    this.#file = await open(this.#path, 'a');
  }

  /** What was done of this very image, with these landmarks where they were given. */
  find({ name, bytes, modified }: Photograph, given: Point[] | null): Entry | undefined {
    const entry = this.#entries.get(name);
    if (entry?.bytes !== bytes || entry.modified !== modified) return undefined;
    if (given !== null && JSON.stringify(given) !== JSON.stringify(entry.landmarks)) {
      return undefined;
    }
    return entry;
  }

  entry(image: string): Entry | undefined {
    return this.#entries.get(image);
  }

  async add(entry: Entry): Promise<void> {
    try {
      await this.#file!.appendFile(`${JSON.stringify(entry)}\n`);
    } catch (error) {
      throw ioError(this.#path, 'written', error, 'make room on the disk and run it again');
    }
    this.#entries.set(entry.image, entry);
  }

  /** Of every face cut out, in byte order of the images. */
  *landmarks(): Generator<[string, Point[]]> {
    const images = [...this.#entries.keys()].sort((a, b) =>
      Buffer.compare(Buffer.from(a), Buffer.from(b)),
    );
    for (const image of images) {
      const { landmarks } = this.#entries.get(image)!;
      if (landmarks !== null) yield [image, landmarks];
    }
  }

  async close(): Promise<void> {
    await this.#file?.close();
  }
}
