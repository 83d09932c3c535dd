#include "test/simt/fake_libraries.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace simt {
namespace {

using namespace hardmine::cuda;

FakeLibraries& fakes() {
  if (FakeLibraries::current == nullptr) throw Fault("a library call without its fake");
  return *FakeLibraries::current;
}

// ---- Numbers of any type as floats ----

enum class Type : uint8_t { fp32, fp16, bf16 };

size_t bytes_of(Type type) {
  return type == Type::fp32 ? 4 : 2;
}
template <typename T>
void load_as(const void* from, std::vector<float>& values) {
  const T* typed = static_cast<const T*>(from);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(typed[i]);
}
std::vector<float> load(const void* from, Type type, size_t count) {
  std::vector<float> values(count);
  if (type == Type::fp16) load_as<__half>(from, values);
  if (type == Type::bf16) load_as<__nv_bfloat16>(from, values);
  if (type == Type::fp32) load_as<float>(from, values);
  return values;
}
void store(void* to, Type type, size_t index, double value) {
  const float rounded = static_cast<float>(value);
  if (type == Type::fp16) static_cast<__half*>(to)[index] = __float2half_rn(rounded);
  if (type == Type::bf16) static_cast<__nv_bfloat16*>(to)[index] = __float2bfloat16_rn(rounded);
  if (type == Type::fp32) static_cast<float*>(to)[index] = rounded;
}
// What an unordered sum does to a result: a relative error that differs from run to run.
double noise(Type type) {
  const double unit = type == Type::fp32 ? 0x1p-23 : type == Type::fp16 ? 0x1p-10 : 0x1p-7;
  return 1 + unit * static_cast<double>(Device::current->draw() % 2);
}
// Enqueues library work as two kernels. The first fills all the workspace that was asked for; the
// second, which does the work, wants it as it was left: no stream may be given another's.
void enqueue_in_two(cudaStream_t stream, void* workspace, size_t bytes, std::function<void()> run,
                    double microseconds = 1) {
  static int works = 0;
  const auto mark = static_cast<unsigned char>(++works);
  if (bytes > 0)
    enqueue(
        stream, [=] { std::memset(workspace, mark, bytes); }, 0);
  enqueue(
      stream,
      [=, run = std::move(run)] {
        const auto* first = static_cast<const unsigned char*>(workspace);
        if (!std::all_of(first, first + bytes, [&](unsigned char byte) { return byte == mark; }))
          throw Fault("a workspace that something else writes to at the same time");
        run();
      },
      microseconds);
}

// ---- cuDNN ----

using cudnn::Attribute;
using cudnn::AttributeType;
using cudnn::DescriptorType;
using CudnnStatus = cudnn::Status;

struct Node {
  DescriptorType type{};
  bool finalised = false;
  struct Value {
    AttributeType type;
    int64_t count;
    std::vector<char> bytes;
  };
  std::map<Attribute, Value> values;
  // Set by the library itself.
  int64_t engine = 0;
  std::vector<std::pair<int, int64_t>> knobs;
  const Node* graph = nullptr;

