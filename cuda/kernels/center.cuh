// The center loss (Wen et al. 2016) beside a margin head: weight / (2 N) sum_i ||x_i - c_y||^2 on
// raw embeddings, then c -= rate sum_i (c - x_i) / (1 + n) over the n rows of each class.
//
//   center_rows   a row's squared distance; its gradient, which the head then adds its own to
//   move_centers  each class once, by its first row along the chain of chain_rows: the same order
//                 every time and no atomics
//
// Shapes: embeddings and gradient [rows, dim], centers [classes, dim], fp32, row-major.
#pragma once

#include "core/loss.h"
#include "cuda/kernels/device.cuh"

namespace hardmine::cuda {

inline constexpr int kCenterThreads = 128;

struct CenterArguments {
  const float* embeddings;
  const int* labels;
  int rows;
  int dim;
  CenterLoss law;
};

// One block a row.
static __global__ void __launch_bounds__(kCenterThreads)
    center_rows(CenterArguments a, const float* __restrict__ centers,
                double* __restrict__ distances, float* __restrict__ gradient) {
  struct SumTag {};
  const int row = static_cast<int>(blockIdx.x);
  const float* center = centers + int64_t{a.labels[row]} * a.dim;
  const auto factor = static_cast<float>(a.law.weight / a.rows);
  double squares = 0;
  for (int k = static_cast<int>(threadIdx.x); k < a.dim; k += kCenterThreads) {
    const int64_t at = int64_t{row} * a.dim + k;
    const double difference = static_cast<double>(a.embeddings[at]) - center[k];
    squares += difference * difference;
    gradient[at] = factor * (a.embeddings[at] - center[k]);
  }
  squares = block_sum<SumTag>(squares);
  if (threadIdx.x == 0) distances[row] = squares;
}

// One block a row; the first row of a class moves its center.
static __global__ void __launch_bounds__(kCenterThreads)
    move_centers(CenterArguments a, const int* __restrict__ class_rows,
                 const int* __restrict__ next_row, const int* __restrict__ non_finite,
                 float* __restrict__ centers) {
  const int first = static_cast<int>(blockIdx.x);
  const int label = a.labels[first];
  if (class_rows[label] != first || *non_finite != 0) return;
  float* center = centers + int64_t{label} * a.dim;
  for (int k = static_cast<int>(threadIdx.x); k < a.dim; k += kCenterThreads) {
    const double c = center[k];
    double sum = 0;
    int count = 0;
    for (int row = first; row >= 0; row = next_row[row], ++count)
      sum += c - a.embeddings[int64_t{row} * a.dim + k];
    center[k] = static_cast<float>(c - a.law.rate / (1 + count) * sum);
  }
}

}  // namespace hardmine::cuda
