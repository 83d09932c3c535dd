/** Pickles as data, and the verification sets written in them. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { HardmineError } from '../src/errors.js';
import { PickledArray, type PickleValue, readPickle } from '../src/formats/pickle.js';
import { readVerificationBin, writeVerificationBin } from '../src/formats/verification-bin.js';
import { seeded } from './helpers/random.js';
import { shared } from './helpers/skip.js';

// Pickles written by hand: numbers are opcodes or operands, text stands for its latin-1 bytes.
type Part = number | string | Uint8Array;

function pickle(...parts: Part[]): Buffer {
  return Buffer.concat(
    parts.map((part) =>
      typeof part === 'number'
        ? Buffer.from([part])
        : typeof part === 'string'
          ? Buffer.from(part, 'latin1')
          : part,
    ),
  );
}

const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
};
const u64 = (value: bigint): Buffer => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes;
};
const short = (text: string): Buffer => pickle(0x8c, text.length, text); // SHORT_BINUNICODE
const read = (...parts: Part[]): PickleValue => readPickle(pickle(...parts), 'a.pkl');
const latin1 = (bytes: unknown): string => {
  assert.ok(bytes instanceof Uint8Array);
  return Buffer.from(bytes).toString('latin1');
};

function refused(bytes: Uint8Array, message: RegExp): void {
  assert.throws(
    () => readPickle(bytes, 'a.pkl'),
    (error) => {
      assert.ok(error instanceof HardmineError, String(error));
      assert.equal(error.code, 'ERR_FORMAT');
      assert.match(error.message, /^a\.pkl is (refused|no pickle)/);
      assert.match(error.message, message);
      return true;
    },
  );
}

/** An array of `shape` as NumPy 2 pickles it in protocol 4; `type` and `order` are its dtype's. */
function numpyArray(
  shape: readonly number[],
  type: string,
  order: string,
  data: Uint8Array,
): Buffer {
  const size = (value: number) => pickle(0x4b, value);
  return pickle(
    ...[short('numpy._core.multiarray'), short('_reconstruct'), 0x93],
    ...[short('numpy'), short('ndarray'), 0x93, size(0), 0x85, 0x43, 1, 'b', 0x87, 0x52],
    ...[0x28, size(1), 0x28, ...shape.map(size), 0x74],
    ...[short('numpy'), short('dtype'), 0x93, short(type), 0x89, 0x88, 0x87, 0x52],
    ...[
      0x28,
      size(3),
      short(order),
      'NNNJ',
      u32(2 ** 32 - 1),
      'J',
      u32(2 ** 32 - 1),
      size(0),
      't',
      'b',
    ],
    ...[0x89, 0x42, u32(data.length), data, 't', 'b'],
  );
}

