#include "cpu/embedder.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/folding.h"
#include "core/tensors.h"
#include "cpu/feature_maps.h"
#include "cpu/threads.h"

namespace hardmine {
namespace {

using onednn::memory;

// The network at one batch size: primitives, their operands and the feature maps.
class Pass {
 public:
  Pass(const std::vector<Node>& nodes, const std::vector<FoldedLayer>& folded,
       const onednn::engine& engine, memory::data_type type, int64_t batch)
      : nodes_(nodes), engine_(engine), type_(type), batch_(batch), scratch_(false), image_(false) {
    const MapFormat format(engine, nodes, batch, type);
    outputs_.resize(nodes.size());
    for (size_t i = 0; i < nodes.size(); ++i) {
      const Node& node = nodes[i];
      Output& output = outputs_[i];
      output.vector = node.op == Op::global_average_pool || node.op == Op::linear ||
                      (node.op == Op::batch_norm && outputs_[node.input].vector);
      if (!output.vector) {
        output.layout = format.layout(batch, node.out_channels, node.out_size);
        output.desc = format.desc(batch, node.out_channels, node.out_size);
      }
      plan(static_cast<int>(i), folded);
    }
    scratch_.allocate();
    image_.allocate();
    for (const auto& buffer : buffers_) buffer->allocate();
  }

  int64_t batch() const { return batch_; }

  // Reorders the folded weights into what the primitives want.
  void take_weights(onednn::stream& stream) {
    for (Operand& operand : operands_) {
      const Node& node = nodes_[operand.from->node];
      // oneDNN's memory takes a pointer to mutable memory even where it only reads.
      memory plain({convolution_of(node, batch_).weights_dims(), memory::data_type::f32,
                    memory::format_tag::oihw},
                   engine_, const_cast<float*>(operand.from->weight.data()));
      onednn::checked("a reorder of weights", [&] {
        dnnl::reorder(plain, operand.weights).execute(stream, plain, operand.weights);
        stream.wait();
      });
    }
  }

  // Embeddings of `count` images, at most the batch; the other rows are computed and not used.
  void run(const onednn::stream& stream, const uint8_t* images, int64_t count, bool mirror,
           float* embeddings) {
    if (type_ == memory::data_type::bf16) {
      load_images<Bf16>(images, count, mirror);
    } else {
      load_images<float>(images, count, mirror);
    }
    for (const auto& step : steps_) step(stream);
    std::memcpy(embeddings, outputs_.back().buffer->data<float>(),
                static_cast<size_t>(count * nodes_.back().out_channels) * sizeof(float));
  }

 private:
  struct Output {
    Buffer* buffer = nullptr;
    bool vector = false;
    Layout layout;
    memory::desc desc;
  };
  struct Operand {
    const FoldedLayer* from;
    memory weights;
  };

  // Plans what computes the output of a node. A node with a batch-norm is computed where the
  // batch-norm stands, so that the residual is there.
  void plan(int index, const std::vector<FoldedLayer>& folded) {
    const Node& node = nodes_[index];
    for (const FoldedLayer& from : folded) {
      if (from.last() != index) continue;
      if (nodes_[from.node].op == Op::linear) {
        plan_linear(from);
      } else {
        plan_convolution(from);
      }
    }
    if (node.op == Op::max_pool) {
      type_ == memory::data_type::bf16 ? plan_max_pool<Bf16>(index) : plan_max_pool<float>(index);
    } else if (node.op == Op::global_average_pool) {
      type_ == memory::data_type::bf16 ? plan_average<Bf16>(index) : plan_average<float>(index);
    }
  }

  Buffer* new_buffer(size_t bytes) {
    buffers_.push_back(std::make_unique<Buffer>(false));
    buffers_.back()->reserve(bytes);
    return buffers_.back().get();
  }

  bool read_after(int output, int index) const {
    for (size_t i = static_cast<size_t>(index) + 1; i < nodes_.size(); ++i) {
      if (nodes_[i].input == output || nodes_[i].residual == output) return true;
    }
    return false;
  }

