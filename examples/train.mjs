// Trains on your own folder of faces and says what the model can do.
//
//   node examples/train.mjs [FACES OUT]
//
// FACES holds one sub-folder a person with aligned 112x112 JPEG or PNG files (`hardmine align` makes
// them from photographs), or is a .rec file. Without arguments it trains for two short epochs on 12
// generated people: enough to see it work, far too little to learn.
import { join } from 'node:path';
import { FaceModel, Trainer } from 'hardmine';
import { drawPhotos, inTemporaryFolder } from './generated.mjs';

async function train(data, out, settings) {
  // Everything that `hardmine train --help` lists, in camelCase.
  const trainer = await Trainer.create({ data, out, ...settings });
  // Ctrl-C: the step under way ends, a checkpoint is written, run() throws ERR_ABORTED. `resume: true`
  // goes on from there.
  const interrupt = new AbortController();
  const stop = () => interrupt.abort();
  process.once('SIGINT', stop);
  try {
    const { plan } = trainer;
    console.log(`${plan.images} images of ${plan.identities} people on ${plan.device}`);
    for await (const event of trainer.run({ signal: interrupt.signal })) {
      if (event.type === 'epoch') {
        console.log(`epoch ${event.epoch}: loss ${event.baseLoss.toFixed(3)}`);
      }
      if (event.type === 'validation') {
        console.log(`people held out: ${(100 * event.accuracy).toFixed(1)}% of pairs are right`);
      }
      if (event.type === 'warning') console.log(event.message);
    }
  } finally {
    process.off('SIGINT', stop);
    await trainer.dispose();
  }

  const model = await FaceModel.load(join(out, 'best.safetensors'));
  try {
    console.log(
      `best.safetensors: embeddings of ${model.embedding}, one person from a cosine of ${model.info.threshold?.toFixed(3)} on`,
    );
  } finally {
    await model.dispose();
  }
}

const [data, out] = process.argv.slice(2);
if (data && out) {
  // For some hundred people; docs/losses.md says how to choose.
  await train(data, out, { scale: 32, lr: 0.05, marginWarmUp: 3 });
} else if (data) {
  console.error('usage: node train.mjs [FACES OUT]');
  process.exitCode = 2;
} else {
  await inTemporaryFolder(async (folder) => {
    const small = { batch: 8, epochs: 2, scale: 12, margin: 0.1, marginWarmUp: 1, lr: 0.05 };
    await train(await drawPhotos(folder), join(folder, 'run'), small);
  });
}
