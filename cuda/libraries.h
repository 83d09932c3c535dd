// cuDNN 9 and cuBLASLt as this backend uses them: our own declarations of the few functions, types
// and numbers, opened at run time, so that an addon without them still loads and says what is
// missing. Numbers are the public ones of cudnn_graph.h (9.6) and cublasLt.h (12.6), compared with
// independent bindings made from cuDNN 9.24 and CUDA 12.8 and 13 headers; both libraries keep them
// within a major version.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace hardmine::cuda {

namespace cudnn {

enum class Status : int {
  success = 0,
  not_initialised = 1001,
  bad_parameter = 2000,
  not_finalised = 2004,
  not_supported = 3000,  // 3000 to 3999
  incompatible_driver = 3005,
  internal_error = 4000,
  device_allocation_failed = 4004,
  execution_failed = 5000,
};

enum class DataType : int { fp32 = 0, fp16 = 2, bf16 = 9 };
enum class PointwiseMode : int {
  add = 0,
  multiply = 1,
  subtract = 9,
  relu_forward = 100,
  relu_backward = 200,
};
enum class NanPropagation : int { no = 0, yes = 1 };
enum class ConvolutionMode : int { convolution = 0, cross_correlation = 1 };
enum class HeuristicMode : int { fallback = 2, a = 3 };
enum class StatisticsMode : int { sum_and_squares = 0 };
enum class NormMode : int { batch = 2 };
enum class NormPhase : int { inference = 0, training = 1 };

enum class NumericalNote : int {
  tensor_core = 0,
  down_convert_inputs = 1,
  nondeterministic = 4,
};

enum class DescriptorType : int {
  pointwise = 0,
  convolution = 1,
  engine = 2,
  engine_config = 3,
  engine_heuristic = 4,
  execution_plan = 5,
  knob_choice = 7,
  operation_convolution_forward = 10,
  operation_convolution_backward_filter = 11,
  operation_convolution_backward_data = 12,
  operation_pointwise = 13,
  operation_statistics = 14,
  operation_graph = 15,
  variant_pack = 16,
  tensor = 17,
  operation_norm_backward_weights = 23,
  operation_norm_forward = 29,
  operation_norm_backward = 30,
  device_properties = 38,  // since 9.8, as its attributes
};

enum class AttributeType : int {
  handle = 0,
  data_type = 1,
  boolean = 2,
  int64 = 3,
  fp32 = 4,
  void_pointer = 6,
  convolution_mode = 7,
  heuristic_mode = 8,
  knob_type = 9,
  nan_propagation = 10,
  numerical_note = 11,
  pointwise_mode = 14,
  descriptor = 15,
  statistics_mode = 16,
  character = 24,
  norm_mode = 27,
  norm_phase = 28,
};

enum class Attribute : int {
  pointwise_mode = 0,
  pointwise_compute_type = 1,
  pointwise_nan_propagation = 2,
  convolution_compute_type = 100,
  convolution_mode = 101,
  convolution_dilations = 102,
  convolution_filter_strides = 103,
  convolution_post_paddings = 104,
  convolution_pre_paddings = 105,
  convolution_spatial_dimensions = 106,
  heuristic_mode = 200,
  heuristic_operation_graph = 201,
  heuristic_results = 202,
  heuristic_device_properties = 204,
  engine_config_engine = 300,
  engine_config_knob_choices = 302,
  execution_plan_handle = 400,
  execution_plan_engine_config = 401,
  execution_plan_workspace_bytes = 402,
  knob_choice_type = 600,
  knob_choice_value = 601,
  convolution_forward_alpha = 700,
  convolution_forward_beta = 701,
  convolution_forward_convolution = 702,
  convolution_forward_w = 703,
  convolution_forward_x = 704,
  convolution_forward_y = 705,
  convolution_backward_data_alpha = 706,
  convolution_backward_data_beta = 707,
  convolution_backward_data_convolution = 708,
  convolution_backward_data_w = 709,
  convolution_backward_data_dx = 710,
  convolution_backward_data_dy = 711,
  convolution_backward_filter_alpha = 712,
  convolution_backward_filter_beta = 713,
  convolution_backward_filter_convolution = 714,
  convolution_backward_filter_dw = 715,
  convolution_backward_filter_x = 716,
  convolution_backward_filter_dy = 717,
  operation_pointwise_mode = 750,  // a pointwise descriptor
  operation_pointwise_x = 751,
  operation_pointwise_b = 752,
  operation_pointwise_y = 753,
  operation_pointwise_dx = 756,
  operation_pointwise_dy = 757,
  statistics_mode = 770,
  statistics_compute_type = 771,
  statistics_x = 772,
  statistics_sum = 773,
  statistics_squares = 774,
  operation_graph_handle = 800,
  operation_graph_operations = 801,
  tensor_byte_alignment = 900,
  tensor_data_type = 901,
  tensor_dimensions = 902,
  tensor_strides = 903,
  tensor_unique_id = 906,
  tensor_is_virtual = 907,
  tensor_is_by_value = 908,
  variant_pack_unique_ids = 1000,
  variant_pack_data_pointers = 1001,
  variant_pack_workspace = 1003,
  engine_global_index = 1301,
  engine_numerical_notes = 1303,
  norm_backward_weights_compute_type = 1620,
  norm_backward_weights_mean = 1621,
  norm_backward_weights_inverse_deviation = 1622,
  norm_backward_weights_scale = 1623,
  norm_backward_weights_x = 1624,
  norm_backward_weights_dy = 1625,
  norm_backward_weights_dscale = 1626,
  norm_backward_weights_dbias = 1627,
  norm_backward_weights_by_dy = 1628,
  norm_backward_weights_by_x = 1629,
  norm_backward_weights_constant = 1630,
  norm_forward_mode = 2000,
  norm_forward_phase = 2001,
  norm_forward_x = 2002,
  norm_forward_mean = 2003,
  norm_forward_inverse_deviation = 2004,
  norm_forward_scale = 2005,
  norm_forward_bias = 2006,
  norm_forward_epsilon = 2007,
  norm_forward_y = 2013,
  norm_backward_mode = 2100,
  norm_backward_x = 2101,
  norm_backward_mean = 2102,
  norm_backward_inverse_deviation = 2103,
  norm_backward_dy = 2104,
  norm_backward_scale = 2105,
  norm_backward_dscale = 2107,
  norm_backward_dbias = 2108,
  norm_backward_dx = 2109,
  device_properties_json = 2702,
};

using Handle = struct Context*;
using Descriptor = void*;

}  // namespace cudnn

