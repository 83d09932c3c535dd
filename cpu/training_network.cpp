#include "cpu/training_network.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "core/initialise.h"
#include "core/tensors.h"
#include "cpu/feature_maps.h"
#include "cpu/network_loops.h"
#include "cpu/onednn.h"

namespace hardmine {
namespace {

using onednn::memory;

struct Parameter {
  std::string name;
  int64_t count = 0;  // values updated
  bool decays = false;
  AlignedMemory values, momentum, gradient;
  std::optional<memory::desc> layout;  // of all three; plain when absent
  memory::dims dims;

  Parameter(std::string name_of, int64_t count_of, size_t bytes, bool decays_of)
      : name(std::move(name_of)),
        count(count_of),
        decays(decays_of),
        values(bytes),
        momentum(bytes),
        gradient(bytes) {}
};

struct Statistic {
  std::string name;
  int64_t count = 0;
  AlignedMemory values;
};

// The output of a node: planes in the network's precision, or fp32 vectors [batch, channels].
struct Output {
  Buffer* buffer = nullptr;
  Layout layout;
  memory::desc desc;  // of planes
  bool vector = false;
  int consumers = 0;
};

// What the layers of one network share.
struct Context {
  onednn::engine engine{onednn::engine::kind::cpu, 0};
  onednn::stream stream{engine};
  const NetworkLoops& loops = network_loops();
  int64_t batch = 0;
  int threads = 1;
  std::vector<Node> nodes;
  std::vector<Output> outputs;                  // by node
  std::vector<std::vector<Buffer*>> gradients;  // by node: their sum is its gradient
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<Buffer*> idle;     // shared buffers that hold nothing just now
  std::vector<Buffer*> scratch;  // by thread; the first also for the team
  std::vector<std::unique_ptr<Parameter>> parameters;
  std::vector<std::unique_ptr<Statistic>> statistics;
  bool operands_stale = true;  // weights changed since they were reordered

  Buffer* own_buffer() {
    buffers.push_back(std::make_unique<Buffer>(false));
    return buffers.back().get();
  }

  // A gradient's buffer from here on backwards, the smallest idle one that is large enough.
  Buffer* take(size_t bytes) {
    auto best = idle.end();
    for (auto it = idle.begin(); it != idle.end(); ++it) {
      const bool fits = (*it)->bytes() >= bytes;
      if (best == idle.end()) {
        best = it;
      } else if (const bool best_fits = (*best)->bytes() >= bytes; fits != best_fits) {
        if (fits) best = it;
      } else if (fits ? (*it)->bytes() < (*best)->bytes() : (*it)->bytes() > (*best)->bytes()) {
        best = it;
      }
    }
    Buffer* buffer;
    if (best == idle.end()) {
      buffers.push_back(std::make_unique<Buffer>(true));
      buffer = buffers.back().get();
    } else {
      buffer = *best;
      idle.erase(best);
    }
    buffer->reserve(bytes);
    return buffer;
  }

  void release(Buffer* buffer) {
    if (buffer->shared()) idle.push_back(buffer);
  }

  // A primitive bound to its arguments and to the scratchpad that all of a thread's calls share.
  onednn::Call call(const dnnl::primitive& primitive, const memory::desc& scratchpad,
                    std::vector<std::pair<int, memory>> arguments, size_t thread = 0) {
    if (scratchpad.get_size() > 0) {
      arguments.emplace_back(DNNL_ARG_SCRATCHPAD, scratch[thread]->view(scratchpad, engine));
    }
    return {primitive, std::move(arguments)};
  }

  // Weights as a primitive wants them: `stored` itself where it is so already, else a copy and the
  // reorder that brings it up to date.
  memory operand(const memory& stored, const memory::desc& wanted,
                 std::vector<onednn::Call>& reorders) {
    if (wanted == stored.get_desc()) return stored;
    const memory copy(wanted, engine);
    reorders.push_back(reorder(stored, copy));
    return copy;
  }

  onednn::Call reorder(const memory& from, const memory& to) {
    const auto attributes = onednn::user_scratchpad();
    const auto desc = onednn::checked("a reorder of weights", [&] {
      return dnnl::reorder::primitive_desc(engine, from.get_desc(), engine, to.get_desc(),
                                           attributes);
    });
    return call(dnnl::reorder(desc), desc.scratchpad_desc(),
                {{DNNL_ARG_FROM, from}, {DNNL_ARG_TO, to}});
  }

  // c = a b, all of them matrices.
  onednn::Call product(const memory& a, const memory& b, const memory& c) {
    const auto desc = onednn::matmul_desc(engine, a.get_desc(), b.get_desc(), c.get_desc(),
                                          onednn::user_scratchpad());
    return call(dnnl::matmul(desc), desc.scratchpad_desc(),
                {{DNNL_ARG_SRC, a}, {DNNL_ARG_WEIGHTS, b}, {DNNL_ARG_DST, c}});
  }

  Parameter& parameter(const std::string& name, int64_t count, size_t bytes, bool decays) {
    parameters.push_back(std::make_unique<Parameter>(name, count, bytes, decays));
    return *parameters.back();
  }

