// The calls that make handles; each is implemented beside the handle it makes. Interfaces and units
// are those of src/native.ts.
#pragma once

#include <napi.h>

namespace hardmine::binding {

Napi::Value create_head(const Napi::CallbackInfo& info);
Napi::Value create_session(const Napi::CallbackInfo& info);
Napi::Value create_embedder(const Napi::CallbackInfo& info);
Napi::Value open_records(const Napi::CallbackInfo& info);
Napi::Value lock_folder(const Napi::CallbackInfo& info);

}  // namespace hardmine::binding
