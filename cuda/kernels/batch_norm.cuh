// Batch-norm over NHWC maps, with the residual sum and the ReLU after it in the same pass.
//
//   forward   mean, variance of each channel over the batch (biased), r = 1 / sqrt(variance + eps)
//             scale = gamma r;  y = relu(scale (x - mean) + beta + residual)
//             running += 0.1 (batch's - running), of the variance the unbiased one
//   backward  g = dy where the ReLU let pass, x^ = (x - mean) r
//             dbeta = sum g,  dgamma = sum g x^
//             dx = scale (g - dbeta / n - x^ dgamma / n)
//                = scale g + by_x (x - mean) + offset
//
// Two kernels each way: one reads the map and reduces it per channel, its last block finishes the
// channels; one applies. Deviations are summed from the block's first row, and the blocks' means
// and squared deviations are merged around the first block's mean, so that nothing cancels however
// large the mean is. The mean is subtracted from x before the scale is applied, for the same
// reason.
//
// One kernel forward, where the convolution before it has already summed x and x^2 over the map in
// the kernel that wrote it: every thread finishes its channels itself. Then
// variance = mean(x^2) - mean^2, which cancels where a mean is thousands of deviations wide. Or no
// pass over the map at all, where the convolution that reads y makes it from x: it is given scale
// and beta - scale mean in T. Backward, the convolution's data gradient may come masked and with
// dgamma and dbeta, and one kernel applies them.
//
// Or one kernel each way, where the device holds all its blocks at once (cooperative.cuh): the
// blocks of a column wait until the last one has finished its channels, then each applies them to
// its own rows. What it has loaded of its first rows it has kept in shared memory, as much as fits;
// the others it reads again, the last one first, since that is the likeliest to be in the
// second-level cache. Rows are shared out and sums added as by the two kernels, with every fused
// multiplication spelled as fmaf, so that the results are theirs bit for bit.
//
// Or cuDNN's engine each way (cuda/norm_graph.h), which leaves mean and r; a kernel over the
// channels does the rest.
//
// Never stored: x^, the normalised map before the residual or the ReLU, and the masked gradient
// unless a residual wants it. The mask is recomputed from x by the expression of the forward pass;
// where a residual was added it is the sign of the output.
//
// Shapes: x, y, residual, dy, dx [rows, channels] in T with rows = N H W; all constants [channels]
// fp32. Vectors [N, E] are maps of N rows, T = float.
#pragma once

#include "core/network.h"
#include "cuda/kernels/cooperative.cuh"
#include "cuda/kernels/vectors.cuh"

namespace hardmine::cuda {

// One batch-norm of a network in training.
struct BatchNorm {
  int64_t rows;  // values of a channel: 2 or more
  int64_t channels;
  const float* gamma;  // null: fixed at 1
  const float* beta;
  float* running_mean;
  float* running_variance;
  float* mean;               // of the batch: written by the forward pass, read by the backward
  float* inverse_deviation;  // r, likewise
  float* scale;              // gamma r, likewise
};

struct BatchNormGradient {
  float* gamma;  // null where the scale is fixed
  float* beta;
};

// Per channel: y = scale (x - mean) + shift.
struct Affine {
  const float* mean;   // null: 0
  const float* scale;  // null: 1
  const float* shift;
};

// Blocks of a reduction: two of them on each of 128 SMs already have more loads in flight than the
// memory's latency takes, and the last one merges what all of them found.
inline constexpr int64_t kReductionBlocks = 256;

// What the reductions of one stream need, shared by all its batch-norms.
struct BatchNormScratch {
  float* values;
  unsigned* arrivals;  // zero before the first use; every use leaves zeros
  // At most. One kernel each way needs them all on the device at once, which may ask for fewer; the
  // last bits of the results depend on it.
  int64_t blocks = kReductionBlocks;
};

struct BatchNormScratchSize {
  int64_t values, arrivals;
};

// Blocks of an element-wise pass: several waves even out what SMs finish early.
inline constexpr int64_t kElementBlocks = 2048;

template <typename T>
BatchNormScratchSize batch_norm_scratch_size(int64_t rows, int64_t channels) {
  return with_vector_width<T>(channels, [&](auto width) -> BatchNormScratchSize {
    const Tiling t = tile<width()>(rows, channels, kReductionBlocks);
    // Two partial sums of every block row, then by_x and offset.
    return {2 * channels * (int64_t{t.row_blocks} + 1), t.column_blocks};
  });
}

// ---- Kernels ----

// A thread's channels of an affine map, in registers.
template <int width>
struct AffineValues {
  Pack<float, width> mean, scale, shift;

  __device__ AffineValues(const Affine& a, int channel) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      mean.at[i] = 0;
      scale.at[i] = 1;
    }
    if (a.mean != nullptr) mean = load<width>(a.mean + channel);
    if (a.scale != nullptr) scale = load<width>(a.scale + channel);
    shift = load<width>(a.shift + channel);
  }

  __device__ float centred(float x, int i) const {
    return x - mean.at[i];
  }
  // Spelled as fmaf, so that the backward pass finds the very number whose sign was the mask.
  __device__ float operator()(float x, int i) const {
    return fmaf(centred(x, i), scale.at[i], shift.at[i]);
  }
};

