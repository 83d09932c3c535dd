// The addon's module: what src/native.ts calls NativeAddon.

#include <napi.h>

#include "binding/convert.h"
#include "binding/environment.h"
#include "binding/errors.h"
#include "binding/handle.h"
#include "binding/handles.h"
#include "core/decode.h"
#include "core/loss_maths.h"

namespace hardmine::binding {
namespace {

Napi::Value set_error_class(const Napi::CallbackInfo& info) {
  if (!info[0].IsFunction()) refuse("errorClass", "a constructor", info[0]);
  Environment::of(info.Env()).error_class = Napi::Persistent(info[0].As<Napi::Function>());
  return info.Env().Undefined();
}

Napi::Value device_count(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), make_backend()->device_count());
}

Napi::Value device(const Napi::CallbackInfo& info) {
  const auto backend = make_backend();
  const auto most = static_cast<int64_t>(backend->device_count()) - 1;
  const int64_t ordinal = to_integer(info[0], "ordinal", 0, most);
  return from_device(info.Env(), backend->device(static_cast<int>(ordinal)));
}

Napi::Value describe_network(const Napi::CallbackInfo& info) {
  return from_nodes(info.Env(), build_network(to_network(info[0], "network")));
}

Napi::Value weight_user_losses(const Napi::CallbackInfo& info) {
  const auto losses = to_vector<double>(info[0], "losses");
  const Weighting weighting = to_weighting(Members(info[1], "weighting"));
  const Output<double> weighted(info.Env(), losses.size(), "weighted");
  const Output<double> gradient_weight(info.Env(), losses.size(), "gradientWeight");
  weight_losses(losses, weighting, weighted.span(), gradient_weight.span());
  const auto object = Napi::Object::New(info.Env());
  object.Set("weighted", weighted.value());
  object.Set("gradientWeight", gradient_weight.value());
  return object;
}

Napi::Value read_header(const Napi::CallbackInfo& info) {
  const auto jpeg = to_vector<uint8_t>(info[0], "jpeg");
  const JpegInfo header = read_jpeg_info(jpeg, "the image");
  const auto object = Napi::Object::New(info.Env());
  object.Set("width", header.width);
  object.Set("height", header.height);
  object.Set("components", header.components);
  return object;
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Environment(env));  // Node deletes it with the environment
  const std::string backend = make_backend()->name();
  define_value(exports, "backend", Napi::String::New(env, backend));
  define_method<throwing<set_error_class>>(exports, "setErrorClass");
  define_method<throwing<device_count>>(exports, "deviceCount");
  define_method<throwing<device>>(exports, "device");
  define_method<throwing<describe_network>>(exports, "describeNetwork");
  define_method<throwing<weight_user_losses>>(exports, "weightLosses");
  define_method<throwing<read_header>>(exports, "readJpegInfo");
  define_method<rejecting<create_head>>(exports, "createHead");
  define_method<rejecting<create_session>>(exports, "createSession");
  define_method<rejecting<create_embedder>>(exports, "createEmbedder");
  define_method<rejecting<open_records>>(exports, "openRecords");
  define_method<rejecting<lock_folder>>(exports, "lockFolder");
  return exports;
}

}  // namespace

NODE_API_MODULE(hardmine, init)

}  // namespace hardmine::binding
