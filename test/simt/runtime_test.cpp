// cuda/runtime, cuda/libraries, cuda/products and cuda/convolution on the emulated device and the
// fakes of cuDNN and cuBLASLt; and the emulated device itself, where a bug would hide others.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/convolution.h"
#include "cuda/kernels/cooperative.cuh"
#include "cuda/kernels/device.cuh"
#include "cuda/libraries.h"
#include "cuda/norm_graph.h"
#include "cuda/products.h"
#include "cuda/runtime.h"
#include "test/native/environment.h"
#include "test/native/temporary_folder.h"
#include "test/simt/fake_libraries.h"

namespace {

using hardmine::Error;
using hardmine::test::TemporaryFolder;
using hardmine::testing::Environment;
namespace codes = hardmine::codes;
namespace cuda = hardmine::cuda;

constexpr int kThreads = 64;

__global__ void add_one(int* values, int count) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < static_cast<unsigned>(count)) values[i] += 1;
}
__global__ void copy_value(const int* from, int* to) {
  if (threadIdx.x == 0) *to = *from;
}

// Every block's value becomes the sum of all, through dynamic shared memory.
__global__ void sum_of_blocks(int* values, int* sum, unsigned* arrivals) {
  struct LastTag {};
  int* shared = cuda::dynamic_shared<int>();
  shared[threadIdx.x] = values[blockIdx.x];
  cuda::finish_in_last_block<LastTag>(arrivals, gridDim.x, [&] {
    if (threadIdx.x != 0) return;
    *sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) *sum += values[b];
  });
  if (threadIdx.x == 0) values[blockIdx.x] = *sum + shared[kThreads - 1];
}

void enqueue_add(int* values, int count, const cuda::Stream& stream) {
  cuda::launch("add_one", &add_one, static_cast<unsigned>((count + kThreads - 1) / kThreads),
               kThreads, stream.get(), values, count);
}
void enqueue_copy_value(const int* from, int* to, const cuda::Stream& stream) {
  cuda::launch("copy_value", &copy_value, 1, kThreads, stream.get(), from, to);
}

// The error that `run` throws: "CODE: message", or empty.
template <typename Run>
std::string error_of(const Run& run) {
  try {
    run();
  } catch (const Error& error) {
    return std::string(error.code()) + ": " + error.what();
  }
  return {};
}
bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("work runs when it is waited for, in the order of its stream") {
  simt::Device device;
  const cuda::Stream stream;
  const cuda::DeviceBlock block = cuda::allocate_device(100 * sizeof(int), "a test");
  int* values = static_cast<int*>(block.data());
  cuda::PinnedArray<int> host(100);
  std::iota(host.span().begin(), host.span().end(), 0);
  cuda::check(
      cudaMemcpyAsync(values, host.data(), host.bytes(), cudaMemcpyHostToDevice, stream.get()),
      "a copy in");
  enqueue_add(values, 100, stream);
  CHECK(device.works_run() == 0);
  host[7] = 70;  // read when the copy runs, not when it is enqueued
  stream.synchronize();
  CHECK(device.works_run() == 2);
  const std::vector<int> now = device.peek(values, 100);
  CHECK(now[0] == 1);
  CHECK(now[7] == 71);
  CHECK(now[99] == 100);
  cuda::check(cudaMemsetAsync(values, 0, 100 * sizeof(int), stream.get()), "a fill");
  cuda::check(
      cudaMemcpyAsync(host.data(), values, host.bytes(), cudaMemcpyDeviceToHost, stream.get()),
      "a copy out");
  CHECK(host[99] == 99);  // not yet
  stream.synchronize();
  CHECK(host[99] == 0);
}

TEST_CASE("a missing wait between streams shows, and a wait mends it") {
  int wrong_without = 0, wrong_with = 0;
  for (uint64_t seed = 1; seed <= 16; ++seed) {
    for (const bool wait : {false, true}) {
      simt::Device device({.seed = seed});
      const cuda::Stream first, second;
      const cuda::Event event;
      const cuda::DeviceBlock block = cuda::allocate_device(4 * sizeof(int), "a test");
      int* values = static_cast<int*>(block.data());
      cuda::check(cudaMemsetAsync(values, 0, 4 * sizeof(int), first.get()), "a fill");
      for (int i = 0; i < 3; ++i) enqueue_add(values, 1, first);
      event.record(first.get());
      if (wait) second.wait(event);
      enqueue_copy_value(values, values + 1, second);
      second.synchronize();
      (wait ? wrong_with : wrong_without) += device.peek(values, 2)[1] != 3;
    }
  }
  CHECK(wrong_without >= 8);
  CHECK(wrong_with == 0);
}

TEST_CASE("synchronising one stream or event leaves the others' work undone") {
  simt::Device device;
  const cuda::Stream stream, other;
  const cuda::Event event;
  event.synchronize();  // never recorded
  const cuda::DeviceBlock block = cuda::allocate_device(sizeof(int), "a test");
  int* value = static_cast<int*>(block.data());
  cuda::check(cudaMemsetAsync(value, 0, sizeof(int), stream.get()), "a fill");
  event.record(stream.get());
  for (int i = 0; i < 200; ++i) enqueue_add(value, 1, stream);
  event.synchronize();
  CHECK(device.peek(value, 1)[0] == 0);
  other.synchronize();
  CHECK(device.peek(value, 1)[0] == 0);
  // A plain copy does not wait for a non-blocking stream either.
  int copied = -1;
  cuda::check(cudaMemcpy(&copied, value, sizeof copied, cudaMemcpyDeviceToHost), "a copy");
  CHECK(copied == 0);
  stream.synchronize();
  CHECK(device.peek(value, 1)[0] == 200);
}

