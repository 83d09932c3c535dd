// The one exception type of the native code: a code that TypeScript exposes as HardmineError.code
// and a sentence that says what was found, what was expected and how to mend it.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace hardmine {

// Codes are the strings a user sees; src/errors.ts lists the same ones.
namespace codes {
inline constexpr const char* kInput = "ERR_INPUT";      // an argument is wrong
inline constexpr const char* kConfig = "ERR_CONFIG";    // a setting is wrong
inline constexpr const char* kData = "ERR_DATA";        // a data set or one of its records is wrong
inline constexpr const char* kIo = "ERR_IO";            // the operating system refused
inline constexpr const char* kBackend = "ERR_BACKEND";  // oneDNN, cuDNN or cuBLASLt refused
inline constexpr const char* kUnavailable = "ERR_DEVICE_UNAVAILABLE";
inline constexpr const char* kOutOfMemory = "ERR_DEVICE_OOM";
inline constexpr const char* kDeviceLost = "ERR_DEVICE_LOST";
inline constexpr const char* kNonFinite = "ERR_NON_FINITE";  // NaN or infinity in training
inline constexpr const char* kAborted = "ERR_ABORTED";       // stopped by the caller
inline constexpr const char* kBusy = "ERR_BUSY";             // in use by somebody else
inline constexpr const char* kDisposed = "ERR_DISPOSED";     // the handle was disposed
}  // namespace codes

class Error : public std::runtime_error {
 public:
  Error(const char* code, std::string message)
      : std::runtime_error(std::move(message)), code_(code) {}
  const char* code() const noexcept { return code_; }

 private:
  const char* code_;  // one of `codes`: static storage
};

}  // namespace hardmine
