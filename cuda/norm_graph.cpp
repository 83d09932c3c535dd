#include "cuda/norm_graph.h"

#include <string>

#include "core/network.h"

namespace hardmine::cuda {
namespace {

using cudnn::Attribute;
using cudnn::AttributeType;
using cudnn::DescriptorType;

enum Tensor : int64_t {
  kX = 1,
  kY,  // or its gradient
  kResidual,
  kDx,
  kGamma,
  kBeta,
  kMean,
  kInverseDeviation,
  kDgamma,
  kDbeta,
  kEpsilon,
};

constexpr size_t kCandidates = 2;  // compiling one takes most of a second, and a session wants 13

constexpr float kEpsilonValue = static_cast<float>(kBatchNormEpsilon);

std::string describe(const char* direction, const NormShape& s) {
  return std::string("the ") + direction + " of a batch-norm [" + std::to_string(s.batch) + ", " +
         std::to_string(s.size) + ", " + std::to_string(s.size) + ", " +
         std::to_string(s.channels) + "], " + name_of(s.precision);
}

// The tensors of one batch-norm.
class Norm {
 public:
  Norm(GraphBuilder& graph, const NormShape& shape)
      : graph_(graph),
        shape_(shape),
        x_(map(kX)),
        mean_(channels(kMean)),
        inverse_deviation_(channels(kInverseDeviation)),
        gamma_(channels(kGamma)) {}

  const CudnnDescriptor& map(int64_t id) {
    return graph_.map(id, data_type(shape_.precision), shape_.batch, shape_.channels, shape_.size);
  }
  const CudnnDescriptor& between(cudnn::DataType type) {
    return graph_.between(type, shape_.batch, shape_.channels, shape_.size);
  }
  const CudnnDescriptor& channels(int64_t id) {
    return graph_.map(id, cudnn::DataType::fp32, 1, shape_.channels, 1);
  }

  void add_forward(cudnn::NormPhase phase, const CudnnDescriptor& y) {
    CudnnDescriptor& norm = graph_.part(DescriptorType::operation_norm_forward);
    norm.set(Attribute::norm_forward_mode, AttributeType::norm_mode, cudnn::NormMode::batch);
    norm.set(Attribute::norm_forward_phase, AttributeType::norm_phase, phase);
    norm.set(Attribute::norm_forward_x, x_);
    norm.set(Attribute::norm_forward_mean, mean_);
    norm.set(Attribute::norm_forward_inverse_deviation, inverse_deviation_);
    norm.set(Attribute::norm_forward_scale, gamma_);
    norm.set(Attribute::norm_forward_bias, channels(kBeta));
    norm.set(Attribute::norm_forward_epsilon, graph_.scalar(kEpsilon));
    norm.set(Attribute::norm_forward_y, y);
    graph_.add(norm);
  }

  void add_backward(const CudnnDescriptor& dy) {
    CudnnDescriptor& norm = graph_.part(DescriptorType::operation_norm_backward);
    norm.set(Attribute::norm_backward_mode, AttributeType::norm_mode, cudnn::NormMode::batch);
    norm.set(Attribute::norm_backward_x, x_);
    norm.set(Attribute::norm_backward_mean, mean_);
    norm.set(Attribute::norm_backward_inverse_deviation, inverse_deviation_);
    norm.set(Attribute::norm_backward_dy, dy);
    norm.set(Attribute::norm_backward_scale, gamma_);
    norm.set(Attribute::norm_backward_dscale, channels(kDgamma));
    norm.set(Attribute::norm_backward_dbias, channels(kDbeta));
    norm.set(Attribute::norm_backward_dx, map(kDx));
    graph_.add(norm);
  }

 private:
  GraphBuilder& graph_;
  const NormShape& shape_;
  const CudnnDescriptor &x_, &mean_, &inverse_deviation_, &gamma_;
};

void build_forward(GraphBuilder& graph, const NormShape& shape, bool residual, bool relu) {
  const auto fp32 = cudnn::DataType::fp32;
  Norm norm(graph, shape);
  const CudnnDescriptor& y = norm.map(kY);
  const CudnnDescriptor* last = residual || relu ? &norm.between(fp32) : &y;
  norm.add_forward(cudnn::NormPhase::training, *last);
  if (residual) {
    const CudnnDescriptor& sum = relu ? norm.between(fp32) : y;
    graph.add_pointwise(cudnn::PointwiseMode::add, *last, &norm.map(kResidual), sum);
    last = &sum;
  }
  if (relu) graph.add_pointwise(cudnn::PointwiseMode::relu_forward, *last, nullptr, y);
}

void build_backward(GraphBuilder& graph, const NormShape& shape) {
  Norm norm(graph, shape);
  const CudnnDescriptor& before_relu = norm.between(cudnn::DataType::fp32);
  norm.add_forward(cudnn::NormPhase::inference, before_relu);
  // Of no other type than dy's will cuDNN have it.
  const CudnnDescriptor& masked = norm.between(data_type(shape.precision));
  graph.add_pointwise_backward(cudnn::PointwiseMode::relu_backward, norm.map(kY), before_relu,
                               masked);
  norm.add_backward(masked);
}

}  // namespace

Engines::Graph norm_forward_graph(const NormShape& shape, bool residual, bool relu) {
  return {describe("forward", shape) + (residual ? ", residual" : "") + (relu ? ", ReLU" : ""),
          shape.precision,
          [=](GraphBuilder& graph) { build_forward(graph, shape, residual, relu); }, kCandidates};
}

Engines::Graph norm_backward_graph(const NormShape& shape) {
  return {describe("backward", shape) + ", ReLU", shape.precision,
          [=](GraphBuilder& graph) { build_backward(graph, shape); }, kCandidates};
}

EnginePointers norm_forward_pointers(const NormTensors& tensors) {
  EnginePointers pointers{.workspace = tensors.workspace};
  pointers.tensors[kX] = tensors.x;
  pointers.tensors[kY] = tensors.y;
  pointers.tensors[kResidual] = tensors.residual;
  pointers.tensors[kGamma] = tensors.gamma;
  pointers.tensors[kBeta] = tensors.beta;
  pointers.tensors[kMean] = tensors.mean;
  pointers.tensors[kInverseDeviation] = tensors.inverse_deviation;
  pointers.tensors[kEpsilon] = const_cast<float*>(&kEpsilonValue);  // cuDNN reads it
  return pointers;
}

EnginePointers norm_backward_pointers(const NormGradientTensors& tensors) {
  EnginePointers pointers{.workspace = tensors.workspace};
  pointers.tensors[kX] = tensors.x;
  pointers.tensors[kY] = tensors.dy;
  pointers.tensors[kDx] = tensors.dx;
  pointers.tensors[kGamma] = tensors.gamma;
  pointers.tensors[kBeta] = tensors.beta;
  pointers.tensors[kMean] = tensors.mean;
  pointers.tensors[kInverseDeviation] = tensors.inverse_deviation;
  pointers.tensors[kDgamma] = tensors.dgamma;
  pointers.tensors[kDbeta] = tensors.dbeta;
  pointers.tensors[kEpsilon] = const_cast<float*>(&kEpsilonValue);  // cuDNN reads it
  return pointers;
}

}  // namespace hardmine::cuda
