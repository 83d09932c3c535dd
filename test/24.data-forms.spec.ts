/** Every form in which faces are published: recognised, opened or refused, packed, inspected. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readdir, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import fc from 'fast-check';
import sharp from 'sharp';
import { openDataset } from '../src/data/dataset.js';
import { inspectDataset } from '../src/data/inspect.js';
import { packDataset } from '../src/data/pack.js';
import { readRows } from '../src/data/rows.js';
import { StringTable } from '../src/data/string-table.js';
import { HardmineError } from '../src/errors.js';
import { packLfwPairs } from '../src/evaluate/lfw-bin.js';
import { encodeRecord, packedFiles } from '../src/formats/recordio.js';
import { readVerificationBin, writeVerificationBin } from '../src/formats/verification-bin.js';
import { loadAddon } from '../src/native.js';
import { MAIN } from './helpers/built.js';
import { marked, type TableRow, tableRow } from './helpers/ms-celeb.js';
import { parseImageRecord, readIndex, readRecord } from './helpers/recordio-reader.js';
import { shared } from './helpers/skip.js';

const PEAK = fileURLToPath(new URL('helpers/peak-memory.ts', import.meta.url));
const run = promisify(execFile);

interface Packed {
  labels: number[];
  images: Buffer[];
  names: string[];
}

/** A packed set by the independent reader. */
async function readPacked(recPath: string): Promise<Packed> {
  const files = packedFiles(recPath.replace(/\.rec$/, ''));
  const rec = await readFile(files.rec);
  const records = readIndex(await readFile(files.idx, 'utf8')).map(([, offset]) =>
    parseImageRecord(readRecord(rec, offset).payload),
  );
  const images = records.slice(1, records[0]!.labels[0]);
  const names = (await readFile(files.identities, 'utf8')).split('\n').slice(0, -1);
  return {
    labels: images.map(({ label }) => label),
    images: images.map(({ image }) => image),
    names,
  };
}

const sha = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');

