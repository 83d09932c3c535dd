/**
 * Python pickles as data: a closed interpreter of protocols 0 to 5 that knows numbers, text, bytes,
 * lists, tuples, dictionaries and NumPy arrays. The globals on its list are interpreted here and never
 * called; every other one is refused by its name, because unpickling it in Python would run it.
 *
 * Source of the opcodes: CPython, Lib/pickletools.py.
 */
import { quote } from '../errors.js';
import { COST, latin1Text, MAX_NAME_BYTES, PickleInput } from './pickle-input.js';

/** A NumPy array. */
export class PickledArray {
  /** NumPy's description of an element: '|u1', '<f4'; '|O' for objects. */
  dtype = '|i1';
  shape: readonly number[] = [0];
  /** Column after column instead of row after row. */
  fortranOrder = false;
  /** Numbers as stored: the product of `shape` times the size that `dtype` names; else empty. */
  data: Uint8Array = new Uint8Array();
  /** The elements of an array of objects; else empty. */
  objects: readonly PickleValue[] = [];
}

/**
 * What a pickle holds. `bytes`, `bytearray` and Python 2's `str` are Uint8Array, views of the input;
 * lists and tuples are arrays; integers beyond 2^53 are bigint. What a pickle names twice is one object
 * here, too, and nothing contains itself.
 */
export type PickleValue =
  | null
  | boolean
  | number
  | bigint
  | string
  | Uint8Array
  | PickleValue[]
  | PickledDictionary
  | PickledArray;

/** Keys that are bytes (Python 2's `str`) stand as the text that latin-1 makes of them. */
export type PickledDictionary = Map<Key, PickleValue>;

type Key = string | number | bigint | boolean | null;

/** What the interpreter's stack and memo hold: values, and what becomes one. */
type Item = PickleValue | Item[] | Map<Key, Item> | Global | Dtype;

type Helper = 'reconstruct' | 'ndarray' | 'dtype' | 'frombuffer' | 'encode' | 'bytes' | 'bytearray';

class Global {
  constructor(
    readonly name: string,
    readonly helper: Helper,
  ) {}
}

class Dtype {
  /** '<' as on the machines that write pickles; its state says otherwise. */
  order = '<';
  constructor(
    /** Kind and bytes: 'u1'; 'O' for objects. */
    readonly type: string,
    readonly bytes: number,
  ) {}

  get description(): string {
    return this.type === 'O' || this.bytes === 1 ? `|${this.type}` : this.order + this.type;
  }
}

/** NumPy 1 and 2, Python 2 and 3, spell the same helpers differently. */
const GLOBALS: ReadonlyMap<string, Helper> = new Map([
  ['numpy.core.multiarray._reconstruct', 'reconstruct'],
  ['numpy._core.multiarray._reconstruct', 'reconstruct'],
  ['numpy.ndarray', 'ndarray'],
  ['numpy.dtype', 'dtype'],
  // Arrays of protocol 5.
  ['numpy.core.numeric._frombuffer', 'frombuffer'],
  ['numpy._core.numeric._frombuffer', 'frombuffer'],
  // Python 3 writing bytes to protocol 2 and below.
  ['_codecs.encode', 'encode'],
  ['__builtin__.bytes', 'bytes'],
  ['builtins.bytes', 'bytes'],
  ['__builtin__.bytearray', 'bytearray'],
  ['builtins.bytearray', 'bytearray'],
]);

/** Opcodes that make objects of classes, fetch outside objects or need more than plain data. */
const REFUSED: ReadonlyMap<number, string> = new Map([
  [0x50, 'PERSID'],
  [0x51, 'BINPERSID'],
  [0x6f, 'OBJ'],
  [0x81, 'NEWOBJ'],
  [0x82, 'EXT1'],
  [0x83, 'EXT2'],
  [0x84, 'EXT4'],
  [0x8f, 'EMPTY_SET'],
  [0x90, 'ADDITEMS'],
  [0x91, 'FROZENSET'],
  [0x92, 'NEWOBJ_EX'],
  [0x97, 'NEXT_BUFFER'],
  [0x98, 'READONLY_BUFFER'],
]);

