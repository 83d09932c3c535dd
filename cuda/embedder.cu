#include "cuda/embedder.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "core/tensors.h"
#include "cuda/convolution.h"
#include "cuda/device.h"
#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/input.cuh"
#include "cuda/kernels/linear.cuh"
#include "cuda/kernels/pooling.cuh"
#include "cuda/maps.h"
#include "cuda/products.h"
#include "cuda/transfer.h"

namespace hardmine::cuda {
namespace {

template <typename T>
class FoldedNetworkOf : public FoldedNetwork {
 public:
  FoldedNetworkOf(std::vector<Node> nodes, int64_t batch, Precision precision, bool deterministic,
                  const Libraries& libraries, const Stream& stream)
      : nodes_(std::move(nodes)),
        batch_(batch),
        stream_(stream),
        engines_(libraries.cudnn, {.deterministic = deterministic, .device = device_and_driver()}),
        layers_(plan_folding(nodes_)),
        weights_(layers_.size()),
        maps_(nodes_.size()) {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Node& node = nodes_[static_cast<size_t>(layers_[i].node)];
      if (node.op != Op::convolution) continue;
      weights_[i].plan = &engines_.plan(
          convolution_graph(convolution_shape(node, batch_, precision), ConvolutionPass::forward));
    }
    Arena counting;
    layout(counting);
    memory_ = allocate_device(counting.bytes(),
                              "embeddings of " + std::to_string(batch) + " images at a time");
    check(cudaMemsetAsync(memory_.data(), 0, memory_.bytes(), stream_.get()), "cudaMemsetAsync");
    stream_.synchronize();
    Arena arena(memory_);
    layout(arena);
    products_ = std::make_unique<Products>(libraries.cublas_lt, stream_.get(), workspace_,
                                           workspace_bytes_);
    for (size_t i = 0; i < layers_.size(); ++i) {
      if (weights_[i].plan != nullptr)
        weights_[i].plan->choose({input_of(layers_[i]), weights_[i].values,
                                  maps_[static_cast<size_t>(layers_[i].last())], workspace_},
                                 stream_);
    }
  }

  void fold(const TensorReader& read) override {
    read_folded(nodes_, layers_, read);
    for (size_t i = 0; i < layers_.size(); ++i) {
      const WeightLayout layout = WeightLayout::of(nodes_[static_cast<size_t>(layers_[i].node)]);
      const std::vector<float> stored = layout.to_stored(layers_[i].weight);
      std::vector<T> operand(stored.size());
      std::transform(stored.begin(), stored.end(), operand.begin(),
                     [](float value) { return from_float<T>(value); });
      write_device(weights_[i].values, operand, stream_);
      write_device(weights_[i].bias, layers_[i].bias, stream_);
    }
  }

  void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) override {
    const size_t bytes = image_bytes(nodes_);
    const auto width = static_cast<size_t>(nodes_.back().out_channels);
    const size_t count = count_images(nodes_, images, embeddings);
    Augmentation augmentation;
    augmentation.mirror = mirror ? 1 : 0;
    for (size_t done = 0; done < count;) {
      const size_t now = std::min(count - done, static_cast<size_t>(batch_));
      // The rows past `now` are computed from what was there before and are not used.
      write_device(pixels_, images.subspan(done * bytes, now * bytes), stream_);
      load_images(pixels_, nullptr, augmentation, batch_, static_cast<int>(nodes_.front().in_size),
                  image_, stream_.get());
      run();
      read_device(embeddings_, embeddings.subspan(done * width, now * width), stream_);
      done += now;
    }
  }

 private:
  struct Weights {
    EnginePlan* plan = nullptr;  // null: the linear layer
    T* values = nullptr;
    float* bias = nullptr;
  };

