// The order of the fused head's kernels and products (cuda/kernels/head.cuh says what each does),
// apart from who owns the memory.
#pragma once

#include <algorithm>

#include "core/loss.h"
#include "cuda/kernels/center.cuh"
#include "cuda/kernels/head.cuh"
#include "cuda/runtime.h"

namespace hardmine::cuda {

struct HeadShape {
  int rows, dim;
  int64_t classes;
  int width;  // classes of a chunk, a multiple of kWidthMultiple
  static int64_t padded(int64_t count) {
    return (count + kWidthMultiple - 1) / kWidthMultiple * kWidthMultiple;
  }
  int chunks() const { return static_cast<int>((classes + width - 1) / width); }
  Chunk chunk(int index) const {
    const int64_t first = int64_t{index} * width;
    const int64_t count = std::min<int64_t>(width, classes - first);
    return {first, static_cast<int>(count), static_cast<int>(padded(count)), index};
  }
  int similarity_parts() const { return (dim + kWarpSize - 1) / kWarpSize; }
};

// What one head keeps from step to step; T is the type of the products' operands.
template <typename T>
struct HeadState {
  float* weights;        // [classes, dim] master
  float* velocity;       // [classes, dim]
  float* norms;          // [classes]
  T* class_weights;      // [padded classes, dim] normalised copy (softmax: a plain one), then zeros
  float* bias;           // [classes], softmax only, else null
  float* bias_velocity;  // [classes]
  float* centers;        // [classes, dim], null: no center loss
  int* class_rows;       // [classes], kNoRow at first
};

// What a step computes for each of its rows.
template <typename T>
struct HeadRows {
  T* normalised;               // [rows, dim]
  int* next_row;               // [rows]
  RowTarget* targets;          // [rows]
  SoftmaxSum<float>* sums;     // [rows]; null with the Euclidean margin, which has
  HingeSum<float>* hinges;     // [rows]
  double* center_distances;    // [rows], null: no center loss
  RowGradient* gradients;      // [rows]
  float* base_loss;            // [rows]
  float* weighted_loss;        // [rows]
  SimilarityPart* similarity;  // [similarity_parts]
  float* row_scale;            // [1]
  int* non_finite;             // [1]
  float* embedding_products;   // [rows, dim]
};

// The fused head's chunk, and its gradient twice where there are several chunks: one is updated
// from while the next one is multiplied.
template <typename T>
struct HeadChunks {
  T* scaled;                  // [rows, dim]
  float* logits;              // [rows, width]
  T* probabilities;           // [rows, width]
  float* weight_products[2];  // [width, dim]; the second null where there is one chunk
};

// One pass, on the device: a training step where `settings` are given, else the weights stay and
// their gradients are written where they are wanted.
struct HeadPass {
  const float* embeddings = nullptr;  // [rows, dim]
  const int* labels = nullptr;        // [rows], each below the number of classes
  const StepParameters* settings = nullptr;
  StepRing ring{};
  float* grad_embeddings = nullptr;  // [rows, dim]
  float* grad_weights = nullptr;     // [classes, dim], null: not wanted
  float* grad_bias = nullptr;        // [padded classes], null: not wanted
};

// The second stream of a head and what orders it.
struct HeadSide : SideStream {
  Event done[2];
};

inline dim3 blocks_for(int64_t items, int per_block) {
  return dim3(static_cast<unsigned>((items + per_block - 1) / per_block));
}

template <typename T>
void normalise(const float* values, int64_t rows, int dim, bool cosines, float* norms,
               T* normalised, const Stream& stream) {
  launch("normalise_rows", &normalise_rows<T>, blocks_for(rows, kRowThreads / kWarpSize),
         kRowThreads, stream.get(), values, rows, dim, cosines, norms, normalised);
}

inline CenterArguments center_arguments(const HeadShape& shape, const LossSpec& loss,
                                        const HeadPass& pass) {
  return {pass.embeddings, pass.labels, shape.rows, shape.dim, loss.center};
}

// Chains the rows of each class, measures how alike strangers are and how far rows are from their
// centers, beside the first products; side.done[0] is recorded behind them. The gradient of the
// center loss is in pass.grad_embeddings then.
template <typename T>
void start_side(const HeadState<T>& state, const HeadRows<T>& rows, const HeadShape& shape,
                const LossSpec& loss, const HeadPass& pass, const Stream& main,
                const HeadSide& side) {
  side.fork(main);
  launch("chain_rows", &chain_rows, blocks_for(shape.rows, kChainThreads), kChainThreads,
         side.stream().get(), pass.labels, shape.rows, state.class_rows, rows.next_row);
  launch("similarity", &similarity, blocks_for(shape.dim, kWarpSize), kSimilarityWarps * kWarpSize,
         side.stream().get(), pass.embeddings, pass.labels, shape.rows, shape.dim, rows.targets,
         state.class_rows, rows.next_row, rows.similarity);
  if (loss.has_centers()) {
    launch("center_rows", &center_rows, dim3(static_cast<unsigned>(shape.rows)), kCenterThreads,
           side.stream().get(), center_arguments(shape, loss, pass), state.centers,
           rows.center_distances, pass.grad_embeddings);
  }
  side.done[0].record(side.stream().get());
}

// The losses of all rows; in a step the centers move.
template <typename T>
void finish_losses(const HeadState<T>& state, const HeadRows<T>& rows, const HeadShape& shape,
                   const LossSpec& loss, const HeadPass& pass, const Stream& main,
                   const HeadSide& side) {
  main.wait(side.done[0]);
  const int warps = (shape.rows + kWarpSize - 1) / kWarpSize;
  launch(
      "finish_rows", &finish_rows, 1, std::min(warps * kWarpSize, kMostFinishThreads), main.get(),
      FinishArguments{shape.rows, loss, rows.sums, rows.hinges, rows.center_distances, rows.targets,
                      rows.similarity, shape.similarity_parts(), rows.base_loss, rows.weighted_loss,
                      rows.gradients, rows.row_scale, rows.non_finite, pass.ring});
  if (loss.has_centers() && pass.settings != nullptr) {
    launch("move_centers", &move_centers, dim3(static_cast<unsigned>(shape.rows)), kCenterThreads,
           main.get(), center_arguments(shape, loss, pass), state.class_rows, rows.next_row,
           rows.non_finite, state.centers);
  }
}

// Forward and backward, and the SGD step where `pass` has settings; the last chunk is still being
// updated on `side` when the gradient of the embeddings is there. Products offers, on `main`,
//   logits(normalised, class_weights, width, out)                out = a b^T
//   embedding_gradient(probabilities, class_weights, width, out) out += a b
//   weight_gradient(probabilities, scaled, width, out)           out = a^T b
// with the chunk's padded width, which is its matrices' leading dimension too.
template <typename T, typename Products>
void run_head(const HeadState<T>& state, const HeadRows<T>& rows, const HeadChunks<T>& chunks,
              const HeadShape& shape, const LossSpec& loss, const HeadPass& pass,
              Products& products, const Stream& main, const HeadSide& side) {
  constexpr int kThreads = 256;
  const bool cosines = normalises(loss.base);
  const bool euclidean = loss.base == BaseKind::euclidean_margin;
  const int dim = shape.dim, count = shape.chunks();
  const dim3 row_blocks(static_cast<unsigned>(shape.rows));
  launch("prepare_rows", &prepare_rows<T>, row_blocks, kRowThreads, main.get(),
         PrepareArguments{pass.embeddings, pass.labels, dim, loss.base, loss.margin, loss.euclidean,
                          pass.settings},
         state.class_weights, state.bias, rows.normalised, rows.targets);
  start_side(state, rows, shape, loss, pass, main, side);
  for (int index = 0; index < count; ++index) {
    const Chunk chunk = shape.chunk(index);
    products.logits(rows.normalised, state.class_weights + chunk.first_class * dim, chunk.padded,
                    chunks.logits);
    if (euclidean) {
      launch("hinge_chunk", &hinge_chunk<kThreads>, row_blocks, kThreads, main.get(), chunks.logits,
             chunk, pass.labels, rows.targets, rows.hinges);
    } else {
      launch("softmax_chunk", &softmax_chunk<kThreads>, row_blocks, kThreads, main.get(),
             chunks.logits, chunk, pass.labels, rows.targets, state.bias, rows.sums);
    }
  }
  finish_losses(state, rows, shape, loss, pass, main, side);
  launch("start_gradients", &start_gradients<T>, row_blocks, kRowThreads, main.get(),
         rows.normalised, state.class_weights, pass.labels, dim, rows.targets, rows.gradients,
         rows.row_scale, chunks.scaled, rows.embedding_products);

  const SgdArguments sgd{pass.settings, rows.row_scale, rows.non_finite, pass.labels, shape.rows,
                         dim,           cosines};
  const auto update = [&](const Chunk& chunk, const float* weight_products, const Stream& stream) {
    const auto with = [&](auto kernel) {
      launch("sgd_classes", kernel, blocks_for(chunk.width, kRowThreads / kWarpSize), kRowThreads,
             stream.get(), sgd, chunk, weight_products, rows.normalised, rows.targets,
             rows.gradients, state.class_rows, rows.next_row, state.weights, state.velocity,
             state.norms, state.class_weights, pass.grad_weights);
    };
    if (dim % 4 != 0) {
      with(&sgd_classes<T, 32, 1>);
    } else if (dim <= 128) {
      with(&sgd_classes<T, 4, 4>);
    } else if (dim <= 512) {
      with(&sgd_classes<T, 16, 4>);
    } else {
      with(&sgd_classes<T, 32, 4>);
    }
  };
  // The last chunk first: it is the one that the first pass left behind.
  for (int step = 0; step < count; ++step) {
    const Chunk chunk = shape.chunk(count - 1 - step);
    const T* class_weights = state.class_weights + chunk.first_class * dim;
    float* weight_products = chunks.weight_products[step % 2];
    if (step > 0) products.logits(rows.normalised, class_weights, chunk.padded, chunks.logits);
    const dim3 blocks(row_blocks.x, blocks_for(chunk.padded, kThreads * kVectorWidth<T>).x);
    if (euclidean) {
      launch("hinge_gradient_chunk", &hinge_gradient_chunk<T>, blocks, kThreads, main.get(),
             chunks.logits, chunk, pass.labels, rows.targets, chunks.probabilities);
    } else {
      launch("gradient_chunk", &gradient_chunk<T>, blocks, kThreads, main.get(), chunks.logits,
             chunk, pass.labels, rows.targets, rows.gradients, state.bias, chunks.probabilities);
    }
    products.embedding_gradient(chunks.probabilities, class_weights, chunk.padded,
                                rows.embedding_products);
    if (step >= 2) main.wait(side.done[step % 2]);  // `weight_products` is free again
    products.weight_gradient(chunks.probabilities, chunks.scaled, chunk.padded, weight_products);
    if (state.bias != nullptr) {
      launch("bias_chunk", &bias_chunk<T>, blocks_for(chunk.width, kWarpSize),
             kBiasWarps * kWarpSize, main.get(), sgd, chunk, chunks.probabilities, rows.gradients,
             state.bias, state.bias_velocity, pass.grad_bias);
    }
    side.fork(main);
    update(chunk, weight_products, side.stream());
    side.done[step % 2].record(side.stream().get());
  }
  launch("finish_embeddings", &finish_embeddings<T>, row_blocks, kRowThreads, main.get(),
         rows.embedding_products, rows.normalised, dim, cosines, loss.scales_by_norm(),
         loss.has_centers(), rows.targets, rows.gradients, pass.grad_embeddings);
}

}  // namespace hardmine::cuda
