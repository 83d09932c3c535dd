// A native thread with a queue of jobs. Every handle owns one: its backend object is made, used and
// destroyed on that thread, never on libuv's pool, so that file and network work of the program
// goes on beside training.
#pragma once

#include <napi.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace hardmine::binding {

class Environment;

// One call of JavaScript's on its way through a worker: made, settled and destroyed on the
// JavaScript thread; `work` alone runs on the worker's. Whatever `work` needs is copied or
// allocated before the job is queued.
struct Job {
  Job(Napi::Env env, const char* job_name) : name(job_name), deferred(env) {}

  const char* name;  // "head.step", for messages
  std::function<void(const std::atomic<bool>& cancelled)> work;
  std::function<Napi::Value(Napi::Env)> result;  // what the promise is resolved with
  Napi::Promise::Deferred deferred;
  Napi::ObjectReference handle;  // not collected while its job is pending
  bool creates = false;          // failing, it ends its worker
  bool stoppable = false;        // Worker::stop_jobs() reaches it
  std::atomic<bool> cancelled = false;
  std::exception_ptr error;
};

class Worker {
 public:
  // `release` destroys the object that the jobs work on; it runs on the thread, last of all.
  static std::shared_ptr<Worker> start(Environment& environment, std::function<void()> release);
  Worker(Environment& environment, std::function<void()> release);

  // All of the following are called on the JavaScript thread.
  bool closed() const { return closed_; }
  bool joined() const { return !thread_.joinable(); }
  // Jobs run in the order in which they were queued. Not after close().
  Napi::Promise enqueue(std::unique_ptr<Job> job);
  // Tells the stoppable jobs, running and waiting, to stop early.
  void stop_jobs();
  // Ends the thread without waiting for it: tells the running job to stop and rejects it and the
  // waiting ones with ERR_DISPOSED. May be called again.
  void close(Napi::Env env);
  // Like close(); the promise is resolved when the object is destroyed and the thread has ended.
  Napi::Promise dispose(Napi::Env env);
  // Settles what has finished.
  void deliver(Napi::Env env);
  // For the end of the environment, when no promise can be settled any more.
  void abandon();
  void join();

 private:
  using Jobs = std::list<std::unique_ptr<Job>>;  // spliced between lists: moving a job cannot fail

  void run() noexcept;
  Jobs request_exit();
  void settle(Napi::Env env, Job& job);

  Environment& environment_;
  std::function<void()> release_;
  bool closed_ = false;
  std::vector<Napi::Promise::Deferred> disposals_;

  std::mutex mutex_;  // guards the following
  std::condition_variable changed_;
  Jobs queue_, finished_;
  Job* running_ = nullptr;
  bool exit_requested_ = false;
  bool exited_ = false;

  std::thread thread_;  // last: it uses all of the above
};

}  // namespace hardmine::binding
