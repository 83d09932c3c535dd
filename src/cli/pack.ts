import type { Command } from 'commander';
import { packDataset } from '../data/dataset.js';
import { type CommonOptions, makeCommand, output, progressNote } from './command.js';
import { stopOnInterrupt } from './interrupt.js';

export function packCommand(): Command {
  return makeCommand(
    'pack',
    'Pack a folder of identities, or another .rec, to RecordIO as InsightFace lays it out.',
    'hardmine pack faces/ packed/train',
  )
    .argument('<in>', 'folder with one sub-folder per identity, or a .rec')
    .argument('<out>', 'path of the .rec, or an existing folder')
    .action(async (input: string, out: string, options: CommonOptions) => {
      using interrupt = stopOnInterrupt('nothing of the pack is kept');
      const note = progressNote('packing');
      const packed = await packDataset(input, out, {
        onProgress: ({ done, total }) => note(done, total),
        signal: interrupt.signal,
      });
      if (options.json) output.json(packed);
      else {
        output.result(
          `${packed.recPath}: ${packed.images} images of ${packed.identities} identities, ${packed.bytes} bytes`,
        );
      }
    });
}
