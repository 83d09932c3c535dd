/** Reads TensorBoard's event files by the definition of TFRecord and protobuf, sharing nothing with the writer. */
import assert from 'node:assert/strict';

/** CRC32C bit by bit, by its definition (RFC 3720): no table. */
export function slowCrc(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
  }
  return (crc ^ 0xffffffff) >>> 0;
}

export function slowMask(bytes: Uint8Array): number {
  const crc = BigInt(slowCrc(bytes));
  const rotated = (crc >> 15n) | ((crc << 17n) & 0xffffffffn);
  return Number((rotated + 0xa282ead8n) & 0xffffffffn);
}

/** Payloads of an event file, both checksums of each verified. */
export function readRecords(file: Buffer): Buffer[] {
  const payloads: Buffer[] = [];
  for (let at = 0; at < file.length; ) {
    const length = Number(file.readBigUInt64LE(at));
    assert.equal(file.readUInt32LE(at + 8), slowMask(file.subarray(at, at + 8)), 'length');
    const payload = file.subarray(at + 12, at + 12 + length);
    assert.equal(payload.length, length);
    assert.equal(file.readUInt32LE(at + 12 + length), slowMask(payload), 'payload');
    payloads.push(payload);
    at += 16 + length;
  }
  return payloads;
}

export type Wire = number | bigint | Buffer;

/** Fields of a protobuf message by number, nested messages undecoded. */
export function decode(message: Buffer): Map<number, Wire[]> {
  const fields = new Map<number, Wire[]>();
  let at = 0;
  const varint = (): bigint => {
    let value = 0n;
    for (let shift = 0n; ; shift += 7n) {
      const byte = message[at++]!;
      value |= BigInt(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
  };
  while (at < message.length) {
    const key = Number(varint());
    let value: Wire;
    switch (key & 7) {
      case 0:
        value = varint();
        break;
      case 1:
        value = message.readDoubleLE(at);
        at += 8;
        break;
      case 2: {
        const length = Number(varint());
        value = message.subarray(at, at + length);
        at += length;
        break;
      }
      default:
        assert.equal(key & 7, 5);
        value = message.readFloatLE(at);
        at += 4;
    }
    fields.set(key >> 3, [...(fields.get(key >> 3) ?? []), value]);
  }
  return fields;
}

export const nested = (fields: Map<number, Wire[]>, number: number): Map<number, Wire[]>[] =>
  (fields.get(number) ?? []).map((value) => decode(value as Buffer));
export const string = (fields: Map<number, Wire[]>, number: number): string =>
  (fields.get(number)![0] as Buffer).toString();
export const doubles = (bytes: Buffer): number[] =>
  Array.from({ length: bytes.length / 8 }, (_, i) => bytes.readDoubleLE(8 * i));

/** Every scalar of an event file: tag, step and value. */
export function scalarsOf(file: Buffer): { tag: string; step: number; value: number }[] {
  return readRecords(file).flatMap((record) => {
    const event = decode(record);
    return nested(event, 5).flatMap((summary) =>
      nested(summary, 1)
        .filter((value) => value.has(2))
        .map((value) => ({
          tag: string(value, 1),
          step: Number(event.get(2)?.[0] ?? 0),
          value: value.get(2)![0] as number,
        })),
    );
  });
}
