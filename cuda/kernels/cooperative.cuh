// Kernels whose blocks wait for each other. A block that waits keeps its place, so all of them must
// be on the device at once: a cooperative launch does that or fails, and the occupancy says
// beforehand which it will be. Blocks wait where a sum over all of them is needed: the last one to
// come finishes it and lets the others go on. What another block has written in the same launch
// must not be read with __ldg, nor through a pointer that is const and __restrict__: those loads
// may take what a cache held before.
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/kernels/device.cuh"

namespace hardmine::cuda {

// What the device of a thread has for cooperative launches.
struct CooperativeLimits {
  int multiprocessors = 0;  // 0 where it has no such launches
  int shared_bytes = 0;     // static and dynamic, of a block
};

inline CooperativeLimits cooperative_limits() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  if (ask(cudaDevAttrCooperativeLaunch) == 0) return {};
  return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// How many pieces of dynamic shared memory, `wanted` at most, each block may have with all of them
// on the device at once; nullopt where there are too many blocks even without. Allows the kernel,
// on this device, as much dynamic shared memory as there is.
template <typename... Parameters>
std::optional<int> shared_pieces(const CooperativeLimits& device, void (*kernel)(Parameters...),
                                 int64_t blocks, int threads, int piece_bytes, int64_t wanted) {
  if (device.multiprocessors == 0) return std::nullopt;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int most = device.shared_bytes - static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "cudaFuncSetAttribute");
  for (auto pieces = static_cast<int>(std::min<int64_t>(wanted, most / piece_bytes)); pieces >= 0;
       --pieces) {
    int resident = 0;  // blocks on a multiprocessor
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads,
                                                        size_t{1} * pieces * piece_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    if (int64_t{resident} * device.multiprocessors >= blocks) return pieces;
  }
  return std::nullopt;
}

// ---- On the device ----

// True in every thread of the block that is the last of `blocks` to come here, which then sees what
// the others wrote before they came. `arrivals` is 0 before a launch, and whoever is last makes it
// 0 again. The order in which blocks come decides only who goes on, not what is computed.
template <typename Tag>
__device__ bool is_last_block(unsigned* arrivals, unsigned blocks) {
  unsigned* before = shared_array<Tag, unsigned, 1>();
  __syncthreads();  // the block's results are written
  if (threadIdx.x == 0) {
    __threadfence();  // they come before its arrival
    *before = atomicAdd(arrivals, 1U);
    __threadfence();  // and the others' arrivals before its reads
  }
  __syncthreads();
  return *before == blocks - 1;
}

// Between two looks at whether the last block is done; the look itself, a read from the
// second-level cache, takes some hundreds.
inline constexpr unsigned kPollNanoseconds = 100;

// Runs finish() in the last of `blocks` blocks to come here; all return once it is over, and see
// what it wrote. A barrier: only in a cooperative launch, once a launch for the same `arrivals`.
template <typename Tag, typename Finish>
__device__ void finish_in_last_block(unsigned* arrivals, unsigned blocks, const Finish& finish) {
  // Nobody comes after the last, so that its setting the counter back is what the others wait for.
  volatile unsigned* left = arrivals;
  if (is_last_block<Tag>(arrivals, blocks)) {
    finish();
    __syncthreads();  // its results are written
    if (threadIdx.x == 0) {
      __threadfence();
      *left = 0;
    }
  } else {
    if (threadIdx.x == 0) {
      while (*left != 0) __nanosleep(kPollNanoseconds);
      __threadfence();
    }
    __syncthreads();
  }
}

}  // namespace hardmine::cuda