// Rows whose loads a thread starts before it uses the first: as many as two blocks on an SM have
// registers for.
inline constexpr int kRowsInFlight = 4;
inline constexpr int kGradientRowsInFlight = 2;  // of up to four maps
inline constexpr int kWholeRowsInFlight = 2;     // where a kernel also finishes its channels

enum class Order : uint8_t { rising, falling };

// Calls prepare(u, offset) for the next `in_flight` rows of a thread, to load, then use(u, offset)
// for the same rows, until the block's rows are done.
template <int in_flight, Order order = Order::rising, typename Prepare, typename Use>
__device__ void over_rows(const Tiling& t, const Place& at, const Prepare& prepare,
                          const Use& use) {
  const auto offset_of = [&](int64_t r) {
    return (order == Order::rising ? r : at.first + at.last - 1 - r) * t.channels + at.channel;
  };
  for (int64_t row = at.first + at.lane; row < at.last; row += int64_t{in_flight} * t.lanes) {
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      const int64_t r = row + int64_t{u} * t.lanes;
      if (r < at.last) prepare(u, offset_of(r));
    }
#pragma unroll
    for (int u = 0; u < in_flight; ++u) {
      const int64_t r = row + int64_t{u} * t.lanes;
      if (r < at.last) use(u, offset_of(r));
    }
  }
}

// A NaN stays one: a broken activation must not turn into a zero.
__device__ inline float positive(float x) {
  return x < 0.0F ? 0.0F : x;
}

// r, from squared deviations over all rows.
template <int width>
__device__ Pack<float, width> inverse_deviations(const BatchNorm& norm,
                                                 const Pack<float, width>& squares) {
  Pack<float, width> inverse;
#pragma unroll
  for (int i = 0; i < width; ++i)
    inverse.at[i] = 1.0F / sqrtf(squares.at[i] / static_cast<float>(norm.rows) +
                                 static_cast<float>(kBatchNormEpsilon));
  return inverse;
}

// What the forward and the backward pass want of neighbouring channels, from their means and
// squared deviations over all rows.
template <int width>
__device__ void finish_channels(const BatchNorm& norm, int64_t channel,
                                const Pack<float, width>& mean, const Pack<float, width>& squares) {
  const auto count = static_cast<float>(norm.rows);
  constexpr auto kMomentum = static_cast<float>(kBatchNormMomentum);
  // All loads before the first store, which they could otherwise not pass.
  Pack<float, width> running_mean = load<width>(norm.running_mean + channel);
  Pack<float, width> running_variance = load<width>(norm.running_variance + channel);
  const Pack<float, width> inverse = inverse_deviations(norm, squares);
  Pack<float, width> scale;
#pragma unroll
  for (int i = 0; i < width; ++i) scale.at[i] = 1;
  if (norm.gamma != nullptr) scale = load<width>(norm.gamma + channel);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    scale.at[i] *= inverse.at[i];
    running_mean.at[i] = fmaf(kMomentum, mean.at[i] - running_mean.at[i], running_mean.at[i]);
    running_variance.at[i] = fmaf(
        kMomentum, squares.at[i] / (count - 1.0F) - running_variance.at[i], running_variance.at[i]);
  }
  store(norm.mean + channel, mean);
  store(norm.inverse_deviation + channel, inverse);
  store(norm.scale + channel, scale);
  store(norm.running_mean + channel, running_mean);
  store(norm.running_variance + channel, running_variance);
}

// Shared memory of the kernels that reduce.
struct NormSumTag {};
struct NormLastTag {};

// Mean and squared deviations of the block's rows; calls keep(values) for each row.
template <typename T, int width, typename Keep>
__device__ void reduce_statistics(const Tiling& t, const Place& at, const T* __restrict__ x,
                                  float* partial_means, float* partial_squares, const Keep& keep) {
  Pack<float, width> origin{}, sums[2] = {};
  if (at.active) {
    const Pack<T, width> first = load<width>(x + at.first * t.channels + at.channel);
#pragma unroll
    for (int i = 0; i < width; ++i) origin.at[i] = to_float(first.at[i]);
    Pack<T, width> values[kRowsInFlight];
    over_rows<kRowsInFlight>(
        t, at, [&](int u, int64_t offset) { values[u] = load<width>(x + offset); },
        [&](int u, int64_t) {
#pragma unroll
          for (int i = 0; i < width; ++i) {
            const float d = to_float(values[u].at[i]) - origin.at[i];
            sums[0].at[i] += d;
            sums[1].at[i] = fmaf(d, d, sums[1].at[i]);
          }
          keep(values[u]);
        });
  }
  sum_lanes<NormSumTag>(t, at.lane, sums);
  if (!at.active || at.lane != 0) return;
  const float inverse = 1.0F / static_cast<float>(at.last - at.first);
  const int64_t to = int64_t{blockIdx.y} * t.channels + at.channel;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float shift = sums[0].at[i] * inverse;
    sums[1].at[i] = positive(fmaf(-sums[0].at[i], shift, sums[1].at[i]));
    sums[0].at[i] = fmaf(sums[0].at[i], inverse, origin.at[i]);
  }
  store(partial_means + to, sums[0]);
  store(partial_squares + to, sums[1]);
}

