import assert from 'node:assert/strict';
import { copyFile, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import sharp from 'sharp';
import { RandomStream } from '../src/data/random.js';
import { HardmineError } from '../src/errors.js';
import {
  readSafetensors,
  type Tensor,
  type TensorMap,
  writeSafetensors,
} from '../src/formats/safetensors.js';
import { FaceModel, foldEmbeddingNorm, type ModelInfo, writeModel } from '../src/model.js';

const PIXELS = 112 * 112 * 3;
const EMBEDDING = 8;

/** The keys and shapes of torchvision's resnet18(num_classes=8).state_dict(), in its order. */
function torchvisionShapes(): Map<string, number[]> {
  const shapes = new Map<string, number[]>();
  const convolution = (name: string, ...shape: number[]) => shapes.set(`${name}.weight`, shape);
  const norm = (name: string, channels: number) => {
    for (const part of ['weight', 'bias', 'running_mean', 'running_var'])
      shapes.set(`${name}.${part}`, [channels]);
    shapes.set(`${name}.num_batches_tracked`, []);
  };
  convolution('conv1', 64, 3, 7, 7);
  norm('bn1', 64);
  let before = 64;
  for (const [i, channels] of [64, 128, 256, 512].entries()) {
    for (const block of [0, 1]) {
      const name = `layer${i + 1}.${block}`;
      convolution(`${name}.conv1`, channels, before, 3, 3);
      norm(`${name}.bn1`, channels);
      convolution(`${name}.conv2`, channels, channels, 3, 3);
      norm(`${name}.bn2`, channels);
      if (before !== channels) {
        convolution(`${name}.downsample.0`, channels, before, 1, 1);
        norm(`${name}.downsample.1`, channels);
      }
      before = channels;
    }
  }
  shapes.set('fc.weight', [EMBEDDING, 512]);
  shapes.set('fc.bias', [EMBEDDING]);
  return shapes;
}

/** A network whose activations stay near 1: He's weights, batch-norms as after some training. */
function randomModel(): TensorMap {
  const random = new RandomStream(5, 0);
  const tensors: TensorMap = new Map();
  for (const [name, shape] of torchvisionShapes()) {
    if (shape.length === 0) {
      tensors.set(name, { dtype: 'I64', shape, data: BigInt64Array.of(3n) });
      continue;
    }
    const length = shape.reduce((a, b) => a * b);
    const fanOut = shape.length === 4 ? shape[0]! * shape[2]! * shape[3]! : 512;
    const draw = () => {
      if (shape.length > 1) return Math.sqrt(2 / fanOut) * random.normal();
      if (name.endsWith('running_var')) return random.uniform(0.5, 1.5);
      if (name.endsWith('.weight')) return random.uniform(0.5, 1);
      return 0.1 * random.normal();
    };
    tensors.set(name, { dtype: 'F32', shape, data: Float32Array.from({ length }, draw) });
  }
  return tensors;
}

function randomImages(n: number): Uint8Array {
  const random = new RandomStream(6, n);
  return Uint8Array.from({ length: n * PIXELS }, () => random.below(256));
}

function mirrored(images: Uint8Array): Uint8Array {
  return images.map((_, i) => {
    const column = Math.floor(i / 3) % 112;
    return images[i + 3 * (111 - 2 * column)]!;
  });
}

function errorLike(code: string, pattern: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof HardmineError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, pattern);
    return true;
  };
}

function assertNear(found: Float32Array, expected: Float32Array, tolerance: number): void {
  assert.equal(found.length, expected.length);
  const scale = expected.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  for (const [i, value] of expected.entries()) {
    const difference = Math.abs(found[i]! - value);
    assert.ok(difference <= tolerance * scale, `[${i}]: ${found[i]} for ${value}`);
  }
}

