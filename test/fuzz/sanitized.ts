/** native.cpp as a process: the native readers under AddressSanitizer and UBSan. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { HardmineError } from '../../src/errors.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const FOLDER = join(ROOT, 'build/fuzz');
const PROGRAM = join(FOLDER, 'native');
const SOURCES = ['test/fuzz/native.cpp', 'core/records.cpp', 'core/jpeg.cpp'];
/** More than an image and its pixels take; an allocation beyond it ends the process. */
const MAX_ALLOCATION_MIB = 64;

function compile(): void {
  const headers = readdirSync(join(ROOT, 'core')).map((name) => `core/${name}`);
  const written = Math.max(
    ...[...SOURCES, ...headers].map((name) => statSync(join(ROOT, name)).mtimeMs),
  );
  if (existsSync(PROGRAM) && statSync(PROGRAM).mtimeMs > written) return;
  mkdirSync(FOLDER, { recursive: true });
  const args = [
    ...['-std=c++20', '-O1', '-g', '-fsanitize=address,undefined', '-fno-sanitize-recover=all'],
    ...['-I', '.', ...SOURCES, '-o', PROGRAM, '-ljpeg', '-lpthread'],
  ];
  const compiler = process.env['CXX'] ?? 'g++';
  const { status, stderr } = spawnSync(compiler, args, { cwd: ROOT, encoding: 'utf8' });
  if (status !== 0) throw new Error(`test/fuzz/native.cpp does not compile:\n${stderr}`);
}

/** One process for many inputs, and another one when an input has ended it. */
export class SanitizedReaders {
  readonly #argv: readonly string[];
  #process: RunningReader | undefined;

  constructor(what: 'records' | 'jpeg', folder: string) {
    compile();
    this.#argv = what === 'records' ? [what, folder] : [what];
  }

  async read(blobs: readonly Buffer[]): Promise<void> {
    this.#process ??= new RunningReader(this.#argv);
    let sentence: string;
    try {
      sentence = await this.#process.read(blobs);
    } catch (error) {
      this.#process = undefined;
      throw error;
    }
    if (sentence !== '') throw new HardmineError('ERR_DATA', sentence);
  }

  /** @throws Error with what the leak check found */
  async stop(): Promise<void> {
    await this.#process?.stop();
  }
}

class RunningReader {
  readonly #process: ChildProcess;
  readonly #ended: Promise<Error | null>;
  #wake: () => void = () => undefined;

  constructor(argv: readonly string[]) {
    this.#process = spawn(PROGRAM, argv, {
      env: {
        ...process.env,
        ASAN_OPTIONS: `max_allocation_size_mb=${MAX_ALLOCATION_MIB}:detect_leaks=1`,
        UBSAN_OPTIONS: 'print_stacktrace=1',
      },
    });
    const { stdin, stdout, stderr } = this.#process;
    stdin!.on('error', () => undefined); // the end of the process tells it
    // One listener for all inputs: a promise raced for each would keep what it waited for.
    for (const event of ['readable', 'end']) stdout!.on(event, () => this.#wake());
    let said = '';
    stderr!.on('data', (data) => (said += data));
    this.#ended = new Promise((resolve) => {
      this.#process.on('close', (status, signal) => {
        const how = signal ?? `status ${status}`;
        resolve(status === 0 ? null : new Error(`the native reader ended by ${how}:\n${said}`));
      });
    });
  }

  /** @returns the sentence of the error; empty for a value */
  async read(blobs: readonly Buffer[]): Promise<string> {
    const chunks = blobs.flatMap((blob) => {
      const length = Buffer.alloc(4);
      length.writeUInt32LE(blob.length);
      return [length, blob];
    });
    this.#process.stdin!.write(Buffer.concat(chunks));
    const length = (await this.#take(4)).readUInt32LE();
    return length === 0 ? '' : (await this.#take(length)).toString();
  }

  async stop(): Promise<void> {
    this.#process.stdin!.end();
    const error = await this.#ended;
    if (error !== null) throw error;
  }

  async #take(bytes: number): Promise<Buffer> {
    const stdout = this.#process.stdout!;
    for (;;) {
      const found = stdout.read(bytes) as Buffer | null;
      if (found?.length === bytes) return found;
      if (stdout.readableEnded) throw (await this.#ended) ?? new Error('the native reader ended');
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }
}
