// See network_loops.h. Every function here is internal to the namespace of its instruction set and
// no function template of the standard library is used: a copy compiled for AVX-512 could otherwise
// be the one that the linker keeps for everybody.
#include "cpu/network_loops.h"

// Vectors are passed between functions of this file alone, all of them inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace hardmine::HARDMINE_ISA {
namespace {

#define HARDMINE_INLINE inline __attribute__((always_inline))

// `Width` floats side by side; the compiler splits them where the registers are narrower.
template <int Width>
struct Lanes {
  typedef float Floats __attribute__((vector_size(4 * Width)));
  typedef uint32_t Words __attribute__((vector_size(4 * Width)));
  typedef int32_t Integers __attribute__((vector_size(4 * Width)));
  typedef uint16_t Halves __attribute__((vector_size(2 * Width)));
  typedef uint8_t Bytes __attribute__((vector_size(Width)));
};

template <typename To, typename From>
HARDMINE_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <int Width>
HARDMINE_INLINE typename Lanes<Width>::Floats load(const float* p) {
  typename Lanes<Width>::Floats value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <int Width>
HARDMINE_INLINE typename Lanes<Width>::Floats load(const Bf16* p) {
  typename Lanes<Width>::Halves halves;
  __builtin_memcpy(&halves, p, sizeof halves);
  return bits_of<typename Lanes<Width>::Floats>(
      __builtin_convertvector(halves, typename Lanes<Width>::Words) << 16);
}

template <int Width>
HARDMINE_INLINE void store(float* p, const typename Lanes<Width>::Floats& value) {
  __builtin_memcpy(p, &value, sizeof value);
}

// Rounds to nearest, ties to even. The NaNs that x86 makes have an empty lower half, so they stay
// NaN.
template <int Width>
HARDMINE_INLINE void store(Bf16* p, const typename Lanes<Width>::Floats& value) {
  auto words = bits_of<typename Lanes<Width>::Words>(value);
  words += 0x7FFFU + ((words >> 16) & 1U);
  const auto halves = __builtin_convertvector(words >> 16, typename Lanes<Width>::Halves);
  __builtin_memcpy(p, &halves, sizeof halves);
}

template <int Width>
HARDMINE_INLINE typename Lanes<Width>::Floats splat(float value) {
  return typename Lanes<Width>::Floats{} + value;
}

template <int Width>
HARDMINE_INLINE typename Lanes<Width>::Floats positive(const typename Lanes<Width>::Floats& value) {
  // Written so that NaN stays NaN: a broken activation must not turn into a zero.
  return value < 0.0F ? splat<Width>(0) : value;
}

// Calls body.template run<Width, Groups>(channel) over all channels, widest pieces first.
template <typename Body>
HARDMINE_INLINE void over_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 64 <= channels; c += 64) body.template run<16, 4>(c);
  for (; c + 16 <= channels; c += 16) body.template run<16, 1>(c);
  for (; c + 8 <= channels; c += 8) body.template run<8, 1>(c);
  for (; c < channels; ++c) body.template run<1, 1>(c);
}

template <typename Element>
struct Statistics {
  const Element* x;
  Plane plane;
  float* mean;
  float* m2;

  // Deviations are taken from the first pixel: one pass, and no cancellation when the mean is
  // large.
  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    using Floats = typename Lanes<Width>::Floats;
    // Independent sums over neighbouring pixels, so that additions need not wait for each other.
    constexpr int kUnroll = Groups == 1 ? 4 : 1;
    Floats origin[Groups], sum[kUnroll][Groups] = {}, square[kUnroll][Groups] = {};
    for (int g = 0; g < Groups; ++g) origin[g] = load<Width>(x + c + g * Width);
    int64_t p = 0;
    for (; p + kUnroll <= plane.pixels; p += kUnroll) {
      for (int u = 0; u < kUnroll; ++u) {
        for (int g = 0; g < Groups; ++g) {
          const Floats d = load<Width>(x + (p + u) * plane.channels + c + g * Width) - origin[g];
          sum[u][g] += d;
          square[u][g] += d * d;
        }
      }
    }
    for (; p < plane.pixels; ++p) {
      for (int g = 0; g < Groups; ++g) {
        const Floats d = load<Width>(x + p * plane.channels + c + g * Width) - origin[g];
        sum[0][g] += d;
        square[0][g] += d * d;
      }
    }
    const float inverse = 1.0F / static_cast<float>(plane.pixels);
    for (int g = 0; g < Groups; ++g) {
      for (int u = 1; u < kUnroll; ++u) {
        sum[0][g] += sum[u][g];
        square[0][g] += square[u][g];
      }
      store<Width>(mean + c + g * Width, origin[g] + sum[0][g] * inverse);
      store<Width>(m2 + c + g * Width,
                   positive<Width>(square[0][g] - sum[0][g] * sum[0][g] * inverse));
    }
  }
};

