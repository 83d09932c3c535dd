// The order of the unfused head's kernels and products (cuda/kernels/head_unfused.cuh says what
// each does), apart from who owns the memory.
#pragma once

#include <type_traits>

#include "cuda/head_pipeline.h"
#include "cuda/kernels/head_unfused.cuh"

namespace hardmine::cuda {

// The buffers of the chain; null where a loss has no such operation.
template <typename T>
struct UnfusedBuffers {
  float* norms;                                            // [rows] of the embeddings
  float *cosines, *margined, *logits, *log_probabilities;  // [rows, padded classes]
  float *grad_logits, *grad_margined, *grad_cosines;       // [rows, padded classes]
  T* operand;           // [rows, padded classes], null where T is float
  float* grad_scale;    // [rows], A-Softmax
  float* grad_weights;  // [padded classes, dim]
  float* grad_bias;     // [padded classes], softmax
};

// Forward and backward, and the SGD step where `pass` has settings. Products is run_head's, with
// all classes as its one chunk and `embedding_gradient` that overwrites: out = a b.
template <typename T, typename Products>
void run_unfused_head(const HeadState<T>& state, const HeadRows<T>& rows,
                      const UnfusedBuffers<T>& b, const HeadShape& shape, const LossSpec& loss,
                      const HeadPass& pass, Products& products, const Stream& main,
                      const HeadSide& side) {
  constexpr int kRowSumThreads = 256;
  const bool cosines = normalises(loss.base), euclidean = loss.base == BaseKind::euclidean_margin;
  const bool radial = loss.scales_by_norm();
  const int dim = shape.dim;
  const Chunk all = shape.chunk(0);
  const LogitMatrix matrix{all.width, all.padded, pass.labels};
  const dim3 row_blocks(static_cast<unsigned>(shape.rows));
  const dim3 cells(row_blocks.x, blocks_for(all.padded, kCellThreads * kCells).x);
  const dim3 row_warps = blocks_for(shape.rows, kRowThreads / kWarpSize);
  const auto each_cell = [&](const char* name, auto kernel, auto... arguments) {
    launch(name, kernel, cells, kCellThreads, main.get(), matrix, arguments...);
  };

  normalise(pass.embeddings, shape.rows, dim, cosines, b.norms, rows.normalised, main);
  normalise(state.weights, shape.classes, dim, cosines, state.norms, state.class_weights, main);
  products.logits(rows.normalised, state.class_weights, all.padded, b.cosines);
  launch("margin_rows", &margin_rows<T>, row_blocks, kRowThreads, main.get(),
         PrepareArguments{pass.embeddings, pass.labels, dim, loss.base, loss.margin, loss.euclidean,
                          pass.settings},
         rows.normalised, b.norms, state.class_weights, state.bias, rows.targets);
  start_side(state, rows, shape, loss, pass, main, side);
  if (euclidean) {
    each_cell("scale_rows", &scale_rows, rows.targets, b.cosines, b.logits);
  } else if (cosines) {
    each_cell("apply_margin", &apply_margin, rows.targets, b.cosines, b.margined);
    each_cell("scale_rows", &scale_rows, rows.targets, b.margined, b.logits);
  } else {
    each_cell("add_bias", &add_bias, state.bias, b.cosines, b.logits);
  }
  if (euclidean) {
    launch("hinge_rows", &hinge_rows<kRowSumThreads>, row_blocks, kRowSumThreads, main.get(),
           matrix, rows.targets, b.logits, rows.hinges);
  } else {
    launch("softmax_rows", &softmax_rows<kRowSumThreads>, row_blocks, kRowSumThreads, main.get(),
           matrix, b.logits, rows.sums);
  }
  finish_losses(state, rows, shape, loss, pass, main, side);

  const float* gradient = b.grad_logits;
  if (euclidean) {
    each_cell("hinge_backward", &hinge_backward, rows.targets, rows.gradients, b.logits,
              b.grad_logits);
    each_cell("scale_rows", &scale_rows, rows.targets, b.grad_logits, b.grad_cosines);
    gradient = b.grad_cosines;
  } else {
    each_cell("log_softmax", &log_softmax, rows.gradients, rows.base_loss, b.logits,
              b.log_probabilities);
    each_cell("softmax_backward", &softmax_backward, rows.gradients, b.log_probabilities,
              b.grad_logits);
  }
  if (loss.base == BaseKind::margin) {
    each_cell("scale_rows", &scale_rows, rows.targets, b.grad_logits, b.grad_margined);
    each_cell("margin_backward", &margin_backward, rows.targets, b.grad_margined, b.grad_cosines);
    gradient = b.grad_cosines;
  }
  if (radial) {
    launch("scale_backward", &scale_backward, row_blocks, kReduceThreads, main.get(), matrix,
           b.grad_logits, b.margined, b.grad_scale);
  }
  const T* operand = b.operand;
  const float* row_scale = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    operand = gradient;
  } else {
    row_scale = rows.row_scale;
    convert(gradient, row_scale, int64_t{shape.rows} * all.padded, b.operand, main.get());
  }
  products.embedding_gradient(operand, state.class_weights, all.padded, rows.embedding_products);
  launch("normalise_backward", &normalise_backward, row_warps, kRowThreads, main.get(),
         rows.embedding_products, row_scale, shape.rows, dim, cosines, loss.has_centers(),
         pass.embeddings, b.norms, pass.grad_embeddings);
  if (radial) {
    launch("add_radial", &add_radial, row_warps, kRowThreads, main.get(), pass.embeddings, b.norms,
           shape.rows, dim, b.grad_scale, pass.grad_embeddings);
  }

  const bool step = pass.settings != nullptr;
  const auto update = [&](bool is_bias, int64_t count, const float* from, float* values,
                          float* velocity) {
    launch("update_parameters", &update_parameters, blocks_for(count, kRangeThreads * kRangeWidth),
           kRangeThreads, main.get(), pass.settings, rows.non_finite, is_bias, count, from, values,
           velocity);
  };
  if (step || pass.grad_weights != nullptr) {
    float* grad_weights = step ? b.grad_weights : pass.grad_weights;
    products.weight_gradient(operand, rows.normalised, all.padded, b.grad_weights);
    launch("normalise_backward", &normalise_backward,
           blocks_for(shape.classes, kRowThreads / kWarpSize), kRowThreads, main.get(),
           b.grad_weights, row_scale, shape.classes, dim, cosines, false, state.weights,
           state.norms, grad_weights);
    if (step) update(false, shape.classes * dim, grad_weights, state.weights, state.velocity);
  }
  if (!cosines && (step || pass.grad_bias != nullptr)) {
    float* grad_bias = step ? b.grad_bias : pass.grad_bias;
    column_sums(b.grad_logits, shape.rows, all.padded, grad_bias, main.get());
    if (step) update(true, shape.classes, grad_bias, state.bias, state.bias_velocity);
  }
}

}  // namespace hardmine::cuda
