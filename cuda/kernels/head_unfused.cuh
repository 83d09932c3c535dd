// The unfused margin-softmax head: the textbook chain, each operation a kernel or a library's
// product of its own over buffers of its own, as an eager framework runs it. It is the rival that
// the fused head is measured against, so its passes are coalesced, read each number once and move
// 16 bytes a thread where they can.
//
//   forward   x_hat, w_hat (normalise_rows);  cosines = x_hat w_hat^T (product);  margin_rows,
//             apply_margin: margined = cosines, psi at the target;  scale_rows: logits = s
//             margined; softmax_rows, finish_rows: loss, weighting;  log_softmax
//   backward  softmax_backward: d logits = f (e^log p - onehot);  scale_rows: d margined = s d
//             logits;  scale_backward: ds = d logits . margined (A-Softmax);  margin_backward: d
//             cosines = psi' d margined;  convert: its copy in T;  d x_hat, d w_hat (products);
//             normalise_backward of both;  add_radial (A-Softmax);
//             update_parameters
//   softmax   leaves out normalisation, margin and scale: add_bias, column_sums
//   Euclidean margin   leaves out the margin; hinge_rows in place of softmax_rows, hinge_backward
//   of
//             log_softmax and softmax_backward
//
// Before it is rounded to 16 bits the gradient is scaled, as by a loss scale, with finish_rows'
// power of two.
//
// Nothing is fused and nothing stays out of memory: seven matrices [N, classes] in fp32 and, with
// 16-bit operands, one in T.
//
// Shapes: matrices of logits [N, padded], row-major, classes padded with zeros to kWidthMultiple;
// x_hat [N, dim] and w_hat [padded, dim] in T.
#pragma once

#include "cuda/kernels/head.cuh"
#include "cuda/kernels/linear.cuh"

namespace hardmine::cuda {

// What all the passes over a matrix of logits know of it.
struct LogitMatrix {
  int classes;
  int padded;
  const int* labels;  // [rows]
};

// A thread of an element-wise pass takes 4 neighbours of row blockIdx.x.
inline constexpr int kCellThreads = 256;
inline constexpr int kCells = 4;

// output[at] = value(j, input[at]) for this thread's cells, 0 in the padding.
template <typename Value>
__device__ void each_cell(const LogitMatrix& m, const float* input, float* output, Value value) {
  const int first = static_cast<int>(blockIdx.y * kCellThreads + threadIdx.x) * kCells;
  if (first >= m.padded) return;
  const int64_t start = int64_t{blockIdx.x} * m.padded + first;
  Pack<float, kCells> cells = load<kCells>(input + start);
#pragma unroll
  for (int e = 0; e < kCells; ++e)
    cells.at[e] = first + e < m.classes ? value(first + e, cells.at[e]) : 0.0F;
  store(output + start, cells);
}

// ---- Forward ----

// One block a row: the target's cosine from the operands of the product in double, for acos near 1
// multiplies its error, and the margin there.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    margin_rows(PrepareArguments a, const T* __restrict__ normalised,
                const float* __restrict__ norms, const T* __restrict__ class_weights,
                const float* __restrict__ bias, RowTarget* __restrict__ targets) {
  struct DotTag {};
  const int row = static_cast<int>(blockIdx.x);
  const int label = a.labels[row];
  const T* x = normalised + int64_t{row} * a.dim;
  const T* w = class_weights + int64_t{label} * a.dim;
  double dot = 0;
  for (int k = static_cast<int>(threadIdx.x); k < a.dim; k += kRowThreads)
    dot += static_cast<double>(to_float(x[k])) * to_float(w[k]);
  dot = block_sum<DotTag>(dot);
  if (threadIdx.x == 0) targets[row] = target_of_row(a, dot, norms[row], bias, label);
}

static __global__ void __launch_bounds__(kCellThreads)
    apply_margin(LogitMatrix m, const RowTarget* __restrict__ targets,
                 const float* __restrict__ cosines, float* __restrict__ margined) {
  const int label = m.labels[blockIdx.x];
  const float margin = targets[blockIdx.x].margin;
  each_cell(m, cosines, margined,
            [&](int j, float cosine) { return j == label ? margin : cosine; });
}

