/** Skips that say why: `npm test` prints the reason of each above its last line. */
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import Mocha from 'mocha';

const ROOT = dirname(dirname(dirname(fileURLToPath(import.meta.url))));

/** Ends the running test (or, from a before hook, every test of its suite) as skipped. */
export function skip(context: Mocha.Context, reason: string): never {
  // The title is what a worker process of mocha's tells of a test, besides its outcome.
  const note = (test: Mocha.Runnable): void => {
    test.title += `: ${reason}`;
  };
  const running = context.test;
  if (running instanceof Mocha.Hook) running.parent?.eachTest(note);
  else if (running !== undefined) note(running);
  return context.skip();
}

/** The absolute path of shared test data (`faces/lfw`), or a skip where this machine has none. */
export function shared(context: Mocha.Context, path: string): string {
  const found = join(ROOT, '..', 'shared', path);
  return existsSync(found) ? found : skip(context, `../shared/${path} is not there`);
}
