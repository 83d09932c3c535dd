// Loads of neighbouring elements, and how a block lies over a row-major matrix [rows, channels]:
// what the kernels over NHWC maps share.
//
// `groups` threads side by side take `width` neighbouring channels each; `lanes` such teams take
// rows, one after the other, of the block's share of rows. A thread keeps its channels from row to
// row, so that their constants are loaded once. Eight threads of 16 bytes are one full line of
// memory; more side by side would leave fewer blocks along the rows to merge and fewer SMs at work
// where there are many channels and few rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/kernels/device.cuh"

namespace hardmine::cuda {

// Loads are of 16 bytes at most; a wider pack is several of them.
template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T at[width];
};

template <int width, typename T>
__device__ Pack<T, width> load(const T* p) {
  return *reinterpret_cast<const Pack<T, width>*>(p);
}

template <int width, typename T>
__device__ void store(T* p, const Pack<T, width>& values) {
  *reinterpret_cast<Pack<T, width>*>(p) = values;
}

template <typename T>
inline constexpr int kVectorWidth = static_cast<int>(16 / sizeof(T));  // the widest load there is

// Calls run(std::integral_constant<int, width>) with the widest loads that rows of `channels`
// elements allow.
template <typename T, typename Run>
auto with_vector_width(int64_t channels, const Run& run) {
  if (channels % kVectorWidth<T> == 0) return run(std::integral_constant<int, kVectorWidth<T>>());
  return run(std::integral_constant<int, 1>());
}

inline constexpr int kTileThreads = 256;

struct Tiling {
  int64_t rows;
  int channels;
  int groups, lanes;       // groups * lanes <= kTileThreads; what is over stays idle
  int64_t rows_per_block;  // the last block may have fewer, none has no rows
  unsigned column_blocks, row_blocks;

  dim3 grid() const { return dim3(column_blocks, row_blocks); }
};

// At most `max_blocks` blocks where the columns alone do not need more.
template <int width>
Tiling tile(int64_t rows, int64_t channels, int64_t max_blocks) {
  constexpr int64_t kTeam = width == 1 ? 32 : 8;
  constexpr int64_t kLeastRows = 2;  // of a thread: less does not pay for its constants
  const int64_t all_groups = channels / width;
  const int64_t groups = std::min(all_groups, kTeam);
  const int64_t lanes = kTileThreads / groups;
  const int64_t columns = (all_groups + groups - 1) / groups;
  const int64_t wanted = (rows + lanes * kLeastRows - 1) / (lanes * kLeastRows);
  const int64_t most = std::min(wanted, std::max<int64_t>(max_blocks / columns, 1));
  const int64_t share = (rows + most - 1) / most;
  return {rows,
          static_cast<int>(channels),
          static_cast<int>(groups),
          static_cast<int>(lanes),
          share,
          static_cast<unsigned>(columns),
          static_cast<unsigned>((rows + share - 1) / share)};
}

// Where a thread stands.
struct Place {
  int lane;
  int channel;  // the first of its channels
  bool active;
  int64_t first, last;  // rows of the block
};

template <int width>
__device__ Place place_in(const Tiling& t) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread / t.groups;
  const int channel =
      (static_cast<int>(blockIdx.x) * t.groups + (thread - lane * t.groups)) * width;
  const int64_t first = int64_t{blockIdx.y} * t.rows_per_block;
  const int64_t last = first + t.rows_per_block;
  return {lane, channel, lane < t.lanes && channel < t.channels, first,
          last < t.rows ? last : t.rows};
}

// Adds the sums of all lanes of a team, in a fixed order; the thread of lane 0 gets them.
template <typename Tag, int width, int count>
__device__ void sum_lanes(const Tiling& t, int lane, Pack<float, width> (&sums)[count]) {
  auto* memory = shared_array<Tag, Pack<float, width>, count * kTileThreads>();
  const int self = static_cast<int>(threadIdx.x);
  __syncthreads();  // the previous use of `memory` is over
#pragma unroll
  for (int k = 0; k < count; ++k) memory[k * kTileThreads + self] = sums[k];
  for (int left = t.lanes; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (lane + half < left) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        const Pack<float, width> other = memory[k * kTileThreads + self + half * t.groups];
#pragma unroll
        for (int i = 0; i < width; ++i) sums[k].at[i] += other.at[i];
        memory[k * kTileThreads + self] = sums[k];
      }
    }
    left = half;
  }
}

}  // namespace hardmine::cuda
