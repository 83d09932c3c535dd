import type { Command } from 'commander';
import { exportNetworks } from '../align/mtcnn-weights.js';
import { HardmineError } from '../errors.js';
import { FaceModel } from '../model.js';
import { type CommonOptions, makeCommand, output } from './command.js';

interface Options extends CommonOptions {
  model?: string;
  mtcnn?: string;
  out: string;
  check?: true;
}

export function exportCommand(): Command {
  return makeCommand(
    'export',
    "Write a model as ONNX, batch-norm folded, for any number of images; or MTCNN's networks.",
    'hardmine export --model runs/first/best.safetensors --out face.onnx --check',
  )
    .option('--model <file>', 'model (.safetensors)')
    .option(
      '--mtcnn <dir>',
      "instead of a model: folder with MTCNN's det1.npy, det2.npy and det3.npy",
    )
    .requiredOption('--out <path>', 'ONNX file; of --mtcnn the folder for det1.onnx to det3.onnx')
    .option('--check', 'run it in ONNX Runtime and compare on 64 images')
    .action(async ({ model, mtcnn, ...options }: Options) => {
      if ((model === undefined) === (mtcnn === undefined)) {
        throw new HardmineError('ERR_CONFIG', 'give either --model or --mtcnn');
      }
      if (model !== undefined) await exportModel({ ...options, model });
      else await exportMtcnn(mtcnn!, options);
    });
}

async function exportMtcnn(folder: string, { out, json }: Options): Promise<void> {
  const files = await exportNetworks(folder, out);
  if (json) output.json({ out: files });
  else output.result(files.join('\n'));
}

async function exportModel(options: Options & { model: string }): Promise<void> {
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
