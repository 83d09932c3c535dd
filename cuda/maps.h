// How maps and weights lie in device memory: NHWC and OHWI, an image's pixels padded to four
// channels (16-bit loads of a pixel are whole, and cuDNN has engines for it).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <span>
#include <vector>

#include "core/network.h"
#include "cuda/convolution.h"

namespace hardmine::cuda {

inline constexpr int64_t kImageChannels = 4;

// make(T{}) for the type T of maps and operands in a precision.
template <typename Make>
auto with_operands(Precision precision, const Make& make) {
  switch (precision) {
    case Precision::fp16:
      return make(__half{});
    case Precision::bf16:
      return make(__nv_bfloat16{});
    case Precision::fp32:
      break;
  }
  return make(float{});
}

// Input channels as stored.
inline int64_t stored_channels(const Node& node) {
  return node.input < 0 ? kImageChannels : node.in_channels;
}

inline ConvolutionShape convolution_shape(const Node& node, int64_t batch, Precision precision) {
  return {.batch = batch,
          .in_channels = stored_channels(node),
          .out_channels = node.out_channels,
          .in_size = node.in_size,
          .out_size = node.out_size,
          .kernel = node.kernel,
          .stride = node.stride,
          .padding = node.padding,
          .precision = precision};
}

// Weights as torch has them, [out, in, taps], and as stored, [out, taps, stored in] with zeros in
// the padding. Vectors and matrices have one tap, and are the same in both.
struct WeightLayout {
  int64_t out = 1, in = 1, taps = 1, stored_in = 1;

  static WeightLayout vector(int64_t count) { return {1, count, 1, count}; }
  static WeightLayout of(const Node& node) {
    return {node.out_channels, node.in_channels, int64_t{node.kernel} * node.kernel,
            stored_channels(node)};
  }
  int64_t count() const { return out * in * taps; }
  int64_t stored_count() const { return out * taps * stored_in; }

  std::vector<float> to_stored(std::span<const float> values) const {
    std::vector<float> stored(static_cast<size_t>(stored_count()));
    each([&](size_t at, size_t stored_at) { stored[stored_at] = values[at]; });
    return stored;
  }
  void from_stored(const std::vector<float>& stored, std::span<float> values) const {
    each([&](size_t at, size_t stored_at) { values[at] = stored[stored_at]; });
  }

 private:
  template <typename Visit>
  void each(const Visit& visit) const {
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i)
        for (int64_t t = 0; t < taps; ++t)
          visit(static_cast<size_t>((o * in + i) * taps + t),
                static_cast<size_t>((o * taps + t) * stored_in + i));
  }
};

}  // namespace hardmine::cuda