/** Python itself stops at some thousand; data sets nest four deep. */
const MAX_NESTING = 64;
/** NumPy 2's NPY_MAXDIMS. */
const MAX_DIMENSIONS = 64;

/**
 * Reads one whole pickle.
 * @param name of the file, for messages
 * @throws HardmineError ERR_FORMAT for anything that is not plain data, is cut off or damaged, or would
 *   take more memory than 16 MiB and twice its size; nothing in it is ever run
 */
export function readPickle(bytes: Uint8Array, name: string): PickleValue {
  return new Interpreter(new PickleInput(bytes, name)).run();
}

class Interpreter {
  readonly #in: PickleInput;
  readonly #stack: Item[] = [];
  /** Heights of the stack at which MARK was met. */
  readonly #marks: number[] = [];
  readonly #memo = new Map<number, Item>();
  /** Arrays that have their state. */
  readonly #built = new Set<PickledArray>();

  constructor(input: PickleInput) {
    this.#in = input;
  }

  run(): PickleValue {
    for (;;) {
      const opcode = this.#in.opcode();
      if (opcode === 0x2e) break; // STOP
      this.#step(opcode);
    }
    const value = this.#pop();
    if (this.#stack.length > 0 || this.#marks.length > 0) {
      this.#in.damaged('it ends with values left over');
    }
    if (this.#in.left > 0) this.#in.damaged(`${this.#in.left} bytes follow its end`);
    return this.#check(value);
  }

  #step(opcode: number): void {
    switch (opcode) {
      // Framing and the stack
      case 0x80: {
        const protocol = this.#in.unsigned(1);
        if (protocol > 5) this.#in.damaged(`it is of protocol ${protocol}, which is later than 5`);
        return;
      }
      case 0x95: {
        const frame = this.#in.unsigned(8);
        if (frame > this.#in.left) this.#in.cutOff(frame);
        return;
      }
      case 0x28: // MARK
        this.#in.charge(COST.slot);
        this.#marks.push(this.#stack.length);
        return;
      case 0x30: // POP, which takes a mark where one is on top
        if (this.#marks.at(-1) === this.#stack.length) this.#popMark();
        else this.#pop();
        return;
      case 0x31: // POP_MARK
        this.#popMark();
        return;

      case 0x70: // PUT
        this.#remember(this.#in.index());
        return;
      case 0x71:
        this.#remember(this.#in.unsigned(1));
        return;
      case 0x72:
        this.#remember(this.#in.unsigned(4));
        return;
      case 0x94: // MEMOIZE
        this.#remember(this.#memo.size);
        return;

      case 0x61: // APPEND
        this.#append([this.#pop()]);
        return;
      case 0x65: // APPENDS
        this.#append(this.#popMark());
        return;
      case 0x73: {
        const value = this.#pop();
        this.#setItems([this.#pop(), value]);
        return;
      }
      case 0x75: // SETITEMS
        this.#setItems(this.#popMark());
        return;
      case 0x62: // BUILD
        this.#build(this.#pop(), this.#top());
        return;
      default:
        this.#push(this.#value(opcode));
    }
  }

  /** What an opcode puts onto the stack. */
  #value(opcode: number): Item {
    switch (opcode) {
      case 0x67: // GET
        return this.#recall(this.#in.index());
      case 0x68:
        return this.#recall(this.#in.unsigned(1));
      case 0x6a:
        return this.#recall(this.#in.unsigned(4));

      case 0x32: // DUP
        return this.#top();

      // None, booleans, numbers
      case 0x4e:
        return null;
      case 0x88:
        return true;
      case 0x89:
        return false;
      case 0x49: {
        const text = this.#in.line();
        // Protocol 0 and 1 write booleans so.
        if (text === '00' || text === '01') return text === '01';
        return this.#in.integer(text);
      }
      case 0x4c:
        return this.#in.integer(this.#in.line().replace(/L$/, ''));
      case 0x4a:
        return this.#in.take(4).readInt32LE();
      case 0x4b:
        return this.#in.unsigned(1);
      case 0x4d:
        return this.#in.unsigned(2);
      case 0x8a:
        return this.#in.longBytes(this.#in.unsigned(1));
      case 0x8b:
        return this.#in.longBytes(this.#in.unsigned(4));
      case 0x46:
        return this.#in.float();
      case 0x47:
        return this.#in.take(8).readDoubleBE();

      // Text and bytes
      case 0x56: // UNICODE
        return this.#in.rawUnicode();
      case 0x8c:
        return this.#in.utf8(this.#in.unsigned(1));
      case 0x58:
        return this.#in.utf8(this.#in.unsigned(4));
      case 0x8d:
        return this.#in.utf8(this.#in.unsigned(8));
      case 0x53: // STRING
        return this.#in.quoted();
      case 0x55: // SHORT_BINSTRING
      case 0x43: // SHORT_BINBYTES
        return this.#in.bytes(this.#in.unsigned(1));
      case 0x54: // BINSTRING
      case 0x42: // BINBYTES
        return this.#in.bytes(this.#in.unsigned(4));
      case 0x8e: // BINBYTES8
      case 0x96: // BYTEARRAY8
        return this.#in.bytes(this.#in.unsigned(8));

      // Lists, tuples, dictionaries
      case 0x5d:
      case 0x29:
        return this.#list([]);
      case 0x6c: // LIST
      case 0x74: // TUPLE
        return this.#list(this.#popMark());
      case 0x85:
      case 0x86:
      case 0x87: {
        const items = Array.from({ length: opcode - 0x84 }, () => this.#pop());
        return this.#list(items.reverse());
      }
      case 0x7d:
        return this.#dictionary([]);
      case 0x64: // DICT
        return this.#dictionary(this.#popMark());

      // What would be code
      case 0x63: // GLOBAL
        return this.#global(this.#in.line(), this.#in.line());
      case 0x93: {
        const member = this.#pop();
        const module = this.#pop();
        if (typeof module !== 'string' || typeof member !== 'string') {
          return this.#in.damaged('it names a global by something that is no text');
        }
        return this.#global(module, member);
      }
      case 0x69: // INST
        return this.#in.refuse(quote(`${this.#in.line()}.${this.#in.line()}`));
      case 0x52: {
        const args = this.#pop();
        const called = this.#pop();
        if (!(called instanceof Global) || !Array.isArray(args)) {
          return this.#in.damaged('it calls something that is no function');
        }
        return this.#interpret(called, args);
      }
      default: {
        const refused = REFUSED.get(opcode);
        if (refused !== undefined) this.#in.refuse(`the operation ${refused}`);
        return this.#in.damaged(
          `0x${opcode.toString(16).padStart(2, '0')} is no operation of a pickle`,
        );
      }
    }
  }

  // -------------------------------------------------------------------------------------------
  // Stack, memo, containers

  #push(item: Item): void {
    this.#in.charge(COST.slot);
    this.#stack.push(item);
  }

