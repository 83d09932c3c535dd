// Every program in examples/, as `node examples/x.mjs` runs it without arguments.
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { finish, ROOT } from './helpers/built.js';

/** What an example prints, and that this is so. */
type Check = (lines: string[]) => void;

/** The numbers that a pattern's groups find in the one line that it matches. */
function numbers(lines: string[], pattern: RegExp): number[] {
  const found = lines.map((line) => pattern.exec(line)).filter((match) => match !== null);
  assert.equal(found.length, 1, `${pattern} in\n${lines.join('\n')}`);
  return found[0]!.slice(1).map(Number);
}

const near = (found: number, expected: number, tolerance: number): void =>
  assert.ok(Math.abs(found - expected) <= tolerance, `${found} where ${expected} is expected`);

const CHECKS: Record<string, Check> = {
  'train.mjs': (lines) => {
    // 12 people, of whom validation holds out the least number, 2.
    assert.deepEqual(numbers(lines, /^(\d+) images of (\d+) people/), [40, 10]);
    for (const epoch of [1, 2]) {
      const [loss] = numbers(lines, new RegExp(`^epoch ${epoch}: loss ([\\d.]+)$`));
      assert.ok(loss! > 0.5 && loss! < 20);
    }
    assert.equal(lines.filter((line) => /people held out: \d+\.\d% of pairs/.test(line)).length, 2);
    const [size, threshold] = numbers(lines, /embeddings of (\d+), .* cosine of (-?[\d.]+) on$/);
    assert.equal(size, 512);
    assert.ok(Math.abs(threshold!) <= 1);
  },
  'loss-settings.mjs': (lines) => {
    assert.equal(lines.length, 10);
    for (const line of lines) {
      const [before, after, , right] = numbers(
        [line],
        /base loss +([\d.]+) -> +([\d.]+) +right +(\d+)% -> +(\d+)%$/,
      );
      assert.ok(after! < before! / 2 && right! >= 95, line);
    }
  },
  'hard-mining-your-loss.mjs': (lines) => {
    for (const loss of [0.1, 0.5, 0.68, 0.8, 2, 8]) {
      const [weighted, factor] = numbers(
        lines,
        new RegExp(`^a loss of ${loss} counts as ([\\d.]+), its gradient ([\\d.]+) times$`),
      );
      // The paper's Equation 2, and its slope by a central difference.
      const law = (x: number) => (1.5 * x) / (1 + Math.exp(-35 * (1.1 * x - 0.75)));
      near(weighted!, law(loss), 0.0005);
      near(factor!, (law(loss + 1e-5) - law(loss - 1e-5)) / 2e-5, 0.001);
    }
    const [plain, none] = numbers(lines, /^without hard mining: (\d+) of 200 points right, (\d+)/);
    const [mined, silenced] = numbers(
      lines,
      /^with hard mining: +(\d+) of 200 points right, (\d+)/,
    );
    assert.equal(none, 0);
    assert.ok(plain! >= 190 && mined! >= plain! && silenced! > 150);
  },
  'data-source.mjs': (lines) => {
    for (const epoch of [1, 2]) {
      assert.ok(lines.includes(`epoch ${epoch} begins with sample 0`));
      const [steps, loss] = numbers(lines, new RegExp(`^epoch ${epoch}: (\\d+) steps, loss (.+)$`));
      // 48 images in batches of 16.
      assert.equal(steps, 3 * epoch);
      assert.ok(loss! > 0.5 && loss! < 20);
    }
  },
  'evaluate-your-way.mjs': (lines) => {
    for (const name of ['model', 'pixels']) {
      const [accuracy, pairs, auc, first] = numbers(
        lines,
        new RegExp(
          `^${name}: accuracy ([\\d.]+) over (\\d+) pairs, AUC ([\\d.]+), rank-1 ([\\d.]+)$`,
        ),
      );
      // 6 people with 3 pairs of each kind.
      assert.equal(pairs, 36);
      for (const share of [accuracy!, auc!, first!]) assert.ok(share >= 0 && share <= 1);
      // Of pixels nothing is random: above chance, which is 3 of 23.
      if (name === 'pixels') assert.ok(auc! > 0.5 && first! > 0.2);
    }
  },
  'nearest-faces.mjs': (lines) => {
    const [photo] = /(?<=^nearest to ).*(?= of 48 photos:$)/.exec(lines[0]!) ?? [];
    assert.equal(lines.length, 6);
    assert.equal(lines[1], `1.0000  ${photo}`);
    const similarities = lines.slice(1).map((line) => Number(line.split('  ')[0]));
    assert.deepEqual(
      similarities,
      [...similarities].sort((a, b) => b - a),
    );
    // Not all alike: the network tells images apart.
    assert.ok(similarities.at(-1)! < 0.999);
  },
  'verify.mjs': (lines) => {
    const similarities = lines.map((line) => {
      const match = /^(same person|different people): similarity (\S+), threshold 0.3000/.exec(
        line,
      );
      assert.ok(match, line);
      const similarity = Number(match[2]);
      assert.equal(match[1] === 'same person', similarity >= 0.3, line);
      return similarity;
    });
    assert.equal(similarities.length, 3);
    assert.equal(similarities[0], 1);
    assert.ok(similarities[2]! < 0.999);
  },
  'export-onnx.mjs': (lines) => {
    assert.match(lines[0]!, /model\.onnx: embeddings 4 x 512$/);
    const [least] = numbers(lines, /^least cosine with hardmine's own embeddings: ([\d.]+)$/);
    assert.ok(least! >= 0.9999);
  },
  'fused-against-unfused.mjs': (lines) => {
    const losses = ['fused', 'unfused'].map(
      (name) => numbers(lines, new RegExp(`^${name} +loss ([\\d.]+), [\\d.]+ ms$`))[0]!,
    );
    // Sums of 128 and 4000 fp32 terms in another order, behind a scale of 64.
    near(losses[0]!, losses[1]!, 1e-3);
    for (const name of ['gradEmbeddings', 'gradWeights']) {
      const [distance] = numbers(lines, new RegExp(`^${name} differ by (\\S+) of their length$`));
      assert.ok(distance! < 1e-3);
    }
  },
};

async function runExample(name: string, temporary: string): Promise<string[]> {
  const { code, stdout, stderr } = await finish(
    spawn(process.execPath, [join('examples', name)], {
      cwd: ROOT,
      env: { ...process.env, TMPDIR: temporary, NODE_OPTIONS: '' },
      stdio: ['ignore', 'pipe', 'pipe'],
    }),
  );
  assert.deepEqual({ code, stderr }, { code: 0, stderr: '' }, `${name}:\n${stdout}`);
  return stdout.trimEnd().split('\n');
}

describe('the examples', function () {
  this.timeout(600_000);
  let temporary: string;
  const ends = new Map<string, Promise<string[]>>();
  before(() => {
    temporary = mkdtempSync(join(tmpdir(), 'hardmine-examples-'));
    // Two at a time: each leaves a core idle while it starts and writes.
    const names = Object.keys(CHECKS);
    for (const [i, name] of names.entries()) {
      const earlier = ends.get(names[i - 2] ?? '') ?? Promise.resolve([]);
      const run = () => runExample(name, temporary);
      const end = earlier.then(run, run);
      end.catch(() => undefined); // awaited by its test
      ends.set(name, end);
    }
  });
  after(() => rmSync(temporary, { recursive: true, force: true }));

  it('are all run here', () => {
    const found = readdirSync(join(ROOT, 'examples')).filter((name) => name !== 'generated.mjs');
    assert.deepEqual(found.sort(), Object.keys(CHECKS).sort());
  });

  for (const [name, check] of Object.entries(CHECKS)) {
    it(name, async () => check(await ends.get(name)!));
  }

  it('say what they take where some of it is missing', () => {
    const incomplete = ['data-source', 'evaluate-your-way', 'nearest-faces', 'train', 'verify'];
    for (const name of incomplete.map((name) => `${name}.mjs`)) {
      const argv = [join(ROOT, 'examples', name), 'a'];
      const { status, stdout, stderr } = spawnSync(process.execPath, argv, { encoding: 'utf8' });
      assert.equal(status, 2, stderr);
      assert.equal(stdout, '');
      assert.ok(stderr.startsWith(`usage: node ${name} [`), stderr);
    }
  });

  it('leave nothing behind', () => {
    // ONNX Runtime keeps notes of its own in the temporary folder.
    const ours = readdirSync(temporary).filter((name) => name.startsWith('hardmine'));
    assert.deepEqual(ours, []);
  });
});
