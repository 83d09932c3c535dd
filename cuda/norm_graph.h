// Batch-norm as graphs of cuDNN: maps NHWC in one 16- or 32-bit type, statistics and parameters
// fp32, and so is what goes from one operation to the next. Both ways it is one kernel whose blocks
// wait for each other, compiled when the plan is made; cuDNN 9.24 has it for Hopper in every
// precision, where the channels of 16-bit maps are a multiple of 8.
//
// The backward kernel finds the ReLU's mask from x again, or reads the bits that the forward kernel
// has written. It has no input for y nor for a second gradient: the engines that cuDNN offers for
// graphs with these run the same code for either, and are not to be asked for.
#pragma once

#include <cstdint>

#include "core/backend.h"
#include "cuda/engines.h"

namespace hardmine::cuda {

struct NormShape {
  int64_t batch = 0, channels = 0;
  int64_t size = 0;  // pixels, both sides
  Precision precision = Precision::fp32;
};

// y = gamma r (x - mean) + beta, then + residual, then ReLU; leaves the batch's mean and
// r = 1 / sqrt(variance + epsilon).
Engines::Graph norm_forward_graph(const NormShape& shape, bool residual, bool relu);
// dx, dgamma and dbeta where a ReLU follows and no residual comes between. dx may be x: every
// thread writes what it alone has read.
Engines::Graph norm_backward_graph(const NormShape& shape);

struct NormTensors {
  void *x, *residual, *y;  // maps; residual null where there is none
  float *gamma, *beta, *mean, *inverse_deviation;
  void* workspace;
};
EnginePointers norm_forward_pointers(const NormTensors& tensors);

struct NormGradientTensors {
  void *x, *dy, *dx;
  float *gamma, *beta, *mean, *inverse_deviation;
  float *dgamma, *dbeta;
  void* workspace;
};
EnginePointers norm_backward_pointers(const NormGradientTensors& tensors);

}  // namespace hardmine::cuda
