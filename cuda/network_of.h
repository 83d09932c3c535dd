// TrainingNetwork for operands and feature maps in T: what it keeps of each node, and its members,
// which are defined by what they are about: network_plan.cuh (which plans and memory a node needs),
// network_passes.cuh (forward, backward and the update), network_choices.cuh (ways that are timed),
// network.cu (the rest).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/tensors.h"
#include "cuda/engines.h"
#include "cuda/kernels/batch_norm.cuh"
#include "cuda/kernels/pooling.cuh"
#include "cuda/kernels/sgd.cuh"
#include "cuda/lanes.h"
#include "cuda/maps.h"
#include "cuda/network.h"
#include "cuda/products.h"
#include "cuda/transfer.h"

namespace hardmine::cuda {

inline const std::string kLossScale = "loss_scale";
// The way of a batch-norm that is cuDNN's.
inline constexpr const char* kLibrary = "library";

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

template <typename T>
class NetworkOf : public TrainingNetwork {
 public:
  NetworkOf(std::vector<Node> nodes, int64_t batch, Precision precision, bool deterministic,
            const Libraries& libraries, const Stream& stream);

  const std::vector<Node>& nodes() const override { return nodes_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  std::string engines() const override;

  void layout_state(Arena& arena) override;
  void layout_batch(Arena& arena) override;
  void prepare() override;
  void initialise(uint64_t seed) override;

  const float* forward(const uint8_t* images, const Augmentation* augmentations) override;
  void backward(const float* grad_embeddings) override;
  void conclude(const StepParameters* parameters) override {
    conclude_step(parameters, loss_scale_, pending_, scales(), stream_.get());
  }
  void apply_pending() override {
    sgd(table_, ranges_, range_count(), pending_, stream_.get());
    check(cudaMemsetAsync(pending_, 0, sizeof *pending_, stream_.get()), "cudaMemsetAsync");
  }

  void read(const std::string& name, std::span<float> values) const override;
  void write(const std::string& name, std::span<const float> values) override;
  void read_gradient(const std::string& name, std::span<float> values) const override;
  LossScale loss_scale() const override;
  void write_loss_scale(const LossScale& scale) override {
    write_device(loss_scale_, std::span(&scale, 1), stream_);
  }
  std::string first_non_finite() const override;

 private:
  // ---- Plans and memory: network_plan.cuh ----

  [[noreturn]] static void refuse(const Node& node, const std::string& why) {
    throw Error(codes::kConfig, "The node '" + node.name + "' cannot be trained on CUDA: " + why);
  }
  void plan_outputs();
  int add_parameter(const std::string& name, WeightLayout layout, bool is_operand,
                    bool gradient_is_float);
  void plan_work(size_t i);
  bool behind_norm(const Node& node) const;
  void plan_pooled();
  void plan_lanes(size_t i);
  void plan_library(size_t i);
  void plan_parts();
  void layout_workspaces(Arena& arena);
  void layout_node(Arena& arena, size_t i);
  void layout_backward(Arena& arena);
  void add_gradient(size_t node, const Gradient& gradient);
  int64_t ranges_of(int parameter) const;
  int64_t range_count() const { return parts_.back().first + parts_.back().count; }
  void write_tables();

  // ---- Passes: network_passes.cuh ----

  void run_passes();
  void run_forward();
  void run_backward();
  void begin_update();
  void end_update(size_t part);
  void update_part(size_t part) const;
  void check_part(size_t part) const;

  bool applies_norm(size_t i) const {
    return nodes_[i].input >= 0 && work_[static_cast<size_t>(nodes_[i].input)].applied;
  }
  void run_convolution(size_t i);
  void run_weight_gradient(size_t i);
  void run_data_gradient(size_t i);
  void run_linear_backward(size_t i);
  void run_max_pool(size_t i);
  void run_batch_norm(size_t i);
  void run_batch_norm_backward(size_t i);
  template <typename N>
  void run_batch_norm_of(size_t i);
  template <typename N>
  void run_batch_norm_backward_of(size_t i);

  EnginePointers forward_pointers(size_t i, bool with_sums);
  EnginePointers weight_pointers(size_t i);
  EnginePointers data_pointers(size_t i);
  // The same where the convolution reads a batch-norm and does some of its work.
  EnginePointers reader_forward_pointers(size_t i) {
    return applied_norm(forward_pointers(i, true), i);
  }
  EnginePointers reader_weight_pointers(size_t i) { return applied_norm(weight_pointers(i), i); }
  EnginePointers reader_data_pointers(size_t i);
  EnginePointers applied_norm(const EnginePointers& pointers, size_t i);
  EnginePointers library_forward_pointers(size_t i);
  EnginePointers library_backward_pointers(size_t i);

  // ---- Ways that are timed: network_choices.cuh ----

  void fill_with_numbers();
  void choose_norm(size_t i);
  void choose_applied(size_t i);
  void choose_summed(size_t i);
  void drop_library();
  void choose_lanes();
  std::string describe_norm(const std::string& direction, size_t i) const;
  template <typename N>
  std::pair<std::optional<int>, std::optional<int>> rows_to_keep(size_t i) const;
  template <typename N>
  std::vector<float> numbers_left(const N* values, int64_t count) const;
  std::vector<float> numbers_left(const Output& output) const;
  Engines::Results statistics_left(size_t norm) const;
  Engines::Results gradients_left(size_t norm) const;
  void copy_on_device(void* to, const void* from, const Output& of) const;

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

  // ---- Lookups and copies ----

  bool scales() const { return precision_ == Precision::fp16; }

  void write_pending(const PendingUpdate& pending) {
    write_device(pending_, std::span(&pending, 1), stream_);
  }

  void restore_loss_scale(float scale, float good_steps);
  PoolShape pool_shape(const Node& node) const;
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

  void read_parameter(const Parameter& of, const float* from, std::span<float> values) const;

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

}  // namespace hardmine::cuda