TEST_CASE("stray accesses are faults") {
  SUBCASE("a kernel past the end of an allocation") {
    simt::Device device;
    const cuda::Stream stream;
    const cuda::DeviceBlock block = cuda::allocate_device(32 * sizeof(int), "a test");
    enqueue_add(static_cast<int*>(block.data()), 33, stream);
    CHECK_THROWS_AS(stream.synchronize(), simt::Fault);
    const std::string after = error_of([&] { stream.synchronize(); });
    CHECK(contains(after, codes::kDeviceLost));
  }
  SUBCASE("a kernel past the end of an array in an arena") {
    simt::Device device;
    const cuda::Stream stream;
    int *first = nullptr, *second = nullptr;
    const auto layout = [&](cuda::Arena& arena) {
      first = arena.take<int>(1000);
      second = arena.take<int>(8);
    };
    cuda::Arena counted;
    layout(counted);
    CHECK(first == nullptr);
    const cuda::DeviceBlock block = cuda::allocate_device(counted.bytes(), "a test");
    cuda::Arena arena(block);
    layout(arena);
    CHECK(arena.bytes() == counted.bytes());
    CHECK(reinterpret_cast<uintptr_t>(first) % 16 == 0);
    CHECK(second - first >= 1000);
    CHECK(contains(error_of([&] { layout(arena); }), "took more than it had counted"));
    enqueue_add(first, 1000, stream);
    enqueue_add(second, 8, stream);
    stream.synchronize();
    enqueue_add(first, 1001, stream);
    CHECK_THROWS_AS(stream.synchronize(), simt::Fault);
  }
  SUBCASE("a copy past the end of host memory") {
    simt::Device device;
    const cuda::DeviceBlock block = cuda::allocate_device(32 * sizeof(int), "a test");
    const cuda::PinnedArray<int> host(16);
    CHECK_THROWS_AS(cudaMemcpy(block.data(), host.data(), 32 * sizeof(int), cudaMemcpyDefault),
                    simt::Fault);
  }
  SUBCASE("a copy whose direction is wrong, or past the end of device memory") {
    simt::Device device;
    const cuda::DeviceBlock block = cuda::allocate_device(16, "a test");
    int host[8] = {};
    CHECK(cudaMemcpy(host, block.data(), 16, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, block.data(), 32, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaMemcpy(host, block.data(), 16, cudaMemcpyDeviceToHost) == cudaSuccess);
    CHECK(host[0] == -1);  // what was never written is NaN
  }
  SUBCASE("a kernel on the default stream, or given the host's memory") {
    simt::Device device;
    const cuda::Stream stream;
    int host = 0;
    CHECK_THROWS_AS(enqueue_add(&host, 1, stream), simt::Fault);
    CHECK_THROWS_AS(cuda::launch("add_one", &add_one, 1, 1, nullptr, &host, 1), simt::Fault);
  }
  SUBCASE("memory that is never given back") {
    void* leaked = nullptr;
    CHECK_THROWS_AS(
        {
          simt::Device device;
          cuda::check(cudaMalloc(&leaked, 16), "a test");
        },
        simt::Fault);
  }
}

TEST_CASE("a captured graph replays forks and joins") {
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    simt::Device device({.seed = seed});
    const cuda::Stream stream, side;
    const cuda::Event forked, joined;
    const cuda::DeviceBlock block = cuda::allocate_device(4 * sizeof(int), "a test");
    int* values = static_cast<int*>(block.data());
    cuda::PinnedArray<int> in(1), out(1);
    cuda::check(cudaMemsetAsync(values, 0, 4 * sizeof(int), stream.get()), "a fill");
    const cuda::CapturedGraph graph(stream, [&] {
      cuda::check(
          cudaMemcpyAsync(values, in.data(), in.bytes(), cudaMemcpyHostToDevice, stream.get()),
          "a copy in");
      forked.record(stream.get());
      side.wait(forked);
      enqueue_copy_value(values, values + 1, side);
      enqueue_add(values + 1, 1, side);
      enqueue_copy_value(values, values + 2, stream);
      joined.record(side.get());
      stream.wait(joined);
      enqueue_add(values + 1, 2, stream);
      cuda::check(cudaMemcpyAsync(out.data(), values + 1, out.bytes(), cudaMemcpyDeviceToHost,
                                  stream.get()),
                  "a copy out");
    });
    CHECK(device.works_run() == 0);
    for (int step = 0; step < 3; ++step) {
      in[0] = 10 * step;
      graph.launch(stream);
      stream.synchronize();
      CHECK(out[0] == 10 * step + 2);
      CHECK(device.peek(values, 3)[2] == 10 * step + 1);
    }
  }
}

TEST_CASE("a cooperative launch is captured like any other, and refused where it does not fit") {
  simt::Device device({.multiprocessors = 2, .shared_bytes = 200 << 10});
  const cuda::Stream stream;
  const cuda::DeviceBlock block = cuda::allocate_device(64 * sizeof(int), "a test");
  int* const values = static_cast<int*>(block.data());
  auto* const arrivals = reinterpret_cast<unsigned*>(values + 32);
  cuda::check(cudaMemset(values, 0, 64 * sizeof(int)), "a fill");
  cuda::LaunchOptions options = stream.get();
  options.cooperative = true;
  options.shared_bytes = 60 << 10;
  const auto enqueue = [&](unsigned blocks) {
    cuda::launch("sum_of_blocks", &sum_of_blocks, blocks, kThreads, options, values, values + 31,
                 arrivals);
  };
  CHECK(error_of([&] { enqueue(2); }).find("ERR_BACKEND") == 0);  // more than 48 KB unasked
  const cuda::CooperativeLimits limits = cuda::cooperative_limits();
  CHECK(limits.multiprocessors == 2);
  CHECK(cuda::shared_pieces(limits, &sum_of_blocks, 6, kThreads, 10 << 10, 100) == 6);
  CHECK(cuda::shared_pieces(limits, &sum_of_blocks, 6, kThreads, 10 << 10, 5) == 5);
  CHECK(cuda::shared_pieces(limits, &sum_of_blocks, 49, kThreads, 10 << 10, 5) == std::nullopt);
  {
    const cuda::CapturedGraph graph(stream, [&] {
      enqueue_add(values, 6, stream);
      enqueue(6);
      enqueue(6);
    });
    for (int i = 0; i < 2; ++i) graph.launch(stream);
    stream.synchronize();
  }
  // v -> (v + 1) 7 twice and again: 0, 1, 7, 49; 50, 350, 2450.
  CHECK(device.peek(values, 7) == std::vector<int>{2450, 2450, 2450, 2450, 2450, 2450, 0});
  CHECK(device.peek(arrivals, 1)[0] == 0);
  const std::string error = error_of([&] { enqueue(7); });
  CHECK(contains(error, "the launch of sum_of_blocks (grid 7x1, block 64)"));
  CHECK(contains(error, "cudaErrorCooperativeLaunchTooLarge"));
  options.cooperative = false;
  enqueue(7);
  CHECK_THROWS_WITH_AS(stream.synchronize(),
                       "a block waits for another, but the launch is not cooperative", simt::Fault);
}

