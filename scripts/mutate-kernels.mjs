// Shows that the emulator's tests notice bugs: plants them one at a time in a copy of the CUDA sources,
// compiles what sees them and runs the tests. Prints a table; exits 1 when a bug goes unnoticed or
// its line is no longer there. Needs g++ and doctest, no CUDA. `node scripts/mutate-kernels.mjs
// [REGEXP]` plants only the bugs whose description it matches.

import { availableParallelism } from 'node:os';
import { basename, join } from 'node:path';
import { checkPlaces, compile, doctest, each, inTemporaryFolder, link, plant } from './mutants.mjs';

// `mutated` is compiled for each bug, `fixed` once. The fixed ones use nothing of a planted line.
const UNITS = {
  head: {
    mutated: 'cuda/head.cu',
    fixed: [
      'test/native/main.cpp',
      'test/simt/head_test.cpp',
      'test/simt/fake_libraries.cpp',
      'cuda/device.cpp',
      'cuda/runtime.cpp',
      'cuda/libraries.cpp',
      'cuda/products.cpp',
    ],
  },
  engines: {
    mutated: 'cuda/engines.cpp',
    fixed: [
      'test/native/main.cpp',
      'test/simt/runtime_test.cpp',
      'test/simt/fake_libraries.cpp',
      'cuda/convolution.cpp',
      'cuda/libraries.cpp',
      'cuda/norm_graph.cpp',
      'cuda/products.cpp',
      'cuda/runtime.cpp',
    ],
  },
  network: {
    mutated: 'test/simt/network_kernels_test.cpp',
    fixed: ['test/native/main.cpp', 'cuda/runtime.cpp'],
  },
  session: {
    mutated: 'cuda/network.cu',
    fixed: [
      'test/native/main.cpp',
      'test/simt/session_test.cpp',
      'test/simt/fake_libraries.cpp',
      'cuda/convolution.cpp',
      'cuda/device.cpp',
      'cuda/embedder.cu',
      'cuda/engines.cpp',
      'cuda/head.cu',
      'cuda/libraries.cpp',
      'cuda/norm_graph.cpp',
      'cuda/products.cpp',
      'cuda/runtime.cpp',
      'cuda/session.cu',
      'core/folding.cpp',
      'core/initialise.cpp',
      'core/tensors.cpp',
    ],
  },
};

// What trains, of which other files are mutated.
UNITS.steps = {
  mutated: 'cuda/session.cu',
  fixed: UNITS.session.fixed.map((file) => (file === 'cuda/session.cu' ? 'cuda/network.cu' : file)),
};

