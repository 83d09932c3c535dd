/**
 * TensorBoard's event files. A file is a row of TFRecords (length u64, masked CRC32C of the length,
 * payload, masked CRC32C of the payload, all little-endian), each payload a protobuf Event of
 * tensorflow/core/util/event.proto; the schemas here are the parts of it that are written.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { ioError } from '../data/files.js';
import { buildSchema, type Messages } from './protobuf.js';
import { crc32c } from './recordio.js';

const messages: Messages = {
  Event: {
    wallTime: ['double', 1],
    step: ['int64', 2],
    fileVersion: ['string', 3],
    summary: ['Summary', 5],
    sessionLog: ['SessionLog', 7],
  },
  SessionLog: { status: ['int32', 1] },
  Summary: { value: ['Value', 1, 'repeated'] },
  Value: {
    tag: ['string', 1],
    simpleValue: ['float', 2],
    histo: ['HistogramProto', 5],
    tensor: ['TensorProto', 8],
    metadata: ['SummaryMetadata', 9],
  },
  HistogramProto: {
    min: ['double', 1],
    max: ['double', 2],
    num: ['double', 3],
    bucketLimit: ['double', 6, 'repeated'],
    bucket: ['double', 7, 'repeated'],
  },
  TensorProto: {
    dtype: ['int32', 1],
    tensorShape: ['TensorShapeProto', 2],
    stringVal: ['bytes', 8, 'repeated'],
  },
  TensorShapeProto: { dim: ['Dim', 2, 'repeated'] },
  Dim: { size: ['int64', 1] },
  SummaryMetadata: { pluginData: ['PluginData', 1] },
  PluginData: { pluginName: ['string', 1] },
};

const Event = buildSchema(messages, 'proto3').lookupType('Event');

/** tensorflow/core/framework/types.proto: DT_STRING. */
const STRING_TYPE = 7;
/** SessionLog.SessionStatus.START: whoever reads forgets events of earlier files from its step on. */
const SESSION_START = 1;

/** TensorFlow's mask: a CRC of data that hold CRCs is weak, so it is rotated by 15 and shifted. */
export function maskedCrc(bytes: Uint8Array): number {
  const crc = crc32c(bytes);
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;
}

/** One TFRecord. */
export function encodeRecord(payload: Uint8Array): Buffer {
  const record = Buffer.alloc(8 + 4 + payload.length + 4);
  record.writeBigUInt64LE(BigInt(payload.length), 0);
  record.writeUInt32LE(maskedCrc(record.subarray(0, 8)), 8);
  record.set(payload, 12);
  record.writeUInt32LE(maskedCrc(payload), 12 + payload.length);
  return record;
}

const REMEDY = 'free space or permissions on its folder';

export interface Histogram {
  min: number;
  max: number;
  /** Upper limit of each bucket, rising. */
  limits: readonly number[];
  /** How many values lie in each. */
  counts: readonly number[];
}

/** Writes one event file; TensorBoard may read along. */
export class EventWriter {
  private constructor(
    readonly path: string,
    private readonly file: FileHandle,
  ) {}

  /**
   * Starts a new file in `folder`. Events of older files there from `step` on count no longer.
   *
   * @throws HardmineError ERR_IO
   */
  static async create(folder: string, step: number): Promise<EventWriter> {
    // The name that TensorBoard looks for; the process's number keeps two runs of one second apart.
    const seconds = String(Math.floor(Date.now() / 1000)).padStart(10, '0');
    const path = join(folder, `events.out.tfevents.${seconds}.${hostname()}.${process.pid}`);
    const file = await open(path, 'a').catch((cause: unknown) => {
      throw ioError(path, 'written', cause, REMEDY);
    });
    const writer = new EventWriter(path, file);
    await writer.write(0, { fileVersion: 'brain.Event:2' });
    if (step > 0) await writer.write(step, { sessionLog: { status: SESSION_START } });
    return writer;
  }

  /** Figures of one step; those that are no finite numbers are written as they are. */
  async scalars(step: number, values: Readonly<Record<string, number>>): Promise<void> {
    const value = Object.entries(values).map(([tag, simpleValue]) => ({ tag, simpleValue }));
    await this.write(step, { summary: { value } });
  }

  async histogram(
    step: number,
    tag: string,
    { min, max, limits, counts }: Histogram,
  ): Promise<void> {
    const num = counts.reduce((sum, count) => sum + count, 0);
    const histo = { min, max, num, bucketLimit: limits, bucket: counts };
    await this.write(step, { summary: { value: [{ tag, histo }] } });
  }

  /** Text, which TensorBoard shows as Markdown. */
  async text(step: number, tag: string, text: string): Promise<void> {
    const tensor = {
      dtype: STRING_TYPE,
      tensorShape: { dim: [{ size: 1 }] },
      stringVal: [Buffer.from(text)],
    };
    const metadata = { pluginData: { pluginName: 'text' } };
    await this.write(step, { summary: { value: [{ tag, tensor, metadata }] } });
  }

  async close(): Promise<void> {
    await this.file.close();
  }

  private async write(step: number, event: object): Promise<void> {
    const payload = Event.encode({ wallTime: Date.now() / 1000, step, ...event }).finish();
    try {
      await this.file.appendFile(encodeRecord(payload));
    } catch (cause) {
      throw ioError(this.path, 'written', cause, REMEDY);
    }
  }
}
