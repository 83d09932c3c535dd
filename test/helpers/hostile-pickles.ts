/**
 * Reads pickles that ask for far more memory than they have bytes, in a process of its own whose peak
 * can be told, and prints what came of it.
 */
import { readPickle } from '../../src/formats/pickle.js';
import { forgetPeak, peakBytes, residentBytes } from './memory.js';

const BYTES = 2 ** 21;

const copies = Array.from({ length: 2000 }, () => Buffer.from('h\x01h\x00h\x02\x86R', 'latin1'));
const inputs = [
  // A list, a dictionary, a tuple, a mark, None, the same None again: two million of each.
  ...[']', '}', ')', '(', 'N', '2'].map((opcode) =>
    Buffer.concat([Buffer.from('N'), Buffer.alloc(BYTES, opcode), Buffer.from('.')]),
  ),
  // A text of one MiB made to bytes two thousand times by six bytes each.
  Buffer.concat([
    Buffer.from([0x58, 0, 0, 0x10, 0]),
    Buffer.alloc(2 ** 20, 'a'),
    Buffer.from('\x94c_codecs\nencode\n\x94\x8c\x06latin1\x94', 'latin1'),
    ...copies,
    Buffer.from('.'),
  ]),
];

const messages: string[] = [];
forgetPeak();
const before = residentBytes();
for (const input of inputs) {
  globalThis.gc?.(); // what the one before took is not this one's
  try {
    readPickle(input, 'hostile.pkl');
  } catch (error) {
    messages.push(String(error));
  }
}
const grown = peakBytes() - before;
process.stdout.write(JSON.stringify({ grown, inputs: BYTES, messages }));
