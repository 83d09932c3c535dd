// The element-wise loops of the network on the CPU: what stands between oneDNN's convolutions.
// network_loops.cpp is compiled once per instruction set; network_loops() picks a table at run
// time.
//
// Feature maps are seen as planes: [images][channel blocks][pixels][block], one plane being the
// pixels of one image and one channel block. Channels-last is a single block of all channels,
// oneDNN's nChw16c and nChw8c have blocks of 16 and 8, nchw blocks of 1: the same loops serve all
// of them.
#pragma once

#include <cstdint>

#include "core/batch.h"

namespace hardmine {

struct Bf16 {
  uint16_t bits;  // the upper half of a float
};

// One plane: `pixels` positions of `channels` neighbouring elements.
struct Plane {
  int64_t pixels = 0;
  int64_t channels = 0;
};

// How the gradient before an activation is found from the one after it.
enum class Mask : uint8_t {
  none,         // no activation
  from_input,   // ReLU, recomputed from the batch-norm's input
  from_output,  // ReLU, by the output saved (needed where a residual was added)
};

// Per-channel constants of a batch-norm: y = scale (x - mean) + shift.
struct Affine {
  const float* mean;
  const float* scale;
  const float* shift;
};

// A sliding window, of a pooling or a convolution, and the sizes of the maps around it.
struct Window {
  int64_t in_size = 0, out_size = 0;
  int kernel = 0, stride = 0, padding = 0;
};

// Where pixel (row, column, channel) of one image goes in the first convolution's source, in
// elements.
struct ImageLayout {
  int64_t size = 0;  // side in pixels
  int64_t row = 0, column = 0;
  int64_t channel[3] = {0, 0, 0};
};

template <typename Element>
struct ElementLoops {
  // Mean and sum of squared deviations of each channel of a plane: mean, m2 [channels].
  void (*statistics)(const Element* x, Plane plane, float* mean, float* m2);
  // y = activation(scale (x - mean) + shift + residual); residual may be null.
  void (*normalise)(const Element* x, const Element* residual, Element* y, Plane plane,
                    Affine affine, bool relu);
  // g = masked (d1 + d2), d2 may be null; sums over the plane of g and of g (x - mean) per channel.
  // g is written over d1 where it differs from it, unless it can be recomputed (Mask::from_input).
  void (*backward_sums)(const Element* x, const Element* y, Element* d1, const Element* d2,
                        Plane plane, Affine affine, Mask mask, float* sum, float* sum_x);
  // dx = scale g + by_x (x - mean) + offset, g masked here only for Mask::from_input. dx may be x.
  void (*backward_apply)(const Element* x, const Element* g, Element* dx, Plane plane,
                         Affine affine, bool mask_from_input, const float* by_x,
                         const float* offset);
  // One plane [in_size^2][channels] to [out_size^2][channels]; where [out] is the window position
  // of the maximum, the first of equals, a NaN before any number.
  void (*max_pool)(const Element* x, Element* y, uint8_t* where, int64_t channels, Window window);
  // dx of one plane, gathered from the windows that chose each pixel.
  void (*max_pool_backward)(const Element* dy, const uint8_t* where, Element* dx, int64_t channels,
                            Window window);
  // The pixels under each window of one channels-last image: columns
  // [out_size^2][kernel^2][channels], zeros where the window leaves the image.
  void (*unfold)(const Element* x, Element* columns, int64_t channels, Window window);
  // Its transpose: each pixel is the sum of the column entries that unfold() copies it to.
  void (*fold)(const float* columns, Element* dx, int64_t channels, Window window);
  void (*average)(const Element* x, float* y, Plane plane);             // y [channels]
  void (*average_backward)(const float* dy, Element* dx, Plane plane);  // dy [channels]
  void (*add)(Element* sum, const Element* other, int64_t count);
  // Pixels (v - 127.5) / 128 of one HWC image, mirrored, then shifted; uncovered pixels count as 0.
  void (*image)(const uint8_t* pixels, Element* x, ImageLayout layout, Augmentation augmentation);
};

struct NetworkLoops {
  ElementLoops<float> fp32;
  ElementLoops<Bf16> bf16;
  // v = momentum v + (g + decay w); w -= lr v.
  void (*sgd)(float* w, float* v, const float* g, int64_t count, float lr, float momentum,
              float decay);
  const char* isa;

  template <typename Element>
  const ElementLoops<Element>& of() const {
    if constexpr (sizeof(Element) == sizeof(float)) {
      return fp32;
    } else {
      return bf16;
    }
  }
};

namespace baseline {
const NetworkLoops& network_loops();
}
namespace avx2 {
const NetworkLoops& network_loops();
}
namespace avx512 {
const NetworkLoops& network_loops();
}

// The widest table that this CPU can run.
inline const NetworkLoops& network_loops() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return avx512::network_loops();
  if (__builtin_cpu_supports("x86-64-v3")) return avx2::network_loops();
#endif
  return baseline::network_loops();
}

}  // namespace hardmine