  template <typename T>
  T get(Attribute attribute, size_t index = 0) const {
    T value;
    std::memcpy(&value, values.at(attribute).bytes.data() + index * sizeof(T), sizeof(T));
    return value;
  }
  const Node& node(Attribute attribute, size_t index = 0) const {
    return *static_cast<const Node*>(get<void*>(attribute, index));
  }
};

struct Rule {
  DescriptorType owner;
  Attribute attribute;
  AttributeType type;
  int64_t count;  // 0: any above 0
  bool required = true;
};

const std::vector<Rule>& rules() {
  using D = DescriptorType;
  using A = Attribute;
  using T = AttributeType;
  static const std::vector<Rule> all{
      {D::tensor, A::tensor_unique_id, T::int64, 1},
      {D::tensor, A::tensor_data_type, T::data_type, 1},
      {D::tensor, A::tensor_byte_alignment, T::int64, 1},
      {D::tensor, A::tensor_dimensions, T::int64, 4},
      {D::tensor, A::tensor_strides, T::int64, 4},
      {D::tensor, A::tensor_is_virtual, T::boolean, 1, false},
      {D::tensor, A::tensor_is_by_value, T::boolean, 1, false},
      {D::pointwise, A::pointwise_mode, T::pointwise_mode, 1},
      {D::pointwise, A::pointwise_compute_type, T::data_type, 1},
      {D::pointwise, A::pointwise_nan_propagation, T::nan_propagation, 1, false},
      {D::operation_pointwise, A::operation_pointwise_mode, T::descriptor, 1},
      {D::operation_pointwise, A::operation_pointwise_x, T::descriptor, 1},
      {D::operation_pointwise, A::operation_pointwise_b, T::descriptor, 1, false},
      {D::operation_pointwise, A::operation_pointwise_y, T::descriptor, 1, false},
      {D::operation_pointwise, A::operation_pointwise_dx, T::descriptor, 1, false},
      {D::operation_pointwise, A::operation_pointwise_dy, T::descriptor, 1, false},
      {D::convolution, A::convolution_compute_type, T::data_type, 1},
      {D::convolution, A::convolution_mode, T::convolution_mode, 1},
      {D::convolution, A::convolution_spatial_dimensions, T::int64, 1},
      {D::convolution, A::convolution_filter_strides, T::int64, 2},
      {D::convolution, A::convolution_dilations, T::int64, 2},
      {D::convolution, A::convolution_pre_paddings, T::int64, 2},
      {D::convolution, A::convolution_post_paddings, T::int64, 2},
      {D::operation_convolution_forward, A::convolution_forward_alpha, T::fp32, 1},
      {D::operation_convolution_forward, A::convolution_forward_beta, T::fp32, 1},
      {D::operation_convolution_forward, A::convolution_forward_convolution, T::descriptor, 1},
      {D::operation_convolution_forward, A::convolution_forward_x, T::descriptor, 1},
      {D::operation_convolution_forward, A::convolution_forward_w, T::descriptor, 1},
      {D::operation_convolution_forward, A::convolution_forward_y, T::descriptor, 1},
      {D::operation_convolution_backward_data, A::convolution_backward_data_alpha, T::fp32, 1},
      {D::operation_convolution_backward_data, A::convolution_backward_data_beta, T::fp32, 1},
      {D::operation_convolution_backward_data, A::convolution_backward_data_convolution,
       T::descriptor, 1},
      {D::operation_convolution_backward_data, A::convolution_backward_data_w, T::descriptor, 1},
      {D::operation_convolution_backward_data, A::convolution_backward_data_dx, T::descriptor, 1},
      {D::operation_convolution_backward_data, A::convolution_backward_data_dy, T::descriptor, 1},
      {D::operation_convolution_backward_filter, A::convolution_backward_filter_alpha, T::fp32, 1},
      {D::operation_convolution_backward_filter, A::convolution_backward_filter_beta, T::fp32, 1},
      {D::operation_convolution_backward_filter, A::convolution_backward_filter_convolution,
       T::descriptor, 1},
      {D::operation_convolution_backward_filter, A::convolution_backward_filter_x, T::descriptor,
       1},
      {D::operation_convolution_backward_filter, A::convolution_backward_filter_dw, T::descriptor,
       1},
      {D::operation_convolution_backward_filter, A::convolution_backward_filter_dy, T::descriptor,
       1},
      {D::operation_graph, A::operation_graph_handle, T::handle, 1, false},
      {D::operation_statistics, A::statistics_mode, T::statistics_mode, 1},
      {D::operation_statistics, A::statistics_compute_type, T::data_type, 1},
      {D::operation_statistics, A::statistics_x, T::descriptor, 1},
      {D::operation_statistics, A::statistics_sum, T::descriptor, 1},
      {D::operation_statistics, A::statistics_squares, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_compute_type, T::data_type, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_mean, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_inverse_deviation,
       T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_scale, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_x, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_dy, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_dscale, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_dbias, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_by_dy, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_by_x, T::descriptor, 1},
      {D::operation_norm_backward_weights, A::norm_backward_weights_constant, T::descriptor, 1},
      {D::operation_norm_forward, A::norm_forward_mode, T::norm_mode, 1},
      {D::operation_norm_forward, A::norm_forward_phase, T::norm_phase, 1},
      {D::operation_norm_forward, A::norm_forward_x, T::descriptor, 1},
      {D::operation_norm_forward, A::norm_forward_mean, T::descriptor, 1},
      {D::operation_norm_forward, A::norm_forward_inverse_deviation, T::descriptor, 1},
      {D::operation_norm_forward, A::norm_forward_scale, T::descriptor, 1},
      {D::operation_norm_forward, A::norm_forward_bias, T::descriptor, 1},
      {D::operation_norm_forward, A::norm_forward_epsilon, T::descriptor, 1},
      {D::operation_norm_forward, A::norm_forward_y, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_mode, T::norm_mode, 1},
      {D::operation_norm_backward, A::norm_backward_x, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_mean, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_inverse_deviation, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_dy, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_scale, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_dscale, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_dbias, T::descriptor, 1},
      {D::operation_norm_backward, A::norm_backward_dx, T::descriptor, 1},
      {D::operation_graph, A::operation_graph_operations, T::descriptor, 0},
      {D::device_properties, A::device_properties_json, T::character, 0},
      {D::engine_heuristic, A::heuristic_operation_graph, T::descriptor, 1},
      {D::engine_heuristic, A::heuristic_mode, T::heuristic_mode, 1},
      {D::engine_heuristic, A::heuristic_device_properties, T::descriptor, 1, false},
      {D::execution_plan, A::execution_plan_handle, T::handle, 1, false},
      {D::execution_plan, A::execution_plan_engine_config, T::descriptor, 1},
      {D::variant_pack, A::variant_pack_unique_ids, T::int64, 0},
      {D::variant_pack, A::variant_pack_data_pointers, T::void_pointer, 0},
      {D::variant_pack, A::variant_pack_workspace, T::void_pointer, 1},
  };
  return all;
}

size_t element_bytes(AttributeType type) {
  switch (type) {
    case AttributeType::boolean:
    case AttributeType::character:
      return 1;
    case AttributeType::handle:
    case AttributeType::int64:
    case AttributeType::void_pointer:
    case AttributeType::descriptor:
      return 8;
    default:
      return 4;  // enumerators and floats
  }
}

CudnnStatus refuse(CudnnStatus status, const std::string& why) {
  fakes().last_error = why;
  return status;
}
std::string number(Attribute attribute) {
  return std::to_string(static_cast<int>(attribute));
}

CudnnStatus create_descriptor(DescriptorType type, cudnn::Descriptor* descriptor) {
  auto* node = new Node;
  node->type = type;
  *descriptor = node;
  ++fakes().objects;
  ++fakes().allocations;
  return CudnnStatus::success;
}
CudnnStatus destroy_descriptor(cudnn::Descriptor descriptor) {
  delete static_cast<Node*>(descriptor);
  if (FakeLibraries::current != nullptr) --FakeLibraries::current->objects;
  return CudnnStatus::success;
}

CudnnStatus set_attribute(cudnn::Descriptor descriptor, Attribute attribute, AttributeType type,
                          int64_t count, const void* elements) {
  Node& node = *static_cast<Node*>(descriptor);
  if (node.finalised)
    return refuse(CudnnStatus::bad_parameter,
                  "attribute " + number(attribute) + " is set on a finalised descriptor");
  const auto rule = std::find_if(rules().begin(), rules().end(), [&](const Rule& r) {
    return r.owner == node.type && r.attribute == attribute;
  });
  if (rule == rules().end())
    return refuse(CudnnStatus::bad_parameter,
                  "attribute " + number(attribute) + " is not of this descriptor");
  if (rule->type != type || count < 1 || (rule->count != 0 && rule->count != count))
    return refuse(CudnnStatus::bad_parameter,
                  "attribute " + number(attribute) + " has the wrong type or count");
  if (type == AttributeType::descriptor) {
    for (int64_t i = 0; i < count; ++i) {
      const auto* given = static_cast<Node* const*>(elements)[i];
      if (given == nullptr || !given->finalised)
        return refuse(CudnnStatus::not_finalised,
                      "attribute " + number(attribute) + " is a descriptor that is not finalised");
    }
  }
  const char* bytes = static_cast<const char*>(elements);
  node.values[attribute] = {
      type, count,
      std::vector<char>(bytes, bytes + element_bytes(type) * static_cast<size_t>(count))};
  return CudnnStatus::success;
}

struct Tensor {
  int64_t id, n, c, size;
  Type type;
  bool between;   // operations: never in memory
  bool by_value;  // a number in the host's memory
  bool operator==(const Tensor&) const = default;
  size_t count() const { return static_cast<size_t>(n * c * size * size); }
  bool of_channels(int64_t channels) const { return n == 1 && size == 1 && c == channels; }
  bool same_shape(const Tensor& other) const {
    return n == other.n && c == other.c && size == other.size;
  }
};

Tensor tensor_of(const Node& node) {
  const auto type = node.get<cudnn::DataType>(Attribute::tensor_data_type);
  return {node.get<int64_t>(Attribute::tensor_unique_id),
          node.get<int64_t>(Attribute::tensor_dimensions, 0),
          node.get<int64_t>(Attribute::tensor_dimensions, 1),
          node.get<int64_t>(Attribute::tensor_dimensions, 2),
          type == cudnn::DataType::fp16   ? Type::fp16
          : type == cudnn::DataType::bf16 ? Type::bf16
                                          : Type::fp32,
          node.values.contains(Attribute::tensor_is_virtual) &&
              node.get<bool>(Attribute::tensor_is_virtual),
          node.values.contains(Attribute::tensor_is_by_value) &&
              node.get<bool>(Attribute::tensor_is_by_value)};
}

// One operation, understood. A convolution's tensors are [x, w] to [y], [w, y] to [x] or [x, y] to
// [w]; a pointwise operation's [x, b] to [y] or [x, dy] to [dx].
struct Operation {
  std::string name;
  std::vector<Tensor> in, out;
  int64_t stride = 1, padding = 0;
  double alpha = 1, beta = 0;
};

bool is_operation(DescriptorType type) {
  switch (type) {
    case DescriptorType::operation_convolution_forward:
    case DescriptorType::operation_convolution_backward_data:
    case DescriptorType::operation_convolution_backward_filter:
    case DescriptorType::operation_pointwise:
    case DescriptorType::operation_statistics:
    case DescriptorType::operation_norm_forward:
    case DescriptorType::operation_norm_backward:
    case DescriptorType::operation_norm_backward_weights:
      return true;
    default:
      return false;
  }
}

Operation operation_of(const Node& node) {
  using A = Attribute;
  Operation made;
  const auto tensors = [&](const std::vector<A>& attributes) {
    std::vector<Tensor> list;
    for (const A attribute : attributes) list.push_back(tensor_of(node.node(attribute)));
    return list;
  };
  const auto convolution = [&](A alpha, A beta, A geometry) {
    made.alpha = node.get<float>(alpha);
    made.beta = node.get<float>(beta);
    made.stride = node.node(geometry).get<int64_t>(A::convolution_filter_strides);
    made.padding = node.node(geometry).get<int64_t>(A::convolution_pre_paddings);
  };
  switch (node.type) {
    case DescriptorType::operation_convolution_forward:
      made.name = "forward";
      convolution(A::convolution_forward_alpha, A::convolution_forward_beta,
                  A::convolution_forward_convolution);
      made.in = tensors({A::convolution_forward_x, A::convolution_forward_w});
      made.out = tensors({A::convolution_forward_y});
      break;
    case DescriptorType::operation_convolution_backward_data:
      made.name = "data";
      convolution(A::convolution_backward_data_alpha, A::convolution_backward_data_beta,
                  A::convolution_backward_data_convolution);
      made.in = tensors({A::convolution_backward_data_w, A::convolution_backward_data_dy});
      made.out = tensors({A::convolution_backward_data_dx});
      break;
    case DescriptorType::operation_convolution_backward_filter:
      made.name = "filter";
      convolution(A::convolution_backward_filter_alpha, A::convolution_backward_filter_beta,
                  A::convolution_backward_filter_convolution);
      made.in = tensors({A::convolution_backward_filter_x, A::convolution_backward_filter_dy});
      made.out = tensors({A::convolution_backward_filter_dw});
      break;
    case DescriptorType::operation_statistics:
      made.name = "sums";
      made.in = tensors({A::statistics_x});
      made.out = tensors({A::statistics_sum, A::statistics_squares});
      break;
    case DescriptorType::operation_pointwise:
      switch (node.node(A::operation_pointwise_mode).get<cudnn::PointwiseMode>(A::pointwise_mode)) {
        case cudnn::PointwiseMode::add:
          made.name = "add";
          break;
        case cudnn::PointwiseMode::multiply:
          made.name = "multiply";
          break;
        case cudnn::PointwiseMode::subtract:
          made.name = "subtract";
          break;
        case cudnn::PointwiseMode::relu_forward:
          made.name = "relu";
          break;
        case cudnn::PointwiseMode::relu_backward:
          made.name = "relu-gradient";
          break;
      }
      for (const A input :
           {A::operation_pointwise_x, A::operation_pointwise_b, A::operation_pointwise_dy})
        if (node.values.contains(input)) made.in.push_back(tensor_of(node.node(input)));
      for (const A output : {A::operation_pointwise_y, A::operation_pointwise_dx})
        if (node.values.contains(output)) made.out.push_back(tensor_of(node.node(output)));
      break;
    case DescriptorType::operation_norm_forward: {
      const bool trains =
          node.get<cudnn::NormPhase>(A::norm_forward_phase) == cudnn::NormPhase::training;
      made.name = trains ? "norm" : "normalise";
      made.in = tensors({A::norm_forward_x, A::norm_forward_scale, A::norm_forward_bias,
                         A::norm_forward_epsilon});
      made.out = tensors({A::norm_forward_y});
      for (const A statistic : {A::norm_forward_mean, A::norm_forward_inverse_deviation})
        (trains ? made.out : made.in).push_back(tensor_of(node.node(statistic)));
      break;
    }
    case DescriptorType::operation_norm_backward:
      made.name = "norm-backward";
      made.in = tensors({A::norm_backward_x, A::norm_backward_dy, A::norm_backward_mean,
                         A::norm_backward_inverse_deviation, A::norm_backward_scale});
      made.out = tensors({A::norm_backward_dx, A::norm_backward_dscale, A::norm_backward_dbias});
      break;
    case DescriptorType::operation_norm_backward_weights:
      made.name = "norm-gradient";
      made.in = tensors({A::norm_backward_weights_x, A::norm_backward_weights_dy,
                         A::norm_backward_weights_mean, A::norm_backward_weights_inverse_deviation,
                         A::norm_backward_weights_scale});
      made.out = tensors({A::norm_backward_weights_dscale, A::norm_backward_weights_dbias,
                          A::norm_backward_weights_by_dy, A::norm_backward_weights_by_x,
                          A::norm_backward_weights_constant});
      break;
    default:
      made.name = "?";
  }
  return made;
}

std::vector<Operation> operations_of(const Node& graph) {
  std::vector<Operation> operations;
  const int64_t count = graph.values.at(Attribute::operation_graph_operations).count;
  for (int64_t i = 0; i < count; ++i)
    operations.push_back(
        operation_of(graph.node(Attribute::operation_graph_operations, static_cast<size_t>(i))));
  return operations;
}

// The engines of mode A by the operations of a graph; those of a convolution alone depend on more.
const std::map<std::string, std::vector<int64_t>>& known_graphs() {
  static const std::map<std::string, std::vector<int64_t>> known{
      {"forward", {}},
      {"data", {}},
      {"filter", {}},
      {"forward sums", {5, 12}},
      {"multiply add relu forward sums", {31}},
      {"multiply add relu filter", {32}},
      {"data subtract multiply multiply add relu-gradient norm-gradient", {33}},
      {"norm", {20, 21, 22}},
      {"norm add", {20, 21, 22}},
      {"norm relu", {20, 21, 22}},
      {"norm add relu", {20, 21, 22}},
      {"normalise relu-gradient norm-backward", {20, 21, 22}},
  };
  return known;
}
std::string signature(const std::vector<Operation>& operations) {
  std::string text;
  for (const Operation& operation : operations) text += (text.empty() ? "" : " ") + operation.name;
  return text;
}

// Why the tensors of an operation do not fit each other; empty where they do.
std::string fault_of(const Operation& o) {
  if (o.name == "forward" || o.name == "data" || o.name == "filter") {
    const Tensor& x = o.name == "data" ? o.out[0] : o.in[0];
    const Tensor& w = o.name == "forward" ? o.in[1] : o.name == "data" ? o.in[0] : o.out[0];
    const Tensor& y = o.name == "forward" ? o.out[0] : o.in[1];
    if (o.beta != 0) return "the fake adds to no result";
    if (x.n != y.n || w.n != y.c || w.c != x.c) return "tensors of other shapes";
    if (y.size != (x.size + 2 * o.padding - w.size) / o.stride + 1)
      return "a result of " + std::to_string(y.size) + " pixels";
    return {};
  }
  if (o.name == "sums" || o.name == "norm-gradient") {
    const int64_t channels = o.in[0].c;
    for (const Tensor& result : o.out)
      if (!result.of_channels(channels) || result.type != Type::fp32)
        return "results that are not an fp32 number for each channel";
    if (o.name == "sums") return {};
    if (!o.in[1].same_shape(o.in[0])) return "a gradient of another shape";
    for (size_t i = 2; i < o.in.size(); ++i)
      if (!o.in[i].of_channels(channels) || o.in[i].type != Type::fp32)
        return "statistics that are not an fp32 number for each channel";
    return {};
  }
  if (o.name == "norm" || o.name == "normalise" || o.name == "norm-backward") {
    for (const std::vector<Tensor>* tensors : {&o.in, &o.out})
      for (const Tensor& tensor : *tensors) {
        const bool is_number = o.name != "norm-backward" && &tensor == &o.in[3];
        if (is_number != tensor.by_value || (is_number && tensor.count() != 1))
          return "an epsilon that is no number in the host's memory";
        if (!is_number && !tensor.same_shape(o.in[0]) &&
            (!tensor.of_channels(o.in[0].c) || tensor.type != Type::fp32 || tensor.between))
          return "what is neither a map nor an fp32 number for each channel";
      }
    return {};
  }
  const size_t operands = o.name == "relu" ? 1 : 2;
  if (o.in.size() != operands || o.out.size() != 1) return "an operand too many or too few";
  if (!o.out[0].same_shape(o.in[0])) return "a result of another shape";
  if (operands == 2 && !o.in[1].same_shape(o.in[0]) && !o.in[1].of_channels(o.in[0].c))
    return "an operand of another shape";
  return {};
}

std::string fault_of_graph(const std::vector<Operation>& operations) {
  if (!known_graphs().contains(signature(operations))) return "a graph that the fake does not know";
  std::map<int64_t, Tensor> known;
  std::map<int64_t, bool> made;  // by id, whether there is a value already
  for (const Operation& operation : operations) {
    for (const std::vector<Tensor>* tensors : {&operation.in, &operation.out})
      for (const Tensor& tensor : *tensors)
        if (known.emplace(tensor.id, tensor).first->second != tensor)
          return "two tensors with one id";
    for (const Tensor& tensor : operation.in) {
      if (tensor.between && !made.contains(tensor.id))
        return "an operation before the one that it waits for";
    }
    for (const Tensor& tensor : operation.out) {
      if (made[tensor.id]) return "a tensor that two operations write";
      made[tensor.id] = true;
    }
  }
  return {};
}

// What engines of Hopper do not take, though the graph is one.
std::string refusal_of_graph(const std::vector<Operation>& operations) {
  const std::string text = signature(operations);
  if (known_graphs().at(text).empty()) return {};
  const bool is_norm = text.starts_with("norm");
  const Type type = operations.front().in[0].type;
  for (const Operation& operation : operations)
    for (const std::vector<Tensor>* tensors : {&operation.in, &operation.out})
      for (const Tensor& tensor : *tensors) {
        if (tensor.between || tensor.by_value) continue;
        const bool is_map = !tensor.of_channels(tensor.c);
        if (!is_norm && is_map && tensor.type != Type::fp16) return "a map that is not fp16";
        if (is_norm && is_map && tensor.type != type) return "maps of two types";
        if (type != Type::fp32 && tensor.c % 8 != 0)
          return "channels that are no multiple of eight";
        if (text.starts_with("multiply") && operation.name != "sums" && !is_map &&
            tensor.type != Type::fp16)
          return "a scale or bias that is not fp16";
      }
  return {};
}

// Why a descriptor with all its attributes is wrong; empty when it is right.
std::string fault_of(const Node& node) {
  using A = Attribute;
  if (node.type == DescriptorType::tensor) {
    int64_t d[4], s[4];
    for (size_t i = 0; i < 4; ++i) {
      d[i] = node.get<int64_t>(A::tensor_dimensions, i);
      s[i] = node.get<int64_t>(A::tensor_strides, i);
      if (d[i] < 1) return "a dimension below 1";
    }
    if (d[2] != d[3]) return "the fake knows square maps only";
    if (s[1] != 1 || s[3] != d[1] || s[2] != d[3] * d[1] || s[0] != d[2] * d[3] * d[1])
      return "strides that are not packed NHWC";
    if (node.get<int64_t>(A::tensor_byte_alignment) < 16) return "less than 16 bytes of alignment";
  }
  if (node.type == DescriptorType::convolution) {
    if (node.get<cudnn::DataType>(A::convolution_compute_type) != cudnn::DataType::fp32)
      return "sums that are not fp32";
    if (node.get<cudnn::ConvolutionMode>(A::convolution_mode) !=
        cudnn::ConvolutionMode::cross_correlation)
      return "a flipped filter";
    if (node.get<int64_t>(A::convolution_spatial_dimensions) != 2) return "not two dimensions";
    for (size_t i = 0; i < 2; ++i) {
      if (node.get<int64_t>(A::convolution_dilations, i) != 1) return "a dilation";
      if (node.get<int64_t>(A::convolution_filter_strides, i) !=
              node.get<int64_t>(A::convolution_filter_strides) ||
          node.get<int64_t>(A::convolution_pre_paddings, i) !=
              node.get<int64_t>(A::convolution_pre_paddings) ||
          node.get<int64_t>(A::convolution_post_paddings, i) !=
              node.get<int64_t>(A::convolution_pre_paddings))
        return "the fake knows the same stride and padding on all sides only";
    }
  }
  if (node.type == DescriptorType::pointwise &&
      node.get<cudnn::DataType>(A::pointwise_compute_type) != cudnn::DataType::fp32)
    return "arithmetic that is not fp32";
  if (node.type == DescriptorType::operation_statistics &&
      node.get<cudnn::DataType>(A::statistics_compute_type) != cudnn::DataType::fp32)
    return "sums that are not fp32";
  if (node.type == DescriptorType::operation_norm_backward_weights &&
      node.get<cudnn::DataType>(A::norm_backward_weights_compute_type) != cudnn::DataType::fp32)
    return "arithmetic that is not fp32";
  if (is_operation(node.type)) {
    const std::string fault = fault_of(operation_of(node));
    if (!fault.empty()) return fault;
  }
  if (node.type == DescriptorType::operation_graph) {
    const std::string fault = fault_of_graph(operations_of(node));
    if (!fault.empty()) return fault;
  }
  if (node.type == DescriptorType::device_properties) {
    const std::vector<char>& json = node.values.at(A::device_properties_json).bytes;
    if (json.front() != '{' || json.back() != '}') return "properties that are no JSON";
  }
  if (node.type == DescriptorType::engine_heuristic &&
      node.values.contains(A::heuristic_device_properties) ==
          node.node(A::heuristic_operation_graph).values.contains(A::operation_graph_handle))
    return "not the properties of one device";
  if (node.type == DescriptorType::variant_pack &&
      node.values.at(A::variant_pack_unique_ids).count !=
          node.values.at(A::variant_pack_data_pointers).count)
    return "a pointer for each tensor is needed";
  return {};
}

CudnnStatus finalise(cudnn::Descriptor descriptor) {
  Node& node = *static_cast<Node*>(descriptor);
  if (node.finalised) return refuse(CudnnStatus::bad_parameter, "finalised twice");
  for (const Rule& rule : rules())
    if (rule.owner == node.type && rule.required && !node.values.contains(rule.attribute))
      return refuse(CudnnStatus::bad_parameter,
                    "attribute " + number(rule.attribute) + " is missing");
  const std::string fault = fault_of(node);
  if (!fault.empty()) return refuse(CudnnStatus::bad_parameter, fault);
  if (!fakes().options.knows_norms && (node.type == DescriptorType::operation_norm_forward ||
                                       node.type == DescriptorType::operation_norm_backward))
    return refuse(CudnnStatus::bad_parameter, "an operation that is not known");
  if (node.type == DescriptorType::engine_heuristic) {
    const std::vector<Operation> operations =
        operations_of(node.node(Attribute::heuristic_operation_graph));
    if (signature(operations).starts_with("norm")) ++fakes().norm_graphs;
    const std::string refusal = refusal_of_graph(operations);
    if (!refusal.empty()) return refuse(CudnnStatus::not_supported, refusal);
  }
  if (node.type == DescriptorType::execution_plan) {
    ++fakes().plans_built;
    const Node& config = node.node(Attribute::execution_plan_engine_config);
    node.engine = config.engine;
    node.graph = config.graph;
    if (node.engine == 11) return refuse(CudnnStatus::not_supported, "engine 11");
    if (node.engine == fakes().options.uncompiled_engine)
      return refuse(CudnnStatus::internal_error, "a compilation that fails");
  }
  node.finalised = true;
  return CudnnStatus::success;
}

size_t workspace_of(int64_t engine) {
  if (engine == 7 || (engine >= 20 && engine <= 22)) return 4096;
  return engine == 9 ? size_t{1} << 30 : 0;
}
double microseconds_of(int64_t engine) {
  if (engine == 5) return fakes().options.sums_microseconds;
  if (engine > 30) return fakes().options.norm_reader_microseconds;
  if (engine >= 20) return 2 * fakes().options.norm_microseconds / static_cast<double>(engine - 19);
  return engine == 9 ? 1 : engine == 2 ? 5 : engine == 7 ? 10 : 50;
}

std::vector<int64_t> engines_of(const Node& heuristic) {
  const bool fallback = heuristic.get<cudnn::HeuristicMode>(Attribute::heuristic_mode) ==
                        cudnn::HeuristicMode::fallback;
  const std::vector<int64_t>& fused = known_graphs().at(
      signature(operations_of(heuristic.node(Attribute::heuristic_operation_graph))));
  if (!fused.empty()) return fallback ? std::vector<int64_t>{} : fused;
  if (fakes().options.only_nondeterministic)
    return fallback ? std::vector<int64_t>{} : std::vector<int64_t>{2};
  return fallback ? std::vector<int64_t>{0, 2} : std::vector<int64_t>{2, 7, 9, 11};
}

template <typename T>
CudnnStatus give(const std::vector<T>& values, int64_t requested, int64_t* count, void* elements) {
  *count = static_cast<int64_t>(values.size());
  const int64_t given = std::min<int64_t>(requested, *count);
  if (given > 0) std::memcpy(elements, values.data(), static_cast<size_t>(given) * sizeof(T));
  return CudnnStatus::success;
}

CudnnStatus get_attribute(cudnn::Descriptor descriptor, Attribute attribute, AttributeType type,
                          int64_t requested, int64_t* count, void* elements) {
  const Node& node = *static_cast<const Node*>(descriptor);
  if (!node.finalised) return refuse(CudnnStatus::not_finalised, "read before it is finalised");
  const auto is = [&](DescriptorType owner, Attribute a, AttributeType t) {
    return node.type == owner && attribute == a && type == t;
  };
  // Descriptors that come out must have been made, of the right type.
  const auto out = [&](int64_t i, DescriptorType wanted) -> Node* {
    Node* made = static_cast<Node**>(elements)[i];
    return made != nullptr && made->type == wanted ? made : nullptr;
  };
  if (is(DescriptorType::engine_heuristic, Attribute::heuristic_results,
         AttributeType::descriptor)) {
    const std::vector<int64_t> engines = engines_of(node);
    *count = static_cast<int64_t>(engines.size());
    for (int64_t i = 0; i < std::min(requested, *count); ++i) {
      Node* config = out(i, DescriptorType::engine_config);
      if (config == nullptr) return refuse(CudnnStatus::bad_parameter, "no engine_config to fill");
      config->engine = engines[static_cast<size_t>(i)];
      config->graph = &node.node(Attribute::heuristic_operation_graph);
      if (config->engine == 7) config->knobs = {{12, 3}};
      config->finalised = true;
    }
    return CudnnStatus::success;
  }
  if (is(DescriptorType::engine_config, Attribute::engine_config_engine,
         AttributeType::descriptor)) {
    Node* engine = requested == 1 ? out(0, DescriptorType::engine) : nullptr;
    if (engine == nullptr) return refuse(CudnnStatus::bad_parameter, "no engine to fill");
    *count = 1;
    engine->engine = node.engine;
    engine->finalised = true;
    return CudnnStatus::success;
  }
  if (is(DescriptorType::engine_config, Attribute::engine_config_knob_choices,
         AttributeType::descriptor)) {
    *count = static_cast<int64_t>(node.knobs.size());
    for (int64_t i = 0; i < std::min(requested, *count); ++i) {
      Node* knob = out(i, DescriptorType::knob_choice);
      if (knob == nullptr) return refuse(CudnnStatus::bad_parameter, "no knob_choice to fill");
      knob->knobs = {node.knobs[static_cast<size_t>(i)]};
      knob->finalised = true;
    }
    return CudnnStatus::success;
  }
  if (is(DescriptorType::knob_choice, Attribute::knob_choice_type, AttributeType::knob_type))
    return give(std::vector<int>{node.knobs.at(0).first}, requested, count, elements);
  if (is(DescriptorType::knob_choice, Attribute::knob_choice_value, AttributeType::int64))
    return give(std::vector<int64_t>{node.knobs.at(0).second}, requested, count, elements);
  if (is(DescriptorType::engine, Attribute::engine_global_index, AttributeType::int64))
    return give(std::vector<int64_t>{node.engine}, requested, count, elements);
  if (is(DescriptorType::engine, Attribute::engine_numerical_notes,
         AttributeType::numerical_note)) {
    std::vector<cudnn::NumericalNote> notes;
    if (node.engine != 0 && (node.engine < 20 || node.engine > 22))
      notes.push_back(cudnn::NumericalNote::tensor_core);
    if (node.engine == 2) notes.push_back(cudnn::NumericalNote::nondeterministic);
    return give(notes, requested, count, elements);
  }
  if (is(DescriptorType::execution_plan, Attribute::execution_plan_workspace_bytes,
         AttributeType::int64))
    return give(std::vector<int64_t>{static_cast<int64_t>(workspace_of(node.engine))}, requested,
                count, elements);
  return refuse(CudnnStatus::bad_parameter, "attribute " + number(attribute) + " cannot be read");
}

// Every pass walks the pairs of input and output pixels that a filter element joins; the innermost
// loop runs over neighbouring channels.
template <typename Visit>
void for_each_tap(const Operation& o, const Tensor& x, const Tensor& w, const Tensor& y,
                  const Visit& visit) {
  for (int64_t n = 0; n < x.n; ++n)
    for (int64_t oy = 0; oy < y.size; ++oy)
      for (int64_t ox = 0; ox < y.size; ++ox)
        for (int64_t r = 0; r < w.size; ++r)
          for (int64_t s = 0; s < w.size; ++s) {
            const int64_t iy = oy * o.stride - o.padding + r, ix = ox * o.stride - o.padding + s;
            if (iy < 0 || ix < 0 || iy >= x.size || ix >= x.size) continue;
            visit((n * y.size + oy) * y.size + ox, (n * x.size + iy) * x.size + ix, r * w.size + s);
          }
}

using Values = std::vector<float>;

std::vector<double> convolve(const Operation& o, const Values& first, const Values& second) {
  std::vector<double> out(o.out[0].count());
  if (o.name == "forward") {
    const Tensor &x = o.in[0], &w = o.in[1], &y = o.out[0];
    const int64_t channels = x.c, filters = y.c, taps = w.size * w.size;
    Values by_filter(second.size());  // [tap, channel, filter]
    for (int64_t k = 0; k < filters; ++k)
      for (int64_t i = 0; i < taps * channels; ++i)
        by_filter[static_cast<size_t>(i * filters + k)] =
            second[static_cast<size_t>(k * taps * channels + i)];
    for_each_tap(o, x, w, y, [&](int64_t to, int64_t from, int64_t tap) {
      double* sums = out.data() + to * filters;
      for (int64_t c = 0; c < channels; ++c) {
        const double value = first[static_cast<size_t>(from * channels + c)];
        const float* row = by_filter.data() + (tap * channels + c) * filters;
        for (int64_t k = 0; k < filters; ++k) sums[k] += value * row[k];
      }
    });
  } else {
    const bool data = o.name == "data";
    const Tensor &x = data ? o.out[0] : o.in[0], &w = data ? o.in[0] : o.out[0], &y = o.in[1];
    const int64_t channels = x.c, filters = y.c, taps = w.size * w.size;
    for_each_tap(o, x, w, y, [&](int64_t to, int64_t from, int64_t tap) {
      for (int64_t k = 0; k < filters; ++k) {
        const double value = second[static_cast<size_t>(to * filters + k)];
        const int64_t filter = (k * taps + tap) * channels, pixel = from * channels;
        double* sums = out.data() + (data ? pixel : filter);
        const float* row = first.data() + (data ? filter : pixel);
        for (int64_t c = 0; c < channels; ++c) sums[c] += value * row[c];
      }
    });
  }
  for (double& value : out) value *= o.alpha;
  return out;
}

std::vector<double> pointwise(const Operation& o, const std::vector<const Values*>& in) {
  const auto channels = static_cast<size_t>(o.in[0].c);
  std::vector<double> out(in[0]->size());
  for (size_t i = 0; i < out.size(); ++i) {
    const double x = (*in[0])[i];
    const double b = in.size() < 2                 ? 0
                     : in[1]->size() == out.size() ? (*in[1])[i]
                                                   : (*in[1])[i % channels];
    out[i] = o.name == "add"        ? x + b
             : o.name == "multiply" ? x * b
             : o.name == "subtract" ? x - b
             : o.name == "relu"     ? std::max(x, 0.0)
                                    : (x > 0 ? b : 0);
  }
  return out;
}

// [sums, sums of squares] of every channel.
std::vector<std::vector<double>> channel_sums(const Values& x, size_t channels) {
  std::vector<std::vector<double>> sums(2, std::vector<double>(channels));
  for (size_t i = 0; i < x.size(); ++i) {
    sums[0][i % channels] += x[i];
    sums[1][i % channels] += static_cast<double>(x[i]) * x[i];
  }
  return sums;
}

// dgamma, dbeta, and dx = by_dy dy + by_x x + constant.
std::vector<std::vector<double>> norm_gradient(const std::vector<const Values*>& in) {
  const Values &x = *in[0], &dy = *in[1], &mean = *in[2], &inverse = *in[3], &scale = *in[4];
  const size_t channels = mean.size();
  std::vector<std::vector<double>> out(5, std::vector<double>(channels));
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t c = i % channels;
    out[0][c] += static_cast<double>(dy[i]) * (x[i] - mean[c]) * inverse[c];
    out[1][c] += dy[i];
  }
  const double share = static_cast<double>(channels) / static_cast<double>(x.size());
  for (size_t c = 0; c < channels; ++c) {
    out[2][c] = static_cast<double>(scale[c]) * inverse[c];
    out[3][c] = -out[2][c] * inverse[c] * out[0][c] * share;
    out[4][c] = -out[2][c] * out[1][c] * share - out[3][c] * mean[c];
  }
  return out;
}