namespace cublas_lt {

enum class Status : int {
  success = 0,
  not_initialised = 1,
  allocation_failed = 3,
  invalid_value = 7,
  not_supported = 15,
};

enum class DataType : int { fp32 = 0, fp16 = 2, bf16 = 14 };  // cudaDataType
enum class ComputeType : int { fp32 = 68, fp32_fast_tf32 = 77 };
enum class Transpose : int32_t { no = 0, yes = 1 };
enum class MatmulAttribute : int { transpose_a = 3, transpose_b = 4 };
enum class PreferenceAttribute : int {
  max_workspace_bytes = 1,    // uint64_t
  reduction_scheme_mask = 3,  // uint32_t of ReductionScheme
  min_alignment_a_bytes = 5,  // uint32_t, 256 unless set; b, c and d follow
  min_alignment_b_bytes = 6,
  min_alignment_c_bytes = 7,
  min_alignment_d_bytes = 8,
};
// How a split dot product is summed; "none" (0) is always allowed.
enum class ReductionScheme : uint32_t { in_place = 1, compute_type = 2, output_type = 4 };

using Handle = struct Context*;
using MatmulDescriptor = struct MatmulDescriptorOpaque*;
using Layout = struct LayoutOpaque*;
using Preference = struct PreferenceOpaque*;

struct Algorithm {
  uint64_t data[8];
};
struct HeuristicResult {
  Algorithm algorithm;
  size_t workspace_bytes;
  Status state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Algorithm) == 64 && sizeof(HeuristicResult) == 96);

}  // namespace cublas_lt

