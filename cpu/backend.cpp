#include <cstdlib>
#include <fstream>
#include <new>
#include <string>

#include "core/backend.h"
#include "cpu/embedder.h"
#include "cpu/head.h"
#include "cpu/memory.h"
#include "cpu/network_loops.h"
#include "cpu/onednn.h"
#include "cpu/session.h"
#include "cpu/threads.h"

namespace hardmine {
namespace {

class PlainAllocator : public HostAllocator {
 public:
  void* allocate(size_t bytes) override { return take_memory(bytes, "The decode ring"); }
  void release(void* memory) noexcept override { std::free(memory); }
};

std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

class CpuBackend : public Backend {
 public:
  const char* name() const override { return "cpu"; }

  int device_count() override { return 1; }

  DeviceInfo device(int /*ordinal*/) override {
    const onednn::Bf16Support bf16 = onednn::bf16_support();
    DeviceInfo device;
    device.name = cpu_model();
    const Memory memory = memory_of_process();
    device.memory_bytes = memory.total_bytes;
    device.free_bytes = memory.available_bytes;
    device.threads = physical_cores();
    device.precisions = {Precision::fp32};
    if (bf16.fast) device.precisions.insert(device.precisions.begin(), Precision::bf16);
    device.details = {{"isa", bf16.isa},
                      {"loops", network_loops().isa},
                      {"oneDNN", onednn::version()},
                      {"oneDNN runtime", onednn::cpu_runtime()}};
    return device;
  }

  std::unique_ptr<HostAllocator> host_allocator(const Execution&) override {
    return std::make_unique<PlainAllocator>();
  }
  std::unique_ptr<MarginHead> make_head(const HeadSpec& spec, const Execution& execution) override {
    return make_cpu_head(spec, execution);
  }
  std::unique_ptr<TrainingSession> make_session(const SessionSpec& spec,
                                                const Execution& execution) override {
    return make_cpu_session(spec, execution);
  }
  std::unique_ptr<Embedder> make_embedder(const NetworkSpec& spec,
                                          const Execution& execution) override {
    return make_cpu_embedder(spec, execution);
  }
};

}  // namespace

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<CpuBackend>();
}

}  // namespace hardmine
