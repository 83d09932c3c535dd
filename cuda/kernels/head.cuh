// The fused margin-softmax head with hard mining: everything but the matrix products.
//
//   x_hat = x / ||x||,  w_hat = w / ||w||,  cos_ij = x_hat_i . w_hat_j      (products: cuBLASLt)
//   z_ij = s_i cos_ij,  z_iy = s_i psi(cos_iy);   softmax head: z_ij = x_i . w_j + b_j
//   L_i = log sum_j e^z_ij - z_iy,   f_i = dHM/dL at L_i (or at the mean loss)
//   dL/dz_ij = p_ij - [j = y],   gradient of the mean weighted loss: f_i / N times that
//
// Two passes over chunks of classes, because f_i needs the whole row's sum before any gradient:
//   prepare_rows            x_hat, the target's cosine, margin and its derivative; rows chained by
//   class per chunk: product      cos chunk = x_hat W_hat^T, fp32, stays in L2
//              softmax_chunk   (max, sum) of a row over the chunk, best other logit
//   finish_rows             merges the chunks; loss, factor, statistics
//   start_gradients         X_f: rows times their coefficient; dX starts with the target's share
//   per chunk: product      cos chunk again
//              gradient_chunk  dZ = p 2^15 in T, the target's entry 0
//              two products    dX += dZ W_hat;  G = dZ^T X_f
//              sgd_classes     weight-norm backward, decay, momentum, new norm, new W_hat, in one
//              pass
//   finish_embeddings       row coefficients, norm backward
//
// Never stored: N x classes of anything, the gradient of the weights (only a chunk of it), one-hot
// labels. dZ holds p alone, in [0, 1] and scaled by 2^15 so that p = 1e-9 is still a number in
// fp16: the scale s, 1/N and f_i are factors of whole rows and are folded into the rows of X and
// dX; the target's entry, which an exact margin derivative can blow up 28-fold at one degree, is
// applied apart in fp32. Since the 16-bit copy W_hat is the normalised one, chunk products are
// cosines and the weight-norm backward needs only g_j . w_hat_j, a dot product inside one class
// row.
//
// Shapes: embeddings [N, dim] fp32, W_hat [classes, dim] T, chunk [N, width] fp32 with leading
// dimension `width`, dZ likewise in T; all row-major. dim is at most 1,024.
#pragma once

#include "core/loss_maths.h"
#include "cuda/kernels/device.cuh"

namespace hardmine::cuda {

inline constexpr float kProbabilityScale = 32768;  // 2^15: p = 1 stays below fp16's 65,504
inline constexpr int kRowThreads = 128;            // threads that share a row of `dim` numbers
inline constexpr int kNoRow = -1;

// What is known of a row before the softmax.
struct RowTarget {
  float norm;        // ||x||, at least 1e-12
  float scale;       // s_i: the law's scale, or the norm; 1 for softmax
  float cosine;      // of the target before the margin; softmax: its logit
  float margin;      // psi
  float derivative;  // d psi / d cos
  float logit;       // s_i psi
};

// A row's softmax over one chunk, the target left out.
struct RowPart {
  SoftmaxSum<float> sum;
};

// What the gradient of a row needs.
struct RowGradient {
  float log_sum;  // log sum_j e^z_ij over all classes
  float factor;   // f_i / N
  float target;   // p_iy - 1
};

struct HeadStatistics {
  float loss, base_loss;
  int correct, silenced, kept, amplified;
  int non_finite;  // rows whose loss is NaN or infinite
  float norm_sum;
};

struct PrepareArguments {
  const float* embeddings;
  const int* labels;
  int dim;
  bool cosines;   // false: softmax with bias, nothing is normalised
  MarginLaw law;  // warmed up already
};

// One block a row: x_hat, target cosine by a dot product of the same rounded operands that the
// chunk products use (so that p and the target's term agree), margin.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    prepare_rows(PrepareArguments a, const T* __restrict__ class_weights,
                 const float* __restrict__ bias, T* __restrict__ normalised,
                 RowTarget* __restrict__ targets) {
  struct NormTag {};
  struct CosineTag {};
  const int row = static_cast<int>(blockIdx.x);
  const float* x = a.embeddings + int64_t{row} * a.dim;
  T* x_hat = normalised + int64_t{row} * a.dim;
  float squares = 0;
  for (int k = static_cast<int>(threadIdx.x); k < a.dim; k += kRowThreads) squares += x[k] * x[k];
  const float norm = fmaxf(sqrtf(block_sum<NormTag>(squares)), 1e-12F);  // torch's normalize
  const float inverse = a.cosines ? 1.0F / norm : 1.0F;
  const int label = a.labels[row];
  const T* w = class_weights + int64_t{label} * a.dim;
  double dot = 0;
  for (int k = static_cast<int>(threadIdx.x); k < a.dim; k += kRowThreads) {
    const T rounded = from_float<T>(x[k] * inverse);
    x_hat[k] = rounded;
    dot += static_cast<double>(to_float(rounded)) * to_float(w[k]);
  }
  dot = block_sum<CosineTag>(dot);
  if (threadIdx.x == 0) {
    RowTarget target{norm, 1.0F, static_cast<float>(dot), 0.0F, 1.0F, 0.0F};
    if (a.cosines) {
      const MarginValue<double> psi = margin_target(dot, a.law);
      target.scale = a.law.norm_scale ? norm : static_cast<float>(a.law.scale);
      target.margin = static_cast<float>(psi.value);
      target.derivative = static_cast<float>(psi.derivative);
      target.logit = static_cast<float>(static_cast<double>(target.scale) * psi.value);
    } else {
      target.logit = target.margin = target.cosine = static_cast<float>(dot + bias[label]);
    }
    targets[row] = target;
  }
}

