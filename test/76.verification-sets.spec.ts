import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { blockFolds, evaluateBin } from '../src/evaluate/bin.js';
import { pixelSimilarity } from '../src/evaluate/pairs.js';
import { writeVerificationBin } from '../src/formats/verification-bin.js';
import { type Colour, MeanColour, writeColour } from './helpers/colour-faces.js';
import { shared } from './helpers/skip.js';

describe('verification .bin', function () {
  this.timeout(60_000); // seconds at most when alone; the suite may share its cores
  let root: string;

  before(async () => {
    root = await mkdtemp(join(tmpdir(), 'hardmine-bin-'));
  });
  after(() => rm(root, { recursive: true, force: true }));

  async function colour(colour: Colour, side = 112): Promise<Buffer> {
    const path = join(root, 'face.jpg');
    await writeColour(path, colour, side);
    return readFile(path);
  }

  it("cuts pairs into ten blocks as scikit-learn's KFold does", () => {
    // KFold(10).split(range(23)): three blocks of 3, seven of 2.
    assert.deepEqual(blockFolds(23), [...'00011122233445566778899'].map(Number));
    assert.deepEqual(blockFolds(10), [...Array(10).keys()]);
    const folds = blockFolds(7000);
    for (let fold = 0; fold < 10; fold++) {
      assert.equal(folds.indexOf(fold), 700 * fold);
      assert.equal(folds.lastIndexOf(fold), 700 * fold + 699);
    }
  });

  it('judges the pairs of a file, pair k the images 2k and 2k + 1', async () => {
    const red = await colour([220, 40, 40]);
    const red2 = await colour([200, 60, 60]);
    const blue = await colour([40, 60, 220]);
    const path = join(root, 'set.bin');
    const images = Array.from({ length: 21 }, (_, i) => (i % 2 ? [red, blue] : [red, red2])).flat();
    const same = Array.from({ length: 21 }, (_, i) => i % 2 === 0);
    await writeVerificationBin(path, images, same);
    const model = new MeanColour();
    const result = await evaluateBin(model, { path, batch: 8 });
    assert.deepEqual([model.images, model.mirrored], [42, 42]);
    assert.deepEqual([result.dataset, result.pairs, result.accuracy.mean], ['bin', 21, 1]);
    assert.deepEqual([...result.details.fold], blockFolds(21));
    const [worst] = result.details.hardestImpostors;
    assert.deepEqual(Buffer.from(result.details.images[worst!.b]!), blue);
  });

  it('refuses too few pairs and images of another size, naming the image', async () => {
    const path = join(root, 'bad.bin');
    const face = await colour([1, 2, 3]);
    await writeVerificationBin(path, Array<Buffer>(18).fill(face), Array<boolean>(9).fill(true));
    await assert.rejects(evaluateBin(new MeanColour(), { path }), {
      code: 'ERR_PROTOCOL',
      message: /holds 9 pairs, expected at least 10/,
    });
    const images: Buffer[] = Array(20).fill(face);
    images[7] = await colour([1, 2, 3], 96);
    await writeVerificationBin(
      path,
      images,
      images.slice(10).map((_, i) => i % 2 === 0),
    );
    await assert.rejects(evaluateBin(new MeanColour(), { path }), {
      code: 'ERR_DATA',
      message: /bad\.bin, image 7 is 96x96 pixels/,
    });
    images[7] = face;
    await writeVerificationBin(path, images, Array<boolean>(10).fill(true));
    await assert.rejects(evaluateBin(new MeanColour(), { path }), {
      code: 'ERR_PROTOCOL',
      message: /10 of one person and 0 of two/,
    });
  });

  it("judges InsightFace's own files, whatever the pickle, in folds of both kinds", async function () {
    const folder = shared(this, 'faces/interop');
    const [p2, p4] = await Promise.all(
      ['lfw_dev_p2.bin', 'lfw_dev_p4.bin'].map((name) =>
        evaluateBin(new MeanColour(), { path: join(folder, name) }),
      ),
    );
    assert.deepEqual(p2!.details.distances, p4!.details.distances);
    assert.equal(p2!.pairs, 300);
    for (let fold = 0; fold < 10; fold++) {
      const kinds = [...p2!.details.same].filter((_, i) => p2!.details.fold[i] === fold);
      assert.deepEqual([kinds.length, kinds.filter((same) => same === 1).length], [30, 15]);
    }
    const path = join(folder, 'lfw_dev_p4.bin');
    const pixels = await evaluateBin(pixelSimilarity, { path, protocol: 'facenet' });
    // Aligned pixels tell people apart better than chance does: z of 300 fair tosses is 1.96 at 55.7%.
    assert.ok(pixels.accuracy.mean > 0.557, String(pixels.accuracy.mean));
    await assert.rejects(evaluateBin(pixelSimilarity, { path: join(folder, 'hostile.bin') }), {
      code: 'ERR_FORMAT',
    });
  });
});
