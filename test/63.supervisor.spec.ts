import assert from 'node:assert/strict';
import { pauseMs, reasonToRestart } from '../src/cli/supervisor.js';

// test/soak/12 kills real runs.
describe('train --restarts', () => {
  it('pauses for longer each time, and not for what a restart does not mend', () => {
    const seconds = [1, 2, 3, 6, 7, 8, 1000].map((restart) => pauseMs(restart) / 1000);
    assert.deepEqual(seconds, [1, 2, 4, 32, 60, 60, 60]);
    const failed = { exitCode: 1, signal: null };
    assert.match(
      reasonToRestart({ exitCode: null, signal: 'SIGSEGV', report: null })!,
      /ended by SIGSEGV/,
    );
    assert.match(reasonToRestart({ ...failed, report: null })!, /crashed/);
    assert.match(reasonToRestart({ ...failed, report: { code: 'ERR_DEVICE_LOST' } })!, /lost/);
    for (const code of ['ERR_DATA', 'ERR_NON_FINITE', 'ERR_IO', 'ERR_CHECKPOINT'] as const) {
      assert.equal(reasonToRestart({ ...failed, report: { code } }), null, code);
    }
    for (const exitCode of [0, 2, 130]) {
      assert.equal(reasonToRestart({ exitCode, signal: null, report: null }), null);
    }
  });
});
