// The named tensors of a network: what a checkpoint holds and backends read and write.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "core/backend.h"

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

// The tensors of a network for inference, on the host. Batch-norms start as torch's, with scale and
// variance 1; everything else is 0 until it is written.
class NetworkValues {
 public:
  explicit NetworkValues(const std::vector<Node>& nodes);
  const std::vector<TensorInfo>& tensors() const { return tensors_; }
  void read(const std::string& name, std::span<float> values) const;
  void write(const std::string& name, std::span<const float> values);

 private:
  size_t index_of(const std::string& name, size_t count) const;
  std::vector<TensorInfo> tensors_;
  std::vector<std::vector<float>> values_;  // by tensor
};

}  // namespace hardmine
