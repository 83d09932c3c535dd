#include "core/backend.h"

#include <string>

#include "cuda/embedder.h"
#include "cuda/head.h"
#include "cuda/libraries.h"
#include "cuda/runtime.h"
#include "cuda/session.h"

namespace hardmine {
namespace {

// Images at a time where no batch is given: enough to fill a GPU's multiprocessors.
constexpr int64_t kEmbedderBatch = 128;

// "12.4" of CUDA's 12040.
std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

DeviceInfo describe(int ordinal) {
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  int driver = 0, runtime = 0;
  cuda::check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  cuda::check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  DeviceInfo device;
  device.name = properties.name;
  device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  device.details = {{"compute capability",
                     std::to_string(properties.major) + "." + std::to_string(properties.minor)},
                    {"multiprocessors", std::to_string(properties.multiProcessorCount)},
                    {"driver's CUDA", cuda_version(driver)},
                    {"CUDA runtime", cuda_version(runtime)}};
  for (auto& [library, version] : cuda::describe_libraries())
    device.details.emplace_back(library, version);
  // Without the libraries, or where another process has the GPU to itself, nothing can be computed,
  // in whatever type.
  try {
    cuda::use_device(ordinal);
    size_t free = 0, total = 0;
    cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
    device.free_bytes = static_cast<int64_t>(free);
    cuda::open_libraries();
    device.precisions = {Precision::fp16, Precision::bf16, Precision::fp32};
  } catch (const Error& error) {
    device.details.emplace_back("missing", error.what());
  }
  return device;
}

class CudaBackend : public Backend {
 public:
  const char* name() const override { return "cuda"; }

  int device_count() override {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice) return 0;
    int driver = 0;
    // 0: no driver at all.
    if (status == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess) {
      if (driver == 0) return 0;
      throw Error(codes::kUnavailable,
                  "The NVIDIA driver runs CUDA " + cuda_version(driver) +
                      ", but hardmine was built with CUDA " + cuda_version(CUDART_VERSION) +
                      ": bring the driver up to date, or build hardmine with an older toolkit.");
    }
    cuda::check(status, "cudaGetDeviceCount");
    return count;
  }
  DeviceInfo device(int ordinal) override { return describe(ordinal); }

  std::unique_ptr<HostAllocator> host_allocator(const Execution& execution) override {
    return std::make_unique<cuda::PinnedAllocator>(execution.device);
  }
  std::unique_ptr<MarginHead> make_head(const HeadSpec& spec, const Execution& execution) override {
    return cuda::make_cuda_head(spec, execution, cuda::open_libraries().cublas_lt);
  }
  std::unique_ptr<TrainingSession> make_session(const SessionSpec& spec,
                                                const Execution& execution) override {
    return cuda::make_cuda_session(build_network(spec.network), spec.head, spec.batch, spec.seed,
                                   execution, cuda::open_libraries());
  }
  std::unique_ptr<Embedder> make_embedder(const NetworkSpec& spec,
                                          const Execution& execution) override {
    return cuda::make_cuda_embedder(build_network(spec), kEmbedderBatch, execution,
                                    cuda::open_libraries());
  }
};

}  // namespace

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<CudaBackend>();
}

}  // namespace hardmine
