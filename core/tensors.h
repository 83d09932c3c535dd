// The named tensors of a network: what a checkpoint holds and backends read and write.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/folding.h"

namespace hardmine {

// Parameters and running statistics in the order of the nodes, with torch's names and shapes.
std::vector<TensorInfo> network_tensors(const std::vector<Node>& nodes);

// Those of a network in training: also the momentum of every parameter.
std::vector<TensorInfo> training_tensors(const std::vector<Node>& nodes);

// Throws codes::kInput for a name that is not in `tensors` or a span of another size.
const TensorInfo& find_tensor(const std::vector<TensorInfo>& tensors, const std::string& name,
                              size_t values);

// What to say when training has left the range of numbers and `tensor` is where it shows first.
std::string non_finite_message(const std::string& tensor);

// An embedder whose tensors are kept on the host; a backend takes over what they fold to when
// something was written. Batch-norms start as torch's, with scale and variance 1; everything else
// is 0 until it is written.
class FoldingEmbedder : public Embedder {
 public:
  explicit FoldingEmbedder(const std::vector<Node>& nodes);
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  void read(const std::string& name, std::span<float> values) const override;
  void write(const std::string& name, std::span<const float> values) override;
  void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) override;

 private:
  virtual void fold(const TensorReader& read) = 0;
  virtual void embed_folded(std::span<const uint8_t> images, bool mirror,
                            std::span<float> embeddings) = 0;
  size_t index_of(const std::string& name, size_t count) const;
  std::vector<TensorInfo> tensors_;
  std::vector<std::vector<float>> values_;  // by tensor
  bool stale_ = true;
};

}  // namespace hardmine
