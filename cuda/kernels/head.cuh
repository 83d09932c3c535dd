// The fused margin-softmax head with hard mining: everything but the matrix products.
//
//   x_hat = x / ||x||,  w_hat = w / ||w||,  cos_ij = x_hat_i . w_hat_j      (products: cuBLASLt)
//   z_ij = s_i cos_ij,  z_iy = s_i psi(cos_iy);   softmax head: z_ij = x_i . w_j + b_j
//   L_i = log sum_j e^z_ij - z_iy,   f_i = dHM/dL at L_i (or at the mean loss)
//   dL/dz_ij = p_ij - [j = y],   gradient of the mean weighted loss: f_i / N times that
// The Euclidean margin has s_i = 2, hinges z_ij - (z_iy - margin) in place of the softmax and, in
// units of 1 / (active classes of the row), p_ij = [class j is active].
//
// Two passes over chunks of classes, because f_i needs the whole row's sum before any gradient:
//   prepare_rows            x_hat, the target's cosine, margin and its derivative
//   chain_rows, similarity  beside the first pass: rows chained by class, mean cosine of strangers
//   per class chunk: product      cos chunk = x_hat W_hat^T, fp32, stays in L2
//                    softmax_chunk   joins the chunk's (max, sum) to the row's;
//                    hinge_chunk     its hinges
//   finish_rows             loss, factor, the step's figures into its slot of the ring
//   start_gradients         X_f: rows times their coefficient; dX starts with the target's share
//   per chunk: product      cos chunk again
//              gradient_chunk  dZ = p 2^15 in T, the target's entry 0; hinge_gradient_chunk
//              two products    dX += dZ W_hat;  G = dZ^T X_f
//              sgd_classes     weight-norm backward, decay, momentum, new norm, new W_hat, in one
//                              pass, under the next chunk's products; the last chunk's under
//                              what the caller does next
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
// Shapes: embeddings [N, dim] fp32, W_hat [classes, dim] T, chunk [N, padded] fp32, dZ likewise in
// T; all row-major. A chunk's leading dimension is its width padded to kWidthMultiple: W_hat has as
// many rows of zeros behind its last class, so that the products' operands are aligned whatever the
// number of classes, and dZ is 0 there. dim is at most kMaxHeadDim.
//
// What changes from step to step (StepParameters) and where the figures go (StepRing) is read from
// device memory, so that a captured step can be replayed.
#pragma once

#include "core/loss_maths.h"
#include "cuda/kernels/device.cuh"
#include "cuda/kernels/sgd.cuh"
#include "cuda/kernels/vectors.cuh"