// y, and of the phase that trains mean and 1 / deviation.
std::vector<std::vector<double>> norm_forward(const Operation& o,
                                              const std::vector<const Values*>& in) {
  const Values &x = *in[0], &scale = *in[1], &bias = *in[2];
  const size_t channels = scale.size();
  const double share = static_cast<double>(channels) / static_cast<double>(x.size());
  std::vector<double> mean(channels), inverse(channels);
  if (o.name == "norm") {
    const double epsilon = in[3]->front();
    std::vector<double> squares(channels);
    for (size_t i = 0; i < x.size(); ++i) mean[i % channels] += x[i] * share;
    for (size_t i = 0; i < x.size(); ++i) {
      const double d = x[i] - mean[i % channels];
      squares[i % channels] += d * d;
    }
    for (size_t c = 0; c < channels; ++c) inverse[c] = 1 / std::sqrt(squares[c] * share + epsilon);
  } else {
    mean.assign(in[4]->begin(), in[4]->end());
    inverse.assign(in[5]->begin(), in[5]->end());
  }
  std::vector<double> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t c = i % channels;
    y[i] = scale[c] * inverse[c] * (x[i] - mean[c]) + bias[c];
  }
  if (o.name == "normalise") return {y};
  return {y, mean, inverse};
}

// dx, dgamma, dbeta.
std::vector<std::vector<double>> norm_backward(const std::vector<const Values*>& in) {
  const std::vector<std::vector<double>> of = norm_gradient(in);
  const Values &x = *in[0], &dy = *in[1];
  std::vector<double> dx(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t c = i % of[0].size();
    dx[i] = of[2][c] * dy[i] + of[3][c] * x[i] + of[4][c];
  }
  return {dx, of[0], of[1]};
}

