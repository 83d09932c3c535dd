#!/usr/bin/env node
import { readFileSync } from 'node:fs';
import { Command, CommanderError } from 'commander';
import { alignCommand } from './align.js';
import { benchCommand } from './bench.js';
import { EXIT, exitCodeOf, guardOutput, printError } from './command.js';
import { demoCommand } from './demo.js';
import { doctorCommand } from './doctor.js';
import { embedCommand } from './embed.js';
import { evaluateCommand } from './evaluate.js';
import { exportCommand } from './export.js';
import { inspectCommand } from './inspect.js';
import { packCommand } from './pack.js';
import { plotLossCommand } from './plot-loss.js';
import { reportCommand } from './report.js';
import { reproduceCommand } from './reproduce.js';
import { trainCommand } from './train.js';
import { verifyCommand } from './verify.js';

function version(): string {
  const text = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(text) as { version: string }).version;
}

function makeProgram(): Command {
  const program = new Command('hardmine')
    .description(
      'Trains and evaluates face-recognition networks with margin-softmax losses and hard mining.',
    )
    .version(version())
    .addHelpText('after', '\nExample:\n  $ hardmine train --data faces/ --out runs/first');
  const commands = [
    doctorCommand(),
    trainCommand(),
    evaluateCommand(),
    alignCommand(),
    packCommand(),
    inspectCommand(),
    embedCommand(),
    verifyCommand(),
    exportCommand(),
    reportCommand(),
    reproduceCommand(),
    plotLossCommand(),
    benchCommand(),
    demoCommand(),
  ];
  for (const command of commands) program.addCommand(command);
  // After the sub-commands are in place, since each of them would otherwise exit by itself.
  for (const command of [program, ...commands, ...commands.flatMap(({ commands }) => commands)]) {
    command.exitOverride();
    // Commander puts its guess of what was meant on a line of its own.
    command.configureOutput({ outputError: (text, write) => write(text.replace(/\n(?=.)/g, ' ')) });
  }
  return program;
}

/** Runs one command line; returns its exit code. */
async function main(argv: readonly string[]): Promise<number> {
  try {
    await makeProgram().parseAsync(argv, { from: 'user' });
    return EXIT.done;
  } catch (error) {
    // Commander has printed its own: help (exit code 0), or what is wrong with the command line.
    if (error instanceof CommanderError) return error.exitCode === 0 ? EXIT.done : EXIT.usage;
    printError(error, argv.includes('--debug'));
    return exitCodeOf(error);
  }
}

guardOutput();
process.exitCode = await main(process.argv.slice(2));
