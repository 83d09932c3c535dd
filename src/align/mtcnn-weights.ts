/** MTCNN's networks from a folder: the facenet project's det1.npy to det3.npy, or det1.onnx to det3.onnx made of them. */
import { join } from 'node:path';
import { exists, ioError, makeFolders, readFileBounded } from '../data/files.js';
import { checkPath, HardmineError } from '../errors.js';
import { writeFileAtomic } from '../formats/atomic.js';
import { readNpyObject } from '../formats/npy.js';
import { PickledArray, type PickleValue } from '../formats/pickle.js';
import {
  encodeNetwork,
  type LayerTensor,
  type LayerWeights,
  NETWORK_NAMES,
  type NetworkName,
} from './mtcnn-networks.js';

/** The largest, det3.npy, has 1.5 MB. */
const MAX_BYTES = 16 * 2 ** 20;

/** Where the weights come from, for whoever lacks them. */
export const WEIGHTS_SOURCE =
  'det1.npy, det2.npy and det3.npy are published by the facenet project in its folder src/align (github.com/davidsandberg/facenet, MIT licence)';

/** A network as ONNX, and the file that it is from. */
export interface NetworkFile {
  path: string;
  onnx: Uint8Array;
}

/**
 * The three networks of a folder as ONNX: of each det1.onnx as it stands (what is in it, whoever runs it
 * finds out), or else made from det1.npy.
 *
 * @throws HardmineError ERR_DATA when a file is not there, saying where it is published; ERR_IO,
 *   ERR_FORMAT when a .npy is damaged or holds other layers
 */
export async function readNetworks(folder: string): Promise<Record<NetworkName, NetworkFile>> {
  checkPath(folder, "MTCNN's weights");
  const networks = {} as Record<NetworkName, NetworkFile>;
  for (const name of NETWORK_NAMES) {
    const onnx = join(folder, `${name}.onnx`);
    const path = (await exists(onnx)) ? onnx : join(folder, `${name}.npy`);
    if (!(await exists(path))) {
      throw new HardmineError(
        'ERR_DATA',
        `${path} does not exist: ${WEIGHTS_SOURCE}; put them into one folder and give it as --mtcnn.`,
      );
    }
    const bytes = await readFileBounded(path, MAX_BYTES, "a file of MTCNN's weights");
    networks[name] = {
      path,
      onnx: path === onnx ? bytes : encodeNetwork(name, layersOf(readNpyObject(bytes, path)), path),
    };
  }
  return networks;
}

/** Writes the networks of `folder` as det1.onnx, det2.onnx and det3.onnx into `out`, which is made. */
export async function exportNetworks(folder: string, out: string): Promise<string[]> {
  const networks = await readNetworks(folder);
  try {
    await makeFolders(out);
  } catch (error) {
    throw ioError(out, 'written', error, 'give a folder that can be made');
  }
  const written: string[] = [];
  for (const name of NETWORK_NAMES) {
    const path = join(out, `${name}.onnx`);
    await writeFileAtomic(path, [networks[name].onnx]);
    written.push(path);
  }
  return written;
}

/** A dictionary of dictionaries of float32 arrays; whatever else it holds is left out, to be missed. */
function layersOf(value: PickleValue): LayerWeights {
  const layers = new Map<string, Map<string, LayerTensor>>();
  for (const [layer, parts] of value instanceof Map ? value : []) {
    const tensors = new Map<string, LayerTensor>();
    for (const [part, array] of parts instanceof Map ? parts : []) {
      if (array instanceof PickledArray && array.dtype === '<f4') {
        tensors.set(String(part), { shape: array.shape, data: valuesInOrder(array) });
      }
    }
    layers.set(String(layer), tensors);
  }
  return layers;
}

/** The values of a float32 array row after row, however they are stored. */
function valuesInOrder({ shape, fortranOrder, data }: PickledArray): Float32Array {
  // A copy: the bytes lie anywhere in the file, floats must begin at a multiple of four.
  const stored = new Float32Array(new Uint8Array(data).buffer);
  if (!fortranOrder) return stored;
  // Stored column after column: counting with the first index fastest walks the file.
  const steps = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1));
  const index = shape.map(() => 0);
  const values = new Float32Array(stored.length);
  for (const value of stored) {
    values[index.reduce((at, i, axis) => at + i * steps[axis]!, 0)] = value;
    for (let axis = 0; axis < shape.length && ++index[axis]! === shape[axis]; axis++) {
      index[axis] = 0;
    }
  }
  return values;
}
