/** Calls of the raw binding with any values of JavaScript in any place. */
import assert from 'node:assert/strict';
import { dirname } from 'node:path';
import fc from 'fast-check';
import { HardmineError } from '../../src/errors.js';
import type { NativeAddon } from '../../src/native.js';
import {
  type Disposable,
  EXECUTION,
  HEAD,
  handleKinds,
  LOSS,
  loose,
  NETWORK,
  SESSION,
} from './native-handles.js';

/** What getters and traps of the caller throw: the binding has to pass it on as it is. */
const PLANTED: readonly unknown[] = [new Error('planted'), 5, null, undefined, Symbol('planted')];

const thrower = (value: unknown) => (): never => {
  throw value;
};

function detached<T extends ArrayBufferView>(view: T): T {
  structuredClone(view.buffer, { transfer: [view.buffer as ArrayBuffer] });
  return view;
}

/** A view of a resizable buffer that ends before the view does. */
function outOfBounds(View: Float32ArrayConstructor | Int32ArrayConstructor): unknown {
  const buffer: ArrayBuffer & { resize(bytes: number): void } = Reflect.construct(ArrayBuffer, [
    64,
    { maxByteLength: 128 },
  ]);
  const view = new View(buffer, 16, 8);
  buffer.resize(20);
  return view;
}

function tracking(): unknown {
  const buffer: ArrayBuffer & { resize(bytes: number): void } = Reflect.construct(ArrayBuffer, [
    40,
    { maxByteLength: 400 },
  ]);
  const view = new Float32Array(buffer);
  buffer.resize(160);
  return view;
}

function revoked(): unknown {
  const { proxy, revoke } = Proxy.revocable({}, {});
  revoke();
  return proxy;
}

const NUMBERS = [
  0,
  -0,
  1,
  -1,
  0.5,
  Number.NaN,
  Infinity,
  -Infinity,
  5e-324,
  1e308,
  2 ** 53,
  -(2 ** 31),
];

const SPECIAL: readonly (() => unknown)[] = [
  ...NUMBERS.map((value) => () => value),
  ...PLANTED.flatMap((value) => [
    () => new Proxy({}, { get: thrower(value), has: thrower(value), ownKeys: thrower(value) }),
    () => new Proxy([], { get: thrower(value), getPrototypeOf: thrower(value) }),
    () => Object.defineProperty({}, 'valueOf', { get: thrower(value) }),
  ]),
  revoked,
  () => Symbol('a symbol'),
  () => 2n ** 64n,
  () => thrower(PLANTED[0]),
  () => class {},
  () => Promise.resolve(1),
  () => new Date(Number.NaN),
  () => /x/,
  () => new Map(),
  () => Object.create(null),
  () => globalThis,
  () => 'x'.repeat(1 << 20),
  () => '\0',
  () => '\ud800',
  () => 'constructor',
  () => '__proto__',
  () => new Array(2 ** 32 - 1),
  () => new Float32Array(1 << 20),
  () => new Float32Array(),
  () => new Float32Array(40).fill(Number.NaN),
  () => new Int32Array(5).fill(-1),
  () => new Float32Array(new SharedArrayBuffer(160)),
  () => new Uint8Array(new SharedArrayBuffer(0)),
  () => new DataView(new ArrayBuffer(8)),
  () => new ArrayBuffer(8),
  () => new SharedArrayBuffer(8),
  () => new BigInt64Array(4),
  () => new Uint8ClampedArray(4),
  () => detached(new Float32Array(40)),
  () => detached(new Int32Array(2)),
  () => detached(new Uint8Array(112 * 112 * 3)),
  () => outOfBounds(Float32Array),
  () => outOfBounds(Int32Array),
  tracking,
];

// Functions that make the values, since fast-check itself asks proxies for members.
const special = fc.constantFrom(...SPECIAL);
// Whole numbers stay small: 10^9 batches to drain are no error, only long.
const anything = fc
  .anything({
    values: [
      fc.boolean(),
      fc.integer({ min: -3, max: 9 }),
      fc.double(),
      fc.string(),
      fc.bigInt(),
      fc.constantFrom(null, undefined),
    ],
    withTypedArray: true,
    withSparseArray: true,
    withNullPrototype: true,
  })
  .map((value) => () => value);

const isPlain = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' &&
  value !== null &&
  !('dispose' in value) &&
  [Object.prototype, Array.prototype].includes(Object.getPrototypeOf(value));

