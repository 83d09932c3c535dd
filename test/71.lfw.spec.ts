import assert from 'node:assert/strict';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import sharp from 'sharp';
import { HardmineError } from '../src/errors.js';
import { evaluateLfw, findImages, parseLfwPairs } from '../src/evaluate/lfw.js';
import { embedForPairs, pixelSimilarity, type ScoreModel } from '../src/evaluate/pairs.js';

const IMAGE_BYTES = 112 * 112 * 3;
const OFFICIAL = '../shared/faces/lfw-protocol';
const FACES = '../shared/faces/lfw';

const VIEW2 = [
  '2\t2',
  'Ann\t1\t2',
  'Ann\t1\t3',
  'Ann\t1\tBob\t1',
  'Ann\t2\tBob\t2',
  'Bob\t1\t2',
  'Bob\t1\t3',
  'Bob\t3\tCid\t1',
  'Ann\t3\tCid\t1',
];

/** A colour for each person, a slight change for each image. */
const PEOPLE: Record<string, [number, number, number]> = {
  Ann: [200, 40, 40],
  Bob: [40, 200, 40],
  Cid: [40, 40, 200],
};

function face(name: string, number: number, side = 112): Promise<Buffer> {
  const [r, g, b] = PEOPLE[name]!;
  const background = { r: r + number, g, b };
  return sharp({ create: { width: side, height: side, channels: 3, background } })
    .jpeg({ quality: 95 })
    .toBuffer();
}

/** Three numbers an image, its mean colour less 120; counts what it is given. */
class MeanColour implements ScoreModel {
  readonly embedding = 3;
  images = 0;
  mirrored = 0;

  async embed(images: Uint8Array | string[], { mirror = false } = {}): Promise<Float32Array> {
    assert.ok(images instanceof Uint8Array);
    const n = images.length / IMAGE_BYTES;
    const out = new Float32Array(n * 3);
    for (let i = 0; i < images.length; i++) {
      out[Math.floor(i / IMAGE_BYTES) * 3 + (i % 3)]! += (images[i]! - 120) / (112 * 112);
    }
    if (mirror) this.mirrored += n;
    else this.images += n;
    return out;
  }
}