  Statistic& statistic(const std::string& name, int64_t count) {
    statistics.push_back(std::make_unique<Statistic>(
        Statistic{name, count, AlignedMemory(static_cast<size_t>(count) * sizeof(float))}));
    return *statistics.back();
  }
};

// A dense matrix in rows, and [rows, columns] stored as [columns, rows].
memory::desc matrix(int64_t rows, int64_t columns,
                    memory::data_type type = memory::data_type::f32) {
  return {{rows, columns}, type, memory::dims{columns, 1}};
}
memory::desc transposed(int64_t rows, int64_t columns,
                        memory::data_type type = memory::data_type::f32) {
  return {{rows, columns}, type, memory::dims{1, rows}};
}

class Layer {
 public:
  virtual ~Layer() = default;
  virtual void forward() = 0;
  // Called from the last layer to the first, when all gradients of the node's output are known.
  virtual void plan_backward(const std::vector<Buffer*>& gradients) = 0;
  virtual void backward() = 0;
  virtual void reorder_weights() {}
};

class ConvolutionLayer : public Layer {
 public:
  ConvolutionLayer(Context& context, const Node& node, memory::data_type type, Buffer& image)
      : context_(context), node_(node), type_(type), shape_(convolution_of(node, context.batch)) {
    using tag = memory::format_tag;
    const onednn::engine& engine = context.engine;
    const auto attributes = onednn::user_scratchpad();
    const memory::desc weights_any(shape_.weights_dims(), type, tag::any);
    const memory::desc src = node.input < 0 ? memory::desc(shape_.src_dims(), type, tag::any)
                                            : context.outputs[node.input].desc;
    const memory::desc dst = context.outputs[index_of(context, node)].desc;
    const auto forward =
        onednn::convolution_training_desc(engine, shape_, src, weights_any, dst, attributes);
    const auto weights = onednn::convolution_backward_weights_desc(
        engine, shape_, forward.src_desc(),
        {shape_.weights_dims(), memory::data_type::f32, tag::any}, dst, attributes, forward);

    src_ = node.input < 0 ? &image : context.outputs[node.input].buffer;
    src_desc_ = forward.src_desc();
    dst_desc_ = dst;
    const memory::desc master = weights.diff_weights_desc();
    parameter_ = &context.parameter(node.name + ".weight",
                                    static_cast<int64_t>(master.get_size() / sizeof(float)),
                                    master.get_size(), true);
    parameter_->layout = master;
    parameter_->dims = shape_.weights_dims();
    const memory master_memory(master, engine, parameter_->values.data());
    const memory forward_operand =
        context.operand(master_memory, forward.weights_desc(), reorders_);
    forward_ = context.call(dnnl::convolution_forward(forward), forward.scratchpad_desc(),
                            {{DNNL_ARG_SRC, src_->view(src_desc_, engine)},
                             {DNNL_ARG_WEIGHTS, forward_operand},
                             {DNNL_ARG_DST, output().buffer->view(dst, engine)}});
    weights_desc_ = weights;
    pieces_ = node.out_size < kSmallestSplit
                  ? 1
                  : std::min(static_cast<int64_t>(context.threads), context.batch);
    if (node.input >= 0) {
      data_desc_ = onednn::convolution_backward_data_desc(engine, shape_, src_desc_, weights_any,
                                                          dst, attributes, forward);
      data_operand_ = context.operand(master_memory, data_desc_.weights_desc(), reorders_);
    }
  }

  const memory::desc& src_desc() const { return src_desc_; }

  void reorder_weights() override {
    for (const onednn::Call& reorder : reorders_) reorder.run(context_.stream);
  }

  void forward() override { forward_.run(context_.stream); }

  void plan_backward(const std::vector<Buffer*>& gradients) override {
    const onednn::engine& engine = context_.engine;
    const memory diff_dst = gradients[0]->view(dst_desc_, engine);
    plan_backward_weights(gradients[0]);
    if (node_.input >= 0) {
      Buffer* diff_src = context_.take(src_desc_.get_size());
      backward_data_ =
          context_.call(dnnl::convolution_backward_data(data_desc_), data_desc_.scratchpad_desc(),
                        {{DNNL_ARG_DIFF_DST, diff_dst},
                         {DNNL_ARG_WEIGHTS, data_operand_},
                         {DNNL_ARG_DIFF_SRC, diff_src->view(src_desc_, engine)}});
      context_.gradients[node_.input].push_back(diff_src);
    }
    context_.release(gradients[0]);
  }

  void backward() override {
    if (pieces_ == 1) {
      backward_weights_[0].run(context_.stream);
    } else {
      backward_weights_in_pieces();
    }
    if (node_.input >= 0) backward_data_.run(context_.stream);
  }

 private:
  static size_t index_of(const Context& context, const Node& node) {
    return static_cast<size_t>(&node - context.nodes.data());
  }
  // oneDNN's weight gradients let the threads of a team wait for each other in busy loops, some of
  // them once per image: a thread that the system has put aside costs the others a time slice each
  // time. Where the weights are few beside the maps, each thread computes the gradient of its own
  // images instead, and the gradients are added.
  static constexpr int64_t kSmallestSplit = 14;  // pixels a side of the output

  void plan_backward_weights(Buffer* diff_dst) {
    const onednn::engine& engine = context_.engine;
    const memory::desc& layout = *parameter_->layout;
    if (pieces_ == 1) {
      backward_weights_.push_back(context_.call(
          dnnl::convolution_backward_weights(weights_desc_), weights_desc_.scratchpad_desc(),
          {{DNNL_ARG_SRC, src_->view(src_desc_, engine)},
           {DNNL_ARG_DIFF_DST, diff_dst->view(dst_desc_, engine)},
           {DNNL_ARG_DIFF_WEIGHTS, memory(layout, engine, parameter_->gradient.data())}}));
      return;
    }
    omp_set_num_threads(1);  // the primitives are made for the threads that they are made by
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const int64_t first = context_.batch * piece / pieces_;
      onednn::Convolution shape = shape_;
      shape.batch = context_.batch * (piece + 1) / pieces_ - first;
      const memory::dims origin(4, 0);
      const memory::desc src = src_desc_.submemory_desc(shape.src_dims(), origin);
      const memory::desc dst = dst_desc_.submemory_desc(shape.dst_dims(), origin);
      const auto attributes = onednn::user_scratchpad();
      const auto forward = onednn::convolution_training_desc(
          engine, shape, src, {shape.weights_dims(), type_, memory::format_tag::any}, dst,
          attributes);
      const auto weights = onednn::convolution_backward_weights_desc(engine, shape, src, layout,
                                                                     dst, attributes, forward);
      void* gradient = parameter_->gradient.data();
      if (piece > 0) {
        partial_.emplace_back(layout.get_size());
        gradient = partial_.back().data();
      }
      backward_weights_.push_back(context_.call(
          dnnl::convolution_backward_weights(weights), weights.scratchpad_desc(),
          {{DNNL_ARG_SRC, src_->view(src, engine, image_bytes(src_desc_) * first)},
           {DNNL_ARG_DIFF_DST, diff_dst->view(dst, engine, image_bytes(dst_desc_) * first)},
           {DNNL_ARG_DIFF_WEIGHTS, memory(layout, engine, gradient)}},
          static_cast<size_t>(piece)));
    }
    omp_set_num_threads(context_.threads);
  }

