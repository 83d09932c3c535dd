// The machine's memory as this process may use it, and blocks of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace hardmine {

struct Memory {
  int64_t total_bytes = 0;
  int64_t available_bytes = 0;  // without making the machine swap or the control group kill
};

// Of the machine, or of the control group that this process is in where that has less.
Memory memory_of_process();

// What a control group (version 1 or 2) with these files leaves of `outside`, the memory of all
// around it. Cached files count as available: the kernel drops them before it kills.
Memory within_group(const std::string& folder, Memory outside);

// Bytes of a cache line, and of a register of AVX-512.
inline constexpr size_t kMemoryAlignment = 64;

// Zeroed memory on a boundary of kMemoryAlignment; to be given to std::free. Throws ERR_DEVICE_OOM
// for more than is available: Linux would grant it and kill the process when it is written to.
// `owner` begins that sentence, as "The margin head".
void* take_memory(size_t bytes, const char* owner);

}  // namespace hardmine
