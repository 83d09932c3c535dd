/** File operations that fail on demand: those of node:fs/promises, under every module that uses it. */
import fs, { type FileHandle } from 'node:fs/promises';
import { syncBuiltinESMExports } from 'node:module';

/**
 * How an operation fails: refused, with nothing done; done and then reported as failed; for a write,
 * after half of its bytes.
 */
export type Fault = 'refused' | 'done' | 'short';

export interface FaultPlan {
  fault: Fault;
  /** Which operation fails, counted from 0. */
  at: number;
  /** All after it fail too: the disk is gone. */
  onwards: boolean;
}

const ERRORS = { refused: 'ENOSPC', done: 'EIO', short: 'ENOSPC' } as const;

function failure(fault: Fault, syscall: string): NodeJS.ErrnoException {
  const code = ERRORS[fault];
  return Object.assign(new Error(`${code}: planted fault, ${syscall}`), { code, syscall });
}

/**
 * Runs `work` while its operations that change the disk (open, write, sync, close, mkdir, rename, rm)
 * are counted and fail as `plan` says.
 *
 * @returns the operations counted, by name, and what `work` rejected with
 */
export async function withFaults(
  plan: FaultPlan,
  work: () => Promise<unknown>,
): Promise<{ operations: string[]; error: unknown }> {
  const operations: string[] = [];
  const step = async <T>(name: string, run: () => Promise<T>, half?: () => Promise<unknown>) => {
    const number = operations.push(name) - 1;
    const fails = number === plan.at || (plan.onwards && number > plan.at);
    if (!fails) return run();
    if (plan.fault === 'done') await run();
    if (plan.fault === 'short') await half?.();
    throw failure(plan.fault, name);
  };
  const guard = (file: FileHandle): FileHandle => {
    const { writeFile, close } = file;
    file.writeFile = (data, options) =>
      step(
        'write',
        () => writeFile.call(file, data, options),
        () => {
          const bytes = Buffer.from(data as Uint8Array);
          return writeFile.call(file, bytes.subarray(0, bytes.length >> 1));
        },
      );
    // Nothing here cuts the power: a flush is counted and may fail, and costs no time.
    file.sync = () => step('sync', async () => undefined);
    file.close = async () => {
      try {
        await step('close', () => close.call(file));
      } finally {
        await close.call(file); // a descriptor that stays open would be the test's own leak
      }
    };
    return file;
  };
  const real = { open: fs.open, mkdir: fs.mkdir, rename: fs.rename, rm: fs.rm };
  fs.open = async (...args) => {
    const opened: FileHandle[] = [];
    try {
      return await step('open', async () => {
        const file = await real.open(...args);
        opened.push(file);
        return guard(file);
      });
    } catch (error) {
      for (const file of opened) await file.close();
      throw error;
    }
  };
  Object.assign(fs, {
    mkdir: (...args: Parameters<typeof real.mkdir>) => step('mkdir', () => real.mkdir(...args)),
  });
  fs.rename = (...args) => step('rename', () => real.rename(...args));
  fs.rm = (...args) => step('rm', () => real.rm(...args));
  syncBuiltinESMExports();
  try {
    await work();
    return { operations, error: null };
  } catch (error) {
    return { operations, error };
  } finally {
    Object.assign(fs, real);
    syncBuiltinESMExports();
  }
}
