/** Files made to do harm: bombs, damage that nothing but a checksum tells, and places that are no files. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import {
  copyFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  symlink,
  truncate,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import sharp from 'sharp';
import { overlay } from '../src/cli/config-options.js';
import { resolveConfig } from '../src/config.js';
import { openDataset } from '../src/data/dataset.js';
import { inspectDataset } from '../src/data/inspect.js';
import { packDataset } from '../src/data/pack.js';
import { openRecords } from '../src/data/packed-set.js';
import { HardmineError } from '../src/errors.js';
import { parseLfwPairs } from '../src/evaluate/lfw.js';
import { packLfwPairs } from '../src/evaluate/lfw-bin.js';
import { readList } from '../src/evaluate/lists.js';
import { encodeRecord, RecordWriter } from '../src/formats/recordio.js';
import { writeSafetensors } from '../src/formats/safetensors.js';
import { writeVerificationBin } from '../src/formats/verification-bin.js';
import { loadAddon } from '../src/native.js';
import { findCheckpoint, writeCheckpoint } from '../src/train/checkpoint.js';
import { RunDirectory } from '../src/train/run-directory.js';
import { MAIN } from './helpers/built.js';
import { seeded } from './helpers/random.js';
import { skip } from './helpers/skip.js';

const run = promisify(execFile);
const REFUSALS = fileURLToPath(new URL('helpers/refusals.ts', import.meta.url));

const flat = (side: number): Promise<Buffer> =>
  sharp({ create: { width: side, height: side, channels: 3, background: '#875' } })
    .jpeg()
    .toBuffer();

/** The frame header of a JPEG says `side` both ways. */
function claimSide(jpeg: Buffer, side: number): Buffer {
  const bomb = Buffer.from(jpeg);
  const frame = bomb.indexOf(Buffer.from([0xff, 0xc0]));
  bomb.writeUInt16BE(side, frame + 5);
  bomb.writeUInt16BE(side, frame + 7);
  return bomb;
}

/** A PNG of 8-bit grey that says `side` both ways, its checksums right and its pixels missing. */
function pngBomb(png: Buffer, side: number): Buffer {
  const bomb = Buffer.from(png);
  bomb.writeUInt32BE(side, 16);
  bomb.writeUInt32BE(side, 20);
  bomb.writeUInt32BE(crc32(bomb.subarray(12, 29)), 29);
  return bomb;
}

/** PNG's checksum (RFC 2083, 15). */
function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return ~crc >>> 0;
}

function record(image: Buffer, label = 0): Buffer {
  const payload = Buffer.concat([Buffer.alloc(24), image]);
  payload.writeFloatLE(label, 4);
  return encodeRecord(payload);
}

function refusedBy(code: string, message: RegExp): (error: unknown) => true {
  return (error) => {
    assert.ok(error instanceof HardmineError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, message);
    return true;
  };
}

