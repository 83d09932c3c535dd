// Matrix products on cuBLASLt: row-major C[m, n] = alpha op(A) op(B) + beta C, summed in fp32.
//
// fp32 operands are multiplied as TF32; NVIDIA_TF32_OVERRIDE=0 in the environment makes the library
// use full fp32. Split dot products are only ever summed through the workspace, in a fixed order,
// so that results repeat bit for bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <type_traits>

#include "cuda/libraries.h"
#include "cuda/runtime.h"

namespace hardmine::cuda {

enum class NumberType : uint8_t { fp32, fp16, bf16 };

template <typename T>
constexpr NumberType number_type() {
  if constexpr (std::is_same_v<T, __half>) return NumberType::fp16;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return NumberType::bf16;
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, __half> ||
                std::is_same_v<T, __nv_bfloat16>);
  return NumberType::fp32;
}
inline constexpr const char* kNumberNames[] = {"fp32", "fp16", "bf16"};

// op(A) is [m, k], op(B) [k, n], C [m, n]. A leading dimension is the distance between the rows of
// the matrix as stored; 0 means packed.
struct ProductShape {
  int64_t m = 0, n = 0, k = 0;
  bool transpose_a = false;  // A is stored [k, m]
  bool transpose_b = false;  // B is stored [n, k]
  NumberType operands = NumberType::fp32;
  NumberType result = NumberType::fp32;  // fp32, or as the operands
  int64_t lda = 0, ldb = 0, ldc = 0;

  auto operator<=>(const ProductShape&) const = default;
};

// NVIDIA's own figure for Hopper, which its fastest algorithms want; older GPUs do with less.
constexpr size_t product_workspace_bytes(int compute_major) {
  return compute_major >= 9 ? size_t{32} << 20 : size_t{4} << 20;
}

// Products on one stream with one workspace; products on another stream need their own.
class Products {
 public:
  Products(const CublasLt& library, cudaStream_t stream, void* workspace, size_t workspace_bytes);
  // Pointers may be aligned to one element only, which the library may answer with a slower
  // algorithm. With beta 0, C is not read. The algorithm is the heuristic's first and is kept for
  // the shape, so a captured product was run once before.
  void multiply(const ProductShape& shape, float alpha, const void* a, const void* b, float beta,
                void* c);

 private:
  template <typename Handle>
  using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, cublas_lt::Status (*)(Handle)>;
  struct Prepared {
    Owned<cublas_lt::MatmulDescriptor> matmul;
    Owned<cublas_lt::Layout> a, b, c;
    cublas_lt::Algorithm algorithm{};
  };
  struct Key {
    ProductShape shape;
    std::array<uint32_t, 3> alignment{};  // of a, b and c, bytes
    auto operator<=>(const Key&) const = default;
  };
  Prepared prepare(const Key& key) const;

  CublasLt library_;
  cudaStream_t stream_;
  void* workspace_;
  size_t workspace_bytes_;
  std::unique_ptr<struct cublas_lt::Context, HandleDestroyer<cublas_lt::Handle, cublas_lt::Status>>
      handle_;
  std::map<Key, Prepared> prepared_;
};

// The three products of a margin head over `rows` embeddings of size `dim` and a chunk of `width`
// classes, as run_head (cuda/head_pipeline.h) asks for them; all matrices packed.
template <typename T>
struct HeadProducts {
  Products& products;
  int64_t rows, dim;

  // [rows, width] = embeddings [rows, dim] class_weights [width, dim]^T
  void logits(const T* embeddings, const T* class_weights, int64_t width, float* out) {
    multiply({.m = rows, .n = width, .k = dim, .transpose_b = true}, embeddings, class_weights, 0,
             out);
  }
  // [rows, dim] += probabilities [rows, width] class_weights [width, dim]
  void embedding_gradient(const T* probabilities, const T* class_weights, int64_t width,
                          float* out) {
    multiply({.m = rows, .n = dim, .k = width}, probabilities, class_weights, 1, out);
  }
  // [width, dim] = probabilities [rows, width]^T embeddings [rows, dim]
  void weight_gradient(const T* probabilities, const T* embeddings, int64_t width, float* out) {
    multiply({.m = width, .n = dim, .k = rows, .transpose_a = true}, probabilities, embeddings, 0,
             out);
  }

 private:
  void multiply(ProductShape shape, const T* a, const T* b, float beta, float* c) {
    shape.operands = number_type<T>();
    products.multiply(shape, 1, a, b, beta, c);
  }
};

}  // namespace hardmine::cuda
