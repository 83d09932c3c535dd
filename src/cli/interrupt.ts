import { EXIT, output } from './command.js';

export interface Interrupt extends Disposable {
  readonly signal: AbortSignal;
  /** As a Ctrl-C. */
  stop(): void;
}

/** The first Ctrl-C (or SIGTERM) stops the work in an orderly way, the second one ends at once. */
export function stopOnInterrupt(whatHappens: string): Interrupt {
  const controller = new AbortController();
  const stop = (): void => {
    if (controller.signal.aborted) process.exit(EXIT.interrupted);
    output.note(`\nstopping: ${whatHappens}; once more ends at once`);
    controller.abort();
  };
  process.on('SIGINT', stop);
  process.on('SIGTERM', stop);
  return {
    signal: controller.signal,
    stop,
    [Symbol.dispose](): void {
      process.off('SIGINT', stop);
      process.off('SIGTERM', stop);
    },
  };
}