  size_t image_bytes(const memory::desc& desc) const {
    const size_t element = type_ == memory::data_type::bf16 ? sizeof(Bf16) : sizeof(float);
    return static_cast<size_t>(onednn::blocking_of(desc).strides[0]) * element;
  }

  void backward_weights_in_pieces() {
    std::exception_ptr failure;
#pragma omp parallel for schedule(static, 1)
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      try {
        backward_weights_[static_cast<size_t>(piece)].run(context_.stream);
      } catch (...) {
#pragma omp critical
        failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    auto* total = parameter_->gradient.data<float>();
    const int64_t count = parameter_->count;
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < pieces_; ++part) {
      const int64_t first = count * part / pieces_, last = count * (part + 1) / pieces_;
      for (const AlignedMemory& partial : partial_) {
        context_.loops.fp32.add(total + first, partial.data<float>() + first, last - first);
      }
    }
  }

  const Output& output() const {
    return context_.outputs[index_of(context_, node_)];
  }

  Context& context_;
  const Node& node_;
  memory::data_type type_;
  onednn::Convolution shape_;
  int64_t pieces_ = 1;                  // of the batch, for the weight gradient
  std::vector<AlignedMemory> partial_;  // gradients of all pieces but the first
  Buffer* src_ = nullptr;
  memory::desc src_desc_, dst_desc_;
  Parameter* parameter_ = nullptr;
  dnnl::convolution_backward_weights::primitive_desc weights_desc_;
  dnnl::convolution_backward_data::primitive_desc data_desc_;
  memory data_operand_;
  onednn::Call forward_, backward_data_;
  std::vector<onednn::Call> backward_weights_;  // by piece
  std::vector<onednn::Call> reorders_;
};

// A convolution in bf16 as matrix products over the unfolded input, which is kept for the backward
// pass. For maps of at most kLargestMap pixels a side on AMX: a tile holds 16 rows, the direct
// kernels of oneDNN 2.6 fill it with pixels of one image row, and a 4x4 map leaves three quarters
// of it empty (measured on 4x4x512, batch 64, one core: 170 ms for the three directions, 38 ms so).
class ProductConvolutionLayer : public Layer {
 public:
  static constexpr int64_t kLargestMap = 7;

  static bool suits(const Node& node, memory::data_type type, const Layout& in, const Layout& out) {
    const bool channels_last = in.blocks == 1 && out.blocks == 1;
    return type == memory::data_type::bf16 && onednn::bf16_support().tiles && channels_last &&
           node.input >= 0 && node.out_size <= kLargestMap;
  }

  ProductConvolutionLayer(Context& context, const Node& node, const Output& output)
      : context_(context),
        node_(node),
        loops_(context.loops.bf16),
        window_{node.in_size, node.out_size, node.kernel, node.stride, node.padding},
        rows_(context.batch * node.out_size * node.out_size),
        taps_(node.in_channels * node.kernel * node.kernel),
        x_(context.outputs[node.input].buffer) {
    const onednn::engine& engine = context.engine;
    const int64_t out = node.out_channels;
    constexpr auto bf16 = memory::data_type::bf16;
    // Weights are kept as [out][row][column][in], which is the matrix [out, taps].
    parameter_ = &context.parameter(node.name + ".weight", out * taps_,
                                    static_cast<size_t>(out * taps_) * sizeof(float), true);
    parameter_->dims = convolution_of(node, context.batch).weights_dims();
    parameter_->layout =
        memory::desc(parameter_->dims, memory::data_type::f32, memory::format_tag::ohwi);
    columns_ = AlignedMemory(static_cast<size_t>(rows_ * taps_) * sizeof(Bf16));

    // One rounded copy serves both directions: blocking it as oneDNN prefers costs more than it
    // saves.
    weights_ = memory(matrix(out, taps_, bf16), engine);
    const memory masters(matrix(out, taps_), engine, parameter_->values.data());
    reorder_ = context.reorder(masters, weights_);
    forward_ = context.product(
        columns(bf16), memory(transposed(taps_, out, bf16), engine, weights_.get_data_handle()),
        output.buffer->view(matrix(rows_, out, bf16), engine));
  }

  void reorder_weights() override { reorder_.run(context_.stream); }

  void forward() override {
    const auto* x = x_->data<const Bf16>();
    const int64_t in_size = window_.in_size * window_.in_size * node_.in_channels;
    const int64_t size = rows_ / context_.batch * taps_;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < context_.batch; ++n) {
      loops_.unfold(x + n * in_size, columns_.data<Bf16>() + n * size, node_.in_channels, window_);
    }
    forward_.run(context_.stream);
  }

  void plan_backward(const std::vector<Buffer*>& gradients) override {
    const onednn::engine& engine = context_.engine;
    const int64_t out = node_.out_channels;
    constexpr auto bf16 = memory::data_type::bf16;
    // dW [out, taps] = dy^T columns; dcolumns [rows, taps] = dy W, in fp32 as up to kernel^2 are
    // added.
    backward_weights_ =
        context_.product(gradients[0]->view(transposed(out, rows_, bf16), engine), columns(bf16),
                         memory(matrix(out, taps_), engine, parameter_->gradient.data()));
    dcolumns_ = context_.take(static_cast<size_t>(rows_ * taps_) * sizeof(float));
    backward_data_ = context_.product(gradients[0]->view(matrix(rows_, out, bf16), engine),
                                      weights_, dcolumns_->view(matrix(rows_, taps_), engine));
    dx_ = context_.take(static_cast<size_t>(context_.outputs[node_.input].layout.elements()) *
                        sizeof(Bf16));
    context_.gradients[node_.input].push_back(dx_);
    context_.release(dcolumns_);
    context_.release(gradients[0]);
  }

  void backward() override {
    backward_weights_.run(context_.stream);
    backward_data_.run(context_.stream);
    auto* dx = dx_->data<Bf16>();
    const int64_t in_size = window_.in_size * window_.in_size * node_.in_channels;
    const int64_t size = rows_ / context_.batch * taps_;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < context_.batch; ++n) {
      loops_.fold(dcolumns_->data<const float>() + n * size, dx + n * in_size, node_.in_channels,
                  window_);
    }
  }

 private:
  memory columns(memory::data_type type) const {
    return {matrix(rows_, taps_, type), context_.engine, columns_.data()};
  }

  Context& context_;
  const Node& node_;
  const ElementLoops<Bf16>& loops_;
  Window window_;
  int64_t rows_;  // output pixels of the batch
  int64_t taps_;  // weights of one output channel
  Buffer *x_, *dcolumns_ = nullptr, *dx_ = nullptr;
  AlignedMemory columns_;  // [rows, taps]
  Parameter* parameter_ = nullptr;
  memory weights_;  // [out, taps] in bf16
  onednn::Call reorder_, forward_, backward_weights_, backward_data_;
};