// What the last block of a column makes of all that its blocks have found.
template <int width>
__device__ void finish_statistics(const BatchNorm& norm, const Tiling& t, const Place& at,
                                  const float* partial_means, const float* partial_squares) {
  Pack<float, width> origin{}, sums[2] = {};
  if (at.active) {
    origin = load<width>(partial_means + at.channel);
#pragma unroll 4
    for (unsigned p = static_cast<unsigned>(at.lane); p < t.row_blocks;
         p += static_cast<unsigned>(t.lanes)) {
      const int64_t from = int64_t{p} * t.channels + at.channel;
      const int64_t left = t.rows - int64_t{p} * t.rows_per_block;
      const auto count = static_cast<float>(left < t.rows_per_block ? left : t.rows_per_block);
      const Pack<float, width> mean = load<width>(partial_means + from);
      const Pack<float, width> squares = load<width>(partial_squares + from);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float d = mean.at[i] - origin.at[i];
        sums[0].at[i] = fmaf(count, d, sums[0].at[i]);
        sums[1].at[i] += fmaf(count * d, d, squares.at[i]);
      }
    }
  }
  sum_lanes<NormSumTag>(t, at.lane, sums);
  if (!at.active || at.lane != 0) return;
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float shift = sums[0].at[i] / static_cast<float>(t.rows);
    sums[1].at[i] = positive(fmaf(-sums[0].at[i], shift, sums[1].at[i]));
    sums[0].at[i] = origin.at[i] + shift;
  }
  finish_channels(norm, at.channel, sums[0], sums[1]);
}

// Per-channel mean and squared deviations; the last block of a column finishes its channels.
template <typename T, int width>
__global__ void __launch_bounds__(kTileThreads, 2)
    batch_statistics_kernel(BatchNorm norm, Tiling t, const T* __restrict__ x, float* partial_means,
                            float* partial_squares, unsigned* arrivals) {
  const Place at = place_in<width>(t);
  reduce_statistics<T, width>(t, at, x, partial_means, partial_squares,
                              [](const Pack<T, width>&) {});
  if (!is_last_block<NormLastTag>(arrivals + blockIdx.x, t.row_blocks)) return;
  finish_statistics<width>(norm, t, at, partial_means, partial_squares);
  if (threadIdx.x == 0) arrivals[blockIdx.x] = 0;
}

// y = activation(scale (x - mean) + shift + residual) of the rows of `at`; row(offset) gives x.
template <int in_flight, Order order = Order::rising, typename T, int width, typename Row>
__device__ void affine_rows(const AffineValues<width>& map, const Tiling& t, const Place& at,
                            const Row& row, const T* residual, T* y, bool relu) {
  Pack<T, width> values[in_flight], others[in_flight] = {};
  over_rows<in_flight, order>(
      t, at,
      [&](int u, int64_t offset) {
        values[u] = row(offset);
        if (residual != nullptr) others[u] = load<width>(residual + offset);
      },
      [&](int u, int64_t offset) {
        Pack<T, width> result;
#pragma unroll
        for (int i = 0; i < width; ++i) {
          float value = map(to_float(values[u].at[i]), i) + to_float(others[u].at[i]);
          if (relu) value = positive(value);
          result.at[i] = from_float<T>(value);
        }
        store(y + offset, result);
      });
}

// y may be x or the residual.
template <typename T, int width>
__global__ void __launch_bounds__(kTileThreads, 2)
    affine_kernel(Affine affine, Tiling t, const T* x, const T* residual, T* y, bool relu) {
  const Place at = place_in<width>(t);
  if (!at.active) return;
  affine_rows<kRowsInFlight>(
      AffineValues<width>(affine, at.channel), t, at,
      [&](int64_t offset) { return load<width>(x + offset); }, residual, y, relu);
}

// Mean and squared deviations from sums [2, channels] of x and of x^2.
template <int width>
__device__ void statistics_from_sums(const BatchNorm& norm, const float* __restrict__ sums,
                                     int64_t channel, Pack<float, width>& mean,
                                     Pack<float, width>& squares) {
  mean = load<width>(sums + channel);
  squares = load<width>(sums + norm.channels + channel);
  const double share = 1.0 / static_cast<double>(norm.rows);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    // In double, so that nothing but the sums' own rounding is lost.
    const double sum = mean.at[i];
    squares.at[i] = positive(static_cast<float>(squares.at[i] - sum * sum * share));
    mean.at[i] = static_cast<float>(sum * share);
  }
}