namespace hardmine::cuda {

inline constexpr float kProbabilityScale = 32768;  // 2^15: p = 1 stays below fp16's 65,504
inline constexpr int kRowThreads = 128;            // threads that share a row of `dim` numbers
inline constexpr int kMaxHeadDim = 1024;           // sgd_classes keeps a class row in registers
inline constexpr int kWidthMultiple = 8;           // 16 bytes of 16-bit numbers
inline constexpr int kNoRow = -1;
inline constexpr float kNormFloor = 1e-12F;  // torch.nn.functional.normalize's eps

// What is known of a row before the softmax.
struct RowTarget {
  double logit;      // s_i psi
  float norm;        // ||x||, at least 1e-12
  float scale;       // s_i: the law's scale, or the norm; 1 for softmax
  float cosine;      // of the target before the margin; softmax: its logit
  float margin;      // psi
  float derivative;  // d psi / d cos
  float threshold;   // Euclidean margin: z_iy - margin
};

// What the gradient of a row needs.
struct RowGradient {
  float log_sum;  // log sum_j e^z_ij over all classes
  float factor;   // f_i / N, times the unit of p
  float target;   // p_iy - 1; Euclidean margin: -([any active] + pull), in the unit of p
};

// The figures of one step.
struct StepRecord {
  double loss, base_loss;  // means, weighted and not
  double mean_cosine;      // between embeddings of different identities
  double embedding_norm;   // mean ||x||
  int correct, silenced, kept, amplified;
  int non_finite;   // rows whose loss is NaN or infinite: then no class weight changes
  int hardest_row;  // with the highest base loss; of equal ones the first
  float hardest_loss, hardest_weight;
};

// Step `steps` (counted from 0 by the head itself) writes records[steps % size].
struct StepRing {
  StepRecord* records;
  unsigned long long* steps;
  int size;
};

// ||v|| from its sum of squares, NaN when it is not finite: fmaxf would hide a NaN and an infinite
// norm would make a vector of zeros, but so the row's loss shows it.
__device__ inline float norm_of(double squares) {
  const float norm = static_cast<float>(sqrt(squares));
  return isfinite(norm) ? fmaxf(norm, kNormFloor) : std::numeric_limits<float>::quiet_NaN();
}

struct PrepareArguments {
  const float* embeddings;
  const int* labels;
  int dim;
  BaseKind base;
  MarginLaw law;  // before its warm-up
  EuclideanMargin euclidean;
  const StepParameters* settings;  // null: the laws as they are
};

// `dot` is x_hat . w_hat, or x . w for softmax.
__device__ inline RowTarget target_of_row(const PrepareArguments& a, double dot, float norm,
                                          const float* bias, int label) {
  RowTarget target{0.0, norm, 1.0F, static_cast<float>(dot), 0.0F, 1.0F, 0.0F};
  if (a.base == BaseKind::euclidean_margin) {
    const EuclideanMargin law =
        a.settings == nullptr ? a.euclidean : warmed_up(a.euclidean, a.settings->margin_factor);
    target.scale = static_cast<float>(kEuclideanScale);
    target.margin = target.cosine;
    target.logit = kEuclideanScale * dot;
    target.threshold = static_cast<float>(target.logit - law.margin);
    return target;
  }
  if (!normalises(a.base)) {
    target.logit = dot + bias[label];
    target.margin = target.cosine = static_cast<float>(target.logit);
    return target;
  }
  MarginLaw law = a.law;
  if (a.settings != nullptr) {
    law = warmed_up(law, a.settings->margin_factor);
    law.lambda = a.settings->lambda;
  }
  const MarginValue<double> psi = margin_target(dot, law);
  target.scale = law.norm_scale ? norm : static_cast<float>(law.scale);
  target.margin = static_cast<float>(psi.value);
  target.derivative = static_cast<float>(psi.derivative);
  target.logit = static_cast<double>(target.scale) * psi.value;
  return target;
}

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
  double squares = 0;
  for (int k = static_cast<int>(threadIdx.x); k < a.dim; k += kRowThreads)
    squares += static_cast<double>(x[k]) * x[k];
  const float norm = norm_of(block_sum<NormTag>(squares));
  const float inverse = normalises(a.base) ? 1.0F / norm : 1.0F;
  const int label = a.labels[row];
  const T* w = class_weights + int64_t{label} * a.dim;
  double dot = 0;
  for (int k = static_cast<int>(threadIdx.x); k < a.dim; k += kRowThreads) {
    const T rounded = from_float<T>(x[k] * inverse);
    x_hat[k] = rounded;
    dot += static_cast<double>(to_float(rounded)) * to_float(w[k]);
  }
  dot = block_sum<CosineTag>(dot);
  if (threadIdx.x == 0) targets[row] = target_of_row(a, dot, norm, bias, label);
}

inline constexpr int kChainThreads = 256;

// One thread a row: links the rows of each class in row order. class_rows[c] becomes the first row
// of class c and next_row leads to the others. Classes that are not in this step keep what an
// earlier one left, kNoRow at first: first_row_of() tells them apart.
static __global__ void __launch_bounds__(kChainThreads)
    chain_rows(const int* __restrict__ labels, int rows, int* __restrict__ class_rows,
               int* __restrict__ next_row) {
  struct LabelTag {};
  constexpr int kTile = 1024;
  int* tile = shared_array<LabelTag, int, kTile>();
  const int row = static_cast<int>(blockIdx.x * kChainThreads + threadIdx.x);
  const int label = row < rows ? labels[row] : kNoRow;
  bool first = true;
  int next = kNoRow;
  for (int start = 0; start < rows; start += kTile) {
    const int count = rows - start < kTile ? rows - start : kTile;
    __syncthreads();  // the previous tile has been read
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kChainThreads)
      tile[i] = labels[start + i];
    __syncthreads();
    for (int i = 0; i < count; ++i) {
      const bool same = tile[i] == label;
      first = first && !(same && start + i < row);
      next = same && start + i > row && next == kNoRow ? start + i : next;
    }
  }
  if (row >= rows) return;
  next_row[row] = next;
  if (first) class_rows[label] = row;
}

__device__ inline int first_row_of(int64_t c, const int* class_rows, const int* labels, int rows) {
  const int row = class_rows[c];
  return row != kNoRow && row < rows && labels[row] == c ? row : kNoRow;
}

