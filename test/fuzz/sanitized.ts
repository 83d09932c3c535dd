/** native.cpp as a process: the native readers under AddressSanitizer and UBSan. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Readable, Writable } from 'node:stream';
import { fileURLToPath } from 'node:url';
import { HardmineError } from '../../src/errors.js';

const ROOT = fileURLToPath(new URL('../..', import.meta.url));
const PROGRAM = join(ROOT, 'build/fuzz/native');
const SOURCES = ['test/fuzz/native.cpp', 'core/records.cpp', 'core/jpeg.cpp'];
/** More than an image and its pixels take; an allocation beyond it ends the process. */
const MAX_ALLOCATION_MIB = 64;

function compile(): void {
  mkdirSync(join(ROOT, 'build/fuzz'), { recursive: true });
  const args = [
    ...['-std=c++20', '-O1', '-g', '-fsanitize=address,undefined', '-fno-sanitize-recover=all'],
    ...['-I', '.', ...SOURCES, '-o', PROGRAM, '-ljpeg', '-lpthread'],
  ];
  const { status, stderr } = spawnSync(process.env['CXX'] ?? 'g++', args, {
    cwd: ROOT,
    encoding: 'utf8',
  });
  if (status !== 0) throw new Error(`test/fuzz/native.cpp does not compile:\n${stderr}`);
}

export class SanitizedReaders {
  readonly #process: ChildProcess;
  readonly #in: Writable;
  readonly #out: Readable;
  readonly #ended: Promise<never>;
  #wake: () => void = () => undefined;

  private constructor(what: string, folder: string) {
    this.#process = spawn(PROGRAM, what === 'records' ? [what, folder] : [what], {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: {
        ...process.env,
        ASAN_OPTIONS: `max_allocation_size_mb=${MAX_ALLOCATION_MIB}:detect_leaks=1`,
        UBSAN_OPTIONS: 'print_stacktrace=1',
      },
    });
    this.#in = this.#process.stdin!;
    this.#out = this.#process.stdout!;
    this.#in.on('error', () => undefined); // its end is told below
    // One listener for all inputs: a promise raced for each would keep what it waited for.
    for (const event of ['readable', 'end']) this.#out.on(event, () => this.#wake());
    let said = '';
    this.#process.stderr!.on('data', (data) => (said += data));
    this.#ended = new Promise((_, reject) => {
      this.#process.on('close', (status, signal) => {
        reject(new Error(`the native reader ended by ${signal ?? `status ${status}`}:\n${said}`));
      });
    });
    this.#ended.catch(() => undefined); // nobody may be waiting
  }

  static async start(what: 'records' | 'jpeg', folder: string): Promise<SanitizedReaders> {
    compile();
    return new SanitizedReaders(what, folder);
  }

  async read(blobs: readonly Buffer[]): Promise<void> {
    const chunks = blobs.flatMap((blob) => {
      const length = Buffer.alloc(4);
      length.writeUInt32LE(blob.length);
      return [length, blob];
    });
    this.#in.write(Buffer.concat(chunks));
    const length = (await this.#take(4)).readUInt32LE();
    if (length > 0) throw new HardmineError('ERR_DATA', (await this.#take(length)).toString());
  }

  async stop(): Promise<void> {
    this.#in.end();
    await this.#ended.catch((error: Error) => {
      if (!error.message.includes('status 0')) throw error;
    });
  }

  async #take(bytes: number): Promise<Buffer> {
    for (;;) {
      const found = this.#out.read(bytes) as Buffer | null;
      if (found?.length === bytes) return found;
      if (this.#out.readableEnded) return this.#ended;
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }
}
