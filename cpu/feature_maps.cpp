#include "cpu/feature_maps.h"

#include <algorithm>

namespace hardmine {

MapFormat::MapFormat(const onednn::engine& engine, const std::vector<Node>& nodes, int64_t batch,
                     onednn::memory::data_type type)
    : type_(type) {
  // The first convolution reads three channels, which has its own best layout; ask about the
  // widest.
  const Node* widest = nullptr;
  for (const Node& node : nodes) {
    if (node.op == Op::convolution &&
        (widest == nullptr || node.in_channels > widest->in_channels)) {
      widest = &node;
    }
  }
  if (widest == nullptr) return;
  using tag = onednn::memory::format_tag;
  const onednn::Convolution shape = convolution_of(*widest, batch);
  const auto preferred = onednn::convolution_training_desc(
      engine, shape, {shape.src_dims(), type, tag::any}, {shape.weights_dims(), type, tag::any},
      {shape.dst_dims(), type, tag::any}, {});
  const onednn::Blocking blocking = onednn::blocking_of(preferred.dst_desc());
  const bool blocked = blocking.channel_block == 16 || blocking.channel_block == 8;
  if (blocking.only_channels && blocked) block_ = blocking.channel_block;
}

onednn::memory::desc MapFormat::desc(int64_t batch, int64_t channels, int64_t size) const {
  using tag = onednn::memory::format_tag;
  const tag format = block_ == 16 ? tag::nChw16c : block_ == 8 ? tag::nChw8c : tag::nhwc;
  return {{batch, channels, size, size}, type_, format};
}

Layout MapFormat::layout(int64_t batch, int64_t channels, int64_t size) const {
  Layout layout;
  layout.plane.pixels = size * size;
  layout.plane.channels = block_ == 0 ? channels : block_;
  layout.blocks = (channels + layout.plane.channels - 1) / layout.plane.channels;
  layout.planes = batch * layout.blocks;
  return layout;
}

onednn::Convolution convolution_of(const Node& node, int64_t batch) {
  onednn::Convolution shape;
  shape.batch = batch;
  shape.in_channels = node.in_channels;
  shape.out_channels = node.out_channels;
  shape.in_size = node.in_size;
  shape.out_size = node.out_size;
  shape.kernel = node.kernel;
  shape.stride = node.stride;
  shape.padding = node.padding;
  return shape;
}

ImageLayout image_layout(const onednn::memory::desc& desc, int64_t size) {
  const onednn::Blocking blocking = onednn::blocking_of(desc);
  if (!blocking.only_channels) {
    throw Error(codes::kBackend,
                "oneDNN chose a layout for the images that blocks more than their "
                "channels, which this version of hardmine cannot write.");
  }
  ImageLayout layout;
  layout.size = size;
  layout.row = blocking.strides[2];
  layout.column = blocking.strides[3];
  for (int channel = 0; channel < 3; ++channel) {
    layout.channel[channel] =
        channel / blocking.channel_block * blocking.strides[1] + channel % blocking.channel_block;
  }
  return layout;
}

onednn::memory::data_type data_type_of(Precision precision) {
  switch (precision) {
    case Precision::fp32:
      return onednn::memory::data_type::f32;
    case Precision::bf16: {
      const onednn::Bf16Support support = onednn::bf16_support();
      if (!support.possible) {
        throw Error(codes::kConfig,
                    std::string("The precision bf16 needs a CPU with AVX-512; this one has ") +
                        support.isa + ". Use fp32.");
      }
      return onednn::memory::data_type::bf16;
    }
    case Precision::fp16:
      break;
  }
  throw Error(codes::kConfig, "The precision fp16 is for GPUs; on a CPU use bf16 or fp32.");
}

}  // namespace hardmine
