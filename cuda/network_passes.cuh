// The passes of a network, enqueued on its lanes.
#pragma once

#include "cuda/convolution.h"
#include "cuda/kernels/input.cuh"
#include "cuda/kernels/linear.cuh"
#include "cuda/network_of.h"
#include "cuda/norm_graph.h"

namespace hardmine::cuda {

template <typename T>
const float* NetworkOf<T>::forward(const uint8_t* images, const Augmentation* augmentations) {
  begin_update();
  load_images(images, augmentations, {}, batch_, static_cast<int>(nodes_.front().in_size), image_,
              stream_.get());
  run_forward();
  return static_cast<const float*>(outputs_.back().values);
}

template <typename T>
void NetworkOf<T>::backward(const float* grad_embeddings) {
  convert(grad_embeddings, &loss_scale_->scale, outputs_.back().count(),
          static_cast<float*>(outputs_.back().gradients[0].values), stream_.get());
  run_backward();
}

template <typename T>
void NetworkOf<T>::run_passes() {
  begin_update();
  run_forward();
  run_backward();
}

template <typename T>
void NetworkOf<T>::run_forward() {
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    const Work& work = work_[i];
    void* y = outputs_[i].values;
    if (work.part) end_update(*work.part);
    if (work.merges) join(Lane::shortcut);
    switch (node.op) {
      case Op::convolution:
        run_convolution(i);
        break;
      case Op::batch_norm:
        run_batch_norm(i);
        break;
      case Op::max_pool:
        run_max_pool(i);
        break;
      case Op::global_average_pool:
        average_pool(batch_, node.in_size * node.in_size, node.out_channels,
                     static_cast<const T*>(input_of(i)), static_cast<float*>(y),
                     static_cast<T*>(work.operand), stream_.get());
        break;
      case Op::linear: {
        const auto* x = work_[static_cast<size_t>(node.input)].operand;
        products_->multiply({.m = batch_,
                             .n = node.out_channels,
                             .k = node.in_channels,
                             .transpose_b = true,
                             .operands = number_type<T>()},
                            1, x, parameters_[static_cast<size_t>(work.weight)].operand(), 0, y);
        apply_affine({nullptr, nullptr, values_of(work.bias)}, batch_, node.out_channels,
                     static_cast<const float*>(y), static_cast<const float*>(nullptr),
                     static_cast<float*>(y), false, stream_.get());
        break;
      }
    }
    if (work.splits) fork(Lane::main, Lane::shortcut);
  }
}

template <typename T>
void NetworkOf<T>::run_backward() {
  for (size_t i = nodes_.size(); i-- > 0;) {
    const Node& node = nodes_[i];
    const Work& work = work_[i];
    if (work.splits) join(Lane::shortcut);
    switch (node.op) {
      case Op::convolution:
        fork(work.lane, Lane::weights);
        run_weight_gradient(i);
        if (work.data != nullptr) run_data_gradient(i);
        break;
      case Op::batch_norm:
        run_batch_norm_backward(i);
        break;
      case Op::max_pool:
        max_pool_backward(pool_shape(node), static_cast<const T*>(work.dy[0].values),
                          static_cast<const T*>(work.dy[1].values), work.where,
                          static_cast<T*>(work.dx.values), stream_.get());
        break;
      case Op::global_average_pool:
        average_pool_backward(batch_, node.in_size * node.in_size, node.out_channels,
                              static_cast<const float*>(work.dy[0].values),
                              static_cast<T*>(work.dx.values), stream_.get());
        break;
      case Op::linear:
        run_linear_backward(i);
        break;
    }
    if (work.part) check_part(*work.part);
    if (work.merges) fork(Lane::main, Lane::shortcut);
  }
  join(Lane::weights);
}

// The update that is pending goes from part to part on the lane of weights, ahead of the forward
// pass.
template <typename T>
void NetworkOf<T>::begin_update() {
  fork(Lane::main, Lane::weights);
  update_part(0);
}

// Both lanes go on when `part` is updated, while the next one is.
template <typename T>
void NetworkOf<T>::end_update(size_t part) {
  join(Lane::weights);
  fork(Lane::weights, Lane::shortcut);
  if (part + 1 < parts_.size()) update_part(part + 1);
}

template <typename T>
void NetworkOf<T>::update_part(size_t part) const {
  sgd(table_, ranges_ + parts_[part].first, parts_[part].count, pending_,
      stream_of(Lane::weights).get());
}

// Once the backward pass has been given all that makes the gradients of `part`.
template <typename T>
void NetworkOf<T>::check_part(size_t part) const {
  fork(Lane::main, Lane::weights);
  fork(Lane::shortcut, Lane::weights);
  check_gradients(table_, ranges_ + parts_[part].first, parts_[part].count, loss_scale_,
                  stream_of(Lane::weights).get());
}

