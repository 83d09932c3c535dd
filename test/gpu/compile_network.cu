// Every kernel of the network between the convolutions, instantiated for the three operand types,
// so that nvcc sees them all.
#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/input.cuh"
#include "cuda/kernels/linear.cuh"
#include "cuda/kernels/pooling.cuh"
#include "cuda/kernels/sgd.cuh"

namespace {

template <typename T>
void instantiate() {
  using namespace hardmine::cuda;
  load_images<T>(nullptr, nullptr, {}, 1, 112, nullptr, nullptr);
  const BatchNorm norm{.rows = 2, .channels = 64};
  batch_statistics<T>(norm, nullptr, {}, nullptr);
  batch_norm_forward<T>(norm, nullptr, nullptr, nullptr, true, nullptr);
  batch_norm_forward_from_sums<T>(norm, nullptr, nullptr, nullptr, nullptr, true, nullptr);
  batch_norm_to_apply<T>(norm, nullptr, nullptr, nullptr, nullptr);
  batch_norm_backward_from_gradient<T>(norm, {}, nullptr, nullptr, nullptr, nullptr);
  batch_norm_backward<T>(norm, {}, nullptr, nullptr, true, nullptr, nullptr, nullptr, {}, nullptr);
  forward_rows_to_keep<T>({}, 2, 64, {});
  backward_rows_to_keep<T>({}, 2, 64, true, true, {});
  batch_norm_forward_whole<T>(norm, 0, nullptr, nullptr, nullptr, true, {}, nullptr);
  batch_norm_backward_whole<T>(norm, {}, 0, nullptr, nullptr, true, nullptr, nullptr, nullptr, {},
                               nullptr);
  max_pool<T>({}, nullptr, nullptr, nullptr, nullptr);
  batch_norm_max_pool<T>({}, {}, nullptr, nullptr, nullptr, nullptr);
  max_pool_backward<T>({}, nullptr, nullptr, nullptr, nullptr, nullptr);
  average_pool<T>(1, 1, 1, nullptr, nullptr, nullptr, nullptr);
  average_pool_backward<T>(1, 1, 1, nullptr, nullptr, nullptr);
  convert<T>(nullptr, nullptr, 1, nullptr, nullptr);
  check_gradients<T>(nullptr, nullptr, 1, nullptr, nullptr);
  sgd<T>(nullptr, nullptr, 1, nullptr, nullptr);
}

}  // namespace

void instantiate_all() {
  instantiate<float>();
  instantiate<__half>();
  instantiate<__nv_bfloat16>();
  hardmine::cuda::finish_batch_norm({.rows = 2, .channels = 64}, nullptr);
  hardmine::cuda::column_sums(nullptr, 1, 1, nullptr, nullptr);
  for (const bool scales : {false, true})
    hardmine::cuda::conclude_step(nullptr, nullptr, nullptr, scales, nullptr);
}
