/** Packs that take long: memory that does not grow with them, and going on after a kill. */
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { createWriteStream } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import sharp from 'sharp';
import { packedFiles, RecordWriter } from '../src/formats/recordio.js';
import { marked, tableRow } from './helpers/ms-celeb.js';
import { parseImageRecord, readIndex, readRecord } from './helpers/recordio-reader.js';

const PEAK = fileURLToPath(new URL('helpers/peak-memory.ts', import.meta.url));
const PEOPLE = 40;
/** URLs of 5 KB make rows of 6 KB, so that a table which stood in memory would show. */
const URL_BYTES = 5000;

async function plainJpegs(): Promise<Buffer[]> {
  return Promise.all(
    Array.from({ length: 20 }, (_, i) =>
      sharp({
        create: { width: 112, height: 112, channels: 3, background: { r: 12 * i, g: 90, b: 9 } },
      })
        .jpeg({ quality: 50 })
        .toBuffer(),
    ),
  );
}

describe('large packs', function () {
  this.timeout(120_000); // ten thousand images through sharp on a busy machine
  let folder: string;
  let jpegs: Buffer[];
  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-large-'));
    jpegs = await plainJpegs();
  });
  after(() => rm(folder, { recursive: true }));

  // Row i: people in turn, so that no identity's rows stand together; every seventh is not listed.
  const mid = (i: number): string => `m.0${(i % PEOPLE).toString(36)}z`;
  const isListed = (i: number): boolean => i % 7 !== 3;
  /** The list's label: against the order of the MIDs. */
  const label = (i: number): number => PEOPLE - 1 - (i % PEOPLE);
  const image = (i: number): Buffer => marked(jpegs[i % 20]!, `row ${i}`);

  async function writeTable(name: string, rows: number): Promise<{ tsv: string; list: string }> {
    const [tsv, list] = [join(folder, `${name}.tsv`), join(folder, `${name}.txt`)];
    const stream = createWriteStream(tsv);
    const lines: string[] = [];
    for (let i = 0; i < rows; i += 1) {
      const row = tableRow({ mid: mid(i), rank: i, image: image(i), url: URL_BYTES });
      if (!stream.write(row))
        await new Promise<void>((resolve) => stream.once('drain', () => resolve()));
      if (isListed(i)) lines.push(`${mid(i)}/${i}-FaceId-0_align.jpg ${label(i)}\n`);
    }
    await new Promise<void>((resolve) => stream.end(() => resolve()));
    await writeFile(
      list,
      [...lines, `${mid(0)}/9999999-FaceId-0_align.jpg ${label(0)}\n`].join(''),
    );
    return { tsv, list };
  }

  const listed = (rows: number): number[] =>
    Array.from({ length: rows }, (_, i) => i)
      .filter(isListed)
      .sort((a, b) => label(a) - label(b) || a - b);

  it('take no more memory for ten thousand rows than for one, and go on after a kill', async () => {
    const ROWS = 10_000;
    const large = await writeTable('large', ROWS);
    const small = await writeTable('small', 1000);
    const run = async (...argv: string[]) => {
      const { stdout } = await promisify(execFile)(process.execPath, [
        '--import=tsx',
        PEAK,
        ...argv,
      ]);
      return JSON.parse(stdout) as {
        grown: number;
        outcomes: { images: number; notes: string[] }[];
      };
    };

    // Killed as soon as it has noted that something is safe: nothing is to be seen but its own folder.
    const out = join(folder, 'out');
    await mkdir(out);
    const argv = ['--import=tsx', PEAK, 'pack', large.tsv, join(out, 'train'), large.list];
    const killed = spawn(process.execPath, argv, { stdio: 'ignore' });
    const ended = new Promise<NodeJS.Signals | null>((resolve) => {
      killed.on('exit', (_, signal) => resolve(signal));
    });
    const isNoted = async (): Promise<boolean> => {
      for (const name of await readdir(out)) {
        if ((await readdir(join(out, name))).includes('progress.json')) return true;
      }
      return false;
    };
    while (killed.exitCode === null && !(await isNoted())) await sleep(20);
    killed.kill('SIGKILL');
    assert.equal(await ended, 'SIGKILL', 'it was killed in its course');
    const [left, ...others] = await readdir(out);
    assert.match(left!, /^\.train\.tmp-/);
    assert.deepEqual(others, []);
    const { bytes } = JSON.parse(await readFile(join(out, left!, 'progress.json'), 'utf8')) as {
      bytes: number;
    };
    assert.ok(bytes > 2 ** 20);

    const resumed = await run('pack', large.tsv, join(out, 'train'), large.list);
    const few = await run('pack', small.tsv, join(folder, 'few', 'train'), small.list);
    assert.equal(resumed.outcomes[0]!.images, listed(ROWS).length);
    assert.deepEqual(resumed.outcomes[0]!.notes, [
      `1 of the ${listed(ROWS).length + 1} images listed in ${large.list} are not in ${large.tsv}.`,
    ]);
    // 50 MB more of input may cost some 20 bytes a row and what the garbage collector leaves lying.
    const difference = (await stat(large.tsv)).size - (await stat(small.tsv)).size;
    assert.ok(difference > 45 * 2 ** 20, `${difference} bytes`);
    assert.ok(
      resumed.grown - few.grown < 36 * 2 ** 20,
      `${resumed.grown} bytes for ten thousand rows, ${few.grown} for one thousand`,
    );

    // The same files as written in one go, without sharp, lists or tables in between.
    const writer = await RecordWriter.create(join(folder, 'reference', 'train'));
    for (const i of listed(ROWS)) await writer.add(label(i), image(i));
    const names = Array.from({ length: PEOPLE }, (_, c) => mid(PEOPLE - 1 - c));
    const reference = await writer.finish(names);
    assert.deepEqual((await readdir(out)).sort(), [
      'identities.txt',
      'property',
      'train.crc',
      'train.idx',
      'train.rec',
    ]);
    const ours = packedFiles(join(out, 'train'));
    for (const part of ['rec', 'idx', 'crc', 'property', 'identities'] as const) {
      const [a, b] = [await readFile(ours[part]), await readFile(reference[part])];
      assert.ok(a.equals(b), `${part}: ${a.length} and ${b.length} bytes`);
    }
    // And by the independent reader: the images of the rows that the list keeps.
    const rec = await readFile(ours.rec);
    const index = readIndex(await readFile(ours.idx, 'utf8'));
    for (const [k, i] of listed(ROWS).entries()) {
      const record = parseImageRecord(readRecord(rec, index[k + 1]![1]).payload);
      assert.equal(record.label, label(i));
      assert.ok(record.image.equals(image(i)), `row ${i}`);
    }
  });

  it('start anew where what was left is damaged or was packed from something else', async () => {
    for (const [name, damage] of Object.entries({
      'other source': () => undefined,
      'cut off': async (left: string) => {
        const rec = await readFile(join(left, 'damaged.rec'));
        await writeFile(join(left, 'damaged.rec'), rec.subarray(0, rec.length - 5));
      },
      'no JSON': async (left: string) => writeFile(join(left, 'progress.json'), '{'),
      'no number': async (left: string) =>
        writeFile(join(left, 'progress.json'), '{"source":"x","bytes":"all"}'),
      'another record': async (left: string) => {
        const rec = await readFile(join(left, 'damaged.rec'));
        rec.writeUInt32LE(77, 40 + 8 + 8); // the id of record 1, behind record 0's 40 bytes
        await writeFile(join(left, 'damaged.rec'), rec);
      },
    })) {
      const place = join(folder, name);
      const prefix = join(place, 'damaged');
      const resumable = { source: 'x', onFound: () => undefined };
      const first = await RecordWriter.create(prefix, resumable);
      for (const i of [39, 79, 119]) await first.add(0, image(i));
      await first.checkpoint();
      assert.equal(await first.suspend(), 3);
      const [left] = await readdir(place);
      await damage(join(place, left!));
      const again = await RecordWriter.create(prefix, {
        ...resumable,
        source: name === 'other source' ? 'y' : 'x',
      });
      assert.equal(again.images, 0, name);
      await again.abort();
      assert.deepEqual(await readdir(place), [], name);
    }

    // Undamaged, for comparison: all three are there, and told.
    const found: Buffer[] = [];
    const prefix = join(folder, 'whole', 'set');
    const resumable = {
      source: 'x',
      onFound: (bytes: Uint8Array) => found.push(Buffer.from(bytes)),
    };
    const first = await RecordWriter.create(prefix, resumable);
    for (const i of [39, 79, 119]) await first.add(0, image(i));
    await first.checkpoint();
    await first.suspend();
    const again = await RecordWriter.create(prefix, resumable);
    assert.equal(again.images, 3);
    assert.ok(found.every((bytes, k) => bytes.equals(image([39, 79, 119][k]!))));
    await again.abort();

    // Nothing was made durable: nothing is worth leaving.
    const brief = await RecordWriter.create(join(folder, 'brief', 'set'), resumable);
    await brief.add(0, image(39));
    assert.equal(await brief.suspend(), 0);
    assert.ok(!(await readdir(folder)).includes('brief'));
  });
});
