/** What a run is going to take: disk by the sizes of what it keeps, time and memory by trying. */
import { statfs } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { NativeTensor } from '../native.js';
import { fileOfTensor } from './checkpoint.js';

export interface DiskEstimate {
  checkpointBytes: number;
  /** At the most: the checkpoints that are kept and the one being written, and the two models twice, for they are replaced whole. */
  diskBytes: number;
  /** Free to this user where the run directory lies or will lie. */
  freeDiskBytes: number;
}

export interface TrainingEstimate extends DiskEstimate {
  /** The steps that are left, in images a second and seconds, by those that were tried; without validation and evaluation. */
  imagesPerSecond: number;
  seconds: number;
  /** Of this process at its largest so far. */
  memoryBytes: number;
  /** Taken on the GPU; null on the CPU. */
  deviceMemoryBytes: number | null;
  /** What run() would warn of before the first step. */
  warnings: string[];
}

const bytesOf = (tensors: readonly NativeTensor[]): number =>
  tensors.reduce(
    (sum, { shape }) => sum + 4 * shape.reduce((product, size) => product * size, 1),
    0,
  );

/** @param out the run directory, which need not be there yet */
export async function estimateDisk(
  out: string,
  tensors: readonly NativeTensor[],
  keep: number,
): Promise<DiskEstimate> {
  const checkpointBytes = bytesOf(tensors);
  const modelBytes = bytesOf(tensors.filter((tensor) => fileOfTensor(tensor) === 'model'));
  return {
    checkpointBytes,
    diskBytes: (keep + 1) * checkpointBytes + 4 * modelBytes,
    freeDiskBytes: await freeBytes(out),
  };
}

async function freeBytes(path: string): Promise<number> {
  try {
    const { bavail, bsize } = await statfs(path);
    return bavail * bsize;
  } catch (error) {
    if (dirname(path) === path) throw error;
    return freeBytes(dirname(path));
  }
}

/** "1.4 GB": powers of ten, as disks are sold. */
export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB'] as const;
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log10(bytes || 1) / 3)));
  const value = bytes / 1000 ** power;
  return `${value.toFixed(value < 10 && power > 0 ? 1 : 0)} ${units[power]}`;
}