// One thread a row: links the rows of each class in row order. class_rows[classes] is kNoRow
// outside a step; afterwards class_rows[c] is the first row of class c and next_row leads to the
// others. sgd_classes puts kNoRow back.
static __global__ void chain_rows(const int* __restrict__ labels, int rows,
                                  int* __restrict__ class_rows, int* __restrict__ next_row) {
  const int row = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (row >= rows) return;
  const int label = labels[row];
  bool first = true;
  for (int other = 0; other < row && first; ++other) first = labels[other] != label;
  int next = kNoRow;
  for (int other = row + 1; other < rows && next == kNoRow; ++other)
    if (labels[other] == label) next = other;
  next_row[row] = next;
  if (first) class_rows[label] = row;
}

// A row's place in the chunk of classes [first_class, first_class + width).
struct Chunk {
  int64_t first_class;
  int width;
  int index;  // of the chunk
};

// One block a row: (max, sum) over the chunk's logits with the target left out. Each thread keeps
// its own running maximum, and they merge in a fixed order.
template <int threads>
__global__ void __launch_bounds__(threads)
    softmax_chunk(const float* __restrict__ logits, Chunk chunk, int rows,
                  const int* __restrict__ labels, const RowTarget* __restrict__ targets,
                  const float* __restrict__ bias, RowPart* __restrict__ parts) {
  struct MaxTag {};
  struct SumTag {};
  const int row = static_cast<int>(blockIdx.x);
  const float* z = logits + int64_t{row} * chunk.width;
  const int target =
      static_cast<int>(labels[row] - chunk.first_class);  // may lie outside the chunk
  const float scale = targets[row].scale;
  SoftmaxSum<float> sum;
  for (int j = static_cast<int>(threadIdx.x); j < chunk.width; j += threads) {
    if (j == target) continue;
    const float value = scale * z[j] + (bias != nullptr ? bias[chunk.first_class + j] : 0.0F);
    if (value > sum.max) {
      sum.sum = sum.sum * __expf(sum.max - value) + 1.0F;
      sum.max = value;
    } else {
      sum.sum += __expf(value - sum.max);
    }
  }
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    SoftmaxSum<float> other;
    other.max = __shfl_xor_sync(kFullMask, sum.max, offset);
    other.sum = __shfl_xor_sync(kFullMask, sum.sum, offset);
    sum = merge(sum, other);
  }
  float* max = shared_array<MaxTag, float, kWarpSize>();
  float* total = shared_array<SumTag, float, kWarpSize>();
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  if (lane == 0) {
    max[warp] = sum.max;
    total[warp] = sum.sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < threads / kWarpSize; ++w)
      sum = merge(sum, SoftmaxSum<float>{max[w], total[w]});
    parts[int64_t{chunk.index} * rows + row].sum = sum;
  }
}

