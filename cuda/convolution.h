// Convolutions as graphs of cuDNN: activations NHWC, weights OHWI, operands and results in one 16-
// or 32-bit type, sums in fp32. A graph has one operation, or two where a forward pass also sums
// what a batch-norm after it wants.
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

// y = x * w; the same with the sums of y and of y^2 of every channel over all pixels, in the same
// kernel (cuDNN has it for fp16 only on Hopper); dx from dy and w; dw from x and dy.
enum class ConvolutionPass : uint8_t {
  forward,
  forward_with_sums,
  data_gradient,
  weight_gradient,
};

Engines::Graph convolution_graph(const ConvolutionShape& shape, ConvolutionPass pass);

// x [batch, in, in, in_channels], w [out_channels, kernel, kernel, in_channels] and y [batch, out,
// out, out_channels], gradients in their places; the sums [out_channels] of y and y^2 with
// forward_with_sums alone.
struct ConvolutionMaps {
  void *x, *w, *y, *workspace;
  float *sums = nullptr, *squares = nullptr;
};
EnginePointers convolution_pointers(const ConvolutionMaps& maps);

}  // namespace hardmine::cuda
