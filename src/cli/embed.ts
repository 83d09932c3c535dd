import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';
import type { Command } from 'commander';
import { IMAGE_NAME } from '../data/list-folder.js';
import { HardmineError } from '../errors.js';
import { checkWritable, writeFileAtomic } from '../formats/atomic.js';
import { writeNpy } from '../formats/npy.js';
import { FaceModel } from '../model.js';
import { type AlignOptions, addAlignOptions, embedAligned, openAligner } from './align-options.js';
import { type CommonOptions, makeCommand, output } from './command.js';
import { addDeviceOptions, type DeviceOptions, deviceOf } from './device-options.js';

interface Options extends CommonOptions, DeviceOptions, AlignOptions {
  model: string;
  out: string;
}

export function embedCommand(): Command {
  const command = makeCommand(
    'embed',
    'Embed images (files, or folders of them) and write the raw embeddings as a NumPy array.',
    'hardmine embed photos/ --model runs/first/best.safetensors --out photos.npy',
  )
    .argument(
      '<images...>',
      '112x112 images, or folders of them in byte order; with --align photographs',
    )
    .requiredOption('--model <file>', 'model (.safetensors)')
    .requiredOption('--out <file.npy>', 'float32 [images, embedding]; the paths go to file.txt');
  addAlignOptions(command);
  addDeviceOptions(command);
  return command.action(embed);
}

async function embed(inputs: string[], options: Options): Promise<void> {
  if (!options.out.endsWith('.npy')) {
    throw new HardmineError(
      'ERR_CONFIG',
      `--out is ${options.out}: give a path that ends with .npy`,
    );
  }
  await checkWritable(options.out);
  const paths = (await Promise.all(inputs.map(imagesOf))).flat();
  await using aligner = await openAligner(options);
  const model = await FaceModel.load(options.model, deviceOf(options));
  try {
    const embeddings =
      aligner === null ? await model.embed(paths) : await embedAligned(model, aligner, paths);
    await writeFileAtomic(
      options.out.replace(/\.npy$/, '.txt'),
      paths.map((path) => `${path}\n`),
    );
    await writeNpy(options.out, embeddings, paths.length, model.embedding);
    if (options.json) {
      output.json({ out: options.out, images: paths.length, embedding: model.embedding });
    } else {
      output.result(`${options.out}: ${paths.length} x ${model.embedding}`);
    }
  } finally {
    await model.dispose();
  }
}

/** A file itself, or the images anywhere below a folder, in the byte order of their paths. */
async function imagesOf(input: string): Promise<string[]> {
  const stats = await stat(input).catch((cause: unknown) => {
    throw new HardmineError(
      'ERR_IO',
      `${input} cannot be read: give an image or a folder of images`,
      {
        cause,
      },
    );
  });
  if (!stats.isDirectory()) return [input];
  const files = (await readdir(input, { recursive: true, withFileTypes: true }))
    .filter((entry) => !entry.isDirectory())
    .map((entry) => join(entry.parentPath, entry.name))
    .sort((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)));
  const images = files.filter((path) => IMAGE_NAME.test(path));
  if (images.length === 0) {
    throw new HardmineError(
      'ERR_DATA',
      `${input} holds no .jpg, .jpeg or .png: give another folder`,
    );
  }
  const others = files.filter((path) => !IMAGE_NAME.test(path));
  if (others.length > 0) {
    const more = others.length > 1 ? ` and ${others.length - 1} more` : '';
    output.warning(
      `${others[0]}${more} left out, since no .jpg, .jpeg or .png: convert what is a photograph`,
    );
  }
  return images;
}