describe('parseLfwPairs', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  it('reads View 2 with its folds', () => {
    const list = parseLfwPairs(VIEW2.join('\n'));
    assert.equal(list.view, 2);
    assert.equal(list.folds, 2);
    assert.deepEqual(
      list.images.map(({ name, number }) => `${name} ${number}`),
      ['Ann 1', 'Ann 2', 'Ann 3', 'Bob 1', 'Bob 2', 'Bob 3', 'Cid 1'],
    );
    assert.deepEqual(
      list.pairs.map(({ a, b, same, fold }) => [a, b, same, fold]),
      [
        [0, 1, true, 0],
        [0, 2, true, 0],
        [0, 3, false, 0],
        [1, 4, false, 0],
        [3, 4, true, 1],
        [3, 5, true, 1],
        [5, 6, false, 1],
        [2, 6, false, 1],
      ],
    );
    assert.deepEqual(parseLfwPairs(`${VIEW2.join('\r\n')}\r\n\r\n`), list);
  });

  it('cuts View 1 into ten folds that hold both kinds', () => {
    const n = 23;
    const lines = [String(n)];
    for (let i = 1; i <= n; i++) lines.push(`Ann\t${i}\t${i + 1}`);
    for (let i = 1; i <= n; i++) lines.push(`Ann\t${i}\tBob\t${i}`);
    const { view, folds, pairs } = parseLfwPairs(lines.join('\n'));
    assert.deepEqual([view, folds, pairs.length], [1, 10, 46]);
    for (const same of [true, false]) {
      const kind = pairs.filter((pair) => pair.same === same).map(({ fold }) => fold);
      assert.deepEqual(
        kind,
        [...kind].sort((a, b) => a - b),
      );
      const sizes = Array.from({ length: 10 }, (_, f) => kind.filter((fold) => fold === f).length);
      assert.ok(
        sizes.every((size) => size === 2 || size === 3),
        String(sizes),
      );
    }
  });

  it('refuses everything else, naming the line', () => {
    const change = (line: number, text: string) =>
      VIEW2.map((old, i) => (i === line - 1 ? text : old)).join('\n');
    const refused: [string, RegExp][] = [
      ['', /line 1: found "", expected a whole number/],
      ['ten\t300', /line 1: found "ten"/],
      ['2\t2\t2', /line 1: found "2\\t2\\t2", expected "folds TAB pairs"/],
      ['1\t1\nAnn\t1\t2\nAnn\t1\tBob\t1', /line 1: found 1 fold/],
      ['9\nAnn\t1\t2', /line 1: found 9 pairs of each kind/],
      ['999999999\t999999999', /line 1: it announces \d+ pairs but 0 lines follow/],
      ['1e3\t2', /line 1: found "1e3"/],
      [VIEW2.slice(0, -1).join('\n'), /announces 8 pairs but 7 lines/],
      [`${VIEW2.join('\n')}\nAnn\t1\t2`, /announces 8 pairs but 9 lines/],
      [change(3, 'Ann\t1'), /line 3: found "Ann\\t1", expected "name number number"/],
      [change(3, ''), /line 3/],
      [change(4, 'Ann\t1\t2'), /line 4: .*"name number name number"/],
      [change(3, 'Ann\t1\t0'), /line 3: found "0"/],
      [change(3, 'Ann\t1\t-2'), /line 3: found "-2"/],
      [change(3, 'Ann\t1\t0x2'), /line 3: found "0x2"/],
      [change(3, 'Ann\t1\t99999999999999999999'), /line 3: found "9+"/],
      [change(3, 'Ann\t2\t2'), /line 3: it pairs an image with itself/],
      [change(4, 'Ann\t1\tAnn\t2'), /line 4: it gives "Ann" as two different people/],
      [change(6, '../etc\t1\t2'), /line 6: the name "..\/etc" is no plain folder name/],
      [change(6, '..\t1\t2'), /line 6: the name ".." is no plain folder name/],
      [change(6, 'a\\b\t1\t2'), /line 6: the name/],
      [change(6, 'a\0b\t1\t2'), /line 6: the name/],
      [change(8, `Ann\t1\t/${'x'.repeat(5000)}\t1`), /line 8: the name "\/x{79}\.\.\."/],
    ];
    for (const [text, message] of refused) {
      assert.throws(
        () => parseLfwPairs(text, 'list.txt'),
        (error: unknown) =>
          error instanceof HardmineError &&
          error.code === 'ERR_PROTOCOL' &&
          error.message.startsWith('list.txt, ') &&
          message.test(error.message),
        `${JSON.stringify(text.slice(0, 100))} against ${message}`,
      );
    }
  });

  it('reads the official lists', async function () {
    if (!existsSync(OFFICIAL)) {
      console.log(`      skipped: ${OFFICIAL} is not there`);
      return this.skip();
    }
    const read = async (name: string) =>
      parseLfwPairs(await readFile(join(OFFICIAL, name), 'utf8'), name);
    const view2 = await read('pairs.txt');
    assert.deepEqual(
      [view2.view, view2.folds, view2.pairs.length, view2.images.length],
      [2, 10, 6000, 7701],
    );
    for (let fold = 0; fold < 10; fold++) {
      const inFold = view2.pairs.filter((pair) => pair.fold === fold);
      assert.deepEqual([inFold.length, inFold.filter(({ same }) => same).length], [600, 300]);
    }
    assert.equal((await read('pairsDevTest.txt')).pairs.length, 1000);
    assert.equal((await read('pairsDevTrain.txt')).pairs.length, 2200);
    if (existsSync(FACES)) {
      const paths = await findImages(FACES, view2.images);
      assert.equal(new Set(paths).size, 7701);
    }
  });
});

