// From the images of a batch to the first convolution's input, in one pass.
//
//   x[n, r, s, c] = (v - 127.5) / 128,  v = image[n, r - dy, mirrored(s - dx), c]
//
// where the image covers the pixel, else v = 0: a black pixel, as if the picture had a black rim.
// mirrored(s) is size - 1 - s for a mirrored image: it is mirrored first, then shifted. The fourth
// channel is 0, so that a pixel of 16-bit numbers is one 8-byte store and the convolution gets
// channels in a multiple of four.
//
// Shapes: images [N, size, size, 3] uint8, x [N, size, size, 4] in T.
#pragma once

#include "core/batch.h"
#include "cuda/kernels/vectors.cuh"

namespace hardmine::cuda {

inline constexpr int kImageThreads = 128;  // a row of 112 pixels and a few idle

// One block a row of an image, one thread a pixel.
template <typename T>
__global__ void __launch_bounds__(kImageThreads)
    images_kernel(const uint8_t* __restrict__ images,
                  const Augmentation* __restrict__ augmentations, Augmentation of_all, int size,
                  T* __restrict__ x) {
  const int n = static_cast<int>(blockIdx.x) / size, row = static_cast<int>(blockIdx.x) % size;
  const Augmentation augmentation = augmentations != nullptr ? augmentations[n] : of_all;
  const int from_row = row - augmentation.dy;
  for (int column = static_cast<int>(threadIdx.x); column < size; column += kImageThreads) {
    int from_column = column - augmentation.dx;
    const bool covered = from_row >= 0 && from_row < size && from_column >= 0 && from_column < size;
    if (augmentation.mirror != 0) from_column = size - 1 - from_column;
    const uint8_t* pixel = images + ((int64_t{n} * size + from_row) * size + from_column) * 3;
    Pack<T, 4> values;
#pragma unroll
    for (int channel = 0; channel < 3; ++channel) {
      const float value = covered ? static_cast<float>(pixel[channel]) : 0.0F;
      values.at[channel] = from_float<T>((value - 127.5F) * (1.0F / 128));
    }
    values.at[3] = from_float<T>(0.0F);
    store(x + (int64_t{blockIdx.x} * size + column) * 4, values);
  }
}

// augmentations [N]; null: `of_all` for every image.
template <typename T>
void load_images(const uint8_t* images, const Augmentation* augmentations, Augmentation of_all,
                 int64_t batch, int size, T* x, cudaStream_t stream) {
  launch("load_images", &images_kernel<T>, dim3(static_cast<unsigned>(batch * size)), kImageThreads,
         stream, images, augmentations, of_all, size, x);
}

}  // namespace hardmine::cuda
