#include "cuda/network.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <type_traits>
#include <utility>

#include "core/initialise.h"
#include "core/tensors.h"
#include "cuda/convolution.h"
#include "cuda/device.h"
#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/input.cuh"
#include "cuda/kernels/linear.cuh"
#include "cuda/kernels/pooling.cuh"
#include "cuda/kernels/sgd.cuh"
#include "cuda/maps.h"
#include "cuda/norm_graph.h"
#include "cuda/products.h"
#include "cuda/transfer.h"

namespace hardmine::cuda {
namespace {

const std::string kMomentumPrefix = "momentum/";
const std::string kLossScale = "loss_scale";
// The way of a batch-norm that is cuDNN's.
constexpr const char* kLibrary = "library";

// A trained tensor. Convolution weights are [out, kernel, kernel, in] here and torch's [out, in,
// kernel, kernel] outside.
struct Parameter {
  std::string name;
  WeightLayout layout;
  bool is_operand = false;  // of a convolution or product: decays, and has a copy in T
  bool gradient_is_float = true;
  float* values = nullptr;
  float* momentum = nullptr;
  void* gradient = nullptr;
  void* copy = nullptr;  // operand in T; null: `values` are the operand

  const void* operand() const { return copy != nullptr ? copy : values; }
  void* operand() { return copy != nullptr ? copy : values; }
};

struct Statistic {
  std::string name;
  int64_t count = 0;
  float* values = nullptr;
};

// The streams of a step. What only waits for its own operands need not wait for the rest.
enum class Lane : uint8_t {
  main,
  shortcut,  // the convolution and batch-norm beside a block's two
  weights,   // weight gradients and what becomes of all gradients: their check and SGD
};

// Memory for a gradient: a buffer of the backward pass, or (buffer -1) an output that is not needed
// any more.
struct Gradient {
  void* values = nullptr;
  int buffer = -1;
};

// A node's output, and the one or two gradients whose sum is its gradient.
struct Output {
  int64_t rows = 0, channels = 0;
  bool vector = false;  // fp32 [batch, channels]
  void* values = nullptr;
  int readers = 0;
  std::array<Gradient, 2> gradients{};
  int gradient_count = 0;

  int64_t count() const { return rows * channels; }
};

// What a node needs besides its input and output.
struct Work {
  Lane lane = Lane::main;  // of its passes but the weight gradient
  bool splits = false;     // its output is read on both lanes
  bool merges = false;     // its residual comes from the other lane
  bool pooled = false;     // a batch-norm whose output only a max-pool reads, which then makes it
  bool applied = false;    // one whose output the convolution that reads it makes, each time
  bool summed = false;     // one whose parameters' gradients come with that convolution's dx
  // A batch-norm by one kernel keeps what it reads of this many rows; by two if there is none.
  std::optional<int> kept_forward, kept_backward;
  // By cuDNN's engine where there is one: offered until the fastest way is chosen, then taken.
  EnginePlan* library_forward = nullptr;
  EnginePlan* library_backward = nullptr;
  int weight = -1, bias = -1;  // indices of its parameters
  std::optional<size_t> part;  // of the parameters, which begins with this node
  EnginePlan* forward = nullptr;
  EnginePlan* forward_with_sums = nullptr;  // where cuDNN has one and a batch-norm follows
  EnginePlan* data = nullptr;
  EnginePlan* weights = nullptr;
  // Where cuDNN has them and it reads a batch-norm with ReLU and nothing else does: the same with
  // what that wants.
  EnginePlan* norm_forward = nullptr;
  EnginePlan* norm_weights = nullptr;
  EnginePlan* norm_data = nullptr;
  bool with_sums = false;         // whether the forward pass that runs sums its output
  float* sums = nullptr;          // [2, channels]
  void* scale_bias = nullptr;     // in T: [2, channels], of a batch-norm that may be applied
  float* coefficients = nullptr;  // [3, channels], of one that may be summed; not read
  BatchNorm norm{};
  BatchNormGradient norm_gradient{};
  uint8_t* where = nullptr;      // max_pool
  void* operand = nullptr;       // in T: global_average_pool's output, linear's dy
  std::array<Gradient, 2> dy{};  // its output's gradients
  Gradient dx{};                 // its input's
};

// Buffers of the backward pass, handed on to later layers of their lane when they are free.
class GradientBuffers {
 public:
  explicit GradientBuffers(Arena& arena) : arena_(arena) {}

  Gradient take(size_t bytes, Lane lane) {
    int best = -1;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      const Buffer& buffer = buffers_[i];
      if (!buffer.idle || buffer.lane != lane || buffer.bytes < bytes) continue;
      if (best < 0 || buffer.bytes < buffers_[static_cast<size_t>(best)].bytes)
        best = static_cast<int>(i);
    }
    if (best < 0) {
      best = static_cast<int>(buffers_.size());
      buffers_.push_back({arena_.take<char>(static_cast<int64_t>(bytes)), bytes, lane, true});
    }
    Buffer& buffer = buffers_[static_cast<size_t>(best)];
    buffer.idle = false;
    return {buffer.memory, best};
  }

  // By a node of `lane`. What one lane reads is not free for the other before the two meet.
  void release(const Gradient& gradient, Lane lane) {
    if (gradient.buffer < 0) return;
    Buffer& buffer = buffers_[static_cast<size_t>(gradient.buffer)];
    if (lane == buffer.lane && lane == Lane::main) {
      buffer.idle = true;
    } else {
      until_lanes_meet_.push_back(gradient.buffer);
    }
  }
  void lanes_meet() {
    for (const int buffer : std::exchange(until_lanes_meet_, {}))
      buffers_[static_cast<size_t>(buffer)].idle = true;
  }

 private:
  struct Buffer {
    void* memory;
    size_t bytes;
    Lane lane;
    bool idle;
  };
  Arena& arena_;
  std::vector<Buffer> buffers_;
  std::vector<int> until_lanes_meet_;
};

template <typename T>
class NetworkOf : public TrainingNetwork {
 public:
  NetworkOf(std::vector<Node> nodes, int64_t batch, Precision precision, bool deterministic,
            const Libraries& libraries, const Stream& stream)
      : nodes_(std::move(nodes)),
        batch_(batch),
        precision_(precision),
        deterministic_(deterministic),
        stream_(stream),
        engines_(libraries.cudnn, {.deterministic = deterministic, .device = device_and_driver()}),
        cublas_lt_(libraries.cublas_lt),
        cooperative_(cooperative_limits()),
        tensors_(training_tensors(nodes_)) {
    if (scales()) tensors_.push_back({kLossScale, {2}, TensorRole::optimizer});
    plan_outputs();
    work_.resize(nodes_.size());
    for (const Lane lane : {Lane::main, Lane::shortcut, Lane::weights})
      engines_.prepare(lane == Lane::main ? stream_ : side(lane).stream());
    plan_pooled();
    for (size_t i = 0; i < nodes_.size(); ++i) plan_work(i);
    for (size_t i = 0; i < nodes_.size(); ++i) plan_lanes(i);
    for (size_t i = 0; i < nodes_.size(); ++i) plan_library(i);
    plan_parts();
  }