describe('evaluateLfw', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  let root: string;
  const files = [
    ['Ann', 1],
    ['Ann', 2],
    ['Ann', 3],
    ['Bob', 1],
    ['Bob', 2],
    ['Bob', 3],
    ['Cid', 1],
  ] as const;
  const path = (name: string, number: number) =>
    join(root, name, `${name}_${String(number).padStart(4, '0')}.jpg`);

  beforeEach(async () => {
    root = await mkdtemp(join(tmpdir(), 'hardmine-lfw-'));
    for (const [name, number] of files) {
      await mkdir(dirname(path(name, number)), { recursive: true });
      await writeFile(path(name, number), await face(name, number));
    }
    await writeFile(join(root, 'pairs.txt'), VIEW2.join('\n'));
  });
  afterEach(() => rm(root, { recursive: true, force: true }));

  it('embeds every distinct image and its mirror image once, in batches', async () => {
    const model = new MeanColour();
    const progress: [number, number][] = [];
    const result = await evaluateLfw(model, {
      root,
      batch: 3,
      onProgress: (done, total) => progress.push([done, total]),
    });
    assert.deepEqual([model.images, model.mirrored], [7, 7]);
    assert.deepEqual(progress, [
      [3, 7],
      [6, 7],
      [7, 7],
    ]);
    assert.equal(result.accuracy.mean, 1);
    assert.equal(result.auc, 1);
    const { details, ...json } = result;
    assert.deepEqual(Object.keys(json).sort(), [
      ...['accuracy', 'auc', 'bootstrap95', 'confidence95', 'dataset', 'eer', 'flip', 'missing'],
      ...['pairs', 'protocol', 'score', 'tarAtFar', 'thresholds', 'valAtFar'],
    ]);
    assert.deepEqual([json.dataset, json.missing, json.pairs], ['lfw', 0, 8]);
    const worst = details.hardestImpostors[0]!;
    assert.match(details.paths[worst.a]!, /(Ann|Bob|Cid)_000\d\.jpg$/);
  });

  it('takes a .png where there is no .jpg', async () => {
    const png = await sharp(await face('Cid', 1))
      .png()
      .toBuffer();
    await rm(path('Cid', 1));
    await writeFile(path('Cid', 1).replace('.jpg', '.png'), png);
    const result = await evaluateLfw(new MeanColour(), { root });
    assert.equal(result.accuracy.mean, 1);
  });

  it('scores pixels as a baseline: mirrored means mirrored, means removed', async () => {
    const image = new Uint8Array(IMAGE_BYTES).fill(10);
    image[3 * 112 * 5] = 110; // red of the first pixel of row 5
    const plain = await pixelSimilarity.embed(image);
    const mirrored = await pixelSimilarity.embed(image, { mirror: true });
    const mean = 10 + 100 / IMAGE_BYTES;
    assert.equal(plain[3 * 112 * 5], Math.fround(110 - mean));
    assert.equal(mirrored[3 * (112 * 5 + 111)], Math.fround(110 - mean));
    assert.equal(mirrored[3 * 112 * 5], Math.fround(10 - mean));
    const result = await evaluateLfw(pixelSimilarity, { root });
    assert.equal(result.accuracy.mean, 1);
  });

  it('lists what is missing in one error, before anything is embedded', async () => {
    await rm(path('Ann', 2));
    await rm(join(root, 'Bob'), { recursive: true });
    const model = new MeanColour();
    await assert.rejects(evaluateLfw(model, { root }), (error: unknown) => {
      assert.ok(error instanceof HardmineError);
      assert.equal(error.code, 'ERR_PROTOCOL');
      assert.match(error.message, /^4 of 7 images are missing under /);
      assert.match(error.message, /Ann\/Ann_0002\.jpg, Bob\/Bob_0001\.jpg, /);
      return true;
    });
    assert.equal(model.images, 0);
    const many = Array.from({ length: 25 }, (_, i) => ({ name: 'Nobody', number: i + 1 }));
    await assert.rejects(
      findImages(root, many),
      /^HardmineError: 25 of 25 .*_0010\.jpg and 15 more; /,
    );
  });

  it('refuses an unreadable list, damaged images and other sizes', async () => {
    await assert.rejects(evaluateLfw(new MeanColour(), { root, pairs: join(root, 'no.txt') }), {
      code: 'ERR_PROTOCOL',
      message: /no\.txt could not be read/,
    });
    const good = await readFile(path('Bob', 3));
    const bad: [Buffer | string, RegExp][] = [
      ['no image at all', /Bob_0003\.jpg is not a JPEG or PNG image/],
      [good.subarray(0, good.length >> 1), /Bob_0003\.jpg cannot be decoded/],
      [await face('Bob', 3, 100), /Bob_0003\.jpg is 100x100 pixels .*hardmine align/],
    ];
    for (const [bytes, message] of bad) {
      await writeFile(path('Bob', 3), bytes);
      await assert.rejects(evaluateLfw(new MeanColour(), { root, batch: 2 }), {
        code: 'ERR_DATA',
        message,
      });
    }
  });

  it('aligns images where told how, and judges those without a face as two people', async () => {
    await writeFile(path('Ann', 2), await face('Ann', 2, 150));
    const align = (without: string) => async (file: string) => {
      if (file.endsWith(without)) return null;
      return new Uint8Array(await sharp(file).resize(112, 112).removeAlpha().raw().toBuffer());
    };
    const all = await evaluateLfw(new MeanColour(), { root, align: align('none') });
    assert.deepEqual([all.missing, all.accuracy.mean], [0, 1]);
    const result = await evaluateLfw(new MeanColour(), { root, align: align('Ann_0002.jpg') });
    assert.equal(result.missing, 1);
    // Of Ann's second image the genuine pair (0) is wrong now and the impostor pair (3) right.
    assert.deepEqual([...result.details.right], [0, 1, 1, 1, 1, 1, 1, 1]);
    assert.deepEqual([result.details.distances[0], result.details.distances[3]], [4, 4]);
    assert.ok(result.details.notes.some((note) => note.startsWith('No face was found in 1 of 7')));
  });

  it('stops at the next batch when told to', async () => {
    const stop = new AbortController();
    const model = new MeanColour();
    await assert.rejects(
      evaluateLfw(model, { root, batch: 2, signal: stop.signal, onProgress: () => stop.abort() }),
      { code: 'ERR_ABORTED', message: /after 2 of 7 images/ },
    );
    assert.equal(model.images, 2);
  });

  it('passes on what the model throws', async () => {
    const model: ScoreModel = {
      embedding: 3,
      embed: async () => {
        throw new HardmineError('ERR_BACKEND', 'no');
      },
    };
    await rm(path('Cid', 1));
    await writeFile(path('Cid', 1), 'the batch after the one that fails');
    await assert.rejects(evaluateLfw(model, { root, batch: 6 }), { code: 'ERR_BACKEND' });
  });

  it('takes a grey JPEG as three equal channels, and bytes instead of paths', async () => {
    const grey = await sharp({
      create: { width: 112, height: 112, channels: 3, background: { r: 90, g: 90, b: 90 } },
    })
      .toColourspace('b-w')
      .jpeg()
      .toBuffer();
    assert.equal((await sharp(grey).metadata()).channels, 1);
    await writeFile(path('Ann', 1), grey);
    const sums = await embedForPairs(new MeanColour(), { images: [path('Ann', 1)] });
    // Twice 90 - 120; JPEG keeps a flat grey within one level.
    for (const sum of sums) assert.ok(Math.abs(sum + 60) <= 2, String(sum));
    const bytes = new Uint8Array(2 * IMAGE_BYTES).fill(130);
    const fromBytes = await embedForPairs(new MeanColour(), { images: bytes, batch: 1 });
    // 112 * 112 additions in fp32, each within 2^-24 of a sum of at most 10.
    for (const sum of fromBytes) assert.ok(Math.abs(sum - 20) < 0.02, String(sum));
    await assert.rejects(embedForPairs(new MeanColour(), { images: bytes.subarray(1) }), {
      code: 'ERR_INPUT',
    });
  });
});