// Over 32 coordinates: (sum of all x_hat)^2 - sum over identities of (own sum)^2, which is the sum
// of cosines over pairs of rows of different identities; and the number of such pairs.
struct SimilarityPart {
  double cosines;
  double pairs;  // the same in every part
};

inline constexpr int kSimilarityWarps = 16;

// One block for 32 coordinates, a lane each; its warps share the identities out, each at its first
// row, and walk the chain.
static __global__ void __launch_bounds__(kSimilarityWarps* kWarpSize)
    similarity(const float* __restrict__ embeddings, const int* __restrict__ labels, int rows,
               int dim, const RowTarget* __restrict__ targets, const int* __restrict__ class_rows,
               const int* __restrict__ next_row, SimilarityPart* __restrict__ parts) {
  struct AllTag {};
  struct SameTag {};
  struct PairTag {};
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int k = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  double all = 0, same = 0, same_pairs = 0;
  for (int first = warp; first < rows; first += kSimilarityWarps) {
    if (class_rows[labels[first]] != first) continue;
    double own = 0, count = 0;
    for (int row = first; row != kNoRow; row = next_row[row], ++count)
      if (k < dim)
        own += static_cast<double>(embeddings[int64_t{row} * dim + k]) / targets[row].norm;
    all += own;
    same += own * own;
    same_pairs += count * count;
  }
  double* sums = shared_array<AllTag, double, kSimilarityWarps * kWarpSize>();
  sums[threadIdx.x] = all;
  same = block_sum<SameTag>(same);
  same_pairs = block_sum<PairTag>(lane == 0 ? same_pairs : 0.0);
  if (warp != 0) return;
  all = 0;
  for (int w = 0; w < kSimilarityWarps; ++w) all += sums[w * kWarpSize + lane];
  const double squares = warp_sum(all * all);
  if (lane == 0)
    parts[blockIdx.x] = {squares - same, static_cast<double>(rows) * rows - same_pairs};
}

// The classes [first_class, first_class + width) and their matrices' leading dimension.
struct Chunk {
  int64_t first_class;
  int width;
  int padded;
  int index;  // of the chunk
};

// (max, sum) over the logits logit(j, z[j]) of a row, `target` left out; a block's thread 0 gets
// it. Each thread keeps its own running maximum, and they merge in a fixed order.
template <int threads, typename Logit>
__device__ SoftmaxSum<float> softmax_of_row(const float* z, int width, int64_t target,
                                            Logit logit) {
  struct MaxTag {};
  struct SumTag {};
  constexpr int kCount = 4;
  SoftmaxSum<float> sum;
  for (int j = static_cast<int>(threadIdx.x) * kCount; j < width; j += threads * kCount) {
    const Pack<float, kCount> pack = load<kCount>(z + j);
    float values[kCount];
    bool any = false;
    float max = sum.max;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const bool counts = j + e < width && j + e != target;
      values[e] = counts ? logit(j + e, pack.at[e]) : std::numeric_limits<float>::lowest();
      any = any || counts;
      max = fmaxf(max, values[e]);
    }
    if (!any) continue;  // e^(lowest - lowest) would count
    float added = 0;
#pragma unroll
    for (int e = 0; e < kCount; ++e) added += __expf(values[e] - max);
    sum.sum = sum.sum * __expf(sum.max - max) + added;
    sum.max = max;
  }
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    SoftmaxSum<float> other;
    other.max = __shfl_xor_sync(kFullMask, sum.max, offset);
    other.sum = __shfl_xor_sync(kFullMask, sum.sum, offset);
    sum = merge(sum, other);
  }
  float* max = shared_array<MaxTag, float, kWarpSize>();
  float* total = shared_array<SumTag, float, kWarpSize>();
  if (threadIdx.x % kWarpSize == 0) {
    max[threadIdx.x / kWarpSize] = sum.max;
    total[threadIdx.x / kWarpSize] = sum.sum;
  }
  __syncthreads();
  for (int w = 1; w < threads / kWarpSize; ++w)
    sum = merge(sum, SoftmaxSum<float>{max[w], total[w]});
  return sum;
}

