/** Every reader of files from outside, as something that takes damaged bytes. */
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { readLandmarks } from '../../src/align/landmarks.js';
import { resolveConfig } from '../../src/config.js';
import { CleanedList } from '../../src/data/cleaned-list.js';
import { openEvaluationSet } from '../../src/data/evaluation-sets.js';
import { FolderLock } from '../../src/data/folder-lock.js';
import { imageListSource } from '../../src/data/image-list.js';
import { type ImageSource, withoutIdentities } from '../../src/data/image-source.js';
import { decodeImage, decodePhotograph } from '../../src/data/images.js';
import { msCelebSource } from '../../src/data/ms-celeb.js';
import { openPacked, openRecords } from '../../src/data/packed-set.js';
import { parseLfwPairs } from '../../src/evaluate/lfw.js';
import { findVideos, parseYtfSplits } from '../../src/evaluate/ytf.js';
import { readNpyMatrix, readNpyObject } from '../../src/formats/npy.js';
import { readPickle } from '../../src/formats/pickle.js';
import { encodeRecord, RecordWriter } from '../../src/formats/recordio.js';
import { encodeSafetensors, readSafetensors } from '../../src/formats/safetensors.js';
import { readVerificationBin } from '../../src/formats/verification-bin.js';
import { findCheckpoint } from '../../src/train/checkpoint.js';
import { readMetrics } from '../../src/train/run-directory.js';
import { readScores, readStatus } from '../../src/train/run-files.js';
import { SanitizedReaders } from './sanitized.js';

export interface Target {
  /** Words of the format, for the mutator; each character stands for a byte. */
  words: readonly string[];
  /** Folder of `corpus/`, where it is not the target's own name. */
  corpus?: string;
  /** Compiles the native readers for itself: too long for every `npm test`. */
  slow?: true;
  /** @param folder for this target's files alone, empty */
  open(folder: string): Promise<Reader>;
}

export interface Reader {
  /** Reads one damaged file: gives a value or throws HardmineError, and nothing else. */
  read(input: Buffer): unknown;
  close?(): Promise<void>;
}

const CORPUS = fileURLToPath(new URL('corpus/', import.meta.url));

export const corpusOf = (name: string): string => join(CORPUS, TARGETS[name]?.corpus ?? name);

/** A reader of a file at a path. */
function ofFile(name: string, read: (path: string) => unknown): Target['open'] {
  return async (folder) => {
    const path = join(folder, name);
    return {
      read(input) {
        writeFileSync(path, input);
        return read(path);
      },
    };
  };
}

/** Several files in one input: before each but the last, its length in two bytes. */
function parts(input: Buffer, count: number): Buffer[] {
  const found: Buffer[] = [];
  let rest = input;
  for (let i = 1; i < count; i += 1) {
    const end = 2 + (rest.length < 2 ? 0 : rest.readUInt16LE());
    found.push(rest.subarray(2, end));
    rest = rest.subarray(Math.min(end, rest.length));
  }
  return [...found, rest];
}

async function readAll(source: ImageSource): Promise<void> {
  try {
    for (let i = 0; i < source.count; i += 1) await source.read(i);
  } finally {
    await source.dispose();
  }
}

const JPEG_WORDS = [
  ...['\xff\xd8\xff', '\xff\xd9', '\xff\xc0', '\xff\xc2', '\xff\xc4', '\xff\xda', '\xff\xdb'],
  ...['\xff\xdd', '\xff\xe0', '\xff\xe1', '\xff\xee', '\xff\xfe', 'Exif\0\0', 'Adobe'],
];
const RECORD_WORDS = [
  ...['\x0a\x23\xd7\xce', 'HMCRC32C\x01\0\0\0', '\0\0\x80\x3f', '\0\0\xc0\x7f', '\0\0\x80\x4b'],
  ...['\t', '\n', '0\t0\n', '1\t44\n', '18446744073709551616'],
];
const JSON_WORDS = [
  ...['"', '{', '}', '[', ']', ':', ',', '\\', '\\u0000', '\\ud800', 'null', 'true', '\n', '\x1b'],
  ...['"__proto__"', '"constructor"', '"toString"', '{"a":', '[[[[[[[[', '""'],
];

