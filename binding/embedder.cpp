#include "binding/handles.h"
#include "binding/network_handle.h"

namespace hardmine::binding {
namespace {

class EmbedderHandle : public NetworkHandle<Embedder> {
 public:
  static constexpr napi_type_tag kTag = {0x15F8A6D3C2704EB9, 0x8D96B32F5E417AC0};
  static constexpr const char* kKind = "embedder handle";
  using NetworkHandle::NetworkHandle;
};

}  // namespace

Napi::Value create_embedder(const Napi::CallbackInfo& info) {
  const NetworkSpec network = to_network(info[0], "network");
  const Execution execution = to_execution(info[1]);
  using Owned = OwnedNetwork<Embedder>;
  const auto make = [network, execution] {
    auto owned = std::make_shared<Owned>();
    owned->backend = make_backend();
    owned->network = owned->backend->make_embedder(network, execution);
    return owned;
  };
  const auto present = [embedding = network.embedding](
                           Napi::Env env, std::shared_ptr<Worker> worker,
                           const std::shared_ptr<Slot<Owned>>& slot) -> Napi::Value {
    return wrap_network(env,
                        std::make_unique<EmbedderHandle>(env, std::move(worker), slot, embedding));
  };
  return create<Owned>(info.Env(), "createEmbedder", make, present);
}

}  // namespace hardmine::binding