describe('pickles', () => {
  it('of protocol 0 are read: text for everything', () => {
    const value = read(
      '(lp0\nI1\naI-7\naI01\naI00\naL123456789012345678901234567890L\naF0.5\naF-inf\naN',
      "aS'a\\x00\\'\\\\\\n'\np1\naVa\\u20ac\\U0001f600\na(dp2\nS'k'\np3\nI5\nsag1\na(I2\nI3\nta.",
    );
    assert.ok(Array.isArray(value));
    const expected = [1, -7, true, false, 123456789012345678901234567890n, 0.5, -Infinity, null];
    assert.deepEqual(value.slice(0, 8), expected);
    assert.equal(latin1(value[8]), "a\0'\\\n");
    assert.equal(value[9], 'a€😀');
    assert.deepEqual(value[10], new Map([['k', 5]]));
    assert.equal(value[11], value[8], 'GET gives the same object');
    assert.deepEqual(value[12], [2, 3]);
  });

  it('of protocols 2 to 5 are read: numbers of every width, text, bytes, containers', () => {
    assert.deepEqual(
      read(
        ...[0x80, 2, ']', '(', 'K', 255, 'M', 0, 255, 'J', u32(2 ** 32 - 2)],
        ...[0x8a, 0, 0x8a, 1, 0x80, 0x8a, 2, 0x80, 0x00, 0x8b, u32(9), u64(0n), 1],
        ...['G', 0x3f, 0xe0, u32(0), 0, 0, 0x88, 0x89, 'N', 'e', '.'].flat(),
      ),
      [255, 0xff00, -2, 0, -128, 128, 2n ** 64n, 0.5, true, false, null],
    );
    const value = read(
      ...[0x80, 4, 0x95, u64(49n), ')', 0x94, '0h', 0, '(', short('é'.normalize('NFD')[0]!)],
      ...['X', u32(2), 0xc3, 0xa9, 0x8d, u64(1n), 'c', 'U', 1, 0xff, 'T', u32(1), 'q'],
      ...['C', 1, 0x80, 'B', u32(0), 0x8e, u64(1n), 'z', 0x96, u64(1n), 'y', 't', 0x86, '.'],
    );
    assert.ok(Array.isArray(value) && Array.isArray(value[1]));
    assert.deepEqual(value[0], []);
    assert.deepEqual(value[1].slice(0, 3), ['e', 'é', 'c']);
    assert.deepEqual(value[1].slice(3).map(latin1), ['\xff', 'q', '\x80', '', 'z', 'y']);
    assert.deepEqual(
      read('}(', short('a'), 'K', 1, 'U', 1, 'b', ']u', short('c'), 'Ns.'),
      new Map<string, PickleValue>([
        ['a', 1],
        ['b', []],
        ['c', null],
      ]),
    );
    assert.deepEqual(read('(K', 1, '2', 0x85, 'K', 9, '0(K', 8, '1l.'), [1, [1]]);
  });

  it('hold NumPy arrays', () => {
    const array = readPickle(
      pickle(numpyArray([2, 3], 'i2', '>', Buffer.from('000100020003000400050006', 'hex')), '.'),
      'a.pkl',
    );
    assert.ok(array instanceof PickledArray);
    assert.deepEqual([array.dtype, array.shape, array.fortranOrder], ['>i2', [2, 3], false]);
    assert.equal(Buffer.from(array.data).toString('hex'), '000100020003000400050006');

    const buffer = read(
      ...[short('numpy._core.numeric'), short('_frombuffer'), 0x93, '(', 0x96, u64(2n), 'ab'],
      ...[short('numpy'), short('dtype'), 0x93, short('u1'), 0x89, 0x88, 0x87, 'R'],
      ...['K', 2, 0x85, short('C'), 't', 'R', '.'],
    );
    assert.ok(buffer instanceof PickledArray);
    assert.deepEqual([buffer.dtype, buffer.shape, latin1(buffer.data)], ['|u1', [2], 'ab']);
  });

  it('hold bytes as Python 3 writes them to old protocols', () => {
    assert.equal(
      latin1(read('c_codecs\nencode\n', 'X', u32(3), 'a', 0xc3, 0xbf, short('latin1'), 0x86, 'R.')),
      'a\xff',
    );
    assert.equal(latin1(read('c__builtin__\nbytes\n)R.')), '');
    assert.equal(latin1(read('cbuiltins\nbytearray\n', 'C', 1, 'x', 0x85, 'R.')), 'x');
  });

  it("read MTCNN's weights", async function () {
    // Layers and shapes: ../shared/faces/README.md and the facenet project's detect_face.py.
    const shapes: Record<string, [count: number, layer: string, part: string, shape: number[]]> = {
      det1: [8, 'conv4-2', 'weights', [1, 1, 32, 4]],
      det2: [10, 'conv4', 'weights', [576, 128]],
      det3: [13, 'conv6-3', 'biases', [10]],
    };
    for (const [name, [count, layer, part, shape]] of Object.entries(shapes)) {
      const file = await readFile(shared(this, `mtcnn/${name}.npy`));
      const object = readPickle(file.subarray(10 + file.readUInt16LE(8)), name);
      assert.ok(object instanceof PickledArray && object.dtype === '|O');
      assert.deepEqual(object.shape, []);
      const layers = object.objects[0];
      assert.ok(layers instanceof Map);
      assert.equal(layers.size, count);
      const parts = layers.get(layer);
      assert.ok(parts instanceof Map);
      const array = parts.get(part);
      assert.ok(array instanceof PickledArray);
      assert.deepEqual([array.dtype, array.shape], ['<f4', shape]);
      const values = new Float32Array(new Uint8Array(array.data).buffer);
      assert.equal(
        values.length,
        shape.reduce((a, b) => a * b),
      );
      assert.ok(
        values.every((value) => Math.abs(value) < 100) && values.some((value) => value !== 0),
      );
    }
  });

  describe('that could run code', () => {
    // What Python would do with each is in the name; the arguments do not matter.
    const cases: Record<string, [Part[], RegExp]> = {
      'GLOBAL os.system': [['cos\nsystem\n(S"id"\ntR.'], /"os\.system"/],
      'STACK_GLOBAL subprocess.Popen': [
        [0x80, 4, short('subprocess'), short('Popen'), 0x93, '.'],
        /"subprocess\.Popen"/,
      ],
      'INST of a class': [['(S"id"\nios\nsystem\n.'], /"os\.system"/],
      'OBJ of a class': [['(cnumpy\nndarray\nN', 0x6f, '.'], /operation OBJ/],
      'NEWOBJ of a class': [['cnumpy\nndarray\n)', 0x81, '.'], /operation NEWOBJ/],
      'NEWOBJ_EX of a class': [['cnumpy\nndarray\n)}', 0x92, '.'], /operation NEWOBJ_EX/],
      'builtins.eval': [['c__builtin__\neval\n(S"1"\ntR.'], /"__builtin__\.eval"/],
      'builtins.getattr': [[short('builtins'), short('getattr'), 0x93, '.'], /"builtins\.getattr"/],
      'another codec': [['c_codecs\ndecode\n.'], /"_codecs\.decode"/],
      'a codec beside latin-1': [
        ['c_codecs\nencode\n', short('a'), short('rot13'), 0x86, 'R.'],
        /_codecs\.encode/,
      ],
      'an outside object by text': [['Pmodule\n.'], /operation PERSID/],
      'an outside object': [['NQ.'], /operation BINPERSID/],
      'a registered extension': [[0x82, 1, '.'], /operation EXT1/],
      'a state on a list': [[']}b.'], /state/],
      'a state on an object': [['NN', 0x85, 'b.'], /BUILD/],
      'a module inside an allowed name': [
        [short('numpy'), short('core.multiarray._reconstruct.__globals__'), 0x93, '.'],
        /__globals__/,
      ],
      'joblib, as scikit-learn does': [
        ['cjoblib.numpy_pickle\nNumpyArrayWrapper\n.'],
        /"joblib\.numpy_pickle\.NumpyArrayWrapper"/,
      ],
      'a call of what is no function': [['N)R.'], /no function/],
      'an out-of-band buffer': [[0x97, '.'], /operation NEXT_BUFFER/],
    };
    for (const [name, [parts, message]] of Object.entries(cases)) {
      it(`are refused by name: ${name}`, () => refused(pickle(...parts), message));
    }

    it('are refused by name: the fixture, with nothing run', async function () {
      const path = shared(this, 'faces/interop/hostile.bin');
      const before = await readdir('.');
      await assert.rejects(readVerificationBin(path), {
        code: 'ERR_FORMAT',
        message: /hostile\.bin is refused: .*"posix\.system"/,
      });
      assert.ok(!existsSync('pwned.txt'));
      assert.deepEqual(await readdir('.'), before);
    });
  });

  describe('that are damaged', () => {
    it('are refused: cut off, left over, of the future', () => {
      refused(pickle(), /at byte 0, 1 bytes should follow and 0 are left/);
      refused(pickle('N'), /at byte 1/);
      refused(pickle('B', u32(2 ** 29 - 1), 'abc'), /536870911 bytes should follow and 3 are left/);
      refused(pickle(0x8e, u64(2n ** 63n), 'abc'), /922337203685477\d+ bytes/);
      refused(pickle(0x95, u64(2n ** 63n), 'N.'), /cut off/);
      refused(pickle('NN.'), /left over/);
      refused(pickle('(N.'), /left over|nothing to work on/);
      refused(pickle('N.N'), /1 bytes follow its end/);
      refused(pickle(0x80, 6, 'N.'), /protocol 6/);
      refused(pickle(0xff), /0xff is no operation/);
      refused(pickle('.'), /nothing to work on/);
      refused(pickle('t'), /no mark/);
      refused(pickle('h', 0, '.'), /recalls 0/);
      refused(pickle('I12x\n.'), /"12x" is no whole number/);
      refused(pickle('F0x10\n.'), /"0x10" is no number/);
      refused(pickle('I5'), /no end/);
      refused(pickle(`I${'9'.repeat(300)}\n.`), /300 bytes/);
      refused(pickle(0x8b, u32(300), Buffer.alloc(300, 1), '.'), /300 bytes/);
      refused(pickle("S'a\n."), /no quotes/);
      refused(pickle("S'a\\x0'\n."), /escape/);
      refused(pickle('Va\\u12\n.'), /escape/);
      refused(pickle('X', u32(1), 0xff, '.'), /not UTF-8/);
      refused(pickle('NNa.'), /no list/);
      refused(pickle('NNNs.'), /no dictionary/);
      refused(pickle('}(Nu.'), /without a value/);
      refused(pickle('}]Ns.'), /no text and no number/);
      refused(pickle('cnumpy\nndarray\n.'), /description of a type/);
    });

    it('are refused: arrays whose data are not what their shape says', () => {
      const data = Buffer.alloc(6);
      refused(pickle(numpyArray([7], 'u1', '|', data), '.'), /has 6 bytes where it needs 7/);
      refused(pickle(numpyArray([5], 'u1', '|', data), '.'), /has 6 bytes where it needs 5/);
      refused(pickle(numpyArray([2], 'f8', '<', data), '.'), /has 6 bytes where it needs 16/);
      refused(pickle(numpyArray([255, 255, 255, 255, 255], 'f8', '<', data), '.'), /needs/);
      refused(pickle(numpyArray([6], 'S6', '|', data), '.'), /"S6"/);
      refused(pickle(numpyArray([6], 'O', '|', data), '.'), /not stored as its type needs/);
    });

    it('are refused: what contains itself or nests without end', () => {
      refused(pickle(']', 0x94, 'h', 0, 'a.'), /contains itself/);
      refused(pickle('}', 0x94, short('a'), 'h', 0, 's.'), /contains itself/);
      refused(pickle(']', 0x94, 'h', 0, 0x85, 'a.'), /contains itself/);
      assert.ok(read('N', Buffer.alloc(64, 0x85), '.'));
      refused(pickle('N', Buffer.alloc(65, 0x85), '.'), /nests more than 64 deep/);
      refused(pickle('N', Buffer.alloc(50_000, 0x85), '.'), /nests more than 64 deep/);
      // A list twice in a list, forty times over: 2^40 leaves if it were walked.
      assert.ok(read('N', ...Array.from({ length: 40 }, () => [0x32, 0x86]).flat(), '.'));
    });

    it('are refused before they take memory: containers and copies by the million', async () => {
      const script = fileURLToPath(new URL('helpers/hostile-pickles.ts', import.meta.url));
      const { stdout } = await promisify(execFile)(process.execPath, [
        '--expose-gc',
        ...['--import', 'tsx', script],
      ]);
      const { grown, inputs, messages } = JSON.parse(stdout) as {
        grown: number;
        inputs: number;
        messages: string[];
      };
      assert.equal(messages.length, 7);
      for (const message of messages) {
        assert.match(message, /more memory|left over|nothing to work on|no mark/);
      }
      assert.match(messages[0]!, /more memory/);
      assert.match(messages.at(-1)!, /more memory/);
      assert.ok(grown < 64 * 2 ** 20 + 4 * inputs, `memory grew by ${grown} bytes`);
    });

    it('give a sentence or a value, whatever is cut or flipped', async function () {
      this.timeout(20_000);
      const random = seeded(23);
      for (const name of ['lfw_dev_p2', 'lfw_dev_p4', 'lfw_dev_numpy', 'hostile']) {
        const whole = await readFile(shared(this, `faces/interop/${name}.bin`));
        let sentences = 0;
        const attempt = (bytes: Uint8Array): void => {
          try {
            readPickle(bytes, name);
          } catch (error) {
            assert.ok(error instanceof HardmineError, String(error));
            sentences += 1;
          }
        };
        // The large files take a tenth of a second each.
        const times = whole.length > 2 ** 20 ? 30 : 300;
        for (let i = 0; i < times; i++) attempt(whole.subarray(0, random(whole.length)));
        assert.equal(sentences, times, `every truncation of ${name} is told`);
        for (let i = 0; i < times; i++) {
          const flipped = Buffer.from(whole);
          // Where structure is dense, and anywhere.
          const within = i % 2 === 0 ? Math.min(400, whole.length) : whole.length;
          flipped[random(within)]! ^= 1 << random(8);
          attempt(flipped);
        }
        for (let i = 0; i < 300; i++) {
          attempt(Uint8Array.from({ length: random(200) }, () => random(256)));
        }
      }
    });
  });
});

