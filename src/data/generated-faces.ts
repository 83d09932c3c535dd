/**
 * Drawn faces for the demo and the tests: every identity has its own geometry, hair, brows, glasses,
 * moles and beard; every image its own pose, light, expression, crop, background and noise. They show
 * that training works where no photographs are at hand, and say nothing about real faces.
 *
 * Colour is a poor cue by design: each image has its own light, so a matching identity must be found in
 * its shapes.
 */
import { readFile, rm } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import sharp from 'sharp';
import { HardmineError } from '../errors.js';
import { writeFileAtomic } from '../formats/atomic.js';
import { packedFiles, RecordWriter, refuseExisting } from '../formats/recordio.js';
import type { DataOptions } from './dataset.js';
import { exists, throwIfAborted } from './files.js';
import { PIXEL_BYTES, SIDE } from './images.js';
import { RandomStream, randomBits } from './random.js';

type Rgb = readonly [number, number, number];

/** Ends of the ranges from which skin is mixed, light to dark. */
const SKINS: readonly Rgb[] = [
  [247, 218, 196],
  [236, 192, 160],
  [219, 166, 128],
  [188, 132, 96],
  [146, 96, 66],
  [112, 72, 52],
];

const HAIRS: readonly Rgb[] = [
  [28, 24, 26],
  [52, 36, 28],
  [88, 56, 36],
  [132, 88, 50],
  [196, 150, 88],
  [226, 198, 140],
  [150, 66, 34],
  [158, 158, 162],
];

const IRISES: readonly Rgb[] = [
  [74, 46, 28],
  [104, 70, 36],
  [86, 98, 54],
  [70, 112, 140],
  [96, 110, 122],
];

const HAIR_STYLES = [
  'bald',
  'buzz',
  'short',
  'side-part',
  'fringe',
  'curls',
  'quiff',
  'receding',
  'bob',
  'long',
  'middle-part',
  'bun',
] as const;
type HairStyle = (typeof HAIR_STYLES)[number];

const GLASSES = ['round', 'square', 'half-rim', 'cat-eye'] as const;
const BEARDS = ['stubble', 'moustache', 'goatee', 'full', 'chin-strap'] as const;

/** What an identity keeps in all its images; lengths in pixels of the 112x112 crop. */
interface Identity {
  skin: Rgb;
  hair: Rgb;
  iris: Rgb;
  /** Half-widths of the face at temples, cheekbones and jaw. */
  temple: number;
  cheek: number;
  jaw: number;
  /** From the middle of the face down to chin and up to the top of the head. */
  chin: number;
  crown: number;
  /** Half-width of the chin: pointed to square. */
  chinWidth: number;
  eyeSpacing: number;
  eyeY: number;
  eyeWidth: number;
  eyeHeight: number;
  /** Degrees, outer corner up. */
  eyeTilt: number;
  lid: number;
  browGap: number;
  browThickness: number;
  browLength: number;
  browTilt: number;
  browArch: number;
  noseLength: number;
  noseWidth: number;
  noseTip: number;
  mouthY: number;
  mouthWidth: number;
  upperLip: number;
  lowerLip: number;
  lipRed: number;
  ear: number;
  earY: number;
  hairStyle: HairStyle;
  hairline: number;
  hairVolume: number;
  /** Which side the parting is on. */
  parting: 1 | -1;
  glasses: (typeof GLASSES)[number] | undefined;
  glassesColour: Rgb;
  beard: (typeof BEARDS)[number] | undefined;
  freckles: boolean;
  wrinkles: number;
  /** Places on the face, in half-widths and half-heights. */
  moles: { x: number; y: number; size: number }[];
  earrings: boolean;
}

const mix = (a: Rgb, b: Rgb, share: number): Rgb => [
  a[0] + (b[0] - a[0]) * share,
  a[1] + (b[1] - a[1]) * share,
  a[2] + (b[2] - a[2]) * share,
];
const BLACK: Rgb = [20, 14, 16];
const WHITE: Rgb = [255, 252, 246];
const darker = (colour: Rgb, share: number): Rgb => mix(colour, BLACK, share);
const lighter = (colour: Rgb, share: number): Rgb => mix(colour, WHITE, share);
const css = (colour: Rgb): string => `rgb(${colour.map(Math.round).join(',')})`;
/** A colour of a random hue, `saturation` and `lightness` from 0 to 1. */
function hue(random: RandomStream, saturation: number, lightness: number): Rgb {
  const angle = random.uniform(0, 6);
  const channel = (offset: number): number => {
    const distance = Math.abs(((angle + offset) % 6) - 3) - 1;
    const pure = Math.min(1, Math.max(0, distance));
    return 255 * lightness * (1 - saturation + saturation * pure);
  };
  return [channel(0), channel(4), channel(2)];
}

function palette(random: RandomStream, colours: readonly Rgb[]): Rgb {
  const place = random.uniform(0, colours.length - 1);
  const index = Math.floor(place);
  return mix(colours[index]!, colours[index + 1]!, place - index);
}

