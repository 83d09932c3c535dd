#include "cuda/convolution.h"

#include <array>
#include <string>

namespace hardmine::cuda {
namespace {

enum Tensor : int64_t {
  kX = 1,
  kW,
  kY,
  kSum,
  kSquares,
  kScale,
  kBias,
  kNormInput,
  kMean,
  kInverseDeviation,
  kGamma,
  kBeta,
  kGammaGradient,
  kBetaGradient,
  kByDy,
  kByX,
  kConstant,
};
static_assert(kConstant <= kMostTensors);

const char* pass_name(ConvolutionPass pass) {
  switch (pass) {
    case ConvolutionPass::forward:
      return "forward";
    case ConvolutionPass::forward_with_sums:
      return "forward with sums";
    case ConvolutionPass::data_gradient:
      return "data gradient";
    case ConvolutionPass::weight_gradient:
      return "weight gradient";
    case ConvolutionPass::norm_forward_with_sums:
      return "batch-norm and forward with sums";
    case ConvolutionPass::norm_weight_gradient:
      return "batch-norm and weight gradient";
    default:
      return "data gradient and batch-norm's";
  }
}

// How cuDNN calls a pass and what it is made of.
struct Operation {
  cudnn::DescriptorType type;
  cudnn::Attribute alpha, beta, convolution, x, w, y;
};
Operation operation_of(ConvolutionPass pass) {
  using cudnn::Attribute;
  switch (pass) {
    case ConvolutionPass::forward:
    case ConvolutionPass::forward_with_sums:
    case ConvolutionPass::norm_forward_with_sums:
      return {cudnn::DescriptorType::operation_convolution_forward,
              Attribute::convolution_forward_alpha,
              Attribute::convolution_forward_beta,
              Attribute::convolution_forward_convolution,
              Attribute::convolution_forward_x,
              Attribute::convolution_forward_w,
              Attribute::convolution_forward_y};
    case ConvolutionPass::data_gradient:
    case ConvolutionPass::norm_data_gradient:
      return {cudnn::DescriptorType::operation_convolution_backward_data,
              Attribute::convolution_backward_data_alpha,
              Attribute::convolution_backward_data_beta,
              Attribute::convolution_backward_data_convolution,
              Attribute::convolution_backward_data_dx,
              Attribute::convolution_backward_data_w,
              Attribute::convolution_backward_data_dy};
    default:
      return {cudnn::DescriptorType::operation_convolution_backward_filter,
              Attribute::convolution_backward_filter_alpha,
              Attribute::convolution_backward_filter_beta,
              Attribute::convolution_backward_filter_convolution,
              Attribute::convolution_backward_filter_x,
              Attribute::convolution_backward_filter_dw,
              Attribute::convolution_backward_filter_dy};
  }
}

std::string describe(const ConvolutionShape& s, ConvolutionPass pass) {
  const auto map = [&](int64_t size, int64_t channels) {
    return "[" + std::to_string(s.batch) + ", " + std::to_string(size) + ", " +
           std::to_string(size) + ", " + std::to_string(channels) + "]";
  };
  return std::string("the ") + pass_name(pass) + " of a convolution " +
         map(s.in_size, s.in_channels) + " -> " + map(s.out_size, s.out_channels) + ", kernel " +
         std::to_string(s.kernel) + ", stride " + std::to_string(s.stride) + ", padding " +
         std::to_string(s.padding) + ", " + name_of(s.precision);
}

// relu(scale x + bias), between x and the convolution.
const CudnnDescriptor& apply_norm(GraphBuilder& graph, const ConvolutionShape& s,
                                  const CudnnDescriptor& x) {
  using cudnn::DataType;
  using cudnn::PointwiseMode;
  const auto between = [&](DataType type) -> const CudnnDescriptor& {
    return graph.between(type, s.batch, s.in_channels, s.in_size);
  };
  const CudnnDescriptor& scale = graph.map(kScale, DataType::fp16, 1, s.in_channels, 1);
  const CudnnDescriptor& bias = graph.map(kBias, DataType::fp16, 1, s.in_channels, 1);
  const CudnnDescriptor& scaled = between(DataType::fp32);
  const CudnnDescriptor& shifted = between(DataType::fp32);
  const CudnnDescriptor& a = between(data_type(s.precision));
  graph.add_pointwise(PointwiseMode::multiply, x, &scale, scaled);
  graph.add_pointwise(PointwiseMode::add, scaled, &bias, shifted);
  graph.add_pointwise(PointwiseMode::relu_forward, shifted, nullptr, a);
  return a;
}

void add_sums(GraphBuilder& graph, const CudnnDescriptor& y, int64_t channels) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  const auto fp32 = cudnn::DataType::fp32;
  CudnnDescriptor& sums = graph.part(cudnn::DescriptorType::operation_statistics);
  sums.set(Attribute::statistics_mode, AttributeType::statistics_mode,
           cudnn::StatisticsMode::sum_and_squares);
  sums.set(Attribute::statistics_compute_type, AttributeType::data_type, fp32);
  sums.set(Attribute::statistics_x, y);
  sums.set(Attribute::statistics_sum, graph.map(kSum, fp32, 1, channels, 1));
  sums.set(Attribute::statistics_squares, graph.map(kSquares, fp32, 1, channels, 1));
  graph.add(sums);
}

// From da, which is between the operations, its part where a > 0, and the gradients of a's
// batch-norm. The ReLU's side is found again from the batch-norm's input.
void add_norm_gradient(GraphBuilder& graph, const ConvolutionShape& s, const CudnnDescriptor& da) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  using cudnn::PointwiseMode;
  const auto fp32 = cudnn::DataType::fp32;
  const cudnn::DataType type = data_type(s.precision);
  const auto channels = [&](int64_t id) -> const CudnnDescriptor& {
    return graph.map(id, fp32, 1, s.in_channels, 1);
  };
  const auto between = [&]() -> const CudnnDescriptor& {
    return graph.between(fp32, s.batch, s.in_channels, s.in_size);
  };
  const CudnnDescriptor& x = graph.map(kNormInput, type, s.batch, s.in_channels, s.in_size);
  const CudnnDescriptor& mean = channels(kMean);
  const CudnnDescriptor& inverse_deviation = channels(kInverseDeviation);
  const CudnnDescriptor& gamma = channels(kGamma);
  const CudnnDescriptor& centred = between();
  const CudnnDescriptor& normalised = between();
  const CudnnDescriptor& scaled = between();
  const CudnnDescriptor& shifted = between();
  graph.add_pointwise(PointwiseMode::subtract, x, &mean, centred);
  graph.add_pointwise(PointwiseMode::multiply, centred, &inverse_deviation, normalised);
  graph.add_pointwise(PointwiseMode::multiply, normalised, &gamma, scaled);
  graph.add_pointwise(PointwiseMode::add, scaled, &channels(kBeta), shifted);
  const CudnnDescriptor& masked = graph.map(kX, type, s.batch, s.in_channels, s.in_size);
  graph.add_pointwise_backward(PointwiseMode::relu_backward, da, shifted, masked);

