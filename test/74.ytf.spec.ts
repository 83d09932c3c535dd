import assert from 'node:assert/strict';
import {
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  truncate,
  utimes,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import type { Box } from '../src/align/boxes.js';
import { HardmineError } from '../src/errors.js';
import type { ScoreModel } from '../src/evaluate/pairs.js';
import {
  AGGREGATES,
  type EvaluateYtf,
  evaluateYtf,
  evenlySpaced,
  findVideos,
  parseYtfSplits,
} from '../src/evaluate/ytf.js';
import { type Colour, MeanColour, writeColour } from './helpers/colour-faces.js';
import { shared } from './helpers/skip.js';

const LINES = [
  'split number, pair number in split, first name, second name, is same:',
  '1, 1, Ann/0, Ann/1, 1',
  '1, 2, Ann/0, Bob/0, 0',
  '2, 1, Bob/0, Bob/3, 1',
  '2, 2, Bob/3, Ann/1, 0',
];

/** Frames of the four videos: colours of one person are alike. */
const VIDEOS: Record<string, Colour[]> = {
  'Ann/0': [
    [220, 40, 40],
    [200, 60, 40],
    [220, 40, 80],
  ],
  'Ann/1': [
    [210, 50, 50],
    [180, 30, 60],
  ],
  'Bob/0': [
    [40, 200, 60],
    [60, 220, 40],
    [70, 210, 90],
    [40, 180, 40],
  ],
  'Bob/3': [[50, 210, 50]],
};

describe('parseYtfSplits', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores

  it('reads splits with and without headings', () => {
    const splits = parseYtfSplits(LINES.join('\n'));
    assert.equal(splits.folds, 2);
    assert.deepEqual(
      splits.videos.map(({ person, number }) => `${person}/${number}`),
      ['Ann/0', 'Ann/1', 'Bob/0', 'Bob/3'],
    );
    assert.deepEqual(
      splits.pairs.map(({ a, b, same, fold }) => [a, b, same, fold]),
      [
        [0, 1, true, 0],
        [0, 2, false, 0],
        [2, 3, true, 1],
        [3, 1, false, 1],
      ],
    );
    assert.deepEqual(parseYtfSplits(LINES.slice(1).join('\r\n')), splits);
  });

  it('reads the official list whole', async function () {
    const path = join(shared(this, 'faces/ytf-sample'), 'splits.txt');
    const { folds, videos, pairs } = parseYtfSplits(await readFile(path, 'utf8'), path);
    assert.deepEqual([folds, pairs.length], [10, 5000]);
    for (let fold = 0; fold < 10; fold++) {
      const inFold = pairs.filter((pair) => pair.fold === fold);
      assert.deepEqual([inFold.length, inFold.filter(({ same }) => same).length], [500, 250]);
    }
    // Every video is listed once, and a genuine pair is of one person.
    assert.equal(
      new Set(videos.map(({ person, number }) => `${person}/${number}`)).size,
      videos.length,
    );
    for (const { a, b, same } of pairs) {
      assert.equal(videos[a]!.person === videos[b]!.person, same);
    }
  });

  it('refuses everything else, naming the line', () => {
    const change = (line: number, text: string) =>
      LINES.map((old, i) => (i === line - 1 ? text : old)).join('\n');
    const refused: [string, RegExp][] = [
      ['', /line 1: found no pair/],
      [LINES[0]!, /line 2: found no pair/],
      [LINES.slice(0, 4).join('\n'), /split 2 holds 1 pairs of one person and 0 of two/],
      [LINES.slice(0, 3).join('\n'), /found one split/],
      [`${LINES.join('\n')}\n2, 3, Bob/3, Ann/0, 0`, /split 2 holds 3 pairs where split 1 holds 2/],
      [change(3, '1, 2, Ann/0, Bob/0, 1'), /split 1 holds 2 pairs of one person and 0 of two/],
      [change(2, '1, 1, Ann/0, Ann/1'), /line 2: found "1, 1, Ann\/0, Ann\/1", expected "split/],
      [change(2, '1, 1, Ann/0, Ann/1, 2'), /line 2: found/],
      [change(2, '2, 1, Ann/0, Ann/1, 1'), /line 2: found split "2", expected 0 or 1/],
      [change(4, '3, 1, Bob/0, Bob/3, 1'), /line 4: found split "3", expected 1 or 2/],
      [change(3, '1, 3, Ann/0, Bob/0, 0'), /line 3: found pair "3" of split 1, expected 2/],
      [change(3, '1, 2, Ann/0, Ann/0, 0'), /line 3: it pairs a video with itself/],
      [change(3, '1, 2, Ann/0, ../0, 0'), /line 3: "..\/0" is no video/],
      [change(3, '1, 2, Ann/0, ../../etc/0, 0'), /line 3: "..\/..\/etc\/0" is no video/],
      [change(3, '1, 2, Ann/0, Bob/.., 0'), /line 3: "Bob\/.." is no video/],
      [change(3, '1, 2, Ann/0, Bob, 0'), /line 3: "Bob" is no video/],
      [change(3, '1, 2, Ann/0, a\\b/0, 0'), /line 3: "a\\\\b\/0" is no video/],
    ];
    for (const [text, message] of refused) {
      assert.throws(
        () => parseYtfSplits(text, 'list.txt'),
        (error: unknown) =>
          error instanceof HardmineError &&
          error.code === 'ERR_PROTOCOL' &&
          error.message.startsWith('list.txt, ') &&
          message.test(error.message),
        `${JSON.stringify(text.slice(0, 200))} against ${message}`,
      );
    }
  });
});

describe('evenlySpaced', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores

  it('takes the middles of equally long stretches', () => {
    const items = [...Array(10).keys()];
    assert.deepEqual(evenlySpaced(items, 1), [5]);
    assert.deepEqual(evenlySpaced(items, 2), [2, 7]);
    assert.deepEqual(evenlySpaced(items, 5), [1, 3, 5, 7, 9]);
    assert.deepEqual(evenlySpaced(items, 10), items);
    assert.deepEqual(evenlySpaced(items, 11), items);
    for (let most = 1; most < 10; most++)
      assert.equal(new Set(evenlySpaced(items, most)).size, most);
  });
});

