// What the handles of a training session and of an embedder have in common: named tensors and
// embeddings.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "binding/handle.h"
#include "core/backend.h"

namespace hardmine::binding {

// A backend and the TrainingSession or Embedder it made.
template <typename Native>
struct OwnedNetwork {
  std::unique_ptr<Backend> backend;  // outlives the network
  std::unique_ptr<Native> network;
};

inline int64_t element_count(const TensorInfo& tensor) {
  int64_t count = 1;
  for (const int64_t side : tensor.shape) count *= side;
  return count;
}

template <typename Native>
class NetworkHandle : public Handle {
 public:
  using OwnedSlot = std::shared_ptr<Slot<OwnedNetwork<Native>>>;

  NetworkHandle(Napi::Env env, std::shared_ptr<Worker> worker, OwnedSlot slot, int64_t embedding)
      : Handle(env, std::move(worker), tensor_bytes(slot->object->network->tensors())),
        slot_(std::move(slot)),
        tensors_(slot_->object->network->tensors()),
        embedding_(embedding) {}

  const std::vector<TensorInfo>& tensors() const { return tensors_; }

  Napi::Value embed(const Napi::CallbackInfo& info) {
    const auto images =
        std::make_shared<std::vector<uint8_t>>(to_vector<uint8_t>(info[0], "images"));
    if (images->size() % kImageBytes != 0) {
      refuse("images", "a Uint8Array of whole images, 112 x 112 x 3 = 37632 elements each",
             info[0]);
    }
    const bool mirror = to_boolean(info[1], "mirror");
    const size_t count = images->size() / kImageBytes;
    const auto width = static_cast<size_t>(embedding_);
    const auto embeddings =
        std::make_shared<Output<float>>(info.Env(), count * width, "embeddings");
    return submit(
        info, "embed",
        [slot = slot_, images, mirror, count, width,
         embeddings](const std::atomic<bool>& cancelled) {
          // In parts, so that dispose() and the end of the process need not wait for the whole; a
          // part is a batch of training, enough to keep a device busy.
          constexpr size_t kPart = 64;
          for (size_t at = 0; at < count && !cancelled; at += kPart) {
            const size_t part = std::min(kPart, count - at);
            slot->object->network->embed(
                std::span(*images).subspan(at * kImageBytes, part * kImageBytes), mirror,
                embeddings->span().subspan(at * width, part * width));
          }
        },
        [embeddings](Napi::Env) { return embeddings->value(); });
  }

  Napi::Value read(const Napi::CallbackInfo& info) {
    const TensorInfo& tensor = find(info[0]);
    const auto values = std::make_shared<Output<float>>(
        info.Env(), static_cast<size_t>(element_count(tensor)), "the tensor");
    return submit(
        info, "read",
        [slot = slot_, name = tensor.name, values](const std::atomic<bool>&) {
          slot->object->network->read(name, values->span());
        },
        [values](Napi::Env) { return values->value(); });
  }

  Napi::Value write(const Napi::CallbackInfo& info) {
    const TensorInfo& tensor = find(info[0]);
    auto values = to_vector<float>(info[1], "values", static_cast<size_t>(element_count(tensor)));
    return submit(
        info, "write",
        [slot = slot_, name = tensor.name, values = std::move(values)](const std::atomic<bool>&) {
          slot->object->network->write(name, values);
        },
        no_result);
  }

 protected:
  const OwnedSlot& slot() const { return slot_; }

 private:
  static int64_t tensor_bytes(const std::vector<TensorInfo>& tensors) {
    int64_t count = 0;
    for (const TensorInfo& tensor : tensors) count += element_count(tensor);
    return count * int64_t{sizeof(float)};
  }

  const TensorInfo& find(Napi::Value value) const {
    const std::string name = to_text(value, "name");
    const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                    [&](const TensorInfo& tensor) { return tensor.name == name; });
    if (found == tensors_.end()) refuse("name", "the name of one of `tensors`", value);
    return *found;
  }

  OwnedSlot slot_;
  std::vector<TensorInfo> tensors_;
  int64_t embedding_;
};

// The object for a handle of kind T, a NetworkHandle, with the members that they share.
template <typename T>
Napi::Object wrap_network(Napi::Env env, std::unique_ptr<T> handle) {
  const Napi::Array tensors = from_tensors(env, handle->tensors());
  const Napi::Object object = wrap(env, std::move(handle));
  define_value(object, "tensors", tensors);
  define_method<rejecting<method<T, &T::embed>>>(object, "embed");
  define_method<rejecting<method<T, &T::read>>>(object, "read");
  define_method<rejecting<method<T, &T::write>>>(object, "write");
  return object;
}

}  // namespace hardmine::binding
