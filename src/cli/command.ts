/** What all commands share: their options, their output, their exit codes. */
import { Command, InvalidArgumentError } from 'commander';
import picocolors from 'picocolors';
import { HardmineError, oneLine } from '../errors.js';

/** Colours for a person at a terminal only: picocolors alone would colour whatever runs under CI. */
export const colours = picocolors.createColors(
  process.stderr.isTTY === true && picocolors.isColorSupported,
);

export const EXIT = { done: 0, failed: 1, usage: 2, interrupted: 130 } as const;

export interface CommonOptions {
  json?: true;
  debug?: true;
}

/** Results go to stdout, everything for people to stderr. */
export const output = {
  result(text: string): void {
    process.stdout.write(`${text}\n`);
  },
  json(value: unknown): void {
    process.stdout.write(`${JSON.stringify(value, null, 2)}\n`);
  },
  note(text: string): void {
    process.stderr.write(`${text}\n`);
  },
  warning(text: string): void {
    process.stderr.write(`${colours.yellow('warning')}: ${text}\n`);
  },
};

/**
 * Keeps a stream that takes no more from ending the work, whose results are files. A reader that has left
 * (`| head`) is no error; a result that could not be printed for another reason is one.
 */
export function guardOutput(): void {
  process.stderr.on('error', () => undefined); // there is nowhere left to say it
  process.stdout.once('error', (error: NodeJS.ErrnoException) => {
    process.stdout.on('error', () => undefined); // once is enough
    if (error.code === 'EPIPE') return;
    const reason = oneLine(error.message);
    const message = `the result could not be printed (${reason}): send stdout elsewhere and run the command again`;
    printError(new HardmineError('ERR_IO', message, { cause: error }), false);
    process.on('exit', () => {
      process.exitCode = EXIT.failed;
    });
  });
}

/** A command with --json, --debug and one worked example under its help. */
export function makeCommand(name: string, description: string, example: string): Command {
  return new Command(name)
    .description(description)
    .option('--json', 'print one JSON document on stdout')
    .option('--debug', 'print the stack of an error')
    .addHelpText('after', `\nExample:\n  $ ${example}`);
}

/** The exit code that an error stands for. */
export function exitCodeOf(error: unknown): number {
  if (!(error instanceof HardmineError)) return EXIT.failed;
  if (error.code === 'ERR_CONFIG') return EXIT.usage;
  return error.code === 'ERR_ABORTED' ? EXIT.interrupted : EXIT.failed;
}

export function printError(error: unknown, debug: boolean): void {
  const message = error instanceof Error ? error.message : String(error);
  process.stderr.write(`${colours.red('error')}: ${message}\n`);
  if (debug && error instanceof Error) {
    process.stderr.write(`${error.stack ?? ''}\n`);
    if (error.cause instanceof Error)
      process.stderr.write(`caused by ${error.cause.stack ?? ''}\n`);
  } else if (!(error instanceof HardmineError)) {
    process.stderr.write(
      'This is a defect of hardmine: run again with --debug and report the stack.\n',
    );
  }
}

/** Parsers of option values; commander shows the message beside the option's name. */
export function wholeNumber(least: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || !Number.isSafeInteger(value) || value < least) {
      throw new InvalidArgumentError(`Give a whole number from ${least} up.`);
    }
    return value;
  };
}

/** Rows as aligned columns; the first row is the heading. */
export function table(rows: readonly (readonly string[])[]): string {
  const widths: number[] = [];
  for (const row of rows) {
    for (const [i, cell] of row.entries()) widths[i] = Math.max(widths[i] ?? 0, cell.length);
  }
  return rows
    .map((row) =>
      row
        .map((cell, i) => (i === 0 ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!)))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

export const percent = (share: number): string => `${(100 * share).toFixed(2)}%`;

/** Tells on a terminal how far some work is. */
export function progressNote(what: string): (done: number, total: number) => void {
  return (done, total) => {
    if (process.stderr.isTTY) {
      process.stderr.write(`\r\x1b[K${done < total ? `${what} ${done} of ${total}` : ''}`);
    }
  };
}
