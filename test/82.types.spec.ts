// test/types/api.ts holds programs that must not compile. `npm run check` compiles it; this shows that it
// notices when a type is loosened.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { cp, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const ROOT = fileURLToPath(new URL('..', import.meta.url));

/** Types made wider, and what of api.ts the compiler then takes. */
const LOOSENED: [file: string, from: string, to: string, taken: string][] = [
  [
    'native.ts',
    "export type DeviceName = 'auto'",
    "export type DeviceName = string | 'auto'",
    'no such device',
  ],
  [
    'loss.ts',
    "| { kind: 'softmax' }\n",
    "| { kind: 'softmax'; scale?: number }\n",
    'softmax has no scale',
  ],
  [
    'loss.ts',
    "'knot-magnify'; gamma: number",
    "'knot-magnify'; gamma?: number",
    'Knot Magnify has no default',
  ],
  [
    'head.ts',
    'readonly bias?: undefined',
    'readonly bias?: Float32Array | undefined',
    'a bias belongs to weights',
  ],
  [
    'head.ts',
    'gradBias?: Float32Array',
    'gradBias: Float32Array',
    'only softmax has one, so it may be absent',
  ],
  [
    'train/data-source.ts',
    'readonly images: Uint8Array;',
    'readonly images: ArrayLike<number>;',
    '',
  ],
  [
    'train/data-source.ts',
    'readonly labels: Int32Array;',
    'readonly labels: ArrayLike<number>;',
    'a source gives typed arrays',
  ],
  ['model.ts', 'readonly info: Readonly<ModelInfo>', 'readonly info: ModelInfo', 'read-only'],
  [
    'evaluate/verification.ts',
    '  fold: ArrayLike<number>;',
    '  fold?: ArrayLike<number>;',
    'folds are needed',
  ],
  ['errors.ts', "  | 'ERR_INTERNAL'", "  | 'ERR_INTERNAL'\n  | 'ERR_OOPS'", 'no such code'],
];

/** Compiles `folder`'s api.ts; the @ts-expect-error lines without an error, by what they say. */
async function compile(folder: string): Promise<{ unused: string[]; others: string[] }> {
  const child = spawn(
    process.execPath,
    [join(ROOT, 'node_modules/typescript/bin/tsc'), '-p', join(folder, 'tsconfig.json')],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  let text = '';
  child.stdout.on('data', (chunk: Buffer) => {
    text += chunk.toString();
  });
  await new Promise((resolve) => child.on('close', resolve));
  const lines = (await readFile(join(folder, 'test/types/api.ts'), 'utf8')).split('\n');
  const errors = text.split('\n').filter((line) => line.includes(' error TS'));
  const unused: string[] = [];
  const others: string[] = [];
  for (const error of errors) {
    const at = /api\.ts\((\d+),\d+\): error TS2578/.exec(error);
    const said = at && /@ts-expect-error: (.*)/.exec(lines[Number(at[1]) - 1] ?? '');
    if (said) unused.push(said[1]!);
    else others.push(error);
  }
  return { unused, others };
}

describe('the types of the API', function () {
  this.timeout(300_000);
  let folder: string;
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-types-'));
    await cp(join(ROOT, 'src'), join(folder, 'src'), { recursive: true });
    await mkdir(join(folder, 'test'));
    await cp(join(ROOT, 'test/types'), join(folder, 'test/types'), { recursive: true });
    await cp(join(ROOT, 'package.json'), join(folder, 'package.json'));
    await symlink(join(ROOT, 'node_modules'), join(folder, 'node_modules'));
    const config = JSON.parse(await readFile(join(ROOT, 'tsconfig.json'), 'utf8')) as {
      compilerOptions: object;
    };
    const compilerOptions = { ...config.compilerOptions, rootDir: '.', noEmit: true };
    await writeFile(
      join(folder, 'tsconfig.json'),
      JSON.stringify({ compilerOptions, files: ['test/types/api.ts'] }),
    );
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('refuse wrong programs', async () => {
    assert.deepEqual(await compile(folder), { unused: [], others: [] });
  });

  it('are missed when they are loosened', async () => {
    for (const [file, from, to] of LOOSENED) {
      const path = join(folder, 'src', file);
      const text = await readFile(path, 'utf8');
      assert.equal(text.split(from).length, 2, `${file} has "${from}" once`);
      await writeFile(
        path,
        text.replace(from, () => to),
      );
    }
    const { unused } = await compile(folder);
    for (const [, from, , taken] of LOOSENED) {
      if (taken !== '') assert.ok(unused.includes(taken), `${from}: ${unused.join('; ')}`);
    }
  });
});
