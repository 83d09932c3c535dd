// Values of JavaScript to values of C++ and back. Every reader throws ERR_INPUT with a sentence
// that names the argument, what was expected and what was received; none runs code of the caller
// except getters of the objects passed in.
#pragma once

#include <napi.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/backend.h"

namespace hardmine::binding {

inline constexpr int64_t kMaxSafeInteger = (int64_t{1} << 53) - 1;  // Number.MAX_SAFE_INTEGER
inline constexpr int64_t kMostClasses = (int64_t{1} << 31) - 1;     // labels are int32
inline constexpr int64_t kMostDim = 65536;  // beyond any embedding: sizes in bytes cannot overflow

// "Expected EXPECTED for NAME but received VALUE."
[[noreturn]] void refuse(const std::string& name, const std::string& expected,
                         Napi::Value received);

double to_number(Napi::Value value, const std::string& name);  // finite
int64_t to_integer(Napi::Value value, const std::string& name, int64_t min, int64_t max);
bool to_boolean(Napi::Value value, const std::string& name);
std::string to_path(Napi::Value value, const std::string& name);
std::string to_text(Napi::Value value, const std::string& name);

// Which of a few strings a value is.
template <typename E>
E to_choice(Napi::Value value, const std::string& name,
            std::initializer_list<std::pair<const char*, E>> choices) {
  std::string expected;
  for (const auto& [text, choice] : choices) {
    if (value.IsString() && value.As<Napi::String>().Utf8Value() == text) return choice;
    expected += (expected.empty() ? "'" : " or '") + std::string(text) + "'";
  }
  refuse(name, expected, value);
}

// The elements of a typed array, copied: the caller may change, transfer or detach it at once.
// Takes views of shared memory too. `length`, where given, must be met.
template <typename T>
std::vector<T> to_vector(Napi::Value value, const std::string& name,
                         std::optional<size_t> length = std::nullopt);

// An Int32Array or Uint32Array of indices below `count`.
std::vector<int64_t> to_indices(Napi::Value value, const std::string& name, int64_t count);

// The members of an object that an argument is; messages name them "spec.loss.scale".
class Members {
 public:
  Members(Napi::Value value, std::string name);
  Napi::Value value(const char* member) const { return object_.Get(member); }
  std::string name(const char* member) const { return name_ + '.' + member; }

  double number(const char* member) const { return to_number(value(member), name(member)); }
  float single(const char* member) const { return static_cast<float>(number(member)); }
  int64_t integer(const char* member, int64_t min, int64_t max) const {
    return to_integer(value(member), name(member), min, max);
  }
  bool boolean(const char* member) const { return to_boolean(value(member), name(member)); }
  Members members(const char* member) const { return {value(member), name(member)}; }
  template <typename E>
  E choice(const char* member, std::initializer_list<std::pair<const char*, E>> choices) const {
    return to_choice<E>(value(member), name(member), choices);
  }

 private:
  Napi::Object object_;
  std::string name_;
};

Execution to_execution(Napi::Value value);
NetworkSpec to_network(Napi::Value value, const std::string& name);
LossSpec to_loss(const Members& loss);
Weighting to_weighting(const Members& weighting);
StepSettings to_step_settings(Napi::Value value, const std::string& name);
Implementation to_implementation(const Members& spec);

Napi::Object from_stats(Napi::Env env, const StepStats& stats);
Napi::Array from_tensors(Napi::Env env, const std::vector<TensorInfo>& tensors);
Napi::Array from_nodes(Napi::Env env, const std::vector<Node>& nodes);
Napi::Object from_device(Napi::Env env, const DeviceInfo& device);

// A typed array that a job fills: allocated on the JavaScript thread before the job is queued, so
// that its memory is V8's own (counted by the garbage collector, free to be transferred) and the
// result is never copied. Nobody else sees it before the job is done.
template <typename T>
class Output {
 public:
  Output(Napi::Env env, size_t length, const char* name);
  std::span<T> span() const { return {data_, length_}; }
  Napi::Value value() const { return array_.Value(); }

 private:
  Napi::ObjectReference array_;
  T* data_ = nullptr;
  size_t length_;
};

// A typed array with a copy of `values`.
template <typename T>
Napi::Value from_span(Napi::Env env, std::span<const T> values, const char* name) {
  const Output<T> output(env, values.size(), name);
  std::copy(values.begin(), values.end(), output.span().begin());
  return output.value();
}

}  // namespace hardmine::binding
