// What each node of a network needs: plans, parameters, lanes and memory.
#pragma once

#include <algorithm>

#include "cuda/convolution.h"
#include "cuda/network_of.h"
#include "cuda/norm_graph.h"

namespace hardmine::cuda {

template <typename T>
void NetworkOf<T>::plan_outputs() {
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

template <typename T>
int NetworkOf<T>::add_parameter(const std::string& name, WeightLayout layout, bool is_operand,
                                bool gradient_is_float) {
  Parameter of;
  of.name = name;
  of.layout = layout;
  of.is_operand = is_operand;
  of.gradient_is_float = gradient_is_float;
  parameters_.push_back(std::move(of));
  return static_cast<int>(parameters_.size()) - 1;
}

template <typename T>
void NetworkOf<T>::plan_work(size_t i) {
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
      work.bias =
          add_parameter(node.name + ".bias", WeightLayout::vector(node.out_channels), false, true);
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
template <typename T>
bool NetworkOf<T>::behind_norm(const Node& node) const {
  if (node.input < 0) return false;
  const auto at = static_cast<size_t>(node.input);
  const Node& norm = nodes_[at];
  return norm.op == Op::batch_norm && norm.activation == Activation::relu && norm.residual < 0 &&
         !norm.fixed_scale && outputs_[at].readers == 1 &&
         work_[static_cast<size_t>(norm.input)].forward_with_sums != nullptr;
}

template <typename T>
void NetworkOf<T>::plan_pooled() {
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
template <typename T>
void NetworkOf<T>::plan_lanes(size_t i) {
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
template <typename T>
void NetworkOf<T>::plan_library(size_t i) {
  const Node& node = nodes_[i];
  Work& work = work_[i];
  if (node.op != Op::batch_norm || deterministic_ || node.fixed_scale ||
      nodes_[static_cast<size_t>(node.input)].op != Op::convolution || work.lane != Lane::main)
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

// Parameters are in the order of their nodes.
template <typename T>
void NetworkOf<T>::plan_parts() {
  std::vector<int64_t> ranges(nodes_.size());
  for (size_t i = 0; i < nodes_.size(); ++i)
    ranges[i] = ranges_of(work_[i].weight) + ranges_of(work_[i].bias);
  parts_ = parameter_parts(ranges);
  for (size_t part = 0; part < parts_.size(); ++part) work_[parts_[part].node].part = part;
}

template <typename T>
int64_t NetworkOf<T>::ranges_of(int parameter) const {
  if (parameter < 0) return 0;
  const int64_t count = parameters_[static_cast<size_t>(parameter)].layout.stored_count();
  return (count + kRangeElements - 1) / kRangeElements;
}

template <typename T>
void NetworkOf<T>::layout_state(Arena& arena) {
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

template <typename T>
void NetworkOf<T>::layout_workspaces(Arena& arena) {
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

template <typename T>
void NetworkOf<T>::layout_batch(Arena& arena) {
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

template <typename T>
void NetworkOf<T>::layout_node(Arena& arena, size_t i) {
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

template <typename T>
void NetworkOf<T>::layout_backward(Arena& arena) {
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

template <typename T>
void NetworkOf<T>::add_gradient(size_t node, const Gradient& gradient) {
  Output& output = outputs_[node];
  if (output.gradient_count == 2) refuse(nodes_[node], "more than two nodes read its output.");
  output.gradients[static_cast<size_t>(output.gradient_count++)] = gradient;
}

template <typename T>
void NetworkOf<T>::write_tables() {
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

}  // namespace hardmine::cuda
