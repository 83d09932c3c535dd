// Copies between host and device that wait for their stream: for tensors that a user reads and
// writes, never inside a step.
#pragma once

#include <span>
#include <type_traits>

#include "cuda/runtime.h"

namespace hardmine::cuda {

template <typename T>
void read_device(const T* from, std::span<std::type_identity_t<T>> values, const Stream& stream) {
  check(cudaMemcpyAsync(values.data(), from, values.size_bytes(), cudaMemcpyDeviceToHost,
                        stream.get()),
        "the copy of a tensor to the host");
  stream.synchronize();
}

template <typename T>
void write_device(T* to, std::span<const std::type_identity_t<T>> values, const Stream& stream) {
  check(
      cudaMemcpyAsync(to, values.data(), values.size_bytes(), cudaMemcpyHostToDevice, stream.get()),
      "the copy of a tensor to the device");
  stream.synchronize();
}

}  // namespace hardmine::cuda
