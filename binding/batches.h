// The ring of decoded batches as JavaScript holds it, and as a session trains from it.
#pragma once

#include <memory>

#include "binding/handle.h"
#include "core/decode.h"

namespace hardmine::binding {

// A ring and the backend whose memory it uses, which must outlive it.
struct Ring {
  std::unique_ptr<Backend> backend;
  std::unique_ptr<BatchRing> ring;
};

// The use of a ring by one call: a ring serves one call at a time. Taken and given back on the
// JavaScript thread.
class RingUse {
 public:
  // Throws ERR_BUSY.
  RingUse(std::shared_ptr<Ring> ring, std::shared_ptr<bool> busy, const char* call);
  ~RingUse() { *busy_ = false; }
  RingUse(const RingUse&) = delete;
  RingUse& operator=(const RingUse&) = delete;

  BatchRing& operator*() const { return *ring_->ring; }
  // Lets go of the ring, on the thread that used it: if the handle was disposed meanwhile, the ring
  // is destroyed here.
  void finish() { ring_.reset(); }

 private:
  std::shared_ptr<Ring> ring_;
  std::shared_ptr<bool> busy_;
};

class Batches : public Handle {
 public:
  static constexpr napi_type_tag kTag = {0x4D1E6B0A93C74F58, 0xA2570F8E1BD946C3};
  static constexpr const char* kKind = "batches handle";

  Batches(Napi::Env env, std::shared_ptr<Worker> worker, std::shared_ptr<Ring> ring, int64_t bytes)
      : Handle(env, std::move(worker), bytes), ring_(std::move(ring)) {}

  Napi::Value seek(const Napi::CallbackInfo& info);
  Napi::Value waited_ms(const Napi::CallbackInfo& info);
  Napi::Value skipped(const Napi::CallbackInfo& info);
  Napi::Value drain(const Napi::CallbackInfo& info);
  // For a call that is about to take batches. Throws ERR_BUSY or ERR_DISPOSED.
  std::shared_ptr<RingUse> use(const char* call);

 private:
  std::weak_ptr<Ring> ring_;  // the worker's slot owns it
  std::shared_ptr<bool> busy_ = std::make_shared<bool>(false);
};

Napi::Promise create_batches(Napi::Env env, std::shared_ptr<const RecordFile> records,
                             Napi::Value options);

}  // namespace hardmine::binding
