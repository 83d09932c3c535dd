// The margin head on CUDA, fused or unfused, as the training session uses it: device pointers in
// and out on a given stream, memory out of an arena, nothing allocated in a pass. And the
// MarginHead of the seam on top of it.
#pragma once

#include <memory>
#include <span>

#include "core/backend.h"
#include "cuda/head_pipeline.h"
#include "cuda/products.h"
#include "cuda/runtime.h"

namespace hardmine::cuda {

enum class HeadTensor : uint8_t { weights, bias, weight_momentum, bias_momentum, centers };

class CudaHead {
 public:
  virtual ~CudaHead() = default;

  // Memory. The state once, then initialise(); the rest again whenever the number of rows changes.
  virtual void layout_state(Arena& arena) = 0;
  virtual void layout_rows(Arena& arena, int rows) = 0;
  // Weights, biases, momentum and centers become 0.
  virtual void initialise(const Stream& stream) = 0;

  // Enqueues one pass over the rows laid out: on `stream` what gives the loss and the gradient of
  // the embeddings, beside it what then remains of the weights' update. `products` are those of
  // `stream`. May be captured once it has run.
  virtual void enqueue(const HeadPass& pass, Products& products, const Stream& stream) = 0;
  // What `stream` is given from now on runs after the whole of the last pass.
  virtual void join(const Stream& stream) = 0;
  // Enqueues the bare products of one pass over whatever the memory holds; the state stays.
  virtual void enqueue_products(Products& products, const Stream& stream) = 0;

  // The state from and to the host; the biases are empty unless softmax, the centers without a
  // center loss. They wait for `stream`.
  virtual void read(HeadTensor tensor, std::span<float> values, const Stream& stream) const = 0;
  virtual void write(HeadTensor tensor, std::span<const float> values, const Stream& stream) = 0;

  // [rows] of the last pass, on the device.
  virtual const float* base_loss() const = 0;
  virtual const float* weighted_loss() const = 0;
  // For a pass whose record has non_finite above 0, before another one runs: names what is not
  // finite. `embeddings` are the pass's, on the device.
  [[noreturn]] virtual void throw_non_finite(const float* embeddings,
                                             const Stream& stream) const = 0;
};

// What the matrices of one chunk may take: two, one multiplied while the other is updated from,
// stay in an H100's second-level cache of 50 MB. A head that fits into both is one chunk.
inline constexpr int64_t kChunkBytes = 20'000'000;

// Throws codes::kConfig for a head that cannot be.
std::unique_ptr<CudaHead> make_device_head(const HeadSpec& spec, Precision precision,
                                           int64_t chunk_bytes = kChunkBytes);

std::unique_ptr<MarginHead> make_cuda_head(const HeadSpec& spec, const Execution& execution,
                                           const CublasLt& library);

// Throws codes::kConfig where the loss of `spec` cannot take these settings.
void require_step_settings(const HeadSpec& spec, const StepSettings& settings);
StepParameters parameters_of(const StepSettings& settings);
StepStats stats_of(const StepRecord& record, int64_t rows);

}  // namespace hardmine::cuda