// The logits from the cosines; the gradient of the cosines from that of the logits.
static __global__ void __launch_bounds__(kCellThreads)
    scale_rows(LogitMatrix m, const RowTarget* __restrict__ targets,
               const float* __restrict__ input, float* __restrict__ output) {
  const float scale = targets[blockIdx.x].scale;
  each_cell(m, input, output, [&](int, float value) { return scale * value; });
}

static __global__ void __launch_bounds__(kCellThreads)
    add_bias(LogitMatrix m, const float* __restrict__ bias, const float* __restrict__ products,
             float* __restrict__ logits) {
  each_cell(m, products, logits, [&](int j, float product) { return product + bias[j]; });
}

// One block a row: the softmax sum of its logits. The target is left out and joined in finish_rows,
// so that a loss near 0 keeps its digits.
template <int threads>
__global__ void __launch_bounds__(threads)
    softmax_rows(LogitMatrix m, const float* __restrict__ logits,
                 SoftmaxSum<float>* __restrict__ sums) {
  const int row = static_cast<int>(blockIdx.x);
  const SoftmaxSum<float> sum =
      softmax_of_row<threads>(logits + int64_t{row} * m.padded, m.classes, m.labels[row],
                              [](int, float logit) { return logit; });
  if (threadIdx.x == 0) sums[row] = sum;
}

// One block a row: the hinges of its logits, the target left out.
template <int threads>
__global__ void __launch_bounds__(threads)
    hinge_rows(LogitMatrix m, const RowTarget* __restrict__ targets,
               const float* __restrict__ logits, HingeSum<float>* __restrict__ sums) {
  const int row = static_cast<int>(blockIdx.x);
  const HingeSum<float> sum =
      hinges_of_row<threads>(logits + int64_t{row} * m.padded, m.classes, m.labels[row],
                             targets[row].threshold, [](float logit) { return logit; });
  if (threadIdx.x == 0) sums[row] = sum;
}

static __global__ void __launch_bounds__(kCellThreads)
    log_softmax(LogitMatrix m, const RowGradient* __restrict__ gradients,
                const float* __restrict__ losses, const float* __restrict__ logits,
                float* __restrict__ log_probabilities) {
  const int label = m.labels[blockIdx.x];
  const float log_sum = gradients[blockIdx.x].log_sum, loss = losses[blockIdx.x];
  each_cell(m, logits, log_probabilities,
            [&](int j, float logit) { return j == label ? -loss : logit - log_sum; });
}

// ---- Backward ----

static __global__ void __launch_bounds__(kCellThreads)
    softmax_backward(LogitMatrix m, const RowGradient* __restrict__ gradients,
                     const float* __restrict__ log_probabilities, float* __restrict__ grad_logits) {
  const int label = m.labels[blockIdx.x];
  const RowGradient gradient = gradients[blockIdx.x];
  each_cell(m, log_probabilities, grad_logits, [&](int j, float log_p) {
    return gradient.factor * (j == label ? gradient.target : __expf(log_p));
  });
}

static __global__ void __launch_bounds__(kCellThreads)
    hinge_backward(LogitMatrix m, const RowTarget* __restrict__ targets,
                   const RowGradient* __restrict__ gradients, const float* __restrict__ logits,
                   float* __restrict__ grad_logits) {
  const int label = m.labels[blockIdx.x];
  const RowGradient gradient = gradients[blockIdx.x];
  const float threshold = targets[blockIdx.x].threshold;
  each_cell(m, logits, grad_logits, [&](int j, float logit) {
    const float active = logit - threshold > 0.0F ? 1.0F : 0.0F;
    return gradient.factor * (j == label ? gradient.target : active);
  });
}

inline constexpr int kReduceThreads = 256;