TEST_CASE("what a capture forbids is an error, and leaves no capture behind") {
  simt::Device device;
  const cuda::Stream stream, side;
  const cuda::Event event;
  const cuda::DeviceBlock block = cuda::allocate_device(4 * sizeof(int), "a test");
  int* values = static_cast<int*>(block.data());
  cuda::check(cudaMemsetAsync(values, 0, 4 * sizeof(int), stream.get()), "a fill");
  const auto capture = [&](const std::function<void()>& work) {
    return error_of([&] { const cuda::CapturedGraph graph(stream, work); });
  };
  CHECK(contains(capture([&] { stream.synchronize(); }), "cudaErrorStreamCaptureUnsupported"));
  CHECK(contains(capture([&] { cuda::allocate_device(16, "a step"); }),
                 "cudaErrorStreamCaptureUnsupported"));
  CHECK(contains(capture([&] {
                   event.record(stream.get());
                   side.wait(event);
                   enqueue_add(values, 1, side);
                 }),
                 "cudaErrorStreamCaptureUnjoined"));
  event.record(side.get());
  CHECK(contains(capture([&] { stream.wait(event); }), "cudaErrorStreamCaptureIsolation"));
  CHECK(contains(capture([] { throw Error(codes::kInput, "of its own"); }), "of its own"));
  int pageable = 0;
  CHECK_THROWS_AS(capture([&] {
                    static_cast<void>(cudaMemcpyAsync(values, &pageable, sizeof pageable,
                                                      cudaMemcpyHostToDevice, stream.get()));
                  }),
                  simt::Fault);
  enqueue_add(values, 1, stream);  // runs as ever
  stream.synchronize();
  CHECK(device.peek(values, 1)[0] == 1);
}

TEST_CASE("memory that is short is told in numbers, and less of it fits") {
  simt::Device device({.memory_bytes = size_t{64} << 20});
  const cuda::DeviceBlock first = cuda::allocate_device(size_t{48} << 20, "the weights");
  const std::string error =
      error_of([] { cuda::allocate_device(size_t{100} << 20, "a session at batch 512"); });
  CHECK(contains(error, codes::kOutOfMemory));
  CHECK(contains(error, "a session at batch 512"));
  CHECK(contains(error, "100.0 MiB wanted, 16.0 MiB free of 64.0 MiB"));
  CHECK(cudaGetLastError() == cudaSuccess);
  CHECK(cuda::allocate_device(size_t{16} << 20, "a session at batch 64").data() != nullptr);
  CHECK(device.used_bytes() == size_t{48} << 20);
}

TEST_CASE("errors carry the code that tells what to do") {
  CHECK(contains(error_of([] { cuda::use_device(0); }), codes::kUnavailable));
  simt::Device device;
  CHECK(error_of([] { cuda::use_device(0); }).empty());
  const std::string ordinal = error_of([] { cuda::use_device(3); });
  CHECK(contains(ordinal, codes::kUnavailable));
  CHECK(contains(ordinal, "cuda:3"));
  const auto code = [](cudaError_t status) {
    const std::string error = error_of([&] { cuda::check(status, "the forward pass at batch 7"); });
    CHECK(contains(error, "the forward pass at batch 7"));
    return error.substr(0, error.find(':'));
  };
  CHECK(code(cudaErrorMemoryAllocation) == codes::kOutOfMemory);
  CHECK(code(cudaErrorIllegalAddress) == codes::kDeviceLost);
  CHECK(code(cudaErrorLaunchFailure) == codes::kDeviceLost);
  CHECK(code(cudaErrorECCUncorrectable) == codes::kDeviceLost);
  CHECK(code(cudaErrorAssert) == codes::kDeviceLost);
  CHECK(code(cudaErrorInsufficientDriver) == codes::kUnavailable);
  CHECK(code(cudaErrorNoDevice) == codes::kUnavailable);
  CHECK(code(cudaErrorInvalidValue) == codes::kBackend);
  const cuda::Stream stream;
  const cuda::DeviceBlock block = cuda::allocate_device(2 * kThreads * sizeof(int), "a test");
  device.lose(cudaErrorECCUncorrectable);
  CHECK(contains(error_of([&] { stream.synchronize(); }), codes::kDeviceLost));
  const std::string launch =
      error_of([&] { enqueue_add(static_cast<int*>(block.data()), 2 * kThreads, stream); });
  CHECK(contains(launch, codes::kDeviceLost));
  CHECK(contains(launch, "the launch of add_one (grid 2x1, block 64)"));
  CHECK(contains(error_of([&] { cuda::allocate_device(16, "a step"); }), codes::kDeviceLost));
}

TEST_CASE("page-locked memory for the ring belongs to a device") {
  {
    simt::Device device;
    cuda::PinnedAllocator allocator(0);
    void* memory = allocator.allocate(1000);
    CHECK(memory != nullptr);
    allocator.release(memory);
    cuda::PinnedArray<float> moved(10);
    moved = cuda::PinnedArray<float>(20);
    CHECK(moved.size() == 20);
    CHECK(contains(error_of([] { cuda::PinnedAllocator(1).allocate(10); }), codes::kUnavailable));
  }
}

// ---- Libraries ----

TEST_CASE("a library that is missing, incomplete or too old is told in one sentence") {
  {
    simt::FakeLibraries fakes;
    CHECK(cuda::version_text(fakes.libraries().cudnn.get_version()) == "9.24.0");
    CHECK(cuda::version_text(fakes.libraries().cublas_lt.get_version()) == "13.1.0");
  }
  {
    simt::FakeLibraries fakes({.without = "cudnnBackendExecute"});
    const std::string error = error_of([&] { static_cast<void>(fakes.libraries()); });
    CHECK(contains(error, codes::kUnavailable));
    CHECK(contains(error, "cudnnBackendExecute"));
    CHECK(contains(error, "npm run setup:cuda"));
  }
  {
    simt::FakeLibraries fakes({.cudnn_version = 8907});
    const std::string error = error_of([&] { static_cast<void>(fakes.libraries()); });
    CHECK(contains(error, codes::kUnavailable));
    CHECK(contains(error, "9.0.0 or later"));
  }
  {
    simt::FakeLibraries fakes({.cublas_lt_version = 110503});
    const std::string error = error_of([&] { static_cast<void>(fakes.libraries()); });
    CHECK(contains(error, "11.5.3"));
    CHECK(contains(error, "12.0.0 or later"));
  }
}

