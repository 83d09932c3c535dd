#include "cpu/memory.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>

#include "core/error.h"

namespace hardmine {
namespace {

// Below this nobody is killed for a single block, and the question costs some 20 microseconds.
constexpr size_t kSmallBytes = size_t{16} << 20;

// "MemAvailable:  123 kB" in bytes; 0 where it does not stand.
int64_t entry_of_meminfo(const std::string& key) {
  std::ifstream info("/proc/meminfo");
  for (std::string name, unit; info >> name;) {
    int64_t kilobytes = 0;
    if (!(info >> kilobytes)) break;
    std::getline(info, unit);
    if (name == key) return kilobytes * 1024;
  }
  return 0;
}

// A file that holds one number; `otherwise` for one that holds a word ("max") or is not there.
int64_t number_in(const char* path, int64_t otherwise) {
  std::ifstream file(path);
  int64_t number = 0;
  return file >> number ? number : otherwise;
}

}  // namespace

MachineMemory machine_memory() {
  MachineMemory memory{entry_of_meminfo("MemTotal:"), entry_of_meminfo("MemAvailable:")};
  // Inside a container its control group, version 2 or 1, stands at the root.
  const char* const limits[][2] = {
      {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"},
      {"/sys/fs/cgroup/memory/memory.limit_in_bytes",
       "/sys/fs/cgroup/memory/memory.usage_in_bytes"},
  };
  for (const auto& [limit_path, usage_path] : limits) {
    const int64_t limit = number_in(limit_path, memory.total_bytes);
    if (limit >= memory.total_bytes) continue;
    memory.total_bytes = limit;
    const int64_t left = std::max<int64_t>(0, limit - number_in(usage_path, 0));
    memory.available_bytes = std::min(memory.available_bytes, left);
  }
  return memory;
}

void* take_memory(size_t bytes, const char* owner) {
  const size_t size = (bytes + kMemoryAlignment - 1) / kMemoryAlignment * kMemoryAlignment;
  const auto refuse = [&](const std::string& what) {
    return Error(codes::kOutOfMemory,
                 std::string(owner) + " needs " + std::to_string(bytes) + " bytes more and " +
                     what +
                     ": use a smaller batch or fewer classes, or free memory on this machine.");
  };
  if (size >= kSmallBytes) {
    const auto available = static_cast<size_t>(machine_memory().available_bytes);
    if (size > available) throw refuse(std::to_string(available) + " are available");
  }
  void* memory = std::aligned_alloc(kMemoryAlignment, size);
  if (memory == nullptr) throw refuse("the system does not give them");
  std::memset(memory, 0, size);
  return memory;
}

}  // namespace hardmine
