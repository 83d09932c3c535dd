import assert from 'node:assert/strict';
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import fc from 'fast-check';
import sharp from 'sharp';
import { type DataProgress, type Dataset, openDataset } from '../src/data/dataset.js';
import { decodeImages } from '../src/data/images.js';
import { inspectDataset } from '../src/data/inspect.js';
import { packDataset } from '../src/data/pack.js';
import { splitIdentities, validationPairs } from '../src/data/split.js';
import { crc32c, encodeRecord } from '../src/formats/recordio.js';
import { loadAddon } from '../src/native.js';
import { parseImageRecord, readIndex, readRecord } from './helpers/recordio-reader.js';

const INTEROP = '../shared/faces/interop';

type Tree = { [name: string]: Buffer | string | Tree };

function writeTree(root: string, tree: Tree): string {
  mkdirSync(root, { recursive: true });
  for (const [name, content] of Object.entries(tree)) {
    const path = join(root, name);
    if (typeof content === 'string' || Buffer.isBuffer(content)) writeFileSync(path, content);
    else writeTree(path, content);
  }
  return root;
}

/** A picture with a gradient, a dark left half and `mark` in its colour, so that turns and mix-ups show. */
function pixelsOf(mark: number, side = 112): Buffer {
  const pixels = Buffer.alloc(side * side * 3);
  for (let y = 0, i = 0; y < side; y += 1) {
    for (let x = 0; x < side; x += 1, i += 3) {
      pixels[i] = x < side / 2 ? 40 : 200;
      pixels[i + 1] = Math.floor((y * 255) / side);
      pixels[i + 2] = (mark * 23) % 256;
    }
  }
  return pixels;
}

const picture = (mark: number, side = 112) =>
  sharp(pixelsOf(mark, side), { raw: { width: side, height: side, channels: 3 } });
const jpegOf = (mark: number, side = 112): Promise<Buffer> => picture(mark, side).jpeg().toBuffer();

/** Mean absolute difference of two images' values. */
function difference(a: Uint8Array, b: Uint8Array): number {
  assert.equal(a.length, b.length);
  return a.reduce((sum, value, i) => sum + Math.abs(value - b[i]!), 0) / a.length;
}

