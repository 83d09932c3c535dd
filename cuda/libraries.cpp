#include "cuda/libraries.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <system_error>
#include <type_traits>

#include "core/error.h"
#include "cuda/check.h"

namespace hardmine::cuda {
namespace {

namespace fs = std::filesystem;

constexpr size_t kOldestCudnn = 90000;  // 9.0: the first with this graph library and its numbers
constexpr size_t kOldestCublasLt = 120000;

// Every status of cuDNN 9 belongs to a thousand: 3000 to 3999 are kinds of "not supported".
bool is_kind(cudnn::Status status, cudnn::Status kind) {
  return static_cast<int>(status) / 1000 == static_cast<int>(kind) / 1000;
}

// The directories called `name*` in `parent`, in a fixed order.
std::vector<fs::path> children(const fs::path& parent, const std::string& name) {
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator entry(parent, error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->path().filename().string().starts_with(name)) found.push_back(entry->path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

// Where a library may lie beside the loader's own path.
std::vector<fs::path> folders() {
  std::vector<fs::path> found;
  for (const char* variable : {"CUDNN_ROOT", "CUDA_HOME", "CUDA_PATH"}) {
    if (const auto root = environment(variable)) {
      found.emplace_back(fs::path(*root) / "lib64");
      found.emplace_back(fs::path(*root) / "lib");
    }
  }
  found.emplace_back("/usr/local/cuda/lib64");
  // Python's `nvidia` wheels, as torch brings them: site-packages/nvidia/*/lib.
  std::vector<fs::path> sites;
  if (const auto cache = environment("XDG_CACHE_HOME")) {
    sites.emplace_back(fs::path(*cache) / "hardmine" / "cuda");  // npm run setup:cuda
  } else if (const auto home = environment("HOME")) {
    sites.emplace_back(fs::path(*home) / ".cache" / "hardmine" / "cuda");
  }
  std::vector<fs::path> prefixes;
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"})
    if (const auto prefix = environment(variable)) prefixes.emplace_back(*prefix);
  if (const auto home = environment("HOME")) prefixes.emplace_back(fs::path(*home) / ".local");
  for (const char* prefix : {"/usr/local", "/usr", "/opt/conda"}) prefixes.emplace_back(prefix);
  for (const fs::path& prefix : prefixes) {
    for (const fs::path& python : children(prefix / "lib", "python3")) {
      sites.push_back(python / "site-packages");
      sites.push_back(python / "dist-packages");
    }
  }
  for (const fs::path& site : sites)
    for (const fs::path& package : children(site / "nvidia", "")) found.push_back(package / "lib");
  return found;
}

struct Opened {
  void* handle = nullptr;
  std::string name;   // of the file
  std::string error;  // why a file that is there could not be opened
};

// Opens the first of `names` that is found: in $CUDNN_ROOT, then by the loader, then in folders().
// Never closed: the libraries keep threads and device state.
Opened open(const std::vector<std::string>& names) {
  Opened opened;
  const std::vector<fs::path> places = folders();
  const auto attempt = [&](const std::string& file) {
    opened.handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened.handle != nullptr) {
      opened.name = fs::path(file).filename();
    } else if (const char* reason = dlerror(); file.find('/') != std::string::npos) {
      opened.error = reason != nullptr ? reason : "dlopen failed";
    }
    return opened.handle != nullptr;
  };
  const auto attempt_in = [&](const fs::path& folder, const std::string& name) {
    std::error_code error;
    return fs::exists(folder / name, error) && attempt((folder / name).string());
  };
  for (const std::string& name : names) {
    const size_t first = environment("CUDNN_ROOT") ? 2 : 0;  // its lib64 and lib
    for (size_t i = 0; i < first; ++i)
      if (attempt_in(places[i], name)) return opened;
    if (attempt(name)) return opened;
    for (size_t i = first; i < places.size(); ++i)
      if (attempt_in(places[i], name)) return opened;
  }
  return opened;
}

// "libNAME.so.13", "libNAME.so.12": that of the runtime first.
std::vector<std::string> of_runtime(const std::string& stem) {
  int runtime = 0;
  static_cast<void>(cudaRuntimeGetVersion(&runtime));  // cudart is linked statically; asks no GPU
  std::vector<std::string> names{stem + ".so.13", stem + ".so.12"};
  if (runtime < 13000) std::swap(names[0], names[1]);
  return names;
}

std::string missing(const std::string& library, const std::vector<std::string>& names,
                    const Opened& opened) {
  std::string files;
  for (const std::string& name : names) files += (files.empty() ? "" : " or ") + name;
  if (!opened.error.empty())
    return library + " (" + files + ") could not be opened: " + opened.error +
           "; `npm run setup:cuda` brings one that can.";
  return library + " (" + files +
         ") was not found in CUDNN_ROOT, the loader's path, the CUDA toolkit or Python's nvidia "
         "packages; `npm run setup:cuda` brings it.";
}

SymbolSource symbols_of(const Opened& opened) {
  return [handle = opened.handle](const char* name) { return dlsym(handle, name); };
}

CublasLt open_cublas_lt() {
  const std::vector<std::string> names = of_runtime("libcublasLt");
  const Opened opened = open(names);
  if (opened.handle == nullptr)
    throw Error(codes::kUnavailable, missing("cuBLASLt", names, opened));
  return load_cublas_lt(symbols_of(opened), opened.name);
}

template <typename Function>
void find(const SymbolSource& symbols, const std::string& library, const char* name,
          Function*& function) {
  static_assert(std::is_function_v<Function>);
  void* address = symbols(name);
  if (address == nullptr) {
    throw Error(codes::kUnavailable, library + " has no function " + name +
                                         ", so it is not a version that hardmine knows; `npm run "
                                         "setup:cuda` brings one.");
  }
  function = reinterpret_cast<Function*>(address);
}

void check_version(const std::string& library, size_t version, size_t oldest) {
  if (version >= oldest) return;
  throw Error(codes::kUnavailable, library + " is version " + version_text(version) + "; " +
                                       version_text(oldest) +
                                       " or later is needed: `npm run setup:cuda` brings it.");
}

}  // namespace

void check(const Cudnn& library, cudnn::Status status, std::string_view what) {
  if (status == cudnn::Status::success) return;
  check_not_lost(what);
  const char* code = codes::kBackend;
  if (status == cudnn::Status::device_allocation_failed) code = codes::kOutOfMemory;
  if (status == cudnn::Status::incompatible_driver ||
      is_kind(status, cudnn::Status::not_initialised))
    code = codes::kUnavailable;
  char detail[512] = {};
  library.get_last_error_string(detail, sizeof detail);
  std::string message =
      "cuDNN failed in " + std::string(what) + ": " + library.get_error_string(status);
  if (detail[0] != '\0') message += std::string(" (") + detail + ")";
  throw Error(code, message + ".");
}

void check(const CublasLt& library, cublas_lt::Status status, std::string_view what) {
  if (status == cublas_lt::Status::success) return;
  check_not_lost(what);
  const char* code = status == cublas_lt::Status::allocation_failed ? codes::kOutOfMemory
                     : status == cublas_lt::Status::not_initialised ? codes::kUnavailable
                                                                    : codes::kBackend;
  throw Error(code, "cuBLASLt failed in " + std::string(what) + ": " +
                        library.get_status_string(status) + ".");
}

std::string version_text(size_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

Cudnn load_cudnn(const SymbolSource& symbols, const std::string& name) {
  Cudnn library{};
  find(symbols, name, "cudnnGetVersion", library.get_version);
  check_version("cuDNN (" + name + ")", library.get_version(), kOldestCudnn);
  find(symbols, name, "cudnnGetErrorString", library.get_error_string);
  find(symbols, name, "cudnnGetLastErrorString", library.get_last_error_string);
  find(symbols, name, "cudnnCreate", library.create);
  find(symbols, name, "cudnnDestroy", library.destroy);
  find(symbols, name, "cudnnSetStream", library.set_stream);
  find(symbols, name, "cudnnBackendCreateDescriptor", library.create_descriptor);
  find(symbols, name, "cudnnBackendDestroyDescriptor", library.destroy_descriptor);
  find(symbols, name, "cudnnBackendSetAttribute", library.set_attribute);
  find(symbols, name, "cudnnBackendGetAttribute", library.get_attribute);
  find(symbols, name, "cudnnBackendFinalize", library.finalise);
  find(symbols, name, "cudnnBackendExecute", library.execute);
  return library;
}

CublasLt load_cublas_lt(const SymbolSource& symbols, const std::string& name) {
  CublasLt library{};
  find(symbols, name, "cublasLtGetVersion", library.get_version);
  check_version("cuBLASLt (" + name + ")", library.get_version(), kOldestCublasLt);
  find(symbols, name, "cublasLtGetStatusString", library.get_status_string);
  find(symbols, name, "cublasLtCreate", library.create);
  find(symbols, name, "cublasLtDestroy", library.destroy);
  find(symbols, name, "cublasLtMatmulDescCreate", library.matmul_create);
  find(symbols, name, "cublasLtMatmulDescDestroy", library.matmul_destroy);
  find(symbols, name, "cublasLtMatmulDescSetAttribute", library.matmul_set);
  find(symbols, name, "cublasLtMatrixLayoutCreate", library.layout_create);
  find(symbols, name, "cublasLtMatrixLayoutDestroy", library.layout_destroy);
  find(symbols, name, "cublasLtMatmulPreferenceCreate", library.preference_create);
  find(symbols, name, "cublasLtMatmulPreferenceDestroy", library.preference_destroy);
  find(symbols, name, "cublasLtMatmulPreferenceSetAttribute", library.preference_set);
  find(symbols, name, "cublasLtMatmulAlgoGetHeuristic", library.heuristic);
  find(symbols, name, "cublasLtMatmul", library.matmul);
  return library;
}

bool tf32_allowed() {
  const char* tf32 = std::getenv("NVIDIA_TF32_OVERRIDE");
  return tf32 == nullptr || std::string_view(tf32) != "0";
}

Cudnn open_cudnn() {
  // Once opened by their paths, cuDNN finds both by their names, of the version that it was built
  // for. Without NVRTC it has its precompiled engines.
  for (const char* library : {"libcublasLt", "libnvrtc"})
    for (const std::string& name : of_runtime(library)) static_cast<void>(open({name}));
  const std::vector<std::string> names{"libcudnn.so.9"};
  const Opened opened = open(names);
  if (opened.handle == nullptr) throw Error(codes::kUnavailable, missing("cuDNN 9", names, opened));
  return load_cudnn(symbols_of(opened), opened.name);
}

Libraries open_libraries() {
  return {open_cudnn(), open_cublas_lt()};
}

std::vector<std::pair<std::string, std::string>> describe_libraries() {
  const auto version = [](const auto& open_library) {
    try {
      return version_text(open_library().get_version());
    } catch (const Error& error) {
      return std::string(error.what());
    }
  };
  const std::vector<std::string> names = of_runtime("libnvrtc");
  const Opened nvrtc = open(names);
  std::string nvrtc_text = missing("NVRTC, for cuDNN's runtime-compiled engines,", names, nvrtc);
  if (nvrtc.handle != nullptr) {
    int major = 0, minor = 0;
    using GetVersion = int(int*, int*);
    const auto get = reinterpret_cast<GetVersion*>(dlsym(nvrtc.handle, "nvrtcVersion"));
    nvrtc_text = get != nullptr && get(&major, &minor) == 0
                     ? std::to_string(major) + "." + std::to_string(minor)
                     : nvrtc.name;
  }
  return {
      {"cuBLASLt", version(open_cublas_lt)}, {"NVRTC", nvrtc_text}, {"cuDNN", version(open_cudnn)}};
}

}  // namespace hardmine::cuda
