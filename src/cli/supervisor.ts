/**
 * `train --restarts N`: the training runs in a child process, and when that ends as only a new process can
 * mend (a crash, a kill, a lost device) it goes on from the newest sound checkpoint.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { exists } from '../data/files.js';
import { type ErrorCode, HardmineError } from '../errors.js';
import { findCheckpoint } from '../train/checkpoint.js';
import { EXIT } from './command.js';

/** Tells a child that it is one. */
const MARK = 'HARDMINE_SUPERVISED';
/** The pause before a restart doubles from the first to the greatest: a device may need to recover. */
const FIRST_PAUSE_MS = 1000;
const GREATEST_PAUSE_MS = 60_000;

/** What a child says of the error that ends it. */
interface Report {
  code: ErrorCode;
}

/** How a child ended. */
interface End {
  exitCode: number | null;
  signal: NodeJS.Signals | null;
  /** Null: it could not say, or had nothing to. */
  report: Report | null;
}

export interface Restart {
  /** From 1, and of how many. */
  restart: number;
  restarts: number;
  reason: string;
  /** Steps of the checkpoint that training goes on from; 0: from the start. */
  step: number;
  pauseSeconds: number;
}

/** Whether this process trains under a supervisor; it stops, in an orderly way, when that is gone. */
export function isSupervised(): boolean {
  return process.env[MARK] !== undefined && process.channel !== undefined;
}

/** For a supervised process: calls `stop` when the supervisor has ended. */
export function whenAbandoned(stop: () => void): void {
  process.once('disconnect', stop);
  process.channel?.unref(); // the listener would keep a process alive that has done its work
}

/** For a supervised process: says of what kind the error is that ends it. */
export function reportFailure(error: unknown): void {
  if (error instanceof HardmineError) process.send?.({ code: error.code } satisfies Report);
}

/** The pause before restart number `restart`, counted from 1: 1 s, 2 s, 4 s and so on to 60 s. */
export function pauseMs(restart: number): number {
  return Math.min(GREATEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (restart - 1));
}

/**
 * Why a child that ended so may be started again, or null: what a new process would meet again (a wrong
 * configuration, bad data, a full disk, numbers that are not finite) is for a person to mend.
 */
export function reasonToRestart({ exitCode, signal, report }: End): string | null {
  if (signal !== null) return `it was ended by ${signal}`;
  if (report?.code === 'ERR_DEVICE_LOST') return 'its device was lost';
  // A failure of ours reports its code, so this one is a crash.
  return exitCode === EXIT.failed && report === null ? `it crashed (exit code ${exitCode})` : null;
}

/**
 * Runs this very command line in a child process, and again with --resume after an end that a restart can
 * mend, at most `restarts` times in all, whatever progress was made between them. Ctrl-C and SIGTERM are
 * passed on and end both.
 *
 * @returns the exit code of the last child
 * @throws HardmineError ERR_CHECKPOINT when no checkpoint is sound any more
 */
export async function supervise(
  { out, restarts }: { out: string; restarts: number },
  onRestart: (restart: Restart) => void,
): Promise<number> {
  const [, main, ...argv] = process.argv;
  const interrupted = new AbortController();
  let child: ChildProcess | null = null;
  const passOn = (signal: NodeJS.Signals): void => {
    interrupted.abort();
    child?.kill(signal);
  };
  process.on('SIGINT', passOn);
  process.on('SIGTERM', passOn);
  try {
    for (let restart = 1; ; restart++) {
      // The first one may have ended before there was anything to resume.
      const resume = restart > 1 && (await exists(join(out, 'config.json')));
      child = fork(main!, resume ? [...argv, '--resume'] : argv, {
        env: { ...process.env, [MARK]: '1' },
        // A session of its own: a terminal sends Ctrl-C to all processes of one, and twice means at once.
        detached: true,
      });
      const end = await endOf(child);
      child = null;
      const exitCode = end.exitCode ?? EXIT.failed;
      if (interrupted.signal.aborted) return end.exitCode ?? EXIT.interrupted;
      const reason = reasonToRestart(end);
      if (reason === null) return exitCode;
      if (restart > restarts) {
        throw new HardmineError(
          'ERR_INTERNAL',
          `training ended ${restart} times, the last time because ${reason}, and restarts is ${restarts}: look for the cause, then go on with --resume`,
        );
      }
      const { found } = await findCheckpoint(join(out, 'checkpoints'));
      const pause = pauseMs(restart);
      const step = found?.state.step ?? 0;
      onRestart({ restart, restarts, reason, step, pauseSeconds: pause / 1000 });
      await setTimeout(pause, null, { signal: interrupted.signal }).catch(() => undefined);
      if (interrupted.signal.aborted) return EXIT.interrupted;
    }
  } finally {
    process.off('SIGINT', passOn);
    process.off('SIGTERM', passOn);
  }
}

function endOf(child: ChildProcess): Promise<End> {
  return new Promise((resolve, reject) => {
    let report: Report | null = null;
    child.on('message', (message: Report) => {
      report = message;
    });
    child.on('error', reject);
    child.on('close', (exitCode, signal) => resolve({ exitCode, signal, report }));
  });
}
