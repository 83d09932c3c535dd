import assert from 'node:assert/strict';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import fc from 'fast-check';
import { HardmineError } from '../src/errors.js';
import { EventWriter, encodeRecord, maskedCrc } from '../src/formats/tfevents.js';
import {
  decode,
  doubles,
  nested,
  readRecords,
  slowCrc,
  slowMask,
  string,
} from './helpers/event-reader.js';

describe('event files', () => {
  let folder: string;
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-events-'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('have the checksums of TFRecord', () => {
    // "123456789" is the check value of the CRC catalogues: CRC32C 0xE3069283.
    assert.equal(slowCrc(Buffer.from('123456789')), 0xe3069283);
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
        assert.equal(maskedCrc(bytes), slowMask(bytes));
        assert.deepEqual(readRecords(encodeRecord(bytes)), [Buffer.from(bytes)]);
      }),
    );
  });

  it('hold what was written, as an independent reader reads it', async () => {
    const writer = await EventWriter.create(folder, 0);
    const before = Date.now() / 1000;
    await writer.text(0, 'config', '| key | value |\n<script>');
    const values = new Map<string, number>();
    fc.assert(
      fc.property(
        fc.array(fc.float({ noNaN: true }), { minLength: 1000, maxLength: 1000 }),
        (list) => {
          for (const [i, value] of list.entries()) values.set(`tag/${i}`, value);
        },
      ),
      { numRuns: 1 },
    );
    await writer.scalars(3, Object.fromEntries(values));
    await writer.scalars(2 ** 40, { nan: Number.NaN });
    await writer.histogram(4, 'gate', {
      min: 0,
      max: 11,
      limits: [0.1, 1, 11],
      counts: [5, 0, 27],
    });
    await writer.close();
    assert.match(basename(writer.path), /^events\.out\.tfevents\.\d{10}\./);
    const [version, text, scalars, nan, histogram] = readRecords(await readFile(writer.path)).map(
      decode,
    );
    assert.equal(string(version!, 3), 'brain.Event:2');
    const wallTime = text!.get(1)![0] as number;
    assert.ok(wallTime >= before && wallTime <= Date.now() / 1000);

    const [config] = nested(nested(text!, 5)[0]!, 1);
    assert.equal(string(config!, 1), 'config');
    const [tensor] = nested(config!, 8);
    assert.equal(tensor!.get(1)![0], 7n);
    assert.equal(string(tensor!, 8), '| key | value |\n<script>');
    assert.equal(string(nested(nested(config!, 9)[0]!, 1)[0]!, 1), 'text');

    assert.equal(scalars!.get(2)![0], 3n);
    const read = new Map(
      nested(nested(scalars!, 5)[0]!, 1).map((value) => [string(value, 1), value.get(2)?.[0] ?? 0]),
    );
    assert.deepEqual(read, values);
    assert.equal(nan!.get(2)![0], 2n ** 40n);
    assert.ok(Number.isNaN(nested(nested(nan!, 5)[0]!, 1)[0]!.get(2)![0]));

    const [gate] = nested(nested(nested(histogram!, 5)[0]!, 1)[0]!, 5);
    assert.deepEqual(doubles(gate!.get(6)![0] as Buffer), [0.1, 1, 11]);
    assert.deepEqual(doubles(gate!.get(7)![0] as Buffer), [5, 0, 27]);
    assert.equal(gate!.get(3)![0], 32);
  });

  it('of a run that is resumed make readers forget what was done after its checkpoint', async () => {
    const writer = await EventWriter.create(folder, 120);
    await writer.close();
    const events = readRecords(await readFile(writer.path)).map(decode);
    const start = events.at(-1)!;
    assert.equal(start.get(2)![0], 120n);
    assert.equal(nested(start, 7)[0]!.get(1)![0], 1n);
  });

  it('that cannot be written are an error with the path', async () => {
    await assert.rejects(
      EventWriter.create(join(folder, 'none'), 0),
      (error) =>
        error instanceof HardmineError && error.code === 'ERR_IO' && error.message.includes('none'),
    );
  });
});
