// Every kernel of the head, instantiated for the three operand types, so that nvcc sees them all:
// test/40.cuda-kernels.spec.ts compiles this file and reads ptxas's report.
#include "cuda/head_pipeline.h"

namespace {

template <typename T>
struct NoProducts {
  void logits(const T*, const T*, int, int, int, float*) {}
  void embedding_gradient(const T*, const T*, int, int, int, float*) {}
  void weight_gradient(const T*, const T*, int, int, int, float*) {}
};

template <typename T>
void instantiate() {
  NoProducts<T> products;
  hardmine::cuda::HeadMemory<T> memory{};
  hardmine::cuda::set_class_weights(memory, {}, true, nullptr);
  hardmine::cuda::run_head(memory, {}, {}, {}, {}, products, nullptr);
}

}  // namespace

void instantiate_all() {
  instantiate<float>();
  instantiate<__half>();
  instantiate<__nv_bfloat16>();
}
