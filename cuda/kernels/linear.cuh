// What surrounds the products of the last linear layer, which are cuBLASLt's.
//
//   y = x W^T + b       bias: apply_affine<float> of batch_norm.cuh, in place, mean and scale null
//   db = column sums of dy
//   operands in T of fp32 matrices, times a factor in device memory (the loss scale)
//
// Shapes: matrices [rows, columns] row-major.
#pragma once

#include "cuda/kernels/vectors.cuh"

namespace hardmine::cuda {

// One block for `groups * width` columns, all rows.
template <int width>
__global__ void __launch_bounds__(kTileThreads)
    column_sums_kernel(Tiling t, const float* __restrict__ x, float* __restrict__ sums) {
  struct SumTag {};
  const Place at = place_in<width>(t);
  Pack<float, width> sum[1] = {};
  if (at.active) {
#pragma unroll 4
    for (int64_t row = at.lane; row < t.rows; row += t.lanes) {
      const Pack<float, width> values = load<width>(x + row * t.channels + at.channel);
#pragma unroll
      for (int i = 0; i < width; ++i) sum[0].at[i] += values.at[i];
    }
  }
  sum_lanes<SumTag>(t, at.lane, sum);
  if (at.active && at.lane == 0) store(sums + at.channel, sum[0]);
}

inline constexpr int kConvertThreads = 256;
inline constexpr int kConvertWidth = 4;

template <typename T>
__global__ void __launch_bounds__(kConvertThreads)
    convert_kernel(const float* x, const float* factor, int64_t count, T* y) {
  const float by = factor != nullptr ? *factor : 1.0F;
  const int64_t first =
      (int64_t{blockIdx.x} * kConvertThreads + threadIdx.x) * int64_t{kConvertWidth};
  if (first + kConvertWidth <= count) {
    const Pack<float, kConvertWidth> values = load<kConvertWidth>(x + first);
    Pack<T, kConvertWidth> result;
#pragma unroll
    for (int i = 0; i < kConvertWidth; ++i) result.at[i] = from_float<T>(values.at[i] * by);
    store(y + first, result);
  } else {
    for (int64_t i = first; i < count; ++i) y[i] = from_float<T>(x[i] * by);
  }
}

// sums [columns] of x [rows, columns], rows in a fixed order.
inline void column_sums(const float* x, int64_t rows, int64_t columns, float* sums,
                        cudaStream_t stream) {
  with_vector_width<float>(columns, [&](auto width) {
    const Tiling t = tile<width()>(rows, columns, 1);
    launch("column_sums", &column_sums_kernel<width()>, t.grid(), kTileThreads, stream, t, x, sums);
  });
}

// y = x * factor in T; factor in device memory, null: 1. With T = float, y may be x.
template <typename T>
void convert(const float* x, const float* factor, int64_t count, T* y, cudaStream_t stream) {
  constexpr int64_t kPerBlock = int64_t{kConvertThreads} * kConvertWidth;
  launch("convert", &convert_kernel<T>,
         dim3(static_cast<unsigned>((count + kPerBlock - 1) / kPerBlock)), kConvertThreads, stream,
         x, factor, count, y);
}

}  // namespace hardmine::cuda
