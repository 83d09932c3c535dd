import type { Command } from 'commander';
import { placeText } from '../data/image-source.js';
import { type Inspection, inspectDataset } from '../data/inspect.js';
import { type CommonOptions, makeCommand, output, progressNote } from './command.js';
import { stopOnInterrupt } from './interrupt.js';

/** Damaged images and sizes that people are shown; --json lists all. */
const SHOWN = 20;

interface InspectOptions extends CommonOptions {
  contactSheet?: string;
}

export function inspectCommand(): Command {
  return makeCommand(
    'inspect',
    'Say what a data set holds, reading and decoding every image.',
    'hardmine inspect faces/ --contact-sheet faces.png',
  )
    .argument(
      '<path>',
      'a .rec, .tsv, .lst or verification .bin, or a folder: of identities, of YouTube Faces or CFP',
    )
    .option(
      '--contact-sheet <file>',
      'draw up to 8x8 of the images, spread over identities, as PNG',
    )
    .action(async (path: string, options: InspectOptions) => {
      using interrupt = stopOnInterrupt('nothing is written');
      const note = progressNote('checking');
      const found = await inspectDataset(path, {
        onProgress: ({ done, total }) => note(done, total),
        signal: interrupt.signal,
        contactSheet: options.contactSheet,
      });
      if (options.contactSheet !== undefined && found.images === 0) {
        output.note(`${options.contactSheet} is not drawn, since there are no images.`);
      }
      if (options.json) output.json(found);
      else {
        output.result(describe(found).join('\n'));
        if (options.contactSheet !== undefined && found.images > 0) {
          output.result(`contact sheet: ${options.contactSheet}`);
        }
      }
    });
}

function describe(found: Inspection): string[] {
  const sizes = found.sizes
    .slice(0, SHOWN)
    .map(({ width, height, images }) => `${width}x${height} (${images})`);
  const moreSizes = found.sizes.length - sizes.length;
  return [
    ...describeKind(found),
    `sizes: ${sizes.join(', ') || 'none'}${moreSizes > 0 ? ` and ${moreSizes} more` : ''}`,
    `damaged: ${found.damaged.length}`,
    ...found.damaged.slice(0, SHOWN).map((image) => `  ${placeText(image)}: ${image.reason}`),
  ];
}

function describeKind(found: Inspection): string[] {
  switch (found.kind) {
    case 'verification-bin':
      return [
        `verification set: ${found.pairs} pairs (${found.same} of one person, ${found.different} of two), ${found.images} images, ${found.bytes} bytes`,
      ];
    case 'ytf':
      return [
        `YouTube Faces: ${found.identities} people, ${found.videos} videos, ${found.images} frames, ${found.bytes} bytes`,
        imagesPer('frames per person', found),
      ];
    case 'cfp':
      return [
        `CFP: ${found.identities} people, ${found.frontal} frontal and ${found.profile} profile images listed, ${found.missing} of them missing, ${found.bytes} bytes`,
        `pairs: ${found.pairs.frontalFrontal} frontal-frontal, ${found.pairs.frontalProfile} frontal-profile`,
      ];
    default:
      return [
        `${found.kind}${found.layout ? ` (${found.layout})` : ''}: ${found.images} images of ${found.identities} identities, ${found.bytes} bytes`,
        imagesPer('images per identity', found),
      ];
  }
}

function imagesPer(
  what: string,
  { imagesPerIdentity: { min, median, max } }: Extract<Inspection, { imagesPerIdentity: unknown }>,
): string {
  return `${what}: ${min} to ${max}, median ${median}`;
}
