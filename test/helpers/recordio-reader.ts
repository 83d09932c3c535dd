/**
 * RecordIO read from its description, independently of the writer and of the native reader; for whole
 * files of a test's size.
 */
const MAGIC = 0xced7230a;

export interface ImageRecord {
  flag: number;
  label: number;
  id: bigint;
  id2: bigint;
  labels: number[];
  image: Buffer;
}

/** Payload of the record at `offset`, its parts joined, and where the next record begins. */
export function readRecord(rec: Buffer, offset: number): { payload: Buffer; next: number } {
  const parts: Buffer[] = [];
  for (let at = offset; ; ) {
    if (rec.readUInt32LE(at) !== MAGIC) throw new Error(`no magic at byte ${at}`);
    const word = rec.readUInt32LE(at + 4);
    const cflag = word >>> 29;
    const length = word & 0x1fffffff;
    if (at + 8 + length > rec.length) throw new Error(`the record at byte ${at} is cut off`);
    const expected = parts.length === 0 ? [0, 1] : [2, 3];
    if (!expected.includes(cflag)) throw new Error(`cflag ${cflag} at byte ${at}`);
    if (parts.length > 0) parts.push(rec.subarray(offset, offset + 4));
    parts.push(rec.subarray(at + 8, at + 8 + length));
    const padded = at + 8 + 4 * Math.ceil(length / 4);
    if (rec.subarray(at + 8 + length, padded).some((byte) => byte !== 0)) {
      throw new Error(`the padding before byte ${padded} is not zero`);
    }
    if (cflag === 0 || cflag === 3) return { payload: Buffer.concat(parts), next: padded };
    at = padded;
  }
}

export function parseImageRecord(payload: Buffer): ImageRecord {
  const flag = payload.readUInt32LE(0);
  return {
    flag,
    label: payload.readFloatLE(4),
    id: payload.readBigUInt64LE(8),
    id2: payload.readBigUInt64LE(16),
    labels: Array.from({ length: flag }, (_, i) => payload.readFloatLE(24 + 4 * i)),
    image: payload.subarray(24 + 4 * flag),
  };
}

/** [key, offset] of each line. */
export function readIndex(idx: string): [key: number, offset: number][] {
  return idx
    .split('\n')
    .slice(0, -1)
    .map((line) => {
      const match = /^(\d+)\t(\d+)$/.exec(line);
      if (match === null) throw new Error(`"${line}" is not a line of an index`);
      return [Number(match[1]), Number(match[2])];
    });
}