// Batch-norm over planes or vectors, with the residual sum and the ReLU after it in the same pass.
template <typename Element>
class BatchNormLayer : public Layer {
 public:
  BatchNormLayer(Context& context, const Node& node, const Output& output)
      : context_(context),
        node_(node),
        loops_(context.loops.of<Element>()),
        layout_(output.layout),
        y_(output.buffer),
        values_per_channel_(context.batch * output.layout.plane.pixels) {
    if (values_per_channel_ < 2) {
      throw Error(codes::kConfig, "The batch-norm '" + node.name +
                                      "' has one value per channel in a batch of one, which has no "
                                      "variance; use a batch of 2 or more.");
    }
    x_ = context.outputs[node.input].buffer;
    if (node.residual >= 0) residual_ = context.outputs[node.residual].buffer;
    const int64_t channels = layout_.padded_channels();
    const size_t bytes = static_cast<size_t>(channels) * sizeof(float);
    if (node.fixed_scale) {
      fixed_scale_ = AlignedMemory(bytes);
      std::fill_n(fixed_scale_.data<float>(), channels, 1.0F);
    } else {
      gamma_ = &context.parameter(node.name + ".weight", node.out_channels, bytes, false);
      std::fill_n(gamma_->values.template data<float>(), node.out_channels, 1.0F);
    }
    beta_ = &context.parameter(node.name + ".bias", node.out_channels, bytes, false);
    running_mean_ = &context.statistic(node.name + ".running_mean", node.out_channels);
    running_var_ = &context.statistic(node.name + ".running_var", node.out_channels);
    std::fill_n(running_var_->values.template data<float>(), node.out_channels, 1.0F);
    for (AlignedMemory* constants : {&mean_, &inverse_deviation_, &scale_, &by_x_, &offset_}) {
      *constants = AlignedMemory(bytes);
    }
    partial_ = AlignedMemory(bytes * static_cast<size_t>(context.batch));
    partial_x_ = AlignedMemory(bytes * static_cast<size_t>(context.batch));
  }

  void forward() override {
    const int64_t size = layout_.elements_per_plane();
    const auto* x = x_->template data<const Element>();
    const auto* residual =
        residual_ == nullptr ? nullptr : residual_->template data<const Element>();
    auto* y = y_->template data<Element>();
    auto* means = partial_.data<float>();
    auto* squares = partial_x_.data<float>();
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < layout_.planes; ++i) {
        loops_.statistics(x + i * size, layout_.plane, means + i * layout_.plane.channels,
                          squares + i * layout_.plane.channels);
      }
#pragma omp for schedule(static)
      for (int64_t c = 0; c < node_.out_channels; ++c) finish_statistics(c);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < layout_.planes; ++i) {
        loops_.normalise(x + i * size, residual == nullptr ? nullptr : residual + i * size,
                         y + i * size, layout_.plane, affine(i),
                         node_.activation == Activation::relu);
      }
    }
  }

  void plan_backward(const std::vector<Buffer*>& gradients) override {
    d1_ = gradients[0];
    d2_ = gradients.size() > 1 ? gradients[1] : nullptr;
    // A convolution or linear layer never looks at its own output again: the gradient takes its
    // place.
    const Op producer = context_.nodes[node_.input].op;
    const bool in_place = context_.outputs[node_.input].consumers == 1 &&
                          (producer == Op::convolution || producer == Op::linear);
    dx_ = in_place ? x_ : context_.take(static_cast<size_t>(layout_.elements()) * sizeof(Element));
    context_.gradients[node_.input].push_back(dx_);
    if (d2_ != nullptr) context_.release(d2_);
    // The masked sum of the gradients, which stands in d1 now, is the residual's gradient.
    if (node_.residual >= 0) {
      context_.gradients[node_.residual].push_back(d1_);
    } else {
      context_.release(d1_);
    }
    if (node_.activation == Activation::relu) {
      mask_ = node_.residual >= 0 ? Mask::from_output : Mask::from_input;
    }
  }

  void backward() override {
    const int64_t size = layout_.elements_per_plane();
    const auto* x = x_->template data<const Element>();
    const auto* y = y_->template data<const Element>();
    auto* d1 = d1_->template data<Element>();
    const auto* d2 = d2_ == nullptr ? nullptr : d2_->template data<const Element>();
    auto* dx = dx_->template data<Element>();
    auto* sums = partial_.data<float>();
    auto* sums_x = partial_x_.data<float>();
#pragma omp parallel
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < layout_.planes; ++i) {
        loops_.backward_sums(x + i * size, y + i * size, d1 + i * size,
                             d2 == nullptr ? nullptr : d2 + i * size, layout_.plane, affine(i),
                             mask_, sums + i * layout_.plane.channels,
                             sums_x + i * layout_.plane.channels);
      }