describe('data sets', function () {
  this.timeout(20_000); // each packed set is fsynced, which a busy disk takes its time for
  let folder: string;
  let cacheDir: string;
  const opened: Dataset[] = [];
  let jpegs: Buffer[];

  before(async function () {
    try {
      loadAddon('cpu');
    } catch (error) {
      console.log(`      skipped: ${(error as Error).message}`);
      return this.skip();
    }
    jpegs = await Promise.all(Array.from({ length: 8 }, (_, mark) => jpegOf(mark)));
  });
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-data-'));
    cacheDir = join(folder, 'cache');
  });
  afterEach(async () => {
    await Promise.all(opened.splice(0).map((dataset) => dataset.dispose()));
    rmSync(folder, { recursive: true, force: true });
  });

  async function openSet(path: string): Promise<Dataset> {
    const dataset = await openDataset(path, { cacheDir });
    opened.push(dataset);
    return dataset;
  }
  /** Two identities of two images; `changes` are laid over it. */
  const faces = (changes: Tree = {}): string =>
    writeTree(join(folder, 'faces'), {
      anna: { '1.jpg': jpegs[0]!, '2.jpg': jpegs[1]! },
      bert: { '1.jpg': jpegs[2]!, '2.jpg': jpegs[3]! },
      ...changes,
    });
  /** A .rec by hand: im2rec's layout when `first` is 0. */
  function recOf(name: string, images: { label: number; image: Buffer }[], first = 0): string {
    const records = images.map(({ label, image }, i) => {
      const payload = Buffer.alloc(24 + image.length);
      payload.writeFloatLE(label, 4);
      payload.writeBigUInt64LE(BigInt(first + i), 8);
      image.copy(payload, 24);
      return encodeRecord(payload);
    });
    let offset = 0;
    let index = '';
    for (const [i, record] of records.entries()) {
      index += `${first + i}\t${offset}\n`;
      offset += record.length;
    }
    writeFileSync(join(folder, `${name}.rec`), Buffer.concat(records));
    writeFileSync(join(folder, `${name}.idx`), index);
    return join(folder, `${name}.rec`);
  }
  /** Everything in the cache, hidden files too. */
  const cached = (): string[] =>
    existsSync(cacheDir) ? (readdirSync(cacheDir, { recursive: true }) as string[]).sort() : [];

  describe('image folders', () => {
    it('are packed, labelled and named', async () => {
      const dataset = await openSet(faces());
      assert.equal(dataset.kind, 'folder');
      assert.equal(dataset.layout, 'insightface');
      assert.equal(dataset.path, join(folder, 'faces'));
      assert.deepEqual([dataset.images, dataset.identities], [4, 2]);
      assert.deepEqual([...dataset.labels], [0, 0, 1, 1]);
      assert.deepEqual(dataset.names, ['anna', 'bert']);
      assert.ok(dataset.recPath.startsWith(cacheDir));
    });

    it('are labelled in the byte order of names, whatever the locale', async () => {
      // UTF-16 order would put the emoji (a surrogate pair) before the wide tilde.
      const names = ['10', '9', 'B', 'Z', 'a', 'z', 'Ä', 'é', '\uff5e', '\u{1f600}'];
      const tree: Tree = {};
      for (const [i, name] of [...names].reverse().entries())
        tree[name] = { 'x.jpg': jpegs[i % 8]! };
      assert.deepEqual((await openSet(writeTree(join(folder, 'names'), tree))).names, names);
    });

    it('order images by their names in bytes, and leave hidden files out', async () => {
      const dataset = await openSet(
        faces({
          anna: { 'b.jpg': jpegs[0]!, 'B.JPEG': jpegs[1]!, '.DS_Store': 'x', 'Ä.jpg': jpegs[4]! },
          '.git': { 'x.jpg': 'not an image' },
          'README.txt': 'notes beside the identities are no images',
        }),
      );
      const order = [jpegs[1], jpegs[0], jpegs[4]];
      const start = [...dataset.labels].indexOf(0);
      for (const [i, jpeg] of order.entries()) {
        assert.deepEqual(Buffer.from(await dataset.records.jpeg(start + i)), jpeg);
      }
    });

    it('copies 112x112 RGB JPEGs byte for byte, progressive ones too', async () => {
      const progressive = await picture(5).jpeg({ progressive: true }).toBuffer();
      const dataset = await openSet(faces({ carl: { 'p.jpg': progressive } }));
      const expected = [jpegs[0]!, jpegs[1]!, jpegs[2]!, jpegs[3]!, progressive];
      for (const [i, jpeg] of expected.entries()) {
        assert.deepEqual(Buffer.from(await dataset.records.jpeg(i)), jpeg);
      }
    });

    it('keeps images that hold the magic word of RecordIO', async () => {
      // A comment segment of 7 bytes puts the word to every alignment in turn.
      for (const gap of [0, 1, 2, 3]) {
        const comment = Buffer.from([
          0xff,
          0xfe,
          0,
          6 + gap,
          ...Buffer.alloc(gap),
          0x0a,
          0x23,
          0xd7,
          0xce,
        ]);
        const jpeg = Buffer.concat([jpegs[0]!.subarray(0, 2), comment, jpegs[0]!.subarray(2)]);
        const dataset = await openSet(faces({ anna: { '1.jpg': jpeg } }));
        assert.deepEqual(Buffer.from(await dataset.records.jpeg(0)), jpeg);
        const [decoded, plain] = [
          await dataset.records.decode(Int32Array.of(0)),
          await decodeImages([join(folder, 'faces', 'anna', '1.jpg')]),
        ];
        assert.deepEqual(Buffer.from(decoded), Buffer.from(plain));
      }
    });

    it('decodes other 112x112 images: rotated, PNG, grey, with alpha', async () => {
      const turned = await picture(4)
        .rotate(90)
        .withMetadata({ orientation: 8 }) // stored turned to the right, shown turned back
        .jpeg({ quality: 100, chromaSubsampling: '4:4:4' })
        .toBuffer();
      const greys = pixelsOf(4).filter((_, i) => i % 3 === 0);
      const grey = await sharp(greys, { raw: { width: 112, height: 112, channels: 1 } })
        .toColourspace('b-w')
        .jpeg({ quality: 100 })
        .toBuffer();
      assert.equal((await sharp(grey).metadata()).channels, 1);
      const alpha = await picture(4).ensureAlpha(0.5).png().toBuffer();
      const set = faces({
        carl: {
          'a-turned.jpg': turned,
          'b.png': await picture(4).png().toBuffer(),
          'c-grey.jpg': grey,
          'd-alpha.png': alpha,
        },
      });
      const dataset = await openSet(set);
      const stored = await dataset.records.decode(Int32Array.of(4, 5, 6, 7));
      const image = (i: number): Uint8Array => stored.subarray(i * 37632, (i + 1) * 37632);
      const original = pixelsOf(4);
      // Two rounds of JPEG at quality 100 without subsampling move a value by about 1 on average.
      assert.ok(difference(image(0), original) < 2);
      assert.ok(difference(image(1), original) < 1);
      assert.ok(
        difference(
          image(2),
          original.map((_, i) => greys[Math.floor(i / 3)]!),
        ) < 1,
      );
      assert.ok(
        difference(
          image(3),
          original.map((value) => value / 2),
        ) < 2,
      );
    });

    it('uses what it packed again, until an image changes', async () => {
      const set = faces();
      const { recPath } = await openSet(set);
      const { ctimeNs } = statSync(recPath, { bigint: true });
      const phases: DataProgress['phase'][] = [];
      const again = await openDataset(set, {
        cacheDir,
        onProgress: ({ phase }) => phases.push(phase),
      });
      opened.push(again);
      assert.equal(again.recPath, recPath);
      assert.equal(statSync(recPath, { bigint: true }).ctimeNs, ctimeNs);
      assert.deepEqual([...new Set(phases)], ['scanning']);

      writeFileSync(join(set, 'anna', '1.jpg'), jpegs[6]!);
      utimesSync(join(set, 'anna', '1.jpg'), 1, 1);
      const written = await openSet(set);
      assert.notEqual(written.recPath, recPath);
      assert.deepEqual(Buffer.from(await written.records.jpeg(0)), jpegs[6]);

      writeFileSync(join(set, 'bert', '3.jpg'), jpegs[7]!);
      assert.equal((await openSet(set)).images, 5);
      rmSync(join(set, 'bert', '3.jpg'));
      assert.equal((await openSet(set)).recPath, written.recPath);
    });

    it('may be opened twice at once', async () => {
      const set = faces();
      const [one, two] = await Promise.all([openSet(set), openSet(set)]);
      assert.equal(one.recPath, two.recPath);
      for (const dataset of [one, two]) assert.deepEqual(await dataset.records.verify(), []);
      assert.deepEqual(readdirSync(dirname(one.recPath)).sort(), [
        'identities.txt',
        'property',
        'train.crc',
        'train.idx',
        'train.rec',
      ]);
    });

    it('report every image to onProgress', async () => {
      const progress: DataProgress[] = [];
      const set = faces();
      opened.push(
        await openDataset(set, { cacheDir, onProgress: (event) => progress.push(event) }),
      );
      for (const phase of ['scanning', 'packing', 'checking'] as const) {
        const last = progress.filter((event) => event.phase === phase).at(-1);
        assert.equal(last?.done, last?.total, phase);
      }
    });

    it('stop when the caller says so, and leave nothing', async () => {
      const controller = new AbortController();
      const work = openDataset(faces(), {
        cacheDir,
        signal: controller.signal,
        onProgress: ({ phase }) => phase === 'packing' && controller.abort(),
      });
      await assert.rejects(work, { code: 'ERR_ABORTED' });
      assert.deepEqual(cached(), []);
    });
  });

  describe('wrong folders', () => {
    const refused = async (path: string, message: RegExp): Promise<void> => {
      await assert.rejects(openDataset(path, { cacheDir }), (error: Error & { code: string }) => {
        assert.equal(error.code, 'ERR_DATA');
        assert.match(error.message, message);
        assert.match(error.message, /: [^:]+\.$/, 'says how to mend it');
        assert.ok(!error.message.includes('\n'));
        return true;
      });
      assert.deepEqual(cached(), []);
    };

    it('name what is not there, empty or neither folder nor .rec', async () => {
      await refused(join(folder, 'nowhere'), /nowhere does not exist/);
      await refused(join(folder, 'nowhere.rec'), /nowhere\.rec does not exist/);
      mkdirSync(join(folder, 'empty'));
      await refused(join(folder, 'empty'), /empty holds no images/);
      writeFileSync(join(folder, 'notes.txt'), 'x');
      await refused(join(folder, 'notes.txt'), /notes\.txt is no data set that hardmine knows/);
    });

    it('refuse a single identity, and an identity without images', async () => {
      const one = writeTree(join(folder, 'one'), {
        anna: { '1.jpg': jpegs[0]!, '2.jpg': jpegs[1]! },
      });
      await refused(one, /one holds 1 identity where training needs at least 2/);
      await refused(faces({ carl: {} }), /faces\/carl holds no images/);
    });

    it('refuse images outside the identities and other files inside', async () => {
      const loose = writeTree(join(folder, 'loose'), {
        'x.png': jpegs[0]!,
        a: { 'x.jpg': jpegs[0]! },
      });
      await refused(
        loose,
        /loose\/x\.png lies outside any identity's folder: .* give the folder above/,
      );
      await refused(faces({ anna: { 'notes.txt': 'x' } }), /anna\/notes\.txt is not a \.jpg/);
      rmSync(join(folder, 'faces'), { recursive: true });
      await refused(faces({ anna: { deep: { 'x.jpg': jpegs[0]! } } }), /anna\/deep is not a \.jpg/);
      rmSync(join(folder, 'faces'), { recursive: true });
      await refused(faces({ anna: { 'x.webp': 'x' } }), /anna\/x\.webp is not a \.jpg/);
    });

    it('name a text file called .jpg, an empty file and a truncated image', async () => {
      await refused(
        faces({ bert: { '2.jpg': 'Hello, I am text.' } }),
        /faces\/bert\/2\.jpg is not a JPEG or PNG image \(it begins with 48656c6c\)/,
      );
      await refused(faces({ bert: { '2.jpg': '' } }), /faces\/bert\/2\.jpg .*\(it is empty\)/);
      await refused(
        faces({ bert: { '2.jpg': jpegs[3]!.subarray(0, jpegs[3]!.length / 2) } }),
        /faces\/bert\/2\.jpg cannot be decoded \(a damaged JPEG \(libjpeg: [^.;]*\)\), the first of 1 such images: .*inspect names all/,
      );
      const png = await picture(1).png().toBuffer();
      await refused(
        faces({ bert: { '2.jpg': png.subarray(0, png.length / 2) } }),
        /faces\/bert\/2\.jpg cannot be decoded/,
      );
      // SVG is an image to sharp, and no training image to us: its loader must not run.
      await refused(
        faces({
          bert: { '2.jpg': '<svg xmlns="http://www.w3.org/2000/svg" width="112" height="112"/>' },
        }),
        /is not a JPEG or PNG image/,
      );
    });

    it('refuse a decompression bomb by its header', async () => {
      const bomb = Buffer.from(jpegs[0]!);
      const frame = bomb.indexOf(Buffer.from([0xff, 0xc0]));
      bomb.writeUInt16BE(65_500, frame + 5);
      bomb.writeUInt16BE(65_500, frame + 7);
      await refused(faces({ bert: { '2.jpg': bomb } }), /faces\/bert\/2\.jpg cannot be decoded/);
    });

    it('count images of another size, name the first and point to align', async () => {
      const large = await jpegOf(1, 250);
      await refused(
        faces({
          anna: { '1.jpg': jpegs[0]!, '2.jpg': large },
          bert: { '1.jpg': large, '2.jpg': jpegs[3]! },
        }),
        /^2 of the 4 images of .*faces are not 112x112 pixels \(all 250x250\), beginning with .*anna\/2\.jpg: .*hardmine align\.$/,
      );
      await refused(
        faces({
          anna: { '1.jpg': jpegs[0]!, '2.jpg': large },
          bert: { '1.jpg': large, '2.jpg': await jpegOf(1, 96) },
        }),
        /^3 of the 4 images of .* \(the first 250x250, others differ\)/,
      );
    });

    it('refuse links that leave the folder and follow those that do not', async () => {
      const set = faces();
      writeFileSync(join(folder, 'outside.jpg'), jpegs[5]!);
      symlinkSync(join(folder, 'outside.jpg'), join(set, 'anna', '3.jpg'));
      await refused(set, /anna\/3\.jpg is a symbolic link that leaves .*faces:/);
      rmSync(join(set, 'anna', '3.jpg'));
      mkdirSync(join(folder, 'elsewhere'));
      symlinkSync('../elsewhere', join(set, 'carl'));
      await refused(set, /faces\/carl is a symbolic link that leaves/);
      rmSync(join(set, 'carl'));
      symlinkSync('../bert/1.jpg', join(set, 'anna', '3.jpg'));
      assert.equal((await openSet(set)).images, 5);
    });

    it('refuse names that cannot be written down', async () => {
      await refused(
        faces({ 'new\nline': { '1.jpg': jpegs[0]! } }),
        /a name that is not plain UTF-8/,
      );
      rmSync(join(folder, 'faces'), { recursive: true });
      const set = faces();
      mkdirSync(Buffer.concat([Buffer.from(`${set}/`), Buffer.from([0xe4])])); // 'ä' in Latin-1
      await refused(set, /a name that is not plain UTF-8 text \(bytes e4\)/);
    });
  });

  describe('.rec files', () => {
    it('are opened by file, by folder and without the extension', async () => {
      const rec = recOf(
        'train',
        [0, 1, 1].map((label, i) => ({ label, image: jpegs[i]! })),
      );
      recOf(
        'val',
        [0, 1].map((label, i) => ({ label, image: jpegs[i]! })),
      );
      for (const path of [rec, folder, join(folder, 'train')]) {
        const dataset = await openSet(path);
        assert.deepEqual([dataset.kind, dataset.layout, dataset.images], ['recordio', 'im2rec', 3]);
        assert.equal(dataset.recPath, rec);
        assert.deepEqual(dataset.names, ['0', '1']);
      }
      assert.deepEqual(cached(), []);
    });

    it('get dense classes, in the order of their label numbers', async () => {
      const labels = [70, 3, 500, 3, 70];
      const dataset = await openSet(
        recOf(
          'train',
          labels.map((label, i) => ({ label, image: jpegs[i]! })),
        ),
      );
      assert.deepEqual([...dataset.labels], [1, 0, 2, 0, 1]);
      assert.deepEqual(dataset.names, ['3', '70', '500']);
    });

    it('of other programs are read', async function () {
      if (!existsSync(INTEROP)) {
        console.log(`      skipped: ${INTEROP} is not there`);
        return this.skip();
      }
      const insightface = await openSet(`${INTEROP}/insightface_rec`);
      const im2rec = await openSet(`${INTEROP}/im2rec/train.rec`);
      assert.deepEqual([insightface.layout, im2rec.layout], ['insightface', 'im2rec']);
      for (const dataset of [insightface, im2rec]) {
        assert.deepEqual([dataset.images, dataset.identities], [613, 25]);
        assert.deepEqual(await dataset.records.verify(), []);
      }
      // Keys of im2rec count from 0, those of InsightFace from 1.
      assert.deepEqual([...insightface.labels], [...im2rec.labels]);
      for (const i of [0, 6, 300, 612]) {
        assert.deepEqual(await insightface.records.jpeg(i), await im2rec.records.jpeg(i));
      }
    });

    it('are refused without index, with one identity, or where the choice is open', async () => {
      const images = [0, 1].map((label, i) => ({ label, image: jpegs[i]! }));
      const rec = recOf('a', images);
      recOf('b', images);
      await assert.rejects(openDataset(folder), {
        code: 'ERR_DATA',
        message: `${folder} holds 2 .rec files (a.rec, b.rec) and none is train.rec: give the path of one of them.`,
      });
      await assert.rejects(openDataset(recOf('c', images.slice(0, 1))), /holds 1 identity where/);
      rmSync(join(folder, 'a.idx'));
      await assert.rejects(openDataset(rec), /a\.idx does not exist: RecordIO needs/);
    });

    it('take names from identities.txt, which must fit', async () => {
      const rec = recOf(
        'train',
        [0, 1].map((label, i) => ({ label, image: jpegs[i]! })),
      );
      const names = join(folder, 'identities.txt');
      writeFileSync(names, 'Ann Example\nBert <script>\n');
      assert.deepEqual((await openSet(rec)).names, ['Ann Example', 'Bert <script>']);
      for (const wrong of [
        'Ann\n',
        'Ann\nBert\nCarl\n',
        'Ann\nBert',
        `${'x'.repeat(600)}\nBert\n`,
      ]) {
        writeFileSync(names, wrong);
        await assert.rejects(openDataset(rec), {
          code: 'ERR_DATA',
          message: /identities\.txt does not hold one line for each of the 2 identities: restore/,
        });
      }
    });

    it('are refused when truncated or damaged', async () => {
      const set = faces();
      const { recPath } = await openSet(set);
      const whole = readFileSync(recPath);
      writeFileSync(recPath, whole.subarray(0, whole.length - 1000));
      await assert.rejects(openDataset(set, { cacheDir }), { code: 'ERR_DATA' });
      // A byte in the middle of an image: JPEG often cannot tell, the checksum can.
      const bent = Buffer.from(whole);
      const [, offset] = readIndex(readFileSync(recPath.replace('.rec', '.idx'), 'utf8'))[1]!;
      bent[offset + 600]! ^= 1;
      writeFileSync(recPath, bent);
      const { damaged } = await inspectDataset(recPath);
      assert.deepEqual(
        damaged.map((image) => 'key' in image && image.key),
        [1],
      );
    });
  });

  describe('packDataset', () => {
    it('writes a set that opens with its names', async () => {
      const result = await packDataset(faces(), join(folder, 'out', 'set.rec'));
      assert.deepEqual(readdirSync(join(folder, 'out')).sort(), [
        'identities.txt',
        'property',
        'set.crc',
        'set.idx',
        'set.rec',
      ]);
      assert.deepEqual(result, {
        recPath: join(folder, 'out', 'set.rec'),
        images: 4,
        identities: 2,
        bytes: statSync(join(folder, 'out', 'set.rec')).size,
        duplicates: { copies: 0, acrossIdentities: 0 },
        notes: [],
      });
      const dataset = await openSet(join(folder, 'out'));
      assert.deepEqual(dataset.names, ['anna', 'bert']);
      assert.deepEqual([...dataset.labels], [0, 0, 1, 1]);
    });

    it('gives an existing folder train.rec, and overwrites nothing', async () => {
      mkdirSync(join(folder, 'out'));
      const { recPath } = await packDataset(faces(), join(folder, 'out'));
      assert.equal(recPath, join(folder, 'out', 'train.rec'));
      await assert.rejects(packDataset(faces(), recPath), {
        code: 'ERR_IO',
        message: /train\.rec exists already and packing overwrites nothing/,
      });
    });

    it('sorts a foreign .rec by class, and names records that are damaged', async () => {
      const labels = [9, 4, 9, 4, 4];
      const rec = recOf(
        'raw',
        labels.map((label, i) => ({ label, image: jpegs[i]! })),
      );
      const { recPath } = await packDataset(rec, join(folder, 'out', 'train'));
      const bytes = readFileSync(recPath);
      const records = readIndex(readFileSync(recPath.replace('.rec', '.idx'), 'utf8')).map(
        ([, offset]) => parseImageRecord(readRecord(bytes, offset).payload),
      );
      assert.deepEqual(
        records.slice(1, 6).map((record) => record.label),
        [0, 0, 0, 1, 1],
      );
      assert.deepEqual(
        records.slice(1, 6).map((record) => jpegs.findIndex((jpeg) => jpeg.equals(record.image))),
        [1, 3, 4, 0, 2],
      );
      assert.deepEqual((await openSet(recPath)).names, ['4', '9']);

      const broken = recOf('broken', [
        { label: 0, image: jpegs[0]! },
        { label: 1, image: jpegs[1]!.subarray(0, 600) },
      ]);
      await assert.rejects(packDataset(broken, join(folder, 'never', 'train')), {
        code: 'ERR_DATA',
        message: /^record 1 of .*broken\.rec cannot be decoded/,
      });
      assert.ok(!existsSync(join(folder, 'never')));
    });

    it('leaves nothing where it fails', async () => {
      const before = readdirSync(folder);
      const set = faces({ bert: { '2.jpg': 'text' } });
      await assert.rejects(packDataset(set, join(folder, 'out', 'train')), { code: 'ERR_DATA' });
      assert.deepEqual(readdirSync(folder), [...before, 'faces']);
    });
  });

  describe('inspectDataset', () => {
    const median = { min: 1, median: 2.5, max: 5 };

    it('counts a folder and lists what training would refuse, writing nothing', async () => {
      const many = (count: number): Tree =>
        Object.fromEntries(Array.from({ length: count }, (_, i) => [`${i}.jpg`, jpegs[i]!]));
      const set = writeTree(join(folder, 'set'), {
        a: many(1),
        b: many(5),
        c: many(2),
        d: many(3),
      });
      const bytes = [1, 5, 2, 3]
        .flatMap((count) => jpegs.slice(0, count))
        .reduce((sum, jpeg) => sum + jpeg.length, 0);
      const expected = {
        kind: 'folder',
        images: 11,
        identities: 4,
        imagesPerIdentity: median,
        bytes,
        sizes: [{ width: 112, height: 112, images: 11 }],
      };
      assert.deepEqual(await inspectDataset(set), { ...expected, damaged: [] });

      const { recPath } = await packDataset(set, join(folder, 'packed', 'train'));
      assert.deepEqual(await inspectDataset(recPath), {
        ...expected,
        kind: 'recordio',
        layout: 'insightface',
        bytes: statSync(recPath).size,
        damaged: [],
      });

      writeFileSync(join(set, 'b', '2.jpg'), 'text');
      writeFileSync(join(set, 'd', '1.jpg'), await jpegOf(0, 64));
      const { damaged, sizes } = await inspectDataset(set);
      assert.deepEqual(sizes, [
        { width: 112, height: 112, images: 9 },
        { width: 64, height: 64, images: 1 },
      ]);
      assert.deepEqual(
        damaged.map((image) => 'file' in image && image.file),
        ['b/2.jpg', 'd/1.jpg'],
      );
      assert.match(damaged[0]!.reason, /not a JPEG or PNG/);
      assert.match(damaged[1]!.reason, /is 64x64 pixels where 112x112 is needed/);
      assert.deepEqual(readdirSync(folder).sort(), ['packed', 'set']);
    });

    it('takes a set with one identity', async () => {
      const rec = recOf('one', [{ label: 5, image: jpegs[0]! }]);
      const found = await inspectDataset(rec);
      assert.ok(found.kind === 'recordio');
      assert.deepEqual(found.imagesPerIdentity, { min: 1, median: 1, max: 1 });
      assert.equal(found.layout, 'im2rec');
    });
  });

  describe('checksums', () => {
    it('of the writer are those of the records it wrote', async () => {
      const { recPath } = await packDataset(faces(), join(folder, 'out', 'train'));
      const rec = readFileSync(recPath);
      const crc = readFileSync(recPath.replace('.rec', '.crc'));
      for (const [key, offset] of readIndex(
        readFileSync(recPath.replace('.rec', '.idx'), 'utf8'),
      )) {
        if (key < 1 || key > 4) continue;
        assert.equal(crc.readUInt32LE(12 + 4 * key), crc32c(readRecord(rec, offset).payload));
      }
      appendFileSync(recPath.replace('.rec', '.crc'), 'x');
      await assert.rejects(openDataset(recPath), { code: 'ERR_DATA', message: /train\.crc/ });
    });
  });

  describe('decodeImages', () => {
    it('gives the pixels that training decodes', async () => {
      const set = faces();
      const dataset = await openSet(set);
      const paths = ['anna/1.jpg', 'anna/2.jpg', 'bert/1.jpg', 'bert/2.jpg'].map((p) =>
        join(set, p),
      );
      const decoded = await decodeImages(paths);
      const trained = await dataset.records.decode(Int32Array.of(0, 1, 2, 3));
      // Two builds of libjpeg-turbo: their inverse transforms and upsampling may round apart by one.
      assert.ok(decoded.every((value, i) => Math.abs(value - trained[i]!) <= 1));
      assert.deepEqual(await decodeImages([]), new Uint8Array());
    });

    it('refuses other sizes, folders, pipes and what is not there', async () => {
      const large = join(folder, 'large.jpg');
      writeFileSync(large, await jpegOf(0, 250));
      await assert.rejects(decodeImages([large]), {
        code: 'ERR_DATA',
        message: `${large} is 250x250 pixels where 112x112 is needed: cut and align the faces first with hardmine align.`,
      });
      await assert.rejects(decodeImages([folder]), { code: 'ERR_DATA', message: /is not a file/ });
      await assert.rejects(decodeImages([join(folder, 'none.jpg')]), {
        code: 'ERR_IO',
        message: /none\.jpg could not be read \(ENOENT/,
      });
      await assert.rejects(decodeImages(['/dev/zero']), { code: 'ERR_DATA' });
    });
  });
});