// y by statistics from sums. The blocks of the first rows store what the backward pass wants.
template <typename T, int width>
__global__ void __launch_bounds__(kTileThreads, 2)
    batch_norm_from_sums_kernel(BatchNorm norm, Tiling t, const float* __restrict__ sums,
                                const T* x, const T* residual, T* y, bool relu) {
  const Place at = place_in<width>(t);
  if (!at.active) return;
  Pack<float, width> mean, squares;
  statistics_from_sums(norm, sums, at.channel, mean, squares);
  if (blockIdx.y == 0 && at.lane == 0) finish_channels(norm, at.channel, mean, squares);
  AffineValues<width> map({nullptr, norm.gamma, norm.beta}, at.channel);
  const Pack<float, width> inverse = inverse_deviations(norm, squares);
  map.mean = mean;
#pragma unroll
  for (int i = 0; i < width; ++i) map.scale.at[i] *= inverse.at[i];
  affine_rows<kWholeRowsInFlight>(
      map, t, at, [&](int64_t offset) { return load<width>(x + offset); }, residual, y, relu);
}

// The statistics alone, a channel to a thread, and y = applied_scale x + applied_bias for a reader
// of x. The bias goes with the rounded scale, so that the mean lands on beta whatever the scale's
// rounding.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    batch_norm_to_apply_kernel(BatchNorm norm, const float* __restrict__ sums, T* applied_scale,
                               T* applied_bias) {
  const int64_t channel = int64_t{blockIdx.x} * kTileThreads + threadIdx.x;
  if (channel >= norm.channels) return;
  Pack<float, 1> mean, squares;
  statistics_from_sums(norm, sums, channel, mean, squares);
  finish_channels(norm, channel, mean, squares);
  const T scale = from_float<T>(norm.scale[channel]);
  applied_scale[channel] = scale;
  applied_bias[channel] = from_float<T>(fmaf(-to_float(scale), mean.at[0], norm.beta[channel]));
}

// The rest of the channels, where mean and r are there.
template <int width>
__global__ void __launch_bounds__(kTileThreads) batch_norm_finish_kernel(BatchNorm norm) {
  const int64_t channel = (int64_t{blockIdx.x} * kTileThreads + threadIdx.x) * width;
  if (channel >= norm.channels) return;
  Pack<float, width> squares = load<width>(norm.inverse_deviation + channel);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    const float deviation = 1.0F / squares.at[i];
    const float variance =
        positive(fmaf(deviation, deviation, -static_cast<float>(kBatchNormEpsilon)));
    squares.at[i] = variance * static_cast<float>(norm.rows);
  }
  finish_channels(norm, channel, load<width>(norm.mean + channel), squares);
}

// Where a thread keeps what it has loaded of its first rows, in the order of the calls of next(). A
// vector of each thread lies beside those of its neighbours, so that a warp meets every bank once.
template <typename T, int width>
class KeptRows {
 public:
  __device__ Pack<T, width>& next() {
    Pack<T, width>& vector = dynamic_shared<Pack<T, width>>()[at_];
    at_ += kTileThreads;
    return vector;
  }

 private:
  int at_ = static_cast<int>(threadIdx.x);
};

// The rows of a block of which every thread keeps `kept`, and the block's other rows.
__device__ inline Place kept_rows(const Tiling& t, Place at, int kept) {
  const int64_t last = at.first + int64_t{kept} * t.lanes;
  if (last < at.last) at.last = last;
  return at;
}
__device__ inline Place other_rows(const Tiling& t, Place at, int kept) {
  at.first = kept_rows(t, at, kept).last;
  return at;
}

// Statistics and y in one pass over the map, and a second over what was not kept of it.
template <typename T, int width>
__global__ void __launch_bounds__(kTileThreads, 2)
    batch_norm_forward_whole_kernel(BatchNorm norm, Tiling t, int kept, const T* __restrict__ x,
                                    const T* residual, T* y, bool relu, float* partial_means,
                                    float* partial_squares, unsigned* arrivals) {
  const Place at = place_in<width>(t);
  KeptRows<T, width> writes, reads;
  int left = kept;
  reduce_statistics<T, width>(t, at, x, partial_means, partial_squares,
                              [&](const Pack<T, width>& values) {
                                if (left-- > 0) writes.next() = values;
                              });
  finish_in_last_block<NormLastTag>(arrivals + blockIdx.x, t.row_blocks, [&] {
    finish_statistics<width>(norm, t, at, partial_means, partial_squares);
  });
  if (!at.active) return;
  const AffineValues<width> map({norm.mean, norm.scale, norm.beta}, at.channel);
  affine_rows<kWholeRowsInFlight, Order::falling>(
      map, t, other_rows(t, at, kept), [&](int64_t offset) { return load<width>(x + offset); },
      residual, y, relu);
  affine_rows<kWholeRowsInFlight>(
      map, t, kept_rows(t, at, kept), [&](int64_t) { return reads.next(); }, residual, y, relu);
}

// How the gradient before the activation is found from the one after it.
enum class ReluMask : uint8_t {
  none,         // no activation
  from_input,   // recomputed from x
  from_output,  // the sign of y, where a residual was added
};

// What the backward kernels read and write.
template <typename T>
struct BackwardMaps {
  const T* x;
  const T* y;
  T* dy;  // becomes g where g is not dy or cannot be recomputed
  const T* dy_other;
  T* dx;  // may be x or dy
};

// What the backward kernels leave for each other.
struct GradientSums {
  float* sums;     // of g: [row blocks, channels]
  float* sums_x;   // of g (x - mean), likewise
  float* by_x;     // [channels]
  float* offsets;  // likewise
};

