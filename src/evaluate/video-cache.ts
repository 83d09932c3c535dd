/** Embeddings of videos' frames on the disk, so that another aggregate or a stopped evaluation costs no second pass. */

import { createHash } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { z } from 'zod';
import { ioError, makeFolders, readFileBounded } from '../data/files.js';
import { mapBounded } from '../data/images.js';
import { writeFileAtomic } from '../formats/atomic.js';
import { readNpyMatrix, writeNpy } from '../formats/npy.js';

/** Two hashes and a number have some 200. */
const MAX_NOTE_BYTES = 4096;
/** A .npy's header is shorter. */
const HEADER_BYTES = 256;

/** Rows of the frames that hold a face, and how many hold none. */
export interface VideoRows {
  /** [frames with a face, row length] as the protocol wants them, not normalised. */
  rows: Float32Array;
  withoutFace: number;
}

/** Beside the .npy of a video; written after it, so that a half-written pair does not agree. */
const noteSchema = z.strictObject({
  /** SHA-256 of the frames' names, sizes and times of change. */
  frames: z.string(),
  withoutFace: z.int().min(0),
  /** SHA-256 of the .npy file's values. */
  sha256: z.string(),
});

/**
 * One folder a setting (model, alignment, rule of frames, protocol's rows), in it `Person/video.npy`
 * and `Person/video.json`.
 */
export class VideoCache {
  /** Videos taken from the cache, and those that had to be embedded anew. */
  taken = 0;
  readonly stale: string[] = [];
  readonly damaged: string[] = [];

  private constructor(
    private readonly folder: string,
    private readonly rowLength: number,
  ) {}

  /**
   * @param settings whatever the embeddings depend on besides the frames themselves
   * @throws HardmineError ERR_IO when the folder cannot be made
   */
  static async open(
    root: string,
    settings: Readonly<Record<string, string | number | null>>,
    rowLength: number,
  ): Promise<VideoCache> {
    const hash = sha256(JSON.stringify({ ...settings, rowLength })).slice(0, 16);
    const folder = join(root, hash);
    await makeFolder(folder);
    return new VideoCache(folder, rowLength);
  }

  /** The rows of a video if they are there, whole, and of these very frames. */
  async take(video: string, frames: readonly string[]): Promise<VideoRows | null> {
    const path = join(this.folder, `${video}.npy`);
    const text = await readFileBounded(noteOf(path), MAX_NOTE_BYTES, 'a note').catch(() => null);
    if (text === null) return null; // never embedded, or not to the end
    const note = parseNote(text.toString('utf8'));
    const most = HEADER_BYTES + frames.length * this.rowLength * Float32Array.BYTES_PER_ELEMENT;
    const file = await readFileBounded(path, most, "a video's embeddings").catch(() => null);
    const stored = file && matrixOf(file, path);
    if (
      !note ||
      !stored ||
      stored.columns !== this.rowLength ||
      stored.rows + note.withoutFace !== frames.length ||
      sha256(bytesOf(stored.values)) !== note.sha256
    ) {
      this.damaged.push(video);
      return null;
    }
    if (note.frames !== (await fingerprint(frames))) {
      this.stale.push(video);
      return null;
    }
    this.taken++;
    return { rows: stored.values, withoutFace: note.withoutFace };
  }

  /** @throws HardmineError ERR_IO when it cannot be written */
  async put(
    video: string,
    frames: readonly string[],
    { rows, withoutFace }: VideoRows,
  ): Promise<void> {
    const path = join(this.folder, `${video}.npy`);
    await makeFolder(dirname(path));
    await writeNpy(path, rows, rows.length / this.rowLength, this.rowLength);
    const note: z.input<typeof noteSchema> = {
      frames: await fingerprint(frames),
      withoutFace,
      sha256: sha256(bytesOf(rows)),
    };
    await writeFileAtomic(noteOf(path), [`${JSON.stringify(note)}\n`]);
  }
}

function noteOf(npy: string): string {
  return npy.replace(/npy$/, 'json');
}

function parseNote(text: string): z.output<typeof noteSchema> | null {
  try {
    return noteSchema.safeParse(JSON.parse(text)).data ?? null;
  } catch {
    return null; // a damaged note is as good as none: the video is embedded anew
  }
}

function matrixOf(file: Buffer, path: string): ReturnType<typeof readNpyMatrix> | null {
  try {
    return readNpyMatrix(file, path);
  } catch {
    return null; // damaged: the video is embedded anew
  }
}

async function makeFolder(path: string): Promise<void> {
  await makeFolders(path).catch((error: unknown) => {
    throw ioError(path, 'written', error, 'choose a folder for --cache that you may write to');
  });
}

async function fingerprint(frames: readonly string[]): Promise<string> {
  const lines = await mapBounded(frames, async (path) => {
    const { size, mtimeMs } = await stat(path);
    return `${basename(path)} ${size} ${mtimeMs}\n`;
  });
  return sha256(lines.join(''));
}

function bytesOf({ buffer, byteOffset, byteLength }: Float32Array): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}

function sha256(data: string | Uint8Array): string {
  return createHash('sha256').update(data).digest('hex');
}