describe('splitIdentities', () => {
  const labelSets = fc
    .array(fc.integer({ min: 1, max: 6 }), { minLength: 2, maxLength: 60 })
    .map((counts) =>
      Int32Array.from(counts.flatMap((n, label) => new Array<number>(n).fill(label))),
    );
  const setOf = (labels: Int32Array) => ({
    labels,
    identities: new Set(labels).size,
    path: 'faces',
  });

  it('takes every image into one part, and no identity into both', () => {
    fc.assert(
      fc.property(
        labelSets,
        fc.double({ min: 0.01, max: 0.9, noNaN: true }),
        fc.nat(),
        (labels, share, seed) => {
          const dataset = setOf(labels);
          let split: ReturnType<typeof splitIdentities>;
          try {
            split = splitIdentities(dataset, { share, max: 20, seed });
          } catch (error) {
            assert.equal((error as { code?: string }).code, 'ERR_DATA');
            const usable = [...new Set(labels)].filter(
              (l) => labels.filter((x) => x === l).length > 1,
            );
            const wanted = Math.max(2, Math.min(20, Math.round(share * dataset.identities)));
            assert.ok(usable.length < wanted || dataset.identities - wanted < 2);
            return;
          }
          const { train, validation } = split;
          assert.deepEqual(
            [...train.images, ...validation.images].sort((a, b) => a - b),
            [...labels.keys()],
          );
          const held = new Set([...validation.images].map((image) => labels[image]));
          const wanted = Math.max(2, Math.min(20, Math.round(share * dataset.identities)));
          const most = Math.max(wanted, Math.ceil(dataset.identities / 3));
          assert.ok(held.size >= wanted && held.size <= most);
          assert.ok([...train.images].every((image) => !held.has(labels[image]!)));
          assert.equal(train.classes, dataset.identities - held.size);
          for (const part of [train, validation]) {
            const classes = new Map<number, number>();
            for (const [i, image] of part.images.entries()) {
              const label = labels[image]!;
              assert.equal(classes.get(label) ?? part.labels[i], part.labels[i]);
              classes.set(label, part.labels[i]!);
            }
            assert.deepEqual(
              [...classes.values()].sort((a, b) => a - b),
              [...classes.keys()].map((_, i) => i),
            );
          }
          for (const label of held)
            assert.ok(labels.filter((other) => other === label).length >= 2);
        },
      ),
      { numRuns: 200 },
    );
  });

  it('holds out 5% and at most 200 by default, by seed', () => {
    const of = (identities: number, seed: number) =>
      splitIdentities(setOf(Int32Array.from({ length: 2 * identities }, (_, i) => i >> 1)), {
        seed,
      }).validation.images;
    assert.equal(of(400, 1).length, 2 * 20);
    assert.equal(of(8000, 1).length, 2 * 200);
    assert.deepEqual(of(400, 1), of(400, 1));
    assert.notDeepEqual(of(400, 1), of(400, 2));
  });

  it('holds out more where few people have few images, so that there are ten folds of pairs', () => {
    const of = (people: number, images: number, seed: number) =>
      splitIdentities(
        setOf(Int32Array.from({ length: people * images }, (_, i) => Math.floor(i / images))),
        { seed },
      ).validation;
    for (const seed of [1, 2, 3]) {
      // Two people with 2, 3 and 4 images have 2, 6 and 12 pairs of one person; ten are needed.
      for (const [images, held] of [
        [2, 10],
        [3, 4],
        [4, 2],
      ] as const) {
        const { images: indices, labels } = of(30, images, seed);
        assert.equal(indices.length, held * images);
        assert.equal(validationPairs(labels, { pairs: 6000, seed }).same.length % 20, 0);
      }
      // A third of 12 is not enough: as many as ever, and the pairs are what is refused.
      const few = of(12, 2, seed);
      assert.equal(few.images.length, 4);
      assert.throws(() => validationPairs(few.labels, { pairs: 6000, seed }), {
        code: 'ERR_DATA',
        message:
          '4 images of 2 identities do not give 10 folds of verification pairs: add images or identities, or set validation to none.',
      });
    }
  });

  it('says what is missing', () => {
    assert.throws(() => splitIdentities(setOf(Int32Array.of(0, 0, 1, 1, 2)), { seed: 1 }), {
      code: 'ERR_DATA',
      message:
        'faces holds 3 identities, 2 with two images or more, and validation would hold out 2 of those and leave 1: add identities or set validation to none.',
    });
  });
});

