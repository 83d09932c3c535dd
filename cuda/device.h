// What the backend asks about the thread's current device.
#pragma once

#include <string>

namespace hardmine::cuda {

// 9 on Hopper.
int compute_major();

// "NVIDIA H100 80GB HBM3, driver 13000": what timings are valid for.
std::string device_and_driver();

}  // namespace hardmine::cuda
