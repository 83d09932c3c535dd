// The native unit tests (test/native, doctest): one mocha test for each executable that CMake built.
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { skip } from './helpers/skip.js';

const BUILD = fileURLToPath(new URL('../build', import.meta.url));

interface NativeTest {
  name: string;
  command: string[];
}

/** What CMake says there is to run; empty without a build that has them. */
function nativeTests(): NativeTest[] {
  const listing = spawnSync('ctest', ['--test-dir', BUILD, '--show-only=json-v1'], {
    encoding: 'utf8',
  });
  if (listing.status !== 0) return [];
  const { tests } = JSON.parse(listing.stdout) as { tests: Partial<NativeTest>[] };
  return tests.map(({ name = '', command = [] }) => ({ name, command }));
}

function execute([path = '', ...args]: string[]): Promise<{ code: number | null; output: string }> {
  return new Promise((resolve, reject) => {
    const child = spawn(path, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    let output = '';
    const collect = (chunk: Buffer): void => {
      output += chunk.toString();
    };
    child.stdout.on('data', collect);
    child.stderr.on('data', collect);
    child.on('error', reject);
    child.on('close', (code, signal) =>
      resolve({ code, output: signal === null ? output : `${output}\nended by ${signal}` }),
    );
  });
}

describe('native unit tests', () => {
  const tests = nativeTests();
  if (tests.length === 0) {
    it('are built', function () {
      skip(this, 'the native tests are not built: `npm test` builds them');
    });
  }
  // All at once: each leaves a core idle part of the time.
  const ends = new Map<string, ReturnType<typeof execute>>();
  before(() => {
    for (const { name, command } of tests) {
      if (!existsSync(command[0] ?? '')) continue;
      const end = execute([...command, '--no-colors=true']);
      end.catch(() => undefined); // awaited by its test
      ends.set(name, end);
    }
  });
  for (const { name, command } of tests) {
    it(name, async function () {
      this.timeout(600_000); // the longest compares whole networks with double references
      const end = ends.get(name);
      assert.ok(end !== undefined, `${command[0]} was not built`);
      const { code, output } = await end;
      assert.equal(code, 0, `\n${output}`);
      const counts = /test cases:\s*(\d+) \|.*\n.*assertions:\s*(\d+) \|/.exec(output);
      assert.ok(counts !== null && Number(counts[1]) > 0, `no test case ran:\n${output}`);
      if (this.test) this.test.title = `${name}: ${counts[1]} cases, ${counts[2]} assertions`;
    });
  }
});
