#include "core/tensors.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace hardmine {

std::vector<TensorInfo> network_tensors(const std::vector<Node>& nodes) {
  std::vector<TensorInfo> tensors;
  for (const Node& node : nodes) {
    const auto add = [&](const char* suffix, std::vector<int64_t> shape, TensorRole role) {
      tensors.push_back({node.name + suffix, std::move(shape), role});
    };
    switch (node.op) {
      case Op::convolution:
        add(".weight", {node.out_channels, node.in_channels, node.kernel, node.kernel},
            TensorRole::parameter);
        break;
      case Op::batch_norm:
        if (!node.fixed_scale) add(".weight", {node.out_channels}, TensorRole::parameter);
        add(".bias", {node.out_channels}, TensorRole::parameter);
        add(".running_mean", {node.out_channels}, TensorRole::statistic);
        add(".running_var", {node.out_channels}, TensorRole::statistic);
        break;
      case Op::linear:
        add(".weight", {node.out_channels, node.in_channels}, TensorRole::parameter);
        add(".bias", {node.out_channels}, TensorRole::parameter);
        break;
      case Op::max_pool:
      case Op::global_average_pool:
        break;
    }
  }
  return tensors;
}

std::vector<TensorInfo> training_tensors(const std::vector<Node>& nodes) {
  std::vector<TensorInfo> tensors = network_tensors(nodes);
  const size_t count = tensors.size();
  for (size_t i = 0; i < count; ++i) {
    if (tensors[i].role != TensorRole::parameter) continue;
    tensors.push_back({"momentum/" + tensors[i].name, tensors[i].shape, TensorRole::optimizer});
  }
  return tensors;
}

const TensorInfo& find_tensor(const std::vector<TensorInfo>& tensors, const std::string& name,
                              size_t values) {
  const auto found = std::find_if(tensors.begin(), tensors.end(),
                                  [&](const TensorInfo& tensor) { return tensor.name == name; });
  if (found == tensors.end()) {
    throw Error(codes::kInput, "There is no tensor named '" + name + "' here.");
  }
  int64_t count = 1;
  for (const int64_t side : found->shape) count *= side;
  if (static_cast<size_t>(count) != values) {
    throw Error(codes::kInput, "The tensor '" + name + "' has " + std::to_string(count) +
                                   " values, but " + std::to_string(values) + " were given.");
  }
  return *found;
}

std::string non_finite_message(const std::string& tensor) {
  return "Training has left the range of finite numbers: the first tensor with NaN or infinity "
         "is " +
         tensor + ". Lower the learning rate, or go on from the last checkpoint.";
}

FoldingEmbedder::FoldingEmbedder(const std::vector<Node>& nodes)
    : tensors_(network_tensors(nodes)) {
  for (const TensorInfo& tensor : tensors_) {
    size_t count = 1;
    for (const int64_t side : tensor.shape) count *= static_cast<size_t>(side);
    const bool one = tensor.name.ends_with(".running_var") ||
                     (tensor.shape.size() == 1 && tensor.name.ends_with(".weight"));
    values_.emplace_back(count, one ? 1.0F : 0.0F);
  }
}

void FoldingEmbedder::read(const std::string& name, std::span<float> values) const {
  const std::vector<float>& stored = values_[index_of(name, values.size())];
  std::copy(stored.begin(), stored.end(), values.begin());
}

void FoldingEmbedder::write(const std::string& name, std::span<const float> values) {
  std::copy(values.begin(), values.end(), values_[index_of(name, values.size())].begin());
  stale_ = true;
}

void FoldingEmbedder::embed(std::span<const uint8_t> images, bool mirror,
                            std::span<float> embeddings) {
  if (std::exchange(stale_, false)) {
    fold([this](const std::string& name, std::span<float> values) { read(name, values); });
  }
  embed_folded(images, mirror, embeddings);
}

size_t FoldingEmbedder::index_of(const std::string& name, size_t count) const {
  return static_cast<size_t>(&find_tensor(tensors_, name, count) - tensors_.data());
}

}  // namespace hardmine
