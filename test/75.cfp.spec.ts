import assert from 'node:assert/strict';
import { cp, mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { evaluateCfp, readCfpLists } from '../src/evaluate/cfp.js';
import { type Colour, MeanColour, writeColour } from './helpers/colour-faces.js';
import { shared } from './helpers/skip.js';

/** Two people, of each three frontal faces and two profiles. */
const COLOURS: readonly Colour[] = [
  [220, 60, 40],
  [40, 200, 80],
];

describe('CFP', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  let root: string;
  const split = (kind: 'FF' | 'FP', fold: number, file: 'same' | 'diff') =>
    join(root, 'Protocol', 'Split', kind, String(fold).padStart(2, '0'), `${file}.txt`);

  beforeEach(async () => {
    root = await mkdtemp(join(tmpdir(), 'hardmine-cfp-'));
    const lists: Record<string, string[]> = { frontal: [], profile: [] };
    for (const [person, [r, g, b]] of COLOURS.entries()) {
      for (const [pose, images] of [
        ['frontal', 3],
        ['profile', 2],
      ] as const) {
        for (let image = 1; image <= images; image++) {
          const path = `00${person + 1}/${pose}/0${image}.jpg`;
          const shade = pose === 'profile' ? 10 : 0;
          await writeColour(join(root, 'Data/Images', path), [r, g + shade, b + 5 * image]);
          const list = lists[pose]!;
          list.push(`${list.length + 1} ../Data/Images/${path}`);
        }
      }
    }
    for (let fold = 1; fold <= 10; fold++) {
      for (const kind of ['FF', 'FP'] as const) {
        await mkdir(join(split(kind, fold, 'same'), '..'), { recursive: true });
      }
      // Frontal faces 1 to 3 and profiles 1 and 2 are of the first person. Image 6 is never named.
      await writeFile(split('FF', fold, 'same'), fold % 2 ? '1,2\n4,5\n' : '1,3\n');
      await writeFile(split('FF', fold, 'diff'), '1,4\n2,5\n');
      await writeFile(split('FP', fold, 'same'), '1,2\n5,3\n');
      await writeFile(split('FP', fold, 'diff'), '2,4\r\n4,1\r\n');
    }
    await writeFile(join(root, 'Protocol/Pair_list_F.txt'), `${lists['frontal']!.join('\n')}\n`);
    await writeFile(join(root, 'Protocol/Pair_list_P.txt'), `${lists['profile']!.join('\n')}\n`);
  });
  afterEach(() => rm(root, { recursive: true, force: true }));

  it('reads the official lists', async function () {
    const { images, pairs } = await readCfpLists(shared(this, 'faces/cfp-protocol'));
    assert.equal(images.length, 7000);
    assert.deepEqual([images[0], images[5000]], ['001/frontal/01', '001/profile/01']);
    for (const kind of ['FF', 'FP'] as const) {
      for (let fold = 0; fold < 10; fold++) {
        const inFold = pairs[kind].filter((pair) => pair.fold === fold);
        assert.deepEqual([inFold.length, inFold.filter(({ same }) => same).length], [700, 350]);
      }
      for (const { a, b, same } of pairs[kind]) {
        assert.ok(images[a]!.includes('/frontal/'));
        assert.ok(images[b]!.includes(kind === 'FF' ? '/frontal/' : '/profile/'));
        assert.equal(images[a]!.slice(0, 3) === images[b]!.slice(0, 3), same);
      }
    }
    // The first lines of FP's first fold: 5,1 and 5,97.
    const [first] = pairs.FP;
    assert.deepEqual([images[first!.a], images[first!.b]], ['001/frontal/05', '001/profile/01']);
  });

  it('reports FF and FP, with every image that they name embedded once', async () => {
    const model = new MeanColour();
    const { ff, fp } = await evaluateCfp(model, { root });
    assert.deepEqual([model.images, model.mirrored], [9, 9]);
    assert.deepEqual([ff.dataset, ff.pairs, ff.auc, ff.missing], ['cfp-ff', 35, 1, 0]);
    assert.deepEqual([fp.dataset, fp.pairs, fp.auc, fp.missing], ['cfp-fp', 40, 1, 0]);
    assert.match(fp.details.paths[fp.details.hardestGenuine[0]!.b]!, /profile\/0\d\.jpg$/);
    // The folder of the images itself, with the lists elsewhere.
    const images = join(root, 'images');
    await cp(join(root, 'Data/Images'), images, { recursive: true });
    const again = await evaluateCfp(new MeanColour(), {
      root: images,
      lists: join(root, 'Protocol'),
    });
    assert.deepEqual(again.fp.details.distances, fp.details.distances);
  });

  it('counts images without a face', async () => {
    const align = async (file: string) =>
      file.endsWith('002/profile/01.jpg')
        ? null
        : new Uint8Array(await sharp(file).removeAlpha().raw().toBuffer());
    const { ff, fp } = await evaluateCfp(new MeanColour(), { root, align });
    assert.deepEqual([ff.missing, fp.missing], [1, 1]);
    assert.deepEqual(
      [...ff.details.right].filter((right) => right === 0),
      [],
    );
    assert.equal([...fp.details.right].filter((right) => right === 0).length, 10);
  });

  it('names all missing images in one error', async () => {
    await rm(join(root, 'Data/Images/001/frontal'), { recursive: true });
    await assert.rejects(evaluateCfp(new MeanColour(), { root }), {
      code: 'ERR_PROTOCOL',
      message:
        /^3 of 9 images are missing under .*Images: 001\/frontal\/01\.jpg, 001\/frontal\/02\.jpg, /,
    });
  });

  it('refuses lists that are not those of CFP, naming file and line', async () => {
    const list = join(root, 'Protocol/Pair_list_F.txt');
    const refused: [string, string, RegExp][] = [
      [list, '', /Pair_list_F\.txt, line 1: found no image/],
      [list, '1 ../../../etc/passwd', /line 1: found "1 ..\/..\/..\/etc\/passwd", expected "1 /],
      [list, '1 ../Data/Images/001/frontal/../01.jpg', /line 1: found/],
      [list, '1 ../Data/Images/001/profile/01.jpg', /line 1: found/],
      [list, '2 ../Data/Images/001/frontal/01.jpg', /line 1: found/],
      [split('FF', 3, 'same'), '', /03\/same\.txt, line 1: found no pair/],
      [split('FF', 3, 'same'), '1,2\n1;3', /03\/same\.txt, line 2: found "1;3"/],
      [split('FF', 3, 'same'), '0,2', /from 1 to 6 and from 1 to 6/],
      [split('FF', 3, 'same'), '1,7', /line 1: found "1,7"/],
      [split('FP', 3, 'same'), '1,5', /from 1 to 6 and from 1 to 4/],
      [split('FF', 3, 'same'), '2,2', /it pairs an image with itself/],
      [split('FF', 3, 'same'), '1,4', /001\/frontal\/01 and 002\/frontal\/01 stand under same/],
      [split('FP', 10, 'diff'), '1,1', /001\/frontal\/01 and 001\/profile\/01 stand under diff/],
    ];
    for (const [path, text, message] of refused) {
      const saved = join(root, 'saved');
      await cp(path, saved);
      await writeFile(path, text);
      await assert.rejects(readCfpLists(join(root, 'Protocol')), { code: 'ERR_PROTOCOL', message });
      await cp(saved, path);
    }
    await rm(split('FP', 4, 'diff'));
    await assert.rejects(readCfpLists(join(root, 'Protocol')), {
      code: 'ERR_PROTOCOL',
      message: /04\/diff\.txt could not be read .*--cfp-protocol/,
    });
  });
});
