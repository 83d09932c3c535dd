import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { type GeneratedFacesOptions, generateFaces } from '../src/data/generated-faces.js';
import { parseImageRecord, readIndex, readRecord } from './helpers/recordio-reader.js';

const IDENTITIES = 40;
const IMAGES = 16;

/** JPEGs of a packed set in order. */
function readSet(rec: string): Buffer[] {
  const bytes = readFileSync(rec);
  return readIndex(readFileSync(rec.replace(/rec$/, 'idx'), 'utf8'))
    .map(([, offset]) => parseImageRecord(readRecord(bytes, offset).payload))
    .filter((record) => record.image.length > 0)
    .map((record) => record.image);
}

function cosine(a: Float32Array, b: Float32Array): number {
  let [ab, aa, bb] = [0, 0, 0];
  for (let i = 0; i < a.length; i += 1) {
    ab += a[i]! * b[i]!;
    aa += a[i]! * a[i]!;
    bb += b[i]! * b[i]!;
  }
  return ab / Math.sqrt(aa * bb);
}

describe('generated faces', function () {
  this.timeout(60_000); // 640 faces are drawn once: 3 s on two free cores
  let folder: string;
  let jpegs: Buffer[];
  let pixels: Float32Array[];

  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-faces-'));
    const out = join(folder, 'faces');
    jpegs = readSet(
      await generateFaces({ identities: IDENTITIES, imagesPerIdentity: IMAGES, seed: 1, out }),
    );
    pixels = await Promise.all(
      jpegs.map(async (jpeg) => {
        const { data, info } = await sharp(jpeg, { failOn: 'warning' })
          .raw()
          .toBuffer({ resolveWithObject: true });
        assert.deepEqual([info.width, info.height, info.channels], [112, 112, 3]);
        return Float32Array.from(data, (value) => (value - 127.5) / 128);
      }),
    );
  });
  after(() => rmSync(folder, { recursive: true, force: true }));

  const draw = async (name: string, options: Partial<GeneratedFacesOptions>): Promise<Buffer[]> =>
    readSet(
      await generateFaces({
        identities: 3,
        imagesPerIdentity: 3,
        seed: 1,
        out: join(folder, name),
        ...options,
      }),
    );

  it('are packed in order, as many as were asked for, all different', () => {
    assert.equal(jpegs.length, IDENTITIES * IMAGES);
    assert.equal(new Set(jpegs.map((jpeg) => jpeg.toString('base64'))).size, jpegs.length);
    const out = join(folder, 'faces');
    assert.equal(readFileSync(join(out, 'property'), 'utf8'), `${IDENTITIES},112,112`);
    assert.match(readFileSync(join(out, 'identities.txt'), 'utf8'), /^face-1\nface-2\n/);
  });

  it('are the same bytes for the same seed, and other faces for another', async () => {
    const again = await draw('again', {});
    assert.deepEqual(await draw('once-more', {}), again);
    const other = await draw('other', { seed: 2 });
    assert.ok(other.every((jpeg, i) => !jpeg.equals(again[i]!)));
  });

  it('cannot be told apart by their pixels', () => {
    // Balanced pairs; the threshold is the best one in hindsight, which flatters pixel similarity.
    const scores: { score: number; same: boolean }[] = [];
    for (let i = 0; i < pixels.length; i += 1) {
      const identity = Math.floor(i / IMAGES);
      const sibling = identity * IMAGES + ((i + 1) % IMAGES);
      const stranger =
        ((identity + 1 + (i % (IDENTITIES - 1))) % IDENTITIES) * IMAGES + (i % IMAGES);
      scores.push({ score: cosine(pixels[i]!, pixels[sibling]!), same: true });
      scores.push({ score: cosine(pixels[i]!, pixels[stranger]!), same: false });
    }
    scores.sort((a, b) => b.score - a.score);
    let right = scores.length / 2;
    let best = right;
    for (const { same } of scores) {
      right += same ? 1 : -1;
      best = Math.max(best, right);
    }
    // 0.50 is chance; 1,280 pairs give it a standard deviation of 0.014.
    assert.ok(best / scores.length <= 0.65, `accuracy ${best / scores.length}`);
  });

  it('keep what makes an identity', () => {
    // Averaged over eight images, pose, light and background fade, and what is left is the identity:
    // the mean of one half of a person's images must be nearest to that of the other half.
    const mean = (identity: number, half: number): Float32Array => {
      const sum = new Float32Array(pixels[0]!.length);
      for (let k = half; k < IMAGES; k += 2) {
        const image = pixels[identity * IMAGES + k]!;
        for (let i = 0; i < sum.length; i += 1) sum[i]! += image[i]!;
      }
      const average = sum.reduce((total, value) => total + value, 0) / sum.length;
      return sum.map((value) => value - average);
    };
    const [first, second] = [0, 1].map((half) =>
      Array.from({ length: IDENTITIES }, (_, identity) => mean(identity, half)),
    ) as [Float32Array[], Float32Array[]];
    let found = 0;
    for (const [identity, probe] of first.entries()) {
      const scores = second.map((other) => cosine(probe, other));
      if (scores.indexOf(Math.max(...scores)) === identity) found += 1;
    }
    // By chance one of the 40 is found; five would be beyond any luck (p < 0.005).
    assert.ok(found >= 0.3 * IDENTITIES, `${found} of ${IDENTITIES}`);
  });

  it('are left as they are when asked for again, and no other set is overwritten', async () => {
    const out = join(folder, 'kept');
    const options = { identities: 2, imagesPerIdentity: 2, seed: 5, out };
    const rec = await generateFaces(options);
    let drawn = 0;
    assert.equal(await generateFaces({ ...options, onProgress: () => drawn++ }), rec);
    assert.equal(drawn, 0);
    await assert.rejects(generateFaces({ ...options, seed: 6 }), {
      code: 'ERR_IO',
      message: /train\.rec exists already/,
    });
  });

  it('report progress, stop when the caller says so, and then leave nothing', async () => {
    const progress: number[] = [];
    await draw('progress', { identities: 10, onProgress: ({ done }) => progress.push(done) });
    assert.deepEqual(progress, [24, 30]);

    const controller = new AbortController();
    const stopped = draw('stopped', {
      identities: 20,
      signal: controller.signal,
      onProgress: () => controller.abort(),
    });
    await assert.rejects(stopped, { code: 'ERR_ABORTED' });
    assert.ok(!existsSync(join(folder, 'stopped')));

    writeFileSync(join(folder, 'a-file'), '');
    await assert.rejects(draw('a-file', {}), { code: 'ERR_IO' });
    assert.ok(readdirSync(folder).every((name) => !name.startsWith('.')));
  });

  it('refuse numbers out of range', async () => {
    for (const wrong of [
      { identities: 1 },
      { imagesPerIdentity: 0 },
      { seed: -1 },
      { seed: 0.5 },
    ]) {
      await assert.rejects(draw('wrong', wrong), {
        code: 'ERR_INPUT',
        message: /^(identities|imagesPerIdentity|seed) of the generated faces is .*: give a whole/,
      });
    }
    assert.ok(!existsSync(join(folder, 'wrong')));
  });
});
