// CUDA's statuses as errors. A header of its own, so that kernels need no more of the runtime.
#pragma once

#include <cuda_runtime.h>

#include <string_view>

namespace hardmine::cuda {

// Throws unless `status` is success; `what` names the call and the shape ("the copy of 64 images").
// codes::kDeviceLost marks errors after which CUDA refuses everything in this process.
void check(cudaError_t status, std::string_view what);
// Throws codes::kDeviceLost where the device is: libraries call that by names of their own.
void check_not_lost(std::string_view what);

}  // namespace hardmine::cuda