  void plan_convolution(const FoldedLayer& from) {
    using tag = memory::format_tag;
    const Node& node = nodes_[from.node];
    const Node& last = nodes_[from.last()];
    Output& output = outputs_[from.last()];
    const onednn::Convolution shape = convolution_of(node, batch_);
    auto attributes = onednn::user_scratchpad();
    dnnl::post_ops operations;
    if (last.residual >= 0) operations.append_sum(1.0F);
    if (last.activation == Activation::relu) onednn::append_relu(operations);
    attributes.set_post_ops(operations);
    const memory::desc src = node.input < 0 ? memory::desc(shape.src_dims(), type_, tag::any)
                                            : outputs_[node.input].desc;
    const auto desc = onednn::convolution_inference_desc(
        engine_, shape, src, {shape.weights_dims(), type_, tag::any},
        {{node.out_channels}, memory::data_type::f32, tag::x}, output.desc, attributes);
    if (node.input < 0) {
      image_layout_ = image_layout(desc.src_desc(), node.in_size);
      image_stride_ = onednn::blocking_of(desc.src_desc()).strides[0];
    }
    Buffer& source = node.input < 0 ? image_ : *outputs_[node.input].buffer;
    if (last.residual < 0) {
      output.buffer = new_buffer(0);
    } else if (const Output& residual = outputs_[last.residual];
               !read_after(last.residual, from.last())) {
      output.buffer = residual.buffer;  // the convolution adds to what is there
    } else {
      output.buffer = new_buffer(0);
      steps_.emplace_back([to = output.buffer, added = residual.buffer](const onednn::stream&) {
        std::memcpy(to->data(), added->data(), added->bytes());
      });
    }
    const memory weights(desc.weights_desc(), engine_);
    operands_.push_back({&from, weights});
    std::vector<std::pair<int, memory>> arguments = {
        {DNNL_ARG_SRC, source.view(desc.src_desc(), engine_)},
        {DNNL_ARG_WEIGHTS, weights},
        {DNNL_ARG_BIAS, memory(desc.bias_desc(), engine_, const_cast<float*>(from.bias.data()))},
        {DNNL_ARG_DST, output.buffer->view(desc.dst_desc(), engine_)}};
    add_call(dnnl::convolution_forward(desc), desc.scratchpad_desc(), std::move(arguments));
  }

  void plan_linear(const FoldedLayer& from) {
    const Node& node = nodes_[from.node];
    const int64_t in = node.in_channels, out = node.out_channels;
    const Output& input = outputs_[node.input];
    Output& output = outputs_[from.last()];
    output.buffer = new_buffer(0);
    const memory::desc x({batch_, in}, memory::data_type::f32, memory::dims{in, 1});
    const memory::desc transposed({in, out}, memory::data_type::f32, memory::dims{1, in});
    const memory::desc y({batch_, out}, memory::data_type::f32, memory::dims{out, 1});
    const auto desc = onednn::matmul_desc(engine_, x, transposed, y, onednn::user_scratchpad());
    add_call(
        dnnl::matmul(desc), desc.scratchpad_desc(),
        {{DNNL_ARG_SRC, input.buffer->view(x, engine_)},
         {DNNL_ARG_WEIGHTS, memory(transposed, engine_, const_cast<float*>(from.weight.data()))},
         {DNNL_ARG_DST, output.buffer->view(y, engine_)}});
    steps_.emplace_back([this, &from, to = output.buffer, out](const onednn::stream&) {
      for (int64_t n = 0; n < batch_; ++n) {
        loops_.fp32.add(to->data<float>() + n * out, from.bias.data(), out);
      }
    });
  }

  void add_call(const dnnl::primitive& primitive, const memory::desc& scratchpad,
                std::vector<std::pair<int, memory>> arguments) {
    if (scratchpad.get_size() > 0) {
      arguments.emplace_back(DNNL_ARG_SCRATCHPAD, scratch_.view(scratchpad, engine_));
    }
    steps_.emplace_back([call = onednn::Call(primitive, std::move(arguments))](
                            const onednn::stream& stream) { call.run(stream); });
  }

  template <typename Element>
  void plan_max_pool(int index) {
    const Node& node = nodes_[index];
    const Layout in = outputs_[node.input].layout, out = outputs_[index].layout;
    const Window window = {node.in_size, node.out_size, node.kernel, node.stride, node.padding};
    const Buffer* from = outputs_[node.input].buffer;
    Buffer* to = outputs_[index].buffer =
        new_buffer(static_cast<size_t>(out.elements()) * sizeof(Element));
    Buffer* where = new_buffer(static_cast<size_t>(out.elements()));
    steps_.emplace_back([this, in, out, window, from, to, where](const onednn::stream&) {
#pragma omp parallel for schedule(static)
      for (int64_t i = 0; i < out.planes; ++i) {
        const int64_t at = i * out.elements_per_plane();
        loops_.of<Element>().max_pool(from->data<const Element>() + i * in.elements_per_plane(),
                                      to->data<Element>() + at, where->data<uint8_t>() + at,
                                      out.plane.channels, window);
      }
    });
  }

  template <typename Element>
  void plan_average(int index) {
    const Node& node = nodes_[index];
    const Layout in = outputs_[node.input].layout;
    const int64_t channels = node.out_channels, padded = in.padded_channels();
    const Buffer* from = outputs_[node.input].buffer;
    Buffer* rows = new_buffer(static_cast<size_t>(batch_ * padded) * sizeof(float));
    Buffer* to = outputs_[index].buffer =
        new_buffer(static_cast<size_t>(batch_ * channels) * sizeof(float));
    steps_.emplace_back([this, in, channels, padded, from, rows, to](const onednn::stream&) {
#pragma omp parallel for schedule(static)
      for (int64_t i = 0; i < in.planes; ++i) {
        loops_.of<Element>().average(from->data<const Element>() + i * in.elements_per_plane(),
                                     rows->data<float>() + i * in.plane.channels, in.plane);
      }
      for (int64_t n = 0; n < batch_; ++n) {
        std::memcpy(to->data<float>() + n * channels, rows->data<float>() + n * padded,
                    static_cast<size_t>(channels) * sizeof(float));
      }
    });
  }