const HEAD = 'cuda/kernels/head.cuh';
const UNFUSED = 'cuda/kernels/head_unfused.cuh';
const PIPELINE = 'cuda/head_pipeline.h';
const CENTER = 'cuda/kernels/center.cuh';
const MATHS = 'core/loss_maths.h';
const BUGS = [
  {
    bug: "the sign of the weight norm's backward",
    file: HEAD,
    from: 'g[i] = (g[i] - along * w[i] * inverse) * inverse;',
    to: 'g[i] = (g[i] + along * w[i] * inverse) * inverse;',
  },
  {
    bug: 'the last class of a chunk left out of the softmax',
    file: HEAD,
    from: 'const bool counts = j + e < width && j + e != target;',
    to: 'const bool counts = j + e < width - 1 && j + e != target;',
  },
  {
    bug: 'the last class of a chunk left out of the gradient',
    file: HEAD,
    from: 'if (j < chunk.width && j != target) value = probability',
    to: 'if (j < chunk.width - 1 && j != target) value = probability',
  },
  {
    bug: 'no margin at the target',
    file: HEAD,
    from: 'target.logit = static_cast<double>(target.scale) * psi.value;',
    to: 'target.logit = static_cast<double>(target.scale) * dot;',
  },
  {
    bug: 'no warm-up of the margin',
    file: HEAD,
    from: 'law = warmed_up(law, a.settings->margin_factor);',
    to: '',
  },
  {
    bug: "the gate's derivative lost: HM(L) / L instead of dHM/dL",
    file: HEAD,
    from: 'const float factor = weighted.gradient_weight / static_cast<float>(a.rows);',
    to: 'const float factor = weighted.weighted / loss / static_cast<float>(a.rows);',
  },
  {
    bug: "another row's softmax sum in the gradient",
    file: HEAD,
    from: 'const float scale = targets[row].scale, log_sum = gradients[row].log_sum;',
    to: 'const float scale = targets[row].scale, log_sum = gradients[0].log_sum;',
  },
  {
    bug: 'no weight decay of the class weights',
    file: HEAD,
    from: 'momentum * v_pack.at[e] + (g[i + e] + weight_decay * w[i + e]);',
    to: 'momentum * v_pack.at[e] + g[i + e];',
  },
  {
    bug: 'weight decay of the bias whatever decayAll says',
    file: HEAD,
    from: '(s.decay_all != 0 ? s.weight_decay * bias[c] : 0.0F)',
    to: '(s.weight_decay * bias[c])',
  },
  {
    bug: 'the operands of the next step normalised by the old norm',
    file: HEAD,
    from: 'from_float<T>(w[i + e] * new_inverse);',
    to: 'from_float<T>(w[i + e] * inverse);',
  },
  {
    bug: "rows of an earlier step's labels chained to a class",
    file: HEAD,
    from: 'return row != kNoRow && row < rows && labels[row] == c ? row : kNoRow;',
    to: 'return row != kNoRow && row < rows ? row : kNoRow;',
  },
  {
    bug: "the target's share lost from A-Softmax's radial gradient",
    file: HEAD,
    from: 'norm_scale ? gradient.factor * (others + gradient.target * target.margin) : 0.0F;',
    to: 'norm_scale ? gradient.factor * others : 0.0F;',
  },
  {
    bug: 'every step in the first slot of the ring',
    file: HEAD,
    from: 'a.ring.records[*a.ring.steps % static_cast<unsigned>(a.ring.size)] = {',
    to: 'a.ring.records[0] = {',
  },
  {
    bug: 'a NaN that reaches the weights',
    file: HEAD,
    from: '} else if (a.settings != nullptr && *a.non_finite == 0) {',
    to: '} else if (a.settings != nullptr) {',
  },
  {
    bug: 'pairs of the same identity in the mean cosine',
    file: HEAD,
    from: 'same += own * own;',
    to: 'same += 0 * own;',
  },
  {
    bug: "a chunk's gradient overwritten before SGD has read it",
    file: PIPELINE,
    from: 'if (step >= 2) main.wait(side.done[step % 2]);  // `weight_products` is free again',
    to: '',
  },
  {
    bug: 'SGD of a chunk that does not wait for its gradient',
    file: PIPELINE,
    from: 'side.fork(main);\n    update(chunk, weight_products, side.stream());',
    to: 'update(chunk, weight_products, side.stream());',
  },
  {
    bug: "unfused: no margin's derivative",
    file: UNFUSED,
    from: 'return j == label ? gradient * derivative : gradient;',
    to: 'return gradient;',
  },
  {
    bug: 'unfused: the bias never decays',
    file: UNFUSED,
    from: 'is_bias && s.decay_all == 0 ? 0.0F : s.weight_decay;',
    to: 'is_bias ? 0.0F : s.weight_decay;',
  },
  {
    bug: "Knot Magnify: the ratio in place of the loss's derivative",
    file: MATHS,
    from: 'ratio * (T(1) + T(2) * knot.gamma_p * knot.inverse * loss)};',
    to: 'ratio};',
  },
  {
    bug: 'hinges: one that is exactly 0 counts as active',
    file: MATHS,
    from: 'if (!(hinge <= T(0))) {',
    to: 'if (!(hinge < T(0))) {',
  },
  {
    bug: 'hinges: a class of exactly 0 gets a gradient',
    file: HEAD,
    from: 'return scale * cosine - threshold > 0.0F ? 1.0F : 0.0F;',
    to: 'return scale * cosine - threshold >= 0.0F ? 1.0F : 0.0F;',
  },
  {
    bug: 'hinges: their gradient is not shared out among the active classes',
    file: HEAD,
    from: 'gradient.factor *= factor;  // it held the unit',
    to: 'gradient.factor = factor;',
  },
  {
    bug: 'hinges: no warm-up of their margin',
    file: HEAD,
    from: ': warmed_up(a.euclidean, a.settings->margin_factor);',
    to: ': a.euclidean;',
  },
  {
    bug: 'hinges: a target of many active classes beyond fp16',
    file: HEAD,
    from: 'gradient.factor * fmaxf(1.0F, -gradient.target) *',
    to: 'gradient.factor *',
  },
  {
    bug: "hinges, unfused: the target's gradient lost",
    file: UNFUSED,
    from: 'return gradient.factor * (j == label ? gradient.target : active);',
    to: 'return gradient.factor * (j == label ? 0.0F : active);',
  },
  {
    bug: 'centers: their gradient overwritten by that of the base loss',
    file: HEAD,
    from: 'const float before = add ? output[start + k] : 0.0F;',
    to: 'const float before = 0.0F;',
  },
  {
    bug: 'centers: moved by n instead of 1 + n',
    file: CENTER,
    from: 'a.law.rate / (1 + count) * sum',
    to: 'a.law.rate / count * sum',
  },
  {
    bug: 'centers: moved by every row of a class',
    file: CENTER,
    from: 'if (class_rows[label] != first || *non_finite != 0) return;',
    to: 'if (*non_finite != 0) return;',
  },
  {
    bug: 'centers: moved by a batch that is not finite',
    file: CENTER,
    from: 'if (class_rows[label] != first || *non_finite != 0) return;',
    to: 'if (class_rows[label] != first) return;',
  },
  {
    bug: 'batch-norm: the biased variance in the running one',
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'squares.at[i] / (count - 1.0F) - running_variance.at[i]',
    to: 'squares.at[i] / count - running_variance.at[i]',
  },
  {
    bug: 'batch-norm: the mean of squares taken for the variance, of sums that came with the map',
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'squares.at[i] = positive(static_cast<float>(squares.at[i] - sum * sum * share));',
    to: '',
  },
  {
    bug: 'batch-norm: the mean of the gradient not taken away',
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'constant.at[i] = -scale.at[i] * beta.at[i] * share;',
    to: 'constant.at[i] = 0;',
  },
  {
    bug: 'batch-norm in one kernel: the last block is not waited for',
    unit: 'network',
    file: 'cuda/kernels/cooperative.cuh',
    from: 'while (*left != 0) __nanosleep(kPollNanoseconds);',
    to: '',
  },
  {
    bug: 'batch-norm in one kernel: the rows that are read again begin one late',
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'at.first = kept_rows(t, at, kept).last;',
    to: 'at.first = kept_rows(t, at, kept).last + 1;',
  },
  {
    bug: 'batch-norm in one kernel: one row more is kept than there is memory for',
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'if (left-- > 0) writes.next() = values;',
    to: 'if (left-- >= 0) writes.next() = values;',
  },
  {
    bug: 'batch-norm in one kernel: the gradient kept before it is masked',
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'keep(xs[u], masked);',
    to: 'keep(xs[u], gradients[u]);',
  },
  {
    bug: "batch-norm by cuDNN: the running variance moved by its deviations' mean alone",
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'squares.at[i] = variance * static_cast<float>(norm.rows);',
    to: 'squares.at[i] = variance;',
  },
  {
    bug: 'batch-norm by cuDNN: the channels left unfinished',
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: 'finish_batch_norm(work.norm, stream);',
    to: '',
  },
  {
    bug: 'batch-norm by cuDNN: run beside other lanes where no blocks may wait',
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: 'work.library_forward != nullptr && blocks_wait_',
    to: 'work.library_forward != nullptr',
  },
  {
    bug: 'max-pool: the last of equals instead of the first',
    unit: 'network',
    file: 'cuda/kernels/pooling.cuh',
    from: 'if (!any || value > best.at[k] || value != value) {',
    to: 'if (!any || value >= best.at[k] || value != value) {',
  },
  {
    bug: 'SGD: the loss scale not divided out',
    unit: 'network',
    file: 'cuda/kernels/sgd.cuh',
    from: '(g[l].at[i] * step.inverse + decay * w[l].at[i]);',
    to: '(g[l].at[i] + decay * w[l].at[i]);',
  },
  {
    bug: 'input: a mirror image one pixel off',
    unit: 'network',
    file: 'cuda/kernels/input.cuh',
    from: 'from_column = size - 1 - from_column;',
    to: 'from_column = size - from_column;',
  },
  {
    bug: 'batch-norm: sums timed before they have memory',
    unit: 'session',
    file: 'cuda/network_plan.cuh',
    from: 'if (work.forward_with_sums != nullptr || work.norm_forward != nullptr)',
    to: 'if (work.with_sums)',
  },
  {
    bug: 'a batch-norm that its reader applies: the bias forgets the mean',
    unit: 'network',
    file: 'cuda/kernels/batch_norm.cuh',
    from: 'from_float<T>(fmaf(-to_float(scale), mean.at[0], norm.beta[channel]))',
    to: 'from_float<T>(norm.beta[channel])',
  },
  {
    bug: "a batch-norm that its reader applies: its dx over the x that the weights' gradient reads",
    unit: 'session',
    file: 'cuda/network_choices.cuh',
    from: 'void* dx = is ? outputs_[norm].values : input_of(norm);',
    to: 'void* dx = input_of(norm);',
  },
  {
    bug: "a batch-norm that its reader applies: the weights' gradient of a map that is not written",
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: 'work.norm_weights->run(reader_weight_pointers(i), stream);',
    to: 'work.weights->run(weight_pointers(i), stream);',
  },
  {
    bug: "a batch-norm that its reader sums: the gradient of beta in the place of gamma's",
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: 'work.norm_gradient.beta, work.coefficients',
    to: 'work.norm_gradient.gamma, work.coefficients',
  },
  {
    bug: 'ways compared over zeros, where all are equal',
    unit: 'session',
    file: 'cuda/network.cu',
    from: '  if (!deterministic_) fill_with_numbers();\n',
    to: '',
  },
  {
    bug: 'lanes: a step that ends before the last weight gradients',
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: '  }\n  join(Lane::weights);',
    to: '  }',
  },
  {
    bug: 'pending update: parameters read before they are updated',
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: '  join(Lane::weights);\n  fork(Lane::weights, Lane::shortcut);',
    to: '  if (part == 0) join(Lane::weights);\n  fork(Lane::weights, Lane::shortcut);',
  },
  {
    bug: 'pending update: applied once more after a run',
    unit: 'session',
    file: 'cuda/network_of.h',
    from: '    check(cudaMemsetAsync(pending_, 0, sizeof *pending_, stream_.get()), "cudaMemsetAsync");',
    to: '',
  },
  {
    bug: 'pending update: left by prepare()',
    unit: 'session',
    file: 'cuda/network.cu',
    from: '  write_pending({});',
    to: '',
  },
  {
    bug: 'pending update: unscaled by the next loss scale',
    unit: 'network',
    file: 'cuda/kernels/sgd.cuh',
    from: 'scale.inverse, scale.non_finite == 0};',
    to: 'next_loss_scale(scale).inverse, scale.non_finite == 0};',
  },
  {
    bug: 'pending update: the shortcut does not wait for its part',
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: '  fork(Lane::weights, Lane::shortcut);\n',
    to: '',
  },
  {
    bug: 'a batch given back while it is copied',
    unit: 'steps',
    file: 'cuda/session.cu',
    from: '      r.copies.synchronize();  // the source may now give away what it gave\n',
    to: '',
  },
  {
    bug: 'a handle destroyed under the capture of another thread',
    unit: 'engines',
    file: 'cuda/runtime.h',
    from: '    const std::unique_lock alone = no_capture_beside();\n',
    to: '',
  },
  {
    bug: 'engines: a graph that cuDNN calls wrong ends the session',
    unit: 'engines',
    file: 'cuda/engines.cpp',
    from: 'if (code != codes::kBackend && code != codes::kUnavailable) throw;',
    to: 'throw;',
  },
  {
    bug: 'lanes: one workspace for all',
    unit: 'session',
    file: 'cuda/network_of.h',
    from: 'return memory_[static_cast<size_t>(beside_ ? lane : Lane::main)];',
    to: 'return memory_[static_cast<size_t>(Lane::main)];',
  },
  {
    bug: 'lanes: a block that does not wait for its shortcut',
    unit: 'session',
    file: 'cuda/network_passes.cuh',
    from: 'if (work.merges) join(Lane::shortcut);',
    to: '',
  },
  {
    bug: 'lanes: a weight gradient before the gradient that it is of',
    unit: 'session',
    file: 'cuda/network_of.h',
    from: 'if (beside_) side(to).fork(stream_of(from));',
    to: 'if (beside_) side(to).fork(to == Lane::weights && from == Lane::shortcut ? stream_ : stream_of(from));',
  },
  {
    bug: 'lanes: a buffer given away while the shortcut reads it',
    unit: 'session',
    file: 'cuda/lanes.h',
    from: 'if (lane == buffer.lane && lane == Lane::main) {',
    to: 'if (lane != Lane::weights) {',
  },
];