#pragma omp for schedule(static)
      for (int64_t c = 0; c < node_.out_channels; ++c) finish_gradient(c);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < layout_.planes; ++i) {
        const int64_t c = first_channel(i);
        loops_.backward_apply(x + i * size, d1 + i * size, dx + i * size, layout_.plane, affine(i),
                              mask_ == Mask::from_input, by_x_.data<float>() + c,
                              offset_.data<float>() + c);
      }
    }
  }

 private:
  int64_t first_channel(int64_t plane) const {
    return plane % layout_.blocks * layout_.plane.channels;
  }

  Affine affine(int64_t plane) const {
    const int64_t c = first_channel(plane);
    return {mean_.data<float>() + c, scale_.data<float>() + c, beta_->values.data<float>() + c};
  }

  const float* gamma() const {
    return gamma_ == nullptr ? fixed_scale_.data<float>() : gamma_->values.data<float>();
  }

  // Joins the planes' statistics of one channel (Chan, Golub, LeVeque 1983; equal counts) and moves
  // the running ones.
  void finish_statistics(int64_t c) {
    const int64_t stride = layout_.padded_channels();
    const auto* means = partial_.data<float>() + c;
    const auto* squares = partial_x_.data<float>() + c;
    double mean = 0, m2 = 0, between = 0;
    for (int64_t n = 0; n < context_.batch; ++n) mean += means[n * stride];
    mean /= static_cast<double>(context_.batch);
    for (int64_t n = 0; n < context_.batch; ++n) {
      const double deviation = means[n * stride] - mean;
      between += deviation * deviation;
      m2 += squares[n * stride];
    }
    m2 += between * static_cast<double>(layout_.plane.pixels);
    const auto count = static_cast<double>(values_per_channel_);
    const double inverse = 1 / std::sqrt(m2 / count + kBatchNormEpsilon);
    mean_.data<float>()[c] = static_cast<float>(mean);
    inverse_deviation_.data<float>()[c] = static_cast<float>(inverse);
    scale_.data<float>()[c] = static_cast<float>(gamma()[c] * inverse);
    const auto move = [](float& running, double value) {
      running = static_cast<float>((1 - kBatchNormMomentum) * running + kBatchNormMomentum * value);
    };
    move(running_mean_->values.data<float>()[c], mean);
    move(running_var_->values.data<float>()[c], m2 / (count - 1));
  }

  // With x^ = (x - mean) r: dbeta = sum g, dgamma = sum g x^,
  // dx = gamma r (g - dbeta / count - x^ dgamma / count).
  void finish_gradient(int64_t c) {
    const int64_t stride = layout_.padded_channels();
    const auto* sums = partial_.data<float>() + c;
    const auto* sums_x = partial_x_.data<float>() + c;
    double sum = 0, sum_x = 0;
    for (int64_t n = 0; n < context_.batch; ++n) {
      sum += sums[n * stride];
      sum_x += sums_x[n * stride];
    }
    const double inverse = inverse_deviation_.data<float>()[c];
    const double scale = scale_.data<float>()[c];
    const auto count = static_cast<double>(values_per_channel_);
    beta_->gradient.data<float>()[c] = static_cast<float>(sum);
    if (gamma_ != nullptr) gamma_->gradient.data<float>()[c] = static_cast<float>(sum_x * inverse);
    by_x_.data<float>()[c] = static_cast<float>(-scale * inverse * inverse * sum_x / count);
    offset_.data<float>()[c] = static_cast<float>(-scale * sum / count);
  }

  Context& context_;
  const Node& node_;
  const ElementLoops<Element>& loops_;
  Layout layout_;
  Buffer *x_ = nullptr, *residual_ = nullptr, *y_ = nullptr;
  Buffer *d1_ = nullptr, *d2_ = nullptr, *dx_ = nullptr;
  Mask mask_ = Mask::none;
  int64_t values_per_channel_;
  Parameter *gamma_ = nullptr, *beta_ = nullptr;
  Statistic *running_mean_ = nullptr, *running_var_ = nullptr;
  AlignedMemory fixed_scale_, mean_, inverse_deviation_, scale_, by_x_, offset_;  // [channels]
  AlignedMemory partial_, partial_x_;  // [batch, channels]
};

template <typename Element>
class MaxPoolLayer : public Layer {
 public:
  MaxPoolLayer(Context& context, const Node& node, const Output& output)
      : context_(context),
        node_(node),
        loops_(context.loops.of<Element>()),
        in_(context.outputs[node.input].layout),
        out_(output.layout),
        x_(context.outputs[node.input].buffer),
        y_(output.buffer),
        where_(static_cast<size_t>(output.layout.elements())),
        window_{node.in_size, node.out_size, node.kernel, node.stride, node.padding} {}

  void forward() override {
    const auto* x = x_->template data<const Element>();
    auto* y = y_->template data<Element>();
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < out_.planes; ++i) {
      loops_.max_pool(x + i * in_.elements_per_plane(), y + i * out_.elements_per_plane(),
                      where_.data<uint8_t>() + i * out_.elements_per_plane(), out_.plane.channels,
                      window_);
    }
  }

  void plan_backward(const std::vector<Buffer*>& gradients) override {
    dy_ = gradients[0];
    dx_ = context_.take(static_cast<size_t>(in_.elements()) * sizeof(Element));
    context_.gradients[node_.input].push_back(dx_);
    context_.release(dy_);
  }

  void backward() override {
    const auto* dy = dy_->template data<const Element>();
    auto* dx = dx_->template data<Element>();
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < out_.planes; ++i) {
      loops_.max_pool_backward(dy + i * out_.elements_per_plane(),
                               where_.data<uint8_t>() + i * out_.elements_per_plane(),
                               dx + i * in_.elements_per_plane(), out_.plane.channels, window_);
    }
  }

 private:
  Context& context_;
  const Node& node_;
  const ElementLoops<Element>& loops_;
  Layout in_, out_;
  Buffer *x_, *y_, *dy_ = nullptr, *dx_ = nullptr;
  AlignedMemory where_;
  Window window_;
};

// From planes to fp32 vectors. Blocks of channels follow each other in both.
template <typename Element>
class AveragePoolLayer : public Layer {
 public:
  AveragePoolLayer(Context& context, const Node& node, const Output& output)
      : context_(context),
        node_(node),
        loops_(context.loops.of<Element>()),
        in_(context.outputs[node.input].layout),
        x_(context.outputs[node.input].buffer),
        y_(output.buffer),
        padded_(static_cast<size_t>(in_.planes * in_.plane.channels) * sizeof(float)) {}