TEST_CASE("libraries are looked for in CUDNN_ROOT and beside Python's torch") {
  const TemporaryFolder folder;
  const Environment cudnn_root("CUDNN_ROOT", (folder.path() / "root").string());
  const Environment environment("VIRTUAL_ENV", (folder.path() / "venv").string());
  const auto text = [](size_t index) { return cuda::describe_libraries().at(index).second; };
  constexpr size_t kCublasLt = 0, kNvrtc = 1, kCudnn = 2;
  CHECK(contains(text(kCudnn), "was not found"));
  CHECK(contains(text(kCudnn), "npm run setup:cuda"));
  CHECK(contains(error_of([] { static_cast<void>(cuda::open_libraries()); }), codes::kUnavailable));
  // What is there but is no library shows that the place was searched.
  const auto plant = [&](const std::filesystem::path& file) {
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << "no library";
  };
  const auto site = folder.path() / "venv/lib/python3.11/site-packages/nvidia";
  plant(folder.path() / "root/lib/libcudnn.so.9");
  plant(site / "cu13/lib/libcublasLt.so.13");
  plant(site / "cuda_nvrtc/lib/libnvrtc.so.12");
  CHECK(contains(text(kCudnn), "root/lib/libcudnn.so.9"));
  CHECK(contains(text(kCublasLt), "cu13/lib/libcublasLt.so.13"));
  CHECK(contains(text(kNvrtc), "cuda_nvrtc/lib/libnvrtc.so.12"));
}

// ---- Products ----

namespace {

// Device memory of T that the tests fill and read while nothing runs.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count)
      : count_(count), block_(cuda::allocate_device(count * sizeof(T), "a test")) {}
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    cuda::check(cudaMemcpy(data(), values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
                "a copy in");
  }
  T* data() const { return static_cast<T*>(block_.data()); }
  std::vector<T> values() const { return simt::Device::current->peek(data(), count_); }

 private:
  size_t count_;
  cuda::DeviceBlock block_;
};

template <typename T>
std::vector<T> random_values(size_t count, uint64_t seed) {
  std::vector<T> values(count);
  for (T& value : values) {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    value = cuda::from_float<T>(static_cast<float>(seed >> 40) / (1 << 23) - 1);
  }
  return values;
}

// A result is rounded once to its type; sums are exact to a float.
template <typename T>
double rounding() {
  if constexpr (std::is_same_v<T, __half>) return 0x1p-11;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return 0x1p-8;
  return 0x1p-23;
}

template <typename T, typename Result>
void check_product(cuda::Products& products, const cuda::Stream& stream,
                   const cuda::ProductShape& shape, float alpha, float beta) {
  cuda::ProductShape s = shape;
  s.operands = cuda::number_type<T>();
  s.result = cuda::number_type<Result>();
  const int64_t a_rows = s.transpose_a ? s.k : s.m, a_columns = s.transpose_a ? s.m : s.k;
  const int64_t b_rows = s.transpose_b ? s.n : s.k, b_columns = s.transpose_b ? s.k : s.n;
  const int64_t lda = s.lda == 0 ? a_columns : s.lda, ldb = s.ldb == 0 ? b_columns : s.ldb;
  const int64_t ldc = s.ldc == 0 ? s.n : s.ldc;
  // The last row of a strided matrix ends with its last element.
  const auto count = [](int64_t rows, int64_t columns, int64_t stride) {
    return static_cast<size_t>((rows - 1) * stride + columns);
  };
  const std::vector<T> a = random_values<T>(count(a_rows, a_columns, lda), 1);
  const std::vector<T> b = random_values<T>(count(b_rows, b_columns, ldb), 2);
  const std::vector<Result> before = random_values<Result>(count(s.m, s.n, ldc), 3);
  const DeviceArray<T> device_a(a), device_b(b);
  const DeviceArray<Result> device_c(before);
  products.multiply(s, alpha, device_a.data(), device_b.data(), beta, device_c.data());
  stream.synchronize();
  const std::vector<Result> c = device_c.values();
  for (int64_t i = 0; i < s.m; ++i) {
    for (int64_t j = 0; j < ldc && static_cast<size_t>(i * ldc + j) < c.size(); ++j) {
      const size_t at = static_cast<size_t>(i * ldc + j);
      if (j >= s.n) {  // between the rows of a strided result
        CHECK(cuda::to_float(c[at]) == cuda::to_float(before[at]));
        continue;
      }
      double sum = 0;
      for (int64_t l = 0; l < s.k; ++l)
        sum += static_cast<double>(cuda::to_float(
                   a[static_cast<size_t>(s.transpose_a ? l * lda + i : i * lda + l)])) *
               cuda::to_float(b[static_cast<size_t>(s.transpose_b ? j * ldb + l : l * ldb + j)]);
      const double expected =
          alpha * sum + (beta == 0 ? 0 : beta * static_cast<double>(cuda::to_float(before[at])));
      CHECK(std::abs(cuda::to_float(c[at]) - expected) <=
            rounding<Result>() * (std::abs(expected) + 1));
    }
  }
}

template <typename T>
void check_products(cuda::Products& products, const cuda::Stream& stream) {
  for (const bool transpose_a : {false, true})
    for (const bool transpose_b : {false, true}) {
      cuda::ProductShape shape{.m = 5, .n = 17, .k = 9};
      shape.transpose_a = transpose_a;
      shape.transpose_b = transpose_b;
      check_product<T, float>(products, stream, shape, 1, 0);
      check_product<T, T>(products, stream, shape, 0.5F, 0);
      check_product<T, float>(products, stream, shape, 1, 1);
      shape.lda = 19;
      shape.ldb = 23;
      shape.ldc = 21;
      check_product<T, float>(products, stream, shape, -1, 2);
    }
  check_product<T, float>(products, stream, {.m = 1, .n = 1, .k = 1}, 1, 0);
}