// Runs the operations one after the other. What one leaves for another is not rounded to the type
// of its tensor, as the real kernels' accumulators are not.
void evaluate(const std::vector<Operation>& operations, const std::map<int64_t, void*>& pointers,
              std::map<int64_t, Values> values, bool noisy, bool lies) {
  for (const Operation& o : operations) {
    std::vector<const Values*> in;
    for (const Tensor& tensor : o.in) {
      auto found = values.find(tensor.id);
      if (found == values.end())
        found = values.emplace(tensor.id, load(pointers.at(tensor.id), tensor.type, tensor.count()))
                    .first;
      in.push_back(&found->second);
    }
    std::vector<std::vector<double>> out;
    if (o.name == "forward" || o.name == "data" || o.name == "filter") {
      out = {convolve(o, *in[0], *in[1])};
    } else if (o.name == "sums") {
      out = channel_sums(*in[0], static_cast<size_t>(o.in[0].c));
    } else if (o.name == "norm-gradient") {
      out = norm_gradient(in);
    } else if (o.name == "norm" || o.name == "normalise") {
      out = norm_forward(o, in);
    } else if (o.name == "norm-backward") {
      out = norm_backward(in);
    } else {
      out = {pointwise(o, in)};
    }
    for (size_t t = 0; t < out.size(); ++t) {
      const Tensor& tensor = o.out[t];
      values[tensor.id] = Values(out[t].begin(), out[t].end());
      if (tensor.between) continue;
      void* const to = pointers.at(tensor.id);
      const double factor = std::exchange(lies, false) ? 2 : 1;
      for (size_t i = 0; i < out[t].size(); ++i)
        store(to, tensor.type, i, factor * out[t][i] * (noisy ? noise(tensor.type) : 1));
    }
  }
}

