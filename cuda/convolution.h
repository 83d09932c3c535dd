// Convolutions as graphs of cuDNN: activations NHWC, weights OHWI, operands and results in one 16-
// or 32-bit type, sums in fp32. A graph has one operation, or more where the same kernel also does
// what the batch-norms beside the convolution want.
#pragma once

#include <compare>
#include <cstdint>

#include "core/backend.h"
#include "cuda/engines.h"

namespace hardmine::cuda {

struct ConvolutionShape {
  int64_t batch = 0;
  int64_t in_channels = 0, out_channels = 0;
  int64_t in_size = 0, out_size = 0;  // pixels, both sides
  int64_t kernel = 1, stride = 1, padding = 0;
  Precision precision = Precision::fp32;

  auto operator<=>(const ConvolutionShape&) const = default;
};

// With a batch-norm and its ReLU before the convolution, a = relu(scale x + bias):
enum class ConvolutionPass : uint8_t {
  forward,            // y = x * w
  forward_with_sums,  // and the sums of y and of y^2 of every channel over all pixels
  data_gradient,      // dx from dy and w
  weight_gradient,    // dw from x and dy

  norm_forward_with_sums,  // y = a * w, and the sums of y and of y^2
  norm_weight_gradient,    // dw from a and dy
  norm_data_gradient,      // from dy and w what comes to a, where a > 0, and from that the
                           // gradients of the batch-norm's parameters
};

Engines::Graph convolution_graph(const ConvolutionShape& shape, ConvolutionPass pass);

// x [batch, in, in, in_channels], w [out_channels, kernel, kernel, in_channels] and y [batch, out,
// out, out_channels], gradients in their places; the sums [out_channels] of y and y^2.
struct ConvolutionMaps {
  void *x, *w, *y, *workspace;
  float *sums = nullptr, *squares = nullptr;
};
EnginePointers convolution_pointers(const ConvolutionMaps& maps);

// For the passes that apply a batch-norm: its input in the place of the convolution's x, and scale
// and bias [in_channels] in fp16, which is all that cuDNN has kernels for.
struct AppliedNorm {
  void *x, *scale, *bias;
};
EnginePointers with_applied_norm(EnginePointers pointers, const AppliedNorm& norm);

// For norm_data_gradient: the batch-norm's input, what its forward pass has left, its parameters
// and their gradients [channels] in fp32, and room for three numbers a channel that cuDNN gives as
// well.
struct NormGradient {
  void* x;
  float *mean, *inverse_deviation, *gamma, *beta;
  float *gamma_gradient, *beta_gradient;
  float* coefficients;
  int64_t channels;
};
EnginePointers with_norm_gradient(EnginePointers pointers, const NormGradient& norm);

}  // namespace hardmine::cuda