template <typename T>
void NetworkOf<T>::run_convolution(size_t i) {
  const Work& work = work_[i];
  const Stream& stream = stream_of(work.lane);
  if (applies_norm(i)) {
    work.norm_forward->run(reader_forward_pointers(i), stream);
  } else {
    (work.with_sums ? work.forward_with_sums : work.forward)
        ->run(forward_pointers(i, work.with_sums), stream);
  }
}

template <typename T>
void NetworkOf<T>::run_weight_gradient(size_t i) {
  const Work& work = work_[i];
  const Stream& stream = stream_of(Lane::weights);
  if (applies_norm(i)) {
    work.norm_weights->run(reader_weight_pointers(i), stream);
  } else {
    work.weights->run(weight_pointers(i), stream);
  }
}

template <typename T>
void NetworkOf<T>::run_data_gradient(size_t i) {
  const Work& work = work_[i];
  const Stream& stream = stream_of(work.lane);
  if (work_[static_cast<size_t>(nodes_[i].input)].summed) {
    work.norm_data->run(reader_data_pointers(i), stream);
  } else {
    work.data->run(data_pointers(i), stream);
  }
}

template <typename T>
void NetworkOf<T>::run_linear_backward(size_t i) {
  const Node& node = nodes_[i];
  const Work& work = work_[i];
  const Parameter& weight = parameters_[static_cast<size_t>(work.weight)];
  const auto* dy = static_cast<const float*>(work.dy[0].values);
  convert(dy, nullptr, outputs_[i].count(), static_cast<T*>(work.operand), stream_.get());
  column_sums(dy, batch_, node.out_channels, gradient_of(work.bias), stream_.get());
  products_->multiply({.m = node.out_channels,
                       .n = node.in_channels,
                       .k = batch_,
                       .transpose_a = true,
                       .operands = number_type<T>()},
                      1, work.operand, work_[static_cast<size_t>(node.input)].operand, 0,
                      weight.gradient);
  products_->multiply(
      {.m = batch_, .n = node.in_channels, .k = node.out_channels, .operands = number_type<T>()}, 1,
      work.operand, weight.operand(), 0, work.dx.values);
}

template <typename T>
void NetworkOf<T>::run_max_pool(size_t i) {
  const Work& work = work_[i];
  const PoolShape shape = pool_shape(nodes_[i]);
  auto* y = static_cast<T*>(outputs_[i].values);
  const auto from = static_cast<size_t>(nodes_[i].input);
  if (work_[from].pooled) {
    batch_norm_max_pool(work_[from].norm, shape, static_cast<const T*>(input_of(from)), y,
                        work.where, stream_.get());
  } else {
    max_pool(shape, static_cast<const T*>(input_of(i)), y, work.where, stream_.get());
  }
}

template <typename T>
PoolShape NetworkOf<T>::pool_shape(const Node& node) const {
  return {.images = batch_,
          .channels = static_cast<int>(node.out_channels),
          .in_size = static_cast<int>(node.in_size),
          .out_size = static_cast<int>(node.out_size)};
}

template <typename T>
void NetworkOf<T>::run_batch_norm(size_t i) {
  if (outputs_[i].vector) {
    run_batch_norm_of<float>(i);
  } else {
    run_batch_norm_of<T>(i);
  }
}

template <typename T>
void NetworkOf<T>::run_batch_norm_backward(size_t i) {
  if (outputs_[i].vector) {
    run_batch_norm_backward_of<float>(i);
  } else {
    run_batch_norm_backward_of<T>(i);
  }
}

template <typename T>
template <typename N>
void NetworkOf<T>::run_batch_norm_of(size_t i) {
  const Node& node = nodes_[i];
  const Work& work = work_[i];
  const auto* x = static_cast<const N*>(input_of(i));
  const auto* residual = static_cast<const N*>(
      node.residual < 0 ? nullptr : outputs_[static_cast<size_t>(node.residual)].values);
  auto* y = static_cast<N*>(outputs_[i].values);
  const bool relu = node.activation == Activation::relu;
  const BatchNormScratch& scratch = memory_of(work.lane).scratch;
  const cudaStream_t stream = stream_of(work.lane).get();
  const Work& before = work_[static_cast<size_t>(node.input)];
  if (work.applied) {
    auto* scale = static_cast<N*>(work.scale_bias);
    batch_norm_to_apply(work.norm, before.sums, scale, scale + work.norm.channels, stream);
  } else if (before.with_sums) {
    batch_norm_forward_from_sums(work.norm, before.sums, x, residual, y, relu, stream);
  } else if (work.kept_forward && blocks_wait_) {
    batch_norm_forward_whole(work.norm, *work.kept_forward, x, residual, y, relu, scratch, stream);
  } else if (work.library_forward != nullptr && blocks_wait_) {
    work.library_forward->run(library_forward_pointers(i), stream_);
    finish_batch_norm(work.norm, stream);
  } else {
    batch_statistics(work.norm, x, scratch, stream);
    if (!work.pooled) batch_norm_forward(work.norm, x, residual, y, relu, stream);
  }
}