// The hinges of the logits logit(j, z[j]) of a row above `threshold`, `target` left out; a block's
// thread 0 gets them, merged in a fixed order.
template <int threads, typename Logit>
__device__ HingeSum<float> hinges_of_row(const float* z, int width, int64_t target, float threshold,
                                         Logit logit) {
  struct HingeTag {};
  constexpr int kCount = 4;
  HingeSum<float> sums;
  for (int j = static_cast<int>(threadIdx.x) * kCount; j < width; j += threads * kCount) {
    const Pack<float, kCount> pack = load<kCount>(z + j);
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (j + e < width && j + e != target) add_hinge(sums, logit(pack.at[e]), threshold);
  }
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    HingeSum<float> other;
    other.sum = __shfl_xor_sync(kFullMask, sums.sum, offset);
    other.max = __shfl_xor_sync(kFullMask, sums.max, offset);
    other.active = __shfl_xor_sync(kFullMask, sums.active, offset);
    sums = merge(sums, other);
  }
  auto* of_warps = shared_array<HingeTag, HingeSum<float>, threads / kWarpSize>();
  if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = sums;
  __syncthreads();
  for (int w = 1; w < threads / kWarpSize; ++w) sums = merge(sums, of_warps[w]);
  return sums;
}

// One block a row: joins the softmax sum of the chunk's logits to that of the chunks before.
template <int threads>
__global__ void __launch_bounds__(threads)
    softmax_chunk(const float* __restrict__ cosines, Chunk chunk, const int* __restrict__ labels,
                  const RowTarget* __restrict__ targets, const float* __restrict__ bias,
                  SoftmaxSum<float>* __restrict__ sums) {
  const int row = static_cast<int>(blockIdx.x);
  const float scale = targets[row].scale;
  const SoftmaxSum<float> sum = softmax_of_row<threads>(
      cosines + int64_t{row} * chunk.padded, chunk.width, labels[row] - chunk.first_class,
      [&](int j, float cosine) {
        return scale * cosine + (bias != nullptr ? bias[chunk.first_class + j] : 0.0F);
      });
  if (threadIdx.x == 0) sums[row] = chunk.index == 0 ? sum : merge(sums[row], sum);
}

// One block a row: joins the hinges of the chunk's classes to those of the chunks before.
template <int threads>
__global__ void __launch_bounds__(threads)
    hinge_chunk(const float* __restrict__ cosines, Chunk chunk, const int* __restrict__ labels,
                const RowTarget* __restrict__ targets, HingeSum<float>* __restrict__ sums) {
  const int row = static_cast<int>(blockIdx.x);
  const float scale = targets[row].scale;
  const HingeSum<float> sum = hinges_of_row<threads>(
      cosines + int64_t{row} * chunk.padded, chunk.width, labels[row] - chunk.first_class,
      targets[row].threshold, [&](float cosine) { return scale * cosine; });
  if (threadIdx.x == 0) sums[row] = chunk.index == 0 ? sum : merge(sums[row], sum);
}

// The largest number of a block of whole warps; every thread gets it. Uses two barriers.
template <typename Tag>
__device__ float block_max(float value) {
  float* partial = shared_array<Tag, float, kWarpSize>();
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const auto warp_max = [](float v) {
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
      v = fmaxf(v, __shfl_xor_sync(kFullMask, v, offset));
    return v;
  };
  value = warp_max(value);
  __syncthreads();  // the previous use of `partial` is over
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  return warp_max(lane < blockDim.x / kWarpSize ? partial[lane] : value);
}

// Sums over a block of whole warps, all in one go; every thread gets them. Once a kernel for a Tag.
template <typename Tag, int count>
__device__ void block_sums(double (&values)[count]) {
  double* partial = shared_array<Tag, double, count * kWarpSize>();
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = warp_sum(values[i]);
    if (lane == 0) partial[i * kWarpSize + static_cast<int>(warp)] = values[i];
  }
  __syncthreads();
  const bool counts = lane < blockDim.x / kWarpSize;
#pragma unroll
  for (int i = 0; i < count; ++i)
    values[i] = warp_sum(counts ? partial[i * kWarpSize + static_cast<int>(lane)] : 0.0);
}

// X_f is scaled by a power of two, undone in sgd_classes, that takes its largest number just below
// 2^10: in fp16 nothing overflows (65,504; the unfused head's gradient meets a margin's derivative
// of up to 64 besides) and small rows keep their bits.
inline constexpr int kRowExponent = 10;

inline constexpr int kMostFinishThreads = 1024;

