#include "binding/worker.h"

#include "binding/environment.h"
#include "binding/errors.h"

namespace hardmine::binding {

std::shared_ptr<Worker> Worker::start(Environment& environment, std::function<void()> release) {
  auto worker = std::make_shared<Worker>(environment, std::move(release));
  environment.add(worker);  // before the thread starts, so that none is ever left out
  worker->thread_ = std::thread([raw = worker.get()] { raw->run(); });
  return worker;
}

Worker::Worker(Environment& environment, std::function<void()> release)
    : environment_(environment), release_(std::move(release)) {}

Napi::Promise Worker::enqueue(std::unique_ptr<Job> job) {
  const Napi::Promise promise = job->deferred.Promise();
  environment_.begin_pending();
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(job));
  }
  changed_.notify_one();
  return promise;
}

void Worker::stop_jobs() {
  const std::lock_guard lock(mutex_);
  for (const auto& job : queue_) {
    if (job->stoppable) job->cancelled = true;
  }
  if (running_ != nullptr && running_->stoppable) running_->cancelled = true;
}

void Worker::close(Napi::Env env) {
  if (closed_) return;
  closed_ = true;
  for (const auto& job : request_exit()) settle(env, *job);
}

Napi::Promise Worker::dispose(Napi::Env env) {
  const auto deferred = Napi::Promise::Deferred::New(env);
  close(env);
  if (joined()) {
    deferred.Resolve(env.Undefined());
  } else {
    disposals_.push_back(deferred);
    environment_.begin_pending();
  }
  return deferred.Promise();
}

void Worker::deliver(Napi::Env env) {
  Jobs finished;
  bool exited = false;
  {
    const std::lock_guard lock(mutex_);
    finished.splice(finished.end(), finished_);
    exited = exited_;
  }
  for (const auto& job : finished) settle(env, *job);
  if (!exited || joined()) return;
  thread_.join();
  for (const auto& deferred : disposals_) {
    environment_.end_pending();
    deferred.Resolve(env.Undefined());
  }
  disposals_.clear();
}

void Worker::abandon() {
  closed_ = true;
  request_exit();
}

void Worker::join() {
  if (thread_.joinable()) thread_.join();
  finished_.clear();
}

Worker::Jobs Worker::request_exit() {
  Jobs waiting;
  {
    const std::lock_guard lock(mutex_);
    exit_requested_ = true;
    waiting.splice(waiting.end(), queue_);
    if (running_ != nullptr) running_->cancelled = true;
  }
  changed_.notify_one();
  return waiting;
}

void Worker::settle(Napi::Env env, Job& job) {
  const Napi::HandleScope scope(env);
  environment_.end_pending();
  try {
    if (closed_) throw_disposed(job.name);
    if (job.error) std::rethrow_exception(job.error);
    job.deferred.Resolve(job.result(env));
  } catch (...) {
    if (job.creates) close(env);
    job.deferred.Reject(to_js_error(env, job.name));
  }
}

void Worker::run() noexcept {
  for (;;) {
    Jobs current;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return exit_requested_ || !queue_.empty(); });
      if (exit_requested_) break;
      current.splice(current.end(), queue_, queue_.begin());
      running_ = current.front().get();
    }
    Job& job = *current.front();
    try {
      job.work(job.cancelled);
    } catch (...) {
      job.error = std::current_exception();
    }
    {
      const std::lock_guard lock(mutex_);
      running_ = nullptr;
      finished_.splice(finished_.end(), current);
    }
    environment_.wake();
  }
  release_();
  {
    const std::lock_guard lock(mutex_);
    exited_ = true;
  }
  environment_.wake();
}

}  // namespace hardmine::binding
