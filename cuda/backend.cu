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
  const cuda::DeviceScope scope(ordinal);
  cudaDeviceProp properties{};
  cuda::check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  size_t free = 0, total = 0;
  cuda::check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  int driver = 0, runtime = 0;
  cuda::check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  cuda::check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  DeviceInfo device;
  device.name = properties.name;
  device.memory_bytes = static_cast<int64_t>(total);
  device.free_bytes = static_cast<int64_t>(free);
  device.details = {{"compute capability",
                     std::to_string(properties.major) + "." + std::to_string(properties.minor)},
                    {"multiprocessors", std::to_string(properties.multiProcessorCount)},
                    {"driver's CUDA", cuda_version(driver)},
                    {"CUDA runtime", cuda_version(runtime)}};
  for (auto& [library, version] : cuda::describe_libraries())
    device.details.emplace_back(library, version);
  // Without the libraries nothing can be computed, in whatever type.
  try {
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

  std::vector<DeviceInfo> devices() override {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) return {};
    cuda::check(status, "cudaGetDeviceCount");
    std::vector<DeviceInfo> devices;
    for (int ordinal = 0; ordinal < count; ++ordinal) devices.push_back(describe(ordinal));
    return devices;
  }

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