struct FinishArguments {
  int rows;
  LossSpec loss;
  const SoftmaxSum<float>* sums;     // [rows]
  const HingeSum<float>* hinges;     // [rows], of the Euclidean margin in place of `sums`
  const double* center_distances;    // [rows], null: no center loss
  const RowTarget* targets;          // [rows]
  const SimilarityPart* similarity;  // [similarity_parts]
  int similarity_parts;
  float* base_loss;        // [rows]
  float* weighted_loss;    // [rows]
  RowGradient* gradients;  // [rows]
  float* row_scale;        // see start_gradients
  int* non_finite;         // rows without a finite loss
  StepRing ring;
};

// What a row's sums over all classes but its own come to.
struct RowLoss {
  float loss;
  RowGradient gradient;  // `factor` holds the unit of p
  bool correct;          // before the margin no other logit is as large as the target's
};

__device__ inline RowLoss loss_of_row(const RowTarget& target, SoftmaxSum<float> others) {
  const bool correct = target.scale * target.cosine > others.max;
  // Relative to the target's logit, whose rounding at a scale of 64 would cost the loss digits.
  if (others.sum != 0.0F) others.max = static_cast<float>(others.max - target.logit);
  const TargetLoss<float> loss = target_loss(0.0F, others);
  // log sum = z_y + L
  return {
      loss.loss, {static_cast<float>(target.logit + loss.loss), 1.0F, loss.derivative}, correct};
}

__device__ inline RowLoss loss_of_row(const RowTarget& target, const HingeSum<float>& others,
                                      const EuclideanMargin& law) {
  const auto logit = static_cast<float>(target.logit);
  const EuclideanLoss<float> loss = euclidean_loss(logit, others, law);
  return {loss.loss, {0.0F, loss.unit, loss.target}, logit > others.max};
}

// One block of whole warps for all rows: takes the loss and its weighting, and sums the figures of
// the step in a fixed order.
static __global__ void __launch_bounds__(kMostFinishThreads) finish_rows(FinishArguments a) {
  struct MeanTag {};
  struct SumTag {};
  struct MaxTag {};
  struct HardestTag {};
  struct RowTag {};
  enum : uint8_t { kCosines, kLoss, kNorm, kCorrect, kSilenced, kAmplified, kNonFinite, kSums };
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  double base_sum = 0;
  double sums[kSums] = {};
  for (int row = thread; row < a.rows; row += threads) {
    const RowTarget target = a.targets[row];
    const RowLoss found = a.loss.base == BaseKind::euclidean_margin
                              ? loss_of_row(target, a.hinges[row], a.loss.euclidean)
                              : loss_of_row(target, a.sums[row]);
    a.base_loss[row] = found.loss;
    a.gradients[row] = found.gradient;
    base_sum += found.loss;
    sums[kNorm] += target.norm;
    sums[kCorrect] += found.correct ? 1 : 0;
    bool finite = isfinite(found.loss);
    if (a.center_distances != nullptr) {
      finite = finite && isfinite(a.center_distances[row]);
      sums[kLoss] += a.loss.center.weight / 2 * a.center_distances[row];
    }
    sums[kNonFinite] += finite ? 0 : 1;
  }
  const double mean = block_sum<MeanTag>(base_sum) / a.rows;
  const Weighting& weighting = a.loss.weighting;
  const bool batch = weighting.reduction == Reduction::batch;
  const float batch_ratio = weighting_ratio(static_cast<float>(mean), weighting);
  const float batch_factor = weight_loss(static_cast<float>(mean), weighting).gradient_weight;
  float largest = 0;   // coefficient times the largest coordinate it may meet
  float hardest = -1;  // no base loss is below 0
  int hardest_row = 0;
  for (int row = thread; row < a.rows; row += threads) {
    const float loss = a.base_loss[row];
    if (loss > hardest) {
      hardest = loss;
      hardest_row = row;
    }
    const WeightedLoss<float> weighted = batch
                                             ? WeightedLoss<float>{loss * batch_ratio, batch_factor}
                                             : weight_loss(loss, weighting);
    a.weighted_loss[row] = weighted.weighted;
    const float factor = weighted.gradient_weight / static_cast<float>(a.rows);
    RowGradient& gradient = a.gradients[row];
    gradient.factor *= factor;  // it held the unit
    const RowTarget& target = a.targets[row];
    largest = fmaxf(largest, gradient.factor * fmaxf(1.0F, -gradient.target) *
                                 (normalises(a.loss.base) ? target.scale : target.norm));
    sums[kLoss] += weighted.weighted;
    const Gate gate = gate_of(weighted.gradient_weight);
    sums[kSilenced] += gate == Gate::silenced ? 1 : 0;
    sums[kAmplified] += gate == Gate::amplified ? 1 : 0;
  }
  for (int i = thread; i < a.similarity_parts; i += threads)
    sums[kCosines] += a.similarity[i].cosines;
  largest = block_max<MaxTag>(largest);
  const float highest = block_max<HardestTag>(hardest);
  // The lowest row of those that have it: float is exact up to 2^24 rows.
  const auto row_of_highest = static_cast<int>(-block_max<RowTag>(
      hardest == highest ? -static_cast<float>(hardest_row) : -std::numeric_limits<float>::max()));
  block_sums<SumTag>(sums);
  if (thread != 0) return;
  const double pairs = a.similarity[0].pairs;
  const auto count = [&](int which) { return static_cast<int>(sums[which]); };
  a.ring.records[*a.ring.steps % static_cast<unsigned>(a.ring.size)] = {
      sums[kLoss] / a.rows,
      mean,
      pairs == 0 ? 0.0 : sums[kCosines] / pairs,
      sums[kNorm] / a.rows,
      count(kCorrect),
      count(kSilenced),
      a.rows - count(kSilenced) - count(kAmplified),
      count(kAmplified),
      count(kNonFinite),
      row_of_highest,
      highest,
      batch ? batch_factor : weight_loss(highest, weighting).gradient_weight};
  ++*a.ring.steps;
  *a.non_finite = count(kNonFinite);
  int exponent = 0;
  if (isfinite(largest)) frexpf(fmaxf(largest, 0x1p-80F), &exponent);  // row_scale: 2^90 at most
  *a.row_scale = ldexpf(1.0F, kRowExponent - exponent);
}