  void layout(Arena& arena) {
    const int64_t size = nodes_.front().in_size;
    pixels_ = arena.take<uint8_t>(batch_ * size * size * 3);
    image_ = arena.take<T>(batch_ * size * size * kImageChannels);
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Node& node = nodes_[i];
      if (node.op == Op::max_pool) where_ = arena.take<uint8_t>(map_count(node));
      if (node.op == Op::max_pool || node.op == Op::global_average_pool)
        maps_[i] = arena.take<T>(map_count(node));
    }
    embeddings_ = arena.take<float>(batch_ * nodes_.back().out_channels);
    workspace_bytes_ = product_workspace_bytes(compute_major());
    for (size_t i = 0; i < layers_.size(); ++i) {
      const FoldedLayer& layer = layers_[i];
      const Node& node = nodes_[static_cast<size_t>(layer.node)];
      if (node.op == Op::convolution)
        maps_[static_cast<size_t>(layer.last())] = arena.take<T>(map_count(node));
      weights_[i].values = arena.take<T>(WeightLayout::of(node).stored_count());
      weights_[i].bias = arena.take<float>(node.out_channels);
      if (weights_[i].plan != nullptr)
        workspace_bytes_ = std::max(workspace_bytes_, weights_[i].plan->workspace_bytes());
    }
    workspace_ = arena.take<char>(static_cast<int64_t>(workspace_bytes_));
  }

  int64_t map_count(const Node& node) const {
    return batch_ * node.out_size * node.out_size * node.out_channels;
  }

  void run() {
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Node& node = nodes_[i];
      const PoolShape pool{.images = batch_,
                           .channels = static_cast<int>(node.out_channels),
                           .in_size = static_cast<int>(node.in_size),
                           .out_size = static_cast<int>(node.out_size)};
      if (node.op == Op::max_pool) {
        max_pool(pool, map(node.input), maps_[i], where_, stream_.get());
      } else if (node.op == Op::global_average_pool) {
        average_pool(batch_, node.in_size * node.in_size, node.out_channels, map(node.input),
                     static_cast<float*>(nullptr), maps_[i], stream_.get());
      } else {
        // A layer is computed where its batch-norm stands, so that the residual is there.
        for (size_t l = 0; l < layers_.size(); ++l)
          if (layers_[l].last() == static_cast<int>(i)) run_layer(layers_[l], weights_[l]);
      }
    }
  }

  void run_layer(const FoldedLayer& layer, const Weights& weights) {
    const Node& node = nodes_[static_cast<size_t>(layer.node)];
    const Node& last = nodes_[static_cast<size_t>(layer.last())];
    const Affine bias{nullptr, nullptr, weights.bias};
    const bool relu = last.activation == Activation::relu;
    if (weights.plan == nullptr) {
      products_->multiply({.m = batch_,
                           .n = node.out_channels,
                           .k = node.in_channels,
                           .transpose_b = true,
                           .operands = number_type<T>()},
                          1, map(node.input), weights.values, 0, embeddings_);
      apply_affine(bias, batch_, node.out_channels, embeddings_, static_cast<const float*>(nullptr),
                   embeddings_, relu, stream_.get());
      return;
    }
    T* y = maps_[static_cast<size_t>(layer.last())];
    weights.plan->run(convolution_pointers({input_of(layer), weights.values, y, workspace_}),
                      stream_);
    apply_affine(bias, batch_ * node.out_size * node.out_size, node.out_channels, y,
                 last.residual < 0 ? static_cast<const T*>(nullptr) : map(last.residual), y, relu,
                 stream_.get());
  }

  const T* map(int node) const { return maps_[static_cast<size_t>(node)]; }
  void* input_of(const FoldedLayer& layer) {
    const int input = nodes_[static_cast<size_t>(layer.node)].input;
    return input < 0 ? image_ : maps_[static_cast<size_t>(input)];
  }

  std::vector<Node> nodes_;
  int64_t batch_;
  const Stream& stream_;
  Engines engines_;
  std::vector<FoldedLayer> layers_;
  std::vector<Weights> weights_;  // by layer
  std::vector<T*> maps_;          // by node; null where nothing in T is kept
  DeviceBlock memory_;
  uint8_t* pixels_ = nullptr;  // [batch, size, size, 3]
  T* image_ = nullptr;         // [batch, size, size, 4]
  uint8_t* where_ = nullptr;
  float* embeddings_ = nullptr;  // [batch, embedding]
  char* workspace_ = nullptr;
  size_t workspace_bytes_ = 0;
  std::unique_ptr<Products> products_;
};

class CudaEmbedder : public FoldingEmbedder {
 public:
  CudaEmbedder(const std::vector<Node>& nodes, int64_t batch, const Execution& execution,
               const Libraries& libraries)
      : FoldingEmbedder(nodes), device_(execution.device) {
    use_device(device_);
    stream_.emplace();
    network_ = make_folded_network(nodes, batch, execution.precision, execution.deterministic,
                                   libraries, *stream_);
  }

  ~CudaEmbedder() override {
    use_device(device_, std::nothrow);
    network_.reset();
    stream_.reset();
  }

 private:
  void fold(const TensorReader& read) override {
    use_device(device_);
    network_->fold(read);
  }
  void embed_folded(std::span<const uint8_t> images, bool mirror,
                    std::span<float> embeddings) override {
    use_device(device_);
    network_->embed(images, mirror, embeddings);
  }

  int device_;
  std::optional<Stream> stream_;
  std::unique_ptr<FoldedNetwork> network_;
};

}  // namespace

std::unique_ptr<FoldedNetwork> make_folded_network(std::vector<Node> nodes, int64_t batch,
                                                   Precision precision, bool deterministic,
                                                   const Libraries& libraries,
                                                   const Stream& stream) {
  return with_operands(precision, [&]<typename T>(T) -> std::unique_ptr<FoldedNetwork> {
    return std::make_unique<FoldedNetworkOf<T>>(std::move(nodes), batch, precision, deterministic,
                                                libraries, stream);
  });
}

std::unique_ptr<Embedder> make_cuda_embedder(const std::vector<Node>& nodes, int64_t batch,
                                             const Execution& execution,
                                             const Libraries& libraries) {
  return std::make_unique<CudaEmbedder>(nodes, batch, execution, libraries);
}

}  // namespace hardmine::cuda
