// What JavaScript holds of a native object: a plain object without a constructor, tagged by its
// kind, whose methods check that tag before they touch memory.
#pragma once

#include <napi.h>

#include <memory>
#include <string>
#include <utility>

#include "binding/convert.h"
#include "binding/environment.h"
#include "binding/errors.h"
#include "binding/worker.h"

namespace hardmine::binding {

// The native object of a handle: filled by the first job of its worker, emptied by the worker's
// end, both on the worker's thread.
template <typename T>
struct Slot {
  std::shared_ptr<T> object;
};

class Handle {
 public:
  // `bytes` that the native object holds are made known to the garbage collector.
  Handle(Napi::Env env, std::shared_ptr<Worker> worker, int64_t bytes);
  virtual ~Handle();
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  Napi::Value dispose(const Napi::CallbackInfo& info);

 protected:
  // Queues work; `result` makes the value that the promise is resolved with. Both keep what they
  // captured until the promise is settled. Throws ERR_DISPOSED.
  template <typename Work, typename Result>
  Napi::Promise submit(const Napi::CallbackInfo& info, const char* name, Work work, Result result,
                       bool stoppable = false) {
    require_open(name);
    auto job = std::make_unique<Job>(info.Env(), name);
    job->work = std::move(work);
    job->result = std::move(result);
    job->handle = Napi::Persistent(info.This().As<Napi::Object>());
    job->stoppable = stoppable;
    return worker_->enqueue(std::move(job));
  }
  void require_open(const char* name) const {
    if (worker_->closed()) throw_disposed(name);
  }
  Worker& worker() { return *worker_; }

 private:
  void account(int64_t bytes);

  Napi::Env env_;
  std::shared_ptr<Worker> worker_;
  int64_t bytes_;
};

// The result of a job that has none.
inline Napi::Value no_result(Napi::Env env) {
  return env.Undefined();
}

// The handle of kind T that a value is; `name` is the argument's, for the message.
template <typename T>
T& unwrap(Napi::Value value, const char* name) {
  const Napi::Env env = value.Env();
  bool tagged = false;
  if (value.IsObject() && napi_check_object_type_tag(env, value, &T::kTag, &tagged) != napi_ok) {
    throw Napi::Error::New(env);
  }
  if (!tagged) refuse(name, std::string("a native ") + T::kKind, value);
  void* handle = nullptr;
  if (napi_unwrap(env, value, &handle) != napi_ok) throw Napi::Error::New(env);
  return *static_cast<T*>(static_cast<Handle*>(handle));
}

template <typename T, auto member>
Napi::Value method(const Napi::CallbackInfo& info) {
  return (unwrap<T>(info.This(), "this").*member)(info);
}

template <Callback callback>
void define_method(Napi::Object object, const char* name) {
  object.DefineProperty(Napi::PropertyDescriptor::Value(
      name, Napi::Function::New<callback>(object.Env(), name), napi_default));
}

inline void define_value(Napi::Object object, const char* name, Napi::Value value) {
  object.DefineProperty(Napi::PropertyDescriptor::Value(name, value, napi_enumerable));
}

// The object that JavaScript gets for a handle, with dispose(); the kind adds its own methods.
template <typename T>
Napi::Object wrap(Napi::Env env, std::unique_ptr<T> handle) {
  const Napi::Object object = Napi::Object::New(env);
  const auto finalize = [](napi_env, void* data, void*) { delete static_cast<Handle*>(data); };
  if (napi_wrap(env, object, static_cast<Handle*>(handle.get()), finalize, nullptr, nullptr) !=
      napi_ok) {
    throw Napi::Error::New(env);
  }
  handle.release();  // NOLINT: the finalizer owns it now
  if (napi_type_tag_object(env, object, &T::kTag) != napi_ok) throw Napi::Error::New(env);
  define_method<rejecting<method<T, &T::dispose>>>(object, "dispose");
  return object;
}

// Starts a worker, makes the native object on its thread and resolves with what `present` makes of
// it on the JavaScript thread; ends the worker when either fails.
template <typename T, typename Make, typename Present>
Napi::Promise create(Napi::Env env, const char* name, Make make, Present present) {
  auto slot = std::make_shared<Slot<T>>();
  auto worker = Worker::start(Environment::of(env), [slot] { slot->object.reset(); });
  auto job = std::make_unique<Job>(env, name);
  job->creates = true;
  job->work = [slot, make = std::move(make)](const std::atomic<bool>&) { slot->object = make(); };
  job->result = [slot, worker, present = std::move(present)](Napi::Env result_env) {
    return present(result_env, worker, slot);
  };
  return worker->enqueue(std::move(job));
}

}  // namespace hardmine::binding
