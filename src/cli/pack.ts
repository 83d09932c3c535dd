import { resolve } from 'node:path';
import type { Command } from 'commander';
import type { DataOptions } from '../data/files.js';
import { packDataset } from '../data/pack.js';
import { HardmineError } from '../errors.js';
import { packLfwPairs } from '../evaluate/lfw-bin.js';
import { type CommonOptions, makeCommand, output, progressNote } from './command.js';
import { stopOnInterrupt } from './interrupt.js';

interface PackOptions extends CommonOptions {
  keep?: string;
  excludeIdentities?: string;
  pairs?: string;
}

export function packCommand(): Command {
  return makeCommand(
    'pack',
    'Pack what can be trained on to RecordIO as InsightFace lays it out; a pack that was stopped or killed goes on where it was. With --pairs, write a verification .bin instead.',
    'hardmine pack faces/ packed/train',
  )
    .argument(
      '<in>',
      "folder with one sub-folder per identity, MS-Celeb-1M's .tsv, im2rec's .lst, or a .rec",
    )
    .argument('<out>', 'path of the .rec, or an existing folder; with --pairs, of the .bin')
    .option('--keep <list>', 'cleaned list of a .tsv: what to keep, and under which labels')
    .option('--exclude-identities <file>', 'identities to leave out, one name a line')
    .option('--pairs <file>', "LFW's pairs.txt: write its pairs of <in>'s images as a .bin")
    .action(async (input: string, out: string, options: PackOptions) => {
      using interrupt = stopOnInterrupt('what is safely packed by now is kept to go on from');
      const notes = {
        scanning: progressNote('scanning'),
        packing: progressNote('packing'),
        checking: progressNote('checking'),
      };
      const work: DataOptions = {
        onProgress: ({ phase, done, total }) => notes[phase](done, total),
        signal: interrupt.signal,
      };
      if (out.endsWith('.bin') || options.pairs !== undefined) {
        await packPairs(input, out, options, work);
      } else {
        await packRecords(input, out, options, work);
      }
    });
}

async function packRecords(
  input: string,
  out: string,
  { keep, excludeIdentities, json }: PackOptions,
  work: DataOptions,
): Promise<void> {
  const packed = await packDataset(input, out, { keep, excludeIdentities, ...work });
  if (json) {
    output.json(packed);
    return;
  }
  for (const sentence of packed.notes) output.note(sentence);
  const { copies, acrossIdentities } = packed.duplicates;
  output.result(
    `${packed.recPath}: ${packed.images} images of ${packed.identities} identities, ${packed.bytes} bytes`,
  );
  output.result(
    packed.duplicatesPath === undefined
      ? 'byte duplicates: none'
      : `byte duplicates: ${copies} images repeat another one, ${acrossIdentities} images stand under several identities, see ${packed.duplicatesPath}`,
  );
}

async function packPairs(
  input: string,
  out: string,
  { pairs, keep, excludeIdentities, json }: PackOptions,
  work: DataOptions,
): Promise<void> {
  if (pairs === undefined) {
    throw new HardmineError(
      'ERR_CONFIG',
      `${out} would be a verification set, which needs a list of pairs: give one with --pairs, or the path of a .rec.`,
    );
  }
  if (!out.endsWith('.bin') || keep !== undefined || excludeIdentities !== undefined) {
    throw new HardmineError(
      'ERR_CONFIG',
      `--pairs writes a verification set, so ${out} must end with .bin and --keep and --exclude-identities do not apply: give OUT.bin and --pairs alone.`,
    );
  }
  const packed = await packLfwPairs(resolve(input), pairs, resolve(out), work);
  if (json) output.json(packed);
  else {
    output.result(
      `${packed.binPath}: ${packed.pairs} pairs, ${packed.same} of the same person, ${packed.bytes} bytes`,
    );
  }
}
