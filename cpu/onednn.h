// Everything of oneDNN that hardmine calls, behind one surface for its 2.x and 3.x interfaces (3.0
// dropped operation descriptors: primitive descriptors are built directly). No other file of the
// project may test DNNL_VERSION_MAJOR.
#pragma once

#include <oneapi/dnnl/dnnl_debug.h>

#include <oneapi/dnnl/dnnl.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"

namespace hardmine::onednn {

using dnnl::engine;
using dnnl::memory;
using dnnl::primitive_attr;
using dnnl::stream;

// Runs f and turns a dnnl::error into an Error that names the call.
template <typename F>
auto checked(const char* call, F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const dnnl::error& e) {
    throw Error(codes::kBackend, std::string("oneDNN refused ") + call + ": " + e.what());
  }
}

// dst = src x weights (+ dst where attr has a sum post-op). Strides and data types are the
// descriptors'.
inline dnnl::matmul::primitive_desc matmul_desc(const engine& engine, const memory::desc& src,
                                                const memory::desc& weights,
                                                const memory::desc& dst,
                                                const primitive_attr& attr) {
  return checked("a matrix product", [&] {
#if DNNL_VERSION_MAJOR >= 3
    return dnnl::matmul::primitive_desc(engine, src, weights, dst, attr);
#else
    return dnnl::matmul::primitive_desc(dnnl::matmul::desc(src, weights, dst), attr, engine);
#endif
  });
}

// A square convolution without dilation or groups.
struct Convolution {
  int64_t batch = 0;
  int64_t in_channels = 0, out_channels = 0;
  int64_t in_size = 0, out_size = 0;
  int kernel = 0, stride = 0, padding = 0;

  memory::dims src_dims() const { return {batch, in_channels, in_size, in_size}; }
  memory::dims weights_dims() const { return {out_channels, in_channels, kernel, kernel}; }
  memory::dims dst_dims() const { return {batch, out_channels, out_size, out_size}; }
  memory::dims strides() const { return {stride, stride}; }
  memory::dims paddings() const { return {padding, padding}; }
};

// Forward for training, no bias.
inline dnnl::convolution_forward::primitive_desc convolution_training_desc(
    const engine& engine, const Convolution& shape, const memory::desc& src,
    const memory::desc& weights, const memory::desc& dst, const primitive_attr& attr) {
  return checked("a convolution", [&] {
#if DNNL_VERSION_MAJOR >= 3
    return dnnl::convolution_forward::primitive_desc(
        engine, dnnl::prop_kind::forward_training, dnnl::algorithm::convolution_direct, src,
        weights, dst, shape.strides(), shape.paddings(), shape.paddings(), attr);
#else
    return dnnl::convolution_forward::primitive_desc(
        dnnl::convolution_forward::desc(
            dnnl::prop_kind::forward_training, dnnl::algorithm::convolution_direct, src, weights, dst,
            shape.strides(), shape.paddings(), shape.paddings()),
        attr, engine);
#endif
  });
}

// Forward for inference, with bias.
inline dnnl::convolution_forward::primitive_desc convolution_inference_desc(
    const engine& engine, const Convolution& shape, const memory::desc& src,
    const memory::desc& weights, const memory::desc& bias, const memory::desc& dst,
    const primitive_attr& attr) {
  return checked("a convolution", [&] {
#if DNNL_VERSION_MAJOR >= 3
    return dnnl::convolution_forward::primitive_desc(
        engine, dnnl::prop_kind::forward_inference, dnnl::algorithm::convolution_direct, src,
        weights, bias, dst, shape.strides(), shape.paddings(), shape.paddings(), attr);
#else
    return dnnl::convolution_forward::primitive_desc(
        dnnl::convolution_forward::desc(
            dnnl::prop_kind::forward_inference, dnnl::algorithm::convolution_direct, src, weights,
            bias, dst, shape.strides(), shape.paddings(), shape.paddings()),
        attr, engine);
#endif
  });
}

inline dnnl::convolution_backward_data::primitive_desc convolution_backward_data_desc(
    const engine& engine, const Convolution& shape, const memory::desc& diff_src,
    const memory::desc& weights, const memory::desc& diff_dst, const primitive_attr& attr,
    const dnnl::convolution_forward::primitive_desc& forward) {
  return checked("a convolution's data gradient", [&] {
#if DNNL_VERSION_MAJOR >= 3
    return dnnl::convolution_backward_data::primitive_desc(
        engine, dnnl::algorithm::convolution_direct, diff_src, weights, diff_dst, shape.strides(),
        shape.paddings(), shape.paddings(), forward, attr);
#else
    return dnnl::convolution_backward_data::primitive_desc(
        dnnl::convolution_backward_data::desc(dnnl::algorithm::convolution_direct, diff_src, weights,
                                              diff_dst, shape.strides(), shape.paddings(),
                                              shape.paddings()),
        attr, engine, forward);
#endif
  });
}

