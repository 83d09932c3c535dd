// The network as data: a list of nodes in topological order that backends and the ONNX writer walk.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hardmine {

enum class Op : uint8_t {
  convolution,  // weight [out, in, kernel, kernel], no bias
  batch_norm,   // over channels; then + residual, then activation
  max_pool,
  global_average_pool,
  linear,  // weight [out, in], bias [out]
};
enum class Activation : uint8_t { none, relu };

struct Node {
  Op op = Op::convolution;
  std::string name;   // torchvision's: "layer1.0.conv1"
  int input = -1;     // index of the node whose output is read; -1: the image
  int residual = -1;  // batch_norm only: index of the node added before the activation; -1: none
  int64_t in_channels = 0, out_channels = 0;
  int64_t in_size = 0, out_size = 0;  // side of the square feature maps; 1 after pooling
  int kernel = 1, stride = 1, padding = 0;
  Activation activation = Activation::none;
  bool fixed_scale = false;  // batch_norm whose scale stays 1 and is no parameter
};

struct NetworkSpec {
  std::string architecture = "resnet18";
  int64_t embedding = 512;
  bool embedding_batch_norm = true;  // embeddingNorm: batch
};

inline constexpr double kBatchNormEpsilon = 1e-5;  // torch's default
inline constexpr double kBatchNormMomentum = 0.1;  // share of the new statistics, torch's default

// Builds the nodes of a spec; the last node's output is the raw embedding. Throws codes::kConfig
// for an unknown architecture or a non-positive embedding.
std::vector<Node> build_network(const NetworkSpec& spec);

}  // namespace hardmine