  #top(): Item {
    if (this.#stack.length <= (this.#marks.at(-1) ?? 0)) {
      this.#in.damaged('an operation finds nothing to work on');
    }
    return this.#stack.at(-1)!;
  }

  #pop(): Item {
    const item = this.#top();
    this.#stack.pop();
    return item;
  }

  #popMark(): Item[] {
    const mark = this.#marks.pop();
    if (mark === undefined) this.#in.damaged('an operation finds no mark');
    return this.#stack.splice(mark);
  }

  #remember(index: number): void {
    const item = this.#top();
    this.#in.charge(4 * COST.slot);
    this.#memo.set(index, item);
  }

  #recall(index: number): Item {
    const item = this.#memo.get(index);
    if (item === undefined) this.#in.damaged(`it recalls ${index}, which it never stored`);
    return item;
  }

  #list(items: Item[]): Item[] {
    this.#in.charge(COST.list);
    return items;
  }

  #append(items: readonly Item[]): void {
    const list = this.#top();
    if (!Array.isArray(list)) this.#in.damaged('it appends to something that is no list');
    const grown: Item[] = list;
    this.#in.charge(COST.slot * items.length);
    for (const item of items) grown.push(item);
  }

  #dictionary(items: readonly Item[]): Map<Key, Item> {
    this.#in.charge(COST.dictionary);
    const dictionary = new Map<Key, Item>();
    this.#setAll(dictionary, items);
    return dictionary;
  }

  #setItems(items: readonly Item[]): void {
    const dictionary = this.#top();
    if (!(dictionary instanceof Map)) {
      this.#in.damaged('it sets keys of something that is no dictionary');
    }
    this.#setAll(dictionary, items);
  }

  #setAll(dictionary: Map<Key, Item>, items: readonly Item[]): void {
    if (items.length % 2 !== 0) this.#in.damaged('a dictionary has a key without a value');
    this.#in.charge(4 * COST.slot * items.length);
    for (let i = 0; i < items.length; i += 2) {
      const key = items[i]!;
      const plain = key instanceof Uint8Array ? this.#in.text(latin1Text(key)) : key;
      if (typeof plain === 'object' && plain !== null) {
        this.#in.damaged('a dictionary has a key that is no text and no number');
      }
      dictionary.set(plain, items[i + 1]!);
    }
  }

  // -------------------------------------------------------------------------------------------
  // Globals

  #global(module: string, member: string): Global {
    const name = `${module}.${member}`;
    const helper = GLOBALS.get(name);
    if (helper === undefined) return this.#in.refuse(quote(name));
    return new Global(name, helper);
  }

  /** What Python would get from calling `called`. */
  #interpret(called: Global, args: readonly Item[]): Item {
    const [first, second, third, fourth] = args;
    switch (called.helper) {
      case 'reconstruct':
        if (first instanceof Global && first.helper === 'ndarray') {
          this.#in.charge(COST.array);
          return new PickledArray();
        }
        break;
      case 'dtype':
        if (args.length >= 1) return this.#dtype(first!);
        break;
      case 'frombuffer':
        if (args.length === 4 && second instanceof Dtype && first instanceof Uint8Array) {
          this.#in.charge(COST.array);
          const array = new PickledArray();
          this.#fill(array, third!, second, textOf(fourth!) === 'F', first);
          return array;
        }
        break;
      case 'encode':
        if (args.length === 2 && typeof first === 'string' && isLatin1(second!)) {
          return this.#in.latin1(first);
        }
        break;
      case 'bytes':
        if (args.length === 0) return this.#in.latin1('');
        break;
      case 'bytearray':
        if (args.length === 0) return this.#in.latin1('');
        if (args.length === 1 && first instanceof Uint8Array) return first;
        if (args.length === 2 && typeof first === 'string' && isLatin1(second!)) {
          return this.#in.latin1(first);
        }
        break;
      case 'ndarray':
        break;
    }
    return this.#in.damaged(
      `it calls ${called.name} with arguments that make no bytes and no array`,
    );
  }

  #dtype(given: Item): Dtype {
    const type = textOf(given);
    const match = /^(?:O[48]?|b1|[iu][1248]|f[248])$/.exec(type ?? '');
    if (match === null) {
      return this.#in.damaged(
        `an array's elements are ${quote(type ?? 'unnamed')}, and only numbers and objects are read`,
      );
    }
    this.#in.charge(COST.array);
    return type!.startsWith('O') ? new Dtype('O', 0) : new Dtype(type!, Number(type!.slice(1)));
  }

  #build(state: Item, target: Item): void {
    if (!Array.isArray(state)) this.#in.damaged('it sets a state that is no tuple');
    if (target instanceof Dtype) {
      // (version, byte order, sub-array, names, fields, size, alignment, flags), then metadata.
      const order = textOf(state[1] ?? null);
      const plain = [2, 3, 4].every((i) => state[i] === null);
      if (order === undefined || !/^[<>|=]$/.test(order) || !plain) {
        this.#in.damaged("an array's elements are records, and only numbers and objects are read");
      }
      target.order = order === '>' ? '>' : '<';
      return;
    }
    if (target instanceof PickledArray) {
      const [, shape, dtype, fortranOrder, data] = state;
      if (state.length !== 5 || !(dtype instanceof Dtype) || this.#built.has(target)) {
        this.#in.damaged("an array's state is not NumPy's");
      }
      this.#fill(target, shape!, dtype, fortranOrder === true || fortranOrder === 1, data!);
      return;
    }
    this.#in.refuse('the operation BUILD on something that is no array');
  }

  #fill(array: PickledArray, shape: Item, dtype: Dtype, fortranOrder: boolean, data: Item): void {
    if (!Array.isArray(shape) || shape.length > MAX_DIMENSIONS) {
      this.#in.damaged("an array's shape is no tuple of sizes");
    }
    let count = 1;
    const sizes = shape.map((size) => {
      if (typeof size !== 'number' || !Number.isInteger(size) || size < 0) {
        return this.#in.damaged("an array's shape is no tuple of sizes");
      }
      count *= size;
      return size;
    });
    const isObjects = dtype.type === 'O';
    if (isObjects ? !Array.isArray(data) : !(data instanceof Uint8Array)) {
      this.#in.damaged("an array's elements are not stored as its type needs");
    }
    const expected = isObjects ? count : count * dtype.bytes;
    const stored = Array.isArray(data) || data instanceof Uint8Array ? data.length : 0;
    if (stored !== expected) {
      this.#in.damaged(
        `an array of shape (${sizes.join(', ')}) and type ${dtype.description} has ${stored} ${isObjects ? 'elements' : 'bytes'} where it needs ${expected}`,
      );
    }
    this.#built.add(array);
    array.shape = sizes;
    array.dtype = dtype.description;
    array.fortranOrder = fortranOrder;
    if (data instanceof Uint8Array) array.data = data;
    else array.objects = data as PickleValue[]; // #check makes sure that they are
  }

  // -------------------------------------------------------------------------------------------
  // The result

  /**
   * Makes sure that what the stack held is data, nests no deeper than stated and contains itself
   * nowhere. Looks at each object once, without recursion.
   */
  #check(root: Item): PickleValue {
    /** How many containers deep each container is; undefined while it is looked at. */
    const heights = new Map<object, number | undefined>();
    const path: { container: object; inside: readonly Item[]; next: number; height: number }[] = [];
    const enter = (item: Item): number => {
      if (item instanceof Global || item instanceof Dtype) {
        this.#in.damaged('it holds the description of a type where data are expected');
      }
      const inside = insideOf(item);
      if (inside === undefined || typeof item !== 'object' || item === null) return 0;
      if (heights.has(item)) {
        const height = heights.get(item);
        return height ?? this.#in.damaged('a list, dictionary or array contains itself');
      }
      heights.set(item, undefined);
      path.push({ container: item, inside, next: 0, height: 1 });
      return 0;
    };
    enter(root);
    for (let open = path.at(-1); open !== undefined; open = path.at(-1)) {
      if (path.length > MAX_NESTING || open.height > MAX_NESTING) {
        this.#in.damaged(`it nests more than ${MAX_NESTING} deep`);
      }
      if (open.next < open.inside.length) {
        open.height = Math.max(open.height, 1 + enter(open.inside[open.next]!));
        open.next += 1;
        continue;
      }
      path.pop();
      heights.set(open.container, open.height);
      const above = path.at(-1);
      if (above !== undefined) above.height = Math.max(above.height, 1 + open.height);
    }
    return root as PickleValue;
  }
}

/** What a container holds; undefined for everything else. */
function insideOf(item: Item): readonly Item[] | undefined {
  if (Array.isArray(item)) return item;
  if (item instanceof Map) return [...item.values()];
  return item instanceof PickledArray ? item.objects : undefined;
}

/** Names are Python 2 `str` in old pickles and text in new ones. */
function textOf(item: Item): string | undefined {
  if (item instanceof Uint8Array && item.length <= MAX_NAME_BYTES) return latin1Text(item);
  return typeof item === 'string' ? item : undefined;
}

const isLatin1 = (encoding: Item): boolean =>
  /^(latin-?1|iso-8859-1)$/.test(textOf(encoding) ?? '');