  void forward() override {
    const auto* x = x_->template data<const Element>();
    const int64_t block = in_.plane.channels;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < in_.planes; ++i) {
      loops_.average(x + i * in_.elements_per_plane(), padded_.data<float>() + i * block,
                     in_.plane);
    }
    copy(padded_.data<float>(), in_.padded_channels(), y_->template data<float>(),
         node_.out_channels);
  }

  void plan_backward(const std::vector<Buffer*>& gradients) override {
    dy_ = gradients[0];
    dx_ = context_.take(static_cast<size_t>(in_.elements()) * sizeof(Element));
    context_.gradients[node_.input].push_back(dx_);
    context_.release(dy_);
  }

  void backward() override {
    auto* dx = dx_->template data<Element>();
    const int64_t block = in_.plane.channels;
    copy(dy_->template data<float>(), node_.out_channels, padded_.data<float>(),
         in_.padded_channels());
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < in_.planes; ++i) {
      loops_.average_backward(padded_.data<float>() + i * block, dx + i * in_.elements_per_plane(),
                              in_.plane);
    }
  }

 private:
  void copy(const float* from, int64_t from_stride, float* to, int64_t to_stride) const {
    for (int64_t n = 0; n < context_.batch; ++n) {
      std::memcpy(to + n * to_stride, from + n * from_stride,
                  static_cast<size_t>(node_.out_channels) * sizeof(float));
    }
  }

  Context& context_;
  const Node& node_;
  const ElementLoops<Element>& loops_;
  Layout in_;
  Buffer *x_, *y_, *dy_ = nullptr, *dx_ = nullptr;
  AlignedMemory padded_;  // [batch, padded channels]
};

class LinearLayer : public Layer {
 public:
  LinearLayer(Context& context, const Node& node, const Output& output, uint64_t seed)
      : context_(context), node_(node) {
    const int64_t in = node.in_channels, out = node.out_channels;
    weight_ = &context.parameter(node.name + ".weight", in * out,
                                 static_cast<size_t>(in * out) * sizeof(float), true);
    bias_ = &context.parameter(node.name + ".bias", out, static_cast<size_t>(out) * sizeof(float),
                               false);
    initialise_linear(node, seed, {weight_->values.data<float>(), static_cast<size_t>(in * out)},
                      {bias_->values.data<float>(), static_cast<size_t>(out)});
    x_ = context.outputs[node.input].buffer;
    y_ = output.buffer;
    // y [batch, out] = x [batch, in] W^T, W [out, in]
    forward_ = context.product(x_->view(matrix(context.batch, in), context.engine),
                               memory(transposed(in, out), context.engine, weight_->values.data()),
                               y_->view(matrix(context.batch, out), context.engine));
  }

  void forward() override {
    forward_.run(context_.stream);
    const auto* bias = bias_->values.data<float>();
    for (int64_t n = 0; n < context_.batch; ++n) {
      context_.loops.fp32.add(y_->data<float>() + n * node_.out_channels, bias, node_.out_channels);
    }
  }

  void plan_backward(const std::vector<Buffer*>& gradients) override {
    const onednn::engine& engine = context_.engine;
    const int64_t batch = context_.batch, in = node_.in_channels, out = node_.out_channels;
    dy_ = gradients[0];
    Buffer* dx = context_.take(static_cast<size_t>(batch * in) * sizeof(float));
    context_.gradients[node_.input].push_back(dx);
    // dW [out, in] = dy^T x; dx [batch, in] = dy W
    backward_weight_ = context_.product(dy_->view(transposed(out, batch), engine),
                                        x_->view(matrix(batch, in), engine),
                                        memory(matrix(out, in), engine, weight_->gradient.data()));
    backward_data_ = context_.product(dy_->view(matrix(batch, out), engine),
                                      memory(matrix(out, in), engine, weight_->values.data()),
                                      dx->view(matrix(batch, in), engine));
    context_.release(dy_);
  }

  void backward() override {
    backward_weight_.run(context_.stream);
    backward_data_.run(context_.stream);
    auto* gradient = bias_->gradient.data<float>();
    std::fill_n(gradient, node_.out_channels, 0.0F);
    for (int64_t n = 0; n < context_.batch; ++n) {
      context_.loops.fp32.add(gradient, dy_->data<float>() + n * node_.out_channels,
                              node_.out_channels);
    }
  }

 private:
  Context& context_;
  const Node& node_;
  Parameter *weight_ = nullptr, *bias_ = nullptr;
  Buffer *x_ = nullptr, *y_ = nullptr, *dy_ = nullptr;
  onednn::Call forward_, backward_weight_, backward_data_;
};

bool all_finite(const float* values, int64_t count) {
  return std::all_of(values, values + count, [](float value) { return std::isfinite(value); });
}

bool all_finite(const Bf16* values, int64_t count) {
  constexpr uint16_t kExponent = 0x7F80;  // all ones: infinity or NaN
  return std::all_of(values, values + count,
                     [](Bf16 value) { return (value.bits & kExponent) != kExponent; });
}

}  // namespace

class TrainingNetwork::Impl {
 public:
  Impl(std::vector<Node> nodes, int64_t batch, Precision precision, int threads, uint64_t seed)
      : threads_(threads), type_(data_type_of(precision)) {
    if (batch < 1) {
      throw Error(codes::kConfig,
                  "The batch is " + std::to_string(batch) + " images; use 1 or more.");
    }
    use_threads();
    context_.batch = batch;
    context_.nodes = std::move(nodes);
    context_.threads = threads;
    for (int thread = 0; thread < threads; ++thread) {
      context_.scratch.push_back(context_.own_buffer());
    }
    image_ = context_.own_buffer();
    grad_embeddings_ = context_.own_buffer();
    plan_outputs();
    for (size_t i = 0; i < context_.nodes.size(); ++i) {
      layers_.push_back(type_ == memory::data_type::bf16 ? make_layer<Bf16>(i, seed)
                                                         : make_layer<float>(i, seed));
    }
    plan_backward();
    for (const auto& buffer : context_.buffers) buffer->allocate();
    plan_update();
    tensors_ = training_tensors(context_.nodes);
    for (const Node& node : context_.nodes) {
      if (node.op != Op::convolution) continue;
      std::vector<float> weight(
          static_cast<size_t>(node.out_channels * node.in_channels * node.kernel * node.kernel));
      initialise_convolution(node, seed, weight);
      write(node.name + ".weight", weight);
    }
  }

  const std::vector<Node>& nodes() const { return context_.nodes; }
  int64_t embedding() const { return context_.nodes.back().out_channels; }
  const std::vector<TensorInfo>& tensors() const { return tensors_; }

  std::span<const float> forward(const uint8_t* images, const Augmentation* augmentations) {
    use_threads();
    if (std::exchange(context_.operands_stale, false)) {
      for (const auto& layer : layers_) layer->reorder_weights();
    }
    if (type_ == memory::data_type::bf16) {
      load_images<Bf16>(images, augmentations);
    } else {
      load_images<float>(images, augmentations);
    }
    for (const auto& layer : layers_) layer->forward();
    return {context_.outputs.back().buffer->data<float>(),
            static_cast<size_t>(context_.batch * embedding())};
  }

