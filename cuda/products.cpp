#include "cuda/products.h"

#include <algorithm>
#include <compare>

#include "core/error.h"

namespace hardmine::cuda {
namespace {

cublas_lt::DataType data_type(NumberType type) {
  switch (type) {
    case NumberType::fp16:
      return cublas_lt::DataType::fp16;
    case NumberType::bf16:
      return cublas_lt::DataType::bf16;
    default:
      return cublas_lt::DataType::fp32;
  }
}

std::string describe(const ProductShape& s) {
  const auto matrix = [](const char* name, int64_t rows, int64_t columns, bool transposed) {
    return std::string(name) + "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]" +
           (transposed ? "^T" : "");
  };
  return "the product " + matrix("C", s.m, s.n, false) + " = " +
         (s.transpose_a ? matrix("A", s.k, s.m, true) : matrix("A", s.m, s.k, false)) + " " +
         (s.transpose_b ? matrix("B", s.n, s.k, true) : matrix("B", s.k, s.n, false)) + " of " +
         kNumberNames[static_cast<int>(s.operands)] + " to " +
         kNumberNames[static_cast<int>(s.result)];
}

// The largest power of two that divides the address, up to the library's default of 256.
uint32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address);
  return static_cast<uint32_t>(std::min<uintptr_t>(bits & (~bits + 1), 256));
}

}  // namespace

Products::Products(const CublasLt& library, cudaStream_t stream, void* workspace,
                   size_t workspace_bytes)
    : library_(library),
      stream_(stream),
      workspace_(workspace),
      workspace_bytes_(workspace_bytes),
      handle_(nullptr, {library.destroy}) {
  cublas_lt::Handle handle = nullptr;
  check(library_, library_.create(&handle), "cublasLtCreate");
  handle_.reset(handle);
}

Products::Prepared Products::prepare(const Key& key) const {
  const ProductShape& s = key.shape;
  const std::string what = describe(s);
  const auto checked = [&](cublas_lt::Status status) { check(library_, status, what); };
  const auto layout = [&](NumberType type, int64_t rows, int64_t columns, int64_t stride) {
    // The library counts in columns: a row-major [rows, columns] is a column-major [columns, rows].
    cublas_lt::Layout made = nullptr;
    checked(library_.layout_create(&made, data_type(type), static_cast<uint64_t>(columns),
                                   static_cast<uint64_t>(rows), stride == 0 ? columns : stride));
    return Owned<cublas_lt::Layout>(made, library_.layout_destroy);
  };
  cublas_lt::MatmulDescriptor matmul = nullptr;
  checked(library_.matmul_create(&matmul,
                                 s.operands == NumberType::fp32 && tf32_allowed()
                                     ? cublas_lt::ComputeType::fp32_fast_tf32
                                     : cublas_lt::ComputeType::fp32,
                                 cublas_lt::DataType::fp32));
  Prepared prepared{
      Owned<cublas_lt::MatmulDescriptor>(matmul, library_.matmul_destroy),
      s.transpose_a ? layout(s.operands, s.k, s.m, s.lda) : layout(s.operands, s.m, s.k, s.lda),
      s.transpose_b ? layout(s.operands, s.n, s.k, s.ldb) : layout(s.operands, s.k, s.n, s.ldb),
      layout(s.result, s.m, s.n, s.ldc)};
  // Column-major, C^T = op(B)^T op(A)^T: the operands change places.
  using Attribute = cublas_lt::MatmulAttribute;
  for (const auto& [attribute, transposed] : {std::pair{Attribute::transpose_a, s.transpose_b},
                                              std::pair{Attribute::transpose_b, s.transpose_a}}) {
    const auto value = transposed ? cublas_lt::Transpose::yes : cublas_lt::Transpose::no;
    checked(library_.matmul_set(matmul, attribute, &value, sizeof value));
  }

  cublas_lt::Preference made = nullptr;
  checked(library_.preference_create(&made));
  const Owned<cublas_lt::Preference> preference(made, library_.preference_destroy);
  const auto prefer = [&](cublas_lt::PreferenceAttribute attribute, auto value) {
    checked(library_.preference_set(preference.get(), attribute, &value, sizeof value));
  };
  using Preference = cublas_lt::PreferenceAttribute;
  prefer(Preference::max_workspace_bytes, uint64_t{workspace_bytes_});
  prefer(Preference::reduction_scheme_mask,
         static_cast<uint32_t>(cublas_lt::ReductionScheme::compute_type));
  prefer(Preference::min_alignment_a_bytes, key.alignment[1]);
  prefer(Preference::min_alignment_b_bytes, key.alignment[0]);
  prefer(Preference::min_alignment_c_bytes, key.alignment[2]);
  prefer(Preference::min_alignment_d_bytes, key.alignment[2]);

  cublas_lt::HeuristicResult result{};
  int returned = 0;
  checked(library_.heuristic(handle_.get(), matmul, prepared.b.get(), prepared.a.get(),
                             prepared.c.get(), prepared.c.get(), preference.get(), 1, &result,
                             &returned));
  if (returned < 1) {
    throw Error(codes::kBackend, "cuBLASLt knows no algorithm for " + what + " within " +
                                     std::to_string(workspace_bytes_) + " bytes of workspace.");
  }
  checked(result.state);
  prepared.algorithm = result.algorithm;
  return prepared;
}

void Products::multiply(const ProductShape& shape, float alpha, const void* a, const void* b,
                        float beta, void* c) {
  const Key key{shape, {alignment_of(a), alignment_of(b), alignment_of(c)}};
  auto found = prepared_.find(key);
  if (found == prepared_.end()) found = prepared_.emplace(key, prepare(key)).first;
  const Prepared& p = found->second;
  const cublas_lt::Status status =
      library_.matmul(handle_.get(), p.matmul.get(), &alpha, b, p.b.get(), a, p.a.get(), &beta, c,
                      p.c.get(), c, p.c.get(), &p.algorithm, workspace_, workspace_bytes_, stream_);
  if (status != cublas_lt::Status::success) check(library_, status, describe(shape));
}

}  // namespace hardmine::cuda