template <typename Element>
void statistics(const Element* x, Plane plane, float* mean, float* m2) {
  over_channels(plane.channels, Statistics<Element>{x, plane, mean, m2});
}

template <typename Element, bool kResidual, bool kRelu>
struct Normalise {
  const Element* x;
  const Element* residual;
  Element* y;
  Plane plane;
  Affine affine;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    using Floats = typename Lanes<Width>::Floats;
    Floats mean[Groups], scale[Groups], shift[Groups];
    for (int g = 0; g < Groups; ++g) {
      mean[g] = load<Width>(affine.mean + c + g * Width);
      scale[g] = load<Width>(affine.scale + c + g * Width);
      shift[g] = load<Width>(affine.shift + c + g * Width);
    }
    for (int64_t p = 0; p < plane.pixels; ++p) {
      for (int g = 0; g < Groups; ++g) {
        const int64_t at = p * plane.channels + c + g * Width;
        Floats value = (load<Width>(x + at) - mean[g]) * scale[g] + shift[g];
        if constexpr (kResidual) value += load<Width>(residual + at);
        if constexpr (kRelu) value = positive<Width>(value);
        store<Width>(y + at, value);
      }
    }
  }
};

template <typename Element>
void normalise(const Element* x, const Element* residual, Element* y, Plane plane, Affine affine,
               bool relu) {
  if (residual != nullptr && relu) {
    over_channels(plane.channels, Normalise<Element, true, true>{x, residual, y, plane, affine});
  } else if (residual != nullptr) {
    over_channels(plane.channels, Normalise<Element, true, false>{x, residual, y, plane, affine});
  } else if (relu) {
    over_channels(plane.channels, Normalise<Element, false, true>{x, residual, y, plane, affine});
  } else {
    over_channels(plane.channels, Normalise<Element, false, false>{x, residual, y, plane, affine});
  }
}

template <typename Element, Mask kMask, bool kTwo>
struct BackwardSums {
  const Element* x;
  const Element* y;
  Element* d1;
  const Element* d2;
  Plane plane;
  Affine affine;
  float* sum;
  float* sum_x;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    using Floats = typename Lanes<Width>::Floats;
    constexpr int kUnroll = Groups == 1 ? 4 : 1;
    Floats mean[Groups], scale[Groups], shift[Groups];
    Floats total[kUnroll][Groups] = {}, total_x[kUnroll][Groups] = {};
    for (int g = 0; g < Groups; ++g) {
      mean[g] = load<Width>(affine.mean + c + g * Width);
      scale[g] = load<Width>(affine.scale + c + g * Width);
      shift[g] = load<Width>(affine.shift + c + g * Width);
    }
    const auto pixel = [&](int64_t p, int u) __attribute__((always_inline)) {
      for (int g = 0; g < Groups; ++g) {
        const int64_t at = p * plane.channels + c + g * Width;
        const Floats centred = load<Width>(x + at) - mean[g];
        Floats gradient = load<Width>(d1 + at);
        if constexpr (kTwo) gradient += load<Width>(d2 + at);
        if constexpr (kMask == Mask::from_input) {
          gradient = centred * scale[g] + shift[g] > 0.0F ? gradient : splat<Width>(0);
        } else if constexpr (kMask == Mask::from_output) {
          gradient = load<Width>(y + at) > 0.0F ? gradient : splat<Width>(0);
        }
        if constexpr (kTwo || kMask == Mask::from_output) store<Width>(d1 + at, gradient);
        total[u][g] += gradient;
        total_x[u][g] += gradient * centred;
      }
    };
    int64_t p = 0;
    for (; p + kUnroll <= plane.pixels; p += kUnroll) {
      for (int u = 0; u < kUnroll; ++u) pixel(p + u, u);
    }
    for (; p < plane.pixels; ++p) pixel(p, 0);
    for (int g = 0; g < Groups; ++g) {
      for (int u = 1; u < kUnroll; ++u) {
        total[0][g] += total[u][g];
        total_x[0][g] += total_x[u][g];
      }
      store<Width>(sum + c + g * Width, total[0][g]);
      store<Width>(sum_x + c + g * Width, total_x[0][g]);
    }
  }
};

