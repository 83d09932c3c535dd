#include "binding/handle.h"

namespace hardmine::binding {

Handle::Handle(Napi::Env env, std::shared_ptr<Worker> worker, int64_t bytes)
    : env_(env), worker_(std::move(worker)), bytes_(bytes) {
  account(bytes_);
}

// The garbage collector found the handle unused. Its jobs hold it, so there are none: the thread
// ends by itself and nothing is waited for.
Handle::~Handle() {
  if (worker_->closed()) return;  // disposed, or the environment is at its end
  account(-bytes_);
  worker_->close(env_);
}

Napi::Value Handle::dispose(const Napi::CallbackInfo& info) {
  if (!worker_->closed()) account(-bytes_);
  return worker_->dispose(info.Env());
}

void Handle::account(int64_t bytes) {
  int64_t total = 0;
  // Advice to the collector: a refusal changes nothing that matters.
  static_cast<void>(napi_adjust_external_memory(env_, bytes, &total));
}

}  // namespace hardmine::binding
