// mocha's reporter for `npm test`: each test as it ends, then the skips (helpers/skip.ts puts the reason
// into the title), the failures with their differences, and as the last line exactly
// `N passed, N failed, N skipped`.

import Mocha from 'mocha';

const { Base, Spec } = Mocha.reporters;
const { EVENT_RUN_END, EVENT_TEST_PENDING } = Mocha.Runner.constants;

export default class Reporter extends Spec {
  #skipped = [];

  constructor(runner, options) {
    super(runner, options);
    runner.on(EVENT_TEST_PENDING, (test) => this.#skipped.push(test));
    runner.on(EVENT_RUN_END, () => this.conclude());
  }

  /** Spec's own epilogue is replaced by conclude(). */
  epilogue() {}

  conclude() {
    if (this.#skipped.length > 0) Base.consoleLog('Skipped:');
    for (const test of this.#skipped) {
      Base.consoleLog(`  ${test.fullTitle()}`);
    }
    if (this.failures.length > 0) Base.list(this.failures);
    const { passes, failures } = this.stats;
    Base.consoleLog(`${passes} passed, ${failures} failed, ${this.#skipped.length} skipped`);
  }
}
