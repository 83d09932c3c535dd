// SGD with momentum over many parameters of the network in one launch.
//
//   v = momentum v + (g / scale + decay w);  w -= lr v;  copy = T(w)
//
// decay is 0 for biases and batch-norm parameters unless all decay. Every number is read and
// written once; the operands of the next step's convolutions are rounded in the same pass.
//
// A step ends with the decision what its update is, and none where a gradient is not finite. The
// update itself takes memory's time alone and so waits for the next step, to run beside it.
#pragma once

#include "cuda/kernels/loss_scale.cuh"

namespace hardmine::cuda {

// What changes from step to step, in device memory because the step is a captured graph.
struct StepParameters {
  float lr, momentum, weight_decay;
  int decay_all;  // also biases and batch-norm parameters
  float margin_factor, lambda;
};

// The update that a step leaves to be done, in device memory: its StepParameters are overwritten by
// the next batch's, and the loss scale may have moved.
struct PendingUpdate {
  float lr = 0, momentum = 0, weight_decay = 0;
  int decay_all = 0;
  float inverse = 1;  // of the loss scale that the gradients were made with
  int valid = 0;      // 0: nothing is to be done
};

// One thread.
template <bool scales>
__global__ void conclude_step_kernel(const StepParameters* parameters, LossScale* loss_scale,
                                     PendingUpdate* pending) {
  const StepParameters step = *parameters;
  const LossScale scale = *loss_scale;
  *pending = {step.lr,        step.momentum, step.weight_decay,
              step.decay_all, scale.inverse, scale.non_finite == 0};
  if (scales) *loss_scale = next_loss_scale(scale);
}

template <typename T>
__global__ void __launch_bounds__(kRangeThreads)
    sgd_kernel(const ParameterTensor<T>* __restrict__ tensors,
               const ParameterRange* __restrict__ ranges,
               const PendingUpdate* __restrict__ pending) {
  const ParameterRange range = ranges[blockIdx.x];
  const PendingUpdate step = *pending;
  if (step.valid == 0) return;
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
      v[l].at[i] = step.momentum * v[l].at[i] + (g[l].at[i] * step.inverse + decay * w[l].at[i]);
      w[l].at[i] -= step.lr * v[l].at[i];
    }
    store_range(of.velocity, at, of.count, v[l]);
    store_range(of.weights, at, of.count, w[l]);
    if (of.copy != nullptr) store_range(of.copy, at, of.count, w[l]);
  }
}

// Makes the update of a step whose gradients have been checked. scales: the loss scale moves too.
inline void conclude_step(const StepParameters* parameters, LossScale* loss_scale,
                          PendingUpdate* pending, bool scales, cudaStream_t stream) {
  launch("conclude_step", scales ? &conclude_step_kernel<true> : &conclude_step_kernel<false>, 1, 1,
         stream, parameters, loss_scale, pending);
}

// Over ranges [count] of parameter_ranges().
template <typename T>
void sgd(const ParameterTensor<T>* tensors, const ParameterRange* ranges, int64_t count,
         const PendingUpdate* pending, cudaStream_t stream) {
  launch("sgd", &sgd_kernel<T>, dim3(static_cast<unsigned>(count)), kRangeThreads, stream, tensors,
         ranges, pending);
}

}  // namespace hardmine::cuda
