#include "binding/handle.h"
#include "binding/handles.h"
#include "core/folder_lock.h"

namespace hardmine::binding {
namespace {

// Holding it is all that it does: what it locks is free when its worker has ended.
class Lock : public Handle {
 public:
  static constexpr napi_type_tag kTag = {0x6D1F0B93A7C24E58, 0xB7E4295D80F36CA1};
  static constexpr const char* kKind = "lock handle";

  Lock(Napi::Env env, std::shared_ptr<Worker> worker) : Handle(env, std::move(worker), 0) {}
};

}  // namespace

Napi::Value lock_folder(const Napi::CallbackInfo& info) {
  const std::string folder = to_path(info[0], "folder");
  const std::string note = to_text(info[1], "note");
  const auto present = [](Napi::Env env, std::shared_ptr<Worker> worker,
                          const std::shared_ptr<Slot<const FolderLock>>& slot) -> Napi::Value {
    const std::string& unsupported = slot->object->unsupported();
    const auto object = wrap(env, std::make_unique<Lock>(env, std::move(worker)));
    define_value(
        object, "unsupported",
        unsupported.empty() ? env.Null() : Napi::Value(Napi::String::New(env, unsupported)));
    return object;
  };
  return create<const FolderLock>(
      info.Env(), "lockFolder", [folder, note] { return FolderLock::take(folder, note); }, present);
}

}  // namespace hardmine::binding