function drawIdentity(random: RandomStream): Identity {
  const cheek = random.uniform(33, 43);
  const hasGlasses = random.chance(0.35);
  const hasBeard = random.chance(0.35);
  return {
    skin: palette(random, SKINS),
    hair: mix(random.pick(HAIRS), random.pick(HAIRS), random.uniform(0, 0.3)),
    iris: random.pick(IRISES),
    temple: cheek * random.uniform(0.86, 1.02),
    cheek,
    jaw: cheek * random.uniform(0.66, 0.98),
    chin: random.uniform(41, 54),
    crown: random.uniform(48, 58),
    chinWidth: random.uniform(7, 21),
    eyeSpacing: random.uniform(13.5, 20.5),
    eyeY: random.uniform(-14, -7),
    eyeWidth: random.uniform(5.6, 9.4),
    eyeHeight: random.uniform(2.6, 5.8),
    eyeTilt: random.uniform(-10, 14),
    lid: random.uniform(0.6, 2),
    browGap: random.uniform(4.5, 10),
    browThickness: random.uniform(1.2, 4.6),
    browLength: random.uniform(6, 11),
    browTilt: random.uniform(-16, 18),
    browArch: random.uniform(0, 5),
    noseLength: random.uniform(14, 25),
    noseWidth: random.uniform(4.5, 11),
    noseTip: random.uniform(2.5, 5.5),
    mouthY: random.uniform(24, 33),
    mouthWidth: random.uniform(8.5, 18),
    upperLip: random.uniform(1, 4.4),
    lowerLip: random.uniform(1.6, 5.6),
    lipRed: random.uniform(0.15, 0.6),
    ear: random.uniform(5, 11),
    earY: random.uniform(-8, 2),
    hairStyle: random.pick(HAIR_STYLES),
    hairline: random.uniform(9, 20),
    hairVolume: random.uniform(2, 9),
    parting: random.chance(0.5) ? 1 : -1,
    glasses: hasGlasses ? random.pick(GLASSES) : undefined,
    glassesColour: random.chance(0.6) ? [34, 32, 36] : hue(random, 0.6, 0.6),
    beard: hasBeard ? random.pick(BEARDS) : undefined,
    freckles: random.chance(0.18),
    wrinkles: random.chance(0.3) ? random.uniform(0.3, 1) : 0,
    moles: Array.from({ length: random.pick([0, 0, 0, 1, 1, 2]) }, () => ({
      x: random.uniform(-0.7, 0.7),
      y: random.uniform(-0.3, 0.75),
      size: random.uniform(0.9, 1.7),
    })),
    earrings: random.chance(0.15),
  };
}

/** What one image has of its own. */
interface Shot {
  /** Radians: right, up, clockwise. */
  yaw: number;
  pitch: number;
  roll: number;
  scale: number;
  shiftX: number;
  shiftY: number;
  smile: number;
  mouthOpen: number;
  eyeOpen: number;
  browRaise: number;
  gazeX: number;
  gazeY: number;
  /** Unit vector towards the light, and how much brighter that side is. */
  lightX: number;
  lightY: number;
  lightFall: number;
  gain: Rgb;
  gamma: number;
  grey: boolean;
  blur: number;
  noise: number;
  quality: number;
}

function drawShot(random: RandomStream): Shot {
  const within = (limit: number, deviation: number): number =>
    Math.max(-limit, Math.min(limit, random.normal() * deviation));
  const light = random.uniform(0, 2 * Math.PI);
  const brightness = random.uniform(0.66, 1.28);
  const warmth = within(0.28, 0.13);
  const tint = within(0.12, 0.06);
  return {
    yaw: within(0.42, 0.2),
    pitch: within(0.28, 0.12),
    roll: within(16, 6),
    scale: random.uniform(0.84, 1.04),
    shiftX: within(5, 2.2),
    shiftY: within(5, 2.2),
    smile: random.uniform(-0.6, 1),
    mouthOpen: random.chance(0.35) ? random.uniform(0.2, 1) : 0,
    eyeOpen: random.chance(0.04) ? 0.12 : random.uniform(0.65, 1.12),
    browRaise: within(3, 1.3),
    gazeX: within(1, 0.4),
    gazeY: within(0.6, 0.25),
    lightX: Math.cos(light),
    lightY: Math.sin(light),
    lightFall: random.uniform(0.05, 0.6),
    gain: [brightness * (1 + warmth), brightness * (1 + tint), brightness * (1 - warmth)],
    gamma: random.uniform(0.72, 1.25),
    grey: random.chance(0.08),
    blur: random.chance(0.3) ? random.uniform(0.1, 0.33) : 0,
    noise: random.uniform(1, 8),
    quality: 60 + random.below(36),
  };
}

type Point = readonly [number, number];

const num = (value: number): string => value.toFixed(1);
const at = (point: Point): string => `${num(point[0])} ${num(point[1])}`;

/** A smooth path through points: Catmull and Rom's spline as cubic Beziers. */
function smooth(points: readonly Point[], closed: boolean): string {
  const count = points.length;
  const get = (i: number): Point =>
    points[closed ? (i + count) % count : Math.max(0, Math.min(count - 1, i))]!;
  let path = `M${at(get(0))}`;
  for (let i = 0; i < (closed ? count : count - 1); i += 1) {
    const [before, from, to, after] = [get(i - 1), get(i), get(i + 1), get(i + 2)];
    const first: Point = [from[0] + (to[0] - before[0]) / 6, from[1] + (to[1] - before[1]) / 6];
    const second: Point = [to[0] - (after[0] - from[0]) / 6, to[1] - (after[1] - from[1]) / 6];
    path += `C${at(first)} ${at(second)} ${at(to)}`;
  }
  return closed ? `${path}Z` : path;
}

/** The head turned: features move over an ellipsoid, the outline moves the other way. */
class Head {
  readonly #depth: number;
  readonly #halfWidth: number;
  readonly #halfHeight: number;
  readonly #sinYaw: number;
  readonly #cosYaw: number;
  readonly #sinPitch: number;
  readonly #cosPitch: number;
  /** Crops are aligned by the features, so most of their movement is taken back. */
  readonly #backX: number;
  readonly #backY: number;

  constructor(who: Identity, shot: Shot) {
    this.#halfWidth = who.cheek + 3;
    this.#halfHeight = (who.crown + who.chin) / 2 + 4;
    this.#depth = who.cheek * 0.85;
    this.#sinYaw = Math.sin(shot.yaw);
    this.#cosYaw = Math.cos(shot.yaw);
    this.#sinPitch = Math.sin(shot.pitch);
    this.#cosPitch = Math.cos(shot.pitch);
    this.#backX = 0.72 * this.#depth * this.#sinYaw;
    this.#backY = 0.72 * this.#depth * this.#sinPitch;
  }

