// Handles give back what they took: the slope of the memory over thousands of cycles, and the peak where
// the program leaves disposal to the garbage collector. Bars: reliability tests 14.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const PROGRAM = fileURLToPath(new URL('../helpers/handle-memory.ts', import.meta.url));

async function measure(kind: string, mode: 'cycles' | 'undisposed', n: number): Promise<number> {
  const flags = mode === 'cycles' ? ['--expose-gc', '--max-semi-space-size=1'] : [];
  const { stdout, stderr } = await promisify(execFile)(
    process.execPath,
    [...flags, '--import=tsx', PROGRAM, kind, mode, String(n)],
    { env: { ...process.env, ...(mode === 'cycles' && { MALLOC_ARENA_MAX: '1' }) } },
  );
  assert.equal(stderr, '');
  return Number(stdout);
}

describe('memory of handles', function () {
  this.timeout(1_800_000);
  for (const [kind, cycles] of [
    ['head', 2000],
    ['records', 2000],
    ['batches', 2000],
    ['embedder', 200], // each takes some 45 MB
  ] as const) {
    it(`${kind}: less than 1 KiB a cycle over ${cycles} cycles of create and dispose`, async function () {
      const bytes = await measure(kind, 'cycles', cycles);
      if (this.test) this.test.title += `: ${bytes.toFixed(0)} bytes`;
      // A page that is touched or not tells 4 KiB: of 200 cycles 5 pages make 100 bytes.
      assert.ok(bytes < 1024, `${bytes} bytes a cycle`);
    });
  }

  it('1,500 heads that nobody disposes peak below 200 MB above the base', async function () {
    const bytes = await measure('head', 'undisposed', 1500);
    if (this.test) this.test.title += `: ${(bytes / 1e6).toFixed(0)} MB`;
    assert.ok(bytes < 200e6, `${bytes / 1e6} MB`);
  });
});