describe('evaluateYtf', function () {
  this.timeout(60_000); // seconds at most when alone; the suite may share its cores
  let root: string;
  const frame = (video: string, number: number) => {
    const [, folder] = video.split('/');
    return join(root, 'aligned_images_DB', video, `aligned_detect_${folder}.${number}.jpg`);
  };

  beforeEach(async () => {
    root = await mkdtemp(join(tmpdir(), 'hardmine-ytf-'));
    for (const [video, colours] of Object.entries(VIDEOS)) {
      // Numbers whose text order is not their own: 9, 10, 11, ...
      for (const [i, colour] of colours.entries()) await writeColour(frame(video, 9 + i), colour);
    }
    await writeFile(join(root, 'splits.txt'), LINES.join('\n'));
  });
  afterEach(() => rm(root, { recursive: true, force: true }));

  const evaluate = (options: Partial<EvaluateYtf> = {}, model: ScoreModel = new MeanColour()) =>
    evaluateYtf(model, { root, ...options });

  /** Unit embeddings (image and mirror image: twice the colour) as the files show them. */
  async function unitFrames(): Promise<number[][][]> {
    return Promise.all(
      ['Ann/0', 'Ann/1', 'Bob/0', 'Bob/3'].map((video) =>
        Promise.all(
          VIDEOS[video]!.map(async (_, i) => {
            const { channels } = await sharp(frame(video, 9 + i)).stats();
            const colour = channels.map(({ mean }) => mean - 120);
            return colour.map((x) => x / Math.hypot(...colour));
          }),
        ),
      ),
    );
  }
  const dot = (a: readonly number[], b: readonly number[]) =>
    a.reduce((sum, x, i) => sum + x * b[i]!, 0);

  it('embeds every frame once, with its mirror image, and says what it did', async () => {
    const model = new MeanColour();
    const progress: [number, number][] = [];
    const result = await evaluate(
      { onProgress: (done, total) => progress.push([done, total]) },
      model,
    );
    assert.deepEqual([model.images, model.mirrored], [10, 10]);
    assert.deepEqual(progress, [
      [1, 4],
      [2, 4],
      [3, 4],
      [4, 4],
    ]);
    assert.equal(result.auc, 1);
    assert.deepEqual(
      [result.dataset, result.videos, result.pairs, result.aggregate, result.missing],
      ['ytf', 4, 4, 'mean-embedding', 0],
    );
    assert.deepEqual(result.frames, { sampling: 'all', perVideo: null, used: 10 });
    assert.equal(result.framesWithoutFace, 0);
    assert.deepEqual(result.details.paths[0], frame('Ann/0', 10));
  });

  it('compares videos by every rule as its definition says', async () => {
    const videos = await unitFrames();
    const pairs = [
      [0, 1],
      [0, 2],
      [2, 3],
      [3, 1],
    ] as const;
    const mean = (frames: number[][]) =>
      [0, 1, 2].map((i) => frames.reduce((sum, f) => sum + f[i]!, 0) / frames.length);
    for (const aggregate of AGGREGATES) {
      const { details } = await evaluate({ aggregate });
      for (const [k, [a, b]] of pairs.entries()) {
        const all = videos[a]!.flatMap((x) => videos[b]!.map((y) => dot(x, y)));
        const [p, q] = [mean(videos[a]!), mean(videos[b]!)];
        const cosine = {
          'mean-embedding': dot(p, q) / Math.hypot(...p) / Math.hypot(...q),
          mean: all.reduce((sum, x) => sum + x, 0) / all.length,
          max: Math.max(...all),
          min: Math.min(...all),
        }[aggregate];
        // Embeddings are float32 numbers up to 200.
        assert.ok(
          Math.abs(details.distances[k]! - (2 - 2 * cosine)) < 1e-5,
          `${aggregate} of pair ${k}: ${details.distances[k]} against ${2 - 2 * cosine}`,
        );
      }
    }
    const facex = await evaluate({ aggregate: 'max', protocol: 'facex' });
    assert.deepEqual([facex.score, facex.auc], ['cosine', 1]);
    await assert.rejects(evaluate({ aggregate: 'max', protocol: 'sphereface' }), {
      code: 'ERR_INPUT',
      message: /choose the aggregate mean-embedding instead of max/,
    });
  });

  it('takes frames evenly spaced where told to', async () => {
    const model = new MeanColour();
    const result = await evaluate({ frames: 2 }, model);
    assert.equal(model.images, 7);
    assert.deepEqual(result.frames, { sampling: 'evenly spaced', perVideo: 2, used: 7 });
    await assert.rejects(evaluate({ frames: 0 }), { code: 'ERR_INPUT' });
    await assert.rejects(evaluate({ frames: 1.5 }), { code: 'ERR_INPUT' });
  });

  it('leaves out frames without a face, and names a video that has no other', async () => {
    const asked: string[] = [];
    const align = (without: RegExp) => async (path: string) => {
      asked.push(path);
      if (without.test(path)) return null;
      return new Uint8Array(await sharp(path).resize(112, 112).removeAlpha().raw().toBuffer());
    };
    const all = await evaluate();
    const result = await evaluate({ align: align(/Bob\/0\/.*\.(9|10)\.jpg$/) });
    assert.equal(asked.length, 10);
    assert.equal(result.framesWithoutFace, 2);
    assert.equal(result.frames.used, 8);
    const distances = [...result.details.distances];
    // Pairs of Bob/0 change, the others do not.
    assert.equal(distances[0], all.details.distances[0]);
    assert.notEqual(distances[1], all.details.distances[1]);
    await assert.rejects(evaluate({ align: align(/Bob\/3/) }), {
      code: 'ERR_DATA',
      message: /any of the 1 frames of the video Bob\/3/,
    });
    await assert.rejects(evaluate({ align: async () => new Uint8Array(3) }), {
      code: 'ERR_INPUT',
      message: /gave 3 bytes, expected 37632/,
    });
  });

  it('names all missing videos in one error, before anything is embedded', async () => {
    await rm(join(root, 'aligned_images_DB', 'Ann', '1'), { recursive: true });
    await rm(frame('Bob/3', 9));
    const model = new MeanColour();
    await assert.rejects(evaluate({}, model), {
      code: 'ERR_PROTOCOL',
      message: /^2 of 4 videos are missing under .*aligned_images_DB: Ann\/1, Bob\/3; /,
    });
    assert.equal(model.images, 0);
  });

  it('refuses lists, names, sizes and numbers that are wrong', async () => {
    await assert.rejects(evaluate({ splits: join(root, 'no.txt') }), {
      code: 'ERR_PROTOCOL',
      message: /no\.txt could not be read .*--splits/,
    });
    await assert.rejects(evaluate({ aggregate: 'median' as 'mean' }), {
      code: 'ERR_INPUT',
      message: /aggregate is median: give mean-embedding or mean or max or min/,
    });
    const nan: ScoreModel = {
      embedding: 2,
      embed: async (images) => new Float32Array((2 * images.length) / 37632).fill(Number.NaN),
    };
    await assert.rejects(evaluate({}, nan), {
      code: 'ERR_NON_FINITE',
      message: /a frame of the video Ann\/0/,
    });
    await writeColour(join(root, 'aligned_images_DB/Ann/0/cover.jpg'), [1, 2, 3]);
    await assert.rejects(evaluate(), {
      code: 'ERR_PROTOCOL',
      message: /cover\.jpg is no frame's name/,
    });
    await rm(join(root, 'aligned_images_DB/Ann/0/cover.jpg'));
    await writeColour(join(root, 'aligned_images_DB/Ann/0/0.9.jpg'), [1, 2, 3]);
    await assert.rejects(evaluate(), {
      code: 'ERR_PROTOCOL',
      message: /holds frame 9 more than once/,
    });
    await rm(join(root, 'aligned_images_DB/Ann/0/0.9.jpg'));
    await writeColour(frame('Ann/0', 10), [220, 40, 40], 100);
    await assert.rejects(evaluate(), {
      code: 'ERR_DATA',
      message: /100x100 pixels .*hardmine align/,
    });
    await writeFile(frame('Ann/0', 10), 'no image');
    await assert.rejects(evaluate(), { code: 'ERR_DATA', message: /is not a JPEG or PNG/ });
  });

  it('stops when told to', async () => {
    const stop = new AbortController();
    await assert.rejects(evaluate({ signal: stop.signal, onProgress: () => stop.abort() }), {
      code: 'ERR_ABORTED',
      message: /after 1 of 4 videos/,
    });
  });

  it('keeps embeddings on the disk and uses them again', async () => {
    const folder = join(root, 'cache');
    const cached = async (options: Partial<EvaluateYtf> = {}, key = 'model 1') => {
      const model = new MeanColour();
      const result = await evaluate({ cache: { folder, key }, ...options }, model);
      return {
        images: model.images,
        distances: [...result.details.distances],
        notes: result.details.notes,
      };
    };
    const plain = (await evaluate()).details;
    const first = await cached();
    assert.equal(first.images, 10);
    assert.deepEqual(first.distances, [...plain.distances]);
    assert.deepEqual(await cached(), { ...first, images: 0 });
    // Another aggregate of the same frames costs nothing; another model, rule or kind of row does.
    assert.equal((await cached({ aggregate: 'max' })).images, 0);
    assert.equal((await cached({}, 'model 2')).images, 10);
    assert.equal((await cached({ frames: 1 })).images, 4);
    assert.equal((await cached({ protocol: 'sphereface' })).images, 10);
    assert.equal((await cached({ protocol: 'facenet' })).images, 10);

    const [npy] = await findFiles(folder, 'Bob/0.npy', 'model 1', cached);
    const size = (await stat(npy!)).size;
    const bytes = await readFile(npy!);
    const flipped = Buffer.from(bytes);
    flipped[size - 1]! ^= 1;
    for (const damage of [
      () => truncate(npy!, size - 4),
      () => truncate(npy!, 0),
      () => writeFile(npy!, flipped),
      () => writeFile(npy!, Buffer.concat([bytes, Buffer.alloc(4)])),
      () => writeFile(npy!.replace('.npy', '.json'), '{"frames":1}'),
      () => writeFile(npy!.replace('.npy', '.json'), '{'),
      () => rm(npy!),
    ]) {
      await damage();
      const again = await cached();
      assert.deepEqual([again.images, again.distances], [4, first.distances], String(damage));
      assert.ok(
        again.notes.some((note) => /^1 cached videos were damaged and .*: Bob\/0\.$/.test(note)),
        again.notes.join(),
      );
      assert.deepEqual(await readFile(npy!), bytes, 'the damaged file is mended');
    }
    // A frame that changed makes its video stale.
    await utimes(frame('Ann/1', 9), 1, 1);
    const stale = await cached();
    assert.equal(stale.images, 2);
    assert.ok(
      stale.notes.some((note) => /^1 cached videos had other frames and .*: Ann\/1\.$/.test(note)),
    );
    const leftover = (await readdir(folder, { recursive: true })).filter((name) =>
      /tmp/.test(name),
    );
    assert.deepEqual(leftover, []);
  });

  /** Files of the cache that an evaluation under `key` uses: those it makes where the folder is empty. */
  async function findFiles(
    folder: string,
    name: string,
    key: string,
    run: (options: Partial<EvaluateYtf>, key: string) => Promise<unknown>,
  ): Promise<string[]> {
    await rm(folder, { recursive: true });
    await run({}, key);
    const names = await readdir(folder, { recursive: true });
    return names.filter((found) => found.endsWith(name)).map((found) => join(folder, found));
  }
});