  CudnnDescriptor& gradient = graph.part(cudnn::DescriptorType::operation_norm_backward_weights);
  gradient.set(Attribute::norm_backward_weights_compute_type, AttributeType::data_type, fp32);
  gradient.set(Attribute::norm_backward_weights_mean, mean);
  gradient.set(Attribute::norm_backward_weights_inverse_deviation, inverse_deviation);
  gradient.set(Attribute::norm_backward_weights_scale, gamma);
  gradient.set(Attribute::norm_backward_weights_x, x);
  gradient.set(Attribute::norm_backward_weights_dy, masked);
  gradient.set(Attribute::norm_backward_weights_dscale, channels(kGammaGradient));
  gradient.set(Attribute::norm_backward_weights_dbias, channels(kBetaGradient));
  gradient.set(Attribute::norm_backward_weights_by_dy, channels(kByDy));
  gradient.set(Attribute::norm_backward_weights_by_x, channels(kByX));
  gradient.set(Attribute::norm_backward_weights_constant, channels(kConstant));
  graph.add(gradient);
}

void build(GraphBuilder& graph, const ConvolutionShape& s, ConvolutionPass kind) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  const cudnn::DataType type = data_type(s.precision);
  const bool to_norm = kind == ConvolutionPass::norm_data_gradient;
  const CudnnDescriptor* x =
      to_norm ? &graph.between(cudnn::DataType::fp32, s.batch, s.in_channels, s.in_size)
              : &graph.map(kX, type, s.batch, s.in_channels, s.in_size);
  const CudnnDescriptor& w = graph.map(kW, type, s.out_channels, s.in_channels, s.kernel);
  const CudnnDescriptor& y = graph.map(kY, type, s.batch, s.out_channels, s.out_size);
  if (kind == ConvolutionPass::norm_forward_with_sums ||
      kind == ConvolutionPass::norm_weight_gradient)
    x = &apply_norm(graph, s, *x);

  CudnnDescriptor& convolution = graph.part(cudnn::DescriptorType::convolution);
  convolution.set(Attribute::convolution_compute_type, AttributeType::data_type,
                  cudnn::DataType::fp32);
  convolution.set(Attribute::convolution_mode, AttributeType::convolution_mode,
                  cudnn::ConvolutionMode::cross_correlation);
  convolution.set(Attribute::convolution_spatial_dimensions, AttributeType::int64, int64_t{2});
  convolution.set(Attribute::convolution_filter_strides,
                  std::array<int64_t, 2>{s.stride, s.stride});
  convolution.set(Attribute::convolution_dilations, std::array<int64_t, 2>{1, 1});
  convolution.set(Attribute::convolution_pre_paddings,
                  std::array<int64_t, 2>{s.padding, s.padding});
  convolution.set(Attribute::convolution_post_paddings,
                  std::array<int64_t, 2>{s.padding, s.padding});
  convolution.finalise(describe(s, kind));

  const Operation pass = operation_of(kind);
  CudnnDescriptor& operation = graph.part(pass.type);
  operation.set(pass.alpha, AttributeType::fp32, 1.0F);
  operation.set(pass.beta, AttributeType::fp32, 0.0F);
  operation.set(pass.convolution, convolution);
  operation.set(pass.x, *x);
  operation.set(pass.w, w);
  operation.set(pass.y, y);
  graph.add(operation);
  if (kind == ConvolutionPass::forward_with_sums || kind == ConvolutionPass::norm_forward_with_sums)
    add_sums(graph, y, s.out_channels);
  if (to_norm) add_norm_gradient(graph, s, *x);
}

}  // namespace