// Sums of the block's rows; calls keep(x, g) for each row.
template <typename T, int width, ReluMask mask, typename Keep>
__device__ void reduce_gradient(const BatchNorm& norm, const Tiling& t, const Place& at,
                                const BackwardMaps<T>& maps, const GradientSums& scratch,
                                const Keep& keep) {
  Pack<float, width> sums[2] = {};
  if (at.active) {
    const AffineValues<width> map({norm.mean, norm.scale, norm.beta}, at.channel);
    const bool writes = mask == ReluMask::from_output || maps.dy_other != nullptr;
    Pack<T, width> xs[kGradientRowsInFlight], gradients[kGradientRowsInFlight];
    Pack<T, width> others[kGradientRowsInFlight] = {}, outputs[kGradientRowsInFlight] = {};
    over_rows<kGradientRowsInFlight>(
        t, at,
        [&](int u, int64_t offset) {
          xs[u] = load<width>(maps.x + offset);
          gradients[u] = load<width>(maps.dy + offset);
          if (maps.dy_other != nullptr) others[u] = load<width>(maps.dy_other + offset);
          if constexpr (mask == ReluMask::from_output) outputs[u] = load<width>(maps.y + offset);
        },
        [&](int u, int64_t offset) {
          Pack<T, width> masked;
#pragma unroll
          for (int i = 0; i < width; ++i) {
            const float x = to_float(xs[u].at[i]);
            float g = to_float(gradients[u].at[i]);
            // Not a sum with 0, which would make 0 of the -0 that a second kernel reads from dy.
            if (maps.dy_other != nullptr) g += to_float(others[u].at[i]);
            if (mask == ReluMask::from_input && !(map(x, i) > 0.0F)) g = 0.0F;
            if (mask == ReluMask::from_output && !(to_float(outputs[u].at[i]) > 0.0F)) g = 0.0F;
            masked.at[i] = from_float<T>(g);
            sums[0].at[i] += g;
            sums[1].at[i] = fmaf(g, map.centred(x, i), sums[1].at[i]);
          }
          if (writes) store(maps.dy + offset, masked);
          keep(xs[u], masked);
        });
  }
  sum_lanes<NormSumTag>(t, at.lane, sums);
  if (!at.active || at.lane != 0) return;
  const int64_t to = int64_t{blockIdx.y} * t.channels + at.channel;
  store(scratch.sums + to, sums[0]);
  store(scratch.sums_x + to, sums[1]);
}

// by_x and offset of dx, from dgamma and dbeta.
template <int width>
__device__ void input_gradient_terms(const BatchNorm& norm, int64_t channel,
                                     const Pack<float, width>& gamma,
                                     const Pack<float, width>& beta, Pack<float, width>& slope,
                                     Pack<float, width>& constant) {
  const float share = 1.0F / static_cast<float>(norm.rows);
  const Pack<float, width> inverse = load<width>(norm.inverse_deviation + channel);
  const Pack<float, width> scale = load<width>(norm.scale + channel);
#pragma unroll
  for (int i = 0; i < width; ++i) {
    slope.at[i] = -scale.at[i] * inverse.at[i] * gamma.at[i] * share;
    constant.at[i] = -scale.at[i] * beta.at[i] * share;
  }
}

// What the last block of a column makes of all that its blocks have found.
template <int width>
__device__ void finish_gradient(const BatchNorm& norm, const BatchNormGradient& gradient,
                                const Tiling& t, const Place& at, const GradientSums& scratch) {
  Pack<float, width> sums[2] = {};
  if (at.active) {
#pragma unroll 4
    for (unsigned p = static_cast<unsigned>(at.lane); p < t.row_blocks;
         p += static_cast<unsigned>(t.lanes)) {
      const int64_t from = int64_t{p} * t.channels + at.channel;
      const Pack<float, width> sum = load<width>(scratch.sums + from);
      const Pack<float, width> sum_x = load<width>(scratch.sums_x + from);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sums[0].at[i] += sum.at[i];
        sums[1].at[i] += sum_x.at[i];
      }
    }
  }
  sum_lanes<NormSumTag>(t, at.lane, sums);
  if (!at.active || at.lane != 0) return;
  const Pack<float, width> inverse = load<width>(norm.inverse_deviation + at.channel);
  Pack<float, width> gamma, slope, constant;
#pragma unroll
  for (int i = 0; i < width; ++i) gamma.at[i] = sums[1].at[i] * inverse.at[i];
  input_gradient_terms(norm, at.channel, gamma, sums[0], slope, constant);
  store(gradient.beta + at.channel, sums[0]);
  if (gradient.gamma != nullptr) store(gradient.gamma + at.channel, gamma);
  store(scratch.by_x + at.channel, slope);
  store(scratch.offsets + at.channel, constant);
}