  const std::vector<Node>& nodes() const override { return nodes_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  std::string engines() const override {
    std::string text = engines_.describe();
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Work& work = work_[i];
      for (const auto& [does, what] :
           {std::pair{work.with_sums, " with sums"},
            std::pair{work.library_forward != nullptr, " forward by cuDNN"},
            std::pair{work.library_backward != nullptr, " backward by cuDNN"},
            std::pair{work.applied, " applied by its reader"},
            std::pair{work.summed, " summed by its reader"}})
        if (does) text += "; " + nodes_[i].name + what;
    }
    return text;
  }

  void layout_state(Arena& arena) override {
    for (Parameter& of : parameters_) {
      const int64_t count = of.layout.stored_count();
      of.values = arena.take<float>(count);
      of.momentum = arena.take<float>(count);
      of.gradient = of.gradient_is_float ? static_cast<void*>(arena.take<float>(count))
                                         : static_cast<void*>(arena.take<T>(count));
      if (of.is_operand && !std::is_same_v<T, float>) of.copy = arena.take<T>(count);
    }
    for (Statistic& of : statistics_) of.values = arena.take<float>(of.count);
    table_ = arena.take<ParameterTensor<T>>(static_cast<int64_t>(parameters_.size()));
    ranges_ = arena.take<ParameterRange>(range_count());
    loss_scale_ = arena.take<LossScale>(1);
    pending_ = arena.take<PendingUpdate>(1);
    layout_workspaces(arena);
  }

  void layout_batch(Arena& arena) override {
    const int64_t size = nodes_.front().in_size;
    image_ = arena.take<T>(batch_ * size * size * kImageChannels);
    for (size_t i = 0; i < nodes_.size(); ++i) layout_node(arena, i);
    layout_backward(arena);
    int64_t scratch_values = 0, scratch_arrivals = 0;
    for (const auto& [rows, channels] : norm_shapes_) {
      for (const BatchNormScratchSize& scratch : {batch_norm_scratch_size<T>(rows, channels),
                                                  batch_norm_scratch_size<float>(rows, channels)}) {
        scratch_values = std::max(scratch_values, scratch.values);
        scratch_arrivals = std::max(scratch_arrivals, scratch.arrivals);
      }
    }
    for (const Lane lane : {Lane::main, Lane::shortcut}) {
      BatchNormScratch& scratch = memory_[static_cast<size_t>(lane)].scratch;
      scratch.values = arena.take<float>(scratch_values);
      scratch.arrivals = arena.take<unsigned>(scratch_arrivals);
      // Two on each multiprocessor, as on an H100, so that all of them have a place at once.
      if (const int count = cooperative_.multiprocessors; count > 0)
        scratch.blocks = std::min(kReductionBlocks, 2 * int64_t{count});
    }
  }

