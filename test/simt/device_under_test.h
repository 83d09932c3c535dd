// What the tests of cuda/ run on: here the emulated device with the fakes of its libraries.
// test/gpu has the header of the same name for a real one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernels/cooperative.cuh"
#include "cuda/libraries.h"
#include "test/simt/fake_libraries.h"

namespace hardmine::testing {

// A device and its libraries, as long as a test.
struct Gpu {
  explicit Gpu(uint64_t seed = 1, size_t memory_bytes = size_t{1} << 30, bool cooperative = true)
      : device(
            {.memory_bytes = memory_bytes, .major = 8, .cooperative = cooperative, .seed = seed}) {}
  simt::FakeLibraries fakes;
  simt::Device device;  // of the generation with the smaller workspaces
  cuda::Libraries libraries = fakes.libraries();
};

// Of the device that kernels run on which are given Buffers.
inline cuda::CooperativeLimits cooperative_limits() {
  const simt::Device device;
  return cuda::cooperative_limits();
}

template <typename T>
using Buffer = simt::Buffer<T>;

}  // namespace hardmine::testing