const FLAGS = [
  ...['-isystem', 'test/simt/include', '-I', 'test/simt'],
  '-DHARDMINE_VERSION="with a planted bug"',
];
const LIBRARIES = ['-lpthread', '-ldl'];

const inFlight = availableParallelism();
async function plantAll(bugs) {
  await inTemporaryFolder(async (folder) => {
    const objectOf = (source) => join(folder, `${basename(source)}.o`);
    const units = Object.keys(UNITS).filter((name) => bugs.some(({ unit }) => unit === name));
    const sources = units.flatMap((name) => [UNITS[name].mutated, ...UNITS[name].fixed]);
    await each(new Set(sources), inFlight, (source) =>
      compile(source, objectOf(source), { flags: FLAGS }),
    );
    await each(units, inFlight, async (name) => {
      const program = join(folder, name);
      await link([UNITS[name].mutated, ...UNITS[name].fixed].map(objectOf), program, LIBRARIES);
      const failure = await doctest(program);
      if (failure) throw new Error(`The tests fail without any planted bug:\n${failure.output}`);
    });
    await plant(bugs, {
      folder,
      inFlight,
      async judge({ unit, file }, copy) {
        const object = join(copy, 'mutated.o');
        const program = join(copy, 'test');
        const { mutated } = UNITS[unit];
        const source = file === mutated ? join(copy, file) : mutated;
        await compile(source, object, { first: copy, flags: FLAGS });
        await link([object, ...UNITS[unit].fixed.map(objectOf)], program, LIBRARIES);
        return (await doctest(program))?.by;
      },
    });
  });
}

if (process.argv[2] === '--check') checkPlaces(BUGS);
else {
  const wanted = BUGS.filter(({ bug }) => new RegExp(process.argv[2] ?? '').test(bug));
  await plantAll(wanted.map((bug) => ({ unit: 'head', ...bug })));
}
