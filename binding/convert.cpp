#include "binding/convert.h"

#include <cmath>
#include <cstring>

#include "binding/environment.h"
#include "core/error.h"

namespace hardmine::binding {
namespace {

template <typename T>
struct Element;  // which typed array holds values of T
template <>
struct Element<float> {
  static constexpr napi_typedarray_type kType = napi_float32_array;
  static constexpr auto kConstructor = &Environment::float32_array;
};
template <>
struct Element<double> {
  static constexpr napi_typedarray_type kType = napi_float64_array;
  static constexpr auto kConstructor = &Environment::float64_array;
};
template <>
struct Element<int32_t> {
  static constexpr napi_typedarray_type kType = napi_int32_array;
  static constexpr auto kConstructor = &Environment::int32_array;
};
template <>
struct Element<uint32_t> {
  static constexpr napi_typedarray_type kType = napi_uint32_array;
};
template <>
struct Element<uint8_t> {
  static constexpr napi_typedarray_type kType = napi_uint8_array;
  static constexpr auto kConstructor = &Environment::uint8_array;
};

struct TypedArrayInfo {
  napi_typedarray_type type = napi_uint8_array;
  size_t length = 0;
  void* data = nullptr;
};

TypedArrayInfo typed_array_info(Napi::Value value) {
  TypedArrayInfo info;
  const napi_status status = napi_get_typedarray_info(value.Env(), value, &info.type, &info.length,
                                                      &info.data, nullptr, nullptr);
  if (status != napi_ok) throw Napi::Error::New(value.Env());
  return info;
}

const char* typed_array_name(napi_typedarray_type type) {
  switch (type) {
    case napi_int8_array:
      return "an Int8Array";
    case napi_uint8_array:
      return "a Uint8Array";
    case napi_uint8_clamped_array:
      return "a Uint8ClampedArray";
    case napi_int16_array:
      return "an Int16Array";
    case napi_uint16_array:
      return "a Uint16Array";
    case napi_int32_array:
      return "an Int32Array";
    case napi_uint32_array:
      return "a Uint32Array";
    case napi_float32_array:
      return "a Float32Array";
    case napi_float64_array:
      return "a Float64Array";
    default:
      return "a typed array";
  }
}

// What a value is, in words; runs no code of the caller's.
std::string describe(Napi::Value value) {
  constexpr size_t kLongest = 60;  // bytes of a string that are shown
  switch (value.Type()) {
    case napi_undefined:
      return "undefined";
    case napi_null:
      return "null";
    case napi_boolean:
    case napi_number:
      return value.ToString().Utf8Value();
    case napi_string: {
      const std::string text = value.As<Napi::String>().Utf8Value();
      return text.size() > kLongest ? "a string of " + std::to_string(text.size()) + " bytes"
                                    : "'" + text + "'";
    }
    case napi_symbol:
      return "a symbol";
    case napi_bigint:
      return "a bigint";
    case napi_function:
      return "a function";
    case napi_external:
    case napi_object:
      break;
  }
  if (value.IsTypedArray()) {
    const TypedArrayInfo info = typed_array_info(value);
    return std::string(typed_array_name(info.type)) + " of " + std::to_string(info.length) +
           " elements";
  }
  if (value.IsArray()) return "an Array";
  if (value.IsArrayBuffer()) return "an ArrayBuffer";
  if (value.IsDataView()) return "a DataView";
  if (value.IsPromise()) return "a Promise (is an await missing?)";
  return "an object";
}

}  // namespace

void refuse(const std::string& name, const std::string& expected, Napi::Value received) {
  throw Error(codes::kInput, "Expected " + expected + " for " + name + " but received " +
                                 describe(received) + '.');
}

double to_number(Napi::Value value, const std::string& name) {
  if (!value.IsNumber() || !std::isfinite(value.As<Napi::Number>().DoubleValue())) {
    refuse(name, "a finite number", value);
  }
  return value.As<Napi::Number>().DoubleValue();
}

int64_t to_integer(Napi::Value value, const std::string& name, int64_t min, int64_t max) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!(number >= static_cast<double>(min) && number <= static_cast<double>(max)) ||
      number != std::trunc(number)) {
    refuse(name, "an integer from " + std::to_string(min) + " to " + std::to_string(max), value);
  }
  return static_cast<int64_t>(number);
}