describe('YouTube Faces sample', function () {
  this.timeout(120_000); // seconds at most when alone; the suite may share its cores

  it('runs end to end on real frames, each cut out at its labelled box', async function () {
    const root = shared(this, 'faces/ytf-sample');
    const boxes = new Map<string, Box | undefined>();
    const align = async (path: string, box?: Box): Promise<Uint8Array> => {
      boxes.set(path, box);
      const { width, height } = await sharp(path).metadata();
      const left = Math.max(0, Math.round(box!.x));
      const top = Math.max(0, Math.round(box!.y));
      const pixels = await sharp(path)
        .extract({
          left,
          top,
          width: Math.min(width - left, Math.round(box!.width)),
          height: Math.min(height - top, Math.round(box!.height)),
        })
        .resize(112, 112, { fit: 'fill' })
        .removeAlpha()
        .raw()
        .toBuffer();
      return new Uint8Array(pixels);
    };
    const result = await evaluateYtf(new MeanColour(), {
      root,
      splits: join(root, 'splits_sample.txt'),
      align,
    });
    assert.deepEqual([result.pairs, result.videos, result.frames.used], [20, 8, 240]);
    assert.equal(result.accuracy.perFold.length, 10);
    // Aaron_Guiel\5\5.1841.jpg,0,185,83,47,47: centre and size.
    const guiel = join(root, 'frame_images_DB/Aaron_Guiel/5/5.1841.jpg');
    assert.deepEqual(boxes.get(guiel), { x: 161.5, y: 59.5, width: 47, height: 47 });
    assert.equal(boxes.size, 240);
    // Frames as they are have no 112 pixels.
    await assert.rejects(
      evaluateYtf(new MeanColour(), { root, splits: join(root, 'splits_sample.txt') }),
      { code: 'ERR_DATA', message: /where 112x112 is needed/ },
    );
  });

  it('names the videos of the full list that are missing, first ten of all', async function () {
    const root = shared(this, 'faces/ytf-sample');
    await assert.rejects(evaluateYtf(new MeanColour(), { root }), {
      code: 'ERR_PROTOCOL',
      message:
        /^3218 of 3226 videos are missing under .*: AJ_Cook\/0, (\S+, ){8}\S+ and 3208 more; /,
    });
  });

  it('refuses labels that are missing or damaged', async () => {
    const root = await mkdtemp(join(tmpdir(), 'hardmine-ytf-'));
    try {
      await writeColour(join(root, 'frame_images_DB/Ann/0/0.1.jpg'), [9, 9, 9], 200);
      const videos = [{ person: 'Ann', number: '0' }];
      await assert.rejects(findVideos(root, videos, true), {
        code: 'ERR_PROTOCOL',
        message: /Ann\.labeled_faces\.txt could not be read/,
      });
      const labels = join(root, 'frame_images_DB', 'Ann.labeled_faces.txt');
      for (const line of ['Ann\\0\\0.1.jpg,0,1,2,3', 'Ann\\0\\0.1.jpg,0,1,2,-3,4,0,1', 'x']) {
        await writeFile(labels, line);
        await assert.rejects(findVideos(root, videos, true), {
          code: 'ERR_PROTOCOL',
          message: /Ann\.labeled_faces\.txt, line 1: found/,
        });
      }
      await writeFile(labels, 'Ann\\0\\0.1.jpg,0,50,60,20,10,0,1\n');
      const found = await findVideos(root, videos, true);
      assert.deepEqual(found.videos[0]!.boxes, [{ x: 40, y: 55, width: 20, height: 10 }]);
    } finally {
      await rm(root, { recursive: true, force: true });
    }
  });
});
