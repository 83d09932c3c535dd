import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import {
  appendFile,
  copyFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  symlink,
  truncate,
  utimes,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import sharp from 'sharp';
import { type AlignFolderOptions, alignFolder } from '../src/align/align-folder.js';
import { exportNetworks } from '../src/align/mtcnn-weights.js';
import { faceTemplate, type Point } from '../src/align/similarity.js';
import { openAligner } from '../src/cli/align-options.js';
import { RandomStream } from '../src/data/random.js';
import { HardmineError } from '../src/errors.js';
import type { TensorMap } from '../src/formats/safetensors.js';
import { FaceModel, writeModel } from '../src/model.js';
import { loadAddon } from '../src/native.js';
import { MAIN } from './helpers/built.js';
import { readNpy } from './helpers/npy.js';
import { shared } from './helpers/skip.js';

const HEADER =
  'image\tleft_eye_x\tleft_eye_y\tright_eye_x\tright_eye_y\tnose_x\tnose_y\tleft_mouth_x\tleft_mouth_y\tright_mouth_x\tright_mouth_y';

const start = (argv: readonly string[], ...node: string[]): ChildProcess =>
  spawn(process.execPath, [...node, MAIN, ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });

const hardmine = (...argv: string[]) => finish(start(argv));

/** A module hook that finds no onnxruntime-node. */
const WITHOUT_ONNX_RUNTIME = `--import=data:text/javascript,${encodeURIComponent(
  `import { register } from 'node:module';
   register('data:text/javascript,' + encodeURIComponent(\`
     export async function resolve(name, context, next) {
       if (name === 'onnxruntime-node') throw new Error('there is no such package');
       return next(name, context);
     }\`));`,
)}`;

async function finish(child: ChildProcess) {
  let [stdout, stderr] = ['', ''];
  child.stdout!.on('data', (chunk: Buffer) => {
    stdout += chunk.toString();
  });
  child.stderr!.on('data', (chunk: Buffer) => {
    stderr += chunk.toString();
  });
  const code = await new Promise<number | null>((resolve, reject) => {
    child.on('error', reject);
    child.on('close', resolve);
  });
  return { code, stdout, stderr };
}

/** Everything below a folder, hidden files too, with '/' behind folders' names left out. */
async function tree(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  return entries
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).slice(folder.length + 1))
    .sort();
}

describe('hardmine align', function () {
  this.timeout(300_000); // seconds when alone; the suite may share its cores
  let folder: string;
  const at = (...names: string[]) => join(folder, ...names);

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-align-'));
  });
  afterEach(() => rm(folder, { recursive: true, force: true }));

  /** A photograph: a grey ramp to the right. */
  async function draw(path: string, width = 130, height = 120): Promise<void> {
    const pixels = Uint8Array.from(
      { length: width * height * 3 },
      (_, i) => Math.floor(i / 3) % width,
    );
    await mkdir(dirname(path), { recursive: true });
    const image = sharp(pixels, { raw: { width, height, channels: 3 } });
    await (path.endsWith('.png') ? image.png() : image.jpeg({ quality: 100 })).toFile(path);
  }

  /** Landmarks that cut out the part of an image that begins at (x, y). */
  const landmarksAt = (x: number, y: number): Point[] =>
    faceTemplate('112x112').map((point) => ({ x: point.x + x, y: point.y + y }));

  const line = (name: string, points: readonly Point[], separator = '\t') =>
    [name, ...points.flatMap((point) => [point.x, point.y])].join(separator);

  async function writeList(lines: readonly string[], name = 'list.tsv'): Promise<string> {
    await writeFile(at(name), `${lines.join('\n')}\n`);
    return at(name);
  }

  const align = (options: AlignFolderOptions, input = at('in'), out = at('out')) =>
    alignFolder(input, out, options);

  function refused(promise: Promise<unknown>, code: string, pattern: RegExp): Promise<void> {
    return assert.rejects(promise, (error: unknown) => {
      assert.ok(error instanceof HardmineError, String(error));
      assert.equal(error.code, code, error.message);
      assert.match(error.message, pattern);
      assert.doesNotMatch(error.message, /\n/);
      return true;
    });
  }

  it('cuts out what a list says, into the same places', async () => {
    await draw(at('in', 'b', 'one.jpg'));
    await draw(at('in', 'b', 'deep', 'er', 'two.PNG'.toLowerCase()));
    await draw(at('in', 'a b.jpeg'));
    await writeFile(at('in', 'notes.txt'), 'no image');
    await writeFile(at('in', '.DS_Store'), 'hidden');
    const given: [string, Point[]][] = [
      ['a b.jpeg', landmarksAt(3, 1)],
      ['b/deep/er/two.png', landmarksAt(10, 5)],
      ['b/one.jpg', landmarksAt(0, 0)],
      ['elsewhere.jpg', landmarksAt(0, 0)],
    ];
    const list = await writeList(given.map(([name, points]) => line(name, points)));
    const { imagesPerSecond, ...result } = await align({ landmarks: list });
    assert.ok(imagesPerSecond! > 0);
    assert.deepEqual(result, {
      images: 3,
      aligned: 3,
      earlier: 0,
      several: 0,
      fallback: [],
      withoutFace: [],
      otherFiles: ['notes.txt'],
      size: '112x112',
      landmarks: at('out', 'landmarks.tsv'),
    });
    assert.deepEqual(await tree(at('out')), [
      ...['a b.jpg', 'align.jsonl', 'b/deep/er/two.jpg', 'b/one.jpg', 'landmarks.tsv'],
    ]);
    for (const [name, left] of [
      ['a b.jpg', 3],
      ['b/deep/er/two.jpg', 10],
      ['b/one.jpg', 0],
    ] as const) {
      const crop = sharp(at('out', name));
      const { width, height, format, chromaSubsampling } = await crop.metadata();
      assert.deepEqual([width, height, format, chromaSubsampling], [112, 112, 'jpeg', '4:4:4']);
      const pixels = await crop.raw().toBuffer();
      for (const x of [0, 50, 111]) {
        // JPEG at quality 100, twice.
        assert.ok(Math.abs(pixels[3 * (112 * 60 + x)]! - (left + x)) <= 3, `${name} at ${x}`);
      }
    }
    // What is written is read again: header, order, landmarks.
    const written = (await readFile(at('out', 'landmarks.tsv'), 'utf8')).split('\n');
    assert.equal(written[0], HEADER);
    assert.deepEqual(
      written.slice(1, -1).map((row) => row.split('\t')[0]),
      ['a b.jpeg', 'b/deep/er/two.png', 'b/one.jpg'],
    );
    const again = await align({ landmarks: at('out', 'landmarks.tsv') }, at('in'), at('again'));
    assert.equal(again.aligned, 3);
    assert.equal(
      await readFile(at('again', 'landmarks.tsv'), 'utf8'),
      await readFile(at('out', 'landmarks.tsv'), 'utf8'),
    );
  });

  it("reads CelebA's list, and cuts 112x96", async () => {
    await draw(at('in', '000001.jpg'));
    await draw(at('in', '000002.jpg'));
    const list = await writeList([
      '2',
      'lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y',
      line('000001.jpg', landmarksAt(0, 0), '  '),
      line('000002.jpg', landmarksAt(2, 0), '  '),
    ]);
    const result = await align({ landmarks: list, size: '112x96' });
    assert.equal(result.aligned, 2);
    const { data, info } = await sharp(at('out', '000002.jpg'))
      .raw()
      .toBuffer({ resolveWithObject: true });
    assert.deepEqual([info.width, info.height], [96, 112]);
    // Eight columns less on each side.
    assert.ok(Math.abs(data[3 * 96 * 60]! - 10) <= 3, String(data[3 * 96 * 60]));
  });

  it('takes a single image, and turns it first as its camera says', async () => {
    await draw(at('upright.png'), 130, 120);
    await sharp(at('upright.png')).rotate(270).withMetadata({ orientation: 6 }).toFile(at('p.png'));
    const list = await writeList([HEADER, line('p.png', landmarksAt(7, 0))]);
    const result = await align({ landmarks: list }, at('p.png'));
    assert.deepEqual([result.images, result.aligned], [1, 1]);
    const pixels = await sharp(at('out', 'p.jpg')).raw().toBuffer();
    assert.ok(Math.abs(pixels[3 * 112 * 60]! - 7) <= 3);
  });

  it('refuses lists that are wrong, naming the line, before anything is written', async () => {
    await draw(at('in', 'a.jpg'));
    const good = line('a.jpg', landmarksAt(0, 0));
    const bad = (lines: string[], pattern: RegExp) =>
      writeList(lines).then((landmarks) => refused(align({ landmarks }), 'ERR_DATA', pattern));
    await bad(
      [HEADER, good, line('../a.jpg', landmarksAt(0, 0))],
      /line 3: the image "\.\.\/a\.jpg"/,
    );
    await bad([line('/etc/a.jpg', landmarksAt(0, 0))], /line 1: the image "\/etc\/a\.jpg"/);
    await bad([good, good], /line 2: the image "a\.jpg" is listed twice/);
    await bad([HEADER, `${good}\t5`], /line 2: found "a\.jpg/);
    await bad([good.replace(/\t[^\t]*$/, '')], /line 1: found "a\.jpg/);
    await bad([good.replace(/\t[^\t]*$/, '\tNaN')], /line 1: found "a\.jpg/);
    await bad([good.replace(/\t[^\t]*$/, '\t')], /line 1: found "a\.jpg/);
    await bad([HEADER], /list\.tsv lists no image/);
    await bad([''], /list\.tsv lists no image/);
    await bad([HEADER, line('b.jpg', landmarksAt(0, 0))], /lacks 1 of the 1 images of .*a\.jpg/);
    await bad(['\0\x01\x02'], /line 1: found/);
    await assert.rejects(stat(at('out')), { code: 'ENOENT' });
    const same = await writeList([
      line(
        'a.jpg',
        faceTemplate('112x112').map(() => ({ x: 4, y: 4 })),
      ),
    ]);
    await refused(align({ landmarks: same }), 'ERR_DATA', /landmarks of .*a\.jpg .*span no face/);
    assert.deepEqual(await tree(at('out')), ['align.jsonl', 'landmarks.tsv']);
    await refused(align({ landmarks: at('none.tsv') }), 'ERR_IO', /none\.tsv could not be read/);
  });

  it('refuses folders that it cannot align from or into', async () => {
    await draw(at('in', 'a.jpg'));
    const landmarks = await writeList([line('a.jpg', landmarksAt(0, 0))]);
    await refused(align({ landmarks }, at('absent')), 'ERR_IO', /absent could not be read/);
    await mkdir(at('empty'));
    await refused(align({ landmarks }, at('empty')), 'ERR_DATA', /empty holds no \.jpg/);
    await refused(align({ landmarks }, at('in'), at('in', 'out')), 'ERR_CONFIG', /lies in/);
    await refused(align({ landmarks }, at('in'), at('in')), 'ERR_CONFIG', /lies in/);
    await symlink(at('in'), at('link'));
    await refused(align({ landmarks }, at('in'), at('link', 'x', 'y')), 'ERR_CONFIG', /lies in/);
    await refused(align({ landmarks }, at('in'), at('list.tsv')), 'ERR_IO', /list\.tsv/);
    await refused(
      align({ landmarks }, at('in'), '/proc/hardmine/out'),
      'ERR_IO',
      /\/proc\/hardmine/,
    );
    await mkdir(at('mine'));
    await writeFile(at('mine', 'a.jpg'), 'precious');
    await refused(align({ landmarks }, at('in'), at('mine')), 'ERR_CONFIG', /did not write/);
    assert.equal(await readFile(at('mine', 'a.jpg'), 'utf8'), 'precious');
    await refused(align({}), 'ERR_CONFIG', /--mtcnn DIR or --landmarks FILE.*facenet.*src\/align/);
    await refused(align({ landmarks, mtcnn: folder }), 'ERR_CONFIG', /one of the two/);

    await draw(at('in', 'a.png'));
    await refused(align({ landmarks }), 'ERR_DATA', /a\.jpg and a\.png .* both become a\.jpg/);
    await rm(at('in', 'a.png'));
    await symlink(at('list.tsv'), at('in', 'outside.jpg'));
    await refused(align({ landmarks }), 'ERR_DATA', /outside\.jpg is a symbolic link that leaves/);
    await rm(at('in', 'outside.jpg'));
    await mkdir(at('in', 'sub'));
    await symlink(at('in'), at('in', 'sub', 'loop'));
    await refused(align({ landmarks }), 'ERR_DATA', /loop is a symbolic link/);
    await rm(at('in', 'sub', 'loop'));
    await mkdir(at('in', 'sub', 'deep'));
    await symlink(at('in', 'sub'), at('in', 'sub', 'deep', 'loop'));
    await refused(
      align({ landmarks }),
      'ERR_DATA',
      /loop is a symbolic link to a folder that holds it/,
    );
    await assert.rejects(stat(at('out')), { code: 'ENOENT' });
  });

  it('does what can be done, tells what cannot, and does only that again', async () => {
    const names = ['a.jpg', 'b.jpg', 'c.jpg', 'd/e.png'];
    for (const name of names) await draw(at('in', name));
    await writeFile(at('in', 'b.jpg'), 'a text that is called .jpg');
    const landmarks = await writeList(names.map((name) => line(name, landmarksAt(0, 0))));
    await refused(align({ landmarks }), 'ERR_DATA', /^[^ ]*b\.jpg is not a JPEG or PNG image/);
    const crops = ['a.jpg', 'align.jsonl', 'c.jpg', 'd/e.jpg', 'landmarks.tsv'];
    assert.deepEqual(await tree(at('out')), crops);
    // A header that says 65,500 x 65,500.
    const bomb = await readFile(at('in', 'a.jpg'));
    const frame = bomb.indexOf(Buffer.from([0xff, 0xc0]));
    bomb.writeUInt16BE(65_500, frame + 5);
    bomb.writeUInt16BE(65_500, frame + 7);
    await writeFile(at('in', 'c.jpg'), bomb);
    await refused(align({ landmarks }), 'ERR_DATA', /2 of the 4 images of .*; the first: .*b\.jpg/);
    await writeFile(at('in', 'b.jpg'), await readFile(at('in', 'a.jpg')));
    await refused(align({ landmarks }), 'ERR_DATA', /c\.jpg is 65500x65500 pixels/);
    await draw(at('in', 'c.jpg'));
    const result = await align({ landmarks });
    assert.deepEqual([result.images, result.aligned, result.earlier], [4, 4, 3]);
    const { imagesPerSecond } = await align({ landmarks });
    assert.equal(imagesPerSecond, null, 'nothing was left to do');
  });

  it('does again what has changed, and refuses other settings', async () => {
    for (const name of ['a.jpg', 'b.jpg', 'c.jpg']) await draw(at('in', name));
    const list = (...x: number[]) =>
      writeList(x.map((left, i) => line(`${'abc'[i]}.jpg`, landmarksAt(left, 0))));
    const landmarks = await list(1, 1, 1);
    await align({ landmarks });
    const left = async (name: string) => (await sharp(at('out', name)).raw().toBuffer())[0]!;
    await list(1, 9, 1);
    assert.equal((await align({ landmarks })).earlier, 2);
    assert.ok(Math.abs((await left('b.jpg')) - 9) <= 3);
    await rm(at('out', 'a.jpg'));
    await utimes(at('in', 'c.jpg'), 1, 1);
    assert.equal((await align({ landmarks })).earlier, 1);
    assert.ok(Math.abs((await left('a.jpg')) - 1) <= 3);
    await refused(
      align({ landmarks, size: '112x96' }),
      'ERR_CONFIG',
      /out was begun with --size 112x112 where it is 112x96 now/,
    );
    const journal = at('out', 'align.jsonl');
    const lines = (await readFile(journal, 'utf8')).split('\n');
    await writeFile(journal, [lines[0], '{"image": 3}', ...lines.slice(1)].join('\n'));
    await refused(align({ landmarks }), 'ERR_DATA', /align\.jsonl, line 2/);
    await writeFile(journal, '');
    await refused(align({ landmarks }), 'ERR_DATA', /align\.jsonl, line 1/);
  });

  it('goes on after it was killed, and leaves nothing half-written', async () => {
    const names = Array.from({ length: 200 }, (_, i) => `${i % 4}/${i}.jpg`);
    await draw(at('in', names[0]!), 900, 700);
    for (const name of names.slice(1)) {
      await mkdir(dirname(at('in', name)), { recursive: true });
      await copyFile(at('in', names[0]!), at('in', name));
    }
    const list = await writeList(names.map((name, i) => line(name, landmarksAt(i, i / 2))));
    const child = start(['align', at('in'), at('out'), '--landmarks', list]);
    const ended = new Promise((resolve) => child.on('close', resolve));
    const made = async () => (await tree(at('out')).catch(() => [])).filter((n) => n.endsWith('g'));
    while ((await made()).length < 5) await new Promise((resolve) => setTimeout(resolve, 5));
    child.kill('SIGKILL');
    await ended;
    const before = await made();
    assert.ok(before.length < names.length, 'it was killed in time');
    // What a process that is gone was writing, and half a line.
    await writeFile(at('out', '1', `.x.jpg.${child.pid}-1-0123abcd.tmp`), 'half');
    await appendFile(at('out', 'align.jsonl'), '{"image":"0/0.j');
    const times = new Map<string, number>();
    for (const name of before) times.set(name, (await stat(at('out', name))).mtimeMs);

    const result = await align({ landmarks: list });
    assert.deepEqual([result.images, result.aligned], [200, 200]);
    // A crop may have been in its place before its line was in the journal: at most one a lane.
    assert.ok(result.earlier >= before.length - 4, `${result.earlier} of ${before.length}`);
    let same = 0;
    for (const [name, time] of times) {
      if ((await stat(at('out', name))).mtimeMs === time) same += 1;
    }
    assert.ok(same >= before.length - 4);
    const whole = await align({ landmarks: list }, at('in'), at('whole'));
    assert.equal(whole.earlier, 0);
    assert.deepEqual(await tree(at('out')), await tree(at('whole')));
    for (const name of await tree(at('whole'))) {
      if (name === 'align.jsonl') continue; // its lines come in the order of the work
      assert.deepEqual(await readFile(at('out', name)), await readFile(at('whole', name)), name);
    }
  });

  it('stops when the caller says so, and goes on later', async () => {
    const names = Array.from({ length: 30 }, (_, i) => `${i}.jpg`);
    for (const name of names) await draw(at('in', name));
    const landmarks = await writeList(names.map((name) => line(name, landmarksAt(1, 1))));
    const controller = new AbortController();
    const stopping = align({
      landmarks,
      signal: controller.signal,
      onProgress: (done) => {
        if (done === 5) controller.abort();
      },
    });
    await refused(stopping, 'ERR_ABORTED', /aligning was stopped/);
    const result = await align({ landmarks });
    assert.ok(result.earlier >= 5 && result.earlier < 30, String(result.earlier));
    assert.equal(result.aligned, 30);
  });

  describe('with MTCNN', () => {
    let mtcnn: string;
    let photographs: string;
    before(function () {
      mtcnn = shared(this, 'mtcnn');
      photographs = shared(this, 'faces/lfw-raw150/images');
    });

    /** Two photographs of two people and one without a face. */
    async function copyPhotographs(): Promise<string[]> {
      const names = (await readdir(photographs)).sort().slice(0, 2);
      await mkdir(at('in', 'people'), { recursive: true });
      for (const name of names) await copyFile(join(photographs, name), at('in', 'people', name));
      await draw(at('in', 'ramp.jpg'));
      return names.map((name) => `people/${name}`);
    }

    it('finds faces, skips or falls back, and says so in JSON and in words', async () => {
      const names = await copyPhotographs();
      const said = await hardmine('align', at('in'), at('out'), '--mtcnn', mtcnn);
      assert.equal(said.code, 0, said.stderr);
      assert.match(said.stdout, /2 crops of 3 images, [\d.]+ a second/);
      assert.match(
        said.stdout,
        /found in 2 \(66\.67%\), more than one in \d .*, none in 1 \(33\.33%\)/,
      );
      assert.match(said.stdout, /no crop: ramp\.jpg/);
      assert.deepEqual(await tree(at('out')), ['align.jsonl', 'landmarks.tsv', ...names]);
      const back = [
        'align',
        at('in'),
        at('back'),
        '--mtcnn',
        mtcnn,
        '--fallback',
        'center',
        '--json',
      ];
      const { code, stdout, stderr } = await hardmine(...back);
      assert.equal(code, 0, stderr);
      const result = JSON.parse(stdout) as Record<string, unknown>;
      assert.deepEqual(
        [result['aligned'], result['fallback'], result['withoutFace']],
        [3, ['ramp.jpg'], []],
      );
      const listed = (await readFile(at('back', 'landmarks.tsv'), 'utf8')).trim().split('\n');
      assert.deepEqual(
        listed.map((row) => row.split('\t')[0]),
        ['image', ...names],
      );
    });

    it('says where to get the weights, and refuses damaged ones', async () => {
      await copyPhotographs();
      await mkdir(at('weights'));
      const weights = at('weights');
      await refused(
        align({ mtcnn: weights }),
        'ERR_DATA',
        /det1\.npy does not exist: .*facenet project .*src\/align .*MIT/,
      );
      await copyFile(join(mtcnn, 'det1.npy'), join(weights, 'det1.npy'));
      await copyFile(join(mtcnn, 'det3.npy'), join(weights, 'det3.npy'));
      await copyFile(join(mtcnn, 'det3.npy'), join(weights, 'det2.npy'));
      await refused(align({ mtcnn: weights }), 'ERR_FORMAT', /det2\.npy has .*conv1 where/);
      const { size } = await stat(join(mtcnn, 'det2.npy'));
      const whole = await readFile(join(mtcnn, 'det2.npy'));
      for (const length of [0, 5, 11, 60, 80, 90, 1000, size - 1]) {
        await writeFile(join(weights, 'det2.npy'), whole);
        await truncate(join(weights, 'det2.npy'), length);
        await refused(align({ mtcnn: weights }), 'ERR_FORMAT', /det2\.npy/);
      }
      await assert.rejects(stat(at('out')), { code: 'ENOENT' });
    });

    it('takes the networks as the ONNX files that export writes, and refuses others', async () => {
      await copyPhotographs();
      const onnx = at('onnx');
      assert.deepEqual(await exportNetworks(mtcnn, onnx), [
        join(onnx, 'det1.onnx'),
        join(onnx, 'det2.onnx'),
        join(onnx, 'det3.onnx'),
      ]);
      await align({ mtcnn });
      const landmarks = await readFile(at('out', 'landmarks.tsv'), 'utf8');
      assert.ok(landmarks.split('\n').length > 2);
      await rm(at('out'), { recursive: true });
      await align({ mtcnn: onnx });
      assert.equal(await readFile(at('out', 'landmarks.tsv'), 'utf8'), landmarks);
      await rm(at('out'), { recursive: true });
      await copyFile(join(onnx, 'det2.onnx'), join(onnx, 'det3.onnx'));
      await refused(
        align({ mtcnn: onnx }),
        'ERR_FORMAT',
        /det3\.onnx goes from image to .*export --mtcnn/,
      );
      await writeFile(join(onnx, 'det3.onnx'), 'no model');
      await refused(align({ mtcnn: onnx }), 'ERR_FORMAT', /det3\.onnx is no model/);
    });

    it('answers an image without a face and wrong usage with one sentence and its code', async () => {
      await draw(at('ramp.jpg'));
      const noFace = align({ mtcnn }, at('ramp.jpg'));
      await refused(noFace, 'ERR_DATA', /No face was found in [^ ]*ramp\.jpg: /);
      await writeFile(at('text.jpg'), 'a text that is called .jpg');
      await Promise.all(
        (
          [
            [1, /text\.jpg is not a JPEG or PNG/, at('text.jpg'), at('o2'), '--mtcnn', mtcnn],
            [2, /from 12 up/, at('ramp.jpg'), at('o5'), '--mtcnn', mtcnn, '--min-face', '5'],
            [2, /cannot be used with/, at('x'), at('o6'), '--landmarks', 'l', '--face', 'largest'],
          ] as const
        ).map(async ([expected, pattern, ...argv]) => {
          const { code, stdout, stderr } = await hardmine('align', ...argv);
          assert.equal(code, expected, stderr);
          assert.equal(stdout, '');
          assert.match(stderr, pattern);
          assert.equal(stderr.trim().split('\n').length, 1, stderr);
        }),
      );
    });

    it('says what to install where onnxruntime-node is missing', async () => {
      await draw(at('ramp.jpg'));
      const argv = ['align', at('ramp.jpg'), at('out'), '--mtcnn', mtcnn];
      const { code, stderr } = await finish(start(argv, WITHOUT_ONNX_RUNTIME));
      assert.equal(code, 1);
      assert.match(stderr, /^error: Finding faces needs onnxruntime-node, .*npm install [^\n]*\n$/);
      await assert.rejects(stat(at('out')), { code: 'ENOENT' });
    });

    it('serves embed and verify', async () => {
      const [name] = await copyPhotographs();
      const nodes = loadAddon('cpu').describeNetwork({
        architecture: 'resnet18',
        embedding: 8,
        embeddingBatchNorm: false,
      });
      const random = new RandomStream(1, 0);
      const tensors: TensorMap = new Map();
      const add = (key: string, shape: number[], spread: number, middle = 0) => {
        const length = shape.reduce((a, b) => a * b);
        const data = Float32Array.from({ length }, () => middle + spread * random.normal());
        tensors.set(key, { dtype: 'F32', shape, data });
      };
      for (const { op, name, inChannels, outChannels, kernel } of nodes) {
        const fan = inChannels * kernel * kernel;
        if (op === 'convolution')
          add(`${name}.weight`, [outChannels, inChannels, kernel, kernel], Math.sqrt(2 / fan));
        if (op === 'linear') {
          add(`${name}.weight`, [outChannels, inChannels], 0.1);
          add(`${name}.bias`, [outChannels], 0.1);
        }
        if (op !== 'batch_norm') continue;
        add(`${name}.weight`, [outChannels], 0, 0.7);
        for (const part of ['bias', 'running_mean']) add(`${name}.${part}`, [outChannels], 0.1);
        add(`${name}.running_var`, [outChannels], 0, 1);
      }
      await writeModel(at('m.safetensors'), tensors, { threshold: 0.5 });
      const more = ['--model', at('m.safetensors'), '--device', 'cpu'];
      const photograph = at('in', name!);
      const aligned = ['--align', '--mtcnn', mtcnn, ...more];
      const [embedded, without, verified] = await Promise.all([
        hardmine('embed', at('in', 'people'), '--out', at('a.npy'), ...aligned),
        hardmine('embed', photograph, at('in', 'ramp.jpg'), '--out', at('b.npy'), ...aligned),
        hardmine('verify', photograph, photograph, '--json', ...aligned),
      ]);
      assert.equal(embedded.code, 0, embedded.stderr);
      assert.equal(without.code, 1);
      assert.match(without.stderr, /^error: No face was found in .*ramp\.jpg: [^\n]*\n$/);
      assert.equal(verified.code, 0, verified.stderr);
      assert.equal((JSON.parse(verified.stdout) as { same: boolean }).same, true);
      await refused(openAligner({ align: true }), 'ERR_CONFIG', /--align needs .*facenet/);
      await refused(openAligner({ mtcnn }), 'ERR_CONFIG', /--mtcnn was given without --align/);
      assert.equal(await openAligner({}), null);
      // The crop that align writes embeds as the photograph does.
      await align({ mtcnn }, photograph);
      const model = await FaceModel.load(at('m.safetensors'), { device: 'cpu' });
      const cropped = await model.embed([at('out', basename(photograph))]);
      await model.dispose();
      const photographed = await readNpy(at('a.npy'));
      assert.deepEqual(photographed.shape, [2, 8]);
      const scale = Math.hypot(...cropped) / Math.sqrt(8);
      for (const [i, value] of cropped.entries()) {
        // The crop has been a JPEG of quality 100 meanwhile.
        assert.ok(Math.abs(photographed.data[i]! - value) <= 0.1 * scale);
      }
      await assert.rejects(stat(at('b.npy')), { code: 'ENOENT' });
    });
  });
});
