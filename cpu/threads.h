// How many threads the CPU backend uses.
#pragma once

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <utility>

namespace hardmine {

// Physical cores among the CPUs that this process may run on (its affinity mask), at least 1. Two
// hardware threads of one core share its vector units, so a second thread there only adds traffic.
inline int physical_cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  std::set<std::pair<int, int>> cores;  // package and core
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string topology = "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
    int package = 0, core = cpu;  // where the kernel does not say, each CPU counts as a core
    std::ifstream(topology + "physical_package_id") >> package;
    std::ifstream core_file(topology + "core_id");
    if (!(core_file >> core)) core = cpu;
    cores.emplace(package, core);
  }
  return std::max(1, static_cast<int>(cores.size()));
}

}  // namespace hardmine
