#include "cuda/network.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "core/initialise.h"
#include "cuda/device.h"
#include "cuda/network_choices.cuh"
#include "cuda/network_of.h"
#include "cuda/network_passes.cuh"
#include "cuda/network_plan.cuh"

namespace hardmine::cuda {
namespace {

const std::string kMomentumPrefix = "momentum/";

}  // namespace

template <typename T>
NetworkOf<T>::NetworkOf(std::vector<Node> nodes, int64_t batch, Precision precision,
                        bool deterministic, const Libraries& libraries, const Stream& stream)
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

template <typename T>
std::string NetworkOf<T>::engines() const {
  std::string text = engines_.describe();
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Work& work = work_[i];
    for (const auto& [does, what] :
         {std::pair{work.with_sums, " with sums"},
          std::pair{work.library_forward != nullptr && blocks_wait_, " forward by cuDNN"},
          std::pair{work.library_backward != nullptr && blocks_wait_, " backward by cuDNN"},
          std::pair{work.applied, " applied by its reader"},
          std::pair{work.summed, " summed by its reader"}})
      if (does) text += "; " + nodes_[i].name + what;
  }
  return text;
}

template <typename T>
void NetworkOf<T>::prepare() {
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

template <typename T>
void NetworkOf<T>::initialise(uint64_t seed) {
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

template <typename T>
void NetworkOf<T>::read(const std::string& name, std::span<float> values) const {
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

template <typename T>
void NetworkOf<T>::write(const std::string& name, std::span<const float> values) {
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

template <typename T>
void NetworkOf<T>::read_gradient(const std::string& name, std::span<float> values) const {
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

template <typename T>
LossScale NetworkOf<T>::loss_scale() const {
  LossScale scale;
  read_device(loss_scale_, std::span(&scale, 1), stream_);
  return scale;
}

template <typename T>
std::string NetworkOf<T>::first_non_finite() const {
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

template <typename T>
void NetworkOf<T>::restore_loss_scale(float scale, float good_steps) {
  int exponent = 0;
  if (!(scale >= kLeastLossScale && scale <= kLargestLossScale) ||
      std::frexp(scale, &exponent) != 0.5F || !(good_steps >= 0) ||
      good_steps >= kGoodStepsToGrow || good_steps != std::floor(good_steps)) {
    throw Error(codes::kInput, "The tensor 'loss_scale' holds " + std::to_string(scale) + " and " +
                                   std::to_string(good_steps) +
                                   "; expected a power of two from 1 to 2^24 and a count below " +
                                   std::to_string(kGoodStepsToGrow) + ".");
  }
  LossScale state = loss_scale();
  state.scale = scale;
  state.inverse = 1 / scale;
  state.good_steps = static_cast<int>(good_steps);
  write_loss_scale(state);
}

template <typename T>
void NetworkOf<T>::read_parameter(const Parameter& of, const float* from,
                                  std::span<float> values) const {
  std::vector<float> stored(static_cast<size_t>(of.layout.stored_count()));
  read_device(from, stored, stream_);
  of.layout.from_stored(stored, values);
}

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