export const TARGETS: Readonly<Record<string, Target>> = {
  safetensors: {
    words: [...JSON_WORDS, '"__metadata__"', '"dtype"', '"F32"', '"I64"', '"shape"'],
    open: ofFile('a.safetensors', readSafetensors),
  },

  pickle: {
    words: [
      ...['\x80\x02', '\x80\x04', '.', '(', 'l', 't', 'd', ']', '}', ')', 'a', 'e', 's', 'u', 'R'],
      ...['b', 'N', '0', '1', '2', '\x94', '\x93', '\x95', 'h\0', 'q\0', 'X', 'B', '\x8a\x08'],
      ...['cnumpy\nndarray\n', 'cnumpy\ndtype\n', 'cnumpy.core.multiarray\n_reconstruct\n'],
      ...['c_codecs\nencode\n', 'cos\nsystem\n', "S'a'\n", 'Va\\u00e9\n', 'I01\n', 'L5L\n', 'F1\n'],
    ],
    async open() {
      return { read: (input) => readPickle(input, 'a.pkl') };
    },
  },

  'verification-bin': {
    words: ['\x80\x04', ']', '(', 'e', '\x88', '\x89', '\x86', '.', 'B\x01\0\0\0', 'K\0', 'K\x02'],
    open: ofFile('a.bin', readVerificationBin),
  },

  recordio: {
    words: [...RECORD_WORDS, 'anna\n'],
    open: async (folder) => {
      const rec = join(folder, 'train.rec');
      return {
        async read(input) {
          const [idx, crc, names, records] = parts(input, 4);
          writeFileSync(rec, records!);
          writeFileSync(join(folder, 'train.idx'), idx!);
          writeFileSync(join(folder, 'identities.txt'), names!);
          if (crc!.length > 0) writeFileSync(join(folder, 'train.crc'), crc!);
          else rmSync(join(folder, 'train.crc'), { force: true });
          const set = await openPacked({ kind: 'recordio', path: rec }, rec);
          try {
            await set.records.verify();
          } finally {
            await set.dispose();
          }
        },
      };
    },
  },

  'recordio-sanitized': {
    corpus: 'recordio',
    slow: true,
    words: RECORD_WORDS,
    open: async (folder) => {
      const readers = new SanitizedReaders('records', folder);
      return {
        read(input) {
          const [idx, crc, , records] = parts(input, 4);
          return readers.read([records!, idx!, crc!]);
        },
        close: () => readers.stop(),
      };
    },
  },

  jpeg: {
    words: JPEG_WORDS,
    open: async (folder) => {
      const [rec, idx] = [join(folder, 'train.rec'), join(folder, 'train.idx')];
      writeFileSync(idx, '0\t0\n');
      return {
        async read(input) {
          writeFileSync(rec, encodeRecord(Buffer.concat([Buffer.alloc(24), input])));
          const records = await openRecords(rec, idx);
          try {
            await records.decode(Int32Array.of(0));
          } finally {
            await records.dispose();
          }
        },
      };
    },
  },

  'jpeg-sanitized': {
    corpus: 'jpeg',
    slow: true,
    words: JPEG_WORDS,
    open: async (folder) => {
      const readers = new SanitizedReaders('jpeg', folder);
      return { read: (input) => readers.read([input]), close: () => readers.stop() };
    },
  },

  image: {
    words: [...JPEG_WORDS, '\x89PNG\r\n\x1a\n', 'IHDR', 'IDAT', 'IEND', 'PLTE', 'tRNS', 'iCCP'],
    async open() {
      return {
        async read(input) {
          await decodeImage(input, 'a.jpg');
        },
      };
    },
  },

  // Of any size: what the decoder itself takes for millions of pixels is bounded by their number.
  photograph: {
    corpus: 'image',
    words: [...JPEG_WORDS, 'IHDR', 'IDAT', 'IEND'],
    async open() {
      return { read: (input) => decodePhotograph(input, 'a.jpg') };
    },
  },

  tsv: {
    words: ['\t', '\n', '\r\n', 'm.0', 'FaceId-0', '=', '==', '\ufeff'],
    open: ofFile('a.tsv', async (path) => readAll(await msCelebSource(path, undefined, {}))),
  },

  'cleaned-list': {
    words: ['\t', '\n', '/', 'm.0', '_align', '.jpg', ' 16777216', ' 0', '..'],
    open: ofFile('a.txt', (path) => CleanedList.read(path)),
  },

  lst: {
    words: ['\t', '\n', '../', '/', 'a.jpg', '..', '.', 'away/a.jpg', 'pipe', '\0', 'Infinity'],
    open: async (folder) => {
      const list = join(folder, 'a.lst');
      for (const name of ['a.jpg', 'b.jpg']) writeFileSync(join(folder, name), 'an image');
      return {
        async read(input) {
          writeFileSync(list, input);
          await readAll(await imageListSource(list, {}));
        },
      };
    },
  },

  'excluded-identities': {
    words: ['\n', '\r', '\t', 'anna', 'bert', '\x1b[2J', '\ufffd'],
    open: ofFile('a.txt', (path) => withoutIdentities(twoPeople(), path)),
  },

  'lfw-pairs': {
    words: ['\t', '\n', '10\t300', '2\t1', '10', 'Anna', '..', '/', '\\', '\0', '\ufeff'],
    async open() {
      return { read: (input) => parseLfwPairs(input.toString()) };
    },
  },

  cfp: {
    words: ['\n', ',', '1,2', '../Data/Images/', '/frontal/', '/profile/', '.jpg', '../..', '\0'],
    open: async (folder) => {
      const lists = join(folder, 'Protocol');
      const folds = ['FF', 'FP'].flatMap((kind) =>
        Array.from({ length: 10 }, (_, fold) => {
          const path = join(lists, 'Split', kind, String(fold + 1).padStart(2, '0'));
          mkdirSync(path, { recursive: true });
          return path;
        }),
      );
      return {
        async read(input) {
          const [frontal, profile, same, different] = parts(input, 4);
          writeFileSync(join(lists, 'Pair_list_F.txt'), frontal!);
          writeFileSync(join(lists, 'Pair_list_P.txt'), profile!);
          for (const fold of folds) {
            writeFileSync(join(fold, 'same.txt'), same!);
            writeFileSync(join(fold, 'diff.txt'), different!);
          }
          const { set } = await openEvaluationSet({ kind: 'cfp', path: folder, protocol: lists });
          await set.dispose();
        },
      };
    },
  },

  'ytf-splits': {
    words: ['\n', ',', ', ', '1', '0', 'Anna/0', '/', '..', 'split', '\ufeff', '\x1b'],
    async open() {
      return { read: (input) => parseYtfSplits(input.toString()) };
    },
  },

  'ytf-labels': {
    words: ['\n', ',', '\\', '/', '0.1.jpg', 'Infinity', '1e999', '-5', '..'],
    open: async (folder) => {
      const frames = join(folder, 'frame_images_DB');
      mkdirSync(join(frames, 'Anna', '0'), { recursive: true });
      writeFileSync(join(frames, 'Anna', '0', '0.1.jpg'), '');
      return {
        read(input) {
          writeFileSync(join(frames, 'Anna.labeled_faces.txt'), input);
          return findVideos(folder, [{ person: 'Anna', number: '0' }], true);
        },
      };
    },
  },

  landmarks: {
    words: ['\t', '\n', ' ', 'a.jpg', '..', '/', 'image\tleft_eye_x', '-1', '1e999', '202599'],
    open: ofFile('a.tsv', readLandmarks),
  },

  'npy-object': {
    words: ['\x93NUMPY\x01\0', '\x93NUMPY\x02\0', "'|O'", 'True', 'False', '()', '\x80\x02', '.'],
    async open() {
      return { read: (input) => readNpyObject(input, 'a.npy') };
    },
  },

  'npy-matrix': {
    words: ['\x93NUMPY\x01\0', "'<f4'", "'>f4'", 'True', '(2, 3)', '(0, 0)', '(999999999, '],
    async open() {
      return { read: (input) => readNpyMatrix(input, 'a.npy') };
    },
  },

  config: {
    words: [
      ...JSON_WORDS,
      ...['"data"', '"loss"', '"weighting"', '"lambda"', '"lr"', '"milestones"', '"augment"'],
      ...['"none"', '"arcface"', '"a-softmax"', '"combined"', '1e999', '-0'],
    ],
    async open() {
      return {
        read(input) {
          let value: unknown;
          try {
            value = JSON.parse(input.toString());
          } catch {
            return; // told by the command line; the schema sees JSON alone
          }
          return resolveConfig(value);
        },
      };
    },
  },

  'checkpoint-state': {
    words: [...JSON_WORDS, '"step"', '"config"', '"environment"', '"validations"'],
    open: async (folder) => {
      const path = makeCheckpoint(folder);
      return {
        async read(input) {
          writeFileSync(join(path, 'state.json'), input);
          writeFileSync(join(path, 'MANIFEST.json'), manifestOf(path));
          return findCheckpoint(folder);
        },
      };
    },
  },

  'checkpoint-manifest': {
    words: [...JSON_WORDS, '"files"', '"bytes"', '"sha256"', '"state.json"', '"../../a"'],
    open: async (folder) => {
      const path = makeCheckpoint(folder);
      return {
        async read(input) {
          writeFileSync(join(path, 'MANIFEST.json'), input);
          return findCheckpoint(folder);
        },
      };
    },
  },

  metrics: {
    words: [...JSON_WORDS, '"step"', '"loss"', '"time"'],
    open: ofFile('metrics.jsonl', readMetrics),
  },

  'run-status': {
    words: [...JSON_WORDS, '"state"', '"finished"', '"step"', '"environment"', '"validations"'],
    open: ofFile('status.json', readStatus),
  },

  'run-scores': {
    words: [...JSON_WORDS, '"distances"', '"same"', '"0101"', '"fold"', '[0,0,1,1]', '"list"'],
    open: ofFile('scores-lfw.json', readScores),
  },

  'lock-note': {
    words: [...JSON_WORDS, '"instance"', '"pid"', '"host"', '"since"', '"12-345"', '1e999', '-1'],
    open: async (folder) => {
      const lock = await FolderLock.take(folder);
      return {
        async read(input) {
          writeFileSync(join(folder, '.hardmine.lock'), input);
          const refusal = await FolderLock.take(folder).catch((error: unknown) => error);
          // A note that was read names a process by its number.
          if (refusal instanceof Error && /process -?\d/.test(refusal.message)) return refusal;
          throw refusal;
        },
        close: () => lock.release(),
      };
    },
  },

  'unfinished-pack': {
    words: [...RECORD_WORDS, '{"source":"a","bytes":', '}'],
    open: async (folder) => {
      const left = join(folder, `.train.tmp-${hostname()}-stopped`);
      return {
        async read(input) {
          const [note, records] = parts(input, 2);
          mkdirSync(left, { recursive: true });
          writeFileSync(join(left, 'progress.json'), note!);
          writeFileSync(join(left, 'train.rec'), records!);
          const writer = await RecordWriter.create(join(folder, 'train'), {
            source: 'a',
            onFound: () => undefined,
          });
          await writer.abort();
        },
      };
    },
  },
};

