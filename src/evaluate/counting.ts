/** Counting in sorted numbers. */

/** How many elements of rising `sorted` are less than `value`. */
export function countBelow(sorted: Float64Array, value: number): number {
  return firstWhere(sorted, (element) => element >= value);
}

/** How many elements of rising `sorted` are at most `value`. */
export function countAtMost(sorted: Float64Array, value: number): number {
  return firstWhere(sorted, (element) => element > value);
}

/** Index of the first element that `holds`, which once true must stay true; the length when there is none. */
function firstWhere(sorted: Float64Array, holds: (element: number) => boolean): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holds(sorted[middle]!)) high = middle;
    else low = middle + 1;
  }
  return low;
}