template <typename Element, Mask kMask>
HARDMINE_INLINE void backward_sums_of(const Element* x, const Element* y, Element* d1,
                                      const Element* d2, Plane plane, Affine affine, float* sum,
                                      float* sum_x) {
  if (d2 != nullptr) {
    over_channels(plane.channels,
                  BackwardSums<Element, kMask, true>{x, y, d1, d2, plane, affine, sum, sum_x});
  } else {
    over_channels(plane.channels,
                  BackwardSums<Element, kMask, false>{x, y, d1, d2, plane, affine, sum, sum_x});
  }
}

template <typename Element>
void backward_sums(const Element* x, const Element* y, Element* d1, const Element* d2, Plane plane,
                   Affine affine, Mask mask, float* sum, float* sum_x) {
  switch (mask) {
    case Mask::none:
      return backward_sums_of<Element, Mask::none>(x, y, d1, d2, plane, affine, sum, sum_x);
    case Mask::from_input:
      return backward_sums_of<Element, Mask::from_input>(x, y, d1, d2, plane, affine, sum, sum_x);
    case Mask::from_output:
      return backward_sums_of<Element, Mask::from_output>(x, y, d1, d2, plane, affine, sum, sum_x);
  }
}

template <typename Element, bool kMask>
struct BackwardApply {
  const Element* x;
  const Element* g;
  Element* dx;
  Plane plane;
  Affine affine;
  const float* by_x;
  const float* offset;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    using Floats = typename Lanes<Width>::Floats;
    Floats mean[Groups], scale[Groups], shift[Groups], slope[Groups], constant[Groups];
    for (int i = 0; i < Groups; ++i) {
      mean[i] = load<Width>(affine.mean + c + i * Width);
      scale[i] = load<Width>(affine.scale + c + i * Width);
      shift[i] = load<Width>(affine.shift + c + i * Width);
      slope[i] = load<Width>(by_x + c + i * Width);
      constant[i] = load<Width>(offset + c + i * Width);
    }
    for (int64_t p = 0; p < plane.pixels; ++p) {
      for (int i = 0; i < Groups; ++i) {
        const int64_t at = p * plane.channels + c + i * Width;
        const Floats centred = load<Width>(x + at) - mean[i];
        Floats gradient = load<Width>(g + at);
        if constexpr (kMask) {
          gradient = centred * scale[i] + shift[i] > 0.0F ? gradient : splat<Width>(0);
        }
        store<Width>(dx + at, gradient * scale[i] + (centred * slope[i] + constant[i]));
      }
    }
  }
};

template <typename Element>
void backward_apply(const Element* x, const Element* g, Element* dx, Plane plane, Affine affine,
                    bool mask_from_input, const float* by_x, const float* offset) {
  if (mask_from_input) {
    over_channels(plane.channels,
                  BackwardApply<Element, true>{x, g, dx, plane, affine, by_x, offset});
  } else {
    over_channels(plane.channels,
                  BackwardApply<Element, false>{x, g, dx, plane, affine, by_x, offset});
  }
}

template <typename Element>
struct MaxPool {
  const Element* x;
  Element* y;
  uint8_t* where;
  int64_t channels;
  Window window;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    for (int g = 0; g < Groups; ++g) lanes<Width>(c + g * Width);
  }

  template <int Width>
  HARDMINE_INLINE void lanes(int64_t c) const {
    using Floats = typename Lanes<Width>::Floats;
    using Integers = typename Lanes<Width>::Integers;
    for (int64_t row = 0; row < window.out_size; ++row) {
      for (int64_t column = 0; column < window.out_size; ++column) {
        const int64_t top = row * window.stride - window.padding;
        const int64_t left = column * window.stride - window.padding;
        Floats best = splat<Width>(-__builtin_inff());
        Integers best_at = {};
        for (int i = 0; i < window.kernel; ++i) {
          if (top + i < 0 || top + i >= window.in_size) continue;
          for (int j = 0; j < window.kernel; ++j) {
            if (left + j < 0 || left + j >= window.in_size) continue;
            const Floats value =
                load<Width>(x + ((top + i) * window.in_size + left + j) * channels + c);
            const Integers better = (value > best) | (value != value);
            best = better ? value : best;
            best_at = better ? Integers{} + (i * window.kernel + j) : best_at;
          }
        }
        const int64_t at = (row * window.out_size + column) * channels + c;
        store<Width>(y + at, best);
        const auto bytes = __builtin_convertvector(best_at, typename Lanes<Width>::Bytes);
        __builtin_memcpy(where + at, &bytes, sizeof bytes);
      }
    }
  }
};