bool to_boolean(Napi::Value value, const std::string& name) {
  if (!value.IsBoolean()) refuse(name, "a boolean", value);
  return value.As<Napi::Boolean>().Value();
}

std::string to_text(Napi::Value value, const std::string& name) {
  if (!value.IsString()) refuse(name, "a string", value);
  return value.As<Napi::String>().Utf8Value();
}

std::string to_path(Napi::Value value, const std::string& name) {
  std::string path = to_text(value, name);
  // The operating system would read the path only up to the NUL and open another file.
  if (path.empty() || path.find('\0') != std::string::npos) {
    throw Error(codes::kInput, "Expected a path without NUL characters for " + name +
                                   " but received " +
                                   (path.empty() ? "an empty string." : "one that has them."));
  }
  return path;
}

template <typename T>
std::vector<T> to_vector(Napi::Value value, const std::string& name, std::optional<size_t> length) {
  using E = Element<T>;
  TypedArrayInfo info;
  const bool right_type =
      value.IsTypedArray() && (info = typed_array_info(value), info.type == E::kType);
  if (!right_type || (length && info.length != *length)) {
    refuse(name,
           typed_array_name(E::kType) +
               (length ? " of " + std::to_string(*length) + " elements" : std::string()),
           value);
  }
  std::vector<T> copy(info.length);
  if (info.length != 0) std::memcpy(copy.data(), info.data, info.length * sizeof(T));
  return copy;
}
template std::vector<float> to_vector(Napi::Value, const std::string&, std::optional<size_t>);
template std::vector<double> to_vector(Napi::Value, const std::string&, std::optional<size_t>);
template std::vector<int32_t> to_vector(Napi::Value, const std::string&, std::optional<size_t>);
template std::vector<uint8_t> to_vector(Napi::Value, const std::string&, std::optional<size_t>);

std::vector<int64_t> to_indices(Napi::Value value, const std::string& name, int64_t count) {
  std::vector<int64_t> indices;
  if (value.IsTypedArray() && typed_array_info(value).type == napi_int32_array) {
    const auto elements = to_vector<int32_t>(value, name);
    indices.assign(elements.begin(), elements.end());
  } else if (value.IsTypedArray() && typed_array_info(value).type == napi_uint32_array) {
    const auto elements = to_vector<uint32_t>(value, name);
    indices.assign(elements.begin(), elements.end());
  } else {
    refuse(name, "an Int32Array or a Uint32Array", value);
  }
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] < 0 || indices[i] >= count) {
      throw Error(codes::kInput, "Expected indices from 0 to " + std::to_string(count - 1) +
                                     " in " + name + " but element " + std::to_string(i) + " is " +
                                     std::to_string(indices[i]) + '.');
    }
  }
  return indices;
}

Members::Members(Napi::Value value, std::string name) : name_(std::move(name)) {
  if (!value.IsObject() || value.IsArray() || value.IsTypedArray() || value.IsFunction()) {
    refuse(name_, "an object", value);
  }
  object_ = value.As<Napi::Object>();
}

Execution to_execution(Napi::Value value) {
  const Members members(value, "execution");
  constexpr int64_t kMostThreads = 1024;  // beyond any machine: a mistake in the units
  Execution execution;
  execution.device =
      static_cast<int>(members.integer("device", 0, std::numeric_limits<int>::max()));
  execution.precision = members.choice<Precision>(
      "precision",
      {{"fp32", Precision::fp32}, {"bf16", Precision::bf16}, {"fp16", Precision::fp16}});
  execution.threads = static_cast<int>(members.integer("threads", 0, kMostThreads));
  execution.deterministic = members.boolean("deterministic");
  return execution;
}

