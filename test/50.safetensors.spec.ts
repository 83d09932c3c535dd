import assert from 'node:assert/strict';
import { execFile, execFileSync } from 'node:child_process';
import { lstat, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import fc from 'fast-check';
import { HardmineError } from '../src/errors.js';
import { writeFileAtomic } from '../src/formats/atomic.js';
import { writeNpy } from '../src/formats/npy.js';
import {
  readSafetensors,
  type Tensor,
  type TensorMap,
  writeSafetensors,
} from '../src/formats/safetensors.js';
import { readNpy } from './helpers/npy.js';

let folder: string;
before(async () => {
  folder = await mkdtemp(join(tmpdir(), 'hardmine-safetensors-'));
});
after(() => rm(folder, { recursive: true }));

function errorLike(code: string, pattern: RegExp) {
  return (error: unknown) => {
    assert.ok(error instanceof HardmineError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, pattern);
    return true;
  };
}

/** The bytes of a file with this header and data, whatever they are. */
function fileOf(header: string | Uint8Array, data: Uint8Array = new Uint8Array(0)): Buffer {
  const length = Buffer.alloc(8);
  const bytes = Buffer.from(header as string);
  length.writeBigUInt64LE(BigInt(bytes.length));
  return Buffer.concat([length, bytes, data]);
}

async function readBytes(bytes: Uint8Array) {
  const path = join(folder, 'case.safetensors');
  await writeFile(path, bytes);
  return readSafetensors(path);
}

const f32 = (shape: number[], ...values: number[]): Tensor => ({
  dtype: 'F32',
  shape,
  data: Float32Array.from(values),
});

describe('safetensors', function () {
  this.timeout(60_000); // every file written is synchronised with the disk
  it('writes the layout that Python reads, 8-byte tensors first', async () => {
    const path = join(folder, 'layout.safetensors');
    const tensors: TensorMap = new Map<string, Tensor>([
      ['weight', f32([2, 1], 1, -2)],
      ['count', { dtype: 'I64', shape: [], data: BigInt64Array.of(-3n) }],
    ]);
    await writeSafetensors(path, tensors, new Map([['format', 'pt']]));
    const json =
      '{"__metadata__":{"format":"pt"},"count":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"weight":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]}}';
    const header = json.padEnd(Math.ceil(json.length / 8) * 8, ' ');
    const data = Buffer.from('fdffffffffffffff0000803f000000c0', 'hex');
    assert.deepEqual(await readFile(path), fileOf(header, data));
  });

  it('reads back what it wrote, bit by bit', async () => {
    const tensor: fc.Arbitrary<Tensor> = fc
      .tuple(fc.constantFrom('F32', 'I64'), fc.array(fc.nat(4), { maxLength: 4 }), fc.nat())
      .map(([dtype, shape, seed]) => {
        const length = shape.reduce((a, b) => a * b, 1);
        const bits = Uint32Array.from({ length: 2 * length }, (_, i) =>
          Math.imul(seed + i, 0x9e3779b1),
        );
        return dtype === 'F32'
          ? { dtype, shape, data: new Float32Array(bits.buffer, 0, length) }
          : { dtype: 'I64', shape, data: new BigInt64Array(bits.buffer) };
      });
    const name = fc.oneof(
      fc.constantFrom('__proto__', 'constructor', 'toString', '', '"\\\n', '\u{1F600}', '0'),
      fc.string(),
    );
    const property = fc.asyncProperty(
      fc.uniqueArray(fc.tuple(name, tensor), { selector: ([key]) => key, maxLength: 6 }),
      fc.uniqueArray(fc.tuple(name, fc.string()), { selector: ([key]) => key, maxLength: 3 }),
      async (entries, metadata) => {
        const path = join(folder, 'round-trip.safetensors');
        await writeSafetensors(path, new Map(entries), new Map(metadata));
        const read = await readSafetensors(path);
        assert.deepEqual(read.metadata, new Map(metadata));
        assert.equal(read.tensors.size, entries.length);
        for (const [key, { dtype, shape, data }] of entries) {
          const found = read.tensors.get(key)!;
          assert.deepEqual({ dtype: found.dtype, shape: found.shape }, { dtype, shape });
          assert.deepEqual(
            new Uint8Array(found.data.buffer),
            new Uint8Array(data.buffer, 0, data.byteLength),
          );
        }
      },
    );
    await fc.assert(property, { numRuns: 200 });
  });

  it('reads a header that does not keep the data aligned', async () => {
    const { tensors } = await readBytes(
      fileOf(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        Buffer.from('0000803f', 'hex'),
      ),
    );
    assert.deepEqual([...tensors.get('a')!.data], [1]);
  });

  it('takes __proto__ as a name like any other', async () => {
    const header =
      '{"__metadata__":{"__proto__":"x"},"__proto__":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}';
    const { tensors, metadata } = await readBytes(fileOf(header, new Uint8Array(4)));
    assert.deepEqual([...tensors.keys()], ['__proto__']);
    assert.deepEqual([...metadata], [['__proto__', 'x']]);
    assert.equal(({} as Record<string, unknown>)['dtype'], undefined);
  });

  const entry = (fields: string) => `{"a":{${fields}}}`;
  const tensorOf = (shape: string, offsets: string, dtype = 'F32') =>
    entry(`"dtype":"${dtype}","shape":${shape},"data_offsets":${offsets}`);
  const two = (a: string, b: string) =>
    `{"a":{"dtype":"F32","shape":[1],"data_offsets":${a}},"b":{"dtype":"F32","shape":[1],"data_offsets":${b}}}`;
  const bytes = (length: number) => new Uint8Array(length);
  const badLength = (length: bigint) => {
    const file = fileOf('{}');
    file.writeBigUInt64LE(length);
    return file;
  };

  const refused: [string, Uint8Array, RegExp][] = [
    ['an empty file', bytes(0), /has 0 bytes/],
    ['a file without a whole length', bytes(7), /has 7 bytes/],
    ['a header of 2^63 bytes', badLength(1n << 63n), /announces a header of 9223372036854775808/],
    ['a header over the limit', badLength(1_048_577n), /at most 1048576/],
    ['a header longer than the file', badLength(3n), /has 2 after the length/],
    ['an empty header', fileOf(''), /does not start with "\{"/],
    ['a header that starts with a space', fileOf(' {}'), /does not start with "\{"/],
    ['a byte order mark', fileOf('\ufeff{}'), /does not start with "\{"/],
    ['a header that is not UTF-8', fileOf(Buffer.from([0x7b, 0xff, 0x7d])), /not UTF-8/],
    ['a header cut short', fileOf('{"a"'), /the end at character 4 .* expected ":"/],
    ['an unclosed string', fileOf('{"a'), /broken string/],
    ['a broken escape', fileOf('{"\\q":{}}'), /broken string/],
    ['a comma too many', fileOf('{"__metadata__":{},}'), /expected a string/],
    ['text after the header', fileOf('{}x'), /expected the end of the header/],
    ['NUL as padding', fileOf('{}\0'), /expected the end of the header/],
    ['a tensor that is no object', fileOf('{"a":1}'), /expected "\{"/],
    ['deep nesting', fileOf(`{"a":${'{"a":'.repeat(100_000)}`), /expected "\["/],
    ['a key twice', fileOf(two('[0,4]', '[4,8]').replace('"b"', '"a"'), bytes(8)), /key "a" twice/],
    [
      'a key twice, once escaped',
      fileOf(two('[0,4]', '[4,8]').replace('"b"', '"\\u0061"'), bytes(8)),
      /key "a" twice/,
    ],
    ['metadata twice', fileOf('{"__metadata__":{},"__metadata__":{}}'), /twice/],
    ['a field twice', fileOf(entry('"dtype":"F32","dtype":"F32"')), /"dtype" twice/],
    [
      'metadata that is no string',
      fileOf('{"__metadata__":{"x":[1]}}'),
      /metadata "x" that is not a string/,
    ],
    [
      'a missing field',
      fileOf(entry('"dtype":"F32","shape":[]')),
      /without a dtype, a shape and data_offsets/,
    ],
    ['an unknown field', fileOf(entry('"dtypes":"F32"')), /unknown field "dtypes"/],
    [
      'half precision',
      fileOf(tensorOf('[1]', '[0,2]', 'F16'), bytes(2)),
      /type "F16"; hardmine reads F32 and I64/,
    ],
    ['an unknown type', fileOf(tensorOf('[1]', '[0,2]', 'X9'), bytes(2)), /type "X9"/],
    ['a negative size', fileOf(tensorOf('[-1]', '[0,4]'), bytes(4)), /expected a whole number/],
    ['a fraction', fileOf(tensorOf('[1.5]', '[0,4]'), bytes(4)), /expected a whole number/],
    ['an exponent', fileOf(tensorOf('[1e0]', '[0,4]'), bytes(4)), /expected a whole number/],
    ['a leading zero', fileOf(tensorOf('[01]', '[0,4]'), bytes(4)), /expected/],
    [
      'a number beyond 2^53',
      fileOf(tensorOf('[9007199254740993]', '[0,4]'), bytes(4)),
      /beyond 2\^53/,
    ],
    [
      'a shape that overflows',
      fileOf(tensorOf('[4294967296,4294967296,4294967296]', '[0,4]'), bytes(4)),
      /more than any memory holds/,
    ],
    [
      'a shape that overflows before a zero',
      fileOf(tensorOf('[9007199254740991,3,0]', '[0,0]')),
      /more than any memory holds/,
    ],
    [
      'a size that overflows in bytes',
      fileOf(tensorOf('[9007199254740991]', '[0,4]'), bytes(4)),
      /more than any memory holds/,
    ],
    [
      'a shape that is not its bytes',
      fileOf(tensorOf('[2]', '[0,4]'), bytes(4)),
      /in 4 bytes; expected 8/,
    ],
    ['one offset', fileOf(tensorOf('[1]', '[4]'), bytes(4)), /expected \[begin, end\]/],
    ['three offsets', fileOf(tensorOf('[1]', '[0,4,8]'), bytes(4)), /expected \[begin, end\]/],
    [
      'offsets the wrong way round',
      fileOf(tensorOf('[1]', '[4,0]'), bytes(4)),
      /expected \[begin, end\]/,
    ],
    [
      'a hole',
      fileOf(two('[0,4]', '[8,12]'), bytes(12)),
      /"b" at offset 8, where the one before ends at 4/,
    ],
    ['a hole at the start', fileOf(tensorOf('[1]', '[4,8]'), bytes(8)), /ends at 0/],
    ['an overlap', fileOf(two('[0,4]', '[2,6]'), bytes(6)), /"b" at offset 2/],
    [
      'the same bytes twice',
      fileOf(two('[0,4]', '[0,4]'), bytes(4)),
      /at offset 0, where the one before ends at 4/,
    ],
    [
      'an empty tensor inside another',
      fileOf(
        two('[0,4]', '[2,2]').replace(
          '"b":{"dtype":"F32","shape":[1]',
          '"b":{"dtype":"F32","shape":[0]',
        ),
        bytes(4),
      ),
      /at offset 2/,
    ],
    [
      'bytes after the tensors',
      fileOf(tensorOf('[1]', '[0,4]'), bytes(5)),
      /has 5 bytes of data but its tensors cover 4/,
    ],
    [
      'data cut short',
      fileOf(tensorOf('[1]', '[0,4]'), bytes(3)),
      /has 3 bytes of data but its tensors cover 4/,
    ],
    [
      'a pickle',
      Buffer.from('\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00.', 'latin1'),
      /announces a header/,
    ],
  ];
  for (const [what, file, pattern] of refused) {
    it(`refuses ${what}`, async () => {
      await assert.rejects(readBytes(file), errorLike('ERR_FORMAT', pattern));
    });
  }

  it('refuses what is no file, and says what the system said', async () => {
    await assert.rejects(readSafetensors(folder), errorLike('ERR_FORMAT', /not a regular file/));
    await assert.rejects(readSafetensors(join(folder, 'none')), errorLike('ERR_IO', /ENOENT/));
    const fifo = join(folder, 'fifo');
    await promisify(execFile)('mkfifo', [fifo]);
    await assert.rejects(readSafetensors(fifo), errorLike('ERR_FORMAT', /not a regular file/));
  });

  it('answers any damage with one sentence', async () => {
    const path = join(folder, 'whole.safetensors');
    await writeSafetensors(
      path,
      new Map([
        ['a', f32([2], 1, 2)],
        ['b', f32([1], 3)],
      ]),
      new Map([['k', 'v']]),
    );
    const whole = await readFile(path);
    const headerEnd = 8 + Number(whole.readBigUInt64LE());
    const property = fc.asyncProperty(
      fc.nat(headerEnd - 1),
      fc.integer({ min: 1, max: 255 }),
      async (at, flip) => {
        const damaged = Buffer.from(whole);
        damaged[at]! ^= flip;
        try {
          await readBytes(damaged); // a changed name or dtype-neutral space is a sound file too
        } catch (error) {
          assert.ok(error instanceof HardmineError && error.code === 'ERR_FORMAT', String(error));
        }
      },
    );
    await fc.assert(property, { numRuns: 500 });
    for (let length = 0; length < whole.length; length++) {
      await assert.rejects(readBytes(whole.subarray(0, length)), errorLike('ERR_FORMAT', /./));
    }
  });

  it('refuses to write a shape that does not fit, and metadata as a tensor', async () => {
    const path = join(folder, 'unwritten.safetensors');
    await assert.rejects(
      writeSafetensors(path, new Map([['a', f32([3], 1, 2)]])),
      errorLike('ERR_INPUT', /"a" has shape \[3\] but 2 values/),
    );
    await assert.rejects(
      writeSafetensors(path, new Map([['__metadata__', f32([1], 1)]])),
      errorLike('ERR_INPUT', /__metadata__/),
    );
    await assert.rejects(readFile(path), /ENOENT/);
  });
});

describe('writeFileAtomic', () => {
  it('leaves the old file and nothing else when the content fails', async () => {
    const inner = await mkdtemp(join(folder, 'atomic-'));
    const path = join(inner, 'file');
    await writeFileAtomic(path, ['old']);
    async function* failing() {
      yield new Uint8Array(1000);
      throw new RangeError('the content ended');
    }
    await assert.rejects(writeFileAtomic(path, failing()), RangeError);
    assert.equal(await readFile(path, 'utf8'), 'old');
    assert.deepEqual(await readdir(inner), ['file']);
  });

  it('replaces a file, a chunk after the other, and a link rather than what it points to', async () => {
    const inner = await mkdtemp(join(folder, 'atomic-'));
    const target = join(inner, 'target');
    const link = join(inner, 'link');
    await writeFile(target, 'kept');
    await symlink(target, link);
    await writeFileAtomic(link, ['a', Buffer.from('b'), 'c']);
    assert.equal(await readFile(link, 'utf8'), 'abc');
    assert.equal(await readFile(target, 'utf8'), 'kept');
  });

  it('says what the system refused', async () => {
    await assert.rejects(
      writeFileAtomic(join(folder, 'missing', 'file'), ['x']),
      errorLike('ERR_IO', /missing\/file could not be written \(ENOENT/),
    );
    const pipe = join(folder, 'pipe');
    execFileSync('mkfifo', [pipe]);
    await symlink(pipe, join(folder, 'to-pipe'));
    for (const path of [pipe, join(folder, 'to-pipe')]) {
      await assert.rejects(
        writeFileAtomic(path, ['x']),
        errorLike('ERR_IO', /could not be written \(it is no regular file\)/),
      );
    }
    assert.ok((await lstat(pipe)).isFIFO());
    await writeFileAtomic(join(folder, 'plain'), ['x']);
    await assert.rejects(
      writeFileAtomic(join(folder, 'plain', 'x'), ['x']),
      errorLike('ERR_IO', /ENOTDIR/),
    );
  });
});

describe('npy', () => {
  it('writes version 1.0, the data at a multiple of 64 bytes', async () => {
    const path = join(folder, 'matrix.npy');
    for (const [rows, columns] of [
      [2, 3],
      [0, 512],
      [1234567, 0],
    ] as const) {
      const values = Float32Array.from({ length: rows * columns }, (_, i) => i - 1.5);
      await writeNpy(path, values, rows, columns);
      assert.deepEqual(await readNpy(path), { shape: [rows, columns], data: values });
    }
  });

  it('refuses values that are not rows times columns', async () => {
    await assert.rejects(
      writeNpy(join(folder, 'x.npy'), new Float32Array(5), 2, 3),
      errorLike('ERR_INPUT', /2 x 3 values but 5/),
    );
  });
});
