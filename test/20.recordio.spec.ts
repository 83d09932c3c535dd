import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import {
  crc32c,
  encodeRecord,
  packedFiles,
  RecordWriter,
  refuseExisting,
} from '../src/formats/recordio.js';
import { startOf } from './helpers/process-start.js';
import { parseImageRecord, readIndex, readRecord } from './helpers/recordio-reader.js';

const INTEROP = '../shared/faces/interop';
const MAGIC_BYTES = Buffer.from([0x0a, 0x23, 0xd7, 0xce]);

/** Random bytes with the magic word strewn in at random places, aligned or not. */
const payloads = fc
  .tuple(
    fc.uint8Array({ maxLength: 200 }),
    fc.array(fc.tuple(fc.nat(200), fc.boolean()), { maxLength: 6 }),
  )
  .map(([bytes, places]) => {
    const payload = Buffer.from(bytes);
    for (const [place, aligned] of places) {
      const at = aligned ? place - (place % 4) : place;
      if (at + 4 <= payload.length) MAGIC_BYTES.copy(payload, at);
    }
    return payload;
  });

describe('RecordIO', function () {
  this.timeout(20_000); // each set is fsynced ten times, which a busy disk takes its time for
  let folder: string;
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'hardmine-recordio-'));
  });
  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  describe('crc32c', () => {
    it('gives the check values of RFC 3720, B.4', () => {
      assert.equal(crc32c(new Uint8Array(32)), 0x8a9136aa);
      assert.equal(crc32c(new Uint8Array(32).fill(0xff)), 0x62a8ab43);
      assert.equal(crc32c(Uint8Array.from({ length: 32 }, (_, i) => i)), 0x46dd794e);
      assert.equal(crc32c(Buffer.from('123456789')), 0xe3069283);
      assert.equal(crc32c(new Uint8Array()), 0);
    });
  });

  describe('encodeRecord', () => {
    it('is read back whole, wherever the magic stands in the payload', () => {
      fc.assert(
        fc.property(payloads, (payload) => {
          const record = encodeRecord(payload);
          const { payload: found, next } = readRecord(record, 0);
          assert.deepEqual(found, payload);
          assert.equal(next, record.length);
          assert.equal(record.length % 4, 0);
        }),
        { numRuns: 500 },
      );
    });

    it('leaves no magic at a multiple of four but where a part begins', () => {
      fc.assert(
        fc.property(payloads, (payload) => {
          const record = encodeRecord(payload);
          const heads: number[] = [];
          for (let at = 0; at < record.length; ) {
            heads.push(at);
            at += 8 + 4 * Math.ceil((record.readUInt32LE(at + 4) & 0x1fffffff) / 4);
          }
          const found: number[] = [];
          for (let at = 0; at < record.length; at += 4) {
            if (record.subarray(at, at + 4).equals(MAGIC_BYTES)) found.push(at);
          }
          assert.deepEqual(found, heads);
        }),
        { numRuns: 500 },
      );
    });

    it('gives the bytes of an independent writer for a record in parts', function () {
      if (!existsSync(INTEROP)) {
        console.log(`      skipped: ${INTEROP} is not there`);
        return this.skip();
      }
      const rec = readFileSync(`${INTEROP}/split_record/train.rec`);
      const first = readRecord(rec, 0);
      const second = readFileSync(`${INTEROP}/split_record/payload1.bin`);
      assert.deepEqual(readRecord(rec, first.next).payload, second);
      assert.deepEqual(Buffer.concat([encodeRecord(first.payload), encodeRecord(second)]), rec);
    });
  });

  describe('RecordWriter', () => {
    /** Writes `counts[c]` images of each class c, image k of the set holding the byte k. */
    async function write(prefix: string, counts: number[]): Promise<void> {
      const writer = await RecordWriter.create(prefix);
      for (const [label, count] of counts.entries()) {
        for (let i = 0; i < count; i += 1) {
          await writer.add(label, Buffer.alloc(5 + writer.images, writer.images));
        }
      }
      await writer.finish(counts.map((_, label) => `name ${label}`));
    }

    it("lays a set out as InsightFace's format says", async () => {
      await fc.assert(
        fc.asyncProperty(
          fc.array(fc.integer({ min: 1, max: 5 }), { minLength: 1, maxLength: 6 }),
          async (counts) => {
            const set = join(mkdtempSync(join(folder, 'set-')), 'train');
            await write(set, counts);
            const files = packedFiles(set);
            const rec = readFileSync(files.rec);
            const index = readIndex(readFileSync(files.idx, 'utf8'));
            const images = counts.reduce((sum, count) => sum + count, 0);
            assert.equal(index.length, 1 + images + counts.length);

            const crc = readFileSync(files.crc);
            assert.equal(crc.toString('latin1', 0, 8), 'HMCRC32C');
            assert.deepEqual([crc.readUInt32LE(8), crc.readUInt32LE(12)], [1, images]);
            assert.equal(crc.length, 16 + 4 * images);
            assert.equal(readFileSync(files.property, 'utf8'), `${counts.length},112,112`);
            assert.equal(
              readFileSync(files.identities, 'utf8'),
              counts.map((_, label) => `name ${label}\n`).join(''),
            );

            let end = 0;
            const labels = counts.flatMap((count, label) => new Array<number>(count).fill(label));
            for (const [line, [key, offset]] of index.entries()) {
              assert.equal(key, line);
              assert.equal(offset, end);
              const { payload, next } = readRecord(rec, offset);
              end = next;
              const record = parseImageRecord(payload);
              assert.deepEqual([record.id, record.id2], [BigInt(key), 0n]);
              if (key === 0) {
                assert.deepEqual(record.labels, [images + 1, images + 1 + counts.length]);
                assert.equal(record.image.length, 0);
              } else if (key <= images) {
                assert.deepEqual([record.flag, record.label], [0, labels[key - 1]]);
                assert.deepEqual(record.image, Buffer.alloc(4 + key, key - 1));
                assert.equal(crc.readUInt32LE(16 + 4 * (key - 1)), crc32c(payload));
              } else {
                const label = key - images - 1;
                const first = labels.indexOf(label) + 1;
                assert.deepEqual(record.labels, [first, first + counts[label]!]);
                assert.equal(record.image.length, 0);
              }
            }
            assert.equal(end, rec.length);
          },
        ),
        { numRuns: 8 },
      );
    });

    it('gives the bytes of an independent packer for the same images', async function () {
      if (!existsSync(INTEROP)) {
        console.log(`      skipped: ${INTEROP} is not there`);
        return this.skip();
      }
      const rec = readFileSync(`${INTEROP}/insightface_rec/train.rec`);
      const index = readIndex(readFileSync(`${INTEROP}/insightface_rec/train.idx`, 'utf8'));
      const records = index.map(([, offset]) => {
        const { payload, next } = readRecord(rec, offset);
        return { bytes: rec.subarray(offset, next), ...parseImageRecord(payload) };
      });
      const [images] = records[0]!.labels;
      const writer = await RecordWriter.create(join(folder, 'train'));
      for (const record of records.slice(1, images)) {
        await writer.add(record.labels[0] ?? record.label, record.image);
      }
      await writer.finish(Array.from({ length: 25 }, (_, i) => String(i)));
      const ours = readFileSync(join(folder, 'train.rec'));
      const ourIndex = readIndex(readFileSync(join(folder, 'train.idx'), 'utf8'));
      assert.equal(ourIndex.length, index.length);
      let compared = 0;
      for (const [key, offset] of ourIndex) {
        const theirs = records[key]!;
        // Every seventh image of theirs has a second label, which is no part of a training set.
        if (key > 0 && key < images! && theirs.flag > 0) continue;
        assert.deepEqual(ours.subarray(offset, readRecord(ours, offset).next), theirs.bytes);
        compared += 1;
      }
      assert.ok(compared > 500);
    });

    it('writes large sets in pieces', async () => {
      // 3 MB: beyond the megabyte that is gathered before a write.
      const writer = await RecordWriter.create(join(folder, 'train'));
      const image = Buffer.alloc(100_001, 7);
      for (let i = 0; i < 30; i += 1) await writer.add(i % 2 === 0 ? i / 2 : (i - 1) / 2, image);
      const files = await writer.finish(Array.from({ length: 15 }, (_, i) => String(i)));
      const rec = readFileSync(files.rec);
      for (const [key, offset] of readIndex(readFileSync(files.idx, 'utf8')).slice(1, 31)) {
        const record = parseImageRecord(readRecord(rec, offset).payload);
        assert.deepEqual(
          [record.label, record.image.equals(image)],
          [Math.floor((key - 1) / 2), true],
        );
      }
    });

    it('shows nothing before it is finished, and leaves nothing when it is given up', async () => {
      const prefix = join(folder, 'deep', 'er', 'train');
      const writer = await RecordWriter.create(prefix);
      await writer.add(0, Buffer.alloc(10));
      assert.ok(readdirSync(join(folder, 'deep', 'er')).every((name) => name.startsWith('.')));
      await writer.abort();
      assert.deepEqual(readdirSync(folder), []);
    });

    it('leaves what was there before when it is given up', async () => {
      writeFileSync(join(folder, 'mine.txt'), 'mine');
      const writer = await RecordWriter.create(join(folder, 'train'));
      await writer.add(0, Buffer.alloc(10));
      await writer.abort();
      assert.deepEqual(readdirSync(folder), ['mine.txt']);
    });

    it('takes everything back when the check refuses the set', async () => {
      const writer = await RecordWriter.create(join(folder, 'set', 'train'));
      await writer.add(0, Buffer.alloc(10));
      const checked = writer.finish(['a'], async (staged) => {
        assert.ok(existsSync(staged.rec) && existsSync(staged.idx) && existsSync(staged.crc));
        assert.ok(!existsSync(join(folder, 'set', 'train.rec')));
        throw new Error('refused');
      });
      await assert.rejects(checked, /refused/);
      await writer.abort();
      assert.deepEqual(readdirSync(folder), []);
    });

    it('takes everything back when a file cannot be moved into place', async () => {
      const writer = await RecordWriter.create(join(folder, 'train'));
      await writer.add(0, Buffer.alloc(10));
      mkdirSync(join(folder, 'identities.txt')); // a folder, over which no file can be renamed
      await assert.rejects(writer.finish(['a']), { code: 'ERR_IO' });
      await writer.abort();
      assert.deepEqual(readdirSync(folder), ['identities.txt']);
    });

    it('removes what a killed process left, and not what a running one writes', async () => {
      const ended = spawnSync(process.execPath, ['-e', '']).pid;
      const stem = `.train.tmp-${hostname()}-`;
      const start = startOf(process.ppid);
      const abandoned = join(folder, `${stem}${ended}-1-0`);
      const reused = join(folder, `${stem}${process.pid}-1-0`);
      const running = join(folder, `${stem}${process.ppid}-${start}-0`);
      for (const path of [abandoned, reused, running]) {
        mkdirSync(path);
        writeFileSync(join(path, 'train.rec'), 'half');
      }
      await write(join(folder, 'train'), [1, 1]);
      assert.ok(!existsSync(abandoned));
      assert.ok(!existsSync(reused));
      assert.ok(existsSync(running));
    });

    it('refuses labels out of order, wrong names and places that cannot be written', async () => {
      const writer = await RecordWriter.create(join(folder, 'train'));
      await assert.rejects(writer.add(1, Buffer.alloc(1)), /label 1 follows label -1/);
      await writer.add(0, Buffer.alloc(1));
      await assert.rejects(writer.finish(['a', 'b']), /2 names were given for the 1 identities/);
      await writer.abort();

      writeFileSync(join(folder, 'file'), '');
      await assert.rejects(RecordWriter.create(join(folder, 'file', 'train')), {
        code: 'ERR_IO',
        message: /^.*file\/train\.rec could not be written \(.*\): choose a folder/,
      });
      await assert.rejects(RecordWriter.create('/proc/nowhere/train'), { code: 'ERR_IO' });
    });

    it('refuses names that are taken', async () => {
      await refuseExisting(join(folder, 'train'));
      for (const name of ['train.rec', 'train.idx', 'train.crc', 'property', 'identities.txt']) {
        writeFileSync(join(folder, name), '');
        await assert.rejects(refuseExisting(join(folder, 'train')), {
          code: 'ERR_IO',
          message: `${join(folder, name)} exists already and packing overwrites nothing: give another folder or delete it.`,
        });
        rmSync(join(folder, name));
      }
    });
  });
});
