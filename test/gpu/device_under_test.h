// What the tests of cuda/ run on: here the first real device, with cuDNN and cuBLASLt as installed.
// test/simt has the header of the same name for the emulated one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/kernels/cooperative.cuh"
#include "cuda/libraries.h"
#include "cuda/runtime.h"

namespace hardmine::testing {

// The libraries, opened once. The seed is that of the emulated device's timing: a real one has its own.
struct Gpu {
  explicit Gpu(uint64_t /*seed*/ = 1) : libraries(opened()) {}
  cuda::Libraries libraries;

 private:
  static const cuda::Libraries& opened() {
    static const cuda::Libraries libraries = [] {
      setenv("NVIDIA_TF32_OVERRIDE", "0", 1);  // what is compared with double is plain fp32
      return cuda::open_libraries();
    }();
    return libraries;
  }
};

using cuda::cooperative_limits;

// Managed memory between canaries. Host and device use it in turn: values() and check() wait for the
// device.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count, std::string name = "a buffer")
      : count_(count), name_(std::move(name)) {
    const size_t bytes = kGuard + (count * sizeof(T) + kGuard - 1) / kGuard * kGuard + kGuard;
    void* memory = nullptr;
    cuda::check(cudaMallocManaged(&memory, bytes), "cudaMallocManaged");
    base_ = static_cast<char*>(memory);
    end_ = base_ + bytes;
    std::memset(base_, kCanary, bytes);
    data_ = reinterpret_cast<T*>(base_ + kGuard);
  }
  Buffer(const std::vector<T>& values, std::string name) : Buffer(values.size(), std::move(name)) {
    std::copy(values.begin(), values.end(), data_);
  }
  ~Buffer() {
    cudaDeviceSynchronize();
    cudaFree(base_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) {
    wait();
    return data_[i];
  }
  std::vector<T> values() const {
    wait();
    return std::vector<T>(data_, data_ + count_);
  }
  void fill(const T& value) {
    wait();
    std::fill(data_, data_ + count_, value);
  }

  // Throws when bytes around the data were written.
  void check() const {
    wait();
    const auto untouched = [](const char* from, const char* to) {
      return std::all_of(from, to, [](char byte) { return byte == kCanary; });
    };
    const char* data = reinterpret_cast<const char*>(data_);
    if (!untouched(base_, data)) throw std::runtime_error("a write before the start of " + name_);
    if (!untouched(data + count_ * sizeof(T), end_))
      throw std::runtime_error("a write past the end of " + name_);
  }

 private:
  static constexpr char kCanary = 0x5A;
  static constexpr size_t kGuard = 256;

  static void wait() { cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

  size_t count_;
  std::string name_;
  char* base_ = nullptr;
  char* end_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace hardmine::testing