struct CudnnHandle {
  cudaStream_t stream = nullptr;
};

CudnnStatus execute(cudnn::Handle handle, cudnn::Descriptor plan_, cudnn::Descriptor pack_) {
  const Node &plan = *static_cast<const Node*>(plan_), &pack = *static_cast<const Node*>(pack_);
  if (!plan.finalised || !pack.finalised)
    return refuse(CudnnStatus::not_finalised, "an execution of unfinalised descriptors");
  if (handle == nullptr) return refuse(CudnnStatus::bad_parameter, "an execution without a handle");
  const cudaStream_t stream = reinterpret_cast<CudnnHandle*>(handle)->stream;
  std::vector<Operation> operations = operations_of(*plan.graph);
  std::map<int64_t, void*> pointers;
  for (int64_t i = 0; i < pack.values.at(Attribute::variant_pack_unique_ids).count; ++i)
    pointers[pack.get<int64_t>(Attribute::variant_pack_unique_ids, static_cast<size_t>(i))] =
        pack.get<void*>(Attribute::variant_pack_data_pointers, static_cast<size_t>(i));
  size_t used = 0;
  std::map<int64_t, Values> values;  // that are given by value, as they are now
  std::map<int64_t, bool> seen;
  for (const Operation& operation : operations) {
    for (const std::vector<Tensor>* tensors : {&operation.in, &operation.out}) {
      for (const Tensor& tensor : *tensors) {
        if (tensor.between || seen[tensor.id]) continue;
        seen[tensor.id] = true;
        if (!pointers.contains(tensor.id))
          return refuse(CudnnStatus::bad_parameter, "a tensor without a pointer");
        ++used;
        const void* address = pointers.at(tensor.id);
        if (tensor.by_value) {
          values[tensor.id] = load(address, tensor.type, 1);
          continue;
        }
        Device::current->check_address(address, tensor.count() * bytes_of(tensor.type),
                                       "cuDNN, for tensor " + std::to_string(tensor.id) + ",");
        if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
          throw Fault("a tensor that is not aligned to 16 bytes");
      }
    }
  }
  if (used != pointers.size())
    return refuse(CudnnStatus::bad_parameter, "a pointer without a tensor");
  void* workspace = pack.get<void*>(Attribute::variant_pack_workspace);
  const size_t workspace_bytes = workspace_of(plan.engine);
  if (workspace_bytes > 0)
    Device::current->check_address(workspace, workspace_bytes, "cuDNN, as a workspace,");

  ++fakes().executions;
  if (fakes().options.fatal_engine == plan.engine) Device::current->lose(cudaErrorIllegalAddress);
  if (fakes().options.fatal_engine == plan.engine ||
      fakes().options.broken_engines.contains(plan.engine))
    return refuse(CudnnStatus::execution_failed, "an engine that is broken");
  const bool noisy = plan.engine == 2;
  enqueue_in_two(
      stream, workspace, workspace_bytes,
      [operations = std::move(operations), pointers = std::move(pointers),
       values = std::move(values), noisy,
       lies = fakes().options.lying_engines.contains(plan.engine)] {
        evaluate(operations, pointers, values, noisy, lies);
      },
      microseconds_of(plan.engine));
  return CudnnStatus::success;
}

