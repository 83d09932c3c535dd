import { type Command, Option } from 'commander';
import { type AlignFolderResult, alignFolder } from '../align/align-folder.js';
import {
  ALIGNER_DEFAULTS,
  FACE_CHOICES,
  FALLBACKS,
  type FaceChoice,
  type Fallback,
} from '../align/aligner.js';
import { SMALLEST_FACE } from '../align/mtcnn.js';
import { FACE_SIZES, type FaceSize } from '../align/similarity.js';
import {
  type CommonOptions,
  makeCommand,
  output,
  percent,
  progressNote,
  wholeNumber,
} from './command.js';
import { stopOnInterrupt } from './interrupt.js';

interface Options extends CommonOptions {
  mtcnn?: string;
  landmarks?: string;
  size: FaceSize;
  minFace: number;
  face: FaceChoice;
  fallback: Fallback;
}

/** Images without a face that people are shown; --json lists all. */
const SHOWN = 20;

export function alignCommand(): Command {
  return makeCommand(
    'align',
    'Find the face in every photograph (MTCNN) and cut it out, aligned to the five-point template.',
    'hardmine align photos/ faces/ --mtcnn mtcnn/',
  )
    .argument('<in>', 'photograph, or folder of them; what lies below keeps its place')
    .argument(
      '<out>',
      'folder for the crops (JPEG) and landmarks.tsv; a run that was stopped goes on',
    )
    .option('--mtcnn <dir>', "folder with MTCNN's det1.npy, det2.npy and det3.npy")
    .addOption(
      new Option(
        '--landmarks <file>',
        "take these landmarks instead: TSV of image and ten numbers, or CelebA's list",
      ).conflicts(['mtcnn', 'minFace', 'face', 'fallback']),
    )
    .addOption(
      new Option('--size <height x width>', 'size of the crops')
        .choices(FACE_SIZES)
        .default(ALIGNER_DEFAULTS.size),
    )
    .option(
      '--min-face <pixels>',
      'side of the smallest face to look for',
      wholeNumber(SMALLEST_FACE),
      ALIGNER_DEFAULTS.minFace,
    )
    .addOption(
      new Option(
        '--face <rule>',
        'of several faces: center-large (area less twice the squared distance to the middle), largest or most-certain',
      )
        .choices(FACE_CHOICES)
        .default(ALIGNER_DEFAULTS.face),
    )
    .addOption(
      new Option(
        '--fallback <rule>',
        'without a face: skip, or take the middle of the image (center)',
      )
        .choices(FALLBACKS)
        .default(ALIGNER_DEFAULTS.fallback),
    )
    .action(align);
}

async function align(input: string, out: string, options: Options): Promise<void> {
  const { mtcnn, landmarks, size, minFace, face, fallback } = options;
  using interrupt = stopOnInterrupt('the same command goes on from here');
  const result = await alignFolder(input, out, {
    ...(mtcnn !== undefined && { mtcnn }),
    ...(landmarks !== undefined && { landmarks }),
    ...{ size, minFace, face, fallback },
    onProgress: progressNote('aligning'),
    onWarning: output.warning,
    signal: interrupt.signal,
  });
  if (options.json) output.json(result);
  else output.result(describe(out, result));
}

function describe(out: string, result: AlignFolderResult): string {
  const { images, aligned, earlier, several, fallback, withoutFace, otherFiles } = result;
  const found = aligned - fallback.length;
  const speed =
    result.imagesPerSecond === null ? '' : `, ${result.imagesPerSecond.toFixed(1)} a second`;
  const lines = [
    `${out}: ${aligned} crops of ${images} images${earlier > 0 ? `, ${earlier} of them done before` : ''}${speed}`,
    `face found in ${found} (${percent(found / images)}), more than one in ${several} (${percent(several / images)}), none in ${images - found} (${percent(1 - found / images)})`,
  ];
  const list = (what: string, names: readonly string[]): void => {
    if (names.length === 0) return;
    const more =
      names.length > SHOWN ? `, and ${names.length - SHOWN} more (--json lists all)` : '';
    lines.push(`${what}: ${names.slice(0, SHOWN).join(', ')}${more}`);
  };
  list('no crop', withoutFace);
  list('middle of the image', fallback);
  list('left out, since no .jpg, .jpeg or .png (convert what is a photograph)', otherFiles);
  return lines.join('\n');
}
