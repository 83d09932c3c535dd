/** ONNX Runtime, an optional package: loaded when something needs it and not before. */
import { HardmineError } from '../errors.js';

export type OnnxRuntime = typeof import('onnxruntime-node');

/**
 * @param what needs it, as the beginning of a sentence
 * @throws HardmineError ERR_ADDON when onnxruntime-node is not installed or does not load.
 */
export async function loadOnnxRuntime(what: string): Promise<OnnxRuntime> {
  try {
    return await import('onnxruntime-node');
  } catch (cause) {
    throw new HardmineError(
      'ERR_ADDON',
      `${what} needs onnxruntime-node, which could not be loaded: install it with ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node.`,
      { cause },
    );
  }
}
