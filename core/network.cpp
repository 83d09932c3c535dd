#include "core/network.h"

#include <array>

#include "core/error.h"

namespace hardmine {
namespace {

// Appends nodes, keeping the index of the last one and the size of its output.
class Builder {
 public:
  int convolution(const std::string& name, int input, int64_t in_channels, int64_t out_channels,
                  int64_t in_size, int kernel, int stride, int padding) {
    Node node;
    node.op = Op::convolution;
    node.name = name;
    node.input = input;
    node.in_channels = in_channels;
    node.out_channels = out_channels;
    node.in_size = in_size;
    node.out_size = (in_size + 2 * padding - kernel) / stride + 1;
    node.kernel = kernel;
    node.stride = stride;
    node.padding = padding;
    return add(node);
  }

  int batch_norm(const std::string& name, int input, Activation activation, int residual = -1) {
    Node node = follow(Op::batch_norm, name, input);
    node.residual = residual;
    node.activation = activation;
    return add(node);
  }

  int max_pool(const std::string& name, int input, int kernel, int stride, int padding) {
    Node node = follow(Op::max_pool, name, input);
    node.out_size = (node.in_size + 2 * padding - kernel) / stride + 1;
    node.kernel = kernel;
    node.stride = stride;
    node.padding = padding;
    return add(node);
  }

  int global_average_pool(const std::string& name, int input) {
    Node node = follow(Op::global_average_pool, name, input);
    node.out_size = 1;
    return add(node);
  }

  int linear(const std::string& name, int input, int64_t out_channels) {
    Node node = follow(Op::linear, name, input);
    node.out_channels = out_channels;
    return add(node);
  }

  int fixed_scale_batch_norm(const std::string& name, int input) {
    Node node = follow(Op::batch_norm, name, input);
    node.fixed_scale = true;
    return add(node);
  }

  // Two 3x3 convolutions beside the identity, or beside a strided 1x1 where the shape changes.
  int basic_block(const std::string& name, int input, int64_t channels, int stride) {
    const int64_t in_channels = nodes_[input].out_channels;
    const int64_t in_size = nodes_[input].out_size;
    int node = convolution(name + ".conv1", input, in_channels, channels, in_size, 3, stride, 1);
    const int64_t size = nodes_[node].out_size;
    node = batch_norm(name + ".bn1", node, Activation::relu);
    const int second = convolution(name + ".conv2", node, channels, channels, size, 3, 1, 1);
    int identity = input;
    if (stride != 1 || in_channels != channels) {
      identity =
          convolution(name + ".downsample.0", input, in_channels, channels, in_size, 1, stride, 0);
      identity = batch_norm(name + ".downsample.1", identity, Activation::none);
    }
    return batch_norm(name + ".bn2", second, Activation::relu, identity);
  }

  std::vector<Node> take() { return std::move(nodes_); }

 private:
  // A node with the input's shape on both sides.
  Node follow(Op op, const std::string& name, int input) const {
    Node node;
    node.op = op;
    node.name = name;
    node.input = input;
    node.in_channels = node.out_channels = nodes_[input].out_channels;
    node.in_size = node.out_size = nodes_[input].out_size;
    return node;
  }

  int add(const Node& node) {
    nodes_.push_back(node);
    return static_cast<int>(nodes_.size()) - 1;
  }

  std::vector<Node> nodes_;
};

}  // namespace

std::vector<Node> build_network(const NetworkSpec& spec) {
  if (spec.architecture != "resnet18") {
    throw Error(codes::kConfig, "The network '" + spec.architecture +
                                    "' is not known; the one there is, is 'resnet18'.");
  }
  if (spec.embedding <= 0) {
    throw Error(codes::kConfig, "The embedding has " + std::to_string(spec.embedding) +
                                    " dimensions; give a positive number, such as 512.");
  }
  constexpr int kImageSide = 112;
  constexpr std::array<int64_t, 4> kStageChannels = {64, 128, 256, 512};
  constexpr int kBlocksPerStage = 2;

  Builder builder;
  int node = builder.convolution("conv1", -1, 3, kStageChannels[0], kImageSide, 7, 2, 3);
  node = builder.batch_norm("bn1", node, Activation::relu);
  node = builder.max_pool("maxpool", node, 3, 2, 1);
  for (size_t stage = 0; stage < kStageChannels.size(); ++stage) {
    for (int block = 0; block < kBlocksPerStage; ++block) {
      const std::string name = "layer" + std::to_string(stage + 1) + "." + std::to_string(block);
      node =
          builder.basic_block(name, node, kStageChannels[stage], stage > 0 && block == 0 ? 2 : 1);
    }
  }
  node = builder.global_average_pool("avgpool", node);
  node = builder.linear("fc", node, spec.embedding);
  if (spec.embedding_batch_norm) builder.fixed_scale_batch_norm("embedding_bn", node);
  return builder.take();
}

}  // namespace hardmine