template <typename T, int width, ReluMask mask>
__global__ void __launch_bounds__(kTileThreads, 2)
    batch_norm_gradient_kernel(BatchNorm norm, BatchNormGradient gradient, Tiling t,
                               BackwardMaps<T> maps, GradientSums scratch, unsigned* arrivals) {
  const Place at = place_in<width>(t);
  reduce_gradient<T, width, mask>(norm, t, at, maps, scratch,
                                  [](const Pack<T, width>&, const Pack<T, width>&) {});
  if (!is_last_block<NormLastTag>(arrivals + blockIdx.x, t.row_blocks)) return;
  finish_gradient<width>(norm, gradient, t, at, scratch);
  if (threadIdx.x == 0) arrivals[blockIdx.x] = 0;
}

// A thread's channels of dx as a function of x and g, in registers.
template <int width>
struct GradientValues {
  AffineValues<width> map;
  Pack<float, width> slope, constant;

  __device__ GradientValues(const BatchNorm& norm, const GradientSums& scratch, int channel)
      : map({norm.mean, norm.scale, norm.beta}, channel),
        slope(load<width>(scratch.by_x + channel)),
        constant(load<width>(scratch.offsets + channel)) {}
  __device__ GradientValues(const BatchNorm& norm, const BatchNormGradient& gradient, int channel)
      : map({norm.mean, norm.scale, norm.beta}, channel) {
    input_gradient_terms(norm, channel, load<width>(gradient.gamma + channel),
                         load<width>(gradient.beta + channel), slope, constant);
  }
};

// dx of the rows of `at`; row(offset, x, g) gives x and g, which is masked here where that is done
// from x.
template <bool mask_from_input, int in_flight, Order order = Order::rising, typename T, int width,
          typename Row>
__device__ void input_gradient_rows(const GradientValues<width>& of, const Tiling& t,
                                    const Place& at, const Row& row, T* dx) {
  Pack<T, width> xs[in_flight], gradients[in_flight];
  over_rows<in_flight, order>(
      t, at, [&](int u, int64_t offset) { row(offset, xs[u], gradients[u]); },
      [&](int u, int64_t offset) {
        Pack<T, width> result;
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const float x = to_float(xs[u].at[i]);
          float g = to_float(gradients[u].at[i]);
          if (mask_from_input && !(of.map(x, i) > 0.0F)) g = 0.0F;
          const float rest = fmaf(of.map.centred(x, i), of.slope.at[i], of.constant.at[i]);
          result.at[i] = from_float<T>(fmaf(g, of.map.scale.at[i], rest));
        }
        store(dx + offset, result);
      });
}

template <typename T, int width, bool mask_from_input>
__global__ void __launch_bounds__(kTileThreads, 2)
    batch_norm_backward_kernel(BatchNorm norm, Tiling t, BackwardMaps<T> maps,
                               GradientSums scratch) {
  const Place at = place_in<width>(t);
  if (!at.active) return;
  input_gradient_rows<mask_from_input, kRowsInFlight>(
      GradientValues<width>(norm, scratch, at.channel), t, at,
      [&](int64_t offset, Pack<T, width>& x, Pack<T, width>& g) {
        x = load<width>(maps.x + offset);
        g = load<width>(maps.dy + offset);
      },
      maps.dx);
}

// dx by the parameters' gradients, which are there; maps.dy is masked.
template <typename T, int width>
__global__ void __launch_bounds__(kTileThreads, 2)
    batch_norm_backward_from_gradient_kernel(BatchNorm norm, BatchNormGradient gradient, Tiling t,
                                             BackwardMaps<T> maps) {
  const Place at = place_in<width>(t);
  if (!at.active) return;
  input_gradient_rows<false, kRowsInFlight>(
      GradientValues<width>(norm, gradient, at.channel), t, at,
      [&](int64_t offset, Pack<T, width>& x, Pack<T, width>& g) {
        x = load<width>(maps.x + offset);
        g = load<width>(maps.dy + offset);
      },
      maps.dx);
}

// The parameters' gradients and dx, likewise.
template <typename T, int width, ReluMask mask>
__global__ void __launch_bounds__(kTileThreads, 2)
    batch_norm_backward_whole_kernel(BatchNorm norm, BatchNormGradient gradient, Tiling t, int kept,
                                     BackwardMaps<T> maps, GradientSums scratch,
                                     unsigned* arrivals) {
  constexpr bool kMaskFromInput = mask == ReluMask::from_input;
  const Place at = place_in<width>(t);
  KeptRows<T, width> writes, reads;
  int left = kept;
  reduce_gradient<T, width, mask>(norm, t, at, maps, scratch,
                                  [&](const Pack<T, width>& x, const Pack<T, width>& g) {
                                    if (left-- <= 0) return;
                                    writes.next() = x;
                                    writes.next() = g;
                                  });
  finish_in_last_block<NormLastTag>(arrivals + blockIdx.x, t.row_blocks, [&] {
    finish_gradient<width>(norm, gradient, t, at, scratch);
  });
  if (!at.active) return;
  const GradientValues<width> values(norm, scratch, at.channel);
  input_gradient_rows<kMaskFromInput, kWholeRowsInFlight, Order::falling>(
      values, t, other_rows(t, at, kept),
      [&](int64_t offset, Pack<T, width>& x, Pack<T, width>& g) {
        x = load<width>(maps.x + offset);
        g = load<width>(maps.dy + offset);
      },
      maps.dx);
  input_gradient_rows<kMaskFromInput, kWholeRowsInFlight>(
      values, t, kept_rows(t, at, kept),
      [&](int64_t, Pack<T, width>& x, Pack<T, width>& g) {
        x = reads.next();
        g = reads.next();
      },
      maps.dx);
}