template <typename Element>
void max_pool(const Element* x, Element* y, uint8_t* where, int64_t channels, Window window) {
  over_channels(channels, MaxPool<Element>{x, y, where, channels, window});
}

template <typename Element>
void unfold(const Element* x, Element* columns, int64_t channels, Window window) {
  const auto row_bytes = static_cast<size_t>(channels) * sizeof(Element);
  for (int64_t row = 0; row < window.out_size; ++row) {
    for (int64_t column = 0; column < window.out_size; ++column) {
      for (int i = 0; i < window.kernel; ++i) {
        for (int j = 0; j < window.kernel; ++j, columns += channels) {
          const int64_t r = row * window.stride - window.padding + i;
          const int64_t s = column * window.stride - window.padding + j;
          if (r < 0 || s < 0 || r >= window.in_size || s >= window.in_size) {
            __builtin_memset(columns, 0, row_bytes);
          } else {
            __builtin_memcpy(columns, x + (r * window.in_size + s) * channels, row_bytes);
          }
        }
      }
    }
  }
}

// Calls visit(output pixel, position in the window) for every window over pixel (row, column).
template <typename Visit>
HARDMINE_INLINE void over_windows(Window window, int64_t row, int64_t column, const Visit& visit) {
  const int64_t out = window.out_size;
  // Windows r with r stride - padding <= row < r stride - padding + kernel.
  for (int64_t r = (row + window.padding) / window.stride; r >= 0; --r) {
    const int64_t i = row + window.padding - r * window.stride;
    if (i >= window.kernel) break;
    if (r >= out) continue;
    for (int64_t s = (column + window.padding) / window.stride; s >= 0; --s) {
      const int64_t j = column + window.padding - s * window.stride;
      if (j >= window.kernel) break;
      if (s < out) visit(r * out + s, i * window.kernel + j);
    }
  }
}

template <typename Element>
struct Fold {
  const float* columns;
  Element* dx;
  int64_t channels;
  Window window;
  int64_t row, column;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    typename Lanes<Width>::Floats sum[Groups] = {};
    const int64_t taps = int64_t{window.kernel} * window.kernel;
    over_windows(window, row, column, [&](int64_t pixel, int64_t position) {
      const float* from = columns + (pixel * taps + position) * channels + c;
      for (int g = 0; g < Groups; ++g) sum[g] += load<Width>(from + g * Width);
    });
    Element* to = dx + (row * window.in_size + column) * channels + c;
    for (int g = 0; g < Groups; ++g) store<Width>(to + g * Width, sum[g]);
  }
};

template <typename Element>
void fold(const float* columns, Element* dx, int64_t channels, Window window) {
  for (int64_t row = 0; row < window.in_size; ++row) {
    for (int64_t column = 0; column < window.in_size; ++column) {
      over_channels(channels, Fold<Element>{columns, dx, channels, window, row, column});
    }
  }
}

template <typename Element>
struct MaxPoolBackward {
  const Element* dy;
  const uint8_t* where;
  Element* dx;
  int64_t channels;
  Window window;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    for (int g = 0; g < Groups; ++g) lanes<Width>(c + g * Width);
  }

  template <int Width>
  HARDMINE_INLINE void lanes(int64_t c) const {
    using Floats = typename Lanes<Width>::Floats;
    using Integers = typename Lanes<Width>::Integers;
    const int64_t in = window.in_size;
    for (int64_t row = 0; row < in; ++row) {
      for (int64_t column = 0; column < in; ++column) {
        Floats sum = {};
        over_windows(window, row, column, [&](int64_t pixel, int64_t position) {
          const int64_t at = pixel * channels + c;
          typename Lanes<Width>::Bytes bytes;
          __builtin_memcpy(&bytes, where + at, sizeof bytes);
          const Integers chosen =
              __builtin_convertvector(bytes, Integers) == static_cast<int32_t>(position);
          sum += chosen ? load<Width>(dy + at) : splat<Width>(0);
        });
        store<Width>(dx + (row * in + column) * channels + c, sum);
      }
    }
  }
};