struct ProductBench {
  simt::FakeLibraries fakes;
  simt::Device device;
  cuda::Stream stream;
  DeviceArray<char> workspace{4096};
  cuda::Products products{fakes.libraries().cublas_lt, stream.get(), workspace.data(), 4096};
};

}  // namespace

TEST_CASE_TEMPLATE("products of every layout and stride", T, float, __half, __nv_bfloat16) {
  ProductBench bench;
  check_products<T>(bench.products, bench.stream);
}

TEST_CASE("an algorithm is looked up once for a shape and alignment, and repeats bit for bit") {
  ProductBench bench;
  const DeviceArray<float> a(random_values<float>(70, 1)), b(random_values<float>(70, 2)), c(49);
  const cuda::ProductShape shape{.m = 7, .n = 7, .k = 9};
  std::vector<float> first;
  for (int i = 0; i < 5; ++i) {
    bench.products.multiply(shape, 1, a.data(), b.data(), 0, c.data());
    bench.stream.synchronize();
    if (i == 0) first = c.values();
    CHECK(c.values() == first);
  }
  CHECK(bench.fakes.heuristics == 1);
  bench.products.multiply(shape, 1, a.data() + 1, b.data(), 0, c.data());  // 4-byte aligned
  bench.stream.synchronize();
  CHECK(bench.fakes.heuristics == 2);
}

TEST_CASE("the head's three products") {
  ProductBench bench;
  constexpr int64_t kRows = 3, kDim = 5, kWidth = 7;
  cuda::HeadProducts<float> head{bench.products, kRows, kDim};
  const std::vector<float> x = random_values<float>(kRows * kDim, 1),
                           w = random_values<float>(kWidth * kDim, 2),
                           p = random_values<float>(kRows * kWidth, 3),
                           sum = random_values<float>(kRows * kDim, 4);
  const DeviceArray<float> dx(x), dw(w), dp(p), logits(kRows * kWidth), embeddings(sum),
      weights(kWidth * kDim);
  head.logits(dx.data(), dw.data(), kWidth, logits.data());
  head.embedding_gradient(dp.data(), dw.data(), kWidth, embeddings.data());
  head.weight_gradient(dp.data(), dx.data(), kWidth, weights.data());
  bench.stream.synchronize();
  const auto at = [](const std::vector<float>& m, int64_t i, int64_t columns, int64_t j) {
    return static_cast<double>(m[static_cast<size_t>(i * columns + j)]);
  };
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kWidth; ++j) {
      double z = 0;
      for (int64_t k = 0; k < kDim; ++k) z += at(x, i, kDim, k) * at(w, j, kDim, k);
      CHECK(at(logits.values(), i, kWidth, j) == doctest::Approx(z).epsilon(1e-6));
    }
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t k = 0; k < kDim; ++k) {
      double g = at(sum, i, kDim, k);
      for (int64_t j = 0; j < kWidth; ++j) g += at(p, i, kWidth, j) * at(w, j, kDim, k);
      CHECK(at(embeddings.values(), i, kDim, k) == doctest::Approx(g).epsilon(1e-6));
    }
  for (int64_t j = 0; j < kWidth; ++j)
    for (int64_t k = 0; k < kDim; ++k) {
      double g = 0;
      for (int64_t i = 0; i < kRows; ++i) g += at(p, i, kWidth, j) * at(x, i, kDim, k);
      CHECK(at(weights.values(), j, kDim, k) == doctest::Approx(g).epsilon(1e-6));
    }
}

TEST_CASE("a product that the library refuses names its shape") {
  simt::FakeLibraries fakes;
  simt::Device device;
  const cuda::Stream stream;
  const DeviceArray<char> workspace(16);  // too little for any algorithm
  cuda::Products products(fakes.libraries().cublas_lt, stream.get(), workspace.data(), 16);
  const DeviceArray<float> matrix(64);
  const std::string error = error_of([&] {
    products.multiply({.m = 4, .n = 8, .k = 2, .transpose_b = true}, 1, matrix.data(),
                      matrix.data(), 0, matrix.data());
  });
  CHECK(contains(error, codes::kBackend));
  CHECK(contains(error, "C[4, 8] = A[4, 2] B[8, 2]^T of fp32 to fp32"));
}

// ---- Convolutions ----

namespace {

using cuda::convolution_graph;
using cuda::convolution_pointers;
using cuda::ConvolutionPass;
using cuda::ConvolutionShape;
using hardmine::Precision;

constexpr ConvolutionShape kShape{.batch = 2,
                                  .in_channels = 8,
                                  .out_channels = 16,
                                  .in_size = 7,
                                  .out_size = 4,
                                  .kernel = 3,
                                  .stride = 2,
                                  .padding = 1,
                                  .precision = Precision::fp32};

template <typename T>
Precision precision_of() {
  if constexpr (std::is_same_v<T, __half>) return Precision::fp16;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return Precision::bf16;
  return Precision::fp32;
}

// One pass by the definition, every index written out.
template <typename T>
std::vector<double> direct(const ConvolutionShape& s, ConvolutionPass pass, const std::vector<T>& x,
                           const std::vector<T>& w, const std::vector<T>& y) {
  std::vector<double> out(pass == ConvolutionPass::forward         ? y.size()
                          : pass == ConvolutionPass::data_gradient ? x.size()
                                                                   : w.size());
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t p = 0; p < s.out_size; ++p)
      for (int64_t q = 0; q < s.out_size; ++q)
        for (int64_t k = 0; k < s.out_channels; ++k)
          for (int64_t r = 0; r < s.kernel; ++r)
            for (int64_t t = 0; t < s.kernel; ++t)
              for (int64_t c = 0; c < s.in_channels; ++c) {
                const int64_t h = p * s.stride + r - s.padding, v = q * s.stride + t - s.padding;
                if (h < 0 || h >= s.in_size || v < 0 || v >= s.in_size) continue;
                const auto xi =
                    static_cast<size_t>(((n * s.in_size + h) * s.in_size + v) * s.in_channels + c);
                const auto wi =
                    static_cast<size_t>(((k * s.kernel + r) * s.kernel + t) * s.in_channels + c);
                const auto yi = static_cast<size_t>(
                    ((n * s.out_size + p) * s.out_size + q) * s.out_channels + k);
                const auto value = [](T number) {
                  return static_cast<double>(cuda::to_float(number));
                };
                if (pass == ConvolutionPass::forward) out[yi] += value(x[xi]) * value(w[wi]);
                if (pass == ConvolutionPass::data_gradient) out[xi] += value(y[yi]) * value(w[wi]);
                if (pass == ConvolutionPass::weight_gradient)
                  out[wi] += value(y[yi]) * value(x[xi]);
              }
  return out;
}