/** A source of two people without images worth reading. */
function twoPeople(): ImageSource {
  return {
    title: 'faces',
    count: 2,
    bytes: 0,
    names: ['anna', 'bert'],
    fingerprint: '',
    notes: [],
    label: (index) => index,
    name: String,
    place: (index) => ({ line: index }),
    read: async () => Buffer.alloc(0),
    dispose: async () => undefined,
  };
}

const TENSOR_FILES = ['model.safetensors', 'head.safetensors', 'optimizer.safetensors'];

/** A checkpoint of which all but the manifest and the state is sound. */
function makeCheckpoint(folder: string): string {
  const path = join(folder, 'step-00000001');
  mkdirSync(path);
  const noTensors = Buffer.concat(encodeSafetensors(new Map()));
  for (const name of TENSOR_FILES) writeFileSync(join(path, name), noTensors);
  const state = join(corpusOf('checkpoint-state'), 'state');
  if (existsSync(state)) writeFileSync(join(path, 'state.json'), readFileSync(state));
  return path;
}

function manifestOf(path: string): string {
  const files = [...TENSOR_FILES, 'state.json'].map((name) => {
    const bytes = readFileSync(join(path, name));
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    return [name, { bytes: bytes.length, sha256 }];
  });
  return JSON.stringify({ files: Object.fromEntries(files) });
}