template <typename Element>
void max_pool_backward(const Element* dy, const uint8_t* where, Element* dx, int64_t channels,
                       Window window) {
  over_channels(channels, MaxPoolBackward<Element>{dy, where, dx, channels, window});
}

template <typename Element>
struct Average {
  const Element* x;
  float* y;
  Plane plane;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    const float inverse = 1.0F / static_cast<float>(plane.pixels);
    for (int g = 0; g < Groups; ++g) {
      typename Lanes<Width>::Floats sum = {};
      for (int64_t p = 0; p < plane.pixels; ++p) {
        sum += load<Width>(x + p * plane.channels + c + g * Width);
      }
      store<Width>(y + c + g * Width, sum * inverse);
    }
  }
};

template <typename Element>
void average(const Element* x, float* y, Plane plane) {
  over_channels(plane.channels, Average<Element>{x, y, plane});
}

template <typename Element>
struct AverageBackward {
  const float* dy;
  Element* dx;
  Plane plane;

  template <int Width, int Groups>
  HARDMINE_INLINE void run(int64_t c) const {
    const float inverse = 1.0F / static_cast<float>(plane.pixels);
    for (int g = 0; g < Groups; ++g) {
      const auto share = load<Width>(dy + c + g * Width) * inverse;
      for (int64_t p = 0; p < plane.pixels; ++p) {
        store<Width>(dx + p * plane.channels + c + g * Width, share);
      }
    }
  }
};

template <typename Element>
void average_backward(const float* dy, Element* dx, Plane plane) {
  over_channels(plane.channels, AverageBackward<Element>{dy, dx, plane});
}

template <typename Element>
void add(Element* sum, const Element* other, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store<16>(sum + i, load<16>(sum + i) + load<16>(other + i));
  for (; i < count; ++i) store<1>(sum + i, load<1>(sum + i) + load<1>(other + i));
}

template <typename Element>
void image(const uint8_t* pixels, Element* x, ImageLayout layout, Augmentation augmentation) {
  const int64_t size = layout.size;
  for (int64_t row = 0; row < size; ++row) {
    const int64_t from_row = row - augmentation.dy;
    const bool covered_row = from_row >= 0 && from_row < size;
    for (int64_t column = 0; column < size; ++column) {
      int64_t from_column = column - augmentation.dx;
      const bool covered = covered_row && from_column >= 0 && from_column < size;
      if (augmentation.mirror != 0) from_column = size - 1 - from_column;
      const uint8_t* pixel = pixels + (from_row * size + from_column) * 3;
      for (int channel = 0; channel < 3; ++channel) {
        const float value = covered ? static_cast<float>(pixel[channel]) : 0.0F;
        store<1>(x + row * layout.row + column * layout.column + layout.channel[channel],
                 splat<1>((value - 127.5F) * (1.0F / 128)));
      }
    }
  }
}

template <int Width>
HARDMINE_INLINE void sgd_lanes(float* w, float* v, const float* g, float lr, float momentum,
                               float decay) {
  const auto weight = load<Width>(w);
  const auto velocity = momentum * load<Width>(v) + (load<Width>(g) + decay * weight);
  store<Width>(v, velocity);
  store<Width>(w, weight - lr * velocity);
}

void sgd(float* w, float* v, const float* g, int64_t count, float lr, float momentum, float decay) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sgd_lanes<16>(w + i, v + i, g + i, lr, momentum, decay);
  for (; i < count; ++i) sgd_lanes<1>(w + i, v + i, g + i, lr, momentum, decay);
}

template <typename Element>
constexpr ElementLoops<Element> element_loops() {
  return {statistics<Element>,       normalise<Element>, backward_sums<Element>,
          backward_apply<Element>,   max_pool<Element>,  max_pool_backward<Element>,
          unfold<Element>,           fold<Element>,      average<Element>,
          average_backward<Element>, add<Element>,       image<Element>};
}

#define HARDMINE_STRING(name) HARDMINE_STRING_OF(name)
#define HARDMINE_STRING_OF(name) #name

constexpr NetworkLoops kLoops = {element_loops<float>(), element_loops<Bf16>(), sgd,
                                 HARDMINE_STRING(HARDMINE_ISA)};

}  // namespace

const NetworkLoops& network_loops() {
  return kLoops;
}

}  // namespace hardmine::HARDMINE_ISA