struct ConvolutionBench {
  explicit ConvolutionBench(simt::FakeOptions options = {}, cuda::EngineChoice given = {})
      : fakes(std::move(options)),
        cache("XDG_CACHE_HOME", folder.path().string()),
        choice(std::move(given)) {
    choice.device = "Emulated GPU, driver 13000";
    engines.emplace(fakes.libraries().cudnn, choice);
  }
  void restart() { engines.emplace(fakes.libraries().cudnn, choice); }

  TemporaryFolder folder;
  simt::FakeLibraries fakes;
  Environment cache;
  simt::Device device;
  cuda::Stream stream;
  cuda::EngineChoice choice;
  std::optional<cuda::Engines> engines;
};

template <typename T>
struct ConvolutionTensors {
  explicit ConvolutionTensors(const ConvolutionShape& s)
      : hx(random_values<T>(static_cast<size_t>(s.batch * s.in_size * s.in_size * s.in_channels),
                            1)),
        hw(random_values<T>(
            static_cast<size_t>(s.out_channels * s.kernel * s.kernel * s.in_channels), 2)),
        hy(random_values<T>(static_cast<size_t>(s.batch * s.out_size * s.out_size * s.out_channels),
                            3)) {}
  std::vector<T> hx, hw, hy;
  DeviceArray<T> x{hx}, w{hw}, y{hy};
  DeviceArray<char> workspace{4096};

  cuda::EnginePointers pointers() const {
    return convolution_pointers({x.data(), w.data(), y.data(), workspace.data()});
  }
};

template <typename T>
void check_convolution(ConvolutionBench& bench, ConvolutionShape shape, ConvolutionPass pass) {
  shape.precision = precision_of<T>();
  ConvolutionTensors<T> t(shape);
  cuda::EnginePlan& plan = bench.engines->plan(convolution_graph(shape, pass));
  REQUIRE(plan.workspace_bytes() <= 4096);
  plan.run(t.pointers(), bench.stream);
  bench.stream.synchronize();
  const std::vector<double> expected = direct(shape, pass, t.hx, t.hw, t.hy);
  const std::vector<T> result = (pass == ConvolutionPass::forward         ? t.y
                                 : pass == ConvolutionPass::data_gradient ? t.x
                                                                          : t.w)
                                    .values();
  REQUIRE(result.size() == expected.size());
  for (size_t i = 0; i < result.size(); ++i) {
    const double wanted = expected[i];
    CHECK(std::abs(cuda::to_float(result[i]) - wanted) <= rounding<T>() * (std::abs(wanted) + 1));
  }
}

}  // namespace

TEST_CASE_TEMPLATE("convolution passes agree with the definition", T, float, __half,
                   __nv_bfloat16) {
  ConvolutionBench bench({}, {.deterministic = true});
  for (const ConvolutionPass pass : {ConvolutionPass::forward, ConvolutionPass::data_gradient,
                                     ConvolutionPass::weight_gradient}) {
    CAPTURE(static_cast<int>(pass));
    check_convolution<T>(bench, kShape, pass);
    // ResNet's other kinds: stem (C padded to 4), stride 1, and the 1x1 shortcut of stride 2.
    check_convolution<T>(bench, {2, 4, 8, 10, 5, 7, 2, 3}, pass);
    check_convolution<T>(bench, {1, 8, 8, 5, 5, 3, 1, 1}, pass);
    check_convolution<T>(bench, {3, 8, 16, 6, 3, 1, 2, 0}, pass);
  }
}

TEST_CASE("a forward pass with the sums of its output, where cuDNN has one") {
  ConvolutionBench bench;
  for (ConvolutionShape shape : {kShape, ConvolutionShape{3, 8, 24, 6, 3, 1, 2, 0}}) {
    CHECK(bench.engines->find_plan(convolution_graph(shape, ConvolutionPass::forward_with_sums)) ==
          nullptr);
    shape.precision = Precision::bf16;
    CHECK(contains(error_of([&] {
                     bench.engines->plan(
                         convolution_graph(shape, ConvolutionPass::forward_with_sums));
                   }),
                   "no engine for the forward with sums of a convolution ["));
    shape.precision = Precision::fp16;
    cuda::EnginePlan& plan =
        bench.engines->plan(convolution_graph(shape, ConvolutionPass::forward_with_sums));
    CHECK(plan.id() == "eng5");
    ConvolutionTensors<__half> t(shape);
    const auto channels = static_cast<size_t>(shape.out_channels);
    const DeviceArray<float> sums(2 * channels), others(2 * channels);
    for (const DeviceArray<float>* to : {&sums, &others}) {
      plan.run(convolution_pointers({t.x.data(), t.w.data(), t.y.data(), t.workspace.data(),
                                     to->data(), to->data() + channels}),
               bench.stream);
      bench.stream.synchronize();
      const std::vector<double> y = direct(shape, ConvolutionPass::forward, t.hx, t.hw, t.hy);
      std::vector<double> wanted(2 * channels);
      for (size_t i = 0; i < y.size(); ++i) {
        wanted[i % channels] += y[i];
        wanted[channels + i % channels] += y[i] * y[i];
      }
      const std::vector<float> found = to->values();
      for (size_t c = 0; c < wanted.size(); ++c)
        CHECK(found[c] == doctest::Approx(wanted[c]).epsilon(1e-6));
      const std::vector<__half> map = t.y.values();
      for (size_t i = 0; i < y.size(); ++i)
        CHECK(std::abs(cuda::to_float(map[i]) - y[i]) <= rounding<__half>() * (std::abs(y[i]) + 1));
    }
  }
}