inline constexpr int kFinishThreads = 1024;

// One block for all rows: merges the chunks, takes the loss and its weighting, and sums the figures
// of the step in a fixed order.
static __global__ void __launch_bounds__(kFinishThreads)
    finish_rows(const RowPart* __restrict__ parts, int chunks, int rows,
                const RowTarget* __restrict__ targets, Weighting weighting,
                float* __restrict__ base_loss, float* __restrict__ weighted_loss,
                RowGradient* __restrict__ gradients, HeadStatistics* __restrict__ statistics) {
  struct BaseTag {};
  struct LossTag {};
  struct CountTag {};
  float base_sum = 0, norm_sum = 0;
  int correct = 0, non_finite = 0;
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += kFinishThreads) {
    SoftmaxSum<float> others;
    for (int c = 0; c < chunks; ++c) others = merge(others, parts[int64_t{c} * rows + row].sum);
    const RowTarget target = targets[row];
    const TargetLoss<float> loss = target_loss(target.logit, others);
    base_loss[row] = loss.loss;
    gradients[row] = {target.logit + loss.loss, 0.0F, loss.derivative};  // log sum = z_y + L
    base_sum += loss.loss;
    norm_sum += target.norm;
    // Right before the margin: the plain target logit is the largest.
    correct += target.scale * target.cosine >= others.max ? 1 : 0;
    non_finite += isfinite(loss.loss) ? 0 : 1;
  }
  const float mean = block_sum<BaseTag>(base_sum) / static_cast<float>(rows);
  const bool batch = weighting.reduction == Reduction::batch;
  const float batch_ratio = weighting_ratio(mean, weighting);
  const float batch_factor = weight_loss(mean, weighting).gradient_weight;
  float loss_sum = 0;
  int silenced = 0, amplified = 0;
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += kFinishThreads) {
    const float loss = base_loss[row];
    const WeightedLoss<float> weighted = batch
                                             ? WeightedLoss<float>{loss * batch_ratio, batch_factor}
                                             : weight_loss(loss, weighting);
    weighted_loss[row] = weighted.weighted;
    gradients[row].factor = weighted.gradient_weight / static_cast<float>(rows);
    loss_sum += weighted.weighted;
    const Gate gate = gate_of(weighted.gradient_weight);
    silenced += gate == Gate::silenced ? 1 : 0;
    amplified += gate == Gate::amplified ? 1 : 0;
  }
  loss_sum = block_sum<LossTag>(loss_sum);
  // Counts below 2^24 are exact in float.
  norm_sum = block_sum<CountTag>(norm_sum);
  const float all_correct = block_sum<CountTag>(static_cast<float>(correct));
  const float all_silenced = block_sum<CountTag>(static_cast<float>(silenced));
  const float all_amplified = block_sum<CountTag>(static_cast<float>(amplified));
  const float all_non_finite = block_sum<CountTag>(static_cast<float>(non_finite));
  if (threadIdx.x == 0) {
    *statistics = {loss_sum / static_cast<float>(rows),
                   mean,
                   static_cast<int>(all_correct),
                   static_cast<int>(all_silenced),
                   rows - static_cast<int>(all_silenced) - static_cast<int>(all_amplified),
                   static_cast<int>(all_amplified),
                   static_cast<int>(all_non_finite),
                   norm_sum};
  }
}

// X_f carries this power of two, undone in sgd_classes: a factor of 1e-4 times a coordinate of 0.04
// would lose bits among fp16's subnormals.
inline constexpr float kRowScale = 1024;

// One block a row: X_f = s_i f_i / N x_hat_i, and the target's share, (p - 1) psi' w_hat_y, as the
// start of the sum that the chunk products go on with: sgd_classes changes w_hat_y before the last
// chunk.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    start_gradients(const T* __restrict__ normalised, const T* __restrict__ class_weights,
                    const int* __restrict__ labels, int dim, const RowTarget* __restrict__ targets,
                    const RowGradient* __restrict__ gradients, T* __restrict__ scaled,
                    float* __restrict__ products) {
  const int row = static_cast<int>(blockIdx.x);
  const float factor = targets[row].scale * gradients[row].factor * kRowScale;
  const float share = gradients[row].target * targets[row].derivative * kProbabilityScale;
  const T* w = class_weights + int64_t{labels[row]} * dim;
  for (int k = static_cast<int>(threadIdx.x); k < dim; k += kRowThreads) {
    const int64_t at = int64_t{row} * dim + k;
    scaled[at] = from_float<T>(to_float(normalised[at]) * factor);
    products[at] = share * to_float(w[k]);
  }
}

