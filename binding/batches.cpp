#include "binding/batches.h"

#include <chrono>
#include <limits>

namespace hardmine::binding {
namespace {

// Memory of the ordinary kind, for rings that feed no GPU.
class PlainAllocator : public HostAllocator {
 public:
  void* allocate(size_t bytes) override { return ::operator new(bytes); }
  void release(void* memory) noexcept override { ::operator delete(memory); }
};

RingSpec to_ring_spec(const Members& options) {
  constexpr int64_t kMostThreads = 256;  // beyond any use: a mistake in the units
  RingSpec spec;
  const auto images = to_vector<int32_t>(options.value("images"), options.name("images"));
  spec.images.assign(images.begin(), images.end());
  spec.labels = to_vector<int32_t>(options.value("labels"), options.name("labels"), images.size());
  spec.batch = options.integer("batch", 1, std::numeric_limits<int32_t>::max());
  spec.seed = static_cast<uint64_t>(options.integer("seed", 0, kMaxSafeInteger));
  spec.mirror = options.boolean("mirror");
  spec.crop = static_cast<int>(options.integer("crop", 0, kImageSize - 1));
  spec.threads = static_cast<int>(options.integer("decodeThreads", 1, kMostThreads));
  if (!options.value("skip").IsNull()) {
    const Members skip = options.members("skip");
    spec.skips = skip.integer("most", 1, kMaxSafeInteger);
    const auto known = to_vector<int32_t>(skip.value("known"), skip.name("known"));
    spec.skipped.assign(known.begin(), known.end());
  }
  return spec;
}

}  // namespace

RingUse::RingUse(std::shared_ptr<Ring> ring, std::shared_ptr<bool> busy, const char* call)
    : ring_(std::move(ring)), busy_(std::move(busy)) {
  if (*busy_) {
    throw Error(hardmine::codes::kBusy,
                std::string(call) +
                    " needs a batches handle that another call is still using: await "
                    "that call first, or make a second handle.");
  }
  *busy_ = true;
}

std::shared_ptr<RingUse> Batches::use(const char* call) {
  if (worker().closed()) {
    throw Error(hardmine::codes::kDisposed,
                std::string(call) + " needs batches that were disposed: make new ones.");
  }
  return std::make_shared<RingUse>(ring_.lock(), busy_, call);
}

Napi::Value Batches::seek(const Napi::CallbackInfo& info) {
  const int64_t epoch = to_integer(info[0], "epoch", 1, kMaxSafeInteger);
  const int64_t step = to_integer(info[1], "step", 0, kMaxSafeInteger);
  const auto use = this->use("batches.seek");
  return submit(
      info, "batches.seek",
      [use, epoch, step](const std::atomic<bool>&) {
        (**use).seek(epoch, step);
        use->finish();
      },
      no_result);
}

Napi::Value Batches::waited_ms(const Napi::CallbackInfo& info) {
  require_open("batches.waitedMs");
  return Napi::Number::New(info.Env(), ring_.lock()->ring->waited_ms());
}

Napi::Value Batches::skipped(const Napi::CallbackInfo& info) {
  require_open("batches.skipped");
  const std::vector<SkippedImage> skipped = ring_.lock()->ring->skipped();
  const auto array = Napi::Array::New(info.Env(), skipped.size());
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const auto object = Napi::Object::New(info.Env());
    object.Set("index", Napi::Number::New(info.Env(), static_cast<double>(skipped[i].image)));
    object.Set("reason", skipped[i].reason);
    array.Set(i, object);
  }
  return array;
}

Napi::Value Batches::drain(const Napi::CallbackInfo& info) {
  const int64_t count = to_integer(info[0], "n", 0, kMaxSafeInteger);
  const auto use = this->use("batches.drain");
  const auto ms = std::make_shared<double>(0);
  return submit(
      info, "batches.drain",
      [use, count, ms](const std::atomic<bool>& cancelled) {
        const auto start = std::chrono::steady_clock::now();
        for (int64_t i = 0; i < count && !cancelled; ++i) (**use).next();
        *ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
                  .count();
        use->finish();
      },
      [ms](Napi::Env env) { return Napi::Number::New(env, *ms); });
}

Napi::Promise create_batches(Napi::Env env, std::shared_ptr<const RecordFile> records,
                             Napi::Value value) {
  const Members options(value, "options");
  const RingSpec spec = to_ring_spec(options);
  std::optional<Execution> execution;
  if (!options.value("execution").IsNull()) execution = to_execution(options.value("execution"));

  auto make = [records = std::move(records), spec, execution] {
    auto made = std::make_shared<Ring>();
    std::unique_ptr<HostAllocator> allocator;
    if (execution) {
      made->backend = make_backend();
      allocator = made->backend->host_allocator(*execution);
    } else {
      allocator = std::make_unique<PlainAllocator>();
    }
    made->ring = BatchRing::make(records, spec, std::move(allocator));
    return made;
  };
  auto present = [bytes = spec.slots * spec.batch * static_cast<int64_t>(kImageBytes)](
                     Napi::Env result_env, std::shared_ptr<Worker> worker,
                     const std::shared_ptr<Slot<Ring>>& slot) -> Napi::Value {
    const auto steps = static_cast<double>(slot->object->ring->steps_per_epoch());
    const auto object = wrap(
        result_env, std::make_unique<Batches>(result_env, std::move(worker), slot->object, bytes));
    define_value(object, "stepsPerEpoch", Napi::Number::New(result_env, steps));
    define_method<rejecting<method<Batches, &Batches::seek>>>(object, "seek");
    define_method<throwing<method<Batches, &Batches::waited_ms>>>(object, "waitedMs");
    define_method<throwing<method<Batches, &Batches::skipped>>>(object, "skipped");
    define_method<rejecting<method<Batches, &Batches::drain>>>(object, "drain");
    return object;
  };
  return create<Ring>(env, "records.batches", std::move(make), std::move(present));
}

}  // namespace hardmine::binding