TEST_CASE("deterministic: the first engine that repeats, never timed or taken from the cache") {
  ConvolutionBench bench({}, {.deterministic = true});
  ConvolutionTensors<float> t(kShape);
  cuda::EnginePlan& plan = bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward));
  CHECK(plan.id() == "eng7_k12=3");
  CHECK(plan.workspace_bytes() == 4096);
  CHECK(bench.fakes.plans_built == 1);
  plan.choose(t.pointers(), bench.stream);
  CHECK(bench.fakes.executions == 0);
  CHECK(&bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward)) == &plan);
  CHECK(std::filesystem::is_empty(bench.folder.path()));
  CHECK(contains(bench.engines->describe(), "cuDNN 9.24.0; the forward of a convolution"));
  CHECK(contains(bench.engines->describe(), ": eng7_k12=3"));
  bench.choice.workspace_limit = 1000;  // eng7 wants more; the fallback does without
  bench.restart();
  CHECK(bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward)).id() == "eng0");
}

TEST_CASE("layers of one shape share a plan, each with its own memory") {
  ConvolutionBench bench({}, {.deterministic = true});
  ConvolutionTensors<float> first(kShape), second(kShape);
  cuda::EnginePlan& plan = bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward));
  cuda::check(cudaMemset(second.x.data(), 0, second.hx.size() * sizeof(float)), "a fill");
  cuda::check(cudaMemset(second.w.data(), 0, second.hw.size() * sizeof(float)), "a fill");
  for (const bool other : {false, true, false}) {  // each pointer on its own, then both ways
    for (int changed = 0; changed < 4; ++changed) {
      ConvolutionTensors<float>* t[4] = {&first, &first, &first, &first};
      if (other) t[changed] = &second;
      for (const ConvolutionTensors<float>* tensors : {&first, &second}) {
        cuda::check(cudaMemset(tensors->y.data(), 0, tensors->hy.size() * sizeof(float)), "a fill");
        cuda::check(cudaMemset(tensors->workspace.data(), 0, 4096), "a fill");
      }
      plan.run(convolution_pointers(
                   {t[0]->x.data(), t[1]->w.data(), t[2]->y.data(), t[3]->workspace.data()}),
               bench.stream);
      bench.stream.synchronize();
      const bool zero = t[0] == &second || t[1] == &second;
      CHECK((first.y.values()[0] != 0) == (!zero && t[2] == &first));
      CHECK((second.y.values()[0] != 0) == (!zero && t[2] == &second));
      CHECK((first.workspace.values()[0] != 0) == (t[3] == &first));
      CHECK((second.workspace.values()[0] != 0) == (t[3] == &second));
    }
  }
}

TEST_CASE("else the fastest that fits, and the next process takes it from the cache") {
  ConvolutionBench bench;
  ConvolutionTensors<float> t(kShape);
  const auto plan = [&]() -> cuda::EnginePlan& {
    return bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward));
  };
  const auto choose = [&] { plan().choose(t.pointers(), bench.stream); };
  CHECK(plan().workspace_bytes() == 4096);  // eng9's GiB is over the limit
  choose();
  CHECK(bench.fakes.executions > 0);
  CHECK(plan().id() == "eng2");  // 5 us against eng7's 10
  CHECK(plan().workspace_bytes() == 0);

  bench.restart();
  bench.fakes.executions = bench.fakes.plans_built = 0;
  choose();
  CHECK(plan().id() == "eng2");
  CHECK(bench.fakes.plans_built == 1);
  CHECK(bench.fakes.executions == 0);

  // Another driver, GPU or cuDNN is another key.
  bench.choice.device = "Emulated GPU, driver 13010";
  bench.restart();
  choose();
  CHECK(bench.fakes.executions > 0);

  // What the file says is believed only where it fits.
  for (const char* content : {"garbage", "", "wrong key\neng2\n"}) {
    for (const auto& file : std::filesystem::recursive_directory_iterator(bench.folder.path()))
      if (file.is_regular_file()) std::ofstream(file.path()) << content;
    bench.restart();
    bench.fakes.executions = 0;
    choose();
    CHECK(plan().id() == "eng2");
    CHECK(bench.fakes.executions > 0);
  }
  for (const auto& file : std::filesystem::recursive_directory_iterator(bench.folder.path())) {
    if (!file.is_regular_file()) continue;
    std::string key, id;
    std::ifstream in(file.path());
    std::getline(in, key);
    std::ofstream(file.path()) << key << "\neng77\n";  // an engine that is not offered any more
  }
  bench.restart();
  choose();
  CHECK(plan().id() == "eng2");

  // Without a place to write, the choice is made anew each time.
  const Environment nowhere("XDG_CACHE_HOME", "/dev/null");
  bench.restart();
  bench.fakes.executions = 0;
  choose();
  CHECK(plan().id() == "eng2");
  CHECK(bench.fakes.executions > 0);
}

TEST_CASE("an engine that fails when it is built or run leaves the work to another") {
  for (const simt::FakeOptions& options :
       {simt::FakeOptions{.broken_engines = {2}}, simt::FakeOptions{.uncompiled_engine = 2}}) {
    ConvolutionBench bench(options);
    ConvolutionTensors<float> t(kShape);
    cuda::EnginePlan& plan =
        bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward));
    plan.choose(t.pointers(), bench.stream);
    CHECK(plan.id() == "eng7_k12=3");
    plan.run(t.pointers(), bench.stream);
    bench.stream.synchronize();
    const std::vector<double> wanted = direct(kShape, ConvolutionPass::forward, t.hx, t.hw, t.hy);
    const std::vector<float> y = t.y.values();
    for (size_t i = 0; i < y.size(); ++i) CHECK(y[i] == doctest::Approx(wanted[i]).epsilon(1e-5));
  }
}

TEST_CASE("an engine that loses the device leaves nothing to another") {
  ConvolutionBench bench({.fatal_engine = 2});
  ConvolutionTensors<float> t(kShape);
  cuda::EnginePlan& plan = bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward));
  CHECK(contains(error_of([&] { plan.choose(t.pointers(), bench.stream); }), codes::kDeviceLost));
}

TEST_CASE(
    "a graph that cuDNN calls wrong is one that it does not have, where there is another way") {
  ConvolutionBench bench({.knows_norms = false});
  const cuda::NormShape shape{2, 8, 4};
  CHECK(bench.engines->find_plan(cuda::norm_forward_graph(shape, false, true)) == nullptr);
  CHECK(
      contains(error_of([&] { bench.engines->plan(cuda::norm_forward_graph(shape, false, true)); }),
               "an operation that is not known"));
}