struct Cudnn {
  size_t (*get_version)();
  const char* (*get_error_string)(cudnn::Status);
  void (*get_last_error_string)(char* message, size_t bytes);
  cudnn::Status (*create)(cudnn::Handle*);
  cudnn::Status (*destroy)(cudnn::Handle);
  cudnn::Status (*set_stream)(cudnn::Handle, cudaStream_t);
  cudnn::Status (*create_descriptor)(cudnn::DescriptorType, cudnn::Descriptor*);
  cudnn::Status (*destroy_descriptor)(cudnn::Descriptor);
  cudnn::Status (*set_attribute)(cudnn::Descriptor, cudnn::Attribute, cudnn::AttributeType,
                                 int64_t count, const void* elements);
  cudnn::Status (*get_attribute)(cudnn::Descriptor, cudnn::Attribute, cudnn::AttributeType,
                                 int64_t requested, int64_t* count, void* elements);
  cudnn::Status (*finalise)(cudnn::Descriptor);
  cudnn::Status (*execute)(cudnn::Handle, cudnn::Descriptor plan, cudnn::Descriptor variant_pack);
};

struct CublasLt {
  size_t (*get_version)();
  const char* (*get_status_string)(cublas_lt::Status);
  cublas_lt::Status (*create)(cublas_lt::Handle*);
  cublas_lt::Status (*destroy)(cublas_lt::Handle);
  cublas_lt::Status (*matmul_create)(cublas_lt::MatmulDescriptor*, cublas_lt::ComputeType,
                                     cublas_lt::DataType scale);
  cublas_lt::Status (*matmul_destroy)(cublas_lt::MatmulDescriptor);
  cublas_lt::Status (*matmul_set)(cublas_lt::MatmulDescriptor, cublas_lt::MatmulAttribute,
                                  const void*, size_t bytes);
  cublas_lt::Status (*layout_create)(cublas_lt::Layout*, cublas_lt::DataType, uint64_t rows,
                                     uint64_t columns, int64_t leading_dimension);
  cublas_lt::Status (*layout_destroy)(cublas_lt::Layout);
  cublas_lt::Status (*preference_create)(cublas_lt::Preference*);
  cublas_lt::Status (*preference_destroy)(cublas_lt::Preference);
  cublas_lt::Status (*preference_set)(cublas_lt::Preference, cublas_lt::PreferenceAttribute,
                                      const void*, size_t bytes);
  cublas_lt::Status (*heuristic)(cublas_lt::Handle, cublas_lt::MatmulDescriptor,
                                 cublas_lt::Layout a, cublas_lt::Layout b, cublas_lt::Layout c,
                                 cublas_lt::Layout d, cublas_lt::Preference, int requested,
                                 cublas_lt::HeuristicResult*, int* returned);
  cublas_lt::Status (*matmul)(cublas_lt::Handle, cublas_lt::MatmulDescriptor, const void* alpha,
                              const void* a, cublas_lt::Layout, const void* b, cublas_lt::Layout,
                              const void* beta, const void* c, cublas_lt::Layout, void* d,
                              cublas_lt::Layout, const cublas_lt::Algorithm*, void* workspace,
                              size_t workspace_bytes, cudaStream_t);
};

// Throw unless the status is success; `what` names the call and the shape.
void check(const Cudnn& library, cudnn::Status status, std::string_view what);
void check(const CublasLt& library, cublas_lt::Status status, std::string_view what);

struct Libraries {
  Cudnn cudnn;
  CublasLt cublas_lt;
};

// The address of a function of a library, or null.
using SymbolSource = std::function<void*(const char* name)>;

// Throw codes::kUnavailable when a function is missing or the library is too old; `name` is what
// messages call the library.
Cudnn load_cudnn(const SymbolSource& symbols, const std::string& name);
CublasLt load_cublas_lt(const SymbolSource& symbols, const std::string& name);

// Open cuDNN, and both. Throw codes::kUnavailable with the sentence that describe_libraries()
// gives.
Cudnn open_cudnn();
Libraries open_libraries();

// For `doctor`: library -> version, or a sentence of what is missing and what brings it.
std::vector<std::pair<std::string, std::string>> describe_libraries();

// Whether fp32 may be multiplied as TF32: NVIDIA_TF32_OVERRIDE=0 in the environment forbids it.
bool tf32_allowed();

// "9.24.0" of cuDNN's 92400 and cuBLASLt's 130100.
std::string version_text(size_t version);

}  // namespace hardmine::cuda
