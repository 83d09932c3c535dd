/** Boxes around faces: their overlap, and the choice among those that overlap. */

/** In pixels: the left edge of the first pixel is at 0, so that a box of whole pixels has whole numbers. */
export interface Box {
  x: number;
  y: number;
  width: number;
  height: number;
}

export interface ScoredBox extends Box {
  /** How certain the detector is, 0 to 1. */
  score: number;
}

/** The shared area over that of both together ('union') or of the smaller one ('min'); 0 to 1. */
export function overlap(a: Box, b: Box, over: 'union' | 'min'): number {
  const width = Math.min(a.x + a.width, b.x + b.width) - Math.max(a.x, b.x);
  const height = Math.min(a.y + a.height, b.y + b.height) - Math.max(a.y, b.y);
  if (!(width > 0 && height > 0)) return 0;
  const shared = width * height;
  const areaA = a.width * a.height;
  const areaB = b.width * b.height;
  return shared / (over === 'min' ? Math.min(areaA, areaB) : areaA + areaB - shared);
}

/**
 * Non-maximum suppression: goes through the boxes from the most certain to the least and keeps each
 * that overlaps none kept before by more than `threshold`; of equally certain ones the first comes first.
 */
export function suppress<T extends ScoredBox>(
  boxes: readonly T[],
  threshold: number,
  over: 'union' | 'min',
): T[] {
  const kept: T[] = [];
  // Edges of the kept boxes side by side, since a crowd takes some ten million comparisons.
  const edges = new Float64Array(4 * boxes.length);
  for (const box of [...boxes].sort((a, b) => b.score - a.score)) {
    const { x, y, width, height } = box;
    const [right, bottom] = [x + width, y + height];
    let free = true;
    for (let i = 0; free && i < kept.length; i++) {
      const apart =
        edges[4 * i]! >= right ||
        edges[4 * i + 1]! >= bottom ||
        edges[4 * i + 2]! <= x ||
        edges[4 * i + 3]! <= y;
      free = apart || overlap(kept[i]!, box, over) <= threshold;
    }
    if (!free) continue;
    edges.set([x, y, right, bottom], 4 * kept.length);
    kept.push(box);
  }
  return kept;
}

/** The square around the middle of a box with its longer side. */
export function squared<T extends Box>(box: T): T {
  const side = Math.max(box.width, box.height);
  return {
    ...box,
    x: box.x + (box.width - side) / 2,
    y: box.y + (box.height - side) / 2,
    width: side,
    height: side,
  };
}