// Element-wise over the chunk: dZ = p 2^15, 0 at the target.
template <typename T>
__global__ void gradient_chunk(const float* __restrict__ logits, Chunk chunk, int rows,
                               const int* __restrict__ labels,
                               const RowTarget* __restrict__ targets,
                               const RowGradient* __restrict__ gradients,
                               const float* __restrict__ bias, T* __restrict__ probabilities) {
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  if (j >= chunk.width || row >= rows) return;
  const int64_t at = int64_t{row} * chunk.width + j;
  const float z =
      targets[row].scale * logits[at] + (bias != nullptr ? bias[chunk.first_class + j] : 0.0F);
  const float p = __expf(z - gradients[row].log_sum) * kProbabilityScale;
  probabilities[at] = from_float<T>(j == labels[row] - chunk.first_class ? 0.0F : p);
}

struct SgdArguments {
  float lr, momentum, weight_decay;
  bool decay_bias;
  bool cosines;
  int dim;
};

// One warp a class: gradient of the class weight from G (scaled by 2^15 kRowScale) and the target
// rows of the class in row order; backward through w / ||w||; v = momentum v + (g + decay w), w -=
// lr v; the new norm; the new normalised copy. With `gradient` not null it writes the gradient
// there instead and changes nothing. Every number of a class row is read and written once. A lane
// keeps `count` numbers of the row in registers: dim is at most 32 count.
template <typename T, int count>
__global__ void __launch_bounds__(kRowThreads)
    sgd_classes(SgdArguments a, Chunk chunk, const float* __restrict__ products,
                const T* __restrict__ normalised, const RowTarget* __restrict__ targets,
                const RowGradient* __restrict__ gradients, int* __restrict__ class_rows,
                const int* __restrict__ next_row, float* __restrict__ weights,
                float* __restrict__ velocity, float* __restrict__ norms,
                T* __restrict__ class_weights, float* __restrict__ gradient) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int j = static_cast<int>(blockIdx.x * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize);
  if (j >= chunk.width) return;  // a whole warp
  const int64_t c = chunk.first_class + j;
  const float* g_row = products + int64_t{j} * a.dim;
  float* w_row = weights + c * a.dim;
  const float inverse = a.cosines ? 1.0F / norms[c] : 1.0F;
  float g[count], w[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int k = i * kWarpSize + lane;
    g[i] = k < a.dim ? g_row[k] * (1.0F / (kProbabilityScale * kRowScale)) : 0.0F;
    w[i] = k < a.dim ? w_row[k] : 0.0F;
  }
  for (int row = class_rows[c]; row != kNoRow; row = next_row[row]) {
    const RowTarget target = targets[row];
    const float t =
        gradients[row].factor * gradients[row].target * target.scale * target.derivative;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int k = i * kWarpSize + lane;
      if (k < a.dim) g[i] += t * to_float(normalised[int64_t{row} * a.dim + k]);
    }
  }
  if (a.cosines) {
    float along = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) along += g[i] * w[i] * inverse;
    along = warp_sum(along);
#pragma unroll
    for (int i = 0; i < count; ++i) g[i] = (g[i] - along * w[i] * inverse) * inverse;
  }
  if (gradient != nullptr) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int k = i * kWarpSize + lane;
      if (k < a.dim) gradient[c * a.dim + k] = g[i];
    }
  } else {
    float* v_row = velocity + c * a.dim;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int k = i * kWarpSize + lane;
      if (k >= a.dim) continue;
      const float v = a.momentum * v_row[k] + (g[i] + a.weight_decay * w[i]);
      w[i] -= a.lr * v;
      v_row[k] = v;
      w_row[k] = w[i];
      squares += w[i] * w[i];
    }
    const float norm = fmaxf(sqrtf(warp_sum(squares)), 1e-12F);
    const float new_inverse = a.cosines ? 1.0F / norm : 1.0F;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const int k = i * kWarpSize + lane;
      if (k < a.dim) class_weights[c * a.dim + k] = from_float<T>(w[i] * new_inverse);
    }
    if (lane == 0) norms[c] = norm;
  }
  __syncwarp();  // every lane has walked the chain
  if (lane == 0) class_rows[c] = kNoRow;
}