describe('FaceModel', function () {
  this.timeout(60_000);
  const tensors = randomModel();
  const info: ModelInfo = { threshold: 0.31, configHash: 'abc' };
  let folder: string;
  let path: string;
  let model: FaceModel;

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-model-'));
    path = join(folder, 'model.safetensors');
    model = await FaceModel.fromTensors(tensors, info, { device: 'cpu' });
  });
  after(async () => {
    await model?.dispose();
    await rm(folder, { recursive: true });
  });

  it("saves exactly torchvision's keys and shapes, with what the contract names in the metadata", async () => {
    await model.save(path);
    const file = await readSafetensors(path);
    const shapes = torchvisionShapes();
    assert.equal(shapes.size, 122);
    assert.deepEqual(new Map([...file.tensors].map(([name, { shape }]) => [name, shape])), shapes);
    for (const [name, { dtype, data }] of file.tensors) {
      assert.equal(dtype, shapes.get(name)!.length === 0 ? 'I64' : 'F32');
      assert.deepEqual(data, tensors.get(name)!.data);
    }
    assert.deepEqual(
      file.metadata,
      new Map([
        ['format', 'pt'],
        ['architecture', 'resnet18'],
        ['input_size', '112x112'],
        ['channel_order', 'RGB'],
        ['normalisation', '(x - 127.5) / 128'],
        ['embedding_size', '8'],
        ['verification_threshold', '0.31'],
        ['config_hash', 'abc'],
      ]),
    );
  });

  it('loads what it saved, and the same file as PyTorch saves it', async () => {
    const images = randomImages(3);
    const expected = await model.embed(images);
    const plain = join(folder, 'plain.safetensors');
    await writeModel(path, tensors, info);
    await writeSafetensors(plain, tensors);
    for (const [file, known] of [
      [path, info],
      [plain, {}],
    ] as const) {
      const loaded = await FaceModel.load(file, { device: 'cpu' });
      try {
        assert.deepEqual(loaded.info, known);
        assert.equal(loaded.embedding, EMBEDDING);
        assert.deepEqual(await loaded.embed(images), expected);
      } finally {
        await loaded.dispose();
      }
    }
  });

  it('embeds any number of images, each by itself, and their mirror images', async () => {
    const images = randomImages(67); // one more chunk than 64
    const all = await model.embed(images);
    assert.equal(all.length, 67 * EMBEDDING);
    assert.ok(all.every(Number.isFinite));
    for (const i of [0, 63, 64, 66]) {
      const one = await model.embed(images.subarray(i * PIXELS, (i + 1) * PIXELS));
      // Other blockings of the same fp32 sums.
      assertNear(one, all.subarray(i * EMBEDDING, (i + 1) * EMBEDDING), 1e-5);
    }
    const few = images.subarray(0, 2 * PIXELS);
    const mirror = await model.embed(few, { mirror: true });
    assertNear(mirror, await model.embed(mirrored(few)), 1e-6);
    assert.notDeepEqual(mirror, await model.embed(few));
    assert.equal((await model.embed(new Uint8Array())).length, 0);
  });

  it('embeds files as it embeds their pixels', async () => {
    const images = randomImages(2);
    const paths = await Promise.all(
      [0, 1].map(async (i) => {
        const file = join(folder, `${i}.png`);
        const pixels = images.subarray(i * PIXELS, (i + 1) * PIXELS);
        await sharp(pixels, { raw: { width: 112, height: 112, channels: 3 } })
          .png()
          .toFile(file);
        return file;
      }),
    );
    assert.deepEqual(await model.embed(paths), await model.embed(images));
  });

  it('runs in bf16 near fp32', async () => {
    const images = randomImages(4);
    const half = await FaceModel.fromTensors(tensors, {}, { device: 'cpu', precision: 'bf16' });
    try {
      const [exact, rounded] = [await model.embed(images), await half.embed(images)];
      for (let i = 0; i < exact.length; i += EMBEDDING) {
        const row = (values: Float32Array) => values.subarray(i, i + EMBEDDING);
        // 8 bits of significand through 18 layers leave about 2 % of noise: a cosine near 1 - 2e-4.
        assert.ok(model.similarity(row(exact), row(rounded)) > 0.999);
      }
    } finally {
      await half.dispose();
    }
  });

  it('gives the cosine of two embeddings', () => {
    const unit = (...values: number[]) =>
      Float32Array.from({ length: 8 }, (_, i) => values[i] ?? 0);
    assert.equal(model.similarity(unit(2), unit(5)), 1);
    assert.equal(model.similarity(unit(2), unit(-1)), -1);
    assert.ok(Math.abs(model.similarity(unit(3, 4), unit(4, 3)) - 0.96) < 1e-12);
    assert.throws(
      () => model.similarity(unit(1), new Float32Array(9)),
      errorLike('ERR_INPUT', /has 9 values where this model's have 8/),
    );
  });

  it('exports ONNX that ONNX Runtime runs to the same embeddings', async () => {
    const file = join(folder, 'model.onnx');
    await model.exportOnnx(file);
    const check = await model.checkOnnx(file);
    assert.equal(check.images, 64);
    assert.ok(check.passed, JSON.stringify(check));
  });

  it('measures ONNX of large embeddings by their size, as after a few steps of training', async () => {
    const file = join(folder, 'large.onnx');
    const changed: TensorMap = new Map(tensors);
    for (const name of ['fc.weight', 'fc.bias']) {
      const tensor = tensors.get(name) as Tensor & { dtype: 'F32' };
      changed.set(name, { ...tensor, data: tensor.data.map((value) => 1e4 * value) });
    }
    const large = await FaceModel.fromTensors(changed, {}, { device: 'cpu' });
    await large.exportOnnx(file);
    const check = await large.checkOnnx(file);
    await large.dispose();
    assert.ok(check.maxAbsDifference > 1e-4, JSON.stringify(check));
    assert.ok(check.passed, JSON.stringify(check));
  });

  it('says when an ONNX file is another model or none', async () => {
    const file = join(folder, 'other.onnx');
    const changed: TensorMap = new Map(tensors);
    const bias = tensors.get('fc.bias') as Tensor & { dtype: 'F32' };
    changed.set('fc.bias', { ...bias, data: bias.data.map((value) => value + 0.01) });
    const other = await FaceModel.fromTensors(changed, {}, { device: 'cpu' });
    await other.exportOnnx(file);
    await other.dispose();
    const check = await model.checkOnnx(file, randomImages(2));
    assert.equal(check.images, 2);
    assert.equal(check.passed, false);
    assert.ok(Math.abs(check.maxAbsDifference - 0.01) < 1e-3);
    await writeFile(file, 'no protobuf');
    await assert.rejects(
      model.checkOnnx(file, randomImages(1)),
      errorLike('ERR_FORMAT', /other\.onnx was refused by ONNX Runtime/),
    );
  });

  it('folds the batch-norm over the embedding into fc', () => {
    const random = new RandomStream(9, 0);
    const draw = (shape: number[], low: number, high: number): Tensor => {
      const length = shape.reduce((a, b) => a * b);
      return {
        dtype: 'F32',
        shape,
        data: Float32Array.from({ length }, () => random.uniform(low, high)),
      };
    };
    const session: TensorMap = new Map([
      ['conv1.weight', draw([2], 0, 1)],
      ['fc.weight', draw([3, 4], -1, 1)],
      ['fc.bias', draw([3], -1, 1)],
      ['embedding_bn.bias', draw([3], -1, 1)],
      ['embedding_bn.running_mean', draw([3], -1, 1)],
      ['embedding_bn.running_var', draw([3], 0, 2)],
    ]);
    const before = structuredClone(session);
    const folded = foldEmbeddingNorm(session);
    assert.deepEqual(session, before); // the session's own tensors are left alone
    assert.deepEqual([...folded.keys()], ['conv1.weight', 'fc.weight', 'fc.bias']);
    const value = (map: TensorMap, name: string, i: number) => Number(map.get(name)!.data[i]);
    const x = [0.3, -0.7, 1.1, 0.2];
    for (let row = 0; row < 3; row++) {
      const linear = (map: TensorMap) =>
        x.reduce(
          (sum, v, k) => sum + v * value(map, 'fc.weight', 4 * row + k),
          value(map, 'fc.bias', row),
        );
      const norm = (part: string) => value(session, `embedding_bn.${part}`, row);
      const expected =
        (linear(session) - norm('running_mean')) / Math.sqrt(norm('running_var') + 1e-5) +
        norm('bias');
      // One rounding to fp32 of each of five numbers.
      assert.ok(Math.abs(linear(folded) - expected) <= 1e-6 * Math.max(1, Math.abs(expected)));
    }
    assert.equal(foldEmbeddingNorm(folded), folded);
  });

  const changes: [string, (map: TensorMap) => void, RegExp][] = [
    [
      'a missing tensor',
      (map) => map.delete('layer2.0.downsample.1.bias'),
      /lacks the tensor layer2\.0\.downsample\.1\.bias/,
    ],
    ['no fc', (map) => map.delete('fc.weight'), /lacks the tensor fc\.weight/],
    [
      'a missing counter',
      (map) => map.delete('bn1.num_batches_tracked'),
      /lacks the tensor bn1\.num_batches_tracked/,
    ],
    [
      'one tensor more',
      (map) => map.set('extra', map.get('bn1.bias')!),
      /has the tensor extra, which resnet18 lacks/,
    ],
    [
      'another shape',
      (map) => map.set('bn1.bias', map.get('layer2.0.bn1.bias')!),
      /bn1\.bias as F32 \[128\] where F32 \[64\]/,
    ],
    [
      'another type',
      (map) =>
        map.set('bn1.num_batches_tracked', { dtype: 'F32', shape: [], data: new Float32Array(1) }),
      /as F32 \[\] where I64 \[\]/,
    ],
    [
      'NaN',
      (map) =>
        map.set('bn1.bias', {
          dtype: 'F32',
          shape: [64],
          data: new Float32Array(64).fill(Number.NaN, 5),
        }),
      /has NaN in bn1\.bias \(element 5\)/,
    ],
    [
      'a negative variance',
      (map) =>
        map.set('bn1.running_var', {
          dtype: 'F32',
          shape: [64],
          data: new Float32Array(64).fill(-1),
        }),
      /has -1 in bn1\.running_var/,
    ],
  ];
  for (const [what, change, pattern] of changes) {
    it(`refuses a file with ${what}`, async () => {
      const file = join(folder, 'changed.safetensors');
      const changed: TensorMap = new Map(tensors);
      change(changed);
      await writeSafetensors(file, changed);
      await assert.rejects(
        FaceModel.load(file, { device: 'cpu' }),
        errorLike('ERR_FORMAT', pattern),
      );
    });
  }

  const metadata: [string, string, RegExp][] = [
    ['architecture', 'resnet50', /its architecture is "resnet50" where hardmine has "resnet18"/],
    ['channel_order', 'BGR', /its channel_order is "BGR"/],
    ['normalisation', 'x / 255', /its normalisation is "x \/ 255"/],
    ['embedding_size', '512', /its embedding_size is "512" where hardmine has "8"/],
    ['verification_threshold', 'high', /its verification_threshold is "high"/],
    ['verification_threshold', '', /its verification_threshold is ""/],
    ['verification_threshold', '1.5', /its verification_threshold is "1\.5"/],
  ];
  for (const [key, value, pattern] of metadata) {
    it(`refuses a file whose ${key} is ${JSON.stringify(value)}`, async () => {
      const file = join(folder, 'metadata.safetensors');
      const fc = tensors.get('fc.weight')!; // all that is looked at before the metadata
      await writeSafetensors(file, new Map([['fc.weight', fc]]), new Map([[key, value]]));
      await assert.rejects(
        FaceModel.load(file, { device: 'cpu' }),
        errorLike('ERR_FORMAT', pattern),
      );
    });
  }

  it('refuses what it cannot embed, each with a sentence', async () => {
    await assert.rejects(
      model.embed(new Uint8Array(PIXELS + 1)),
      errorLike('ERR_INPUT', /37633 bytes, which is no multiple of 37632/),
    );
    const text = join(folder, 'text.jpg');
    await writeFile(text, 'not an image');
    await assert.rejects(model.embed([text]), errorLike('ERR_DATA', /text\.jpg/));
    const large = join(folder, 'large.png');
    await sharp({ create: { width: 250, height: 250, channels: 3, background: 'white' } }).toFile(
      large,
    );
    await assert.rejects(
      model.embed([large]),
      errorLike('ERR_DATA', /large\.png .*250x250.*align/),
    );
    const images = await model.embed(randomImages(1)); // the model is none the worse
    assert.ok(images.every(Number.isFinite));
  });

  it('refuses an unwritable path and leaves nothing behind', async () => {
    const missing = join(folder, 'missing', 'model.safetensors');
    await assert.rejects(model.save(missing), errorLike('ERR_IO', /ENOENT/));
    await assert.rejects(model.exportOnnx(missing), errorLike('ERR_IO', /ENOENT/));
    assert.ok((await readdir(folder)).every((name) => !name.endsWith('.tmp')));
  });

  it('does not touch the file it was loaded from', async () => {
    const copy = join(folder, 'copy.safetensors');
    await writeModel(path, tensors, info);
    await copyFile(path, copy);
    const loaded = await FaceModel.load(copy, { device: 'cpu' });
    await writeFile(copy, 'overwritten'); // would change, or crash, a model that was mapped
    const embeddings = await loaded.embed(randomImages(1));
    await loaded.dispose();
    assert.deepEqual(embeddings, await model.embed(randomImages(1)));
  });

  it('answers every method with ERR_DISPOSED after dispose, which may be called twice', async () => {
    const brief = await FaceModel.fromTensors(tensors, {}, { device: 'cpu' });
    await brief.dispose();
    await brief[Symbol.asyncDispose]();
    const disposed = errorLike('ERR_DISPOSED', /FaceModel was disposed/);
    await assert.rejects(brief.embed(randomImages(1)), disposed);
    await assert.rejects(brief.save(path), disposed);
    await assert.rejects(brief.exportOnnx(path), disposed);
    await assert.rejects(brief.checkOnnx(path), disposed);
    assert.throws(() => brief.similarity(new Float32Array(8), new Float32Array(8)), disposed);
  });
});