  template <typename Element>
  void load_images(const uint8_t* images, int64_t count, bool mirror) {
    const int64_t bytes = image_layout_.size * image_layout_.size * 3;
    Augmentation augmentation;
    augmentation.mirror = mirror ? 1 : 0;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < count; ++n) {
      loops_.of<Element>().image(images + n * bytes, image_.data<Element>() + n * image_stride_,
                                 image_layout_, augmentation);
    }
  }

  const std::vector<Node>& nodes_;
  const NetworkLoops& loops_ = network_loops();
  onednn::engine engine_;
  memory::data_type type_;
  int64_t batch_;
  std::vector<Output> outputs_;
  Buffer scratch_, image_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  ImageLayout image_layout_;
  int64_t image_stride_ = 0;
  std::vector<Operand> operands_;
  std::vector<std::function<void(const onednn::stream&)>> steps_;
};

}  // namespace

class FoldedNetwork::Impl {
 public:
  Impl(std::vector<Node> nodes, Precision precision, int threads)
      : nodes_(std::move(nodes)),
        type_(data_type_of(precision)),
        threads_(threads),
        folded_(plan_folding(nodes_)) {}

  void fold(const TensorReader& read) {
    read_folded(nodes_, folded_, read);
    for (Sized& sized : passes_) sized.stale = true;
  }

  void embed(std::span<const uint8_t> images, bool mirror, std::span<float> embeddings) {
    const size_t bytes = image_bytes(nodes_);
    const auto width = static_cast<size_t>(nodes_.back().out_channels);
    const size_t count = count_images(nodes_, images, embeddings);
    omp_set_num_threads(threads_);
    for (size_t done = 0; done < count;) {
      // Whole batches, then small ones for the rest: a single image does not pay for sixty-four.
      Sized& sized = passes_[count - done >= kBatches[0] ? 0 : 1];
      Pass& pass = ready(sized);
      const size_t now = std::min(count - done, static_cast<size_t>(pass.batch()));
      pass.run(stream_, images.data() + done * bytes, static_cast<int64_t>(now), mirror,
               embeddings.data() + done * width);
      done += now;
    }
  }

 private:
  static constexpr size_t kBatches[2] = {64, 8};
  struct Sized {
    int64_t batch;
    std::unique_ptr<Pass> pass;  // made when first needed
    bool stale = true;           // the weights changed since it took them
  };

  Pass& ready(Sized& sized) {
    if (sized.pass == nullptr) {
      sized.pass = std::make_unique<Pass>(nodes_, folded_, engine_, type_, sized.batch);
    }
    if (std::exchange(sized.stale, false)) sized.pass->take_weights(stream_);
    return *sized.pass;
  }

  std::vector<Node> nodes_;
  memory::data_type type_;
  int threads_;
  onednn::engine engine_{onednn::engine::kind::cpu, 0};
  onednn::stream stream_{engine_};
  std::vector<FoldedLayer> folded_;
  Sized passes_[2] = {{kBatches[0], nullptr}, {kBatches[1], nullptr}};
};

FoldedNetwork::FoldedNetwork(std::vector<Node> nodes, Precision precision, int threads)
    : impl_(std::make_unique<Impl>(std::move(nodes), precision, threads)) {}
FoldedNetwork::~FoldedNetwork() = default;
void FoldedNetwork::fold(const TensorReader& read) {
  impl_->fold(read);
}
void FoldedNetwork::embed(std::span<const uint8_t> images, bool mirror,
                          std::span<float> embeddings) {
  impl_->embed(images, mirror, embeddings);
}

namespace {

class CpuEmbedder : public FoldingEmbedder {
 public:
  CpuEmbedder(const std::vector<Node>& nodes, const Execution& execution)
      : FoldingEmbedder(nodes),
        network_(nodes, execution.precision,
                 execution.threads > 0 ? execution.threads : physical_cores()) {}

 private:
  void fold(const TensorReader& read) override { network_.fold(read); }
  void embed_folded(std::span<const uint8_t> images, bool mirror,
                    std::span<float> embeddings) override {
    network_.embed(images, mirror, embeddings);
  }

  FoldedNetwork network_;
};

}  // namespace

std::unique_ptr<Embedder> make_cpu_embedder(const NetworkSpec& spec, const Execution& execution) {
  return std::make_unique<CpuEmbedder>(build_network(spec), execution);
}

}  // namespace hardmine
