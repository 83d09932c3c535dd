#include "binding/errors.h"

#include <new>
#include <string>

#include "binding/environment.h"

namespace hardmine::binding {
namespace {

Napi::Value make_error(Napi::Env env, const char* code, const std::string& message) {
  const auto& error_class = Environment::of(env).error_class;
  if (!error_class.IsEmpty()) {
    return error_class.New({Napi::String::New(env, code), Napi::String::New(env, message)});
  }
  // The addon was loaded without the loader of src/native.ts.
  const Napi::Error error = Napi::Error::New(env, message);
  error.Set("code", Napi::String::New(env, code));
  return error.Value();
}

}  // namespace

Napi::Value to_js_error(Napi::Env env, const char* call) {
  try {
    throw;
  } catch (const Napi::Error& error) {
    return error.Value();
  } catch (const Error& error) {
    return make_error(env, error.code(), error.what());
  } catch (const std::bad_alloc&) {
    return make_error(env, hardmine::codes::kOutOfMemory,
                      std::string("Memory ran out in ") + call +
                          ": take a smaller batch, fewer classes, or free memory on this machine.");
  } catch (const std::exception& error) {
    return make_error(env, codes::kInternal,
                      std::string("Unexpected failure in ") + call + ": " + error.what() + ".");
  } catch (...) {
    return make_error(
        env, codes::kInternal,
        std::string("Unexpected failure in ") + call + ": an exception of unknown type.");
  }
}

void throw_disposed(const char* call) {
  throw Error(hardmine::codes::kDisposed,
              std::string(call) + " was called on a handle that was disposed: make a new one.");
}

}  // namespace hardmine::binding
