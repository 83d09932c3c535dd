import { type Command, Option } from 'commander';
import type { DeviceName, Precision } from '../native.js';
import { wholeNumber } from './command.js';

export interface DeviceOptions {
  device: DeviceName;
  precision: Precision;
  threads: number;
}

/** Where a network runs; fp32 by default, so that embeddings are those of other runtimes. */
export function addDeviceOptions(command: Command): void {
  command
    .option('--device <name>', 'auto, cpu, cuda or cuda:N', 'auto')
    .addOption(
      new Option('--precision <type>', 'number type of products and activations')
        .choices(['fp32', 'bf16', 'fp16'])
        .default('fp32'),
    )
    .option('--threads <number>', 'CPU threads (0: physical cores)', wholeNumber(0), 0);
}

export function deviceOf({ device, precision, threads }: DeviceOptions): DeviceOptions {
  return { device, precision, threads };
}