  void backward(std::span<const float> grad_embeddings) {
    use_threads();
    std::memcpy(grad_embeddings_->data<float>(), grad_embeddings.data(),
                grad_embeddings.size_bytes());
    for (size_t i = layers_.size(); i-- > 0;) {
      for (const Sum& sum : sums_[i]) add(sum);
      layers_[i]->backward();
    }
  }

  void update(const StepSettings& settings) {
    use_threads();
    const auto count = static_cast<int64_t>(pieces_.size());
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const Piece& piece = pieces_[static_cast<size_t>(i)];
      const bool decays = piece.parameter->decays || settings.decay_all;
      context_.loops.sgd(piece.parameter->values.data<float>() + piece.first,
                         piece.parameter->momentum.data<float>() + piece.first,
                         piece.parameter->gradient.data<float>() + piece.first, piece.count,
                         settings.lr, settings.momentum, decays ? settings.weight_decay : 0.0F);
    }
    context_.operands_stale = true;
  }

  void read(const std::string& name, std::span<float> values) const {
    const TensorInfo& tensor = find_tensor(tensors_, name, values.size());
    if (tensor.role == TensorRole::statistic) {
      std::memcpy(values.data(), statistic(name).values.data(), values.size_bytes());
    } else if (tensor.role == TensorRole::optimizer) {
      const Parameter& of = parameter(name.substr(kMomentumPrefix.size()));
      read_parameter(of, of.momentum, values);
    } else {
      const Parameter& of = parameter(name);
      read_parameter(of, of.values, values);
    }
  }

  void read_gradient(const std::string& name, std::span<float> values) const {
    const TensorInfo& tensor = find_tensor(tensors_, name, values.size());
    if (tensor.role != TensorRole::parameter) {
      throw Error(codes::kInput, "The tensor '" + name + "' is no parameter and has no gradient.");
    }
    const Parameter& of = parameter(name);
    read_parameter(of, of.gradient, values);
  }

  void write(const std::string& name, std::span<const float> values) {
    const TensorInfo& tensor = find_tensor(tensors_, name, values.size());
    if (tensor.role == TensorRole::statistic) {
      std::memcpy(statistic(name).values.data(), values.data(), values.size_bytes());
    } else if (tensor.role == TensorRole::optimizer) {
      const Parameter& of = parameter(name.substr(kMomentumPrefix.size()));
      write_parameter(of, of.momentum, values);
    } else {
      const Parameter& of = parameter(name);
      write_parameter(of, of.values, values);
      context_.operands_stale = true;
    }
  }

  std::string first_non_finite() const {
    for (const auto& of : context_.parameters) {
      if (!all_finite(of->values.data<float>(), of->count)) return of->name;
    }
    for (size_t i = 0; i < context_.nodes.size(); ++i) {
      const Output& output = context_.outputs[i];
      const int64_t count = output.layout.elements();
      const bool finite = output.vector || type_ == memory::data_type::f32
                              ? all_finite(output.buffer->data<float>(), count)
                              : all_finite(output.buffer->data<Bf16>(), count);
      if (!finite) return "output of " + context_.nodes[i].name;
    }
    return {};
  }

 private:
  struct Sum {
    Buffer* total;
    const Buffer* other;
    int64_t count;
    bool bf16;
  };
  struct Piece {
    const Parameter* parameter;
    int64_t first, count;
  };
  inline static const std::string kMomentumPrefix = "momentum/";

  void use_threads() const {
    omp_set_num_threads(threads_);
  }

  void plan_outputs() {
    const std::vector<Node>& nodes = context_.nodes;
    const MapFormat format(context_.engine, nodes, context_.batch, type_);
    context_.outputs.resize(nodes.size());
    context_.gradients.resize(nodes.size());
    int image_readers = 0;
    for (size_t i = 0; i < nodes.size(); ++i) {
      const Node& node = nodes[i];
      if (node.input >= static_cast<int>(i) || node.residual >= static_cast<int>(i) ||
          (node.input < 0 && node.op != Op::convolution)) {
        throw Error(codes::kConfig,
                    "The node '" + node.name + "' reads a node that does not come before it.");
      }
      if (node.input < 0) {
        ++image_readers;
      } else {
        ++context_.outputs[node.input].consumers;
      }
      if (node.residual >= 0) ++context_.outputs[node.residual].consumers;
      Output& output = context_.outputs[i];
      output.buffer = context_.own_buffer();
      output.vector = node.op == Op::global_average_pool || node.op == Op::linear ||
                      (node.op == Op::batch_norm && context_.outputs[node.input].vector);
      if (output.vector) {
        output.layout.planes = context_.batch;
        output.layout.plane = {1, node.out_channels};
      } else {
        output.layout = format.layout(context_.batch, node.out_channels, node.out_size);
        output.desc = format.desc(context_.batch, node.out_channels, node.out_size);
      }
      const size_t element =
          output.vector || type_ == memory::data_type::f32 ? sizeof(float) : sizeof(Bf16);
      output.buffer->reserve(static_cast<size_t>(output.layout.elements()) * element);
    }
    if (nodes.empty() || !context_.outputs.back().vector || image_readers != 1) {
      throw Error(codes::kConfig,
                  "A network needs one convolution that reads the image and a vector at its end.");
    }
  }

  template <typename Element>
  std::unique_ptr<Layer> make_layer(size_t index, uint64_t seed) {
    const Node& node = context_.nodes[index];
    const Output& output = context_.outputs[index];
    switch (node.op) {
      case Op::convolution: {
        if (node.input >= 0 &&
            ProductConvolutionLayer::suits(node, type_, context_.outputs[node.input].layout,
                                           output.layout)) {
          return std::make_unique<ProductConvolutionLayer>(context_, node, output);
        }
        auto layer = std::make_unique<ConvolutionLayer>(context_, node, type_, *image_);
        if (node.input < 0) {
          image_layout_ = image_layout(layer->src_desc(), node.in_size);
          image_stride_ = onednn::blocking_of(layer->src_desc()).strides[0];
        }
        return layer;
      }
      case Op::batch_norm:
        if (output.vector) return std::make_unique<BatchNormLayer<float>>(context_, node, output);
        return std::make_unique<BatchNormLayer<Element>>(context_, node, output);
      case Op::max_pool:
        return std::make_unique<MaxPoolLayer<Element>>(context_, node, output);
      case Op::global_average_pool:
        return std::make_unique<AveragePoolLayer<Element>>(context_, node, output);
      case Op::linear:
        return std::make_unique<LinearLayer>(context_, node, output, seed);
    }
    throw Error(codes::kConfig, "The node '" + node.name + "' has an unknown operation.");
  }

  void plan_backward() {
    const Output& last = context_.outputs.back();
    grad_embeddings_->reserve(static_cast<size_t>(last.layout.elements()) * sizeof(float));
    context_.gradients.back().push_back(grad_embeddings_);
    sums_.resize(layers_.size());
    for (size_t i = layers_.size(); i-- > 0;) {
      std::vector<Buffer*> gradients = context_.gradients[i];
      if (gradients.empty()) {
        throw Error(codes::kConfig,
                    "Nothing reads the output of the node '" + context_.nodes[i].name + "'.");
      }
      // Batch-norm adds two gradients as it reads them; what is more is added before.
      const size_t taken = context_.nodes[i].op == Op::batch_norm ? 2 : 1;
      const Output& output = context_.outputs[i];
      while (gradients.size() > taken) {
        sums_[i].push_back({gradients[0], gradients.back(), output.layout.elements(),
                            !output.vector && type_ == memory::data_type::bf16});
        context_.release(gradients.back());
        gradients.pop_back();
      }
      layers_[i]->plan_backward(gradients);
    }
  }

  // Splits the parameters into pieces for the threads: 64 KiB of each of the three arrays.
  void plan_update() {
    constexpr int64_t kPiece = 16384;
    for (const auto& of : context_.parameters) {
      for (int64_t first = 0; first < of->count; first += kPiece) {
        pieces_.push_back({of.get(), first, std::min(kPiece, of->count - first)});
      }
    }
  }

  template <typename Element>
  void load_images(const uint8_t* images, const Augmentation* augmentations) {
    const ElementLoops<Element>& loops = context_.loops.of<Element>();
    const int64_t bytes = image_layout_.size * image_layout_.size * 3;
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < context_.batch; ++n) {
      loops.image(images + n * bytes, image_->data<Element>() + n * image_stride_, image_layout_,
                  augmentations == nullptr ? Augmentation{} : augmentations[n]);
    }
  }

  void add(const Sum& sum) const {
    const int64_t threads = threads_;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t first = sum.count * i / threads, last = sum.count * (i + 1) / threads;
      if (sum.bf16) {
        context_.loops.bf16.add(sum.total->data<Bf16>() + first, sum.other->data<Bf16>() + first,
                                last - first);
      } else {
        context_.loops.fp32.add(sum.total->data<float>() + first, sum.other->data<float>() + first,
                                last - first);
      }
    }
  }

  const Parameter& parameter(const std::string& name) const {
    return **std::find_if(context_.parameters.begin(), context_.parameters.end(),
                          [&](const auto& of) { return of->name == name; });
  }

  const Statistic& statistic(const std::string& name) const {
    return **std::find_if(context_.statistics.begin(), context_.statistics.end(),
                          [&](const auto& of) { return of->name == name; });
  }

  void read_parameter(const Parameter& of, const AlignedMemory& from,
                      std::span<float> values) const {
    if (!of.layout) {
      std::memcpy(values.data(), from.data(), values.size_bytes());
      return;
    }
    memory plain = plain_view(of, values.data());
    memory stored(*of.layout, context_.engine, from.data());
    reorder(stored, plain);
  }

  void write_parameter(const Parameter& of, const AlignedMemory& to,
                       std::span<const float> values) const {
    if (!of.layout) {
      std::memcpy(to.data(), values.data(), values.size_bytes());
      return;
    }
    // oneDNN's memory takes a pointer to mutable memory even where it only reads.
    memory plain = plain_view(of, const_cast<float*>(values.data()));
    memory stored(*of.layout, context_.engine, to.data());
    reorder(plain, stored);
  }

  memory plain_view(const Parameter& of, float* values) const {
    return {{of.dims, memory::data_type::f32, memory::format_tag::oihw}, context_.engine, values};
  }

  void reorder(memory& from, memory& to) const {
    use_threads();
    onednn::stream stream = context_.stream;
    onednn::checked("a reorder of weights", [&] {
      dnnl::reorder(from, to).execute(stream, from, to);
      stream.wait();
    });
  }

  int threads_;
  memory::data_type type_;
  Context context_;
  Buffer* image_ = nullptr;
  Buffer* grad_embeddings_ = nullptr;
  ImageLayout image_layout_;
  int64_t image_stride_ = 0;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<std::vector<Sum>> sums_;  // before the backward of each layer
  std::vector<Piece> pieces_;
  std::vector<TensorInfo> tensors_;
};

