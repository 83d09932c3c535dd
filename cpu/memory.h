// The machine's memory as this process may use it, and blocks of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace hardmine {

struct MachineMemory {
  int64_t total_bytes = 0;
  int64_t available_bytes = 0;  // without making the machine swap or the control group kill
};
MachineMemory machine_memory();

// Bytes of a cache line, and of a register of AVX-512.
inline constexpr size_t kMemoryAlignment = 64;

// Zeroed memory on a boundary of kMemoryAlignment; to be given to std::free. Throws ERR_DEVICE_OOM
// for more than is available: Linux would grant it and kill the process when it is written to.
// `owner` begins that sentence, as "The margin head".
void* take_memory(size_t bytes, const char* owner);

}  // namespace hardmine
