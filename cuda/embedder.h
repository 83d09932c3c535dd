// A network for inference on CUDA: batch-norm folded into the convolutions and the linear layer,
// bias, residual sum and ReLU in one kernel after each convolution.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "core/backend.h"
#include "core/folding.h"
#include "cuda/libraries.h"
#include "cuda/runtime.h"

namespace hardmine::cuda {

class FoldedNetwork {
 public:
  virtual ~FoldedNetwork() = default;
  // Takes over the values of all tensors.
  virtual void fold(const TensorReader& read) = 0;
  // Raw embeddings [n, embedding] of images [n, size, size, 3]; any n, in batches of the one it was
  // made for.
  virtual void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) = 0;
};

// Takes its memory at once. Throws codes::kConfig for a network that cannot be folded.
std::unique_ptr<FoldedNetwork> make_folded_network(std::vector<Node> nodes, int64_t batch,
                                                   Precision precision, bool deterministic,
                                                   const Libraries& libraries,
                                                   const Stream& stream);

std::unique_ptr<Embedder> make_cuda_embedder(const std::vector<Node>& nodes, int64_t batch,
                                             const Execution& execution,
                                             const Libraries& libraries);

}  // namespace hardmine::cuda