CudnnStatus cudnn_create(cudnn::Handle* handle) {
  if (Device::current == nullptr) return CudnnStatus::not_initialised;
  *handle = reinterpret_cast<cudnn::Handle>(new CudnnHandle);
  ++fakes().objects;
  return CudnnStatus::success;
}
// Waits for the device as cudnnDestroy does, which a capture anywhere forbids.
void wait_for_device() {
  if (Device::current != nullptr) static_cast<void>(cudaDeviceSynchronize());
}
CudnnStatus cudnn_destroy(cudnn::Handle handle) {
  wait_for_device();
  delete reinterpret_cast<CudnnHandle*>(handle);
  if (FakeLibraries::current != nullptr) --FakeLibraries::current->objects;
  return CudnnStatus::success;
}
CudnnStatus cudnn_set_stream(cudnn::Handle handle, cudaStream_t stream) {
  reinterpret_cast<CudnnHandle*>(handle)->stream = stream;
  return CudnnStatus::success;
}
size_t cudnn_version() {
  return fakes().options.cudnn_version;
}
const char* cudnn_error_string(CudnnStatus status) {
  switch (status) {
    case CudnnStatus::bad_parameter:
      return "CUDNN_STATUS_BAD_PARAM";
    case CudnnStatus::not_finalised:
      return "CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED";
    case CudnnStatus::not_supported:
      return "CUDNN_STATUS_NOT_SUPPORTED";
    default:
      return "CUDNN_STATUS_INTERNAL_ERROR";
  }
}
void cudnn_last_error_string(char* message, size_t bytes) {
  std::snprintf(message, bytes, "%s", fakes().last_error.c_str());
}