// ---- Launches ----

// y = activation(scale (x - mean) + shift + residual); residual may be null, y may be x or the
// residual. Batch-norm by known statistics, or with mean and scale null a bias after a convolution.
template <typename T>
void apply_affine(const Affine& affine, int64_t rows, int64_t channels, const T* x,
                  const T* residual, T* y, bool relu, cudaStream_t stream) {
  with_vector_width<T>(channels, [&](auto width) {
    const Tiling t = tile<width()>(rows, channels, kElementBlocks);
    launch("affine", &affine_kernel<T, width()>, t.grid(), kTileThreads, stream, affine, t, x,
           residual, y, relu);
  });
}

// What the batch says of each channel, which also moves the running statistics.
template <typename T>
void batch_statistics(const BatchNorm& norm, const T* x, const BatchNormScratch& scratch,
                      cudaStream_t stream) {
  with_vector_width<T>(norm.channels, [&](auto width) {
    const Tiling t = tile<width()>(norm.rows, norm.channels, scratch.blocks);
    launch("batch_statistics", &batch_statistics_kernel<T, width()>, t.grid(), kTileThreads, stream,
           norm, t, x, scratch.values, scratch.values + norm.channels * t.row_blocks,
           scratch.arrivals);
  });
}

// By the statistics that batch_statistics() has left in `norm`. y may be the residual, not x, which
// the backward pass reads.
template <typename T>
void batch_norm_forward(const BatchNorm& norm, const T* x, const T* residual, T* y, bool relu,
                        cudaStream_t stream) {
  apply_affine({norm.mean, norm.scale, norm.beta}, norm.rows, norm.channels, x, residual, y, relu,
               stream);
}

// Both at once from the sums of x and of x^2 [2, channels].
template <typename T>
void batch_norm_forward_from_sums(const BatchNorm& norm, const float* sums, const T* x,
                                  const T* residual, T* y, bool relu, cudaStream_t stream) {
  with_vector_width<T>(norm.channels, [&](auto width) {
    const Tiling t = tile<width()>(norm.rows, norm.channels, kElementBlocks);
    launch("batch_norm_from_sums", &batch_norm_from_sums_kernel<T, width()>, t.grid(), kTileThreads,
           stream, norm, t, sums, x, residual, y, relu);
  });
}

// The same without y, which whoever reads x makes of it, applied_scale x + applied_bias.
template <typename T>
void batch_norm_to_apply(const BatchNorm& norm, const float* sums, T* applied_scale,
                         T* applied_bias, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((norm.channels + kTileThreads - 1) / kTileThreads);
  launch("batch_norm_to_apply", &batch_norm_to_apply_kernel<T>, dim3(blocks), kTileThreads, stream,
         norm, sums, applied_scale, applied_bias);
}

// What batch_statistics() does, where something else has left the mean and r.
inline void finish_batch_norm(const BatchNorm& norm, cudaStream_t stream) {
  with_vector_width<float>(norm.channels, [&](auto width) {
    const int64_t threads = norm.channels / width();
    launch("batch_norm_finish", &batch_norm_finish_kernel<width()>,
           dim3(static_cast<unsigned>((threads + kTileThreads - 1) / kTileThreads)), kTileThreads,
           stream, norm);
  });
}

// Calls run(std::integral_constant<ReluMask, mask>).
template <typename Run>
auto with_relu_mask(bool relu, bool residual, const Run& run) {
  if (!relu) return run(std::integral_constant<ReluMask, ReluMask::none>());
  if (residual) return run(std::integral_constant<ReluMask, ReluMask::from_output>());
  return run(std::integral_constant<ReluMask, ReluMask::from_input>());
}

inline GradientSums gradient_sums(const Tiling& t, const BatchNormScratch& scratch) {
  const int64_t partials = int64_t{t.channels} * t.row_blocks;
  float* const by_x = scratch.values + 2 * partials;
  return {scratch.values, scratch.values + partials, by_x, by_x + t.channels};
}

// dx and the parameters' gradients from dy, or dy + dy_other where dy_other is not null. y is the
// output where a residual was added before the ReLU, else null. The residual's gradient is what
// stands in dy afterwards: with y given, the masked sum. dx may be x, which is then lost, or dy.
template <typename T>
void batch_norm_backward(const BatchNorm& norm, const BatchNormGradient& gradient, const T* x,
                         const T* y, bool relu, T* dy, const T* dy_other, T* dx,
                         const BatchNormScratch& scratch, cudaStream_t stream) {
  const BackwardMaps<T> maps{x, y, dy, dy_other, dx};
  with_vector_width<T>(norm.channels, [&](auto width) {
    const Tiling reduction = tile<width()>(norm.rows, norm.channels, scratch.blocks);
    const GradientSums sums = gradient_sums(reduction, scratch);
    const Tiling t = tile<width()>(norm.rows, norm.channels, kElementBlocks);
    with_relu_mask(relu, y != nullptr, [&](auto mask) {
      launch("batch_norm_gradient", &batch_norm_gradient_kernel<T, width(), mask()>,
             reduction.grid(), kTileThreads, stream, norm, gradient, reduction, maps, sums,
             scratch.arrivals);
      launch("batch_norm_backward",
             &batch_norm_backward_kernel<T, width(), mask() == ReluMask::from_input>, t.grid(),
             kTileThreads, stream, norm, t, maps, sums);
    });
  });
}

