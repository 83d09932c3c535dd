// A network in training on the CPU: forward, backward and SGD. Convolutions are oneDNN's,
// everything between them our own loops (network_loops.h). Weights, momentum, gradients, batch
// statistics and the vectors after the pooling are fp32; feature maps and the operands of
// convolutions have the network's precision. All memory is taken in the constructor.
//
// A result is the same bit for bit for one thread count, oneDNN and CPU. oneDNN sums the weight
// gradients of its threads, so another thread count rounds them otherwise.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/backend.h"
#include "core/network.h"

namespace hardmine {

class TrainingNetwork {
 public:
  // Any list of nodes that reads one image and ends in a vector. Parameters are initialised from
  // the seed. Throws codes::kConfig for a network, batch or precision that cannot be trained here.
  // Made and used on one thread, whose OpenMP team it uses.
  TrainingNetwork(std::vector<Node> nodes, int64_t batch, Precision precision, int threads,
                  uint64_t seed);
  ~TrainingNetwork();

  const std::vector<Node>& nodes() const;
  int64_t embedding() const;
  // Raw embeddings [batch, embedding] of images [batch, size, size, 3] by batch statistics, which
  // also move the running ones.
  std::span<const float> forward(const uint8_t* images, const Augmentation* augmentations);
  // Gradients of all parameters, given that of the embeddings [batch, embedding], after a forward.
  void backward(std::span<const float> grad_embeddings);
  void update(const StepSettings& settings);

  const std::vector<TensorInfo>& tensors() const;
  void read(const std::string& name, std::span<float> values) const;
  void write(const std::string& name, std::span<const float> values);
  // The gradient of a parameter by the last backward.
  void read_gradient(const std::string& name, std::span<float> values) const;
  // Names the first tensor that holds NaN or infinity: parameters, then activations in order; empty
  // if there is none.
  std::string first_non_finite() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hardmine
