#include <algorithm>
#include <atomic>
#include <limits>

#include "binding/batches.h"
#include "binding/handles.h"
#include "binding/network_handle.h"

namespace hardmine::binding {
namespace {

// The steps of one call, and what comes of them.
struct Steps {
  std::vector<StepSettings> settings;
  std::vector<StepStats> stats;
  int64_t done = 0;
};

// One batch of the caller's own images.
struct OwnBatch : BatchSource {
  std::vector<uint8_t> images;
  std::vector<int32_t> labels;
  std::vector<Augmentation> augmentations;

  Batch next() override {
    return {images.data(), labels.data(), augmentations.data(),
            static_cast<int64_t>(labels.size())};
  }
};

std::vector<Augmentation> draw_augmentations(const Members& augment, size_t rows) {
  const auto seed = static_cast<uint64_t>(augment.integer("seed", 0, kMaxSafeInteger));
  const bool mirror = augment.boolean("mirror");
  const auto crop = static_cast<int>(augment.integer("crop", 0, kImageSize / 2));
  const int64_t epoch = augment.integer("epoch", 1, kMaxSafeInteger);
  const int64_t first = augment.integer("first", 0, kMaxSafeInteger);
  std::vector<Augmentation> drawn(rows);
  for (size_t i = 0; i < rows; ++i) {
    drawn[i] = draw_augmentation(seed, mirror, crop, epoch, first + static_cast<int64_t>(i));
  }
  return drawn;
}

class Session : public NetworkHandle<TrainingSession> {
 public:
  static constexpr napi_type_tag kTag = {0xC6093D5B1F8E4A72, 0x9F27E0A4B85D6C31};
  static constexpr const char* kKind = "session handle";
  using NetworkHandle::NetworkHandle;

  Napi::Value train(const Napi::CallbackInfo& info);
  Napi::Value train_own(const Napi::CallbackInfo& info);
  Napi::Value cancel(const Napi::CallbackInfo& info);
  Napi::Value steps_done(const Napi::CallbackInfo& info);

 private:
  template <typename Source, typename Finish>
  Napi::Value submit_steps(const Napi::CallbackInfo& info, const char* name,
                           std::shared_ptr<Steps> steps, Source source, Finish finish);

  // Shared with the calls under way, which may outlive the handle.
  std::shared_ptr<std::atomic<int64_t>> steps_done_ = std::make_shared<std::atomic<int64_t>>(0);
};

// `finish` is called, on the worker's thread, when the steps were done without an error.
template <typename Source, typename Finish>
Napi::Value Session::submit_steps(const Napi::CallbackInfo& info, const char* name,
                                  std::shared_ptr<Steps> steps, Source source, Finish finish) {
  steps->stats.resize(steps->settings.size());
  return submit(
      info, name,
      [slot = slot(), steps, source, finish,
       steps_done = steps_done_](const std::atomic<bool>& cancelled) {
        try {
          steps->done =
              slot->object->network->train(source(), steps->settings, steps->stats, cancelled);
        } catch (...) {
          // A step that was done has rows; who reports the error can then name the step that
          // failed.
          *steps_done += std::count_if(steps->stats.begin(), steps->stats.end(),
                                       [](const StepStats& stats) { return stats.rows > 0; });
          throw;
        }
        *steps_done += steps->done;
        finish();
      },
      [steps](Napi::Env env) -> Napi::Value {
        const auto array = Napi::Array::New(env, static_cast<size_t>(steps->done));
        for (uint32_t i = 0; i < array.Length(); ++i)
          array.Set(i, from_stats(env, steps->stats[i]));
        return array;
      },
      true);
}

Napi::Value Session::train(const Napi::CallbackInfo& info) {
  auto& batches = unwrap<Batches>(info[0], "batches");
  if (!info[1].IsArray()) refuse("settings", "an Array", info[1]);
  const auto settings = info[1].As<Napi::Array>();
  const auto steps = std::make_shared<Steps>();
  const uint32_t count = settings.Length();  // once: a getter of the caller's may make it longer
  for (uint32_t i = 0; i < count; ++i) {
    steps->settings.push_back(to_step_settings(settings[i], "settings[" + std::to_string(i) + "]"));
  }
  const auto use = batches.use("session.train");
  return submit_steps(
      info, "session.train", steps, [use]() -> BatchSource& { return **use; },
      [use] { use->finish(); });
}

Napi::Value Session::train_own(const Napi::CallbackInfo& info) {
  const auto own = std::make_shared<OwnBatch>();
  own->labels = to_vector<int32_t>(info[1], "labels");
  own->images = to_vector<uint8_t>(info[0], "images", own->labels.size() * kImageBytes);
  own->augmentations = draw_augmentations(Members(info[2], "augment"), own->labels.size());
  const auto steps = std::make_shared<Steps>();
  steps->settings.push_back(to_step_settings(info[3], "settings"));
  return submit_steps(
      info, "session.trainOwn", steps, [own]() -> BatchSource& { return *own; }, [] {});
}

Napi::Value Session::cancel(const Napi::CallbackInfo& info) {
  require_open("session.cancel");
  worker().stop_jobs();
  return info.Env().Undefined();
}

Napi::Value Session::steps_done(const Napi::CallbackInfo& info) {
  require_open("session.stepsDone");
  return Napi::Number::New(info.Env(), static_cast<double>(*steps_done_));
}

}  // namespace

Napi::Value create_session(const Napi::CallbackInfo& info) {
  const Members members(info[0], "spec");
  SessionSpec spec;
  spec.network = to_network(members.value("network"), members.name("network"));
  spec.head.classes = members.integer("classes", 1, kMostClasses);
  spec.head.dim = spec.network.embedding;
  spec.head.loss = to_loss(members.members("loss"));
  spec.head.implementation = to_implementation(members);
  spec.batch = members.integer("batch", 1, std::numeric_limits<int32_t>::max());
  spec.seed = static_cast<uint64_t>(members.integer("seed", 0, kMaxSafeInteger));
  const Execution execution = to_execution(info[1]);

  using Owned = OwnedNetwork<TrainingSession>;
  const auto make = [spec, execution] {
    auto owned = std::make_shared<Owned>();
    owned->backend = make_backend();
    owned->network = owned->backend->make_session(spec, execution);
    return owned;
  };
  const auto present = [embedding = spec.network.embedding](
                           Napi::Env env, std::shared_ptr<Worker> worker,
                           const std::shared_ptr<Slot<Owned>>& slot) -> Napi::Value {
    const auto object =
        wrap_network(env, std::make_unique<Session>(env, std::move(worker), slot, embedding));
    define_value(object, "engines", Napi::String::New(env, slot->object->network->engines()));
    define_method<rejecting<method<Session, &Session::train>>>(object, "train");
    define_method<rejecting<method<Session, &Session::train_own>>>(object, "trainOwn");
    define_method<throwing<method<Session, &Session::cancel>>>(object, "cancel");
    define_method<throwing<method<Session, &Session::steps_done>>>(object, "stepsDone");
    return object;
  };
  return create<Owned>(info.Env(), "createSession", make, present);
}

}  // namespace hardmine::binding
