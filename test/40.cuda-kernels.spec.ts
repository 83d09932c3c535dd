// The CUDA sources under nvcc, where it is: they compile without a warning and no kernel spills
// registers. What the kernels compute is tested by test_simt (05.native.spec.ts), without nvcc.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { skip } from './helpers/skip.js';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const hasNvcc = spawnSync('nvcc', ['--version']).status === 0;

const ARCHITECTURES = ['80', '90'];

describe('CUDA kernels under nvcc', () => {
  for (const [source, least] of [
    ['test/gpu/compile_head.cu', 40],
    ['test/gpu/compile_network.cu', 100],
    ['cuda/embedder.cu', 6],
  ] as const) {
    it(`${source} compiles for sm_${ARCHITECTURES.join(' and sm_')} without a warning, a spill or an exit`, function () {
      if (!hasNvcc) skip(this, 'nvcc is not installed');
      this.timeout(300_000); // three operand types, on two cores with other work
      const folder = mkdtempSync(join(tmpdir(), 'hardmine-nvcc-'));
      try {
        const { status, stdout, stderr } = spawnSync(
          'nvcc',
          [
            ...['-std=c++20', '-I', ROOT, '--expt-relaxed-constexpr', '--threads', '2'],
            ...ARCHITECTURES.flatMap((number) => [
              '-gencode',
              `arch=compute_${number},code=sm_${number}`,
            ]),
            ...['-Werror', 'all-warnings', '-Xptxas', '-v,-warn-spills'],
            ...['-c', join(ROOT, source), '-o', join(folder, 'kernels.o')],
          ],
          { encoding: 'utf8' },
        );
        assert.equal(status, 0, stdout + stderr);
        const spills = [...stderr.matchAll(/(\d+) bytes spill stores, (\d+) bytes spill loads/g)];
        assert.ok(
          spills.length >= least * ARCHITECTURES.length,
          `ptxas reported ${spills.length} kernels:\n${stderr}`,
        );
        for (const [line, stores, loads] of spills) {
          assert.ok(stores === '0' && loads === '0', line);
        }
        // Where a host template calls a __device__ function, nvcc compiles exit(1), without a word.
        const symbols = spawnSync('nm', ['-u', join(folder, 'kernels.o')], { encoding: 'utf8' });
        assert.match(symbols.stdout, /\bcudaLaunchKernelExC\b/);
        assert.doesNotMatch(symbols.stdout, /\b_?exit\b/);
      } finally {
        rmSync(folder, { recursive: true, force: true });
      }
    });
  }
});
