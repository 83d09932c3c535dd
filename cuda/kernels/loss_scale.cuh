// The loss scale of fp16, kept on the device, and the check of gradients for NaN and infinity.
//
// Gradients of fp16 maps vanish below 6e-8, so the gradient of the embeddings is multiplied by
// `scale` when it enters the network and SGD multiplies by `inverse`. The rule is that of torch's
// GradScaler: a step whose gradients are not all finite is skipped and halves the scale; 2,000 good
// steps in a row double it. Scales are powers of two, so scaling rounds nothing.
//
// In a step: check_gradients, in parts as the gradients come, then conclude_step (sgd.cuh), which
// reads the flag. In fp16 it moves the scale and clears the flag; in bf16 and fp32 the flag stays
// until the host reads it.
#pragma once

#include "cuda/kernels/parameters.cuh"

namespace hardmine::cuda {

struct LossScale {
  float scale = 1;
  float inverse = 1;
  int good_steps = 0;  // since the scale last changed
  int skipped = 0;     // steps in all
  int non_finite = 0;  // 1: a gradient of this step is not finite
};

inline constexpr float kFirstLossScale = 65536;       // torch's GradScaler
inline constexpr int kGoodStepsToGrow = 2000;         // likewise
inline constexpr float kLargestLossScale = 16777216;  // 2^24: the head's gradients are below 1
// Gradients that overflow without any scale do so because training has diverged; a scale that went
// on falling would end at 0 and its inverse at infinity.
inline constexpr float kLeastLossScale = 1;

inline LossScale first_loss_scale() {
  return {.scale = kFirstLossScale, .inverse = 1 / kFirstLossScale};
}

// Sets non_finite where a gradient of the table is NaN or infinite. All who set it write the same.
template <typename T>
__global__ void __launch_bounds__(kRangeThreads)
    check_gradients_kernel(const ParameterTensor<T>* __restrict__ tensors,
                           const ParameterRange* __restrict__ ranges, LossScale* loss_scale) {
  const ParameterRange range = ranges[blockIdx.x];
  const ParameterTensor<T> of = tensors[range.tensor];
  const int64_t first = range.first + int64_t{threadIdx.x} * kRangeWidth;
  Pack<float, kRangeWidth> gradients[kRangeLoads];
#pragma unroll
  for (int l = 0; l < kRangeLoads; ++l) gradients[l] = load_gradient(of, first + l * kRangeStep);
  bool finite = true;
#pragma unroll
  for (int l = 0; l < kRangeLoads; ++l) {
#pragma unroll
    for (int i = 0; i < kRangeWidth; ++i) finite = finite && isfinite(gradients[l].at[i]);
  }
  if (!finite) loss_scale->non_finite = 1;
}

// After a step whose gradients have been checked.
__device__ inline LossScale next_loss_scale(LossScale s) {
  if (s.non_finite != 0) {
    s.scale = fmaxf(s.scale * 0.5F, kLeastLossScale);
    s.good_steps = 0;
    ++s.skipped;
  } else if (++s.good_steps == kGoodStepsToGrow) {
    s.scale = fminf(s.scale * 2.0F, kLargestLossScale);
    s.good_steps = 0;
  }
  s.inverse = 1.0F / s.scale;
  s.non_finite = 0;
  return s;
}

template <typename T>
void check_gradients(const ParameterTensor<T>* tensors, const ParameterRange* ranges, int64_t count,
                     LossScale* loss_scale, cudaStream_t stream) {
  launch("check_gradients", &check_gradients_kernel<T>, dim3(static_cast<unsigned>(count)),
         kRangeThreads, stream, tensors, ranges, loss_scale);
}

}  // namespace hardmine::cuda
