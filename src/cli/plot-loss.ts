import type { Command } from 'commander';
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
      const addon = loadAddon('cpu');
      await writeFileAtomic(out, [
        plotLoss((losses, weighting) => addon.weightLosses(losses, weighting)),
      ]);
      if (json) output.json({ out });
      else output.result(out);
    });
}
