/** Experiments that come with hardmine; where the data lie is the user's to say. */

/** The paper's six losses, as "Hard-Mining Loss based CNN for Face Recognition" names them. */
const PAPER = [
  { name: 'CE', loss: 'softmax', base: null },
  { name: 'HM-CE', loss: 'softmax', base: 'CE' },
  { name: 'A-Softmax', loss: 'a-softmax', base: null },
  { name: 'HM-A-Softmax', loss: 'a-softmax', base: 'A-Softmax' },
  { name: 'ArcFace', loss: 'arcface', base: null },
  { name: 'HM-ArcFace', loss: 'arcface', base: 'ArcFace' },
] as const;

/** Tables 1 and 2 of the paper: LFW and YTF accuracy after training on each set. */
const CASIA = [
  { lfw: 0.9535, ytf: 0.918 },
  { lfw: 0.9675, ytf: 0.931 },
  { lfw: 0.9712, ytf: 0.939 },
  { lfw: 0.973, ytf: 0.941 },
  { lfw: 0.9779, ytf: 0.9454 },
  { lfw: 0.979, ytf: 0.9467 },
];
const MS1M = [
  { lfw: 0.951, ytf: 0.9245 },
  { lfw: 0.951, ytf: 0.925 },
  { lfw: 0.969, ytf: 0.941 },
  { lfw: 0.9705, ytf: 0.938 },
  { lfw: 0.976, ytf: 0.951 },
  { lfw: 0.98, ytf: 0.949 },
];

/**
 * The paper's rows, and the controls that it lacks. While no loss is small, hard mining by Equation 2
 * multiplies every gradient by 1.5, so its gain may be that of a larger learning rate; and read
 * literally, its loss weights the mean of the batch, which mines nothing inside it.
 */
function paperRows(
  published: readonly Record<string, number>[],
  settings: Record<string, object> = {},
): object[] {
  const rows = PAPER.map(({ name, loss, base }, i) => ({
    name,
    config: { loss, ...settings[loss], weighting: base === null ? 'none' : 'hard-mining' },
    ...(base !== null && { against: base }),
    published: published[i]!,
  }));
  const controls = PAPER.map(({ name, loss, base }) =>
    base === null
      ? {
          name: `${name}, lr x1.5`,
          config: { loss, ...settings[loss], weighting: 'none' },
          lrFactor: 1.5,
          against: name,
        }
      : {
          name: `${name}, batch mean`,
          config: {
            loss,
            ...settings[loss],
            weighting: { kind: 'hard-mining', reduction: 'batch' },
          },
          against: base,
        },
  );
  return [...rows, ...controls];
}

/** Every identity trains, and the model of the last epoch counts, as in the paper; the rest of its recipe is the default. */
const LAST_EPOCH = { validation: 'none', validateEvery: 1_000_000 };

const PAPER_NOTE =
  "The paper gives neither scale, margins, momentum nor weight decay: these are hardmine's defaults. Its figures come from single runs.";

export const presets: Readonly<Record<string, Record<string, unknown>>> = {
  'paper-casia': {
    name: "The paper's Table 1",
    note: PAPER_NOTE,
    publishedData: 'CASIA-WebFace',
    evaluate: ['lfw', 'ytf'],
    seeds: [1, 2, 3],
    config: LAST_EPOCH,
    rows: paperRows(CASIA),
  },
  'paper-ms1m': {
    name: "The paper's Table 2",
    note: PAPER_NOTE,
    publishedData: 'MS-Celeb-1M',
    evaluate: ['lfw', 'ytf'],
    seeds: [1, 2, 3],
    config: LAST_EPOCH,
    rows: paperRows(MS1M),
  },
  // The poster names neither gamma nor its training data; it trained on 3.7 million images.
  'knot-magnify': {
    name: 'Knot Magnify and center loss',
    note: 'The poster gives no gamma: 2 is ours, between the 1 and the 8 of its table.',
    publishedData: '3.7 million images, not named',
    evaluate: ['lfw', 'lfw-rank-1', 'cfp-ff', 'cfp-fp'],
    seeds: [1, 2, 3],
    config: { ...LAST_EPOCH, loss: 'softmax' },
    rows: [
      {
        name: 'softmax',
        config: { weighting: 'none' },
        published: { lfw: 0.991, 'cfp-ff': 0.9919, 'cfp-fp': 0.9127 },
      },
      {
        name: 'KM',
        config: { weighting: { kind: 'knot-magnify', gamma: 2 } },
        against: 'softmax',
        published: { lfw: 0.9931, 'cfp-ff': 0.9943, 'cfp-fp': 0.9171 },
      },
      {
        name: 'KM + center',
        config: { weighting: { kind: 'knot-magnify', gamma: 2 }, center: {} },
        against: 'KM',
        published: { lfw: 0.9953, 'cfp-ff': 0.9946, 'cfp-fp': 0.9339 },
      },
    ],
  },
  // A few hundred identities need more than the paper's recipe gives a margin loss to start with
  // (docs/losses.md): a batch-norm on the embedding, a smaller scale, a margin that grows, a larger
  // learning rate. Softmax and A-Softmax, whose logits grow with the embedding's norm, start without.
  'faces-small': {
    name: "The paper's losses on a small set of faces",
    note: 'Small data and a short recipe: the differences between rows are of interest, not the accuracies.',
    publishedData: 'CASIA-WebFace',
    evaluate: ['lfw'],
    seeds: [1, 2, 3],
    config: { ...LAST_EPOCH, lr: 0.02, embeddingNorm: 'none' },
    rows: paperRows(CASIA, {
      arcface: { scale: 16, margin: 0.2, marginWarmUp: 3, lr: 0.1, embeddingNorm: 'batch' },
    }),
  },
};
