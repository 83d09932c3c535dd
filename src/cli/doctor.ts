import type { Command } from 'commander';
import { type Backend, CUDA_ADDON_REMEDY, hasNvidiaDriver } from '../addon-file.js';
import { HardmineError } from '../errors.js';
import { backends, chooseDevice, devicesOf, loadAddon, type NativeDevice } from '../native.js';
import { type CommonOptions, makeCommand, output } from './command.js';

interface BackendReport {
  backend: Backend;
  usable: boolean;
  devices: NativeDevice[];
  /** What is wrong and how to mend it; null: nothing. */
  problem: string | null;
}

export function doctorCommand(): Command {
  return makeCommand(
    'doctor',
    'Say what was found on this machine, which backend auto takes and why, and what to install.',
    'hardmine doctor',
  ).action(doctor);
}

function examine(backend: Backend): BackendReport {
  if (!backends().includes(backend)) {
    const problem = hasNvidiaDriver()
      ? `an NVIDIA driver is there, but this installation has no CUDA addon: ${CUDA_ADDON_REMEDY}`
      : null;
    return { backend, usable: false, devices: [], problem };
  }
  try {
    const devices = devicesOf(loadAddon(backend));
    // A GPU without its libraries computes in no type.
    const usable = devices.some((device) => device.precisions.length > 0);
    return { backend, usable, devices, problem: null };
  } catch (error) {
    if (!(error instanceof HardmineError)) throw error;
    return { backend, usable: false, devices: [], problem: error.message };
  }
}

function doctor({ json }: CommonOptions): void {
  const examined = [examine('cpu'), examine('cuda')];
  const usable = examined.some((report) => report.usable);
  const auto = usable ? chooseDevice({ device: 'auto' }) : null;
  const found = {
    node: process.versions.node,
    nodeApi: process.versions.napi ?? '',
    platform: `${process.platform}-${process.arch}`,
    backends: examined,
    auto: auto && {
      backend: auto.addon.backend,
      precision: auto.execution.precision,
      why: auto.why,
    },
  };
  if (json) output.json(found);
  else output.result(describe(found));
  if (!usable) throw new HardmineError('ERR_ADDON', 'no backend can be used here: mend the above');
}

function describe(found: {
  node: string;
  nodeApi: string;
  platform: string;
  backends: readonly BackendReport[];
  auto: { backend: string; precision: string; why: string } | null;
}): string {
  const rows: string[][] = [
    ['Node', `${found.node} (Node-API ${found.nodeApi}), ${found.platform}`],
  ];
  for (const { backend, usable, devices, problem } of found.backends) {
    rows.push([`backend ${backend}`, usable ? 'usable' : 'not usable']);
    for (const device of devices) {
      rows.push(['  device', device.name]);
      rows.push(['  threads', String(device.threads)]);
      rows.push(['  memory', `${(device.memoryBytes / 2 ** 30).toFixed(1)} GiB`]);
      rows.push(['  fast precisions', device.precisions.join(', ')]);
      for (const [name, value] of Object.entries(device.details)) rows.push([`  ${name}`, value]);
    }
    if (problem !== null) rows.push(['  problem', problem]);
  }
  if (found.auto) {
    const { backend, precision, why } = found.auto;
    rows.push(['auto takes', `${backend} in ${precision}. ${why}`]);
  }
  const width = Math.max(...rows.map(([name]) => name!.length));
  return rows.map(([name, value]) => `${name!.padEnd(width)}  ${value}`).join('\n');
}
