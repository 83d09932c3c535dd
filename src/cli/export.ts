import type { Command } from 'commander';
import { HardmineError } from '../errors.js';
import { FaceModel } from '../model.js';
import { type CommonOptions, makeCommand, output } from './command.js';

interface Options extends CommonOptions {
  model: string;
  out: string;
  check?: true;
}

export function exportCommand(): Command {
  return makeCommand(
    'export',
    'Write a model as ONNX, batch-norm folded, for any number of images.',
    'hardmine export --model runs/first/best.safetensors --out face.onnx --check',
  )
    .requiredOption('--model <file>', 'model (.safetensors)')
    .requiredOption('--out <file.onnx>', 'ONNX file')
    .option('--check', 'run it in ONNX Runtime and compare on 64 images')
    .action(exportModel);
}

async function exportModel(options: Options): Promise<void> {
  const model = await FaceModel.load(options.model);
  try {
    await model.exportOnnx(options.out);
    const check = options.check ? await model.checkOnnx(options.out) : null;
    if (options.json) output.json({ out: options.out, ...(check && { check }) });
    else {
      output.result(options.out);
      if (check) {
        output.result(
          `ONNX Runtime on ${check.images} images: greatest difference ${check.maxAbsDifference.toExponential(2)}, least cosine ${check.minCosine.toFixed(7)}`,
        );
      }
    }
    if (check && !check.passed) {
      throw new HardmineError(
        'ERR_FORMAT',
        `${options.out} does not give the embeddings of ${options.model} in ONNX Runtime (greatest difference ${check.maxAbsDifference}, least cosine ${check.minCosine}): do not use it, and report the versions`,
      );
    }
  } finally {
    await model.dispose();
  }
}