describe('validationPairs', () => {
  const check = (labels: Int32Array, pairs: number, folds: number, seed: number) => {
    const found = validationPairs(labels, { pairs, seed, folds });
    const seen = new Set<string>();
    const foldsOf = new Map<number, Set<number>>();
    const counts = Array.from({ length: folds }, () => [0, 0]);
    for (const [k, a] of found.a.entries()) {
      const b = found.b[k]!;
      const fold = found.fold[k]!;
      assert.notEqual(a, b);
      assert.equal(found.same[k], labels[a] === labels[b] ? 1 : 0);
      const key = a < b ? `${a} ${b}` : `${b} ${a}`;
      assert.ok(!seen.has(key), 'no pair twice');
      seen.add(key);
      counts[fold]![found.same[k]!]! += 1;
      for (const image of [a, b]) {
        const label = labels[image]!;
        foldsOf.set(label, (foldsOf.get(label) ?? new Set()).add(fold));
      }
    }
    for (const count of counts) assert.deepEqual(count, counts[0]);
    assert.equal(counts[0]![0], counts[0]![1]);
    assert.ok(counts[0]![0]! >= 1 && found.a.length <= pairs);
    if (found.disjoint) for (const set of foldsOf.values()) assert.equal(set.size, 1);
    return found;
  };

  it('draws balanced folds without repeats, and shares no identity where there are enough', () => {
    fc.assert(
      fc.property(
        fc.array(fc.integer({ min: 1, max: 9 }), { minLength: 1, maxLength: 50 }),
        fc.integer({ min: 1, max: 10 }),
        fc.integer({ min: 2, max: 800 }),
        fc.nat(),
        (counts, folds, pairs, seed) => {
          const labels = Int32Array.from(
            counts.flatMap((n, label) => new Array<number>(n).fill(label)),
          );
          const same = counts.reduce((sum, n) => sum + (n * (n - 1)) / 2, 0);
          const all = (labels.length * (labels.length - 1)) / 2;
          if (Math.min(same, all - same) < folds || pairs < 2 * folds) {
            assert.throws(() => validationPairs(labels, { pairs, seed, folds }), {
              code: 'ERR_DATA',
            });
            return;
          }
          check(labels, pairs, folds, seed);
        },
      ),
      { numRuns: 200 },
    );
  });

  it('gives all the pairs asked for where the images have them', () => {
    const labels = Int32Array.from({ length: 43 * 22 }, (_, i) => Math.floor(i / 22));
    const found = check(labels, 6000, 10, 7);
    assert.equal(found.a.length, 6000);
    assert.ok(found.disjoint);
    assert.deepEqual(validationPairs(labels, { pairs: 6000, seed: 7 }), found);
    assert.notDeepEqual(validationPairs(labels, { pairs: 6000, seed: 8 }).a, found.a);
  });

  it('spreads same pairs over identities, however many images each has', () => {
    // One person with 100 images among 20 with 5: drawn uniformly, that one would get 96% of the pairs.
    const labels = Int32Array.from({ length: 200 }, (_, i) => (i < 100 ? 0 : 1 + ((i - 100) % 20)));
    const { a, same } = check(labels, 100, 1, 3);
    const ofFirst = [...a.keys()].filter((k) => same[k] === 1 && labels[a[k]!] === 0).length;
    assert.ok(ofFirst <= 3, `${ofFirst} of 50`); // 50 pairs over 21 people: 3 at most
  });
});
