// Hard mining over a loss of your own: weightLosses() takes one loss a sample, whatever made them, and
// says what to multiply each sample's gradient with.
//
//   node examples/hard-mining-your-loss.mjs [STEPS]
//
// The loss here is the logistic loss of a line through points, its gradient done by hand; in practice it
// is whatever your framework computes.
import { weightLosses } from 'hardmine';

const steps = Number(process.argv[2] ?? 300);
const weighting = { kind: 'hard-mining', alpha: 1.5, beta: 1.1, A: 35, B: 0.75 };

// What the gate does to a single loss: easy samples are silenced, hard ones amplified.
for (const loss of [0.1, 0.5, 0.68, 0.8, 2, 8]) {
  const { weighted, gradientWeight } = weightLosses([loss], weighting);
  console.log(
    `a loss of ${loss} counts as ${weighted[0].toFixed(3)}, its gradient ${gradientWeight[0].toFixed(3)} times`,
  );
}

// Points on a ring, the right half is class 1; some labels near the border are wrong.
const points = Array.from({ length: 200 }, (_, i) => {
  const angle = (i / 200) * 2 * Math.PI;
  const [x, y] = [Math.cos(angle), Math.sin(angle)];
  return { x, y, label: x > 0 !== (Math.abs(x) < 0.1 && i % 3 === 0) ? 1 : 0 };
});

function train(weigh) {
  const line = { a: 0, b: 0, c: 0 };
  let silenced = 0;
  for (let step = 0; step < steps; step++) {
    const outputs = points.map(
      ({ x, y }) => 1 / (1 + Math.exp(-(line.a * x + line.b * y + line.c))),
    );
    const losses = outputs.map((p, i) => -Math.log(points[i].label === 1 ? p : 1 - p));
    // The one line that hard mining takes.
    const weights = weigh ? weightLosses(losses, weighting).gradientWeight : losses.map(() => 1);
    silenced = weights.filter((weight) => weight < 0.1).length;
    for (const [i, { x, y, label }] of points.entries()) {
      const gradient = (weights[i] * (outputs[i] - label)) / points.length;
      line.a -= gradient * x;
      line.b -= gradient * y;
      line.c -= gradient;
    }
  }
  const right = points.filter(({ x, y, label }) => {
    return line.a * x + line.b * y + line.c > 0 === (label === 1);
  });
  return `${right.length} of ${points.length} points right, ${silenced} silenced in the last step`;
}
console.log(`without hard mining: ${train(false)}`);
console.log(`with hard mining:    ${train(true)}`);
