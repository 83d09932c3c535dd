// A network for inference on the CPU: batch-norm folded into the convolutions and the linear layer,
// ReLU and residual sums done by oneDNN as it writes the convolution's result.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/folding.h"

namespace hardmine {

class FoldedNetwork {
 public:
  // Every batch_norm must follow a convolution or a linear node that nothing else reads; else
  // throws codes::kConfig. Made and used on one thread, whose OpenMP team it uses.
  FoldedNetwork(std::vector<Node> nodes, Precision precision, int threads);
  ~FoldedNetwork();
  // Takes over the values of all tensors.
  void fold(const TensorReader& read);
  // Raw embeddings [n, embedding] of images [n, size, size, 3]; any n.
  void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

std::unique_ptr<Embedder> make_cpu_embedder(const NetworkSpec& spec, const Execution& execution);

}  // namespace hardmine
