#include "core/folding.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace hardmine {
namespace {

void fold_batch_norm(const Node& norm, FoldedLayer& layer, const TensorReader& read) {
  const auto channels = static_cast<size_t>(norm.out_channels);
  std::vector<float> gamma(channels, 1.0F), beta(channels), mean(channels), variance(channels);
  if (!norm.fixed_scale) read(norm.name + ".weight", gamma);
  read(norm.name + ".bias", beta);
  read(norm.name + ".running_mean", mean);
  read(norm.name + ".running_var", variance);
  const size_t fan_in = layer.weight.size() / channels;
  for (size_t c = 0; c < channels; ++c) {
    const double scale = gamma[c] / std::sqrt(variance[c] + kBatchNormEpsilon);
    for (size_t i = c * fan_in; i < (c + 1) * fan_in; ++i) {
      layer.weight[i] = static_cast<float>(layer.weight[i] * scale);
    }
    layer.bias[c] = static_cast<float>((layer.bias[c] - mean[c]) * scale + beta[c]);
  }
}

}  // namespace

std::vector<FoldedLayer> plan_folding(const std::vector<Node>& nodes) {
  std::vector<FoldedLayer> layers;
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    if (node.op == Op::convolution || node.op == Op::linear) {
      FoldedLayer layer;
      layer.node = static_cast<int>(i);
      layer.weight.resize(
          static_cast<size_t>(node.out_channels * node.in_channels * node.kernel * node.kernel));
      layer.bias.resize(static_cast<size_t>(node.out_channels));
      layers.push_back(std::move(layer));
    } else if (node.op == Op::batch_norm) {
      const auto before = std::find_if(layers.begin(), layers.end(), [&](const FoldedLayer& layer) {
        return layer.last() == node.input;
      });
      int64_t readers = 0;
      for (const Node& other : nodes)
        readers += (other.input == node.input) + (other.residual == node.input);
      if (before == layers.end() || before->norm >= 0 || readers != 1) {
        throw Error(codes::kConfig, "The batch-norm '" + node.name +
                                        "' does not follow a convolution or linear layer that "
                                        "nothing else reads, so it cannot be folded.");
      }
      before->norm = static_cast<int>(i);
    }
  }
  return layers;
}

void read_folded(const std::vector<Node>& nodes, std::vector<FoldedLayer>& layers,
                 const TensorReader& read) {
  for (FoldedLayer& layer : layers) {
    const Node& node = nodes[layer.node];
    read(node.name + ".weight", layer.weight);
    if (node.op == Op::linear) {
      read(node.name + ".bias", layer.bias);
    } else {
      std::fill(layer.bias.begin(), layer.bias.end(), 0.0F);
    }
    if (layer.norm >= 0) fold_batch_norm(nodes[layer.norm], layer, read);
  }
}

size_t image_bytes(const std::vector<Node>& nodes) {
  const Node& first =
      *std::find_if(nodes.begin(), nodes.end(), [](const Node& node) { return node.input < 0; });
  return static_cast<size_t>(first.in_size * first.in_size * 3);
}

size_t count_images(const std::vector<Node>& nodes, std::span<const uint8_t> images,
                    std::span<const float> embeddings) {
  const size_t bytes = image_bytes(nodes);
  const auto width = static_cast<size_t>(nodes.back().out_channels);
  const size_t count = images.size() / bytes;
  if (images.size() == count * bytes && embeddings.size() == count * width) return count;
  throw Error(codes::kInput, std::to_string(images.size()) + " bytes of images and room for " +
                                 std::to_string(embeddings.size()) +
                                 " values were given; expected " + std::to_string(bytes) +
                                 " bytes and " + std::to_string(width) + " values for each image.");
}

}  // namespace hardmine