NetworkSpec to_network(Napi::Value value, const std::string& name) {
  const Members members(value, name);
  NetworkSpec network;
  network.architecture = to_text(members.value("architecture"), members.name("architecture"));
  network.embedding = members.integer("embedding", 1, kMostDim);
  network.embedding_batch_norm = members.boolean("embeddingBatchNorm");
  return network;
}

Weighting to_weighting(const Members& members) {
  Weighting weighting;
  weighting.kind =
      members.choice<WeightingKind>("kind", {{"none", WeightingKind::none},
                                             {"hard-mining", WeightingKind::hard_mining},
                                             {"knot-magnify", WeightingKind::knot_magnify}});
  weighting.alpha = members.number("alpha");
  weighting.beta = members.number("beta");
  weighting.A = members.number("A");
  weighting.B = members.number("B");
  weighting.gamma = members.number("gamma");
  weighting.form = members.choice<HardMiningForm>(
      "form", {{"equation", HardMiningForm::equation}, {"algorithm", HardMiningForm::algorithm}});
  weighting.reduction = members.choice<Reduction>(
      "reduction", {{"sample", Reduction::sample}, {"batch", Reduction::batch}});
  return weighting;
}

LossSpec to_loss(const Members& members) {
  LossSpec loss;
  loss.base = members.choice<BaseKind>("base", {{"softmax", BaseKind::softmax},
                                                {"margin", BaseKind::margin},
                                                {"euclidean-margin", BaseKind::euclidean_margin}});
  loss.margin.m1 = members.number("m1");
  loss.margin.m2 = members.number("m2");
  loss.margin.m3 = members.number("m3");
  loss.margin.scale = members.number("scale");
  loss.margin.norm_scale = members.boolean("normScale");
  loss.margin.lambda = members.number("lambda");
  loss.margin.mirror = members.boolean("mirror");
  loss.margin.detached = members.boolean("detached");
  const Members euclidean = members.members("euclidean");
  loss.euclidean.margin = euclidean.number("margin");
  loss.euclidean.pull = euclidean.number("pull");
  loss.weighting = to_weighting(members.members("weighting"));
  const Members center = members.members("center");
  loss.center.weight = center.number("weight");
  loss.center.rate = center.number("rate");
  return loss;
}

Implementation to_implementation(const Members& spec) {
  return spec.choice<Implementation>(
      "implementation", {{"fused", Implementation::fused}, {"unfused", Implementation::unfused}});
}

StepSettings to_step_settings(Napi::Value value, const std::string& name) {
  const Members members(value, name);
  StepSettings settings;
  settings.lr = members.single("lr");
  settings.momentum = members.single("momentum");
  settings.weight_decay = members.single("weightDecay");
  settings.decay_all = members.boolean("decayAll");
  settings.margin_factor = members.single("marginFactor");
  settings.lambda = members.single("lambda");
  return settings;
}

Napi::Object from_stats(Napi::Env env, const StepStats& stats) {
  const auto object = Napi::Object::New(env);
  const auto set = [&](const char* name, double value) {
    object.Set(name, Napi::Number::New(env, value));
  };
  set("loss", stats.loss);
  set("baseLoss", stats.base_loss);
  set("rows", static_cast<double>(stats.rows));
  set("correct", static_cast<double>(stats.correct));
  set("silenced", static_cast<double>(stats.silenced));
  set("kept", static_cast<double>(stats.kept));
  set("amplified", static_cast<double>(stats.amplified));
  set("meanCosine", stats.mean_cosine);
  set("embeddingNorm", stats.embedding_norm);
  const auto hardest = Napi::Object::New(env);
  hardest.Set("image", Napi::Number::New(env, static_cast<double>(stats.hardest.source)));
  hardest.Set("baseLoss", Napi::Number::New(env, stats.hardest.base_loss));
  hardest.Set("gradientWeight", Napi::Number::New(env, stats.hardest.gradient_weight));
  object.Set("hardest", hardest);
  return object;
}