template <typename T>
template <typename N>
void NetworkOf<T>::run_batch_norm_backward_of(size_t i) {
  const Node& node = nodes_[i];
  const Work& work = work_[i];
  const auto* x = static_cast<const N*>(input_of(i));
  // Without a residual the ReLU's mask is found again from x.
  const auto* y = static_cast<const N*>(node.residual < 0 ? nullptr : outputs_[i].values);
  auto* dy = static_cast<N*>(work.dy[0].values);
  const auto* dy_other = static_cast<const N*>(work.dy[1].values);
  auto* dx = static_cast<N*>(work.dx.values);
  const bool relu = node.activation == Activation::relu;
  const BatchNormScratch& scratch = memory_of(work.lane).scratch;
  const cudaStream_t stream = stream_of(work.lane).get();
  if (work.summed) {
    batch_norm_backward_from_gradient(work.norm, work.norm_gradient, x, dy, dx, stream);
  } else if (work.kept_backward && blocks_wait_) {
    batch_norm_backward_whole(work.norm, work.norm_gradient, *work.kept_backward, x, y, relu, dy,
                              dy_other, dx, scratch, stream);
  } else if (work.library_backward != nullptr && blocks_wait_) {
    work.library_backward->run(library_backward_pointers(i), stream_);
  } else {
    batch_norm_backward(work.norm, work.norm_gradient, x, y, relu, dy, dy_other, dx, scratch,
                        stream);
  }
}

template <typename T>
EnginePointers NetworkOf<T>::forward_pointers(size_t i, bool with_sums) {
  const Work& work = work_[i];
  return convolution_pointers({input_of(i), weight_of(i).operand(), outputs_[i].values,
                               memory_of(work.lane).workspace, with_sums ? work.sums : nullptr,
                               with_sums ? work.sums + outputs_[i].channels : nullptr});
}

template <typename T>
EnginePointers NetworkOf<T>::weight_pointers(size_t i) {
  return convolution_pointers({input_of(i), weight_of(i).gradient, work_[i].dy[0].values,
                               memory_of(Lane::weights).workspace});
}

template <typename T>
EnginePointers NetworkOf<T>::data_pointers(size_t i) {
  const Work& work = work_[i];
  return convolution_pointers(
      {work.dx.values, weight_of(i).operand(), work.dy[0].values, memory_of(work.lane).workspace});
}

template <typename T>
EnginePointers NetworkOf<T>::applied_norm(const EnginePointers& pointers, size_t i) {
  const auto norm = static_cast<size_t>(nodes_[i].input);
  T* scale = static_cast<T*>(work_[norm].scale_bias);
  return with_applied_norm(pointers, {input_of(norm), scale, scale + outputs_[norm].channels});
}

template <typename T>
EnginePointers NetworkOf<T>::reader_data_pointers(size_t i) {
  const auto at = static_cast<size_t>(nodes_[i].input);
  const Work& work = work_[at];
  return with_norm_gradient(data_pointers(i),
                            {input_of(at), work.norm.mean, work.norm.inverse_deviation,
                             values_of(work.weight), values_of(work.bias), work.norm_gradient.gamma,
                             work.norm_gradient.beta, work.coefficients, outputs_[at].channels});
}

template <typename T>
EnginePointers NetworkOf<T>::library_forward_pointers(size_t i) {
  const Node& node = nodes_[i];
  const Work& work = work_[i];
  return norm_forward_pointers(
      {input_of(i),
       node.residual < 0 ? nullptr : outputs_[static_cast<size_t>(node.residual)].values,
       outputs_[i].values, values_of(work.weight), values_of(work.bias), work.norm.mean,
       work.norm.inverse_deviation, memory_of(Lane::main).workspace});
}

template <typename T>
EnginePointers NetworkOf<T>::library_backward_pointers(size_t i) {
  const Work& work = work_[i];
  return norm_backward_pointers({input_of(i), work.dy[0].values, work.dx.values,
                                 values_of(work.weight), values_of(work.bias), work.norm.mean,
                                 work.norm.inverse_deviation, work.norm_gradient.gamma,
                                 work.norm_gradient.beta, memory_of(Lane::main).workspace});
}

}  // namespace hardmine::cuda