/** `args` with `value` somewhere in it; each of `path` chooses a member, one level deeper. */
function plant(args: object, path: readonly number[], value: unknown): unknown[] {
  const copy: unknown[] | Record<string, unknown> = Array.isArray(args) ? [...args] : { ...args };
  const members = copy as Record<string, unknown>;
  const names = Object.keys(members);
  const name = names[(path[0] ?? 0) % Math.max(1, names.length)] ?? '0';
  const inner = members[name];
  const deeper = path.slice(1);
  members[name] = deeper.length > 0 && isPlain(inner) ? plant(inner, deeper, value) : value;
  return copy as unknown[];
}

interface Target {
  handle: object;
  name: string;
  args: unknown[];
}

/**
 * Makes `calls` calls of every method of the addon and of every kind of handle, and fails, naming the seed,
 * where one throws anything but a HardmineError, a TypeError, a RangeError or what the caller's own code
 * threw.
 *
 * @returns how many calls each outcome had
 */
export async function callWithAnything(
  addon: NativeAddon,
  files: { rec: string; idx: string },
  calls: number,
): Promise<Record<string, number>> {
  const targets: Target[] = [
    { handle: addon, name: 'deviceCount', args: [] },
    { handle: addon, name: 'device', args: [0] },
    { handle: addon, name: 'describeNetwork', args: [NETWORK] },
    { handle: addon, name: 'weightLosses', args: [new Float64Array([0.5, 1]), LOSS.weighting] },
    { handle: addon, name: 'readJpegInfo', args: [new Uint8Array(64)] },
    { handle: addon, name: 'createHead', args: [HEAD, EXECUTION] },
    { handle: addon, name: 'createSession', args: [SESSION, EXECUTION] },
    { handle: addon, name: 'createEmbedder', args: [NETWORK, EXECUTION] },
    { handle: addon, name: 'openRecords', args: [files.rec, files.idx] },
    { handle: addon, name: 'lockFolder', args: [dirname(files.rec), 'a note'] },
  ];
  const named = Object.getOwnPropertyNames(addon).filter(
    (name) => typeof loose(addon)[name] === 'function' && name !== 'setErrorClass',
  );
  assert.deepEqual(targets.map(({ name }) => name).sort(), named.sort());
  const disposables: Disposable[] = [];
  for (const { make, calls: methods } of Object.values(handleKinds(addon, files))) {
    const { handle, also } = await make();
    disposables.push(handle, ...also);
    for (const [name, args] of Object.entries(methods)) {
      targets.push({ handle, name, args: args(also) });
    }
  }
  const outcomes: Record<string, number> = {};
  const note = (outcome: string): void => {
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
  };
  const hostile = fc.oneof({ weight: 2, arbitrary: special }, { weight: 1, arbitrary: anything });
  const paths = fc.array(fc.nat({ max: 30 }), { minLength: 1, maxLength: 4 });
  try {
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(...targets),
        fc.oneof(
          // A call that is right but for one value, or any values at all.
          { weight: 3, arbitrary: fc.record({ path: paths, value: hostile }) },
          { weight: 1, arbitrary: fc.array(hostile, { maxLength: 4 }) },
        ),
        fc.oneof({ weight: 7, arbitrary: fc.constant(null) }, { weight: 1, arbitrary: hostile }),
        async ({ handle, name, args }, change, foreign) => {
          const given = Array.isArray(change)
            ? change.map((make) => make())
            : plant(args, change.path, change.value());
          const method = loose(handle)[name] ?? assert.fail(name);
          try {
            const result = await method.apply(foreign === null ? handle : foreign(), given);
            note('done');
            const made = result as Partial<Disposable> | undefined;
            await made?.dispose?.();
          } catch (error) {
            if (PLANTED.includes(error)) return note('planted');
            assert.ok(
              error instanceof HardmineError ||
                error instanceof TypeError ||
                error instanceof RangeError,
              `${name} threw ${typeof error} ${String(error)}`,
            );
            if (error instanceof HardmineError) {
              assert.notEqual(error.code, 'ERR_INTERNAL', `${name}: ${error.message}`);
              note(error.code);
            } else {
              note(error.name);
            }
          }
        },
      ),
      { numRuns: calls },
    );
  } finally {
    for (const one of disposables) await one.dispose();
  }
  return outcomes;
}
