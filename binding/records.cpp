#include "core/records.h"

#include "binding/batches.h"
#include "binding/handles.h"

namespace hardmine::binding {
namespace {

class Records : public Handle {
 public:
  static constexpr napi_type_tag kTag = {0xE05B7C2149AF4D16, 0x9C83D17A60F2B4E5};
  static constexpr const char* kKind = "records handle";

  // The native object is a mapping of a file, no memory of its own.
  Records(Napi::Env env, std::shared_ptr<Worker> worker,
          std::shared_ptr<Slot<const RecordFile>> slot)
      : Handle(env, std::move(worker), 0),
        slot_(std::move(slot)),
        images_(slot_->object->images()) {}

  Napi::Value jpeg(const Napi::CallbackInfo& info);
  Napi::Value decode(const Napi::CallbackInfo& info);
  Napi::Value verify(const Napi::CallbackInfo& info);
  Napi::Value batches(const Napi::CallbackInfo& info);

 private:
  std::shared_ptr<Slot<const RecordFile>> slot_;
  int64_t images_;
};

void decode_image(const RecordFile& records, int64_t index, std::vector<uint8_t>& joined,
                  uint8_t* pixels) {
  decode_jpeg(records.image(index, joined), records.describe(index), pixels);
}

Napi::Value Records::jpeg(const Napi::CallbackInfo& info) {
  const int64_t index = to_integer(info[0], "index", 0, images_ - 1);
  const auto bytes = std::make_shared<std::vector<uint8_t>>();
  return submit(
      info, "records.jpeg",
      [slot = slot_, index, bytes](const std::atomic<bool>&) {
        std::vector<uint8_t> joined;
        const auto image = slot->object->image(index, joined);
        bytes->assign(image.begin(), image.end());
      },
      [bytes](Napi::Env env) { return from_span<uint8_t>(env, *bytes, "the encoded image"); });
}

Napi::Value Records::decode(const Napi::CallbackInfo& info) {
  const auto indices = to_indices(info[0], "indices", images_);
  const auto pixels =
      std::make_shared<Output<uint8_t>>(info.Env(), indices.size() * kImageBytes, "the images");
  return submit(
      info, "records.decode",
      [slot = slot_, indices, pixels](const std::atomic<bool>& cancelled) {
        std::vector<uint8_t> joined;
        for (size_t i = 0; i < indices.size() && !cancelled; ++i) {
          decode_image(*slot->object, indices[i], joined, pixels->span().data() + i * kImageBytes);
        }
      },
      [pixels](Napi::Env) { return pixels->value(); });
}

Napi::Value Records::verify(const Napi::CallbackInfo& info) {
  struct Damage {
    int64_t index;
    std::string reason;
  };
  const int64_t from = info[0].IsUndefined() ? 0 : to_integer(info[0], "from", 0, images_);
  const int64_t to = info[1].IsUndefined() ? images_ : to_integer(info[1], "to", from, images_);
  const auto damages = std::make_shared<std::vector<Damage>>();
  return submit(
      info, "records.verify",
      [slot = slot_, from, to, damages](const std::atomic<bool>& cancelled) {
        const RecordFile& records = *slot->object;
        std::vector<uint8_t> joined;
        std::vector<uint8_t> pixels(kImageBytes);
        for (int64_t index = from; index < to && !cancelled; ++index) {
          try {
            decode_image(records, index, joined, pixels.data());
          } catch (const Error& error) {
            damages->push_back({index, error.what()});
          }
        }
      },
      [damages](Napi::Env env) -> Napi::Value {
        const auto array = Napi::Array::New(env, damages->size());
        for (uint32_t i = 0; i < damages->size(); ++i) {
          const auto object = Napi::Object::New(env);
          object.Set("index", Napi::Number::New(env, static_cast<double>((*damages)[i].index)));
          object.Set("reason", (*damages)[i].reason);
          array.Set(i, object);
        }
        return array;
      });
}

Napi::Value Records::batches(const Napi::CallbackInfo& info) {
  require_open("records.batches");
  return create_batches(info.Env(), slot_->object, info[0]);
}

}  // namespace

Napi::Value open_records(const Napi::CallbackInfo& info) {
  const std::string rec_path = to_path(info[0], "recPath");
  const std::string idx_path = to_path(info[1], "idxPath");
  const auto present = [](Napi::Env env, std::shared_ptr<Worker> worker,
                          const std::shared_ptr<Slot<const RecordFile>>& slot) -> Napi::Value {
    const RecordFile& records = *slot->object;
    const auto object = wrap(env, std::make_unique<Records>(env, std::move(worker), slot));
    const auto numbers = [&](const char* name, const auto& values) {
      const std::vector<double> copy(values.begin(), values.end());
      define_value(object, name, from_span<double>(env, copy, name));
    };
    define_value(object, "images", Napi::Number::New(env, static_cast<double>(records.images())));
    define_value(object, "bytes", Napi::Number::New(env, static_cast<double>(records.bytes())));
    define_value(object, "labels", from_span<int32_t>(env, records.labels(), "labels"));
    numbers("offsets", records.offsets());
    numbers("keys", records.keys());
    define_method<rejecting<method<Records, &Records::jpeg>>>(object, "jpeg");
    define_method<rejecting<method<Records, &Records::decode>>>(object, "decode");
    define_method<rejecting<method<Records, &Records::verify>>>(object, "verify");
    define_method<rejecting<method<Records, &Records::batches>>>(object, "batches");
    return object;
  };
  return create<const RecordFile>(
      info.Env(), "openRecords",
      [rec_path, idx_path] { return RecordFile::open(rec_path, idx_path); }, present);
}

}  // namespace hardmine::binding
