/** Tables in the form of MS-Celeb-1M, written from their description. */

/** A JPEG with `mark` in a comment (T.81, B.2.4.5), so that images of one colour differ in bytes. */
export function marked(jpeg: Buffer, mark: string): Buffer {
  const head = Buffer.from([0xff, 0xfe, 0, 2 + mark.length]);
  return Buffer.concat([jpeg.subarray(0, 2), head, Buffer.from(mark, 'latin1'), jpeg.subarray(2)]);
}

export interface TableRow {
  mid: string;
  rank: number;
  /** 0 by default. */
  face?: number;
  image: Buffer;
  /** Length of the page's URL; real ones take some 60 bytes. */
  url?: number;
}

/** One row, its line break included. */
export function tableRow({ mid, rank, face = 0, image, url = 60 }: TableRow): string {
  const rectangle = Buffer.alloc(16);
  for (const [i, value] of [0.1, 0.2, 0.8, 0.9].entries()) rectangle.writeFloatLE(value, 4 * i);
  const columns = [
    mid,
    rank,
    'http://images.example/a.jpg',
    'http://pages.example/'.padEnd(url, 'x'),
    `FaceId-${face}`,
    rectangle.toString('base64'),
    image.toString('base64'),
  ];
  return `${columns.join('\t')}\n`;
}
