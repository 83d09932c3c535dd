// The one place where exceptions of C++ become errors of JavaScript.
#pragma once

#include <napi.h>

#include "core/error.h"

namespace hardmine::binding {

namespace codes {
inline constexpr const char* kInternal = "ERR_INTERNAL";  // a defect of hardmine
}  // namespace codes

// The exception being handled as a JavaScript value: a HardmineError, or what JavaScript itself
// threw. `call` names the work in messages of errors that have none. Call it in a catch block.
Napi::Value to_js_error(Napi::Env env, const char* call);

[[noreturn]] void throw_disposed(const char* call);

using Callback = Napi::Value (*)(const Napi::CallbackInfo&);

// A callback that throws its errors, and one that returns a promise and rejects it with them.
template <Callback callback>
Napi::Value throwing(const Napi::CallbackInfo& info) {
  try {
    return callback(info);
  } catch (...) {
    throw Napi::Error(info.Env(), to_js_error(info.Env(), "a call"));
  }
}

template <Callback callback>
Napi::Value rejecting(const Napi::CallbackInfo& info) {
  try {
    return callback(info);
  } catch (...) {
    const auto deferred = Napi::Promise::Deferred::New(info.Env());
    deferred.Reject(to_js_error(info.Env(), "a call"));
    return deferred.Promise();
  }
}

}  // namespace hardmine::binding