// One block a row: X_f = s_i f_i / N x_hat_i times row_scale, and the target's share, (p - 1) psi'
// w_hat_y, as the start of the sum that the chunk products go on with: sgd_classes changes w_hat_y
// before the last chunk.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    start_gradients(const T* __restrict__ normalised, const T* __restrict__ class_weights,
                    const int* __restrict__ labels, int dim, const RowTarget* __restrict__ targets,
                    const RowGradient* __restrict__ gradients, const float* __restrict__ row_scale,
                    T* __restrict__ scaled, float* __restrict__ products) {
  const int row = static_cast<int>(blockIdx.x);
  const float factor = targets[row].scale * gradients[row].factor * *row_scale;
  const float share = gradients[row].target * targets[row].derivative * kProbabilityScale;
  const T* w = class_weights + int64_t{labels[row]} * dim;
  for (int k = static_cast<int>(threadIdx.x); k < dim; k += kRowThreads) {
    const int64_t at = int64_t{row} * dim + k;
    scaled[at] = from_float<T>(to_float(normalised[at]) * factor);
    products[at] = share * to_float(w[k]);
  }
}

// One thread for the neighbours of a row that fill a 16-byte store (blockIdx.x is the row): dZ = p
// 2^15 with p(j, cos_ij), 0 at the target and in the padding.
template <typename T, typename Probability>
__device__ void fill_chunk(const float* cosines, const Chunk& chunk, const int* labels,
                           T* probabilities, Probability probability) {
  constexpr int kCount = kVectorWidth<T>;
  const int first = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kCount;
  const int row = static_cast<int>(blockIdx.x);
  if (first >= chunk.padded) return;
  const int64_t start = int64_t{row} * chunk.padded + first;
  const int64_t target = labels[row] - chunk.first_class;
  Pack<T, kCount> p;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const Pack<float, 4> pack = load<4>(cosines + start + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int j = first + i + e;
      float value = 0;
      if (j < chunk.width && j != target) value = probability(j, pack.at[e]) * kProbabilityScale;
      p.at[i + e] = from_float<T>(value);
    }
  }
  store(probabilities + start, p);
}

template <typename T>
__global__ void gradient_chunk(const float* __restrict__ cosines, Chunk chunk,
                               const int* __restrict__ labels,
                               const RowTarget* __restrict__ targets,
                               const RowGradient* __restrict__ gradients,
                               const float* __restrict__ bias, T* __restrict__ probabilities) {
  const int row = static_cast<int>(blockIdx.x);
  const float scale = targets[row].scale, log_sum = gradients[row].log_sum;
  fill_chunk(cosines, chunk, labels, probabilities, [&](int j, float cosine) {
    const float z = scale * cosine + (bias != nullptr ? bias[chunk.first_class + j] : 0.0F);
    return __expf(z - log_sum);
  });
}

