#include "binding/environment.h"

#include <algorithm>

#include "binding/worker.h"
#include "core/error.h"

namespace hardmine::binding {

Environment::Environment(Napi::Env env) : env_(env) {
  const Napi::Object global = env.Global();
  const auto constructor = [&](const char* name) {
    return Napi::Persistent(global.Get(name).As<Napi::Function>());
  };
  float32_array = constructor("Float32Array");
  float64_array = constructor("Float64Array");
  int32_array = constructor("Int32Array");
  uint8_array = constructor("Uint8Array");
  wakeup_ = Wakeup::New(env, "hardmine", 0, 1, this);
  wakeup_.Unref(env);
  // Hooks run in reverse order: added after wakeup_ was made, this one joins the workers before
  // Node takes the thread-safe function away under them.
  env.AddCleanupHook([this] { shut_down(); });
  // process.exit() and uncaught exceptions run no such hooks on the main thread: they go straight
  // to exit(), which destroys the libraries' static objects under threads that still compute.
  const auto process = global.Get("process").As<Napi::Object>();
  process.Get("once").As<Napi::Function>().Call(
      process, {Napi::String::New(env, "exit"),
                Napi::Function::New(env, [this](const Napi::CallbackInfo&) { shut_down(); })});
}

void Environment::begin_pending() {
  if (pending_++ == 0) wakeup_.Ref(env_);
}

void Environment::end_pending() {
  if (--pending_ == 0) wakeup_.Unref(env_);
}

void Environment::wake() {
  wakeup_.NonBlockingCall();
}

void Environment::deliver(Napi::Env env, Napi::Function, Environment* environment, void*) {
  if (static_cast<napi_env>(env) == nullptr)
    return;  // the environment has ended; shut_down dropped what was left
  // A copy: settling a promise may start or end workers.
  for (const auto& worker : std::vector(environment->workers_)) worker->deliver(env);
  std::erase_if(environment->workers_, [](const auto& worker) { return worker->joined(); });
}

void Environment::add(std::shared_ptr<Worker> worker) {
  if (ended_) {
    throw Error(codes::kAborted, "Nothing native can be started while the process is ending.");
  }
  workers_.push_back(std::move(worker));
}

void Environment::shut_down() {
  ended_ = true;
  for (const auto& worker : workers_) worker->abandon();  // all are told before any is waited for
  for (const auto& worker : workers_) worker->join();
  workers_.clear();
}

}  // namespace hardmine::binding
