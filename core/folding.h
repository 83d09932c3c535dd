// Batch-norm folded into the convolutions and the linear layer before it, for inference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/network.h"

namespace hardmine {

// Reads a named tensor of network_tensors() into a span of its size.
using TensorReader = std::function<void(const std::string&, std::span<float>)>;

// A convolution or linear node and the batch_norm folded into it, its values in torch's layout.
struct FoldedLayer {
  int node = -1;
  int norm = -1;  // -1: none follows
  std::vector<float> weight, bias;

  int last() const { return norm < 0 ? node : norm; }
};

// Pairs every convolution and linear node with the batch-norm that alone reads it. Throws
// codes::kConfig when a batch-norm follows anything else.
std::vector<FoldedLayer> plan_folding(const std::vector<Node>& nodes);

// Takes over the values of all tensors:
//   y = a (W x + b - mean) + beta,  a = gamma / sqrt(variance + eps).
void read_folded(const std::vector<Node>& nodes, std::vector<FoldedLayer>& layers,
                 const TensorReader& read);

// Bytes of one image that the network reads, [size, size, 3].
size_t image_bytes(const std::vector<Node>& nodes);

// How many images [n, size, size, 3] there are; throws codes::kInput unless they are whole and
// there is room for as many embeddings.
size_t count_images(const std::vector<Node>& nodes, std::span<const uint8_t> images,
                    std::span<const float> embeddings);

}  // namespace hardmine
