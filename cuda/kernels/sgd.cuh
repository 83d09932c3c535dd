// SGD with momentum over all parameters of the network in one launch.
//
//   v = momentum v + (g / scale + decay w);  w -= lr v;  copy = T(w)
//
// decay is 0 for biases and batch-norm parameters unless all decay. Every number is read and
// written once; the operands of the next step's convolutions are rounded in the same pass. Nothing
// changes in a step whose gradients are not finite.
#pragma once

#include "cuda/kernels/loss_scale.cuh"

namespace hardmine::cuda {

// What changes from step to step, in device memory because the step is a captured graph.
struct StepParameters {
  float lr, momentum, weight_decay;
  int decay_all;  // also biases and batch-norm parameters
  float margin_factor, lambda;
};

template <typename T>
__global__ void __launch_bounds__(kRangeThreads)
    sgd_kernel(const ParameterTensor<T>* __restrict__ tensors,
               const ParameterRange* __restrict__ ranges,
               const StepParameters* __restrict__ parameters,
               const LossScale* __restrict__ loss_scale) {
  const ParameterRange range = ranges[blockIdx.x];
  const StepParameters step = *parameters;
  const float inverse = loss_scale != nullptr ? loss_scale->inverse : 1.0F;
  if (loss_scale != nullptr && loss_scale->non_finite != 0) return;
  const ParameterTensor<T> of = tensors[range.tensor];
  const float decay = of.decays || step.decay_all != 0 ? step.weight_decay : 0.0F;
  const int64_t first = range.first + int64_t{threadIdx.x} * kRangeWidth;
  Pack<float, kRangeWidth> w[kRangeLoads], v[kRangeLoads], g[kRangeLoads];
#pragma unroll
  for (int l = 0; l < kRangeLoads; ++l) {
    w[l] = load_range(of.weights, first + l * kRangeStep, of.count);
    v[l] = load_range(of.velocity, first + l * kRangeStep, of.count);
    g[l] = load_gradient(of, first + l * kRangeStep);
  }
#pragma unroll
  for (int l = 0; l < kRangeLoads; ++l) {
    const int64_t at = first + l * kRangeStep;
#pragma unroll
    for (int i = 0; i < kRangeWidth; ++i) {
      v[l].at[i] = step.momentum * v[l].at[i] + (g[l].at[i] * inverse + decay * w[l].at[i]);
      w[l].at[i] -= step.lr * v[l].at[i];
    }
    store_range(of.velocity, at, of.count, v[l]);
    store_range(of.weights, at, of.count, w[l]);
    if (of.copy != nullptr) store_range(of.copy, at, of.count, w[l]);
  }
}

// ranges [count] of parameter_ranges(). loss_scale null: gradients are not scaled and no step is
// skipped.
template <typename T>
void sgd(const ParameterTensor<T>* tensors, const ParameterRange* ranges, int64_t count,
         const StepParameters* parameters, const LossScale* loss_scale, cudaStream_t stream) {
  launch("sgd", &sgd_kernel<T>, dim3(static_cast<unsigned>(count)), kRangeThreads, stream, tensors,
         ranges, parameters, loss_scale);
}

}  // namespace hardmine::cuda
