import type { Backend } from './addon-file.js';
import { HardmineError } from './errors.js';
import {
  backends,
  type DeviceName,
  devicesOf,
  loadAddon,
  type NativeDevice,
  type Precision,
} from './native.js';

/** A device that hardmine can train on. */
export interface Device {
  /** What `device` options take: 'cpu', or 'cuda:N' with N counted from 0. */
  id: Extract<DeviceName, 'cpu' | `cuda:${number}`>;
  backend: 'cpu' | 'cuda';
  /** "AMD EPYC ..." or "NVIDIA H100 80GB HBM3". */
  name: string;
  memoryBytes: number;
  freeBytes: number;
  /** CPU: physical cores that this process may use; 0 on a GPU. */
  threads: number;
  /** Number types that it computes fast in, the best first. */
  precisions: Precision[];
  /** Facts for people, for instance isa: 'AVX512_BF16'. */
  details: Record<string, string>;
}

/**
 * The devices of this installation: the CPU, and before it the GPUs where the CUDA addon is built.
 *
 * @throws HardmineError ERR_ADDON when an addon does not load.
 */
export function devices(): Device[] {
  return backends().flatMap((backend) =>
    present(backend).map((device, ordinal) => ({
      id: backend === 'cpu' ? 'cpu' : `cuda:${ordinal}`,
      backend,
      ...device,
    })),
  );
}

/** None where the driver is older than the addon, which `hardmine doctor` tells. */
function present(backend: Backend): NativeDevice[] {
  try {
    return devicesOf(loadAddon(backend));
  } catch (error) {
    if (error instanceof HardmineError && error.code === 'ERR_DEVICE_UNAVAILABLE') return [];
    throw error;
  }
}
