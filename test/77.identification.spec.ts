import assert from 'node:assert/strict';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { evaluateIdentification } from '../src/evaluate/identification.js';
import { type Colour, MeanColour, writeColour } from './helpers/colour-faces.js';

describe('evaluateIdentification', function () {
  this.timeout(30_000); // seconds at most when alone; the suite may share its cores
  let root: string;
  const path = (name: string, number: number) =>
    join(root, name, `${name}_${String(number).padStart(4, '0')}.jpg`);

  /** Ann's third image looks like Cid's, who is in the gallery alone. */
  const people: [string, number, Colour][] = [
    ['Ann', 2, [220, 40, 40]],
    ['Ann', 10, [210, 50, 50]],
    ['Ann', 3, [60, 50, 220]],
    ['Bob', 1, [40, 220, 40]],
    ['Bob', 4, [60, 200, 70]],
    ['Cid', 1, [40, 40, 220]],
  ];

  beforeEach(async () => {
    root = await mkdtemp(join(tmpdir(), 'hardmine-identification-'));
    for (const [name, number, colour] of people) await writeColour(path(name, number), colour);
    await writeFile(join(root, 'pairs.txt'), 'no person');
    await writeFile(join(root, 'Ann', 'notes.txt'), 'no image');
  });
  afterEach(() => rm(root, { recursive: true, force: true }));

  it('holds the other images of a person against the first of everybody', async () => {
    const model = new MeanColour();
    const result = await evaluateIdentification(model, { root });
    assert.deepEqual([model.images, model.mirrored], [6, 6]);
    const { details, confidence95, rank1, ...counts } = result;
    assert.deepEqual(counts, {
      dataset: 'lfw',
      task: 'identification',
      protocol: 'insightface',
      gallery: 3,
      probes: 3,
      people: 2,
      flip: true,
      score: 'cosine',
      missing: 0,
    });
    // Ann 3 (wrong), Ann 10, Bob 4: in the order of numbers, not of names.
    assert.deepEqual([...details.right], [0, 1, 1]);
    assert.equal(rank1, 2 / 3);
    // Wilson's interval of 2 out of 3, as prop.test without correction gives it: 0.2077 to 0.9385.
    assert.equal(confidence95.low.toFixed(4), '0.2077');
    assert.equal(confidence95.high.toFixed(4), '0.9385');
    assert.match(details.notes[0]!, /6 images of 3 people where LFW has 13233 of 5749/);
  });

  it('counts a tie as wrong', async () => {
    await writeColour(path('Dan', 1), [40, 220, 40]); // the same as Bob's first
    const { details } = await evaluateIdentification(new MeanColour(), { root });
    assert.deepEqual([...details.right], [0, 1, 0]);
  });

  it('takes a probe without a face for wrong, and a gallery image for like nothing', async () => {
    const align = (without: string) => async (file: string) =>
      file === without ? null : new Uint8Array(await sharp(file).removeAlpha().raw().toBuffer());
    const probe = await evaluateIdentification(new MeanColour(), {
      root,
      align: align(path('Bob', 4)),
    });
    assert.deepEqual([[...probe.details.right], probe.missing], [[0, 1, 0], 1]);
    const rival = await evaluateIdentification(new MeanColour(), {
      root,
      align: align(path('Cid', 1)),
    });
    assert.deepEqual([[...rival.details.right], rival.missing], [[0, 1, 1], 1]);
  });

  it('refuses a folder without probes, an image twice, damaged models, and stops when told to', async () => {
    await writeColour(join(root, 'Bob', 'Bob_00004.jpg'), [1, 2, 3]);
    await assert.rejects(evaluateIdentification(new MeanColour(), { root }), {
      code: 'ERR_PROTOCOL',
      message: /Bob holds image 4 more than once/,
    });
    await rm(join(root, 'Bob'), { recursive: true });
    await rm(join(root, 'Cid'), { recursive: true });
    await assert.rejects(evaluateIdentification(new MeanColour(), { root }), {
      code: 'ERR_PROTOCOL',
      message: /holds 3 images of 1 people: identification needs two people/,
    });
    await writeColour(path('Bob', 1), [1, 2, 3]);
    const nan = {
      embedding: 2,
      embed: async (images: Uint8Array | string[]) =>
        new Float32Array((2 * images.length) / 37632).fill(Number.NaN),
    };
    await assert.rejects(evaluateIdentification(nan, { root }), {
      code: 'ERR_NON_FINITE',
      message: /embedding of .*Ann_0002\.jpg/,
    });
    const stop = new AbortController();
    const { signal } = stop;
    await assert.rejects(
      evaluateIdentification(new MeanColour(), { root, signal, onProgress: () => stop.abort() }),
      { code: 'ERR_ABORTED' },
    );
    await assert.rejects(evaluateIdentification(new MeanColour(), { root: join(root, 'no') }), {
      code: 'ERR_IO',
    });
  });
});