Napi::Array from_tensors(Napi::Env env, const std::vector<TensorInfo>& tensors) {
  const auto role_name = [](TensorRole role) {
    switch (role) {
      case TensorRole::parameter:
        return "parameter";
      case TensorRole::statistic:
        return "statistic";
      case TensorRole::optimizer:
        return "optimizer";
    }
    return "";
  };
  const auto array = Napi::Array::New(env, tensors.size());
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    const auto object = Napi::Object::New(env);
    const auto shape = Napi::Array::New(env, tensors[i].shape.size());
    for (uint32_t d = 0; d < tensors[i].shape.size(); ++d) {
      shape.Set(d, Napi::Number::New(env, static_cast<double>(tensors[i].shape[d])));
    }
    object.Set("name", tensors[i].name);
    object.Set("shape", shape);
    object.Set("role", role_name(tensors[i].role));
    array.Set(i, object);
  }
  return array;
}

Napi::Array from_nodes(Napi::Env env, const std::vector<Node>& nodes) {
  const auto op_name = [](Op op) {
    switch (op) {
      case Op::convolution:
        return "convolution";
      case Op::batch_norm:
        return "batch_norm";
      case Op::max_pool:
        return "max_pool";
      case Op::global_average_pool:
        return "global_average_pool";
      case Op::linear:
        return "linear";
    }
    return "";
  };
  const auto array = Napi::Array::New(env, nodes.size());
  for (uint32_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    const auto object = Napi::Object::New(env);
    const auto set = [&](const char* name, int64_t value) {
      object.Set(name, Napi::Number::New(env, static_cast<double>(value)));
    };
    object.Set("op", op_name(node.op));
    object.Set("name", node.name);
    set("input", node.input);
    set("residual", node.residual);
    set("inChannels", node.in_channels);
    set("outChannels", node.out_channels);
    set("inSize", node.in_size);
    set("outSize", node.out_size);
    set("kernel", node.kernel);
    set("stride", node.stride);
    set("padding", node.padding);
    object.Set("activation", node.activation == Activation::relu ? "relu" : "none");
    object.Set("fixedScale", node.fixed_scale);
    array.Set(i, object);
  }
  return array;
}

Napi::Object from_device(Napi::Env env, const DeviceInfo& device) {
  const auto precision_name = [](Precision precision) {
    switch (precision) {
      case Precision::fp32:
        return "fp32";
      case Precision::bf16:
        return "bf16";
      case Precision::fp16:
        return "fp16";
    }
    return "";
  };
  const auto object = Napi::Object::New(env);
  object.Set("name", device.name);
  object.Set("memoryBytes", Napi::Number::New(env, static_cast<double>(device.memory_bytes)));
  object.Set("freeBytes", Napi::Number::New(env, static_cast<double>(device.free_bytes)));
  object.Set("threads", Napi::Number::New(env, device.threads));
  const auto precisions = Napi::Array::New(env, device.precisions.size());
  for (uint32_t i = 0; i < device.precisions.size(); ++i) {
    precisions.Set(i, Napi::String::New(env, precision_name(device.precisions[i])));
  }
  object.Set("precisions", precisions);
  const auto details = Napi::Object::New(env);
  for (const auto& [name, value] : device.details) details.Set(name, value);
  object.Set("details", details);
  return object;
}

template <typename T>
Output<T>::Output(Napi::Env env, size_t length, const char* name) : length_(length) {
  Napi::Object array;
  try {
    // Through the constructor, not napi_create_arraybuffer: that one ends the process when memory
    // runs out, this one throws.
    array = (Environment::of(env).*Element<T>::kConstructor)
                .New({Napi::Number::New(env, static_cast<double>(length))});
  } catch (const Napi::Error& error) {
    throw Error(codes::kOutOfMemory, "Memory for " + std::to_string(length) + " values of " + name +
                                         " was refused (" + error.Message() +
                                         "): ask for less at a time.");
  }
  data_ = static_cast<T*>(typed_array_info(array).data);
  array_ = Napi::Persistent(array);
}
template class Output<float>;
template class Output<double>;
template class Output<int32_t>;
template class Output<uint8_t>;

}  // namespace hardmine::binding
