import type { Command } from 'commander';
import { type DamagedImage, inspectDataset } from '../data/dataset.js';
import { type CommonOptions, makeCommand, output, progressNote } from './command.js';
import { stopOnInterrupt } from './interrupt.js';

/** Damaged images that people are shown; --json lists all. */
const SHOWN = 20;

export function inspectCommand(): Command {
  return makeCommand(
    'inspect',
    'Say what a data set holds, reading and decoding every image.',
    'hardmine inspect faces/',
  )
    .argument('<path>', 'folder with one sub-folder per identity, or a .rec')
    .action(async (path: string, options: CommonOptions) => {
      using interrupt = stopOnInterrupt('nothing is written');
      const note = progressNote('checking');
      const found = await inspectDataset(path, {
        onProgress: ({ done, total }) => note(done, total),
        signal: interrupt.signal,
      });
      if (options.json) {
        output.json(found);
        return;
      }
      const { min, median, max } = found.imagesPerIdentity;
      output.result(
        [
          `${found.kind}: ${found.images} images of ${found.identities} identities, ${found.bytes} bytes`,
          `images per identity: ${min} to ${max}, median ${median}`,
          `damaged: ${found.damaged.length}`,
          ...found.damaged.slice(0, SHOWN).map(describe),
        ].join('\n'),
      );
    });
}

function describe(image: DamagedImage): string {
  return `  ${'file' in image ? image.file : `record ${image.key}`}: ${image.reason}`;
}
