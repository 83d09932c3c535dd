// Everything that one JavaScript environment (the main thread or a worker thread) shares among its
// handles. It hangs off the environment as instance data: the addon has no globals.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

namespace hardmine::binding {

class Worker;

class Environment {
 public:
  explicit Environment(Napi::Env env);
  static Environment& of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

  // The constructor that native errors are made with; the loader hands it over (setErrorClass).
  Napi::FunctionReference error_class;
  // Taken when the addon is loaded, so that no later change to the globals reaches the addon.
  Napi::FunctionReference float32_array, float64_array, int32_array, uint8_array;

  Napi::Env env() const { return env_; }
  // From then on the worker is joined before the environment ends. Throws ERR_ABORTED at its end.
  void add(std::shared_ptr<Worker> worker);
  // The event loop stays alive while anything is pending, and only then.
  void begin_pending();
  void end_pending();
  // Any thread: makes the JavaScript thread look at its workers soon.
  void wake();

 private:
  static void deliver(Napi::Env env, Napi::Function, Environment* environment, void*);
  // Cancels and joins every worker: the environment ends (process.exit, worker.terminate, the end).
  // Takes as long as the step under way; may be called again.
  void shut_down();

  using Wakeup = Napi::TypedThreadSafeFunction<Environment, void, &Environment::deliver>;
  Napi::Env env_;
  Wakeup wakeup_;
  std::vector<std::shared_ptr<Worker>> workers_;
  size_t pending_ = 0;
  bool ended_ = false;
};

}  // namespace hardmine::binding
