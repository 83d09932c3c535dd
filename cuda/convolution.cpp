#include "cuda/convolution.h"

#include <array>
#include <string>

namespace hardmine::cuda {
namespace {

enum Tensor : int64_t { kX = 1, kW = 2, kY = 3, kSum = 4, kSquares = 5 };

cudnn::DataType data_type(Precision precision) {
  switch (precision) {
    case Precision::fp16:
      return cudnn::DataType::fp16;
    case Precision::bf16:
      return cudnn::DataType::bf16;
    default:
      return cudnn::DataType::fp32;
  }
}
const char* name_of(Precision precision) {
  return precision == Precision::fp16 ? "fp16" : precision == Precision::bf16 ? "bf16" : "fp32";
}
const char* name_of(ConvolutionPass pass) {
  switch (pass) {
    case ConvolutionPass::forward:
      return "forward";
    case ConvolutionPass::forward_with_sums:
      return "forward with sums";
    case ConvolutionPass::data_gradient:
      return "data gradient";
    default:
      return "weight gradient";
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
      return {cudnn::DescriptorType::operation_convolution_forward,
              Attribute::convolution_forward_alpha,
              Attribute::convolution_forward_beta,
              Attribute::convolution_forward_convolution,
              Attribute::convolution_forward_x,
              Attribute::convolution_forward_w,
              Attribute::convolution_forward_y};
    case ConvolutionPass::data_gradient:
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
  return std::string("the ") + name_of(pass) + " of a convolution " +
         map(s.in_size, s.in_channels) + " -> " + map(s.out_size, s.out_channels) + ", kernel " +
         std::to_string(s.kernel) + ", stride " + std::to_string(s.stride) + ", padding " +
         std::to_string(s.padding) + ", " + name_of(s.precision);
}

void build(GraphBuilder& graph, const ConvolutionShape& s, ConvolutionPass kind) {
  using cudnn::Attribute;
  using cudnn::AttributeType;
  using cudnn::DescriptorType;
  const cudnn::DataType type = data_type(s.precision);
  const CudnnDescriptor& x = graph.map(kX, type, s.batch, s.in_channels, s.in_size);
  const CudnnDescriptor& w = graph.map(kW, type, s.out_channels, s.in_channels, s.kernel);
  const CudnnDescriptor& y = graph.map(kY, type, s.batch, s.out_channels, s.out_size);

  CudnnDescriptor& convolution = graph.part(DescriptorType::convolution);
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
  operation.set(pass.x, x);
  operation.set(pass.w, w);
  operation.set(pass.y, y);
  graph.add(operation);
  if (kind != ConvolutionPass::forward_with_sums) return;

  const auto fp32 = cudnn::DataType::fp32;
  CudnnDescriptor& sums = graph.part(DescriptorType::operation_statistics);
  sums.set(Attribute::statistics_mode, AttributeType::statistics_mode,
           cudnn::StatisticsMode::sum_and_squares);
  sums.set(Attribute::statistics_compute_type, AttributeType::data_type, fp32);
  sums.set(Attribute::statistics_x, y);
  sums.set(Attribute::statistics_sum, graph.map(kSum, fp32, 1, s.out_channels, 1));
  sums.set(Attribute::statistics_squares, graph.map(kSquares, fp32, 1, s.out_channels, 1));
  graph.add(sums);
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

}  // namespace hardmine::cuda