describe('verification sets', () => {
  let folder: string;
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-bin-'));
  });
  after(async () => {
    await rm(folder, { recursive: true });
  });

  it('of both pickle protocols hold the same pairs of JPEGs', async function () {
    const [two, four] = [
      await readVerificationBin(shared(this, 'faces/interop/lfw_dev_p2.bin')),
      await readVerificationBin(shared(this, 'faces/interop/lfw_dev_p4.bin')),
    ];
    for (const set of [two, four]) {
      assert.equal(set.images.length, 600);
      assert.equal(set.same.length, 300);
      assert.equal(set.same.filter(Boolean).length, 150);
      for (const image of set.images) {
        assert.deepEqual(
          [image[0], image[1], image.at(-2), image.at(-1)],
          [0xff, 0xd8, 0xff, 0xd9],
        );
      }
    }
    assert.deepEqual(two.same, four.same);
  });

  it('may hold NumPy arrays', async function () {
    const { images, same } = await readVerificationBin(
      shared(this, 'faces/interop/lfw_dev_numpy.bin'),
    );
    assert.deepEqual([images.length, same.length], [60, 30]);
    for (const image of images) {
      assert.deepEqual([image[0], image[1], image.at(-2), image.at(-1)], [0xff, 0xd8, 0xff, 0xd9]);
    }
  });

  it('come back as they were written, however many', async () => {
    // 1,001 pairs: more than two of the batches in which lists are appended.
    const images = Array.from({ length: 2002 }, (_, i) => Buffer.alloc(1 + (i % 300), i));
    const same = images.slice(0, 1001).map((_, i) => i % 3 === 0);
    const path = join(folder, 'written.bin');
    await writeVerificationBin(path, images, same);
    const back = await readVerificationBin(path);
    assert.deepEqual(back.same, same);
    assert.equal(back.images.length, images.length);
    for (const [i, image] of back.images.entries()) {
      assert.equal(Buffer.compare(image, images[i]!), 0, `image ${i}`);
    }
    // The bytes as pickletools describes protocol 4, for one pair.
    const small = join(folder, 'small.bin');
    await writeVerificationBin(small, [Buffer.from('ab'), Buffer.from('c')], [true]);
    assert.deepEqual(
      await readFile(small),
      pickle(0x80, 4, '](B', u32(2), 'abB', u32(1), 'ce](', 0x88, 'e', 0x86, '.'),
    );
  });

  it('are written whole or not at all', async () => {
    const path = join(folder, 'none.bin');
    const failing = async function* () {
      yield Buffer.from('a');
      throw new HardmineError('ERR_DATA', 'the second image is damaged.');
    };
    await assert.rejects(writeVerificationBin(path, failing(), [true]), /second image/);
    await assert.rejects(writeVerificationBin(path, [Buffer.from('a')], [true]), {
      code: 'ERR_INPUT',
      message: /1 images for 1 pairs/,
    });
    await assert.rejects(writeVerificationBin(path, [], []), /0 images for 0 pairs/);
    const nowhere = join(folder, 'nowhere', 'x.bin');
    await assert.rejects(writeVerificationBin(nowhere, [], []), { code: 'ERR_IO' });
    assert.ok(!(await readdir(folder)).some((name) => name.includes('none')));
  });

  it('are told from other pickles and other files', async () => {
    const path = join(folder, 'wrong.bin');
    const image = ['C', 1, 'a'];
    const cases: [Part[], RegExp][] = [
      [['N.'], /a list of images and a list of booleans/],
      [[']N', 0x86, '.'], /no list of true and false/],
      [[']]', 0x86, '.'], /0 images for 0 pairs/],
      [['N](', 0x88, 'e', 0x86, '.'], /first part is no list of images/],
      [['](', ...image, 'e](', 0x88, 'e', 0x86, '.'], /1 images for 1 pairs/],
      [['](', ...image, 'K', 1, 'e](', 0x88, 'e', 0x86, '.'], /image 1 is neither bytes/],
      [['](', ...image, ...image, 'e](K', 2, 'e', 0x86, '.'], /no list of true and false/],
      [['\xff\xd8\xff\xe0'], /no pickle of plain data: at byte 0/],
    ];
    for (const [parts, message] of cases) {
      await writeFile(path, pickle(...parts));
      await assert.rejects(readVerificationBin(path), (error) => {
        assert.ok(error instanceof HardmineError && error.code === 'ERR_FORMAT', String(error));
        assert.match(error.message, message);
        assert.ok(error.message.startsWith(path));
        return true;
      });
    }
    await writeFile(path, pickle('](', ...image, ...image, 'e](K', 1, 'e', 0x86, '.'));
    assert.deepEqual((await readVerificationBin(path)).same, [true]);
    await assert.rejects(readVerificationBin(folder), {
      code: 'ERR_DATA',
      message: /not a file/,
    });
    await assert.rejects(readVerificationBin(join(folder, 'gone')), { code: 'ERR_IO' });
  });
});
