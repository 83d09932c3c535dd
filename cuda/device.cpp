#include "cuda/device.h"

#include "cuda/runtime.h"

namespace hardmine::cuda {
namespace {

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

}  // namespace

int compute_major() {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current_device()),
        "cudaDeviceGetAttribute");
  return major;
}

std::string device_and_driver() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, current_device()), "cudaGetDeviceProperties");
  return std::string(properties.name) + ", driver " + std::to_string(driver);
}

}  // namespace hardmine::cuda