describe('hostile files', function () {
  this.timeout(30_000); // processes of their own, on a busy machine
  let folder: string;
  let jpeg: Buffer;
  before(async function () {
    try {
      loadAddon('cpu');
    } catch (error) {
      skip(this, (error as Error).message);
    }
    jpeg = await flat(112);
  });
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-hostile-'));
  });
  afterEach(() => rm(folder, { recursive: true, force: true }));

  const at = (name: string): string => join(folder, name);
  async function write(name: string, content: Uint8Array | string): Promise<string> {
    const path = at(name);
    await mkdir(join(path, '..'), { recursive: true });
    await writeFile(path, content);
    return path;
  }
  const pipe = async (name: string): Promise<string> => {
    await run('mkfifo', [at(name)]);
    return at(name);
  };

  it('are refused in 100 ms of work and 50 MB: bombs at every entry', async () => {
    await writeSafetensors(at('sound.safetensors'), new Map());
    await writeVerificationBin(at('sound.bin'), [jpeg, jpeg], [true]);
    const png = await sharp({
      create: { width: 112, height: 112, channels: 3, background: '#000' },
    })
      .toColourspace('b-w')
      .png()
      .toBuffer();
    const bomb = claimSide(jpeg, 65_500);
    await write('sound.rec', record(jpeg));
    await write('bomb.rec', record(bomb));
    for (const name of ['sound', 'bomb']) await write(`${name}.idx`, '0\t0\n');
    const header = Buffer.alloc(16);
    header.writeBigUInt64LE(1n << 63n);
    const bytes = Buffer.alloc(13, 0);
    bytes.write('\x80\x04\x8e', 'latin1'); // BINBYTES8
    bytes.writeBigUInt64LE((1n << 63n) - 1n, 3);
    const hostile: [kind: string, path: string, message: RegExp][] = [
      ['safetensors', await write('a.safetensors', header), /header of 9223372036854775808 bytes/],
      ['bin', await write('a.bin', bytes), /922337203685477\d+ bytes should follow/],
      ['image', await write('a.jpg', bomb), /cannot be decoded .*pixel limit/],
      ['image', await write('a.png', pngBomb(png, 65_500)), /cannot be decoded .*pixel limit/],
      ['photograph', at('a.jpg'), /65500x65500 pixels .* at most 64 megapixels/],
      ['photograph', at('a.png'), /65500x65500 pixels .* at most 64 megapixels/],
      ['records', at('bomb.rec'), /65500x65500\s+pixels, more than the 16 megapixels/],
    ];
    const sound: [string, string][] = [
      ['safetensors', at('sound.safetensors')],
      ['bin', at('sound.bin')],
      ['image', await write('sound.jpg', jpeg)],
      ['image', await write('sound.png', png)],
      ['photograph', at('sound.jpg')],
      ['records', at('sound.rec')],
    ];
    const argv = [...sound, ...hostile.map(([kind, path]) => [kind, path])].flat();
    const { stdout } = await run(process.execPath, [
      ...['--expose-gc', '--import=tsx', REFUSALS, ...argv],
    ]);
    const results = JSON.parse(stdout) as {
      message: string;
      milliseconds: number;
      grown: number;
    }[];
    for (const { message } of results.slice(0, sound.length)) assert.equal(message, '');
    for (const [i, [kind, path, expected]] of hostile.entries()) {
      const { message, milliseconds, grown } = results[sound.length + i]!;
      const what = `${kind} ${path}: ${milliseconds} ms, ${grown} bytes, ${message}`;
      assert.match(message, expected, what);
      assert.ok(milliseconds < 100, what);
      assert.ok(grown < 50e6, what);
    }
    assert.equal(results.length, sound.length + hostile.length);
  });

  it('take at most 64 MiB and four times their size: headers and flags by the million', async () => {
    const MIB = 2 ** 20;
    // As many objects as a header can ask for, then more than that.
    const entries = (one: (i: number) => string, bytes: number): Buffer => {
      const parts: string[] = [];
      for (let i = 0, length = 0; length < bytes - 200; i += 1) {
        parts.push(one(i));
        length += parts.at(-1)!.length + 1;
      }
      const json = Buffer.from(`{${parts.join(',')}}`);
      const length = Buffer.alloc(8);
      length.writeBigUInt64LE(BigInt(json.length));
      return Buffer.concat([length, json]);
    };
    const empty = (i: number): string =>
      `"${i.toString(36)}":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}`;
    const flags = Buffer.concat([
      Buffer.from('\x80\x04]cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n', 'latin1'),
      Buffer.from('K\0\x85C\x01b\x87R(K\x01J', 'latin1'),
      u32(32 * MIB),
      Buffer.from(
        '\x85cnumpy\ndtype\nC\x02b1\x89\x88\x87R(K\x03C\x01|NNNK\0K\0K\0tb\x89B',
        'latin1',
      ),
      u32(32 * MIB),
      Buffer.alloc(32 * MIB),
      Buffer.from('tb\x86.', 'latin1'),
    ]);
    const files: [string, string, RegExp][] = [
      ['safetensors', 'tensors', /^$/],
      ['safetensors', 'keys', /without a dtype/],
      ['safetensors', 'numbers', /of shape|without a dtype/],
      ['safetensors', 'too-many', /at most 1048576 are allowed/],
      ['bin', 'flags', /0 images for 33554432 pairs/],
      ['pairs', 'lines', /found "aa"/],
      ['splits', 'lines', /found "aa"/],
      ['pairs', 'too-long', /at most 4194304/],
    ];
    await write('tensors', entries(empty, MIB));
    await write(
      'keys',
      entries((i) => `"${i.toString(36)}":{}`, MIB),
    );
    await write(
      'numbers',
      entries(() => `"a":{"shape":[${'0,'.repeat(MIB / 2 - 200)}0]}`, 1000),
    );
    await write('too-many', entries(empty, 2 * MIB));
    await write('flags', flags);
    await write('lines', 'aa\n'.repeat(Math.floor(1.33 * MIB)));
    await write('too-long', 'aa\n'.repeat(Math.floor(1.34 * MIB)));
    const { stdout } = await run(process.execPath, [
      ...['--expose-gc', '--import=tsx', REFUSALS],
      ...files.flatMap(([kind, name]) => [kind, at(name)]),
    ]);
    const results = JSON.parse(stdout) as { message: string; grown: number }[];
    for (const [i, [, name, expected]] of files.entries()) {
      const { message, grown } = results[i]!;
      assert.match(message, expected, `${name}: ${message}`);
      const allowed = 64 * MIB + 4 * (await readFile(at(name))).length;
      assert.ok(grown < allowed, `${name} took ${grown} bytes of ${allowed}`);
    }
  });

  it('of another format are refused in records, whatever they are called', async () => {
    const formats = { gif: 'GIF', webp: 'WebP', tiff: 'TIFF', png: 'PNG', heif: 'AVIF' } as const;
    for (const [format, name] of Object.entries(formats)) {
      const image = sharp({ create: { width: 112, height: 112, channels: 3, background: '#875' } });
      const bytes = await (format === 'heif'
        ? image.avif({ effort: 0 })
        : image.toFormat(format as 'gif')
      ).toBuffer();
      const rec = await write('a.rec', Buffer.concat([record(bytes), record(jpeg, 1)]));
      await write('a.idx', `0\t0\n1\t${record(bytes).length}\n`);
      const { damaged } = await inspectDataset(rec);
      assert.equal(damaged.length, 1, format);
      assert.match(damaged[0]!.reason, new RegExp(`is not a JPEG, it is an? ${name}`));
      // Files are PNG or JPEG by their first bytes, not by their names.
      await write('faces/anna/a.jpg', bytes);
      await write('faces/bert/b.jpg', jpeg);
      if (format === 'png') continue;
      await assert.rejects(
        packDataset(at('faces'), at('out')),
        refusedBy('ERR_DATA', /anna\/a\.jpg is not a JPEG or PNG image/),
      );
    }
  });

  it('with one bit flipped are found by the checksums of a pack, a thousand of a thousand', async function () {
    this.timeout(120_000); // a thousand sets are opened and decoded
    const FLIPS = 1000;
    const writer = await RecordWriter.create(at('set'));
    for (let i = 0; i < 4; i += 1) await writer.add(i >> 1, jpeg);
    const { rec, idx } = await writer.finish(['anna', 'bert']);
    const whole = await readFile(rec);
    const sound = await openRecords(rec, idx);
    const offsets = sound.offsets;
    await sound.dispose();
    const draw = seeded(26);
    let detected = 0;
    for (let flip = 0; flip < FLIPS; flip += 1) {
      const damaged = Buffer.from(whole);
      // In a record of an image: the others hold no image to be damaged.
      const image = draw(offsets.length);
      const start = offsets[image]!;
      const bit = draw(8 * (8 + 24 + jpeg.length));
      damaged[start + (bit >> 3)]! ^= 1 << (bit & 7);
      await writeFile(rec, damaged);
      try {
        const records = await openRecords(rec, idx);
        const found = await records.verify();
        await records.dispose();
        assert.ok(found.length <= 1 && found.every(({ index }) => index === image));
        detected += found.length;
      } catch (error) {
        assert.ok(error instanceof HardmineError, String(error));
        detected += 1;
      }
    }
    console.log(`      ${detected} of ${FLIPS} flipped bits were detected`);
    assert.equal(detected, FLIPS);
  });

  it('of configurations do not reach beyond them: depth, prototypes, numbers', async () => {
    const complaint = (text: string): string => {
      try {
        resolveConfig(JSON.parse(text));
        return '';
      } catch (error) {
        assert.ok(error instanceof HardmineError && error.code === 'ERR_CONFIG', String(error));
        return error.message;
      }
    };
    const deep = '['.repeat(100_000) + ']'.repeat(100_000);
    const base = '"data":"a","out":"b"';
    assert.match(complaint(`{${base},"lr":${deep}}`), /"lr" is a list of 1:/);
    assert.match(
      complaint(`{${base},"loss":${'{"a":'.repeat(50_000)}1${'}'.repeat(50_000)}}`),
      /"loss" is an object:/,
    );
    assert.match(complaint(`{${base},"__proto__":{"lr":5}}`), /unknown key "__proto__"/);
    assert.match(
      complaint(`{${base},"weighting":{"__proto__":1}}`),
      /unknown key "weighting\.__proto__"/,
    );
    assert.match(complaint(`{${base},"constructor":1}`), /unknown key "constructor"/);
    assert.match(complaint(`{${base},"lr":1e999}`), /"lr"/);
    assert.match(complaint(`{${base},"seed":9007199254740993}`), /"seed"/);
    assert.match(complaint(`{${base},"epochs":1e300}`), /"epochs"/);
    assert.match(complaint(`{${base},"a\\u001b[2J\\n":1}`), /unknown key "a\\u001b\[2J\\n"/);
    const long = complaint(`{${base},"${'x'.repeat(500_000)}":1}`);
    assert.ok(long.length < 400, `a message of ${long.length} characters`);
    assert.ok(complaint(`{${base},"lr":"${'x'.repeat(500_000)}"}`).length < 400);
    assert.ok(complaint(`{${base},"milestones":[${'2,'.repeat(10_000)}2]}`).length < 500);
    // The command line's options are laid over it.
    const merged = overlay(JSON.parse(`{${base},"__proto__":{"lr":5}}`), { batch: 8 });
    assert.equal(Object.getPrototypeOf(merged), Object.prototype);
    assert.throws(() => resolveConfig(merged), refusedBy('ERR_CONFIG', /"__proto__"/));

    const train = async (config: string): Promise<string> => {
      const error = await run(process.execPath, [MAIN, 'train', config]).catch(
        (failure: { code: number; stderr: string }) => failure,
      );
      assert.ok('code' in error && error.code === 2, 'exit code 2');
      return error.stderr;
    };
    assert.match(await train(await pipe('config.json')), /config\.json cannot be read/);
  });

  it('are no pipes and devices, wherever a list, a note or a state is read', async () => {
    // Reading /dev/zero would never end, and opening a pipe would not either.
    for (const place of [await pipe('pipe'), '/dev/zero', folder]) {
      const refused = (work: Promise<unknown>, code = 'ERR_DATA') =>
        assert.rejects(work, refusedBy(code, /is not a file/));
      await refused(readList(place, '--pairs'));
      await refused(packLfwPairs(folder, place, at('out.bin')));
      // A link to a folder is that folder.
      for (const form of place === folder ? [] : ['tsv', 'lst', 'bin', 'rec']) {
        const path = at(`link.${form}`);
        await symlink(place, path);
        if (form === 'rec') await write('link.idx', '0\t0\n');
        await assert.rejects(inspectDataset(path), refusedBy('ERR_DATA', /is not a file/));
        await rm(path);
      }
      await mkdir(at('run'));
      await symlink(place, at('run/config.json'));
      if (place !== folder) {
        await assert.rejects(
          async () => {
            const found = await RunDirectory.claim(at('run'), true);
            await found.readConfig().finally(() => found.close());
          },
          refusedBy('ERR_CONFIG', /./),
        );
      }
      await rm(at('run'), { recursive: true });
    }
    const steps = at('checkpoints');
    for (const step of [1, 2, 3, 4]) {
      await writeCheckpoint(
        steps,
        { model: new Map(), head: new Map(), optimizer: new Map() },
        { ...STATE, step },
        9,
      );
    }
    const replace = async (step: number, name: string, target: string): Promise<void> => {
      const path = join(steps, `step-0000000${step}`, name);
      await rm(path);
      await symlink(target, path);
    };
    await replace(4, 'MANIFEST.json', '/dev/zero');
    await replace(3, 'state.json', '/dev/zero');
    await replace(2, 'model.safetensors', at('pipe'));
    const { found, rejected } = await findCheckpoint(steps);
    assert.equal(found?.state.step, 1);
    assert.match(rejected[0]!, /00004 .*MANIFEST\.json cannot be read: .*is not a file/);
    assert.match(rejected[1]!, /00003 .*state\.json is not a file/);
    assert.match(rejected[2]!, /00002 .*model\.safetensors is not a file/);
  });

  it('lead out of no folder, and write no names that a terminal obeys', async () => {
    await write('secret/x.jpg', jpeg);
    await write('faces/anna/1.jpg', jpeg);
    await write('faces/bert/1.jpg', jpeg);
    const listed = async (path: string): Promise<unknown> => {
      await write('faces/a.lst', `0\t0\t${path}\n1\t1\tbert/1.jpg\n`);
      return packDataset(at('faces/a.lst'), at('out'));
    };
    for (const path of ['../secret/x.jpg', 'anna/../../secret/x.jpg', at('secret/x.jpg'), '..']) {
      await assert.rejects(listed(path), refusedBy('ERR_DATA', /leads out of the list's folder/));
    }
    await assert.rejects(listed('anna/\x1b[2J.jpg'), refusedBy('ERR_DATA', /\\u001b\[2J/));
    await symlink(at('secret'), at('faces/link'));
    await assert.rejects(listed('link/x.jpg'), refusedBy('ERR_DATA', /a link that leaves/));
    await rm(at('faces/a.lst'));
    await assert.rejects(
      packDataset(at('faces'), at('out')),
      refusedBy('ERR_DATA', /symbolic link/),
    );
    await rm(at('faces/link'));
    for (const name of ['a\nb', 'a\x1b[2J', 'a\x9b2J']) {
      await copyFile(at('secret/x.jpg'), at(`faces/anna/${name}.jpg`));
      await assert.rejects(
        packDataset(at('faces'), at('out')),
        refusedBy('ERR_DATA', /not plain UTF-8 text/),
      );
      await rm(at(`faces/anna/${name}.jpg`));
    }
    const inside = await pipe('faces/anna/2.jpg');
    await assert.rejects(
      packDataset(at('faces'), at('out')),
      refusedBy('ERR_DATA', /anna\/2\.jpg is not a \.jpg/),
    );
    await rm(inside);
    for (const name of ['..', 'a/b', 'a\\b', 'a\x1b[2J', 'a\x9b']) {
      assert.throws(
        () => parseLfwPairs(`2\t1\n${name}\t1\t2\nA\t1\tB\t1\nA\t1\t2\nA\t1\tB\t2\n`),
        refusedBy('ERR_PROTOCOL', /is no plain folder name/),
      );
    }
    await packDataset(at('faces'), at('set'));
    for (const names of ['anna\x1b[2J\nbert\n', 'anna\r\nbert\r\n', '\nbert\n']) {
      await write('identities.txt', names);
      await assert.rejects(
        openDataset(at('set.rec')),
        refusedBy('ERR_DATA', /identities\.txt does not hold/),
      );
    }
    assert.deepEqual((await readdir(folder)).includes('out.rec'), false);
  });

  it('that are cut while they are open are told, and end nothing', async () => {
    const rec = await write('a.rec', Buffer.concat([record(jpeg), record(jpeg, 1)]));
    await write('a.idx', `0\t0\n1\t${record(jpeg).length}\n`);
    const records = await openRecords(rec, at('a.idx'));
    await truncate(rec, 10);
    await assert.rejects(records.decode(Int32Array.of(1)), refusedBy('ERR_DATA', /shrank from/));
    await records.dispose();
  });
});

const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
};

const STATE = {
  step: 1,
  epoch: 1,
  stepInEpoch: 1,
  seconds: 1,
  epochProgress: null,
  validations: [],
  config: {},
  configHash: '',
  data: { images: 1, identities: 1, sha256: '' },
  environment: {},
};
