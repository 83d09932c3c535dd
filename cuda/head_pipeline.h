// The order of the head's kernels and products (cuda/kernels/head.cuh says what each does), apart
// from who owns the memory and who multiplies: cuda/head.cpp runs it with cuBLASLt, test/simt with
// plain loops.
#pragma once

#include <algorithm>

#include "cuda/kernels/head.cuh"

namespace hardmine::cuda {

// Device memory of one head for up to `rows` rows; T is the type of the products' operands.
template <typename T>
struct HeadMemory {
  // State.
  float* weights;        // [classes, dim] master
  float* velocity;       // [classes, dim]
  float* norms;          // [classes]
  T* class_weights;      // [classes, dim] normalised copy (softmax: a plain copy)
  float* bias;           // [classes], softmax only, else null
  float* bias_velocity;  // [classes]
  int* class_rows;       // [classes], kNoRow between steps
  // One step.
  const float* embeddings;  // [rows, dim]
  const int* labels;        // [rows]
  T* normalised;            // [rows, dim]
  T* scaled;                // [rows, dim]
  int* next_row;            // [rows]
  RowTarget* targets;       // [rows]
  RowPart* parts;           // [chunks, rows]
  RowGradient* gradients;   // [rows]
  float* base_loss;         // [rows]
  float* weighted_loss;     // [rows]
  HeadStatistics* statistics;
  float* logits;               // [rows, width]
  T* probabilities;            // [rows, width]
  float* embedding_products;   // [rows, dim]
  float* weight_products;      // [width, dim]
  float* embedding_gradients;  // [rows, dim]
};

struct HeadShape {
  int rows, dim;
  int64_t classes;
  int width;  // classes of a chunk
  int chunks() const { return static_cast<int>((classes + width - 1) / width); }
  Chunk chunk(int index) const {
    const int64_t first = int64_t{index} * width;
    return {first, static_cast<int>(std::min<int64_t>(width, classes - first)), index};
  }
};

// Where gradients go when the weights are to stay: both null in a training step.
struct HeadGradients {
  float* weights;  // [classes, dim]
  float* bias;     // [classes]
};

inline dim3 blocks_for(int64_t items, int per_block) {
  return dim3(static_cast<unsigned>((items + per_block - 1) / per_block));
}

template <typename T>
void set_class_weights(const HeadMemory<T>& m, const HeadShape& shape, bool cosines,
                       cudaStream_t stream) {
  launch("normalise_classes", &normalise_classes<T>,
         blocks_for(shape.classes, kRowThreads / kWarpSize), kRowThreads, stream, m.weights,
         shape.classes, shape.dim, cosines, m.norms, m.class_weights);
}

// Forward and backward, and the SGD step unless `wanted` names gradients. Products offers
//   logits(normalised, class_weights, rows, width, dim, out)                out = a b^T
//   embedding_gradient(probabilities, class_weights, rows, width, dim, out) out += a b
//   weight_gradient(probabilities, scaled, rows, width, dim, out)           out = a^T b
// on the same stream.
template <typename T, typename Products>
void run_head(const HeadMemory<T>& m, const HeadShape& shape, const LossSpec& loss,
              const SgdArguments& sgd, const HeadGradients& wanted, Products& products,
              cudaStream_t stream) {
  constexpr int kThreads = 256;
  const bool cosines = loss.base == BaseKind::margin;
  const dim3 rows(static_cast<unsigned>(shape.rows));
  launch("prepare_rows", &prepare_rows<T>, rows, kRowThreads, stream,
         PrepareArguments{m.embeddings, m.labels, shape.dim, cosines, loss.margin}, m.class_weights,
         m.bias, m.normalised, m.targets);
  launch("chain_rows", &chain_rows, blocks_for(shape.rows, kThreads), kThreads, stream, m.labels,
         shape.rows, m.class_rows, m.next_row);
  const auto logits = [&](const Chunk& chunk) {
    products.logits(m.normalised, m.class_weights + chunk.first_class * shape.dim, shape.rows,
                    chunk.width, shape.dim, m.logits);
  };
  for (int index = 0; index < shape.chunks(); ++index) {
    const Chunk chunk = shape.chunk(index);
    logits(chunk);
    launch("softmax_chunk", &softmax_chunk<kThreads>, rows, kThreads, stream, m.logits, chunk,
           shape.rows, m.labels, m.targets, m.bias, m.parts);
  }
  launch("finish_rows", &finish_rows, 1, kFinishThreads, stream, m.parts, shape.chunks(),
         shape.rows, m.targets, loss.weighting, m.base_loss, m.weighted_loss, m.gradients,
         m.statistics);
  launch("start_gradients", &start_gradients<T>, rows, kRowThreads, stream, m.normalised,
         m.class_weights, m.labels, shape.dim, m.targets, m.gradients, m.scaled,
         m.embedding_products);
  for (int index = 0; index < shape.chunks(); ++index) {
    const Chunk chunk = shape.chunk(index);
    if (shape.chunks() > 1) logits(chunk);  // a single chunk is still there
    launch("gradient_chunk", &gradient_chunk<T>,
           dim3(blocks_for(chunk.width, kThreads).x, static_cast<unsigned>(shape.rows)), kThreads,
           stream, m.logits, chunk, shape.rows, m.labels, m.targets, m.gradients, m.bias,
           m.probabilities);
    products.embedding_gradient(m.probabilities, m.class_weights + chunk.first_class * shape.dim,
                                shape.rows, chunk.width, shape.dim, m.embedding_products);
    products.weight_gradient(m.probabilities, m.scaled, shape.rows, chunk.width, shape.dim,
                             m.weight_products);
    if (m.bias != nullptr) {
      launch("bias_chunk", &bias_chunk<T>, blocks_for(chunk.width, kThreads), kThreads, stream, sgd,
             chunk, m.probabilities, shape.rows, m.labels, m.gradients, m.bias, m.bias_velocity,
             wanted.bias);
    }
    const auto update = [&](auto kernel) {
      launch("sgd_classes", kernel, blocks_for(chunk.width, kRowThreads / kWarpSize), kRowThreads,
             stream, sgd, chunk, m.weight_products, m.normalised, m.targets, m.gradients,
             m.class_rows, m.next_row, m.weights, m.velocity, m.norms, m.class_weights,
             wanted.weights);
    };
    if (shape.dim <= 128) {
      update(&sgd_classes<T, 4>);
    } else if (shape.dim <= 512) {
      update(&sgd_classes<T, 16>);
    } else {
      update(&sgd_classes<T, 32>);
    }
  }
  launch("finish_embeddings", &finish_embeddings<T>, rows, kRowThreads, stream,
         m.embedding_products, m.normalised, shape.dim, cosines, loss.margin.norm_scale, m.targets,
         m.gradients, m.embedding_gradients);
}

}  // namespace hardmine::cuda
