// Fakes of cuDNN 9 and cuBLASLt behind the declarations of cuda/libraries.h, for the emulated
// device: plain double loops in the order of the stream, capturable like the real ones.
//
// They are pedantic where the real ones crash or guess. The fake cuDNN refuses an attribute of
// another descriptor, type or count, one that is missing or set after finalising, an unfinalised
// descriptor, a strided layout that is not NHWC, shapes that do not fit each other, and misaligned
// pointers or such outside CUDA's memory. It offers
//   mode A:    eng2, first and nondeterministic (its last bit is noise), no workspace;
//              eng7_k12=3, deterministic, 4 KiB of workspace, slower;
//              eng9, fastest, 1 GiB of workspace;
//              eng11, whose plan is never supported;
//   fallback:  eng0, slowest, deterministic, no workspace.
// Graphs of several operations are in mode A. A forward pass with sums has eng5 and eng12, the
// passes that do work of the batch-norm before the convolution eng31 (forward), eng32 (weights'
// gradient) and eng33 (data gradient), all of fp16 alone, as on Hopper, and without a workspace. A
// batch-norm forward, with or without what follows it, and one backward with a ReLU before it have
// eng20, eng21, the faster, and eng22, the fastest, with 4 KiB of workspace; 16-bit maps of
// channels that are no multiple of 8 have none. It makes no handle without a device, but plans for
// one whose properties it is given. The fake cuBLASLt picks an algorithm with noise in its last bit
// when in-place split sums are allowed, and refuses operands less aligned than its preference
// promised.
#pragma once

#include <cstdint>
#include <set>
#include <string>

#include "cuda/libraries.h"

namespace simt {

struct FakeOptions {
  size_t cudnn_version = 92400;
  size_t cublas_lt_version = 130100;
  bool only_nondeterministic = false;
  std::set<int64_t> broken_engines{};  // whose plans fail when they are run
  std::set<int64_t> lying_engines{};   // whose first result is twice what it should be
  int64_t uncompiled_engine = -1;      // whose plans fail when they are built
  int64_t fatal_engine = -1;           // whose plans lose the device when they are run
  bool knows_norms = true;             // or else calls their operations bad parameters
  double sums_microseconds = 4;        // of eng5: less than eng2's 5, and a kernel follows either
  double norm_microseconds = 40;       // of eng21; our own kernels take 1 each
  double norm_reader_microseconds = 100;  // of eng31, eng32 and eng33
  std::string without{};                  // a function that the libraries lack
};

// Owned by a test, one at a time.
class FakeLibraries {
 public:
  explicit FakeLibraries(FakeOptions options = {});
  ~FakeLibraries();
  FakeLibraries(const FakeLibraries&) = delete;
  FakeLibraries& operator=(const FakeLibraries&) = delete;

  static FakeLibraries* current;
  static void* symbol(const char* name);  // a hardmine::cuda::SymbolSource
  hardmine::cuda::Libraries libraries() const;

  FakeOptions options;
  std::string last_error;  // of cuDNN
  int64_t objects = 0;     // handles and descriptors alive
  int64_t plans_built = 0;
  int64_t executions = 0;   // of cuDNN plans
  int64_t heuristics = 0;   // cuBLASLt queries
  int64_t allocations = 0;  // descriptors ever made
  int64_t norm_graphs = 0;  // heuristics asked for a batch-norm
};

}  // namespace simt