template <typename T>
__global__ void hinge_gradient_chunk(const float* __restrict__ cosines, Chunk chunk,
                                     const int* __restrict__ labels,
                                     const RowTarget* __restrict__ targets,
                                     T* __restrict__ probabilities) {
  const int row = static_cast<int>(blockIdx.x);
  const float scale = targets[row].scale, threshold = targets[row].threshold;
  fill_chunk(cosines, chunk, labels, probabilities,
             [&](int, float cosine) { return scale * cosine - threshold > 0.0F ? 1.0F : 0.0F; });
}

struct SgdArguments {
  const StepParameters* settings;  // null: nothing changes
  const float* row_scale;
  const int* non_finite;  // above 0: nothing changes either
  const int* labels;
  int rows;
  int dim;
  bool cosines;
};

// One warp a class: gradient of the class weight from G (scaled by 2^15 and row_scale) and the
// target rows of the class in row order; backward through w / ||w||; v = momentum v + (g + decay
// w), w -= lr v; the new norm; the new normalised copy. With `gradient` not null it writes the
// gradient there instead and changes nothing. Every number of a class row is read and written once.
// A lane keeps `count` numbers of the row in registers, `vector` of them neighbours: dim is at most
// 32 count and a multiple of `vector`. (The 1 keeps ptxas from spilling for the sake of occupancy.)
template <typename T, int count, int vector>
__global__ void __launch_bounds__(kRowThreads, 1)
    sgd_classes(SgdArguments a, Chunk chunk, const float* __restrict__ products,
                const T* __restrict__ normalised, const RowTarget* __restrict__ targets,
                const RowGradient* __restrict__ gradients, const int* __restrict__ class_rows,
                const int* __restrict__ next_row, float* __restrict__ weights,
                float* __restrict__ velocity, float* __restrict__ norms,
                T* __restrict__ class_weights, float* __restrict__ gradient) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int j = static_cast<int>(blockIdx.x * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize);
  if (j >= chunk.width) return;  // a whole warp
  const int64_t c = chunk.first_class + j;
  const auto each_pack = [&](auto use) {
#pragma unroll
    for (int i = 0; i < count; i += vector) {
      const int k = i * kWarpSize + lane * vector;
      if (k < a.dim) use(i, k);
    }
  };
  float g[count] = {}, w[count] = {};
  const float* g_row = products + int64_t{j} * a.dim;
  float* w_row = weights + c * a.dim;
  const float unscale = 1.0F / (kProbabilityScale * *a.row_scale);
  const float inverse = a.cosines ? 1.0F / norms[c] : 1.0F;
  each_pack([&](int i, int k) {
    const auto g_pack = load<vector>(g_row + k);
    const auto w_pack = load<vector>(w_row + k);
#pragma unroll
    for (int e = 0; e < vector; ++e) {
      g[i + e] = g_pack.at[e] * unscale;
      w[i + e] = w_pack.at[e];
    }
  });
  for (int row = first_row_of(c, class_rows, a.labels, a.rows); row != kNoRow;
       row = next_row[row]) {
    const RowTarget target = targets[row];
    const float t =
        gradients[row].factor * gradients[row].target * target.scale * target.derivative;
    each_pack([&](int i, int k) {
      const auto x_pack = load<vector>(normalised + int64_t{row} * a.dim + k);
#pragma unroll
      for (int e = 0; e < vector; ++e) g[i + e] += t * to_float(x_pack.at[e]);
    });
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
    each_pack([&](int i, int k) {
      Pack<float, vector> pack;
#pragma unroll
      for (int e = 0; e < vector; ++e) pack.at[e] = g[i + e];
      store(gradient + c * a.dim + k, pack);
    });
  } else if (a.settings != nullptr && *a.non_finite == 0) {
    const float lr = a.settings->lr, momentum = a.settings->momentum;
    const float weight_decay = a.settings->weight_decay;
    float* v_row = velocity + c * a.dim;
    float squares = 0;
    each_pack([&](int i, int k) {
      auto v_pack = load<vector>(v_row + k);
      Pack<float, vector> w_pack;
#pragma unroll
      for (int e = 0; e < vector; ++e) {
        const float v = momentum * v_pack.at[e] + (g[i + e] + weight_decay * w[i + e]);
        w[i + e] -= lr * v;
        v_pack.at[e] = v;
        w_pack.at[e] = w[i + e];
        squares += w[i + e] * w[i + e];
      }
      store(v_row + k, v_pack);
      store(w_row + k, w_pack);
    });
    const float norm = norm_of(warp_sum(squares));
    const float new_inverse = a.cosines ? 1.0F / norm : 1.0F;
    each_pack([&](int i, int k) {
      Pack<T, vector> pack;
#pragma unroll
      for (int e = 0; e < vector; ++e) pack.at[e] = from_float<T>(w[i + e] * new_inverse);
      store(class_weights + c * a.dim + k, pack);
    });
    if (lane == 0) norms[c] = norm;
  }
}