  void prepare() override {
    const LaneMemory& memory = memory_of(Lane::main);
    products_.emplace(cublas_lt_, stream_.get(), memory.workspace, memory.workspace_bytes);
    if (!deterministic_) fill_with_numbers();
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Work& work = work_[i];
      if (work.forward == nullptr) continue;
      work.forward->choose(forward_pointers(i, false), stream_);
      work.weights->choose(weight_pointers(i), stream_);
      if (work.data != nullptr) work.data->choose(data_pointers(i), stream_);
    }
    blocks_wait_ = false;  // engines that are offered only run where one may fail
    run_forward();
    blocks_wait_ = true;
    for (size_t i = 0; i < nodes_.size(); ++i)
      if (nodes_[i].op == Op::batch_norm) choose_norm(i);
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (work_[i].norm_forward != nullptr && work_[i].norm_weights != nullptr) choose_applied(i);
      if (work_[i].norm_data != nullptr) choose_summed(i);
    }
    drop_library();
    write_tables();
    // An update by nothing takes as long as any.
    write_pending({.valid = 1});
    choose_lanes();
    run_passes();
    stream_.synchronize();
  }

  void initialise(uint64_t seed) override {
    for (const Parameter& of : parameters_) {
      fill(of.values, of.layout.stored_count(), 0.0F);
      fill(of.momentum, of.layout.stored_count(), 0.0F);
    }
    for (const Statistic& of : statistics_)
      fill(of.values, of.count, of.name.ends_with(".running_var") ? 1.0F : 0.0F);
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Node& node = nodes_[i];
      const Work& work = work_[i];
      if (work.weight < 0) continue;
      const Parameter& weight = parameters_[static_cast<size_t>(work.weight)];
      std::vector<float> values(static_cast<size_t>(weight.layout.count()), 1.0F);
      if (node.op == Op::convolution) initialise_convolution(node, seed, values);
      if (node.op == Op::linear) {
        std::vector<float> bias(static_cast<size_t>(node.out_channels));
        initialise_linear(node, seed, values, bias);
        write(node.name + ".bias", bias);
      }
      write(weight.name, values);
    }
    write_loss_scale(scales() ? first_loss_scale() : LossScale{});
    write_pending({});
  }

  const float* forward(const uint8_t* images, const Augmentation* augmentations) override {
    begin_update();
    load_images(images, augmentations, {}, batch_, static_cast<int>(nodes_.front().in_size), image_,
                stream_.get());
    run_forward();
    return static_cast<const float*>(outputs_.back().values);
  }

  void backward(const float* grad_embeddings) override {
    convert(grad_embeddings, &loss_scale_->scale, outputs_.back().count(),
            static_cast<float*>(outputs_.back().gradients[0].values), stream_.get());
    run_backward();
  }

  void conclude(const StepParameters* parameters) override {
    conclude_step(parameters, loss_scale_, pending_, scales(), stream_.get());
  }

  void apply_pending() override {
    sgd(table_, ranges_, range_count(), pending_, stream_.get());
    check(cudaMemsetAsync(pending_, 0, sizeof *pending_, stream_.get()), "cudaMemsetAsync");
  }

  void read(const std::string& name, std::span<float> values) const override {
    const TensorInfo& tensor = find_tensor(tensors_, name, values.size());
    if (tensor.role == TensorRole::statistic) {
      read_device(statistic(name).values, values, stream_);
    } else if (name == kLossScale) {
      const LossScale scale = loss_scale();
      values[0] = scale.scale;
      values[1] = static_cast<float>(scale.good_steps);
    } else if (tensor.role == TensorRole::optimizer) {
      const Parameter& of = parameter(name.substr(kMomentumPrefix.size()));
      read_parameter(of, of.momentum, values);
    } else {
      const Parameter& of = parameter(name);
      read_parameter(of, of.values, values);
    }
  }

  void write(const std::string& name, std::span<const float> values) override {
    const TensorInfo& tensor = find_tensor(tensors_, name, values.size());
    if (tensor.role == TensorRole::statistic) {
      write_device(statistic(name).values, values, stream_);
    } else if (name == kLossScale) {
      restore_loss_scale(values[0], values[1]);
    } else if (tensor.role == TensorRole::optimizer) {
      const Parameter& of = parameter(name.substr(kMomentumPrefix.size()));
      write_device(of.momentum, of.layout.to_stored(values), stream_);
    } else {
      const Parameter& of = parameter(name);
      write_device(of.values, of.layout.to_stored(values), stream_);
      if (of.copy != nullptr) {
        convert(of.values, nullptr, of.layout.stored_count(), static_cast<T*>(of.copy),
                stream_.get());
      }
    }
  }

  void read_gradient(const std::string& name, std::span<float> values) const override {
    const TensorInfo& tensor = find_tensor(tensors_, name, values.size());
    if (tensor.role != TensorRole::parameter) {
      throw Error(codes::kInput, "The tensor '" + name + "' is no parameter and has no gradient.");
    }
    const Parameter& of = parameter(name);
    std::vector<float> stored(static_cast<size_t>(of.layout.stored_count()));
    if (of.gradient_is_float) {
      read_device(static_cast<const float*>(of.gradient), stored, stream_);
    } else {
      std::vector<T> raw(stored.size());
      read_device(static_cast<const T*>(of.gradient), raw, stream_);
      std::transform(raw.begin(), raw.end(), stored.begin(), [](T x) { return to_float(x); });
    }
    of.layout.from_stored(stored, values);
    const float scale = loss_scale().scale;
    for (float& value : values) value /= scale;
  }

  LossScale loss_scale() const override {
    LossScale scale;
    read_device(loss_scale_, std::span(&scale, 1), stream_);
    return scale;
  }

  void write_loss_scale(const LossScale& scale) override {
    write_device(loss_scale_, std::span(&scale, 1), stream_);
  }

  std::string first_non_finite() const override {
    for (const Parameter& of : parameters_) {
      std::vector<float> values(static_cast<size_t>(of.layout.stored_count()));
      read_device(of.values, values, stream_);
      if (!all_finite(values)) return of.name;
    }
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Output& output = outputs_[i];
      if (output.values == nullptr || work_[i].applied) continue;
      const auto count = static_cast<size_t>(output.count());
      bool finite;
      if (output.vector) {
        std::vector<float> values(count);
        read_device(static_cast<const float*>(output.values), values, stream_);
        finite = all_finite(values);
      } else {
        std::vector<T> values(count);
        read_device(static_cast<const T*>(output.values), values, stream_);
        finite = all_finite(values);
      }
      if (!finite) return "output of " + nodes_[i].name;
    }
    return {};
  }

 private:
  // ---- Planning ----

  [[noreturn]] static void refuse(const Node& node, const std::string& why) {
    throw Error(codes::kConfig, "The node '" + node.name + "' cannot be trained on CUDA: " + why);
  }

  void plan_outputs() {
    outputs_.resize(nodes_.size());
    int image_readers = 0;
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Node& node = nodes_[i];
      if (node.input >= static_cast<int>(i) || node.residual >= static_cast<int>(i))
        refuse(node, "it reads a node that does not come before it.");
      image_readers += node.input < 0;
      Output& output = outputs_[i];
      if (node.input >= 0) ++input(i).readers;
      if (node.residual >= 0) ++outputs_[static_cast<size_t>(node.residual)].readers;
      output.vector = node.op == Op::global_average_pool || node.op == Op::linear ||
                      (node.op == Op::batch_norm && input(i).vector);
      output.channels = node.out_channels;
      output.rows = output.vector ? batch_ : batch_ * node.out_size * node.out_size;
    }
    if (nodes_.empty() || !outputs_.back().vector || image_readers != 1 ||
        nodes_.front().op != Op::convolution || nodes_.front().input >= 0) {
      throw Error(codes::kConfig,
                  "A network needs one convolution that reads the image, at its start, and a "
                  "vector at its end.");
    }
  }

  int add_parameter(const std::string& name, WeightLayout layout, bool is_operand,
                    bool gradient_is_float) {
    Parameter of;
    of.name = name;
    of.layout = layout;
    of.is_operand = is_operand;
    of.gradient_is_float = gradient_is_float;
    parameters_.push_back(std::move(of));
    return static_cast<int>(parameters_.size()) - 1;
  }

  void plan_work(size_t i) {
    const Node& node = nodes_[i];
    Work& work = work_[i];
    switch (node.op) {
      case Op::convolution: {
        const ConvolutionShape shape = convolution_shape(node, batch_, precision_);
        work.forward = &engines_.plan(convolution_graph(shape, ConvolutionPass::forward));
        work.weights = &engines_.plan(convolution_graph(shape, ConvolutionPass::weight_gradient));
        if (node.input >= 0)
          work.data = &engines_.plan(convolution_graph(shape, ConvolutionPass::data_gradient));
        if (behind_norm(node)) {
          const auto find = [&](ConvolutionPass pass) {
            return engines_.find_plan(convolution_graph(shape, pass));
          };
          work.norm_forward = find(ConvolutionPass::norm_forward_with_sums);
          work.norm_weights = find(ConvolutionPass::norm_weight_gradient);
          work.norm_data = find(ConvolutionPass::norm_data_gradient);
        }
        // 16-bit dW: cuDNN's only engines for an fp32 one are fallbacks.
        work.weight = add_parameter(node.name + ".weight", WeightLayout::of(node), true,
                                    std::is_same_v<T, float>);
        break;
      }
      case Op::batch_norm: {
        if (outputs_[static_cast<size_t>(node.input)].readers != 1)
          refuse(node, "something else reads its input, which its gradient overwrites.");
        const WeightLayout channels = WeightLayout::vector(node.out_channels);
        if (!node.fixed_scale)
          work.weight = add_parameter(node.name + ".weight", channels, false, true);
        work.bias = add_parameter(node.name + ".bias", channels, false, true);
        statistics_.push_back({node.name + ".running_mean", node.out_channels});
        statistics_.push_back({node.name + ".running_var", node.out_channels});
        norm_shapes_.emplace_back(outputs_[i].rows, node.out_channels);
        // In fp16, the one type that cuDNN has them for on Hopper. Which is faster may differ from
        // run to run, and with it the bits.
        const Node& before = nodes_[static_cast<size_t>(node.input)];
        if (before.op == Op::convolution && precision_ == Precision::fp16 && !deterministic_ &&
            !work.pooled) {
          work_[static_cast<size_t>(node.input)].forward_with_sums =
              engines_.find_plan(convolution_graph(convolution_shape(before, batch_, precision_),
                                                   ConvolutionPass::forward_with_sums));
        }
        break;
      }
      case Op::linear:
        work.weight = add_parameter(node.name + ".weight", WeightLayout::of(node), true, true);
        work.bias = add_parameter(node.name + ".bias", WeightLayout::vector(node.out_channels),
                                  false, true);
        if (nodes_[static_cast<size_t>(node.input)].op != Op::global_average_pool)
          refuse(node, "it does not follow a global average pool.");
        break;
      case Op::max_pool:
        if (node.kernel != 3 || node.stride != 2 || node.padding != 1)
          refuse(node, "only max-pools of 3x3, stride 2 and padding 1 are written.");
        break;
      case Op::global_average_pool:
        break;
    }
  }

  // Whether a convolution may do some of the batch-norm's work that it reads: one with ReLU, which
  // nothing else reads, behind another convolution with sums.
  bool behind_norm(const Node& node) const {
    if (node.input < 0) return false;
    const auto at = static_cast<size_t>(node.input);
    const Node& norm = nodes_[at];
    return norm.op == Op::batch_norm && norm.activation == Activation::relu && norm.residual < 0 &&
           !norm.fixed_scale && outputs_[at].readers == 1 &&
           work_[static_cast<size_t>(norm.input)].forward_with_sums != nullptr;
  }

  void plan_pooled() {
    for (const Node& pool : nodes_) {
      if (pool.op != Op::max_pool) continue;
      const auto from = static_cast<size_t>(pool.input);
      const Node& norm = nodes_[from];
      work_[from].pooled = norm.op == Op::batch_norm && norm.activation == Activation::relu &&
                           norm.residual < 0 && outputs_[from].readers == 1;
    }
  }

  // Where node i adds what a chain of convolutions and batch-norms of its own brings, that chain
  // runs beside the rest of the block.
  void plan_lanes(size_t i) {
    std::vector<int> chain;
    int at = nodes_[i].residual;
    for (; at >= 0 && outputs_[static_cast<size_t>(at)].readers == 1;
         at = nodes_[static_cast<size_t>(at)].input) {
      const Node& node = nodes_[static_cast<size_t>(at)];
      if (node.op != Op::convolution && (node.op != Op::batch_norm || node.residual >= 0)) return;
      chain.push_back(at);
    }
    if (at < 0 || chain.empty()) return;
    for (const int node : chain) work_[static_cast<size_t>(node)].lane = Lane::shortcut;
    work_[static_cast<size_t>(at)].splits = true;
    work_[i].merges = true;
  }

  // cuDNN's engines for batch-norm i, on the main lane as what rows_to_keep() tells of. They are
  // compiled here, so none is wanted where another way is known to be faster.
  void plan_library(size_t i) {
    const Node& node = nodes_[i];
    Work& work = work_[i];
    if (node.op != Op::batch_norm || deterministic_ || node.fixed_scale || outputs_[i].vector ||
        work.lane != Lane::main)
      return;
    const NormShape shape{batch_, node.out_channels, node.out_size, precision_};
    const bool relu = node.activation == Activation::relu, residual = node.residual >= 0;
    const auto find = [&](const std::string& what, const Engines::Graph& graph) {
      const std::string known = engines_.recall(what);
      return known.empty() || known == kLibrary ? engines_.find_plan(graph) : nullptr;
    };
    if (!work.pooled)
      work.library_forward =
          find(describe_norm("forward", i), norm_forward_graph(shape, residual, relu));
    if (relu && !residual && outputs_[i].readers == 1)
      work.library_backward = find(describe_norm("backward", i), norm_backward_graph(shape));
  }

  void layout_workspaces(Arena& arena) {
    std::array<size_t, kLanes> bytes{product_workspace_bytes(compute_major())};
    const auto need = [&](Lane lane, const EnginePlan* plan) {
      if (plan == nullptr) return;
      // Where the lanes are one after the other, the main one runs everything.
      for (const Lane runs : {lane, Lane::main}) {
        size_t& most = bytes[static_cast<size_t>(runs)];
        most = std::max(most, plan->workspace_bytes());
      }
    };
    for (const Work& work : work_) {
      need(work.lane, work.forward);
      need(work.lane, work.forward_with_sums);
      need(work.lane, work.data);
      need(work.lane, work.norm_forward);
      need(work.lane, work.norm_data);
      need(Lane::weights, work.weights);
      need(Lane::weights, work.norm_weights);
      need(Lane::main, work.library_forward);
      need(Lane::main, work.library_backward);
    }
    for (size_t lane = 0; lane < kLanes; ++lane) {
      memory_[lane].workspace_bytes = bytes[lane];
      memory_[lane].workspace = arena.take<char>(static_cast<int64_t>(bytes[lane]));
    }
  }

  void layout_node(Arena& arena, size_t i) {
    const Node& node = nodes_[i];
    Output& output = outputs_[i];
    Work& work = work_[i];
    if (output.vector) {
      output.values = arena.take<float>(output.count());
    } else if (!work.pooled) {
      output.values = arena.take<T>(output.count());
    }
    switch (node.op) {
      case Op::batch_norm: {
        BatchNorm& norm = work.norm;
        norm.rows = output.rows;
        norm.channels = output.channels;
        norm.gamma = values_of(work.weight);
        norm.beta = values_of(work.bias);
        norm.running_mean = statistic(node.name + ".running_mean").values;
        norm.running_variance = statistic(node.name + ".running_var").values;
        norm.mean = arena.take<float>(output.channels);
        norm.inverse_deviation = arena.take<float>(output.channels);
        norm.scale = arena.take<float>(output.channels);
        work.norm_gradient = {gradient_of(work.weight), gradient_of(work.bias)};
        break;
      }
      case Op::max_pool:
        work.where = arena.take<uint8_t>(output.count());
        break;
      case Op::global_average_pool:
      case Op::linear:
        work.operand = arena.take<T>(output.count());
        break;
      case Op::convolution:
        if (work.forward_with_sums != nullptr || work.norm_forward != nullptr)
          work.sums = arena.take<float>(2 * output.channels);
        if (behind_norm(node)) {
          Work& norm = work_[static_cast<size_t>(node.input)];
          norm.scale_bias = arena.take<T>(2 * node.in_channels);
          norm.coefficients = arena.take<float>(3 * node.in_channels);
        }
        break;
    }
  }

  void layout_backward(Arena& arena) {
    GradientBuffers buffers(arena);
    for (Output& output : outputs_) {
      output.gradients = {};
      output.gradient_count = 0;
    }
    add_gradient(nodes_.size() - 1, {arena.take<float>(outputs_.back().count()), -1});
    for (size_t i = nodes_.size(); i-- > 0;) {
      const Node& node = nodes_[i];
      Work& work = work_[i];
      if (outputs_[i].gradient_count == 0) refuse(node, "nothing reads its output.");
      work.dy = outputs_[i].gradients;
      if (work.splits) buffers.lanes_meet();
      if (node.op == Op::batch_norm) {
        work.dx = {input(i).values, -1};
        buffers.release(work.dy[1], work.lane);
        if (node.residual >= 0) {
          add_gradient(static_cast<size_t>(node.residual), work.dy[0]);
        } else {
          buffers.release(work.dy[0], work.lane);
        }
      } else {
        if (outputs_[i].gradient_count > 1 && node.op != Op::max_pool)
          refuse(node, "more than one node reads its output.");
        if (node.input >= 0) {
          const Output& from = input(i);
          work.dx = buffers.take(
              static_cast<size_t>(from.count()) * (from.vector ? sizeof(float) : sizeof(T)),
              work.lane);
        }
        // A convolution's is read by its weight gradient, until the end.
        if (node.op != Op::convolution)
          for (const Gradient& gradient : work.dy) buffers.release(gradient, work.lane);
      }
      if (node.input >= 0) add_gradient(static_cast<size_t>(node.input), work.dx);
    }
  }

  void add_gradient(size_t node, const Gradient& gradient) {
    Output& output = outputs_[node];
    if (output.gradient_count == 2) refuse(nodes_[node], "more than two nodes read its output.");
    output.gradients[static_cast<size_t>(output.gradient_count++)] = gradient;
  }

  // Parameters are in the order of their nodes.
  void plan_parts() {
    std::vector<int64_t> ranges(nodes_.size());
    for (size_t i = 0; i < nodes_.size(); ++i)
      ranges[i] = ranges_of(work_[i].weight) + ranges_of(work_[i].bias);
    parts_ = parameter_parts(ranges);
    for (size_t part = 0; part < parts_.size(); ++part) work_[parts_[part].node].part = part;
  }

  int64_t ranges_of(int parameter) const {
    if (parameter < 0) return 0;
    const int64_t count = parameters_[static_cast<size_t>(parameter)].layout.stored_count();
    return (count + kRangeElements - 1) / kRangeElements;
  }
  int64_t range_count() const { return parts_.back().first + parts_.back().count; }

  void write_tables() {
    std::vector<ParameterTensor<T>> table;
    std::vector<int64_t> counts;
    for (const Parameter& of : parameters_) {
      counts.push_back(of.layout.stored_count());
      table.push_back({of.values, of.momentum, of.gradient, static_cast<T*>(of.copy), counts.back(),
                       of.gradient_is_float, of.is_operand});
    }
    const std::vector<ParameterRange> ranges = parameter_ranges(counts);
    write_device(table_, table, stream_);
    write_device(ranges_, ranges, stream_);
  }

  // ---- Running ----

  void run_passes() {
    begin_update();
    run_forward();
    run_backward();
  }

  void run_forward() {
    for (size_t i = 0; i < nodes_.size(); ++i) {
      const Node& node = nodes_[i];
      const Work& work = work_[i];
      void* y = outputs_[i].values;
      if (work.part) end_update(*work.part);
      if (work.merges) join(Lane::shortcut);
      switch (node.op) {
        case Op::convolution:
          run_convolution(i);
          break;
        case Op::batch_norm:
          run_batch_norm(i);
          break;
        case Op::max_pool:
          run_max_pool(i);
          break;
        case Op::global_average_pool:
          average_pool(batch_, node.in_size * node.in_size, node.out_channels,
                       static_cast<const T*>(input_of(i)), static_cast<float*>(y),
                       static_cast<T*>(work.operand), stream_.get());
          break;
        case Op::linear: {
          const auto* x = work_[static_cast<size_t>(node.input)].operand;
          products_->multiply({.m = batch_,
                               .n = node.out_channels,
                               .k = node.in_channels,
                               .transpose_b = true,
                               .operands = number_type<T>()},
                              1, x, parameters_[static_cast<size_t>(work.weight)].operand(), 0, y);
          apply_affine({nullptr, nullptr, values_of(work.bias)}, batch_, node.out_channels,
                       static_cast<const float*>(y), static_cast<const float*>(nullptr),
                       static_cast<float*>(y), false, stream_.get());
          break;
        }
      }
      if (work.splits) fork(Lane::main, Lane::shortcut);
    }
  }

  void run_backward() {
    for (size_t i = nodes_.size(); i-- > 0;) {
      const Node& node = nodes_[i];
      const Work& work = work_[i];
      if (work.splits) join(Lane::shortcut);
      switch (node.op) {
        case Op::convolution:
          fork(work.lane, Lane::weights);
          run_weight_gradient(i);
          if (work.data != nullptr) run_data_gradient(i);
          break;
        case Op::batch_norm:
          run_batch_norm_backward(i);
          break;
        case Op::max_pool:
          max_pool_backward(pool_shape(node), static_cast<const T*>(work.dy[0].values),
                            static_cast<const T*>(work.dy[1].values), work.where,
                            static_cast<T*>(work.dx.values), stream_.get());
          break;
        case Op::global_average_pool:
          average_pool_backward(batch_, node.in_size * node.in_size, node.out_channels,
                                static_cast<const float*>(work.dy[0].values),
                                static_cast<T*>(work.dx.values), stream_.get());
          break;
        case Op::linear:
          run_linear_backward(i);
          break;
      }
      if (work.part) check_part(*work.part);
      if (work.merges) fork(Lane::main, Lane::shortcut);
    }
    join(Lane::weights);
  }

  // The update that is pending goes from part to part on the lane of weights, ahead of the forward
  // pass.
  void begin_update() {
    fork(Lane::main, Lane::weights);
    update_part(0);
  }
  // Both lanes go on when `part` is updated, while the next one is.
  void end_update(size_t part) {
    join(Lane::weights);
    fork(Lane::weights, Lane::shortcut);
    if (part + 1 < parts_.size()) update_part(part + 1);
  }
  void update_part(size_t part) const {
    sgd(table_, ranges_ + parts_[part].first, parts_[part].count, pending_,
        stream_of(Lane::weights).get());
  }
  // Once the backward pass has been given all that makes the gradients of `part`.
  void check_part(size_t part) const {
    fork(Lane::main, Lane::weights);
    fork(Lane::shortcut, Lane::weights);
    check_gradients(table_, ranges_ + parts_[part].first, parts_[part].count, loss_scale_,
                    stream_of(Lane::weights).get());
  }

  void run_linear_backward(size_t i) {
    const Node& node = nodes_[i];
    const Work& work = work_[i];
    const Parameter& weight = parameters_[static_cast<size_t>(work.weight)];
    const auto* dy = static_cast<const float*>(work.dy[0].values);
    convert(dy, nullptr, outputs_[i].count(), static_cast<T*>(work.operand), stream_.get());
    column_sums(dy, batch_, node.out_channels, gradient_of(work.bias), stream_.get());
    products_->multiply({.m = node.out_channels,
                         .n = node.in_channels,
                         .k = batch_,
                         .transpose_a = true,
                         .operands = number_type<T>()},
                        1, work.operand, work_[static_cast<size_t>(node.input)].operand, 0,
                        weight.gradient);
    products_->multiply(
        {.m = batch_, .n = node.in_channels, .k = node.out_channels, .operands = number_type<T>()},
        1, work.operand, weight.operand(), 0, work.dx.values);
  }

  EnginePointers forward_pointers(size_t i, bool with_sums) {
    const Work& work = work_[i];
    return convolution_pointers({input_of(i), weight_of(i).operand(), outputs_[i].values,
                                 memory_of(work.lane).workspace, with_sums ? work.sums : nullptr,
                                 with_sums ? work.sums + outputs_[i].channels : nullptr});
  }
  EnginePointers weight_pointers(size_t i) {
    return convolution_pointers({input_of(i), weight_of(i).gradient, work_[i].dy[0].values,
                                 memory_of(Lane::weights).workspace});
  }
  EnginePointers data_pointers(size_t i) {
    const Work& work = work_[i];
    return convolution_pointers({work.dx.values, weight_of(i).operand(), work.dy[0].values,
                                 memory_of(work.lane).workspace});
  }
  // The same where the convolution reads a batch-norm and does some of its work.
  EnginePointers reader_forward_pointers(size_t i) {
    return applied_norm(forward_pointers(i, true), i);
  }
  EnginePointers reader_weight_pointers(size_t i) { return applied_norm(weight_pointers(i), i); }
  EnginePointers applied_norm(const EnginePointers& pointers, size_t i) {
    const auto norm = static_cast<size_t>(nodes_[i].input);
    T* scale = static_cast<T*>(work_[norm].scale_bias);
    return with_applied_norm(pointers, {input_of(norm), scale, scale + outputs_[norm].channels});
  }
  EnginePointers reader_data_pointers(size_t i) {
    const auto at = static_cast<size_t>(nodes_[i].input);
    const Work& work = work_[at];
    return with_norm_gradient(
        data_pointers(i), {input_of(at), work.norm.mean, work.norm.inverse_deviation,
                           values_of(work.weight), values_of(work.bias), work.norm_gradient.gamma,
                           work.norm_gradient.beta, work.coefficients, outputs_[at].channels});
  }

  bool applies_norm(size_t i) const {
    return nodes_[i].input >= 0 && work_[static_cast<size_t>(nodes_[i].input)].applied;
  }
  void run_convolution(size_t i) {
    const Work& work = work_[i];
    const Stream& stream = stream_of(work.lane);
    if (applies_norm(i)) {
      work.norm_forward->run(reader_forward_pointers(i), stream);
    } else {
      (work.with_sums ? work.forward_with_sums : work.forward)
          ->run(forward_pointers(i, work.with_sums), stream);
    }
  }
  void run_weight_gradient(size_t i) {
    const Work& work = work_[i];
    const Stream& stream = stream_of(Lane::weights);
    if (applies_norm(i)) {
      work.norm_weights->run(reader_weight_pointers(i), stream);
    } else {
      work.weights->run(weight_pointers(i), stream);
    }
  }
  void run_data_gradient(size_t i) {
    const Work& work = work_[i];
    const Stream& stream = stream_of(work.lane);
    if (work_[static_cast<size_t>(nodes_[i].input)].summed) {
      work.norm_data->run(reader_data_pointers(i), stream);
    } else {
      work.data->run(data_pointers(i), stream);
    }
  }

  EnginePointers library_forward_pointers(size_t i) {
    const Node& node = nodes_[i];
    const Work& work = work_[i];
    return norm_forward_pointers(
        {input_of(i),
         node.residual < 0 ? nullptr : outputs_[static_cast<size_t>(node.residual)].values,
         outputs_[i].values, values_of(work.weight), values_of(work.bias), work.norm.mean,
         work.norm.inverse_deviation, memory_of(Lane::main).workspace});
  }
  EnginePointers library_backward_pointers(size_t i) {
    const Work& work = work_[i];
    return norm_backward_pointers({input_of(i), work.dy[0].values, work.dx.values,
                                   values_of(work.weight), values_of(work.bias), work.norm.mean,
                                   work.norm.inverse_deviation, work.norm_gradient.gamma,
                                   work.norm_gradient.beta, memory_of(Lane::main).workspace});
  }

  // How batch-norm i runs: by two kernels each way, by one, by cuDNN's engine, or forward from sums
  // that come with the convolution before it, which is timed with it.
  void choose_norm(size_t i) {
    if (deterministic_) return;
    Work& work = work_[i];
    const auto from = static_cast<size_t>(nodes_[i].input);
    Work& before = work_[from];
    EnginePlan* const library_forward = work.library_forward;
    EnginePlan* const library_backward = work.library_backward;
    const auto [forward_rows, backward_rows] =
        outputs_[i].vector ? rows_to_keep<float>(i) : rows_to_keep<T>(i);
    const auto forward_by = [&](bool with_sums, std::optional<int> kept, EnginePlan* library) {
      return [&, with_sums, kept, library] {
        before.with_sums = with_sums;
        work.kept_forward = kept;
        work.library_forward = library;
        if (with_sums) before.forward_with_sums->choose(forward_pointers(from, true), stream_);
        if (library != nullptr) library->choose(library_forward_pointers(i), stream_);
      };
    };
    std::vector<Engines::Way> forward{{"two kernels", forward_by(false, {}, nullptr)}};
    if (forward_rows) forward.push_back({"one kernel", forward_by(false, forward_rows, nullptr)});
    if (before.forward_with_sums != nullptr)
      forward.push_back({"sums", forward_by(true, {}, nullptr)});
    if (library_forward != nullptr)
      forward.push_back({kLibrary, forward_by(false, {}, library_forward)});
    const auto run_forward_way = [&] {
      if (before.forward != nullptr) run_convolution(from);
      run_batch_norm(i);
    };
    engines_.take_fastest(describe_norm("forward", i), forward, stream_, run_forward_way, [&] {
      Engines::Results left = statistics_left(i);
      if (!work.pooled) left.push_back(numbers_left(outputs_[i]));
      return left;
    });

    const auto backward_by = [&](std::optional<int> kept, EnginePlan* library) {
      return [&, kept, library] {
        work.kept_backward = kept;
        work.library_backward = library;
        if (library != nullptr) library->choose(library_backward_pointers(i), stream_);
      };
    };
    std::vector<Engines::Way> backward{{"two kernels", backward_by({}, nullptr)}};
    if (backward_rows) backward.push_back({"one kernel", backward_by(backward_rows, nullptr)});
    if (library_backward != nullptr)
      backward.push_back({kLibrary, backward_by({}, library_backward)});
    const auto run_backward_way = [&] { run_batch_norm_backward(i); };
    engines_.take_fastest(describe_norm("backward", i), backward, stream_, run_backward_way,
                          [&]() -> Engines::Results {
                            if (before.forward == nullptr)
                              return {};  // nothing makes x again that dx has replaced
                            run_forward_way();
                            // Any gradients with numbers of both signs.
                            for (const Gradient& dy : work.dy)
                              if (dy.values != nullptr)
                                copy_on_device(dy.values, input_of(i), input(i));
                            run_backward_way();
                            return gradients_left(i);
                          });
  }

  // Whether convolution i applies the batch-norm before it, whose map then is never written: timed
  // from the convolution before that one to the batch-norm behind i, to which the sums come with
  // it, and with the weights' gradient.
  void choose_applied(size_t i) {
    const auto norm = static_cast<size_t>(nodes_[i].input);
    const auto first = static_cast<size_t>(nodes_[norm].input);
    const auto reader = std::find_if(nodes_.begin(), nodes_.end(), [&](const Node& node) {
      return node.input == static_cast<int>(i);
    });
    if (reader->op != Op::batch_norm) return;
    const auto last = static_cast<size_t>(reader - nodes_.begin());
    const bool first_sums = work_[first].with_sums, own_sums = work_[i].with_sums;
    const auto applied = [&](bool is) {
      return [&, is] {
        work_[norm].applied = is;
        work_[first].with_sums = is || first_sums;
        work_[i].with_sums = is || own_sums;
        // What the weights' gradient reads may not be overwritten beside it; the map that is not
        // written has room.
        void* dx = is ? outputs_[norm].values : input_of(norm);
        work_[norm].dx.values = dx;
        work_[first].dy[0].values = dx;
        if (!is) return;
        work_[first].forward_with_sums->choose(forward_pointers(first, true), stream_);
        work_[i].norm_forward->choose(reader_forward_pointers(i), stream_);
        work_[i].norm_weights->choose(reader_weight_pointers(i), stream_);
      };
    };
    engines_.take_fastest(
        work_[i].forward->describe() + " applies the " + describe_norm("forward", norm),
        {{"no", applied(false)}, {"yes", applied(true)}}, stream_,
        [&] {
          run_convolution(first);
          run_batch_norm(norm);
          run_convolution(i);
          run_batch_norm(last);
          run_weight_gradient(i);  // of the output itself, whose place its gradient has
        },
        [&] {
          Engines::Results left = statistics_left(last);
          left.push_back(numbers_left(outputs_[i]));
          left.push_back(numbers_left(static_cast<const T*>(weight_of(i).gradient),
                                      weight_of(i).layout.stored_count()));
          return left;
        });
  }

  // Whether the gradients of the batch-norm that convolution i reads come with its data gradient.
  void choose_summed(size_t i) {
    const auto norm = static_cast<size_t>(nodes_[i].input);
    const auto summed = [&](bool is) {
      return [&, is] {
        work_[norm].summed = is;
        if (is) work_[i].norm_data->choose(reader_data_pointers(i), stream_);
      };
    };
    engines_.take_fastest(
        work_[i].data->describe() + " sums the " + describe_norm("backward", norm),
        {{"no", summed(false)}, {"yes", summed(true)}}, stream_,
        [&] {
          run_data_gradient(i);
          run_batch_norm_backward(norm);
        },
        [&] {
          run_convolution(static_cast<size_t>(nodes_[norm].input));
          run_batch_norm(norm);
          run_convolution(i);
          run_data_gradient(i);
          run_batch_norm_backward(norm);
          return gradients_left(norm);
        });
  }

  // What is timed is compared as well, and over zeros everything is equal.
  void fill_with_numbers() {
    initialise(0);
    const int64_t size = nodes_.front().in_size, count = size * size * kImageChannels;
    std::minstd_rand random(1);
    std::uniform_real_distribution<float> pixel(-1, 1);
    std::vector<T> pixels(static_cast<size_t>(2 * count));
    for (T& value : pixels) value = from_float<T>(pixel(random));
    for (int64_t n = 0; n < batch_; ++n) {
      // Images differ by where they begin.
      const auto first = static_cast<size_t>(n * 101 % count);
      write_device(image_ + n * count,
                   std::span<const T>(pixels).subspan(first, static_cast<size_t>(count)), stream_);
    }
  }

  template <typename N>
  std::vector<float> numbers_left(const N* values, int64_t count) const {
    std::vector<N> some(static_cast<size_t>(std::min(count, int64_t{65536})));  // tell enough
    read_device(values, some, stream_);
    std::vector<float> numbers(some.size());
    std::transform(some.begin(), some.end(), numbers.begin(), [](N x) { return to_float(x); });
    return numbers;
  }
  std::vector<float> numbers_left(const Output& output) const {
    return output.vector ? numbers_left(static_cast<const float*>(output.values), output.count())
                         : numbers_left(static_cast<const T*>(output.values), output.count());
  }
  Engines::Results statistics_left(size_t norm) const {
    const BatchNorm& of = work_[norm].norm;
    return {numbers_left(of.mean, of.channels), numbers_left(of.inverse_deviation, of.channels)};
  }
  Engines::Results gradients_left(size_t norm) const {
    const Work& work = work_[norm];
    Engines::Results left{
        numbers_left(work.norm_gradient.beta, work.norm.channels),
        numbers_left(static_cast<const T*>(work.dx.values), outputs_[norm].count())};
    if (work.norm_gradient.gamma != nullptr)
      left.push_back(numbers_left(work.norm_gradient.gamma, work.norm.channels));
    return left;
  }
  void copy_on_device(void* to, const void* from, const Output& of) const {
    const size_t bytes = static_cast<size_t>(of.count()) * (of.vector ? sizeof(float) : sizeof(T));
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_.get()),
          "the copy of a map");
  }

  // Of cuDNN's engines for batch-norms those that a layer has taken stay: a session that looks up
  // what another has timed makes no others, and is to be described as that one.
  void drop_library() {
    engines_.keep([this](const EnginePlan& plan) {
      return std::any_of(work_.begin(), work_.end(), [&](const Work& work) {
        const auto plans = {work.forward,   work.forward_with_sums, work.data,
                            work.weights,   work.norm_forward,      work.norm_weights,
                            work.norm_data, work.library_forward,   work.library_backward};
        return std::find(plans.begin(), plans.end(), &plan) != plans.end();
      });
    });
  }

  // What is timed.
  std::string describe_norm(const std::string& direction, size_t i) const {
    const Node& node = nodes_[i];
    const Work& before = work_[static_cast<size_t>(node.input)];
    return direction + " of batch-norm [" + std::to_string(outputs_[i].rows) + ", " +
           std::to_string(outputs_[i].channels) + "], " +
           kNumberNames[static_cast<int>(outputs_[i].vector ? NumberType::fp32
                                                            : number_type<T>())] +
           (node.activation == Activation::relu ? ", ReLU" : "") +
           (node.residual >= 0 ? ", residual" : "") +
           (outputs_[i].readers == 2 ? ", two gradients" : "") +
           (before.forward != nullptr ? " after " + before.forward->describe() : "");
  }

  // Of batch-norm i forward and backward, where one kernel may do it. Blocks that wait for each
  // other hold their places meanwhile, so that no two such kernels should run at once: those of the
  // main lane follow each other.
  template <typename N>
  std::pair<std::optional<int>, std::optional<int>> rows_to_keep(size_t i) const {
    const Node& node = nodes_[i];
    const Work& work = work_[i];
    if (work.lane != Lane::main) return {};
    const BatchNormScratch& scratch = memory_[0].scratch;
    std::optional<int> forward;
    if (!work.pooled) {
      forward = forward_rows_to_keep<N>(cooperative_, work.norm.rows, work.norm.channels, scratch);
    }
    return {forward, backward_rows_to_keep<N>(cooperative_, work.norm.rows, work.norm.channels,
                                              node.activation == Activation::relu,
                                              node.residual >= 0, scratch)};
  }

  void run_max_pool(size_t i) {
    const Work& work = work_[i];
    const PoolShape shape = pool_shape(nodes_[i]);
    auto* y = static_cast<T*>(outputs_[i].values);
    const auto from = static_cast<size_t>(nodes_[i].input);
    if (work_[from].pooled) {
      batch_norm_max_pool(work_[from].norm, shape, static_cast<const T*>(input_of(from)), y,
                          work.where, stream_.get());
    } else {
      max_pool(shape, static_cast<const T*>(input_of(i)), y, work.where, stream_.get());
    }
  }

  void run_batch_norm(size_t i) {
    if (outputs_[i].vector) {
      run_batch_norm_of<float>(i);
    } else {
      run_batch_norm_of<T>(i);
    }
  }
  void run_batch_norm_backward(size_t i) {
    if (outputs_[i].vector) {
      run_batch_norm_backward_of<float>(i);
    } else {
      run_batch_norm_backward_of<T>(i);
    }
  }

  template <typename N>
  void run_batch_norm_of(size_t i) {
    const Node& node = nodes_[i];
    const Work& work = work_[i];
    const auto* x = static_cast<const N*>(input_of(i));
    const auto* residual = static_cast<const N*>(
        node.residual < 0 ? nullptr : outputs_[static_cast<size_t>(node.residual)].values);
    auto* y = static_cast<N*>(outputs_[i].values);
    const bool relu = node.activation == Activation::relu;
    const BatchNormScratch& scratch = memory_of(work.lane).scratch;
    const cudaStream_t stream = stream_of(work.lane).get();
    const Work& before = work_[static_cast<size_t>(node.input)];
    if (work.applied) {
      auto* scale = static_cast<N*>(work.scale_bias);
      batch_norm_to_apply(work.norm, before.sums, scale, scale + work.norm.channels, stream);
    } else if (before.with_sums) {
      batch_norm_forward_from_sums(work.norm, before.sums, x, residual, y, relu, stream);
    } else if (work.kept_forward && blocks_wait_) {
      batch_norm_forward_whole(work.norm, *work.kept_forward, x, residual, y, relu, scratch,
                               stream);
    } else if (work.library_forward != nullptr && blocks_wait_) {
      work.library_forward->run(library_forward_pointers(i), stream_);
      finish_batch_norm(work.norm, stream);
    } else {
      batch_statistics(work.norm, x, scratch, stream);
      if (!work.pooled) batch_norm_forward(work.norm, x, residual, y, relu, stream);
    }
  }

  template <typename N>
  void run_batch_norm_backward_of(size_t i) {
    const Node& node = nodes_[i];
    const Work& work = work_[i];
    const auto* x = static_cast<const N*>(input_of(i));
    // Without a residual the ReLU's mask is found again from x.
    const auto* y = static_cast<const N*>(node.residual < 0 ? nullptr : outputs_[i].values);
    auto* dy = static_cast<N*>(work.dy[0].values);
    const auto* dy_other = static_cast<const N*>(work.dy[1].values);
    auto* dx = static_cast<N*>(work.dx.values);
    const bool relu = node.activation == Activation::relu;
    const BatchNormScratch& scratch = memory_of(work.lane).scratch;
    const cudaStream_t stream = stream_of(work.lane).get();
    if (work.summed) {
      batch_norm_backward_from_gradient(work.norm, work.norm_gradient, x, dy, dx, stream);
    } else if (work.kept_backward && blocks_wait_) {
      batch_norm_backward_whole(work.norm, work.norm_gradient, *work.kept_backward, x, y, relu, dy,
                                dy_other, dx, scratch, stream);
    } else if (work.library_backward != nullptr && blocks_wait_) {
      work.library_backward->run(library_backward_pointers(i), stream_);
    } else {
      batch_norm_backward(work.norm, work.norm_gradient, x, y, relu, dy, dy_other, dx, scratch,
                          stream);
    }
  }

  // ---- Lanes ----

  static constexpr size_t kLanes = 3;

  // What the passes of one lane share.
  struct LaneMemory {
    char* workspace = nullptr;
    size_t workspace_bytes = 0;
    BatchNormScratch scratch{};
  };

  LaneMemory& memory_of(Lane lane) {
    return memory_[static_cast<size_t>(beside_ ? lane : Lane::main)];
  }
  const SideStream& side(Lane lane) const { return sides_[static_cast<size_t>(lane) - 1]; }
  const Stream& stream_of(Lane lane) const {
    return beside_ && lane != Lane::main ? side(lane).stream() : stream_;
  }
  void fork(Lane from, Lane to) const {
    if (beside_) side(to).fork(stream_of(from));
  }
  void join(Lane lane) const {
    if (beside_) side(lane).join(stream_);
  }

  // Whether the lanes run beside each other, which changes no bit: large maps may fill the GPU one
  // by one, and then only take each other's place in its caches. And whether batch-norms that are
  // faster as one kernel, ours or cuDNN's, stay so: all its blocks need a place at once, which
  // other lanes may hold.
  void choose_lanes() {
    const auto lanes = [this](bool beside, bool blocks_wait) {
      return [=, this] {
        beside_ = beside;
        blocks_wait_ = blocks_wait;
      };
    };
    std::vector<Engines::Way> ways{{"beside", lanes(true, true)}};
    if (!deterministic_) ways.push_back({"in turn", lanes(false, true)});
    if (std::any_of(work_.begin(), work_.end(), [](const Work& work) {
          return work.kept_forward.has_value() || work.kept_backward.has_value() ||
                 work.library_forward != nullptr || work.library_backward != nullptr;
        }))
      ways.push_back({"beside, two kernels", lanes(true, false)});
    engines_.take_fastest(
        "lanes of " + engines(), ways, stream_, [this] { run_passes(); },
        [] { return Engines::Results(); });  // the same work in another order
  }

  PoolShape pool_shape(const Node& node) const {
    return {.images = batch_,
            .channels = static_cast<int>(node.out_channels),
            .in_size = static_cast<int>(node.in_size),
            .out_size = static_cast<int>(node.out_size)};
  }

  // ---- Lookups and copies ----

  bool scales() const { return precision_ == Precision::fp16; }

  void write_pending(const PendingUpdate& pending) {
    write_device(pending_, std::span(&pending, 1), stream_);
  }

  void restore_loss_scale(float scale, float good_steps) {
    int exponent = 0;
    if (!(scale >= kLeastLossScale && scale <= kLargestLossScale) ||
        std::frexp(scale, &exponent) != 0.5F || !(good_steps >= 0) ||
        good_steps >= kGoodStepsToGrow || good_steps != std::floor(good_steps)) {
      throw Error(codes::kInput, "The tensor 'loss_scale' holds " + std::to_string(scale) +
                                     " and " + std::to_string(good_steps) +
                                     "; expected a power of two from 1 to 2^24 and a count below " +
                                     std::to_string(kGoodStepsToGrow) + ".");
    }
    LossScale state = loss_scale();
    state.scale = scale;
    state.inverse = 1 / scale;
    state.good_steps = static_cast<int>(good_steps);
    write_loss_scale(state);
  }
  Parameter& weight_of(size_t i) { return parameters_[static_cast<size_t>(work_[i].weight)]; }
  Output& input(size_t i) { return outputs_[static_cast<size_t>(nodes_[i].input)]; }
  void* input_of(size_t i) { return nodes_[i].input < 0 ? image_ : input(i).values; }
  float* values_of(int parameter) const {
    return parameter < 0 ? nullptr : parameters_[static_cast<size_t>(parameter)].values;
  }
  float* gradient_of(int parameter) const {
    return parameter < 0
               ? nullptr
               : static_cast<float*>(parameters_[static_cast<size_t>(parameter)].gradient);
  }
  const Parameter& parameter(const std::string& name) const {
    return *std::find_if(parameters_.begin(), parameters_.end(),
                         [&](const Parameter& of) { return of.name == name; });
  }
  const Statistic& statistic(const std::string& name) const {
    return *std::find_if(statistics_.begin(), statistics_.end(),
                         [&](const Statistic& of) { return of.name == name; });
  }

  void read_parameter(const Parameter& of, const float* from, std::span<float> values) const {
    std::vector<float> stored(static_cast<size_t>(of.layout.stored_count()));
    read_device(from, stored, stream_);
    of.layout.from_stored(stored, values);
  }

  void fill(float* values, int64_t count, float value) const {
    write_device(values,
                 std::span<const float>(std::vector<float>(static_cast<size_t>(count), value)),
                 stream_);
  }

  template <typename N>
  static bool all_finite(const std::vector<N>& values) {
    return std::all_of(values.begin(), values.end(),
                       [](N value) { return std::isfinite(to_float(value)); });
  }

  std::vector<Node> nodes_;
  int64_t batch_;
  Precision precision_;
  bool deterministic_;
  const Stream& stream_;
  std::array<SideStream, kLanes - 1> sides_;
  Engines engines_;
  CublasLt cublas_lt_;
  CooperativeLimits cooperative_;
  std::optional<Products> products_;
  std::vector<TensorInfo> tensors_;
  std::vector<Output> outputs_;  // by node, as the two below
  std::vector<Work> work_;
  std::vector<Parameter> parameters_;
  std::vector<Statistic> statistics_;
  std::vector<ParameterPart> parts_;
  std::vector<std::pair<int64_t, int64_t>> norm_shapes_;  // rows and channels
  T* image_ = nullptr;                                    // [batch, size, size, 4]
  ParameterTensor<T>* table_ = nullptr;
  ParameterRange* ranges_ = nullptr;
  LossScale* loss_scale_ = nullptr;
  PendingUpdate* pending_ = nullptr;
  std::array<LaneMemory, kLanes> memory_{};
  bool beside_ = false;
  bool blocks_wait_ = true;  // those of a batch-norm, for each other
};

}  // namespace

std::unique_ptr<TrainingNetwork> make_training_network(std::vector<Node> nodes, int64_t batch,
                                                       Precision precision, bool deterministic,
                                                       const Libraries& libraries,
                                                       const Stream& stream) {
  return with_operands(precision, [&]<typename T>(T) -> std::unique_ptr<TrainingNetwork> {
    return std::make_unique<NetworkOf<T>>(std::move(nodes), batch, precision, deterministic,
                                          libraries, stream);
  });
}

}  // namespace hardmine::cuda