// ---- cuBLASLt ----

using LtStatus = cublas_lt::Status;

struct LtMatmul {
  cublas_lt::ComputeType compute;
  bool transpose_a = false, transpose_b = false;
};
struct LtLayout {
  Type type;
  int64_t rows, columns, stride;
};
struct LtPreference {
  uint64_t workspace_bytes = 0;
  uint32_t reductions = 7;  // all, as the library has it
  uint32_t alignment[4] = {256, 256, 256, 256};
};

template <typename Made, typename Handle>
void make(Handle* handle, Made made) {
  *handle = reinterpret_cast<Handle>(new Made(made));
  ++fakes().objects;
}
template <typename Made, typename Handle>
LtStatus destroy(Handle handle) {
  delete reinterpret_cast<Made*>(handle);
  if (FakeLibraries::current != nullptr) --FakeLibraries::current->objects;
  return LtStatus::success;
}

size_t lt_version() {
  return fakes().options.cublas_lt_version;
}
const char* lt_status_string(LtStatus status) {
  switch (status) {
    case LtStatus::invalid_value:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case LtStatus::not_supported:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
  }
}
struct LtHandle {};
LtStatus lt_destroy(cublas_lt::Handle handle) {
  wait_for_device();
  return destroy<LtHandle>(handle);
}
LtStatus lt_create(cublas_lt::Handle* handle) {
  make(handle, LtHandle{});
  return LtStatus::success;
}
LtStatus matmul_create(cublas_lt::MatmulDescriptor* matmul, cublas_lt::ComputeType compute,
                       cublas_lt::DataType scale) {
  if (scale != cublas_lt::DataType::fp32) return LtStatus::not_supported;
  make(matmul, LtMatmul{compute});
  return LtStatus::success;
}
LtStatus matmul_set(cublas_lt::MatmulDescriptor matmul, cublas_lt::MatmulAttribute attribute,
                    const void* value, size_t bytes) {
  if (bytes != sizeof(int32_t)) return LtStatus::invalid_value;
  int32_t transpose = 0;
  std::memcpy(&transpose, value, bytes);
  auto& made = *reinterpret_cast<LtMatmul*>(matmul);
  (attribute == cublas_lt::MatmulAttribute::transpose_a ? made.transpose_a : made.transpose_b) =
      transpose == 1;
  return LtStatus::success;
}
LtStatus layout_create(cublas_lt::Layout* layout, cublas_lt::DataType type, uint64_t rows,
                       uint64_t columns, int64_t stride) {
  if (rows == 0 || columns == 0 || stride < static_cast<int64_t>(rows))
    return LtStatus::invalid_value;
  make(layout, LtLayout{type == cublas_lt::DataType::fp16   ? Type::fp16
                        : type == cublas_lt::DataType::bf16 ? Type::bf16
                                                            : Type::fp32,
                        static_cast<int64_t>(rows), static_cast<int64_t>(columns), stride});
  return LtStatus::success;
}
LtStatus preference_create(cublas_lt::Preference* preference) {
  make(preference, LtPreference{});
  return LtStatus::success;
}
LtStatus preference_set(cublas_lt::Preference preference, cublas_lt::PreferenceAttribute attribute,
                        const void* value, size_t bytes) {
  using A = cublas_lt::PreferenceAttribute;
  auto& made = *reinterpret_cast<LtPreference*>(preference);
  if (attribute == A::max_workspace_bytes) {
    if (bytes != sizeof made.workspace_bytes) return LtStatus::invalid_value;
    std::memcpy(&made.workspace_bytes, value, bytes);
    return LtStatus::success;
  }
  if (bytes != sizeof(uint32_t)) return LtStatus::invalid_value;
  uint32_t* target = attribute == A::reduction_scheme_mask
                         ? &made.reductions
                         : &made.alignment[static_cast<int>(attribute) -
                                           static_cast<int>(A::min_alignment_a_bytes)];
  std::memcpy(target, value, bytes);
  return LtStatus::success;
}

// Column-major: D = alpha op(A) op(B) + beta C.
bool fits(const LtMatmul& matmul, const LtLayout& a, const LtLayout& b, const LtLayout& c,
          const LtLayout& d) {
  const int64_t m = matmul.transpose_a ? a.columns : a.rows;
  const int64_t k = matmul.transpose_a ? a.rows : a.columns;
  const int64_t k_of_b = matmul.transpose_b ? b.columns : b.rows;
  const int64_t n = matmul.transpose_b ? b.rows : b.columns;
  return k == k_of_b && c.rows == m && c.columns == n && d.rows == m && d.columns == n &&
         c.stride == d.stride && a.type == b.type && c.type == d.type &&
         (d.type == Type::fp32 || d.type == a.type) &&
         (matmul.compute == cublas_lt::ComputeType::fp32_fast_tf32) == (a.type == Type::fp32);
}

struct LtAlgorithm {
  uint64_t magic;
  uint64_t workspace_bytes;
  uint64_t noisy;
  uint32_t alignment[4];
  int64_t m, n;
};
static_assert(sizeof(LtAlgorithm) <= sizeof(cublas_lt::Algorithm));
constexpr uint64_t kMagic = 0x4C74416C676F;

