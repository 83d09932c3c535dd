// Max-pool 3x3, stride 2, padding 1, and the global average pool, over NHWC maps.
//
//   y[r, s] = max of x[2r - 1 + i, 2s - 1 + j], i, j in 0..2, inside the map
//   where[r, s] = 3 i + j of the first maximum in row order; a NaN wins over any number
//   dx[h, w] = sum of dy[r, s] over the at most four windows that chose (h, w)
//
//   average: y = mean over the pixels;  dx = dy / pixels
//
// Fused with the max-pool: the batch-norm and ReLU before it, which then stand in x's place. Each
// element is normalised for every window over it, 2.25 times, which costs less than a map that is
// four times the pool's. It is rounded to T as if it had been stored, so that the same one wins.
//
// The backward pass gathers: each input element is written once, no zeros before it and no atomics,
// and its windows are added in row order. Stored for it: one byte an output element, not x nor y.
//
// Shapes: x [N, in, in, C], y and where [N, out, out, C], out = (in + 1) / 2; average y [N, C].
#pragma once

#include "cuda/kernels/batch_norm.cuh"

namespace hardmine::cuda {

inline constexpr int kPoolKernel = 3, kPoolStride = 2, kPoolPadding = 1;
inline constexpr int kPoolThreads = 256;

struct PoolShape {
  int64_t images;
  int channels;
  int in_size, out_size;  // sides of the square maps
};

struct NoMap {
  __device__ NoMap(const Affine&, int) {}
};
template <int width, bool normalises>
using InputMap = std::conditional_t<normalises, AffineValues<width>, NoMap>;

// One block a row of the output; neighbouring threads take neighbouring channels. The affine map
// and a ReLU come first where it `normalises`.
template <typename T, int width, bool normalises>
__global__ void __launch_bounds__(kPoolThreads, 2)
    max_pool_kernel(Affine affine, PoolShape shape, const T* __restrict__ x, T* __restrict__ y,
                    uint8_t* __restrict__ where) {
  const int n = static_cast<int>(blockIdx.x) / shape.out_size;
  const int row = static_cast<int>(blockIdx.x) % shape.out_size;
  const int top = row * kPoolStride - kPoolPadding;
  const int groups = shape.channels / width;
  const T* image = x + int64_t{n} * shape.in_size * shape.in_size * shape.channels;
  for (int item = static_cast<int>(threadIdx.x); item < shape.out_size * groups;
       item += kPoolThreads) {
    const int column = item / groups, channel = item % groups * width;
    const int left = column * kPoolStride - kPoolPadding;
    const InputMap<width, normalises> map(affine, channel);
    const auto value_of = [&](T stored, int k) {
      if constexpr (normalises) return to_float(from_float<T>(positive(map(to_float(stored), k))));
      return to_float(stored);
    };
    const auto inside = [&](int i, int j) {
      return top + i >= 0 && top + i < shape.in_size && left + j >= 0 && left + j < shape.in_size;
    };
    Pack<float, width> best{};
    Pack<uint8_t, width> best_at{};
    bool any = false;
#pragma unroll
    for (int i = 0; i < kPoolKernel; ++i) {
      Pack<T, width> values[kPoolKernel];  // more rows at a time take more registers than there are
#pragma unroll
      for (int j = 0; j < kPoolKernel; ++j) {
        if (inside(i, j))
          values[j] = load<width>(
              image + (int64_t{top + i} * shape.in_size + left + j) * shape.channels + channel);
      }
#pragma unroll
      for (int j = 0; j < kPoolKernel; ++j) {
        if (!inside(i, j)) continue;
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const float value = value_of(values[j].at[k], k);
          if (!any || value > best.at[k] || value != value) {
            best.at[k] = value;
            best_at.at[k] = static_cast<uint8_t>(i * kPoolKernel + j);
          }
        }
        any = true;
      }
    }
    Pack<T, width> result;
#pragma unroll
    for (int k = 0; k < width; ++k) result.at[k] = from_float<T>(best.at[k]);
    const int64_t to = (int64_t{blockIdx.x} * shape.out_size + column) * shape.channels + channel;
    store(y + to, result);
    store(where + to, best_at);
  }
}

// One block a row of the input.
template <typename T, int width>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool_backward_kernel(PoolShape shape, const T* __restrict__ dy,
                             const T* __restrict__ dy_other, const uint8_t* __restrict__ where,
                             T* __restrict__ dx) {
  const int n = static_cast<int>(blockIdx.x) / shape.in_size;
  const int row = static_cast<int>(blockIdx.x) % shape.in_size;
  const int groups = shape.channels / width;
  const int64_t image = int64_t{n} * shape.out_size * shape.out_size;
  // At most kWindows lie over a pixel in each direction, one after the other.
  constexpr int kWindows = (kPoolKernel + kPoolStride - 1) / kPoolStride;
  const auto first_window = [](int pixel) { return pixel / kPoolStride; };
  const auto covers = [&](int window, int pixel) {
    return window < shape.out_size && window * kPoolStride - kPoolPadding <= pixel;
  };
  for (int item = static_cast<int>(threadIdx.x); item < shape.in_size * groups;
       item += kPoolThreads) {
    const int column = item / groups, channel = item % groups * width;
    Pack<float, width> sum{};
#pragma unroll
    for (int a = 0; a < kWindows; ++a) {
#pragma unroll
      for (int b = 0; b < kWindows; ++b) {
        const int r = first_window(row) + a, s = first_window(column) + b;
        if (!covers(r, row) || !covers(s, column)) continue;
        const int position = (row + kPoolPadding - r * kPoolStride) * kPoolKernel + column +
                             kPoolPadding - s * kPoolStride;
        const int64_t from = (image + int64_t{r} * shape.out_size + s) * shape.channels + channel;
        const Pack<uint8_t, width> chosen = load<width>(where + from);
        const Pack<T, width> gradient = load<width>(dy + from);
        Pack<T, width> other{};
        if (dy_other != nullptr) other = load<width>(dy_other + from);
#pragma unroll
        for (int k = 0; k < width; ++k)
          if (chosen.at[k] == position)
            sum.at[k] += to_float(gradient.at[k]) + to_float(other.at[k]);
      }
    }
    Pack<T, width> result;
#pragma unroll
    for (int k = 0; k < width; ++k) result.at[k] = from_float<T>(sum.at[k]);
    store(dx + (int64_t{blockIdx.x} * shape.in_size + column) * shape.channels + channel, result);
  }
}