// One warp a row of [rows, dim]: its norm and its copy in T, normalised where `cosines`. For class
// weights that were set from outside; the unfused head's normalisation of both operands.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    normalise_rows(const float* __restrict__ values, int64_t rows, int dim, bool cosines,
                   float* __restrict__ norms, T* __restrict__ normalised) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t row = int64_t{blockIdx.x} * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= rows) return;  // a whole warp
  float squares = 0;
  for (int k = lane; k < dim; k += kWarpSize)
    squares += values[row * dim + k] * values[row * dim + k];
  const float norm = norm_of(warp_sum(squares));
  const float inverse = cosines ? 1.0F / norm : 1.0F;
  for (int k = lane; k < dim; k += kWarpSize)
    normalised[row * dim + k] = from_float<T>(values[row * dim + k] * inverse);
  if (lane == 0) norms[row] = norm;
}

inline constexpr int kBiasWarps = 16;

// Softmax only: gradient of the bias and its SGD step (or the gradient alone). One block for 32
// classes, a lane each; its warps share the rows out, and their sums are added in order.
template <typename T>
__global__ void __launch_bounds__(kBiasWarps* kWarpSize)
    bias_chunk(SgdArguments a, Chunk chunk, const T* __restrict__ probabilities,
               const RowGradient* __restrict__ gradients, float* __restrict__ bias,
               float* __restrict__ velocity, float* __restrict__ gradient) {
  struct SumTag {};
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int warp = static_cast<int>(threadIdx.x / kWarpSize);
  const int j = static_cast<int>(blockIdx.x) * kWarpSize + lane;
  const int64_t c = chunk.first_class + j;
  float g = 0;
  if (j < chunk.width) {
    for (int row = warp; row < a.rows; row += kBiasWarps) {
      const float d = a.labels[row] == c
                          ? gradients[row].target
                          : to_float(probabilities[int64_t{row} * chunk.padded + j]) *
                                (1.0F / kProbabilityScale);
      g += gradients[row].factor * d;
    }
  }
  float* sums = shared_array<SumTag, float, kBiasWarps * kWarpSize>();
  sums[threadIdx.x] = g;
  __syncthreads();
  if (warp != 0 || j >= chunk.width) return;
  g = 0;
  for (int w = 0; w < kBiasWarps; ++w) g += sums[w * kWarpSize + lane];
  if (gradient != nullptr) {
    gradient[c] = g;
    return;
  }
  if (a.settings == nullptr || *a.non_finite != 0) return;
  const StepParameters s = *a.settings;
  const float v =
      s.momentum * velocity[c] + (g + (s.decay_all != 0 ? s.weight_decay * bias[c] : 0.0F));
  velocity[c] = v;
  bias[c] -= s.lr * v;
}

// One block a row: gradient of the embedding from the finished sum 2^15 sum_j dL/dcos_ij / s_i
// w_hat_j. Backward through x / ||x||, and for A-Softmax, whose scale is ||x||, along x itself:
// dL/ds = sum_j (p_ij - [j = y]) (cos_ij or psi). Of that, sum over j != y of p_ij cos_ij is the
// same dot product with x_hat less the target's share; x_hat is the rounded one, so that the two
// agree. With `add` it is added to what `output` holds.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    finish_embeddings(const float* __restrict__ products, const T* __restrict__ normalised, int dim,
                      bool cosines, bool norm_scale, bool add,
                      const RowTarget* __restrict__ targets,
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
    const float before = add ? output[start + k] : 0.0F;
    output[start + k] =
        before +
        (cosines ? factor * (g - along * x_hat) / target.norm + radial * x_hat : factor * g);
  }
}

}  // namespace hardmine::cuda
