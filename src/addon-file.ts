/**
 * Where a native addon's file lies, built here or in its platform's package, and what to say and do when it
 * does not load. Nothing else knows where a .node file lies.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';
import { HardmineError } from './errors.js';

export type Backend = 'cpu' | 'cuda';

/** The package's own folder: this file lies one below it, in src/ as in dist/. */
const ROOT = fileURLToPath(new URL('..', import.meta.url));

/** A clone has nothing but what is built in it; what npm installed has no sources in TypeScript. */
const IS_CLONE = existsSync(`${ROOT}src`);

const REBUILD = `run \`npm run build\` in ${ROOT}`;

/** The packages of prebuilt addons, by platform as Node names it; for glibc alone. */
const PREBUILT: Readonly<Record<string, Readonly<Record<Backend, string>>>> = {
  'linux-x64': { cpu: '@hardmine/linux-x64', cuda: '@hardmine/linux-x64-cuda' },
};

/** The oldest Node-API version that has all the calls of the addons (CMakeLists.txt: NAPI_VERSION). */
const NODE_API = 9;

/** Shared libraries that the addons need, by the start of their file names, and Debian's packages. */
const LIBRARIES: readonly [prefix: string, packages: string][] = [
  ['libdnnl', 'libdnnl-dev'],
  ['libjpeg', 'libjpeg-dev'],
  ['libgomp', 'libgomp1'],
  ['libstdc++', 'libstdc++6'],
];

export interface AddonFile {
  path: string;
  /** The package that it came in; null: built here. */
  prebuilt: string | null;
}

function prebuiltName(backend: Backend): string | undefined {
  return PREBUILT[`${process.platform}-${process.arch}`]?.[backend];
}

/** The file that was built here, else the one of the platform's package, else null. */
export function findAddon(backend: Backend): AddonFile | null {
  const file = `hardmine_${backend}.node`;
  const built = `${ROOT}build/Release/${file}`;
  if (existsSync(built)) return { path: built, prebuilt: null };
  const name = prebuiltName(backend);
  if (name === undefined) return null;
  try {
    return { path: createRequire(import.meta.url).resolve(`${name}/${file}`), prebuilt: name };
  } catch {
    return null;
  }
}

/** @throws HardmineError ERR_ADDON when a prebuilt addon is not of this version of hardmine */
export function checkVersion(prebuilt: string): void {
  const require = createRequire(import.meta.url);
  const versionOf = (path: string) => (require(path) as { version: string }).version;
  const [own, its] = [versionOf(`${ROOT}package.json`), versionOf(`${prebuilt}/package.json`)];
  if (own === its) return;
  throw new HardmineError(
    'ERR_ADDON',
    `The package ${prebuilt} has version ${its}, which is not that of hardmine, ${own}. To mend it, run \`npm install ${prebuilt}@${own}\`.`,
  );
}

/** One message: the platform, what was tried, what went wrong and the command that mends it. */
export function explainFailure(backend: Backend, found: AddonFile | null, reason: string): string {
  const file = `hardmine_${backend}.node`;
  const name = prebuiltName(backend);
  const tried =
    found?.path ??
    `${ROOT}build/Release/${file}${name === undefined ? '' : ` and the package ${name}`}`;
  return (
    `The native addon ${file} could not be loaded on ${describePlatform()}: ` +
    `tried ${tried}: ${reason.replace(`${found?.path}: `, '')}. To mend it, ${mend(backend, found, reason)}.`
  );
}

function describePlatform(): string {
  const { report, platform, arch, versions } = process;
  const header = (report.getReport() as { header?: { glibcVersionRuntime?: string } }).header;
  const glibc = header?.glibcVersionRuntime;
  const libc = platform !== 'linux' ? '' : glibc === undefined ? ', musl libc' : `, glibc ${glibc}`;
  return `${platform}-${arch} (Node ${versions.node}, Node-API ${versions.napi}${libc})`;
}

function mend(backend: Backend, found: AddonFile | null, reason: string): string {
  if (Number(process.versions.napi) < NODE_API) {
    return `install Node 20.19 or newer (Node-API ${NODE_API} is needed)`;
  }
  if (found === null) {
    const name = prebuiltName(backend);
    return name === undefined || IS_CLONE
      ? REBUILD
      : `run \`npm install ${name}\` (npm leaves it out with --omit=optional, and where the lock file was written on another platform), or ${REBUILD}, which compiles it`;
  }
  if (reason.includes('loading addons is disabled')) return 'start node without --no-addons';
  const glibc = /version `(GLIBC(?:XX)?_[\d.]+)' not found/.exec(reason)?.[1];
  if (found.prebuilt !== null && glibc !== undefined) {
    return `use a system that has ${glibc} (Debian 12, Ubuntu 22.04 or later), or ${REBUILD}, which compiles it for this one`;
  }
  const missing = /(lib[\w+.-]+\.so[\w.]*): cannot open shared object file/.exec(reason)?.[1];
  if (missing !== undefined) {
    const known = LIBRARIES.find(([prefix]) => missing.startsWith(prefix));
    const install =
      known === undefined
        ? `install the package that holds ${missing}`
        : `run \`sudo apt-get install ${known[1]}\` (it holds ${missing})`;
    return `${install}; if its version differs from the one built with, then ${REBUILD}`;
  }
  // Built elsewhere or from other sources: another C library, processor or version of a library.
  return `${REBUILD}, which builds it for this machine`;
}

/** Where NVIDIA's kernel module says that it is there. */
export const hasNvidiaDriver = (): boolean => existsSync('/proc/driver/nvidia/version');

/** How a machine with a GPU gets the CUDA addon. */
export const CUDA_ADDON_REMEDY =
  (prebuiltName('cuda') === undefined || IS_CLONE
    ? ''
    : `install it with \`npm install ${prebuiltName('cuda')}\`, or `) +
  'build it with `npm run build` (nvcc, which that needs, comes with `npm run setup:cuda`)';