TrainingNetwork::TrainingNetwork(std::vector<Node> nodes, int64_t batch, Precision precision,
                                 int threads, uint64_t seed)
    : impl_(std::make_unique<Impl>(std::move(nodes), batch, precision, threads, seed)) {}
TrainingNetwork::~TrainingNetwork() = default;
const std::vector<Node>& TrainingNetwork::nodes() const {
  return impl_->nodes();
}
int64_t TrainingNetwork::embedding() const {
  return impl_->embedding();
}
std::span<const float> TrainingNetwork::forward(const uint8_t* images,
                                                const Augmentation* augmentations) {
  return impl_->forward(images, augmentations);
}
void TrainingNetwork::backward(std::span<const float> grad_embeddings) {
  impl_->backward(grad_embeddings);
}
void TrainingNetwork::update(const StepSettings& settings) {
  impl_->update(settings);
}
const std::vector<TensorInfo>& TrainingNetwork::tensors() const {
  return impl_->tensors();
}
void TrainingNetwork::read(const std::string& name, std::span<float> values) const {
  impl_->read(name, values);
}
void TrainingNetwork::write(const std::string& name, std::span<const float> values) {
  impl_->write(name, values);
}
void TrainingNetwork::read_gradient(const std::string& name, std::span<float> values) const {
  impl_->read_gradient(name, values);
}
std::string TrainingNetwork::first_non_finite() const {
  return impl_->first_non_finite();
}

}  // namespace hardmine