// One block a row: the gradient of its scale, which is ||x|| in A-Softmax.
static __global__ void __launch_bounds__(kReduceThreads)
    scale_backward(LogitMatrix m, const float* __restrict__ grad_logits,
                   const float* __restrict__ margined, float* __restrict__ grad_scale) {
  struct SumTag {};
  const int64_t start = int64_t{blockIdx.x} * m.padded;  // the padding is 0 in both
  float sum = 0;
  for (int j = static_cast<int>(threadIdx.x) * kCells; j < m.padded; j += kReduceThreads * kCells) {
    const Pack<float, kCells> a = load<kCells>(grad_logits + start + j);
    const Pack<float, kCells> b = load<kCells>(margined + start + j);
#pragma unroll
    for (int e = 0; e < kCells; ++e) sum += a.at[e] * b.at[e];
  }
  sum = block_sum<SumTag>(sum);
  if (threadIdx.x == 0) grad_scale[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(kCellThreads)
    margin_backward(LogitMatrix m, const RowTarget* __restrict__ targets,
                    const float* __restrict__ grad_margined, float* __restrict__ grad_cosines) {
  const int label = m.labels[blockIdx.x];
  const float derivative = targets[blockIdx.x].derivative;
  each_cell(m, grad_margined, grad_cosines,
            [&](int j, float gradient) { return j == label ? gradient * derivative : gradient; });
}

// One warp a row of [rows, dim]: backward through v_hat = v / ||v||, in place or not; without
// `cosines` the gradient as it is. `row_scale` is null where the gradient was not scaled. With
// `add` it is added to what `output`, then another array than `gradient`, holds.
static __global__ void __launch_bounds__(kRowThreads)
    normalise_backward(const float* gradient, const float* __restrict__ row_scale, int64_t rows,
                       int dim, bool cosines, bool add, const float* __restrict__ values,
                       const float* __restrict__ norms, float* output) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t row = int64_t{blockIdx.x} * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= rows) return;  // a whole warp
  const float unscale = row_scale == nullptr ? 1.0F : 1.0F / *row_scale;
  const float inverse = cosines ? 1.0F / norms[row] : 1.0F;
  const int64_t start = row * dim;
  float along = 0;
  if (cosines) {
    for (int k = lane; k < dim; k += kWarpSize)
      along += gradient[start + k] * unscale * (values[start + k] * inverse);
    along = warp_sum(along);
  }
  for (int k = lane; k < dim; k += kWarpSize) {
    const float across = gradient[start + k] * unscale - along * (values[start + k] * inverse);
    output[start + k] = (add ? output[start + k] : 0.0F) + across * inverse;
  }
}

// One warp a row: the part of the gradient through the scale ||x||.
static __global__ void __launch_bounds__(kRowThreads)
    add_radial(const float* __restrict__ embeddings, const float* __restrict__ norms, int rows,
               int dim, const float* __restrict__ grad_scale, float* __restrict__ gradient) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int row =
      static_cast<int>(blockIdx.x * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize);
  if (row >= rows) return;
  const float radial = grad_scale[row] / norms[row];
  for (int k = lane; k < dim; k += kWarpSize) {
    const int64_t at = int64_t{row} * dim + k;
    gradient[at] += radial * embeddings[at];
  }
}

// v = momentum v + (g + decay w), w -= lr v.
static __global__ void __launch_bounds__(kRangeThreads)
    update_parameters(const StepParameters* __restrict__ settings,
                      const int* __restrict__ non_finite, bool is_bias, int64_t count,
                      const float* __restrict__ gradient, float* __restrict__ values,
                      float* __restrict__ velocity) {
  if (*non_finite != 0) return;
  const int64_t at = (int64_t{blockIdx.x} * kRangeThreads + threadIdx.x) * kRangeWidth;
  const StepParameters s = *settings;
  const float decay = is_bias && s.decay_all == 0 ? 0.0F : s.weight_decay;
  const Pack<float, kRangeWidth> g = load_range(gradient, at, count);
  Pack<float, kRangeWidth> w = load_range(values, at, count);
  Pack<float, kRangeWidth> v = load_range(velocity, at, count);
#pragma unroll
  for (int i = 0; i < kRangeWidth; ++i) {
    v.at[i] = s.momentum * v.at[i] + (g.at[i] + decay * w.at[i]);
    w.at[i] -= s.lr * v.at[i];
  }
  store_range(velocity, at, count, v);
  store_range(values, at, count, w);
}

}  // namespace hardmine::cuda