inline constexpr int kAverageThreads = 128;

// One thread an image and `width` channels; the pixels are added in order.
template <typename T, int width>
__global__ void __launch_bounds__(kAverageThreads)
    average_pool_kernel(int items, int pixels, int channels, const T* __restrict__ x,
                        float* __restrict__ y, T* __restrict__ operand) {
  const int item = static_cast<int>(blockIdx.x * kAverageThreads + threadIdx.x);
  if (item >= items) return;
  const int groups = channels / width, n = item / groups, channel = item % groups * width;
  const T* from = x + int64_t{n} * pixels * channels + channel;
  Pack<float, width> sum{};
#pragma unroll 4
  for (int p = 0; p < pixels; ++p) {
    const Pack<T, width> values = load<width>(from + int64_t{p} * channels);
#pragma unroll
    for (int k = 0; k < width; ++k) sum.at[k] += to_float(values.at[k]);
  }
  Pack<T, width> rounded;
  const float inverse = 1.0F / static_cast<float>(pixels);
#pragma unroll
  for (int k = 0; k < width; ++k) {
    sum.at[k] *= inverse;
    rounded.at[k] = from_float<T>(sum.at[k]);
  }
  const int64_t to = int64_t{n} * channels + channel;
  if (y != nullptr) store(y + to, sum);
  if (operand != nullptr) store(operand + to, rounded);
}

// One thread an image and `width` channels.
template <typename T, int width>
__global__ void __launch_bounds__(kAverageThreads)
    average_pool_backward_kernel(int items, int pixels, int channels, const float* __restrict__ dy,
                                 T* __restrict__ dx) {
  const int item = static_cast<int>(blockIdx.x * kAverageThreads + threadIdx.x);
  if (item >= items) return;
  const int groups = channels / width, n = item / groups, channel = item % groups * width;
  const Pack<float, width> gradient = load<width>(dy + int64_t{n} * channels + channel);
  const float inverse = 1.0F / static_cast<float>(pixels);
  Pack<T, width> share;
#pragma unroll
  for (int k = 0; k < width; ++k) share.at[k] = from_float<T>(gradient.at[k] * inverse);
  T* to = dx + int64_t{n} * pixels * channels + channel;
  for (int p = 0; p < pixels; ++p) store(to + int64_t{p} * channels, share);
}

// ---- Launches ----

template <typename T>
void max_pool(const PoolShape& shape, const T* x, T* y, uint8_t* where, cudaStream_t stream) {
  with_vector_width<T>(shape.channels, [&](auto width) {
    launch("max_pool", &max_pool_kernel<T, width(), false>,
           dim3(static_cast<unsigned>(shape.images * shape.out_size)), kPoolThreads, stream,
           Affine{}, shape, x, y, where);
  });
}

// The max-pool of the map that batch_norm_forward(norm, x) with a ReLU would write.
template <typename T>
void batch_norm_max_pool(const BatchNorm& norm, const PoolShape& shape, const T* x, T* y,
                         uint8_t* where, cudaStream_t stream) {
  with_vector_width<T>(shape.channels, [&](auto width) {
    launch("batch_norm_max_pool", &max_pool_kernel<T, width(), true>,
           dim3(static_cast<unsigned>(shape.images * shape.out_size)), kPoolThreads, stream,
           Affine{norm.mean, norm.scale, norm.beta}, shape, x, y, where);
  });
}

// dx from dy, or dy + dy_other where dy_other is not null.
template <typename T>
void max_pool_backward(const PoolShape& shape, const T* dy, const T* dy_other, const uint8_t* where,
                       T* dx, cudaStream_t stream) {
  with_vector_width<T>(shape.channels, [&](auto width) {
    launch("max_pool_backward", &max_pool_backward_kernel<T, width()>,
           dim3(static_cast<unsigned>(shape.images * shape.in_size)), kPoolThreads, stream, shape,
           dy, dy_other, where, dx);
  });
}

inline dim3 average_pool_grid(int64_t items) {
  return dim3(static_cast<unsigned>((items + kAverageThreads - 1) / kAverageThreads));
}

// x [images, pixels, channels] to y in fp32 and the operand of a product in T; either may be null.
template <typename T>
void average_pool(int64_t images, int64_t pixels, int64_t channels, const T* x, float* y,
                  T* operand, cudaStream_t stream) {
  with_vector_width<T>(channels, [&](auto width) {
    const int64_t items = images * channels / width();
    launch("average_pool", &average_pool_kernel<T, width()>, average_pool_grid(items),
           kAverageThreads, stream, items, pixels, channels, x, y, operand);
  });
}

template <typename T>
void average_pool_backward(int64_t images, int64_t pixels, int64_t channels, const float* dy, T* dx,
                           cudaStream_t stream) {
  with_vector_width<T>(channels, [&](auto width) {
    const int64_t items = images * channels / width();
    launch("average_pool_backward", &average_pool_backward_kernel<T, width()>,
           average_pool_grid(items), kAverageThreads, stream, items, pixels, channels, dy, dx);
  });
}

}  // namespace hardmine::cuda
