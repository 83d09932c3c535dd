// What every kernel file builds on: number types, shared arrays, reductions and the launch.
// Compiles under nvcc and, for the tests, under g++ against test/simt's stand-ins.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/check.h"

namespace hardmine::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xFFFFFFFFU;

// ---- Numbers: operands are stored as T (float, __half, __nv_bfloat16), sums are float ----
// On both sides: of a __device__ function that a host template calls, nvcc makes exit(1) in
// silence.

__host__ __device__ inline float to_float(float x) {
  return x;
}
__host__ __device__ inline float to_float(__half x) {
  return __half2float(x);
}
__host__ __device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <typename T>
__host__ __device__ T from_float(float x);
template <>
__host__ __device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__host__ __device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// ---- Shared memory: one static array for each Tag, and what the launch gives ----

template <typename Tag, typename T, int count>
__device__ T* shared_array() {
#ifdef __CUDACC__
  __shared__ T memory[count];
  return memory;
#else
  static char key;
  return static_cast<T*>(simt::Block::current->static_shared(&key, sizeof(T) * count));
#endif
}

// 16-byte aligned.
template <typename T>
__device__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_memory[];
  return reinterpret_cast<T*>(dynamic_memory);
#else
  return static_cast<T*>(simt::Block::current->dynamic_shared());
#endif
}

// ---- Reductions: the same order every time, so that results repeat bit for bit ----

template <typename N>
__device__ N warp_sum(N value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// Sum over a block of whole warps; every thread gets it. Uses two barriers.
template <typename Tag, typename N>
__device__ N block_sum(N value) {
  N* partial = shared_array<Tag, N, kWarpSize>();
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  __syncthreads();  // the previous use of `partial` is over
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  const unsigned warps = blockDim.x / kWarpSize;
  return warp_sum(lane < warps ? partial[lane] : N(0));
}

// ---- Launch ----

// What a launch has beside its grid.
struct LaunchOptions {
  LaunchOptions(cudaStream_t on) : stream(on) {}
  cudaStream_t stream;
  size_t shared_bytes = 0;   // dynamic; the device must have been told to allow more than 48 KB
  bool cooperative = false;  // all blocks are on the device at once
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            const LaunchOptions& options, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = options.shared_bytes;
  config.stream = options.stream;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = options.cooperative ? 1 : 0;
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess) {
    check(status, std::string("the launch of ") + name + " (grid " +
                      std::to_string(config.gridDim.x) + "x" + std::to_string(config.gridDim.y) +
                      ", block " + std::to_string(config.blockDim.x) + ")");
  }
}

}  // namespace hardmine::cuda
