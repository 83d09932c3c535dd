import { extname } from 'node:path';
import type { Command } from 'commander';
import { HardmineError, quote } from '../errors.js';
import { writeFileAtomic } from '../formats/atomic.js';
import { loadAddon } from '../native.js';
import { plotLoss } from '../report/plot-loss.js';
import { type CommonOptions, makeCommand, output } from './command.js';

export function plotLossCommand(): Command {
  return makeCommand(
    'plot-loss',
    'Draw Figure 1 of the paper: loss against likelihood, by Equation 2 and Algorithm 1.',
    'hardmine plot-loss --out loss.svg',
  )
    .requiredOption('--out <file.svg>', 'picture')
    .action(async ({ out, json }: CommonOptions & { out: string }) => {
      if (extname(out).toLowerCase() !== '.svg') {
        throw new HardmineError('ERR_INPUT', `the picture is SVG: name it .svg, not ${quote(out)}`);
      }
      const addon = loadAddon('cpu');
      await writeFileAtomic(out, [
        plotLoss((losses, weighting) => addon.weightLosses(losses, weighting)),
      ]);
      if (json) output.json({ out });
      else output.result(out);
    });
}
