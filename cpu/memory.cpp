#include "cpu/memory.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <optional>

#include "core/error.h"

namespace hardmine {
namespace {

// Of smaller blocks a network has dozens, and one more never decides.
constexpr size_t kSmallBytes = size_t{16} << 20;

// The number after a name at the beginning of a line, as /proc/meminfo and memory.stat have them.
std::optional<int64_t> entry_of(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  for (std::string word, rest; file >> word; std::getline(file, rest)) {
    int64_t number = 0;
    if (!(file >> number)) return std::nullopt;
    if (word == name) return number;
  }
  return std::nullopt;
}

// A file that holds one number; none where it is not there or holds a word ("max").
std::optional<int64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t number = 0;
  return file >> number ? std::optional(number) : std::nullopt;
}

}  // namespace

Memory within_group(const std::string& folder, Memory outside) {
  struct Names {
    const char *limit, *usage, *inactive, *active;
  };
  constexpr Names kVersions[] = {
      {"memory.max", "memory.current", "inactive_file", "active_file"},
      {"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file",
       "total_active_file"},
  };
  for (const Names& names : kVersions) {
    const auto limit = number_in(folder + "/" + names.limit);
    const auto usage = number_in(folder + "/" + names.usage);
    if (!limit || !usage || *limit >= outside.total_bytes) continue;
    const std::string stat = folder + "/memory.stat";
    const int64_t cached =
        entry_of(stat, names.inactive).value_or(0) + entry_of(stat, names.active).value_or(0);
    const int64_t left = std::clamp<int64_t>(*limit - *usage + cached, 0, *limit);
    return {*limit, std::min(outside.available_bytes, left)};
  }
  return outside;
}

Memory memory_of_process() {
  const int64_t total = int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE);
  const auto available_kib = entry_of("/proc/meminfo", "MemAvailable:");
  const Memory machine{total, available_kib ? *available_kib * 1024 : total};
  // Inside a container its own control group stands at the root.
  return within_group("/sys/fs/cgroup/memory", within_group("/sys/fs/cgroup", machine));
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
    const auto available = static_cast<size_t>(memory_of_process().available_bytes);
    if (size > available) throw refuse(std::to_string(available) + " are available");
  }
  void* memory = std::aligned_alloc(kMemoryAlignment, size);
  if (memory == nullptr) throw refuse("the system does not give them");
  std::memset(memory, 0, size);
  return memory;
}

}  // namespace hardmine