TEST_CASE("handles are destroyed between the captures of other threads") {
  ConvolutionBench bench;
  std::optional<cuda::Engines> engines(std::in_place, bench.fakes.libraries().cudnn,
                                       cuda::EngineChoice{});
  std::thread other;
  std::atomic<bool> started{false};
  const cuda::CapturedGraph graph(bench.stream, [&] {
    other = std::thread([&] {
      started = true;
      engines.reset();
    });
    // Long enough for it to be destroyed here, if it could.
    while (!started) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  });
  other.join();
  graph.launch(bench.stream);
  bench.stream.synchronize();
}

TEST_CASE("without TF32, fp32 is left to engines that do not round it") {
  const Environment override("NVIDIA_TF32_OVERRIDE", "0");
  ConvolutionBench bench;
  CHECK(bench.engines->plan(convolution_graph(kShape, ConvolutionPass::forward)).id() == "eng0");
  ConvolutionShape half = kShape;
  half.precision = Precision::fp16;
  CHECK(bench.engines->plan(convolution_graph(half, ConvolutionPass::forward)).id() == "eng2");
}

TEST_CASE("a convolution without an engine names its shape and what was asked") {
  ConvolutionBench bench({.only_nondeterministic = true}, {.deterministic = true});
  const std::string error = error_of(
      [&] { bench.engines->plan(convolution_graph(kShape, ConvolutionPass::weight_gradient)); });
  CHECK(contains(error, codes::kBackend));
  CHECK(contains(error,
                 "no deterministic engine for the weight gradient of a convolution [2, 7, 7, "
                 "8] -> [2, 4, 4, 16], kernel 3, stride 2, padding 1, fp32"));
  ConvolutionShape wrong = kShape;
  wrong.out_size = 5;
  const std::string refused =
      error_of([&] { bench.engines->plan(convolution_graph(wrong, ConvolutionPass::forward)); });
  CHECK(contains(refused, "CUDNN_STATUS_BAD_PARAM (a result of 5 pixels)"));
}

TEST_CASE("convolutions and products are captured and replayed") {
  ConvolutionBench bench;
  ConvolutionTensors<float> t(kShape);
  cuda::Products products(bench.fakes.libraries().cublas_lt, bench.stream.get(), t.workspace.data(),
                          4096);
  const DeviceArray<float> product(8 * 16);
  const cuda::ProductShape shape{.m = 8, .n = 16, .k = 4};
  cuda::EnginePlan& plan =
      bench.engines->plan(convolution_graph(kShape, ConvolutionPass::data_gradient));
  plan.choose(t.pointers(), bench.stream);
  const auto enqueue = [&] {
    plan.run(t.pointers(), bench.stream);
    products.multiply(shape, 1, t.y.data(), t.w.data(), 0, product.data());
  };
  enqueue();
  bench.stream.synchronize();
  const int64_t descriptors = bench.fakes.allocations, executions = bench.fakes.executions;
  const cuda::CapturedGraph graph(bench.stream, enqueue);
  CHECK(bench.fakes.allocations == descriptors);  // the same pointers need nothing new
  CHECK(bench.fakes.executions == executions + 1);
  for (const float scale : {1.0F, -2.0F}) {
    for (float& y : t.hy) y *= scale;
    cuda::check(
        cudaMemcpy(t.y.data(), t.hy.data(), t.hy.size() * sizeof(float), cudaMemcpyHostToDevice),
        "a copy in");
    graph.launch(bench.stream);
    bench.stream.synchronize();
    const std::vector<double> wanted =
        direct(kShape, ConvolutionPass::data_gradient, t.hx, t.hw, t.hy);
    const std::vector<float> x = t.x.values();
    for (size_t i = 0; i < x.size(); ++i) CHECK(x[i] == doctest::Approx(wanted[i]).epsilon(1e-5));
  }
  CHECK(bench.fakes.executions == executions + 1);
}

TEST_CASE("plans are found for a GPU that is not here") {
  simt::FakeLibraries fakes;  // and no device
  const cuda::Cudnn cudnn = fakes.libraries().cudnn;
  {
    cuda::Engines engines(cudnn, R"({"deviceVer": 900})");
    for (const ConvolutionPass pass : {ConvolutionPass::forward, ConvolutionPass::data_gradient,
                                       ConvolutionPass::weight_gradient}) {
      const cuda::EnginePlan& plan = engines.plan(convolution_graph(kShape, pass));
      CHECK(plan.id() == "eng7_k12=3");  // the first that repeats
      CHECK(plan.workspace_bytes() == 4096);
    }
    fakes.options.only_nondeterministic = true;
    ConvolutionShape other = kShape;
    other.precision = Precision::fp16;
    CHECK(contains(
        error_of([&] { engines.plan(convolution_graph(other, ConvolutionPass::forward)); }),
        "no deterministic engine for the forward of a convolution"));
    CHECK(contains(engines.describe(), "eng7_k12=3"));  // of those that were found
  }
  cuda::Engines engines(cudnn, "H100");
  CHECK(
      contains(error_of([&] { engines.plan(convolution_graph(kShape, ConvolutionPass::forward)); }),
               "properties that are no JSON"));
  CHECK(fakes.objects == 0);
}

TEST_CASE("handles and descriptors are given back") {
  simt::FakeLibraries fakes;
  {
    simt::Device device;
    const cuda::Stream stream;
    const TemporaryFolder folder;
    const Environment cache("XDG_CACHE_HOME", folder.path().string());
    cuda::Engines engines(fakes.libraries().cudnn, cuda::EngineChoice{});
    ConvolutionTensors<float> t(kShape);
    cuda::EnginePlan& plan = engines.plan(convolution_graph(kShape, ConvolutionPass::forward));
    plan.choose(t.pointers(), stream);
    plan.run(t.pointers(), stream);
    cuda::Products products(fakes.libraries().cublas_lt, stream.get(), t.workspace.data(), 4096);
    products.multiply({.m = 4, .n = 4, .k = 4}, 1, t.x.data(), t.w.data(), 0, t.y.data());
    stream.synchronize();
    CHECK(fakes.objects > 0);
  }
  CHECK(fakes.objects == 0);
}