describe('forms of data sets', function () {
  this.timeout(60_000); // each packed set is fsynced, which a busy disk takes its time for
  let folder: string;
  let jpegs: Buffer[];
  let cacheDir: string;
  let count = 0;

  before(async () => {
    jpegs = await Promise.all(
      Array.from({ length: 8 }, (_, i) =>
        sharp({
          create: { width: 112, height: 112, channels: 3, background: { r: 30 * i, g: 60, b: 7 } },
        })
          .jpeg()
          .toBuffer(),
      ),
    );
  });
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-forms-'));
    cacheDir = join(folder, 'cache');
  });
  afterEach(() => rm(folder, { recursive: true }));

  async function write(name: string, content: string | Buffer): Promise<string> {
    const path = join(folder, name);
    await mkdir(dirname(path), { recursive: true });
    await writeFile(path, content);
    return path;
  }

  const table = (rows: TableRow[]): Promise<string> =>
    write(`faces-${count++}.tsv`, rows.map(tableRow).join(''));

  /** Packs and reads back by the independent reader. */
  async function pack(input: string, options: Parameters<typeof packDataset>[2] = {}) {
    const result = await packDataset(input, join(folder, `packed-${count++}`, 'train'), options);
    return { result, ...(await readPacked(result.recPath)) };
  }

  /** The work fails with one sentence that says all of `parts`, and leaves nothing. */
  async function refused(
    work: () => Promise<unknown>,
    ...parts: (string | RegExp)[]
  ): Promise<void> {
    const before = await readdir(folder, { recursive: true });
    await assert.rejects(work, (error) => {
      assert.ok(error instanceof HardmineError, String(error));
      for (const part of parts) {
        if (typeof part === 'string') assert.ok(error.message.includes(part), error.message);
        else assert.match(error.message, part);
      }
      assert.ok(!error.message.includes('\n'));
      return true;
    });
    assert.deepEqual(await readdir(folder, { recursive: true }), before);
  }

  const packing = (input: string, options: Parameters<typeof packDataset>[2] = {}) => {
    return () => packDataset(input, join(folder, 'never', 'train'), options);
  };

  describe('RecordIO of other programs', () => {
    it('packs to the same 613 images and labels, byte for byte', async function () {
      const theirs = await readFile(shared(this, 'faces/interop/insightface_rec/train.rec'));
      const index = await readFile(shared(this, 'faces/interop/insightface_rec/train.idx'), 'utf8');
      const expected = readIndex(index)
        .map(([, offset]) => parseImageRecord(readRecord(theirs, offset).payload))
        .filter(({ image }) => image.length > 0)
        .map(({ label, labels, image }) => `${labels[0] ?? label} ${sha(image)}`);
      assert.equal(expected.length, 613);
      for (const form of ['insightface_rec', 'im2rec']) {
        const { result, labels, images } = await pack(shared(this, `faces/interop/${form}`));
        assert.deepEqual([result.images, result.identities], [613, 25]);
        const ours = images.map((image, i) => `${labels[i]} ${sha(image)}`);
        assert.deepEqual(ours.sort(), [...expected].sort());
      }
    });

    it('reads a record in parts', async function () {
      const rec = shared(this, 'faces/interop/split_record/train.rec');
      const records = await (await loadAddon('cpu')).openRecords(rec, rec.replace('.rec', '.idx'));
      const payload = await readFile(shared(this, 'faces/interop/split_record/payload1.bin'));
      assert.deepEqual(Buffer.from(await records.jpeg(1)), parseImageRecord(payload).image);
      await records.dispose();
    });
  });

  describe("MS-Celeb-1M's tables", () => {
    const rows = (): TableRow[] => [
      { mid: 'm.0z', rank: 5, image: marked(jpegs[0]!, '0') },
      { mid: 'm.01_b', rank: 7, image: marked(jpegs[1]!, '1') },
      { mid: 'm.0z', rank: 1, image: marked(jpegs[2]!, '2') },
      { mid: 'm.0A', rank: 0, image: marked(jpegs[3]!, '3') },
      { mid: 'm.01_b', rank: 2, image: marked(jpegs[4]!, '4') },
    ];
    /** Comments of the images, in order. */
    const marks = (images: readonly Buffer[]): string[] =>
      images.map((image) => image.toString('latin1', 6, 7));

    it('are labelled in the byte order of their MIDs, rows of one in the order of the file', async () => {
      const { labels, images, names, result } = await pack(await table(rows()));
      assert.deepEqual(names, ['m.01_b', 'm.0A', 'm.0z']);
      assert.deepEqual(labels, [0, 0, 1, 2, 2]);
      assert.deepEqual(marks(images), ['1', '4', '3', '0', '2']);
      assert.deepEqual(result.notes, []);
      for (const [i, mark] of marks(images).entries()) {
        assert.ok(images[i]!.equals(rows()[Number(mark)]!.image));
      }
    });

    it('open for training, packed once', async () => {
      const tsv = await table(rows());
      for (const turn of [0, 1]) {
        const dataset = await openDataset(tsv, { cacheDir });
        assert.equal(dataset.kind, 'tsv');
        assert.deepEqual([...dataset.labels], [0, 0, 1, 2, 2], `turn ${turn}`);
        assert.deepEqual(dataset.names, ['m.01_b', 'm.0A', 'm.0z']);
        await dataset.dispose();
      }
      assert.equal((await readdir(cacheDir)).length, 1);
      const keep = await write('keep.txt', 'm.0z\nm.0A\n');
      const kept = await openDataset(tsv, { cacheDir, keep });
      assert.deepEqual(kept.names, ['m.0A', 'm.0z']);
      await kept.dispose();
      assert.equal((await readdir(cacheDir)).length, 2);
    });

    it('keep what a list names, in all its forms', async () => {
      const tsv = await table(rows());
      const cases: [list: string, marks: string[], names: string[], notes: number][] = [
        ['m.0z\r\nm.01_b\r\n', ['1', '4', '0', '2'], ['m.01_b', 'm.0z'], 0],
        ['\ufeffm.0z\nm.0nowhere\n', ['0', '2'], ['m.0z'], 1],
        ['m.0z/1-FaceId-0.jpg\nm.0A/0-FaceId-0_align.png\n', ['3', '2'], ['m.0A', 'm.0z'], 0],
        ['m.0z\t5-FaceId-0\nm.01_b\t9-FaceId-0\n\n', ['0'], ['m.0z'], 1],
        [
          'm.0z/1-FaceId-0_align.jpg 0\nm.0z/5-FaceId-0_align.jpg 0\nm.0A/0-FaceId-0_align.jpg 1',
          ['0', '2', '3'],
          ['m.0z', 'm.0A'],
          0,
        ],
        // Labels with a gap; one person in two classes, which MIDs cannot name.
        [
          'm.0z/1-FaceId-0 9\nm.0z/5-FaceId-0 4\nm.0A/0-FaceId-0 2\n',
          ['3', '0', '2'],
          ['2', '4', '9'],
          1,
        ],
        // Two people in one class, too.
        [
          'm.0z/1-FaceId-0 0\nm.0A/0-FaceId-0 0\nm.01_b/7-FaceId-0 1\n',
          ['2', '3', '1'],
          ['0', '1'],
          0,
        ],
      ];
      for (const [text, expectedMarks, names, notes] of cases) {
        const keep = await write('keep.txt', text);
        const packed = await pack(tsv, { keep });
        assert.deepEqual(marks(packed.images), expectedMarks, text);
        assert.deepEqual(packed.names, names, text);
        assert.equal(packed.result.notes.length, notes, text);
      }
    });

    it('take the lists of a public cleaned set', async function () {
      const list = await readFile(
        shared(this, 'faces/lists/MS-Celeb-1M-v1c-r_train_list.txt'),
        'utf8',
      );
      const entries = list
        .trim()
        .split('\n')
        .map((line) => {
          const match = /^(\S+)\/(\d+)-FaceId-(\d+)_align\.jpg (\d+)$/.exec(line)!;
          const [rank, face, label] = match.slice(2).map(Number);
          return { mid: match[1]!, rank: rank!, face: face!, label: label! };
        });
      const other = { mid: 'm.0_0zl', rank: 3, face: 0 };
      const tsv = await table(
        [...entries, other]
          .reverse()
          .map((row, i) => ({ ...row, image: marked(jpegs[i % 8]!, `${i}`) })),
      );
      const cleaned = await pack(tsv, {
        keep: shared(this, 'faces/lists/MS-Celeb-1M-v1c-r_train_list.txt'),
      });
      const labels = [...new Set(entries.map(({ label }) => label))].sort((a, b) => a - b);
      assert.equal(cleaned.images.length, entries.length);
      assert.equal(cleaned.names.length, labels.length);
      // The identity list holds 72,778 MIDs, the other row's among them.
      const people = await pack(tsv, {
        keep: shared(this, 'faces/lists/MS-Celeb-1M-v1c-r_id_list.txt'),
      });
      assert.ok(people.names.includes('m.0_0zl'));
      assert.match(people.result.notes[0]!, /of the 72778 identities listed in/);
    });

    it('are refused with file, line and reason', async () => {
      const good = rows().map(tableRow);
      const broken = (line: string): Promise<string> =>
        write('broken.tsv', [good[0], good[1], line, good[2]].join(''));
      const edit = (change: (columns: string[]) => void): string => {
        const columns = good[3]!.split('\t');
        change(columns);
        return columns.join('\t');
      };
      const cases: [string, ...(string | RegExp)[]][] = [
        [edit((c) => c.splice(2, 1)), 'found 6 columns', 'have 7'],
        ['hello\n', 'found 1 columns'],
        [
          edit((c) => {
            c[6] = `*${c[6]!.slice(1)}`;
          }),
          'not base64',
        ],
        [
          edit((c) => {
            c[6] = c[6]!.replace(/.\n/, '\n');
          }),
          'not base64',
        ],
        [
          edit((c) => {
            c[6] = '\n';
          }),
          'not base64',
        ],
        [
          edit((c) => {
            c[6] = `${Buffer.from('Hello').toString('base64')}\n`;
          }),
          /is not a JPEG or PNG/,
        ],
        [
          edit((c) => {
            c[0] = '../m.0A';
          }),
          'found MID "../m.0A"',
        ],
        [
          edit((c) => {
            c[1] = '-1';
          }),
          'rank "-1"',
        ],
        [
          edit((c) => {
            c[4] = 'a/b';
          }),
          'face "a/b"',
        ],
        [
          edit((c) => {
            c[6] = `${jpegs[0]!.subarray(0, -20).toString('base64')}\n`;
          }),
          'cannot be decoded',
        ],
      ];
      for (const [line, ...parts] of cases) {
        await refused(packing(await broken(line)), /^.*broken\.tsv, line 3\b/, ...parts);
      }
      const long = await broken(`${'x'.repeat(2 ** 23 + 1)}\n`);
      await refused(packing(long), 'broken.tsv, line 3', 'longer than 8388608 bytes');
      await refused(packing(await write('empty.tsv', '')), 'empty.tsv is empty');
      const bomb = Buffer.from(jpegs[0]!);
      const frame = bomb.indexOf(Buffer.from([0xff, 0xc0]));
      bomb.writeUInt16BE(65_500, frame + 5);
      bomb.writeUInt16BE(65_500, frame + 7);
      const bombed = await table([...rows(), { mid: 'm.0z', rank: 8, image: bomb }]);
      await refused(packing(bombed), /line 6 cannot be decoded/);
      const wide = await sharp({
        create: { width: 160, height: 112, channels: 3, background: 'red' },
      })
        .jpeg()
        .toBuffer();
      const cut = await table([...rows(), { mid: 'm.0z', rank: 8, image: wide }]);
      await refused(packing(cut), /^1 of the 6 images .*160x112.*line 6: .*hardmine align/);
    });

    it('refuse lists that are none, naming the line', async () => {
      const tsv = await table(rows());
      const cases: [string, ...(string | RegExp)[]][] = [
        ['m.0z\n../x\n', 'line 2', '"../x"'],
        ['m.0z/../../etc/passwd\n', 'line 1'],
        ['m.0z/..\n', 'line 1'],
        ['/etc/passwd\n', 'line 1'],
        ['m.0z/1-FaceId-0 0\nm.0z/5-FaceId-0\n', 'line 2', '"MID/name LABEL" was expected'],
        ['m.0z/1-FaceId-0 x\n', 'line 1'],
        ['m.0z/1-FaceId-0 -1\n', 'line 1'],
        ['m.0z/1-FaceId-0 99999999\n', 'line 1', 'beyond the 16777216'],
        ['m.0z/1-FaceId-0.jpg 1\nm.0z/1-FaceId-0_align.jpg 2\n', 'line 2', 'label 2', 'and 1'],
        ['Aaron_Eckhart 1\n', 'line 1'],
        ['\n\n', 'is empty'],
        [`m.0z/${'x'.repeat(5000)}\n`, 'line 1', '4096'],
        ['m.0nobody\n', 'None of the 5 images'],
      ];
      for (const [text, ...parts] of cases) {
        const keep = await write('keep.txt', text);
        await refused(packing(tsv, { keep }), 'keep.txt', ...parts);
      }
      await refused(packing(tsv, { keep: join(folder, 'gone.txt') }), 'gone.txt could not be read');
      const faces = await lfwTree();
      const keep = await write('keep.txt', 'm.0z\n');
      await refused(packing(faces, { keep }), 'is no .tsv of MS-Celeb-1M', '--exclude-identities');
    });
  });

  /** LFW's layout: three people with 2, 1 and 3 images; those of `same` bytes are given by number. */
  async function lfwTree(): Promise<string> {
    const people = { Ada_Lovelace: [0, 1], Al_Gore: [2], Zoe_Ball: [3, 4, 5] };
    for (const [name, images] of Object.entries(people)) {
      for (const [i, image] of images.entries()) {
        await write(`lfw/${name}/${name}_000${i + 1}.jpg`, jpegs[image]!);
      }
    }
    await write('lfw/pairs.txt', 'a list beside the people is none of them');
    return join(folder, 'lfw');
  }

  describe("im2rec's lists", () => {
    it('are packed and opened: by label, then in the order of the list', async () => {
      await lfwTree();
      const lst = await write(
        'lfw/train.lst',
        [
          '7\t500.000000\tZoe_Ball/Zoe_Ball_0002.jpg',
          '1\t3\t0.5\t0.25\tAda_Lovelace/Ada_Lovelace_0001.jpg',
          '2\t500\t./Zoe_Ball/Zoe_Ball_0001.jpg\r',
        ].join('\n'),
      );
      const { labels, images, names } = await pack(lst);
      assert.deepEqual(
        [labels, names],
        [
          [0, 1, 1],
          ['3', '500'],
        ],
      );
      assert.deepEqual(
        images.map((image) => jpegs.findIndex((jpeg) => jpeg.equals(image))),
        [0, 4, 3],
      );
      const dataset = await openDataset(lst, { cacheDir });
      assert.deepEqual([dataset.kind, dataset.images], ['lst', 3]);
      await dataset.dispose();
      // An image that changes is packed anew.
      await write('lfw/Zoe_Ball/Zoe_Ball_0001.jpg', jpegs[7]!);
      await (await openDataset(lst, { cacheDir })).dispose();
      assert.equal((await readdir(cacheDir)).length, 2);
    });

    it('are refused with file, line and reason', async () => {
      await lfwTree();
      await write('outside.jpg', jpegs[6]!);
      await symlink('../../outside.jpg', join(folder, 'lfw', 'Al_Gore', 'link.jpg'));
      const good = '0\t1\tAl_Gore/Al_Gore_0001.jpg\n';
      const cases: [string, ...(string | RegExp)[]][] = [
        ['1\t1\t../outside.jpg', 'leads out of the list'],
        ['1\t1\tAl_Gore/../../outside.jpg', 'leads out of the list'],
        ['1\t1\t/etc/passwd', 'leads out of the list'],
        ['1\t1\t', 'leads out of the list'],
        ['1\t1\tAl_Gore/link.jpg', 'is a link that leaves'],
        ['1\t1\tAl_Gore/Al_Gore_0009.jpg', 'Al_Gore_0009.jpg could not be read', 'move the list'],
        ['1\t1.5\tAl_Gore/Al_Gore_0001.jpg', 'the label is 1.5'],
        ['1\t-1\tAl_Gore/Al_Gore_0001.jpg', 'the label is -1'],
        ['1\t1e9\tAl_Gore/Al_Gore_0001.jpg', 'the label is 1000000000'],
        // InsightFace's own order: aligned, path, label.
        ['1\tAl_Gore/Al_Gore_0001.jpg\t1', '"index TAB label TAB path" was expected'],
        ['Al_Gore/Al_Gore_0001.jpg 1', '"index TAB label TAB path" was expected'],
      ];
      for (const [line, ...parts] of cases) {
        const lst = await write('lfw/train.lst', `${good}${line}\n`);
        await refused(packing(lst), 'train.lst, line 2', ...parts);
      }
      await refused(packing(await write('lfw/empty.lst', '\n')), 'empty.lst is empty');
    });
  });

  describe('packing', () => {
    it('leaves identities out and says which were not there', async () => {
      const exclude = await write('exclude.txt', 'Al_Gore\nNobody\r\n');
      const { names, labels, images, result } = await pack(await lfwTree(), {
        excludeIdentities: exclude,
      });
      assert.deepEqual(
        [names, labels],
        [
          ['Ada_Lovelace', 'Zoe_Ball'],
          [0, 0, 1, 1, 1],
        ],
      );
      assert.deepEqual(
        images.map((image) => jpegs.findIndex((jpeg) => jpeg.equals(image))),
        [0, 1, 3, 4, 5],
      );
      assert.deepEqual(result.notes, [
        `Identities excluded by ${exclude}: 1.`,
        `1 of the 2 names in ${exclude} are not in ${join(folder, 'lfw')}: Nobody.`,
      ]);
      const all = await write('all.txt', 'Ada_Lovelace\nAl_Gore\nZoe_Ball\n');
      const tree = join(folder, 'lfw');
      await refused(packing(tree, { excludeIdentities: all }), 'all.txt excludes every identity');
      const odd = await write('odd.txt', 'a\u0007b\n');
      await refused(packing(tree, { excludeIdentities: odd }), 'odd.txt, line 1');
    });

    it('reports images that are the same, within an identity and across', async () => {
      const tree = await lfwTree();
      await write('lfw/Zoe_Ball/Zoe_Ball_0003.jpg', jpegs[0]!);
      await write('lfw/Zoe_Ball/Zoe_Ball_0002.jpg', jpegs[3]!);
      const { result } = await pack(tree);
      assert.deepEqual(result.duplicates, { copies: 2, acrossIdentities: 1 });
      const report = (await readFile(result.duplicatesPath!, 'utf8')).split('\n');
      assert.deepEqual(report, [
        'sha256\tkey\tidentity\timage',
        `${sha(jpegs[0]!)}\t1\tAda_Lovelace\tAda_Lovelace/Ada_Lovelace_0001.jpg`,
        `${sha(jpegs[0]!)}\t6\tZoe_Ball\tZoe_Ball/Zoe_Ball_0003.jpg`,
        `${sha(jpegs[3]!)}\t4\tZoe_Ball\tZoe_Ball/Zoe_Ball_0001.jpg`,
        `${sha(jpegs[3]!)}\t5\tZoe_Ball\tZoe_Ball/Zoe_Ball_0002.jpg`,
        '',
      ]);
    });

    it("writes a .bin from LFW's pairs and own images", async () => {
      const tree = await lfwTree();
      await write('lfw/Al_Gore/Al_Gore_0002.jpg', jpegs[6]!);
      // View 2 in two folds of 1 + 1 pairs.
      const pairs = await write(
        'pairs.txt',
        [
          '2\t1',
          'Zoe_Ball\t1\t3',
          'Zoe_Ball\t2\tAl_Gore\t1',
          'Ada_Lovelace\t2\t1',
          'Al_Gore\t2\tAda_Lovelace\t1',
          '',
        ].join('\n'),
      );
      const out = join(folder, 'out.bin');
      const packed = await packLfwPairs(tree, pairs, out);
      assert.deepEqual(packed, { binPath: out, pairs: 4, same: 2, bytes: (await stat(out)).size });
      const { images, same } = await readVerificationBin(out);
      assert.deepEqual(same, [true, false, true, false]);
      assert.deepEqual(
        images.map((image) => jpegs.findIndex((jpeg) => jpeg.equals(image))),
        [3, 5, 4, 2, 1, 0, 6, 0],
      );
      await refused(() => packLfwPairs(tree, pairs, out), 'exists already');
      await write('lfw/Al_Gore/Al_Gore_0002.jpg', 'text');
      const never = join(folder, 'never.bin');
      await refused(
        () => packLfwPairs(tree, pairs, never),
        'Al_Gore_0002.jpg is not a JPEG or PNG',
      );
      await rm(join(tree, 'Al_Gore', 'Al_Gore_0002.jpg'));
      await refused(() => packLfwPairs(tree, pairs, never), '1 of 7 images are missing');
    });
  });

  describe('evaluation data', () => {
    async function ytfTree(frames: string): Promise<string> {
      for (const name of [
        'Al_Gore/1/1.5.jpg',
        'Al_Gore/1/1.6.jpg',
        'Zoe_Ball/0/0.1.jpg',
        'Zoe_Ball/3/3.1.jpg',
      ]) {
        const side = name.startsWith('Al') ? 200 : 100;
        await write(
          `ytf/${frames}/${name}`,
          await sharp({ create: { width: side, height: 80, channels: 3, background: 'blue' } })
            .jpeg()
            .toBuffer(),
        );
      }
      await write(`ytf/${frames}/Al_Gore.labeled_faces.txt`, 'x');
      return join(folder, 'ytf');
    }

    async function cfpTree(): Promise<string> {
      const lists: Record<string, string[]> = {
        F: ['frontal/01', 'frontal/02'],
        P: ['profile/01'],
      };
      for (const [kind, names] of Object.entries(lists)) {
        const paths = ['001', '002'].flatMap((person) =>
          names.map((name) => `${person}/${name}.jpg`),
        );
        await write(
          `cfp/Protocol/Pair_list_${kind}.txt`,
          paths.map((path, i) => `${i + 1} ../Data/Images/${path}\r\n`).join(''),
        );
        // Person 002's profile is not there.
        for (const path of paths.filter((path) => path !== '002/profile/01.jpg')) {
          await write(`cfp/Data/Images/${path}`, jpegs[0]!);
        }
      }
      const pairs: [string, string, string][] = [
        ['FF', '1,2\n3,4\n', '1,3\n'],
        ['FP', '1,1\n', '1,2\n'],
      ];
      for (const [kind, same, different] of pairs) {
        for (let fold = 1; fold <= 10; fold++) {
          const split = `cfp/Protocol/Split/${kind}/${String(fold).padStart(2, '0')}`;
          await write(`${split}/same.txt`, same);
          await write(`${split}/diff.txt`, different);
        }
      }
      return join(folder, 'cfp');
    }

    const bin = async (): Promise<string> => {
      const path = join(folder, 'own.bin');
      await writeVerificationBin(path, [jpegs[0]!, jpegs[1]!, jpegs[2]!, jpegs[3]!], [true, false]);
      return path;
    };

    it('is refused for training and packing, with the command that takes it', async () => {
      const sets: [string, string][] = [
        [await bin(), 'hardmine evaluate --bin'],
        [await ytfTree('aligned_images_DB'), 'hardmine evaluate --ytf'],
        [join(folder, 'ytf', 'aligned_images_DB'), 'hardmine evaluate --ytf'],
        [await cfpTree(), 'hardmine evaluate --cfp'],
        [join(folder, 'cfp', 'Protocol'), 'hardmine evaluate --cfp'],
        [join(folder, 'cfp', 'Data'), 'hardmine evaluate --cfp'],
      ];
      for (const [path, command] of sets) {
        await refused(() => openDataset(path, { cacheDir }), path, 'evaluation data', command);
        await refused(packing(path), path, 'evaluation data', command);
      }
    });

    it('is inspected in its own words', async () => {
      assert.deepEqual(await inspectDataset(await bin()), {
        kind: 'verification-bin',
        pairs: 2,
        same: 1,
        different: 1,
        images: 4,
        bytes: (await stat(join(folder, 'own.bin'))).size,
        sizes: [{ width: 112, height: 112, images: 4 }],
        damaged: [],
      });
      const ytf = await inspectDataset(await ytfTree('frame_images_DB'));
      assert.ok(ytf.kind === 'ytf');
      assert.deepEqual([ytf.identities, ytf.videos, ytf.images], [2, 3, 4]);
      assert.deepEqual(ytf.sizes, [
        { width: 100, height: 80, images: 2 },
        { width: 200, height: 80, images: 2 },
      ]);
      assert.deepEqual(ytf.damaged, []);

      const cfp = await inspectDataset(await cfpTree());
      assert.ok(cfp.kind === 'cfp');
      assert.deepEqual(
        [cfp.identities, cfp.frontal, cfp.profile, cfp.missing, cfp.images],
        [2, 4, 2, 1, 5],
      );
      assert.deepEqual(cfp.pairs, { frontalFrontal: 30, frontalProfile: 20 });
      await write('cfp/Protocol/Pair_list_P.txt', '1 ../../secret/profile/1.jpg\n');
      await assert.rejects(inspectDataset(join(folder, 'cfp')), {
        code: 'ERR_PROTOCOL',
        message: /Pair_list_P\.txt, line 1: .*secret/,
      });
    });

    it('is inspected for damage', async () => {
      const path = join(folder, 'own.bin');
      const wide = await sharp(jpegs[0]!).resize(96, 112).jpeg().toBuffer();
      await writeVerificationBin(
        path,
        [jpegs[0]!, Buffer.from('text'), wide, jpegs[1]!],
        [true, false],
      );
      const { damaged, sizes } = await inspectDataset(path);
      assert.deepEqual(
        damaged.map((image) => 'image' in image && image.image),
        [1, 2],
      );
      assert.match(damaged[0]!.reason, /not a JPEG or PNG/);
      assert.match(damaged[1]!.reason, /96x112/);
      assert.deepEqual(
        sizes.map(({ images }) => images),
        [3 - 1, 1],
      );
      const ytf = await ytfTree('frame_images_DB');
      await write('ytf/frame_images_DB/Al_Gore/1/1.6.jpg', jpegs[0]!.subarray(0, 300));
      const found = await inspectDataset(ytf);
      assert.deepEqual(
        found.damaged.map((image) => 'file' in image && image.file),
        ['Al_Gore/1/1.6.jpg'],
      );
    });

    it('of the public sets is read', async function () {
      const ytf = await inspectDataset(shared(this, 'faces/ytf-sample'));
      assert.ok(ytf.kind === 'ytf');
      assert.deepEqual([ytf.identities, ytf.videos, ytf.images], [7, 8, 240]);
      const cfp = await inspectDataset(shared(this, 'faces/cfp-protocol'));
      assert.ok(cfp.kind === 'cfp');
      assert.deepEqual([cfp.identities, cfp.frontal, cfp.profile], [500, 5000, 2000]);
      assert.deepEqual(cfp.pairs, { frontalFrontal: 7000, frontalProfile: 7000 });
      const set = await inspectDataset(shared(this, 'faces/interop/lfw_dev_numpy.bin'));
      assert.ok(set.kind === 'verification-bin');
      assert.deepEqual([set.pairs, set.same, set.different, set.damaged], [30, 15, 15, []]);
    });
  });

  describe('rows of text', () => {
    it('are those of splitting the whole, wherever the reads end', async () => {
      await fc.assert(
        fc.asyncProperty(
          fc.array(fc.string({ maxLength: 12, unit: 'binary-ascii' }), { maxLength: 20 }),
          fc.constantFrom('\n', '\r\n'),
          fc.boolean(),
          async (given, end, isEnded) => {
            const lines = given.map((line) => line.replace(/[\r\n]/g, ' '));
            const text = lines.join(end) + (isEnded ? end : '');
            const path = await write('rows.txt', text);
            const found: [number, string][] = [];
            for await (const { line, offset, bytes } of readRows(path, 13)) {
              found.push([line, bytes.toString()]);
              assert.equal(text.slice(offset, offset + bytes.length), bytes.toString());
            }
            const expected = lines.map((line, i): [number, string] => [i + 1, line]);
            assert.deepEqual(
              found,
              expected.filter(([, line]) => line !== ''),
            );
          },
        ),
        { numRuns: 100 },
      );
      const long = await write('rows.txt', 'a\n12345678901234');
      const rows = readRows(long, 13);
      await rows.next();
      await assert.rejects(rows.next(), /rows\.txt, line 2: the row is longer than 13 bytes/);
      // A pipe without a writer is told, not waited for.
      await run('mkfifo', [join(folder, 'pipe')]);
      await assert.rejects(readRows(join(folder, 'pipe'), 13).next(), /is not a file/);
      await assert.rejects(readVerificationBin(join(folder, 'pipe')), /is not a file/);
    });

    it('are looked up in a table as in a Map', () => {
      const table = new StringTable();
      const map = new Map<string, number>();
      for (let i = 0; i < 20_000; i += 1) {
        const key = `m.${(i * 7919) % 15_000}/x`;
        table.set(key, i);
        map.set(key, i);
      }
      assert.equal(table.size, map.size);
      for (let i = 0; i < 30_000; i += 1) assert.equal(table.get(`m.${i}/x`), map.get(`m.${i}/x`));
    });
  });

  describe('contact sheets', () => {
    it('show up to 8x8 images, of as many identities as there are', async () => {
      const path = join(folder, 'sheet.png');
      await inspectDataset(await lfwTree(), { contactSheet: path });
      const { data, info } = await sharp(path)
        .removeAlpha()
        .raw()
        .toBuffer({ resolveWithObject: true });
      // Six tiles of 112 pixels in a row, 4 pixels apart and around.
      assert.deepEqual([info.width, info.height], [6 * 116 + 4, 116 + 4]);
      for (let tile = 0; tile < 6; tile += 1) {
        const red = data[(60 * info.width + 4 + 116 * tile + 56) * 3]!;
        assert.ok(Math.abs(red - 30 * tile) <= 3, `tile ${tile} is ${red} red`);
      }

      // 70 identities: one image of each of 64 of them; a damaged one leaves white.
      for (let person = 0; person < 70; person += 1) {
        await write(
          `many/p${String(person).padStart(2, '0')}/1.jpg`,
          person === 0 ? 'text' : jpegs[1]!,
        );
        await write(`many/p${String(person).padStart(2, '0')}/2.jpg`, jpegs[7]!);
      }
      await inspectDataset(join(folder, 'many'), { contactSheet: path });
      const many = await sharp(path).removeAlpha().raw().toBuffer({ resolveWithObject: true });
      assert.deepEqual([many.info.width, many.info.height], [8 * 116 + 4, 8 * 116 + 4]);
      const reds = Array.from({ length: 64 }, (_, tile) => {
        const [x, y] = [4 + 116 * (tile % 8) + 56, 4 + 116 * Math.floor(tile / 8) + 56];
        return many.data[(y * many.info.width + x) * 3]!;
      });
      assert.equal(reds[0], 255);
      assert.ok(
        reds.slice(1).every((red) => Math.abs(red - 30) <= 3),
        reds.join(' '),
      );
    });
  });

  it('that are damaged are refused within 64 MiB and four times their size', async () => {
    const random = Buffer.from(Array.from({ length: 4096 }, (_, i) => (i * 2654435761) >>> 24));
    const magic = Buffer.from([0x0a, 0x23, 0xd7, 0xce]);
    const word = Buffer.alloc(4);
    word.writeUInt32LE(2 ** 29 - 1);
    const record = encodeRecord(Buffer.concat([Buffer.alloc(24), jpegs[0]!]));
    const recs: Record<string, Buffer> = {
      random,
      empty: Buffer.alloc(0),
      'wrong-magic': Buffer.concat([Buffer.from([0x0a, 0x23, 0xd7, 0x3e]), record.subarray(4)]),
      'cut-off': record.subarray(0, 100),
      'huge-length': Buffer.concat([magic, word, Buffer.alloc(64)]),
    };
    const paths: string[] = [];
    for (const [name, rec] of Object.entries(recs)) {
      paths.push(await write(`${name}/${name}.rec`, rec));
      await write(`${name}/${name}.idx`, '0\t0\n');
    }
    for (const form of ['tsv', 'lst', 'bin']) {
      paths.push(await write(`random.${form}`, random), await write(`none.${form}`, ''));
      const zeros = await write(`zeros.${form}`, Buffer.alloc(2 ** 20));
      paths.push(zeros);
    }
    paths.push(
      await write('huge.bin', Buffer.concat([Buffer.from([0x80, 4, 0x42]), word, random])),
    );
    const before = await readdir(folder, { recursive: true });
    const { stdout } = await run(process.execPath, ['--import=tsx', PEAK, 'inspect', ...paths]);
    const { grown, outcomes } = JSON.parse(stdout) as { grown: number; outcomes: unknown[] };
    for (const [i, outcome] of outcomes.entries()) {
      // Either the set is refused by name, or its images are told to be damaged.
      if (typeof outcome === 'string') {
        assert.match(outcome, /^HardmineError: /, paths[i]);
        assert.ok(outcome.includes(paths[i]!.replace(/\.rec$/, '')), outcome);
      } else {
        assert.equal((outcome as { damaged: unknown[] }).damaged.length, 1, paths[i]);
      }
    }
    assert.equal(outcomes.length, paths.length);
    assert.ok(grown < 64 * 2 ** 20 + 4 * 2 ** 20, `memory grew by ${grown} bytes`);
    assert.deepEqual(await readdir(folder, { recursive: true }), before);
  });

  it('are packed and inspected from the command line, mistakes told', async () => {
    const hardmine = async (...argv: string[]) => {
      try {
        const done = await run(process.execPath, [MAIN, ...argv]);
        return { code: 0, ...done };
      } catch (error) {
        return error as { code: number; stdout: string; stderr: string };
      }
    };
    const tree = await lfwTree();
    const needsPairs = await hardmine('pack', tree, join(folder, 'x.bin'));
    assert.equal(needsPairs.code, 2);
    assert.match(needsPairs.stderr, /^error: .*x\.bin .* --pairs/);
    const exclude = await write('exclude.txt', 'Nobody\n');
    const packed = await hardmine(
      'pack',
      tree,
      join(folder, 'set'),
      '--exclude-identities',
      exclude,
    );
    assert.equal(packed.code, 0, packed.stderr);
    assert.match(packed.stderr, /1 of the 1 names .* Nobody\./);
    assert.match(
      packed.stdout,
      /set\.rec: 6 images of 3 identities, \d+ bytes\nbyte duplicates: none\n$/,
    );
    const sheet = join(folder, 'sheet.png');
    const inspected = await hardmine(
      'inspect',
      `${join(folder, 'set')}.rec`,
      '--contact-sheet',
      sheet,
    );
    assert.equal(
      inspected.stdout,
      `recordio (insightface): 6 images of 3 identities, ${(await stat(join(folder, 'set.rec'))).size} bytes\nimages per identity: 1 to 3, median 2\nsizes: 112x112 (6)\ndamaged: 0\ncontact sheet: ${sheet}\n`,
    );
    assert.equal((await sharp(sheet).metadata()).format, 'png');
  });
});
