/**
 * Packs or inspects sets in a process of its own and prints what came of each and by how many bytes the
 * peak of memory has grown since the modules were loaded and one small image decoded.
 * Arguments: `pack IN OUT KEEP`, or `inspect PATH...`.
 */
import sharp from 'sharp';
import { inspectDataset } from '../../src/data/inspect.js';
import { packDataset } from '../../src/data/pack.js';
import { loadAddon } from '../../src/native.js';
import { forgetPeak, peakBytes, residentBytes } from './memory.js';

await loadAddon('cpu');
await sharp({ create: { width: 112, height: 112, channels: 3, background: 'red' } })
  .jpeg()
  .toBuffer();
const [command, ...paths] = process.argv.slice(2);
forgetPeak();
const before = residentBytes();
const outcomes: unknown[] = [];
if (command === 'pack') {
  const [input, out, keep] = paths;
  outcomes.push(await packDataset(input!, out!, { keep }));
} else {
  for (const path of paths) {
    outcomes.push(await inspectDataset(path).catch((error: unknown) => String(error)));
  }
}
const grown = peakBytes() - before;
process.stdout.write(JSON.stringify({ grown, outcomes }));
