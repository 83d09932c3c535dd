import { type Command, InvalidArgumentError } from 'commander';
import { HardmineError } from '../errors.js';
import { embedForPairs } from '../evaluate/pairs.js';
import { FaceModel } from '../model.js';
import { type AlignOptions, addAlignOptions, alignImages, openAligner } from './align-options.js';
import { type CommonOptions, makeCommand, output } from './command.js';
import { addDeviceOptions, type DeviceOptions, deviceOf } from './device-options.js';

interface Options extends CommonOptions, DeviceOptions, AlignOptions {
  model: string;
  threshold?: number;
}

export function verifyCommand(): Command {
  const command = makeCommand(
    'verify',
    'Say whether two images show the same person.',
    'hardmine verify a.jpg b.jpg --model runs/first/best.safetensors',
  )
    .argument('<a>', '112x112 image; with --align a photograph')
    .argument('<b>', 'another')
    .requiredOption('--model <file>', 'model (.safetensors)')
    .option(
      '--threshold <cosine>',
      'least similarity of one person, -1 to 1 (default: the one in the model)',
      cosine,
    );
  addAlignOptions(command);
  addDeviceOptions(command);
  return command.action(verify);
}

function cosine(text: string): number {
  const value = Number(text);
  if (text.trim() === '' || !(Math.abs(value) <= 1)) {
    throw new InvalidArgumentError('Give a cosine from -1 to 1.');
  }
  return value;
}

async function verify(a: string, b: string, options: Options): Promise<void> {
  await using aligner = await openAligner(options);
  const model = await FaceModel.load(options.model, deviceOf(options));
  try {
    const threshold = options.threshold ?? model.info.threshold;
    if (threshold === undefined) {
      throw new HardmineError(
        'ERR_CONFIG',
        `${options.model} holds no verification threshold, as it was trained without validation: give one as --threshold`,
      );
    }
    // As in validation, where the threshold comes from: image and mirror image together.
    const images = aligner === null ? [a, b] : await alignImages(aligner, [a, b]);
    const embeddings = await embedForPairs(model, { images });
    const similarity = model.similarity(
      embeddings.subarray(0, model.embedding),
      embeddings.subarray(model.embedding),
    );
    const same = similarity >= threshold;
    if (options.json) output.json({ same, similarity, threshold, a, b, model: options.model });
    else {
      output.result(
        `${same ? 'same person' : 'different people'} (similarity ${similarity.toFixed(4)}, threshold ${threshold.toFixed(4)})`,
      );
    }
  } finally {
    await model.dispose();
  }
}