// One warp a class: norms and normalised copy from weights that were set from outside.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    normalise_classes(const float* __restrict__ weights, int64_t classes, int dim, bool cosines,
                      float* __restrict__ norms, T* __restrict__ class_weights) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t c = int64_t{blockIdx.x} * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (c >= classes) return;  // a whole warp
  float squares = 0;
  for (int k = lane; k < dim; k += kWarpSize)
    squares += weights[c * dim + k] * weights[c * dim + k];
  const float norm = fmaxf(sqrtf(warp_sum(squares)), 1e-12F);
  const float inverse = cosines ? 1.0F / norm : 1.0F;
  for (int k = lane; k < dim; k += kWarpSize)
    class_weights[c * dim + k] = from_float<T>(weights[c * dim + k] * inverse);
  if (lane == 0) norms[c] = norm;
}

// One thread a class, softmax only: gradient of the bias and its SGD step (or the gradient alone).
// Rows are added in order.
template <typename T>
__global__ void bias_chunk(SgdArguments a, Chunk chunk, const T* __restrict__ probabilities,
                           int rows, const int* __restrict__ labels,
                           const RowGradient* __restrict__ gradients, float* __restrict__ bias,
                           float* __restrict__ velocity, float* __restrict__ gradient) {
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (j >= chunk.width) return;
  const int64_t c = chunk.first_class + j;
  float g = 0;
  for (int row = 0; row < rows; ++row) {
    const float d = labels[row] == c ? gradients[row].target
                                     : to_float(probabilities[int64_t{row} * chunk.width + j]) *
                                           (1.0F / kProbabilityScale);
    g += gradients[row].factor * d;
  }
  if (gradient != nullptr) {
    gradient[c] = g;
    return;
  }
  const float v = a.momentum * velocity[c] + (g + (a.decay_bias ? a.weight_decay * bias[c] : 0.0F));
  velocity[c] = v;
  bias[c] -= a.lr * v;
}

// One block a row: gradient of the embedding from the finished sum 2^15 sum_j dL/dcos_ij / s_i
// w_hat_j. Backward through x / ||x||, and for A-Softmax, whose scale is ||x||, along x itself:
// dL/ds = sum_j (p_ij - [j = y]) (cos_ij or psi). Of that, sum over j != y of p_ij cos_ij is the
// same dot product with x_hat less the target's share; x_hat is the rounded one, so that the two
// agree.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    finish_embeddings(const float* __restrict__ products, const T* __restrict__ normalised, int dim,
                      bool cosines, bool norm_scale, const RowTarget* __restrict__ targets,
                      const RowGradient* __restrict__ gradients, float* __restrict__ output) {
  struct AlongTag {};
  const int row = static_cast<int>(blockIdx.x);
  const RowTarget target = targets[row];
  const RowGradient gradient = gradients[row];
  const int64_t start = int64_t{row} * dim;
  const float factor = gradient.factor * target.scale;
  float along = 0;
  for (int k = static_cast<int>(threadIdx.x); k < dim; k += kRowThreads)
    along += products[start + k] * (1.0F / kProbabilityScale) * to_float(normalised[start + k]);
  along = block_sum<AlongTag>(along);
  const float others = along - gradient.target * target.derivative * target.cosine;
  const float radial =
      norm_scale ? gradient.factor * (others + gradient.target * target.margin) : 0.0F;
  for (int k = static_cast<int>(threadIdx.x); k < dim; k += kRowThreads) {
    const float g = products[start + k] * (1.0F / kProbabilityScale);
    const float x_hat = to_float(normalised[start + k]);
    output[start + k] =
        cosines ? factor * (g - along * x_hat) / target.norm + radial * x_hat : factor * g;
  }
}

}  // namespace hardmine::cuda