LtStatus heuristic(cublas_lt::Handle, cublas_lt::MatmulDescriptor matmul_, cublas_lt::Layout a_,
                   cublas_lt::Layout b_, cublas_lt::Layout c_, cublas_lt::Layout d_,
                   cublas_lt::Preference preference_, int requested,
                   cublas_lt::HeuristicResult* results, int* returned) {
  ++fakes().heuristics;
  const auto& matmul = *reinterpret_cast<LtMatmul*>(matmul_);
  const auto& preference = *reinterpret_cast<LtPreference*>(preference_);
  const auto& d = *reinterpret_cast<LtLayout*>(d_);
  if (requested < 1 || !fits(matmul, *reinterpret_cast<LtLayout*>(a_),
                             *reinterpret_cast<LtLayout*>(b_), *reinterpret_cast<LtLayout*>(c_), d))
    return LtStatus::invalid_value;
  const uint64_t wanted = 1024;  // bytes; what the algorithm scribbles over
  *returned = preference.workspace_bytes >= wanted ? 1 : 0;
  if (*returned == 0) return LtStatus::not_supported;
  LtAlgorithm algorithm{kMagic, wanted, preference.reductions & 1, {}, d.rows, d.columns};
  std::copy(std::begin(preference.alignment), std::end(preference.alignment), algorithm.alignment);
  results[0] = {};
  std::memcpy(&results[0].algorithm, &algorithm, sizeof algorithm);
  results[0].workspace_bytes = wanted;
  return LtStatus::success;
}

LtStatus lt_matmul(cublas_lt::Handle, cublas_lt::MatmulDescriptor matmul_, const void* alpha_,
                   const void* a, cublas_lt::Layout a_, const void* b, cublas_lt::Layout b_,
                   const void* beta_, const void* c, cublas_lt::Layout c_, void* d,
                   cublas_lt::Layout d_, const cublas_lt::Algorithm* algorithm_, void* workspace,
                   size_t workspace_bytes, cudaStream_t stream) {
  const LtMatmul matmul = *reinterpret_cast<LtMatmul*>(matmul_);
  const LtLayout at = *reinterpret_cast<LtLayout*>(a_), bt = *reinterpret_cast<LtLayout*>(b_),
                 ct = *reinterpret_cast<LtLayout*>(c_), dt = *reinterpret_cast<LtLayout*>(d_);
  LtAlgorithm algorithm;
  std::memcpy(&algorithm, algorithm_, sizeof algorithm);
  if (algorithm.magic != kMagic || algorithm.m != dt.rows || algorithm.n != dt.columns ||
      algorithm.workspace_bytes > workspace_bytes || !fits(matmul, at, bt, ct, dt))
    return LtStatus::invalid_value;
  const void* const pointers[] = {a, b, c, d};
  const LtLayout* const layouts[] = {&at, &bt, &ct, &dt};
  for (size_t i = 0; i < 4; ++i) {
    const LtLayout& layout = *layouts[i];
    const auto elements = static_cast<size_t>((layout.columns - 1) * layout.stride + layout.rows);
    Device::current->check_address(pointers[i], elements * bytes_of(layout.type), "cuBLASLt");
    if (reinterpret_cast<uintptr_t>(pointers[i]) % algorithm.alignment[i] != 0)
      throw Fault("a matrix that is less aligned than its algorithm was promised");
  }
  Device::current->check_address(workspace, algorithm.workspace_bytes, "cuBLASLt, as a workspace,");
  float alpha = 0, beta = 0;  // host pointers: read now
  std::memcpy(&alpha, alpha_, sizeof alpha);
  std::memcpy(&beta, beta_, sizeof beta);
  enqueue_in_two(stream, workspace, algorithm.workspace_bytes, [=] {
    const auto read = [](const void* from, const LtLayout& layout) {
      return load(from, layout.type,
                  static_cast<size_t>((layout.columns - 1) * layout.stride + layout.rows));
    };
    const std::vector<float> av = read(a, at), bv = read(b, bt);
    const int64_t m = dt.rows, n = dt.columns, k = matmul.transpose_a ? at.rows : at.columns;
    std::vector<float> packed(static_cast<size_t>(m * k));  // op(A), column-major
    for (int64_t l = 0; l < k; ++l)
      for (int64_t i = 0; i < m; ++i)
        packed[static_cast<size_t>(l * m + i)] =
            av[static_cast<size_t>(matmul.transpose_a ? i * at.stride + l : l * at.stride + i)];
    std::vector<double> sums(static_cast<size_t>(m));
    for (int64_t j = 0; j < n; ++j) {
      std::fill(sums.begin(), sums.end(), 0);
      for (int64_t l = 0; l < k; ++l) {
        const double value =
            bv[static_cast<size_t>(matmul.transpose_b ? l * bt.stride + j : j * bt.stride + l)];
        const float* column = packed.data() + l * m;
        for (int64_t i = 0; i < m; ++i) sums[static_cast<size_t>(i)] += value * column[i];
      }
      const size_t first = static_cast<size_t>(j * dt.stride);
      std::vector<float> held;
      if (beta != 0)
        held = load(static_cast<const char*>(c) + first * bytes_of(ct.type), ct.type,
                    static_cast<size_t>(m));
      for (size_t i = 0; i < sums.size(); ++i) {
        double value = alpha * sums[i] * (algorithm.noisy != 0 ? noise(dt.type) : 1);
        if (beta != 0) value += static_cast<double>(beta) * held[i];
        store(d, dt.type, first + i, value);
      }
    }
  });
  return LtStatus::success;
}

template <typename Function>
void* address(Function* function) {
  return reinterpret_cast<void*>(function);
}

}  // namespace

FakeLibraries* FakeLibraries::current = nullptr;

FakeLibraries::FakeLibraries(FakeOptions given) : options(std::move(given)) {
  if (current != nullptr) throw Fault("a second set of fake libraries");
  current = this;
}
FakeLibraries::~FakeLibraries() {
  current = nullptr;
}

void* FakeLibraries::symbol(const char* name) {
  static const std::map<std::string, void*> functions{
      {"cudnnGetVersion", address(&cudnn_version)},
      {"cudnnGetErrorString", address(&cudnn_error_string)},
      {"cudnnGetLastErrorString", address(&cudnn_last_error_string)},
      {"cudnnCreate", address(&cudnn_create)},
      {"cudnnDestroy", address(&cudnn_destroy)},
      {"cudnnSetStream", address(&cudnn_set_stream)},
      {"cudnnBackendCreateDescriptor", address(&create_descriptor)},
      {"cudnnBackendDestroyDescriptor", address(&destroy_descriptor)},
      {"cudnnBackendSetAttribute", address(&set_attribute)},
      {"cudnnBackendGetAttribute", address(&get_attribute)},
      {"cudnnBackendFinalize", address(&finalise)},
      {"cudnnBackendExecute", address(&execute)},
      {"cublasLtGetVersion", address(&lt_version)},
      {"cublasLtGetStatusString", address(&lt_status_string)},
      {"cublasLtCreate", address(&lt_create)},
      {"cublasLtDestroy", address(&lt_destroy)},
      {"cublasLtMatmulDescCreate", address(&matmul_create)},
      {"cublasLtMatmulDescDestroy", address(&destroy<LtMatmul, cublas_lt::MatmulDescriptor>)},
      {"cublasLtMatmulDescSetAttribute", address(&matmul_set)},
      {"cublasLtMatrixLayoutCreate", address(&layout_create)},
      {"cublasLtMatrixLayoutDestroy", address(&destroy<LtLayout, cublas_lt::Layout>)},
      {"cublasLtMatmulPreferenceCreate", address(&preference_create)},
      {"cublasLtMatmulPreferenceDestroy", address(&destroy<LtPreference, cublas_lt::Preference>)},
      {"cublasLtMatmulPreferenceSetAttribute", address(&preference_set)},
      {"cublasLtMatmulAlgoGetHeuristic", address(&heuristic)},
      {"cublasLtMatmul", address(&lt_matmul)},
  };
  const auto found = functions.find(name);
  return found == functions.end() || fakes().options.without == name ? nullptr : found->second;
}

Libraries FakeLibraries::libraries() const {
  return {load_cudnn(symbol, "a fake cuDNN"), load_cublas_lt(symbol, "a fake cuBLASLt")};
}

}  // namespace simt
