// Everything of oneDNN that hardmine calls, behind one surface for its 2.x and 3.x interfaces (3.0
// dropped operation descriptors: primitive descriptors are built directly). No other file of the
// project may test DNNL_VERSION_MAJOR.
#pragma once

#include <oneapi/dnnl/dnnl.hpp>

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

// dst = src x weights (+ dst where attr has a sum post-op). Strides and data types are the descriptors'.
inline dnnl::matmul::primitive_desc matmul_desc(const engine& engine, const memory::desc& src,
                                                const memory::desc& weights, const memory::desc& dst,
                                                const primitive_attr& attr) {
  return checked("a matrix product", [&] {
#if DNNL_VERSION_MAJOR >= 3
    return dnnl::matmul::primitive_desc(engine, src, weights, dst, attr);
#else
    return dnnl::matmul::primitive_desc(dnnl::matmul::desc(src, weights, dst), attr, engine);
#endif
  });
}

}  // namespace hardmine::onednn