Engines::Graph convolution_graph(const ConvolutionShape& shape, ConvolutionPass pass) {
  return {describe(shape, pass), shape.precision,
          [=](GraphBuilder& graph) { build(graph, shape, pass); }};
}

EnginePointers convolution_pointers(const ConvolutionMaps& maps) {
  EnginePointers pointers{.workspace = maps.workspace};
  pointers.tensors[kX] = maps.x;
  pointers.tensors[kW] = maps.w;
  pointers.tensors[kY] = maps.y;
  pointers.tensors[kSum] = maps.sums;
  pointers.tensors[kSquares] = maps.squares;
  return pointers;
}

EnginePointers with_applied_norm(EnginePointers pointers, const AppliedNorm& norm) {
  pointers.tensors[kX] = norm.x;
  pointers.tensors[kScale] = norm.scale;
  pointers.tensors[kBias] = norm.bias;
  return pointers;
}

EnginePointers with_norm_gradient(EnginePointers pointers, const NormGradient& norm) {
  pointers.tensors[kNormInput] = norm.x;
  pointers.tensors[kMean] = norm.mean;
  pointers.tensors[kInverseDeviation] = norm.inverse_deviation;
  pointers.tensors[kGamma] = norm.gamma;
  pointers.tensors[kBeta] = norm.beta;
  pointers.tensors[kGammaGradient] = norm.gamma_gradient;
  pointers.tensors[kBetaGradient] = norm.beta_gradient;
  pointers.tensors[kByDy] = norm.coefficients;
  pointers.tensors[kByX] = norm.coefficients + norm.channels;
  pointers.tensors[kConstant] = norm.coefficients + 2 * norm.channels;
  return pointers;
}

}  // namespace hardmine::cuda