// dx from dy that is already masked, and from the parameters' gradients, which are already there:
// gamma is trained.
template <typename T>
void batch_norm_backward_from_gradient(const BatchNorm& norm, const BatchNormGradient& gradient,
                                       const T* x, T* dy, T* dx, cudaStream_t stream) {
  const BackwardMaps<T> maps{x, nullptr, dy, nullptr, dx};
  with_vector_width<T>(norm.channels, [&](auto width) {
    const Tiling t = tile<width()>(norm.rows, norm.channels, kElementBlocks);
    launch("batch_norm_backward_from_gradient",
           &batch_norm_backward_from_gradient_kernel<T, width()>, t.grid(), kTileThreads, stream,
           norm, gradient, t, maps);
  });
}

// ---- The same by one kernel each way ----

template <typename T, int width>
constexpr int kKeptBytes = static_cast<int>(kTileThreads * sizeof(Pack<T, width>));  // a map's row

template <typename T, int width, typename... Parameters>
std::optional<int> rows_to_keep(const CooperativeLimits& device, void (*kernel)(Parameters...),
                                const Tiling& t, int maps) {
  return shared_pieces(device, kernel, int64_t{t.column_blocks} * t.row_blocks, kTileThreads,
                       maps * kKeptBytes<T, width>, (t.rows_per_block + t.lanes - 1) / t.lanes);
}

// Of how many rows each thread can keep what it loads, where the blocks are on the device at once:
// `kept` below. nullopt: they never are, and two kernels it must be.
template <typename T>
std::optional<int> forward_rows_to_keep(const CooperativeLimits& device, int64_t rows,
                                        int64_t channels, const BatchNormScratch& scratch) {
  return with_vector_width<T>(channels, [&](auto width) {
    return rows_to_keep<T, width()>(device, &batch_norm_forward_whole_kernel<T, width()>,
                                    tile<width()>(rows, channels, scratch.blocks), 1);
  });
}

// `residual`: whether one was added before the ReLU.
template <typename T>
std::optional<int> backward_rows_to_keep(const CooperativeLimits& device, int64_t rows,
                                         int64_t channels, bool relu, bool residual,
                                         const BatchNormScratch& scratch) {
  return with_vector_width<T>(channels, [&](auto width) {
    return with_relu_mask(relu, residual, [&](auto mask) {
      return rows_to_keep<T, width()>(device, &batch_norm_backward_whole_kernel<T, width(), mask()>,
                                      tile<width()>(rows, channels, scratch.blocks), 2);
    });
  });
}

// batch_statistics() and batch_norm_forward().
template <typename T>
void batch_norm_forward_whole(const BatchNorm& norm, int kept, const T* x, const T* residual, T* y,
                              bool relu, const BatchNormScratch& scratch, cudaStream_t stream) {
  with_vector_width<T>(norm.channels, [&](auto width) {
    const Tiling t = tile<width()>(norm.rows, norm.channels, scratch.blocks);
    LaunchOptions options = stream;
    options.shared_bytes = size_t{1} * kept * kKeptBytes<T, width()>;
    options.cooperative = true;
    launch("batch_norm_forward_whole", &batch_norm_forward_whole_kernel<T, width()>, t.grid(),
           kTileThreads, options, norm, t, kept, x, residual, y, relu, scratch.values,
           scratch.values + norm.channels * t.row_blocks, scratch.arrivals);
  });
}

// batch_norm_backward().
template <typename T>
void batch_norm_backward_whole(const BatchNorm& norm, const BatchNormGradient& gradient, int kept,
                               const T* x, const T* y, bool relu, T* dy, const T* dy_other, T* dx,
                               const BatchNormScratch& scratch, cudaStream_t stream) {
  const BackwardMaps<T> maps{x, y, dy, dy_other, dx};
  with_vector_width<T>(norm.channels, [&](auto width) {
    const Tiling t = tile<width()>(norm.rows, norm.channels, scratch.blocks);
    LaunchOptions options = stream;
    options.shared_bytes = size_t{2} * kept * kKeptBytes<T, width()>;
    options.cooperative = true;
    with_relu_mask(relu, y != nullptr, [&](auto mask) {
      launch("batch_norm_backward_whole", &batch_norm_backward_whole_kernel<T, width(), mask()>,
             t.grid(), kTileThreads, options, norm, gradient, t, kept, maps,
             gradient_sums(t, scratch), scratch.arrivals);
    });
  });
}

}  // namespace hardmine::cuda