inline dnnl::convolution_backward_weights::primitive_desc convolution_backward_weights_desc(
    const engine& engine, const Convolution& shape, const memory::desc& src,
    const memory::desc& diff_weights, const memory::desc& diff_dst, const primitive_attr& attr,
    const dnnl::convolution_forward::primitive_desc& forward) {
  return checked("a convolution's weight gradient", [&] {
#if DNNL_VERSION_MAJOR >= 3
    return dnnl::convolution_backward_weights::primitive_desc(
        engine, dnnl::algorithm::convolution_direct, src, diff_weights, diff_dst, shape.strides(),
        shape.paddings(), shape.paddings(), forward, attr);
#else
    return dnnl::convolution_backward_weights::primitive_desc(
        dnnl::convolution_backward_weights::desc(dnnl::algorithm::convolution_direct, src,
                                                 diff_weights, diff_dst, shape.strides(),
                                                 shape.paddings(), shape.paddings()),
        attr, engine, forward);
#endif
  });
}

// Attributes of a primitive whose temporary memory the caller provides.
inline primitive_attr user_scratchpad() {
  primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  return attributes;
}

// Appends ReLU to what a primitive writes.
inline void append_relu(dnnl::post_ops& operations) {
#if DNNL_VERSION_MAJOR >= 3
  operations.append_eltwise(dnnl::algorithm::eltwise_relu, 0.0F, 0.0F);
#else
  operations.append_eltwise(1.0F, dnnl::algorithm::eltwise_relu, 0.0F, 0.0F);
#endif
}

// Where the elements of a blocked NCHW descriptor lie.
struct Blocking {
  memory::dims strides;       // elements, of whole blocks for the channels
  int64_t channel_block = 1;  // neighbouring channels; 1: not blocked
  bool only_channels = true;  // no other dimension is blocked
};

inline Blocking blocking_of(const memory::desc& desc) {
  Blocking blocking;
#if DNNL_VERSION_MAJOR >= 3
  blocking.strides = desc.get_strides();
  const memory::dims blocks = desc.get_inner_blks();
  const memory::dims dimensions = desc.get_inner_idxs();
#else
  const dnnl_blocking_desc_t& data = desc.data.format_desc.blocking;
  blocking.strides.assign(data.strides, data.strides + desc.data.ndims);
  const memory::dims blocks(data.inner_blks, data.inner_blks + data.inner_nblks);
  const memory::dims dimensions(data.inner_idxs, data.inner_idxs + data.inner_nblks);
#endif
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (dimensions[i] == 1) {
      blocking.channel_block *= blocks[i];
    } else {
      blocking.only_channels = false;
    }
  }
  return blocking;
}

// "2.6.3" and the threading it was built for.
inline std::string version() {
  const dnnl_version_t* v = dnnl_version();
  return std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
}

inline std::string cpu_runtime() {
  switch (dnnl_version()->cpu_runtime) {
    case DNNL_RUNTIME_SEQ:
      return "sequential";
    case DNNL_RUNTIME_OMP:
      return "OpenMP";
    case DNNL_RUNTIME_TBB:
      return "TBB";
    case DNNL_RUNTIME_THREADPOOL:
      return "thread pool";
    default:
      return "other";
  }
}

// What the CPU offers for bf16 products, as oneDNN will use it (DNNL_MAX_CPU_ISA is honoured).
struct Bf16Support {
  bool possible = false;  // oneDNN has convolutions and products in bf16 at all
  bool fast = false;      // by AVX512_BF16 or AMX
  bool tiles = false;     // by AMX
  const char* isa = "";   // widest instruction set, as users know it
};

inline Bf16Support bf16_support() {
  // ISA codes are bit sets in which a wider set contains the bits of a narrower one.
  const auto isa = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  const auto has = [isa](dnnl::cpu_isa wanted) {
    return (isa & static_cast<unsigned>(wanted)) == static_cast<unsigned>(wanted);
  };
  if (has(dnnl::cpu_isa::avx512_core_amx)) return {true, true, true, "AMX_BF16"};
  if (has(dnnl::cpu_isa::avx512_core_bf16)) return {true, true, false, "AVX512_BF16"};
  if (has(dnnl::cpu_isa::avx512_core)) return {true, false, false, "AVX512"};
  if (has(dnnl::cpu_isa::avx2)) return {false, false, false, "AVX2"};
  return {false, false, false, "SSE4.1"};
}

// A primitive bound to its memories, ready to run without taking memory: the argument list is built
// once (dnnl::primitive::execute builds one at every call).
class Call {
 public:
  Call() = default;
  Call(dnnl::primitive primitive, std::vector<std::pair<int, memory>> arguments)
      : primitive_(std::move(primitive)), memories_(std::move(arguments)) {
    for (const auto& [index, value] : memories_) arguments_.push_back({index, value.get()});
  }
  void run(const stream& stream) const {
    const dnnl_status_t status = dnnl_primitive_execute(
        primitive_.get(), stream.get(), static_cast<int>(arguments_.size()), arguments_.data());
    if (status != dnnl_success) {
      throw Error(codes::kBackend,
                  std::string("oneDNN failed to run a primitive: ") + dnnl_status2str(status));
    }
  }

 private:
  dnnl::primitive primitive_;
  std::vector<std::pair<int, memory>> memories_;
  std::vector<dnnl_exec_arg_t> arguments_;
};

}  // namespace hardmine::onednn
