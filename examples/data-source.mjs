// Images of your own by async iterator: here those of a data set, each with another brightness in every
// epoch, which no setting of the Trainer does.
//
//   node examples/data-source.mjs [FACES OUT]
import { join } from 'node:path';
import { openDataset, Trainer } from 'hardmine';
import { drawFaces, inTemporaryFolder } from './generated.mjs';

const CHUNK = 8; // images decoded together; a batch may begin and end in the middle of them

/** Numbers that follow from (epoch, place) alone, so that a resumed run gets the samples that it missed. */
function random(epoch, place) {
  let x = Math.imul(epoch, 0x9e3779b1) ^ Math.imul(place + 1, 0x85ebca77);
  x = Math.imul(x ^ (x >>> 15), 0x2c1b3c6d);
  return ((x ^ (x >>> 13)) >>> 0) / 2 ** 32;
}

function brightened(dataset) {
  return {
    name: `${dataset.path}, brightened`,
    images: dataset.images,
    identities: dataset.identities,
    // Called for every epoch; `from` is above 0 when a run is resumed in the middle of one.
    async *samples(epoch, from, signal) {
      console.log(`epoch ${epoch} begins with sample ${from}`);
      const order = [...dataset.labels.keys()].sort((a, b) => random(epoch, a) - random(epoch, b));
      for (let at = from; at < order.length && !signal.aborted; at += CHUNK) {
        const chunk = Int32Array.from(order.slice(at, at + CHUNK));
        const images = await dataset.records.decode(chunk); // RGB bytes [n, 112, 112, 3]
        const size = images.length / chunk.length;
        for (let i = 0; i < images.length; i++) {
          const gain = 0.7 + 0.6 * random(epoch, chunk[Math.floor(i / size)]);
          images[i] = Math.min(255, images[i] * gain);
        }
        yield { images, labels: chunk.map((index) => dataset.labels[index]) };
      }
    },
  };
}

async function train(path, out, settings) {
  const dataset = await openDataset(path);
  try {
    const trainer = await Trainer.create({ data: brightened(dataset), out, ...settings });
    try {
      for await (const event of trainer.run()) {
        if (event.type !== 'epoch') continue;
        console.log(`epoch ${event.epoch}: ${event.step} steps, loss ${event.baseLoss.toFixed(3)}`);
      }
    } finally {
      await trainer.dispose();
    }
  } finally {
    await dataset.dispose();
  }
}

const [data, out] = process.argv.slice(2);
if (data && out) {
  await train(data, out, { scale: 32, lr: 0.05, marginWarmUp: 3 });
} else if (data) {
  console.error('usage: node data-source.mjs [FACES OUT]');
  process.exitCode = 2;
} else {
  await inTemporaryFolder(async (folder) => {
    const small = { batch: 16, epochs: 2, scale: 12, margin: 0.1, lr: 0.05 };
    await train(await drawFaces(folder), join(folder, 'run'), small);
  });
}