  /** A point of the face's surface, `lift` pixels above it. */
  surface(x: number, y: number, lift = 0): Point {
    const round = 1 - (x / this.#halfWidth) ** 2 - (y / this.#halfHeight) ** 2;
    const z = this.#depth * Math.sqrt(Math.max(0.02, round)) + lift;
    const turnedZ = z * this.#cosYaw - x * this.#sinYaw;
    return [
      x * this.#cosYaw + z * this.#sinYaw - this.#backX,
      y * this.#cosPitch - turnedZ * this.#sinPitch + this.#backY,
    ];
  }

  /** A point of the outline, or of what lies `behind` it. */
  outline(x: number, y: number, behind = 0): Point {
    return [
      x - this.#backX - behind * this.#sinYaw,
      y * this.#cosPitch + this.#backY + behind * this.#sinPitch,
    ];
  }

  /** How much narrower things at x look than straight on. */
  narrowing(x: number): number {
    const bend = Math.asin(Math.max(-0.9, Math.min(0.9, x / this.#halfWidth)));
    return Math.max(0.45, Math.cos(bend + Math.asin(this.#sinYaw)) / Math.cos(bend));
  }
}

function faceOutline(who: Identity, head: Head, grow = 0): Point[] {
  const right: Point[] = [
    [0, -who.crown - grow],
    [who.temple * 0.62 + grow, -who.crown * 0.88 - grow],
    [who.temple + grow, -who.crown * 0.42],
    [who.cheek + grow, 2],
    [who.jaw + grow, who.chin * 0.56],
    [(who.jaw + who.chinWidth) / 2, who.chin * 0.86],
    [who.chinWidth * 0.7, who.chin],
  ];
  const left = right
    .slice(1)
    .reverse()
    .map(([x, y]): Point => [-x, y]);
  return [...right, ...left].map(([x, y]) => head.outline(x, y));
}

function drawBackHair(who: Identity, head: Head, fill: string): string {
  const { hairStyle, temple, crown, chin, hairVolume } = who;
  const curtain = (bottom: number, flare: number): string => {
    const wide = temple + 5 + hairVolume;
    const points: Point[] = [
      [0, -crown - hairVolume - 2],
      [wide * 0.75, -crown * 0.85],
      [wide, -crown * 0.2],
      [wide + flare, bottom * 0.5],
      [wide + flare - 3, bottom],
      [-wide - flare + 3, bottom],
      [-wide - flare, bottom * 0.5],
      [-wide, -crown * 0.2],
      [-wide * 0.75, -crown * 0.85],
    ];
    const turned = points.map(([x, y]) => head.outline(x, y, 6));
    return `<path d="${smooth(turned, true)}" fill="${fill}"/>`;
  };
  switch (hairStyle) {
    case 'bob':
      return curtain(chin * 0.72, 4);
    case 'long':
      return curtain(chin + 26, 5);
    case 'middle-part':
      return curtain(chin + 14, 1);
    case 'bun': {
      const [x, y] = head.outline(who.parting * 4, -crown - 8, 14);
      return `<circle cx="${num(x)}" cy="${num(y)}" r="${num(11 + hairVolume)}" fill="${fill}"/>`;
    }
    case 'curls': {
      let curls = '';
      for (let i = 0; i <= 12; i += 1) {
        const angle = Math.PI * (1.12 - (i / 12) * 1.24);
        const radius = 8 + hairVolume * 0.7 + (i % 3);
        const [x, y] = head.outline(
          Math.cos(angle) * (temple + 4),
          -Math.sin(angle) * (crown + 1) - 2,
          4,
        );
        curls += `<circle cx="${num(x)}" cy="${num(y)}" r="${num(radius)}"/>`;
      }
      return `<g fill="${fill}">${curls}</g>`;
    }
    default:
      return '';
  }
}

/** The hair in front: between the top of the head, grown by the hair's volume, and the hairline. */
function drawFrontHair(who: Identity, head: Head, fill: string, shade: string): string {
  const { hairStyle, temple, crown, parting } = who;
  if (hairStyle === 'bald') return '';
  const line = -crown + who.hairline;
  const brow = who.eyeY - who.browGap - who.browThickness;
  /** Hairline from the right temple to the left: x in half-widths of the temple, y in pixels. */
  let inner: Point[];
  let volume = who.hairVolume;
  let tall = volume;
  let side = -crown * 0.2;
  switch (hairStyle) {
    case 'buzz':
      volume = 0.8;
      tall = 0.8;
      inner = [
        [0.9, line + 10],
        [0.55, line + 1],
        [0, line],
        [-0.55, line + 1],
        [-0.9, line + 10],
      ];
      break;
    case 'side-part':
      inner = [
        [0.88, line + 20],
        [0.7, line + 14],
        [0.1, line + 11],
        [-0.5, line - 1],
        [-0.75, line + 4],
        [-0.92, line + 17],
      ];
      break;
    case 'fringe':
      side = -2;
      inner = [
        [0.9, brow + 2],
        [0.5, brow - 2],
        [0.25, brow - 4],
        [-0.1, brow - 1],
        [-0.45, brow - 4],
        [-0.9, brow + 1],
      ];
      break;
    case 'quiff':
      tall = volume + 12;
      inner = [
        [0.86, line + 16],
        [0.6, line + 2],
        [0.1, line - 3],
        [-0.45, line + 3],
        [-0.88, line + 15],
      ];
      break;
    case 'receding':
      volume = 2.5;
      tall = 1.5;
      side = 0;
      inner = [
        [0.96, line + 26],
        [0.72, -crown + 4],
        [0.3, -crown + 9],
        [0, -crown + 12],
        [-0.3, -crown + 9],
        [-0.72, -crown + 4],
        [-0.96, line + 26],
      ];
      break;
    case 'bob':
      side = 18;
      inner = [
        [0.98, 16],
        [0.86, line + 14],
        [0.2, line + 6],
        [-0.5, line],
        [-0.84, line + 13],
        [-0.98, 16],
      ];
      break;
    case 'long':
      side = 24;
      inner = [
        [0.99, 24],
        [0.84, line + 16],
        [0.45, line + 3],
        [0, line - 2],
        [-0.45, line + 3],
        [-0.84, line + 16],
        [-0.99, 24],
      ];
      break;
    case 'middle-part':
      side = 22;
      inner = [
        [0.97, 22],
        [0.74, line + 22],
        [0.3, line + 8],
        [0, line - 8],
        [-0.3, line + 8],
        [-0.74, line + 22],
        [-0.97, 22],
      ];
      break;
    case 'bun':
      volume = 1.5;
      tall = 2.5;
      inner = [
        [0.94, line + 18],
        [0.7, line + 3],
        [0, line - 3],
        [-0.7, line + 3],
        [-0.94, line + 18],
      ];
      break;
    case 'curls':
      inner = [
        [0.9, line + 16],
        [0.7, line + 4],
        [0.35, line + 5],
        [0, line + 1],
        [-0.35, line + 5],
        [-0.7, line + 4],
        [-0.9, line + 16],
      ];
      break;
    case 'short':
      inner = [
        [0.9, line + 17],
        [0.74, line + 4],
        [0.3, line + 1],
        [-0.3, line + 1],
        [-0.74, line + 4],
        [-0.9, line + 17],
      ];
      break;
  }
  const outer: Point[] = [
    [-temple - volume * 0.5, side],
    [-temple - volume, -crown * 0.45],
    [-temple * 0.62 - volume, -crown * 0.88 - tall * 0.6],
    [parting * 6, -crown - tall],
    [temple * 0.62 + volume, -crown * 0.88 - tall * 0.6],
    [temple + volume, -crown * 0.45],
    [temple + volume * 0.5, side],
  ];
  const points = [
    ...outer.map(([x, y]) => head.outline(x, y)),
    ...inner.map(([x, y]) => {
      // Inside the outline the hairline lies on the forehead; at the temples it meets the outline.
      const [surface, edge] = [
        head.surface(x * parting * temple, y),
        head.outline(x * parting * temple, y),
      ];
      const weight = Math.min(1, Math.abs(x)) ** 4;
      return [
        surface[0] + (edge[0] - surface[0]) * weight,
        surface[1] + (edge[1] - surface[1]) * weight,
      ] as const;
    }),
  ];
  if (parting === -1)
    points.splice(outer.length, inner.length, ...points.slice(outer.length).reverse());
  return `<path d="${smooth(points, true)}" fill="${fill}" stroke="${shade}" stroke-width=".7" stroke-opacity=".5"${hairStyle === 'buzz' ? ' fill-opacity=".75"' : ''}/>`;
}

function drawEye(
  who: Identity,
  shot: Shot,
  head: Head,
  side: 1 | -1,
  skinShade: string,
  row: number,
): string {
  const [x, y] = head.surface(side * who.eyeSpacing, who.eyeY);
  const width = who.eyeWidth * head.narrowing(side * who.eyeSpacing);
  const height = who.eyeHeight * shot.eyeOpen;
  const iris = Math.min(who.eyeHeight * 0.92, width * 0.62);
  const almond = `M${num(-width)} 0Q0 ${num(-2 * height)} ${num(width)} 0Q0 ${num(1.7 * height)} ${num(-width)} 0Z`;
  const gaze = `cx="${num(shot.gazeX * width * 0.35)}" cy="${num(shot.gazeY * height * 0.4 - 0.2)}"`;
  const id = `${side === 1 ? 'r' : 'l'}${row}`;
  return (
    `<g transform="translate(${at([x, y])}) rotate(${num(-side * who.eyeTilt)})">` +
    `<clipPath id="${id}"><path d="${almond}"/></clipPath><g clip-path="url(#${id})">` +
    `<path d="${almond}" fill="#f4f0ec"/><circle ${gaze} r="${num(iris)}" fill="${css(who.iris)}"/>` +
    `<circle ${gaze} r="${num(iris * 0.45)}" fill="#140e10"/>` +
    `<circle cx="${num(shot.lightX * 1.4)}" cy="-1.2" r=".8" fill="#fff"/></g>` +
    `<path d="M${num(-width)} 0Q0 ${num(-2 * height)} ${num(width)} 0" fill="none" stroke="${skinShade}" stroke-width="${num(who.lid)}" stroke-linecap="round"/>` +
    `<path d="M${num(-width * 0.9)} ${num(-height - 1.4)}Q0 ${num(-2 * height - 2.6)} ${num(width * 0.9)} ${num(-height - 1)}" fill="none" stroke="${skinShade}" stroke-width=".7" stroke-opacity=".45"/></g>`
  );
}

function drawBrow(who: Identity, shot: Shot, head: Head, side: 1 | -1, colour: string): string {
  const y = who.eyeY - who.browGap - Math.max(0, who.eyeHeight - 4) - shot.browRaise;
  const lean = Math.tan((who.browTilt * Math.PI) / 180) * who.browLength;
  const [inner, middle, outer] = [
    head.surface(side * (who.eyeSpacing - who.browLength * 0.85), y + lean * 0.5, 2),
    head.surface(side * who.eyeSpacing, y - who.browArch, 2),
    head.surface(side * (who.eyeSpacing + who.browLength), y - lean * 0.5, 1),
  ];
  return `<path d="M${at(inner)}Q${at(middle)} ${at(outer)}" fill="none" stroke="${colour}" stroke-width="${num(who.browThickness)}" stroke-linecap="round"/>`;
}

function drawNose(who: Identity, shot: Shot, head: Head, dark: string, light: string): string {
  const tipY = who.eyeY + who.noseLength + 4;
  const half = who.noseWidth;
  const shadowSide = shot.lightX > 0 ? -1 : 1;
  const tip = head.surface(0, tipY, 11);
  const left = head.surface(-half, tipY + 1.5, 4);
  const right = head.surface(half, tipY + 1.5, 4);
  const base = head.surface(0, tipY + who.noseTip + 0.5, 6);
  const bridge = head.surface(shadowSide * 3.4, who.eyeY + 1, 3);
  const wing = shadowSide === 1 ? right : left;
  return (
    `<path d="M${at(bridge)}Q${at(head.surface(shadowSide * 3, tipY - 7, 8))} ${at(wing)}" fill="none" stroke="${dark}" stroke-width="1.5" stroke-opacity=".5" stroke-linecap="round"/>` +
    `<path d="M${at(left)}Q${at([left[0], base[1] + 1])} ${at(base)}Q${at([right[0], base[1] + 1])} ${at(right)}" fill="none" stroke="${dark}" stroke-width="1.5" stroke-opacity=".75" stroke-linecap="round"/>` +
    `<ellipse cx="${num(tip[0])}" cy="${num(tip[1])}" rx="${num(who.noseTip * 0.8)}" ry="${num(who.noseTip * 0.6)}" fill="${light}" fill-opacity=".45"/>` +
    [-1, 1]
      .map((side) => {
        const [x, y] = head.surface(side * half * 0.5, tipY + 2.6, 6);
        return `<ellipse cx="${num(x)}" cy="${num(y)}" rx="1.5" ry=".9" fill="${dark}" fill-opacity=".8"/>`;
      })
      .join('')
  );
}

function drawMouth(who: Identity, shot: Shot, head: Head, lip: Rgb): string {
  const half = who.mouthWidth * (1 + 0.16 * Math.max(0, shot.smile) - 0.1 * shot.mouthOpen);
  const lift = shot.smile * 3.4;
  const gap = shot.mouthOpen * 6;
  const y = who.mouthY;
  const left = head.surface(-half, y - lift);
  const right = head.surface(half, y - lift);
  const point = (x: number, dy: number): string => at(head.surface(x, y + dy, 3));
  const upper = `M${at(left)}Q${point(-half * 0.45, -who.upperLip)} ${point(-1.6, -who.upperLip - 0.8)}L${point(0, -who.upperLip)}L${point(1.6, -who.upperLip - 0.8)}Q${point(half * 0.45, -who.upperLip)} ${at(right)}Q${point(0, 0.6)} ${at(left)}Z`;
  const lower = `M${at(left)}Q${point(0, gap * 2 + lift * 0.4)} ${at(right)}Q${point(0, (who.lowerLip + gap) * 2 + lift * 0.4)} ${at(left)}Z`;
  const inside =
    gap > 0
      ? `<path d="M${at(left)}Q${point(0, 0)} ${at(right)}Q${point(0, gap * 2 + lift * 0.4)} ${at(left)}Z" fill="#4a1c20"/>` +
        `<path d="M${point(-half * 0.62, -lift * 0.5)}Q${point(0, 0.6)} ${point(half * 0.62, -lift * 0.5)}Q${point(0, gap * 0.9)} ${point(-half * 0.62, -lift * 0.5)}Z" fill="#f2ece2"/>`
      : '';
  return (
    `${inside}<path d="${lower}" fill="${css(lip)}"/><path d="${upper}" fill="${css(darker(lip, 0.14))}"/>` +
    (gap === 0
      ? `<path d="M${at(left)}Q${point(0, lift * 0.5)} ${at(right)}" fill="none" stroke="${css(darker(lip, 0.55))}" stroke-width="1" stroke-linecap="round"/>`
      : '')
  );
}

function drawBeard(who: Identity, shot: Shot, head: Head, fill: string): string {
  const { chin, jaw, mouthY, mouthWidth } = who;
  const drop = shot.mouthOpen * 4;
  const noseBase = who.eyeY + who.noseLength + 4 + who.noseTip + 1;
  const mouthTop = mouthY - who.upperLip - 0.5;
  const moustache = (): string => {
    const wide = mouthWidth * 1.05;
    const top = Math.min(mouthTop - 1.5, Math.max(noseBase, mouthTop - 6));
    const points = [
      head.surface(-wide, mouthY + 2, 2),
      head.surface(-wide * 0.5, top + 0.8, 3),
      head.surface(0, top, 4),
      head.surface(wide * 0.5, top + 0.8, 3),
      head.surface(wide, mouthY + 2, 2),
      head.surface(wide * 0.5, mouthTop + 1, 3),
      head.surface(0, mouthTop, 4),
      head.surface(-wide * 0.5, mouthTop + 1, 3),
    ];
    return `<path d="${smooth(points, true)}"/>`;
  };
  const jawline = (inner: number): string => {
    const outer: Point[] = [
      [who.cheek - 0.5, 4],
      [jaw + 1, chin * 0.56],
      [(jaw + who.chinWidth) / 2 + 1, chin * 0.87],
      [who.chinWidth * 0.7, chin + 2 + drop * 0.4],
    ];
    const all = [...outer, ...[...outer].reverse().map(([x, y]): Point => [-x, y])].map(([x, y]) =>
      head.outline(x, y),
    );
    const floor = Math.max(mouthY + who.lowerLip + 3 + drop, chin - inner);
    const hollow: Point[] = [
      [-who.cheek + 3, 2],
      [-jaw * 0.82, chin * 0.4],
      [-mouthWidth - 3, Math.min(floor, mouthY)],
      [0, floor],
      [mouthWidth + 3, Math.min(floor, mouthY)],
      [jaw * 0.82, chin * 0.4],
      [who.cheek - 3, 2],
    ];
    return `<path d="${smooth([...all, ...hollow.map(([x, y]) => head.surface(x, y))], true)}"/>`;
  };
  switch (who.beard) {
    case 'stubble':
      return `<g fill="${fill}" fill-opacity=".3">${jawline(14)}${moustache()}</g>`;
    case 'full':
      return `<g fill="${fill}" fill-opacity=".94">${jawline(15)}${moustache()}</g>`;
    case 'chin-strap':
      return `<g fill="${fill}" fill-opacity=".88">${jawline(5)}</g>`;
    case 'moustache':
      return `<g fill="${fill}">${moustache()}</g>`;
    case 'goatee': {
      const low = mouthY + who.lowerLip + 2 + drop;
      const points: Point[] = [
        [-mouthWidth * 0.7, low],
        [0, low + 1.5],
        [mouthWidth * 0.7, low],
        [who.chinWidth * 0.62, chin - 2],
        [0, chin + 3],
        [-who.chinWidth * 0.62, chin - 2],
      ];
      return `<g fill="${fill}" fill-opacity=".94">${moustache()}<path d="${smooth(
        points.map(([x, y]) => head.surface(x, y, 1)),
        true,
      )}"/></g>`;
    }
    default:
      return '';
  }
}

function drawGlasses(who: Identity, head: Head): string {
  if (who.glasses === undefined) return '';
  const colour = css(who.glassesColour);
  const width = Math.min(who.eyeSpacing - 2.5, who.eyeWidth + 4.5);
  const height = who.glasses === 'round' ? width : Math.max(7, who.eyeHeight + 4);
  const y = who.eyeY + 1;
  const lens = (side: 1 | -1): string => {
    const [cx, cy] = head.surface(side * who.eyeSpacing, y, 5);
    const rx = width * head.narrowing(side * who.eyeSpacing);
    if (who.glasses === 'round') {
      return `<ellipse cx="${num(cx)}" cy="${num(cy)}" rx="${num(rx)}" ry="${num(height)}"/>`;
    }
    if (who.glasses === 'half-rim') {
      return `<path d="M${at([cx - rx, cy + 2])}V${num(cy - height * 0.7)}H${num(cx + rx)}V${num(cy + 2)}" stroke-width="2.4"/>`;
    }
    if (who.glasses === 'cat-eye') {
      return `<path d="M${at([cx - side * rx, cy - height * 0.5])}L${at([cx + side * (rx + 3), cy - height - 1])}Q${at([cx + side * rx, cy + height])} ${at([cx, cy + height * 0.9])}Q${at([cx - side * rx, cy + height * 0.8])} ${at([cx - side * rx, cy - height * 0.5])}Z"/>`;
    }
    return `<rect x="${num(cx - rx)}" y="${num(cy - height)}" width="${num(2 * rx)}" height="${num(2 * height)}" rx="2.5"/>`;
  };
  const bridge = [-1, 1].map((side) => head.surface(side * (who.eyeSpacing - width), y - 1, 7));
  const arms = ([-1, 1] as const)
    .map((side) => {
      const from = head.surface(side * (who.eyeSpacing + width), y - 2, 4);
      return `<path d="M${at(from)}L${at(head.outline(side * (who.cheek + 1), y - 3))}"/>`;
    })
    .join('');
  return `<g fill="#dfeaf2" fill-opacity=".16" stroke="${colour}" stroke-width="1.7">${arms}${lens(-1)}${lens(1)}<path d="M${at(bridge[0]!)}Q${at(head.surface(0, y - 4, 9))} ${at(bridge[1]!)}" fill="none"/></g>`;
}

function drawEars(who: Identity, head: Head, skin: string, dark: string): string {
  return ([-1, 1] as const)
    .map((side) => {
      const [x, y] = head.outline(side * (who.cheek + who.ear * 0.15), who.earY, 5);
      const [rx, ry] = [who.ear * 0.62, who.ear * 1.15];
      const ring = who.earrings
        ? `<circle cx="${num(x)}" cy="${num(y + ry + 2)}" r="2" fill="#e8c860" stroke="#8c6c20" stroke-width=".5"/>`
        : '';
      return `<ellipse cx="${num(x)}" cy="${num(y)}" rx="${num(rx)}" ry="${num(ry)}" fill="${skin}" stroke="${dark}" stroke-width=".8" stroke-opacity=".6"/><ellipse cx="${num(x)}" cy="${num(y)}" rx="${num(rx * 0.5)}" ry="${num(ry * 0.55)}" fill="${dark}" fill-opacity=".35"/>${ring}`;
    })
    .join('');
}

function drawMarks(who: Identity, head: Head, dark: string): string {
  let marks = '';
  for (const mole of who.moles) {
    const [x, y] = head.surface(mole.x * who.cheek, mole.y * who.chin, 1);
    marks += `<circle cx="${num(x)}" cy="${num(y)}" r="${num(mole.size)}" fill="#40241c"/>`;
  }
  if (who.freckles) {
    const y = who.eyeY + 13;
    for (const [dx, dy] of [
      [7, 0],
      [10, 3],
      [13, -1],
      [16, 3],
      [19, 0],
      [12, 6],
      [22, 4],
    ] as const) {
      for (const side of [-1, 1]) {
        const [cx, cy] = head.surface(side * dx, y + dy);
        marks += `<circle cx="${num(cx)}" cy="${num(cy)}" r=".8" fill="${dark}" fill-opacity=".6"/>`;
      }
    }
  }
  if (who.wrinkles > 0) {
    const line = (points: Point[]): string =>
      `<path d="${smooth(
        points.map(([x, y]) => head.surface(x, y, 1)),
        false,
      )}" fill="none" stroke="${dark}" stroke-width="1" stroke-opacity="${num(0.6 * who.wrinkles)}"/>`;
    const brow = who.eyeY - who.browGap - 7;
    marks += line([
      [-14, brow],
      [0, brow - 2],
      [14, brow],
    ]);
    for (const side of [-1, 1]) {
      marks += line([
        [side * (who.noseWidth + 2), who.eyeY + who.noseLength + 3],
        [side * (who.mouthWidth + 3), who.mouthY - 4],
        [side * (who.mouthWidth + 4), who.mouthY + 2],
      ]);
    }
  }
  return marks;
}

/** Wall or landscape behind, and shoulders: nothing of it belongs to the identity. */
function drawScene(
  random: RandomStream,
  who: Identity,
  row: number,
): { background: string; clothes: string } {
  const [first, second] = [
    hue(random, random.uniform(0.05, 0.6), random.uniform(0.25, 0.95)),
    hue(random, random.uniform(0.05, 0.6), random.uniform(0.25, 0.95)),
  ];
  let shapes = '';
  for (let i = random.below(5); i > 0; i -= 1) {
    const colour = css(hue(random, random.uniform(0, 0.6), random.uniform(0.2, 1)));
    const [x, y] = [random.uniform(-10, 112), random.uniform(-10, 112)];
    const size = random.uniform(10, 50);
    const opacity = num(random.uniform(0.3, 0.9));
    shapes += random.chance(0.5)
      ? `<circle cx="${num(x)}" cy="${num(y)}" r="${num(size * 0.6)}" fill="${colour}" fill-opacity="${opacity}"/>`
      : `<rect x="${num(x)}" y="${num(y)}" width="${num(size)}" height="${num(random.uniform(20, 120))}" fill="${colour}" fill-opacity="${opacity}"/>`;
  }
  const cloth = hue(random, random.uniform(0.1, 0.8), random.uniform(0.15, 0.95));
  const neck = who.jaw * 0.62;
  const top = who.chin + random.uniform(4, 12);
  const collar = random.chance(0.5)
    ? `<path d="M${num(-neck)} ${num(top)}L0 ${num(top + 16)}L${num(neck)} ${num(top)}" fill="none" stroke="${css(lighter(cloth, 0.5))}" stroke-width="4"/>`
    : '';
  return {
    background: `<linearGradient id="b${row}" x2="${num(random.uniform(0, 1))}" y2="1"><stop stop-color="${css(first)}"/><stop offset="1" stop-color="${css(second)}"/></linearGradient><rect width="112" height="112" fill="url(#b${row})"/>${shapes}`,
    clothes: `<rect x="${num(-neck)}" y="${num(who.chin * 0.55)}" width="${num(2 * neck)}" height="60" fill="${css(darker(who.skin, 0.22))}"/><path d="M-70 90Q-60 ${num(top + 4)} ${num(-neck)} ${num(top)}Q0 ${num(top + 14)} ${num(neck)} ${num(top)}Q60 ${num(top + 4)} 70 90Z" fill="${css(cloth)}"/>${collar}`,
  };
}

/** Something held before the face's lower edge, in some images. */
function drawOcclusion(random: RandomStream): string {
  if (!random.chance(0.07)) return '';
  const colour = css(hue(random, 0.6, random.uniform(0.3, 0.9)));
  const x = random.uniform(-48, 30);
  return `<rect x="${num(x)}" y="${num(random.uniform(18, 34))}" width="${num(random.uniform(18, 34))}" height="60" rx="5" fill="${colour}" transform="rotate(${num(random.uniform(-25, 25))})"/>`;
}

/** One face as row `row` of a strip; the ids of what it defines end in that number. */
function drawSvg(who: Identity, shot: Shot, random: RandomStream, row: number): string {
  const head = new Head(who, shot);
  const skin = css(who.skin);
  const dark = css(darker(who.skin, 0.42));
  const light = css(lighter(who.skin, 0.5));
  const hair = css(who.hair);
  const hairFill = `url(#h${row})`;
  const hairShade = css(darker(who.hair, 0.45));
  const face = smooth(faceOutline(who, head), true);
  const scene = drawScene(random, who, row);
  const lip = mix(who.skin, [186, 62, 70], who.lipRed);
  const [cx, cy] = head.surface(0, 0);
  const shine = `cx="${num(cx + shot.lightX * 14)}" cy="${num(cy - 6 + shot.lightY * 14)}" r="62" gradientUnits="userSpaceOnUse"`;
  return (
    `<svg y="${row * SIDE}" width="${SIDE}" height="${SIDE}">${scene.background}` +
    `<radialGradient id="s${row}" ${shine}><stop stop-color="${css(lighter(who.skin, 0.16))}"/><stop offset=".55" stop-color="${skin}"/><stop offset="1" stop-color="${css(darker(who.skin, 0.3))}"/></radialGradient>` +
    `<linearGradient id="h${row}" x1="${num(0.5 - shot.lightX * 0.5)}" y1="${num(0.5 - shot.lightY * 0.5)}" x2="${num(0.5 + shot.lightX * 0.5)}" y2="${num(0.5 + shot.lightY * 0.5)}"><stop stop-color="${hairShade}"/><stop offset=".6" stop-color="${hair}"/><stop offset="1" stop-color="${css(lighter(who.hair, 0.18))}"/></linearGradient>` +
    `<g transform="translate(${num(56 + shot.shiftX)} ${num(60 + shot.shiftY)}) rotate(${num(shot.roll)}) scale(${shot.scale.toFixed(3)})">` +
    drawBackHair(who, head, hairShade) +
    scene.clothes +
    drawEars(who, head, skin, dark) +
    `<path d="${face}" fill="url(#s${row})"/>` +
    drawMarks(who, head, dark) +
    drawBeard(who, shot, head, hairFill) +
    drawNose(who, shot, head, dark, light) +
    drawMouth(who, shot, head, lip) +
    drawEye(who, shot, head, -1, dark, row) +
    drawEye(who, shot, head, 1, dark, row) +
    drawBrow(who, shot, head, -1, hairShade) +
    drawBrow(who, shot, head, 1, hairShade) +
    drawFrontHair(who, head, hairFill, hairShade) +
    drawGlasses(who, head) +
    `${drawOcclusion(random)}</g></svg>`
  );
}

/** The image's light, its camera and its noise, in place on RGB [112, 112, 3]. */
function expose(pixels: Buffer, shot: Shot, random: RandomStream): void {
  const curves = shot.gain.map((gain) =>
    Float32Array.from({ length: 256 }, (_, value) => 255 * gain * (value / 255) ** shot.gamma),
  );
  let state = random.bits() | 1;
  // The sum of four bytes, as near to normal as noise needs: variance 4 * (256^2 - 1) / 12.
  const noiseScale = shot.noise / Math.sqrt((4 * (256 ** 2 - 1)) / 12);
  for (let y = 0, i = 0; y < SIDE; y += 1) {
    for (let x = 0; x < SIDE; x += 1, i += 3) {
      const along = (shot.lightX * (x - SIDE / 2) + shot.lightY * (y - SIDE / 2)) / (SIDE / 2);
      const light = 1 + shot.lightFall * along;
      const grey = (77 * pixels[i]! + 151 * pixels[i + 1]! + 28 * pixels[i + 2]!) >> 8;
      for (let c = 0; c < 3; c += 1) {
        // Marsaglia's xorshift32.
        state ^= state << 13;
        state ^= state >>> 17;
        state ^= state << 5;
        const noise =
          (state & 255) + ((state >>> 8) & 255) + ((state >>> 16) & 255) + (state >>> 24) - 510;
        const value = curves[shot.grey ? 1 : c]![shot.grey ? grey : pixels[i + c]!]!;
        pixels[i + c] = Math.max(0, Math.min(255, value * light + noise * noiseScale + 0.5));
      }
    }
  }
}

/** A lens out of focus: each pixel gives `share` of itself to either neighbour, along rows, then columns. */
function soften(pixels: Buffer, share: number): void {
  const source = Buffer.from(pixels);
  for (const step of [3, SIDE * 3]) {
    for (let i = step; i < pixels.length - step; i += 1) {
      pixels[i] =
        source[i]! + share * (source[i - step]! + source[i + step]! - 2 * source[i]!) + 0.5;
    }
    pixels.copy(source);
  }
}

/** Faces rendered by one call: the fixed cost of an SVG is as much as that of drawing a face. */
const STRIP = 8;

/**
 * Draws images number `image` of identities number `identity` (0 to 2^32 - 1) as 112x112 JPEGs. The
 * same numbers give the same bytes with the same version of sharp. At most 8 a call.
 */
async function drawStrip(
  seed: number,
  faces: readonly { identity: number; image: number }[],
): Promise<Buffer[]> {
  const drawings = faces.map(({ identity, image }, row) => {
    const who = drawIdentity(new RandomStream(seed, identity));
    const random = new RandomStream(randomBits(seed, identity, 1), image);
    const shot = drawShot(random);
    return { svg: drawSvg(who, shot, random, row), shot, random };
  });
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${SIDE}" height="${SIDE * faces.length}">${drawings.map((drawing) => drawing.svg).join('')}</svg>`;
  const strip = await sharp(Buffer.from(svg)).removeAlpha().raw().toBuffer();
  return Promise.all(
    drawings.map(({ shot, random }, row) => {
      const pixels = strip.subarray(row * PIXEL_BYTES, (row + 1) * PIXEL_BYTES);
      if (shot.blur > 0) soften(pixels, shot.blur);
      expose(pixels, shot, random);
      return sharp(pixels, { raw: { width: SIDE, height: SIDE, channels: 3 } })
        .jpeg({ quality: shot.quality })
        .toBuffer();
    }),
  );
}

/** Raise it when the same seed draws other faces than before. */
const DRAWING_VERSION = 1;
/** Strips in work at a time: one for each of two cores, and one to write while they draw. */
const STRIPS_IN_FLIGHT = 3;

export interface GeneratedFacesOptions extends Omit<DataOptions, 'onProgress'> {
  /** At least 2. */
  identities: number;
  /** At least 1. */
  imagesPerIdentity: number;
  /** 0 to 2^53 - 1. */
  seed: number;
  /** Folder that gets the packed set; made when missing. */
  out: string;
  onProgress?: ((progress: { phase: 'drawing'; done: number; total: number }) => void) | undefined;
}

/**
 * Draws a training set into `out` as train.rec with its sidecars; openDataset(out) opens it. A folder
 * that holds the faces of the same numbers already is left as it is.
 * @returns the path of the .rec
 * @throws ERR_INPUT for numbers out of range; ERR_IO when `out` holds another set or cannot be written;
 *   ERR_ABORTED; nothing is left behind then
 */
export async function generateFaces(options: GeneratedFacesOptions): Promise<string> {
  const { identities, imagesPerIdentity, seed, out, onProgress, signal } = options;
  requireInteger('identities', identities, 2, 2 ** 24);
  requireInteger('imagesPerIdentity', imagesPerIdentity, 1, 2 ** 24);
  requireInteger('seed', seed, 0, Number.MAX_SAFE_INTEGER);

  const prefix = join(resolve(out), 'train');
  const description = join(resolve(out), 'generated.json');
  const content = `${JSON.stringify({ version: DRAWING_VERSION, identities, imagesPerIdentity, seed })}\n`;
  const { rec } = packedFiles(prefix);
  if ((await exists(rec)) && (await exists(description))) {
    if ((await readFile(description, 'utf8')) === content) return rec;
  }
  await refuseExisting(prefix);

  const total = identities * imagesPerIdentity;
  const starts = Array.from({ length: Math.ceil(total / STRIP) }, (_, i) => i * STRIP);
  const writer = await RecordWriter.create(prefix);
  try {
    // Before the .rec takes its place: a set without its description could not be told from another.
    await writeFileAtomic(description, [content]);
    for (let i = 0; i < starts.length; i += STRIPS_IN_FLIGHT) {
      throwIfAborted(signal, 'drawing faces');
      const strips = await Promise.all(
        starts.slice(i, i + STRIPS_IN_FLIGHT).map((start) =>
          drawStrip(
            seed,
            Array.from({ length: Math.min(STRIP, total - start) }, (_, k) => ({
              identity: Math.floor((start + k) / imagesPerIdentity),
              image: (start + k) % imagesPerIdentity,
            })),
          ),
        ),
      );
      for (const jpeg of strips.flat()) {
        await writer.add(Math.floor(writer.images / imagesPerIdentity), jpeg);
      }
      onProgress?.({ phase: 'drawing', done: writer.images, total });
    }
    await writer.finish(Array.from({ length: identities }, (_, i) => `face-${i + 1}`));
  } catch (error) {
    await rm(description, { force: true });
    await writer.abort();
    throw error;
  }
  return rec;
}

function requireInteger(name: string, value: number, low: number, high: number): void {
  if (!Number.isInteger(value) || value < low || value > high) {
    throw new HardmineError(
      'ERR_INPUT',
      `${name} of the generated faces is ${value}: give a whole number from ${low} to ${high}.`,
    );
  }
}
