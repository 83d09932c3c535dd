/** --align of the commands that embed: photographs instead of aligned faces. */
import type { Command } from 'commander';
import { FaceAligner, IMAGES_IN_FLIGHT } from '../align/aligner.js';
import { WEIGHTS_SOURCE } from '../align/mtcnn-weights.js';
import { mapBounded, PIXEL_BYTES } from '../data/images.js';
import { HardmineError } from '../errors.js';
import type { FaceModel } from '../model.js';
import { progressNote } from './command.js';

/** Photographs aligned before the model has its turn. */
const CHUNK = 64;

export interface AlignOptions {
  align?: true;
  mtcnn?: string;
}

export function addAlignOptions(command: Command): void {
  command
    .option('--align', 'find the face in each photograph and align it first (see hardmine align)')
    .option('--mtcnn <dir>', "folder with MTCNN's det1.npy, det2.npy and det3.npy, for --align");
}

/** The aligner that --align asks for; null without it. */
export async function openAligner({ align, mtcnn }: AlignOptions): Promise<FaceAligner | null> {
  if (align && mtcnn !== undefined) return FaceAligner.load({ mtcnn });
  if (align) {
    throw new HardmineError(
      'ERR_CONFIG',
      `--align needs MTCNN's weights: give the folder that holds them as --mtcnn; ${WEIGHTS_SOURCE}.`,
    );
  }
  if (mtcnn !== undefined) {
    throw new HardmineError(
      'ERR_CONFIG',
      '--mtcnn was given without --align: add --align where the images are photographs, or leave --mtcnn out.',
    );
  }
  return null;
}

/** One face of each photograph, RGB bytes [n, 112, 112, 3]. */
export async function alignImages(
  aligner: FaceAligner,
  paths: readonly string[],
): Promise<Uint8Array> {
  const pixels = new Uint8Array(paths.length * PIXEL_BYTES);
  await mapBounded(
    paths,
    async (path, i) => {
      const face = await aligner.align(path);
      if (face === null) {
        throw new HardmineError(
          'ERR_DATA',
          `No face was found in ${path}: give a photograph that shows one of at least 20 pixels.`,
        );
      }
      pixels.set(face.pixels, i * PIXEL_BYTES);
    },
    IMAGES_IN_FLIGHT,
  );
  return pixels;
}

/** Raw embeddings of one face of each photograph, row after row. */
export async function embedAligned(
  model: FaceModel,
  aligner: FaceAligner,
  paths: readonly string[],
): Promise<Float32Array> {
  const note = progressNote('embedding');
  const embeddings = new Float32Array(paths.length * model.embedding);
  for (let from = 0; from < paths.length; from += CHUNK) {
    const pixels = await alignImages(aligner, paths.slice(from, from + CHUNK));
    embeddings.set(await model.embed(pixels), from * model.embedding);
    note(Math.min(from + CHUNK, paths.length), paths.length);
  }
  return embeddings;
}
