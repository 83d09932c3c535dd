// The network's parameters as one table in device memory, and how blocks are laid over it, so that
// one launch handles many of them.
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "cuda/kernels/vectors.cuh"

namespace hardmine::cuda {

// Pointers are aligned to 16 bytes.
template <typename T>
struct ParameterTensor {
  float* weights;   // master
  float* velocity;  // momentum
  const void* gradient;
  T* copy;  // operand of convolutions and products; null: the master is used itself
  int64_t count;
  bool gradient_is_float;  // else T
  bool decays;
};

// A block's share of the table: elements [first, first + kRangeElements) of a tensor, as far as it
// reaches.
struct ParameterRange {
  int64_t first;
  int tensor;
};

inline constexpr int kRangeThreads = 256;
inline constexpr int kRangeWidth = 4;                           // elements of one load
inline constexpr int kRangeLoads = 4;                           // of a thread
inline constexpr int kRangeStep = kRangeThreads * kRangeWidth;  // elements from load to load
inline constexpr int64_t kRangeElements = kRangeStep * kRangeLoads;

// The ranges of tensors of these many elements: one block each.
inline std::vector<ParameterRange> parameter_ranges(std::span<const int64_t> counts) {
  std::vector<ParameterRange> ranges;
  for (size_t tensor = 0; tensor < counts.size(); ++tensor)
    for (int64_t first = 0; first < counts[tensor]; first += kRangeElements)
      ranges.push_back({first, static_cast<int>(tensor)});
  return ranges;
}

// Ranges of consecutive parameters, which one launch handles: those of the nodes from `node` on.
struct ParameterPart {
  size_t node;
  int64_t first, count;
};

// The parts of nodes that have these many ranges each. Each is about four times the one before, as
// the stages of a ResNet are; the first, which the first convolution waits for, is a 64th of all.
inline std::vector<ParameterPart> parameter_parts(std::span<const int64_t> ranges) {
  constexpr size_t kMostParts = 4;
  const int64_t total = std::accumulate(ranges.begin(), ranges.end(), int64_t{0});
  std::vector<ParameterPart> parts;
  int64_t end = 0;
  for (size_t node = 0; node < ranges.size(); ++node) {
    if (ranges[node] == 0) continue;
    const int64_t first = std::exchange(end, end + ranges[node]);
    if (parts.empty() || end > total >> 2 * (kMostParts - parts.size()))
      parts.push_back({node, first, 0});
    parts.back().count = end - parts.back().first;
  }
  return parts;
}

// Up to kRangeWidth elements from `first`; what lies past `count` is 0.
template <typename T>
__device__ Pack<float, kRangeWidth> load_range(const T* p, int64_t first, int64_t count) {
  Pack<float, kRangeWidth> values{};
  if (first + kRangeWidth <= count) {
    const Pack<T, kRangeWidth> stored = load<kRangeWidth>(p + first);
#pragma unroll
    for (int i = 0; i < kRangeWidth; ++i) values.at[i] = to_float(stored.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kRangeWidth; ++i)
      if (first + i < count) values.at[i] = to_float(p[first + i]);
  }
  return values;
}

template <typename T>
__device__ Pack<float, kRangeWidth> load_gradient(const ParameterTensor<T>& of, int64_t first) {
  return of.gradient_is_float ? load_range(static_cast<const float*>(of.gradient), first, of.count)
                              : load_range(static_cast<const T*>(of.gradient), first, of.count);
}

// Stores as much of `values` as lies before `count`.
template <typename T>
__device__ void store_range(T* p, int64_t first, int64_t count,
                            const Pack<float, kRangeWidth>& values) {
  if (first + kRangeWidth <= count) {
    Pack<T, kRangeWidth> stored;
#pragma unroll
    for (int i = 0; i < kRangeWidth; ++i) stored.at[i] = from_float<T>(values.at[i]);
    store(p + first, stored);
  } else {
#pragma unroll
    for (int i = 0; i < kRangeWidth; ++i)
      if (first + i < count) p[first + i] = from_float<T>(values.at[i]);
  }
}

}  // namespace hardmine::cuda
