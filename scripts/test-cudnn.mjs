// Asks the cuDNN of this machine whether it can run every convolution of ours on an H100, and counts
// the batch-norms that it has; no GPU and no CUDA toolkit are needed (test/gpu/cudnn_support.cpp).
// Needs g++ and cuDNN 9.11, in the loader's path, $CUDNN_ROOT or Python's nvidia packages; without
// cuDNN the last line is "skipped: ..." and the status 0. Opt-in: cuDNN is about a gigabyte.

import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('..', import.meta.url));

/** Runs a program in the repository; gives its exit status, 1 where it did not run or was ended. */
function run(program, args) {
  const { status, signal, error } = spawnSync(program, args, { cwd: ROOT, stdio: 'inherit' });
  if (error !== undefined) console.log(`${program} did not run: ${error.message}`);
  else if (signal !== null) console.log(`${program} was ended by ${signal}`);
  return status ?? 1;
}

const folder = mkdtempSync(join(tmpdir(), 'hardmine-cudnn-'));
try {
  const program = join(folder, 'cudnn_support');
  const compiled = run(process.env.CXX ?? 'g++', [
    ...['-std=c++20', '-O1', '-Wno-unknown-pragmas', '-isystem', 'test/simt/include'],
    '-DHARDMINE_VERSION="of no cache"',
    ...['-I', '.', 'test/gpu/cudnn_support.cpp', 'core/network.cpp'],
    ...['cuda/convolution.cpp', 'cuda/engines.cpp', 'cuda/libraries.cpp', 'cuda/norm_graph.cpp'],
    ...['cuda/runtime.cpp'],
    ...['-o', program, '-ldl', '-lpthread'],
  ]);
  process.exitCode =
    compiled === 0 ? run(program, [join('test', 'gpu', 'h100-deviceprop.json')]) : compiled;
} finally {
  rmSync(folder, { recursive: true });
}
