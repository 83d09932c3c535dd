// An emulated CUDA device for the host side: memory, streams, events, captured graphs and errors
// behind the runtime's own names, so that cuda/*.cpp runs where there is no GPU. A test owns a
// simt::Device; without one every call says cudaErrorNoDevice.
//
// It is as unhelpful as the real thing may be:
//   - Streams are lazy. Nothing runs until a synchronisation asks for it, and no more than it
//   needs.
//     Streams that do not wait for each other run in a seeded random order, so a missing wait
//     shows. Of a graph whatever may run does so at random, or as early, or as late, as it may:
//     what is short of work elsewhere would seldom be late by chance.
//   - Asynchronous copies read page-locked memory when they run, not when they are enqueued; with
//     pageable memory they are synchronous, and an error in a capture.
//   - cudaMemcpy and cudaMemset do not wait for non-blocking streams.
//   - Device memory is filled with 0xFF (NaN), cannot be touched by the host (SIGSEGV), and ends at
//     a page that nobody can touch: an access past it, by a kernel or a copy, throws simt::Fault.
//     So does work on the default stream, and a kernel's pointer to memory that is not CUDA's.
//   - Blocks of kernels run in an order that differs from launch to launch.
//   - A cooperative launch must fit on its few multiprocessors, and be allowed what it takes of
//     dynamic shared memory above 48 KB.
// Faults come out of the call that runs the work; the device is lost afterwards.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "test/simt/simt.h"

#define HARDMINE_SIMT 1  // cuda/runtime.cpp asks for guard pages

// Numbers as in the toolkit's driver_types.h.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorStubLibrary = 34,
  cudaErrorInsufficientDriver = 35,
  cudaErrorDevicesUnavailable = 46,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorECCUncorrectable = 214,
  cudaErrorNvlinkUncorrectable = 220,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchTimeout = 702,
  cudaErrorContextIsDestroyed = 709,
  cudaErrorAssert = 710,
  cudaErrorHardwareStackError = 714,
  cudaErrorIllegalInstruction = 715,
  cudaErrorMisalignedAddress = 716,
  cudaErrorInvalidAddressSpace = 717,
  cudaErrorInvalidPc = 718,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorSystemNotReady = 802,
  cudaErrorSystemDriverMismatch = 803,
  cudaErrorCompatNotSupportedOnDevice = 804,
  cudaErrorMpsClientTerminated = 810,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorCapturedEvent = 907,
  cudaErrorExternalDevice = 911,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
inline constexpr unsigned cudaStreamDefault = 0, cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventDefault = 0, cudaEventDisableTiming = 2;
inline constexpr unsigned cudaGraphInstantiateFlagUseNodePriority = 8;
inline constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1;

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem;
  int major, minor;
  int multiProcessorCount;
  int l2CacheSize;
};

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;
using cudaGraph_t = struct CUgraph_st*;
using cudaGraphExec_t = struct CUgraphExec_st*;

namespace simt {

struct Work {
  std::function<void()> run;
  double microseconds = 1;  // of the device's clock, which events read
};

// Where an event was recorded.
struct Point {
  bool reached = false;
  double microseconds = 0;
};

struct GraphNode {
  Work work;
  std::vector<size_t> after;  // nodes before it
};
using GraphNodes = std::vector<GraphNode>;

struct Capture {
  GraphNodes nodes;
  cudaStream_t origin = nullptr;
  std::vector<cudaStream_t> streams;
  bool invalid = false;
  bool relaxed = false;
  std::thread::id thread;
};

// One entry of a stream's queue.
struct Operation {
  enum class Kind : uint8_t { work, record, wait, graph } kind = Kind::work;
  Work work;
  std::shared_ptr<Point> point;             // record, wait
  std::shared_ptr<const GraphNodes> graph;  // graph
  std::vector<uint8_t> done;                // of the graph's nodes
  enum class Order : uint8_t { random, first_captured, last_captured } order = Order::random;
};

struct Memory {
  char* map = nullptr;  // with an inaccessible page before and after the body
  size_t mapped = 0;
  char* data = nullptr;
  size_t bytes = 0;
  bool device = false;
  std::vector<char*> guards;  // pages inside that nobody may touch
};

inline size_t page_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}
inline size_t round_up(size_t value, size_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Runs work that is no kernel; a stray access throws.
inline void guarded(const std::function<void()>& run) {
  if (!detail::without_fault(run))
    throw Fault("a copy or library call accesses memory outside every allocation");
}

struct DeviceOptions {
  size_t memory_bytes = size_t{1} << 30;
  int count = 1;  // ordinals; they share one memory
  int major = 9, minor = 0;
  // As of compute capability 8.6, on few multiprocessors: a test has few blocks.
  int multiprocessors = 4;
  int threads = 1536, shared_bytes = 100 << 10;  // of a multiprocessor
  bool cooperative = true;
  uint64_t seed = 1;  // of the order in which streams and blocks run
};

}  // namespace simt

struct CUstream_st {
  std::deque<simt::Operation> queue;
  bool destroyed = false;
  std::shared_ptr<simt::Capture> capture;
  std::vector<size_t> tail;  // nodes that the next captured one follows
};
struct CUevent_st {
  std::shared_ptr<simt::Point> point;  // null: never recorded
  std::weak_ptr<simt::Capture> capture;
  bool captured = false;
  std::vector<size_t> nodes;
  bool timing = true;
};
struct CUgraph_st {
  std::shared_ptr<simt::GraphNodes> nodes;
};
struct CUgraphExec_st {
  std::shared_ptr<const simt::GraphNodes> nodes;
};

namespace simt {

class Device {
 public:
  static inline Device* current = nullptr;

  explicit Device(DeviceOptions options = {}) : options_(options), random_(options.seed) {
    if (current != nullptr) throw Fault("a second emulated device");
    current = this;
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  // Throws what a destructor of the tested code could not, and reports leaks.
  ~Device() noexcept(false) {
    current = nullptr;
    size_t leaked = 0;
    for (auto& [address, memory] : memory_) {
      leaked += memory.bytes;
      munmap(memory.map, memory.mapped);
    }
    size_t handles = events_.size() + graphs_.size() + executables_.size();
    for (const auto& stream : streams_) handles += stream->destroyed ? 0 : 1;
    if (std::uncaught_exceptions() > 0) return;
    if (!pending_fault_.empty()) throw Fault(pending_fault_);
    if (sticky_ == cudaSuccess && (leaked > 0 || handles > 0))
      throw Fault("leaked " + std::to_string(leaked) + " bytes of memory and " +
                  std::to_string(handles) + " streams, events and graphs");
  }

  // From now on every call fails with `error`, as after an illegal access on a GPU.
  void lose(cudaError_t error) { sticky_ = error; }
  void set_memory_bytes(size_t bytes) { options_.memory_bytes = bytes; }
  const DeviceOptions& options() const { return options_; }
  size_t used_bytes() const { return used_; }
  uint64_t works_run() const { return works_run_; }  // kernels, copies and library calls so far
  // A stand-in for what a host may do: reads device memory whatever is still in flight.
  template <typename T>
  std::vector<T> peek(const T* address, size_t count) {
    std::vector<T> values(count);
    const Open open(*this);
    guarded([&] { std::memcpy(values.data(), address, count * sizeof(T)); });
    return values;
  }

  // ---- What the functions below are made of ----

  // Runs `body(device)` as an API call: under the lock, refused on a lost device.
  template <typename Body>
  static cudaError_t call(const Body& body) {
    if (current == nullptr) return cudaErrorNoDevice;
    Device& device = *current;
    const std::lock_guard<std::recursive_mutex> lock(device.mutex_);
    const cudaError_t status = device.sticky_ != cudaSuccess ? device.sticky_ : body(device);
    if (status != cudaSuccess && status != cudaErrorNotReady) device.last_error_ = status;
    return status;
  }
  // The same for calls made by destructors: a fault is kept for ~Device.
  template <typename Body>
  static cudaError_t call_quietly(const Body& body) {
    try {
      return call(body);
    } catch (const Fault& fault) {
      current->pending_fault_ = fault.what();
      return current->sticky_;
    }
  }
  cudaError_t last_error() const { return sticky_ != cudaSuccess ? sticky_ : last_error_; }
  cudaError_t take_last_error() {
    const cudaError_t error = last_error();
    last_error_ = cudaSuccess;
    return error;
  }

  cudaError_t allocate(void** address, size_t bytes, bool device) {
    if (const cudaError_t status = refuse_in_capture(); status != cudaSuccess) return status;
    if (device && used_ + bytes > options_.memory_bytes) return cudaErrorMemoryAllocation;
    const size_t page = page_bytes(), data = round_up(bytes, 16), body = round_up(data, page);
    Memory memory;
    memory.mapped = body + 2 * page;
    memory.map = static_cast<char*>(
        mmap(nullptr, memory.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory.map == MAP_FAILED) return cudaErrorMemoryAllocation;
    mprotect(memory.map + page, body, PROT_READ | PROT_WRITE);
    std::memset(memory.map + page, 0xFF, body);
    memory.data = memory.map + page + body - data;
    memory.bytes = bytes;
    memory.device = device;
    if (device) {
      used_ += bytes;
      protect(memory, open_ > 0);
    }
    *address = memory.data;
    memory_.emplace(reinterpret_cast<uintptr_t>(memory.data), std::move(memory));
    return cudaSuccess;
  }

  cudaError_t release(void* address, bool device) {
    if (address == nullptr) return cudaSuccess;
    if (const cudaError_t status = refuse_in_capture(); status != cudaSuccess) return status;
    const auto found = memory_.find(reinterpret_cast<uintptr_t>(address));
    if (found == memory_.end() || found->second.device != device) return cudaErrorInvalidValue;
    if (device) {
      run_until([] { return false; }, true);  // cudaFree waits for the device; cudaFreeHost may not
      used_ -= found->second.bytes;
    }
    munmap(found->second.map, found->second.mapped);
    memory_.erase(found);
    return cudaSuccess;
  }

  // The allocation that holds [address, address + bytes), or null.
  Memory* find(const void* address, size_t bytes) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    auto after = memory_.upper_bound(begin);
    if (after == memory_.begin()) return nullptr;
    Memory& memory = std::prev(after)->second;
    return begin + bytes <= reinterpret_cast<uintptr_t>(memory.data) + memory.bytes ? &memory
                                                                                    : nullptr;
  }
  // Throws unless a kernel or library may be given this address.
  void check_address(const void* address, size_t bytes, const std::string& what) {
    if (find(address, bytes) == nullptr)
      throw Fault(what + " is given " + std::to_string(bytes) +
                  " bytes that are not in CUDA's memory");
  }

  void* guard(void* begin, size_t bytes) {
    Memory* memory = find(begin, bytes);
    if (memory == nullptr || !memory->device) throw Fault("a guard outside device memory");
    char* page = static_cast<char*>(begin) + round_up(bytes, page_bytes());
    memory->guards.push_back(page);
    return page - round_up(bytes, 16);
  }

  cudaStream_t make_stream() {
    streams_.push_back(std::make_unique<CUstream_st>());
    return streams_.back().get();
  }
  cudaError_t destroy(cudaStream_t stream) {
    stream->destroyed = true;  // what it holds still runs
    return cudaSuccess;
  }

  // Appends work to a stream, or to the graph that it is being captured into.
  void enqueue(cudaStream_t stream, Work work) {
    if (stream == nullptr) throw Fault("work on the default stream");
    if (stream->capture != nullptr) {
      Capture& capture = *stream->capture;
      capture.nodes.push_back({std::move(work), stream->tail});
      stream->tail = {capture.nodes.size() - 1};
      return;
    }
    Operation operation;
    operation.work = std::move(work);
    stream->queue.push_back(std::move(operation));
  }

  cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                   cudaStream_t stream, bool asynchronous) {
    if (bytes == 0) return cudaSuccess;
    const Memory *target = find(to, bytes), *source = find(from, bytes);
    const bool to_device = target != nullptr && target->device;
    const bool from_device = source != nullptr && source->device;
    const auto actual = static_cast<cudaMemcpyKind>((to_device ? 1 : 0) + (from_device ? 2 : 0));
    if (kind != cudaMemcpyDefault && kind != actual) return cudaErrorInvalidValue;
    const auto run = [=] { guarded([&] { std::memmove(to, from, bytes); }); };
    if (!asynchronous) {
      if (const cudaError_t status = refuse_in_capture(); status != cudaSuccess) return status;
      return run_now(run);
    }
    if (target != nullptr && source != nullptr) {
      enqueue(stream, {run});
      return cudaSuccess;
    }
    if (stream == nullptr) throw Fault("work on the default stream");
    if (stream->capture != nullptr)
      throw Fault("a copy with pageable host memory is captured; it must be page-locked");
    if (source == nullptr) {  // staged before the call returns
      auto staged = std::make_shared<std::vector<char>>(bytes);
      guarded([&] { std::memcpy(staged->data(), from, bytes); });
      enqueue(stream, {[=] { guarded([&] { std::memcpy(to, staged->data(), bytes); }); }});
      return cudaSuccess;
    }
    enqueue(stream, {run});
    return synchronize(stream);
  }
  cudaError_t fill(void* to, int value, size_t bytes, cudaStream_t stream, bool asynchronous) {
    if (bytes == 0) return cudaSuccess;
    const Memory* target = find(to, bytes);
    if (target == nullptr || !target->device) return cudaErrorInvalidValue;
    const auto run = [=] { guarded([&] { std::memset(to, value, bytes); }); };
    if (!asynchronous) {
      if (const cudaError_t status = refuse_in_capture(); status != cudaSuccess) return status;
      return run_now(run);
    }
    enqueue(stream, {run});
    return cudaSuccess;
  }

  cudaError_t synchronize(cudaStream_t stream) {
    if (stream == nullptr) throw Fault("a synchronisation of the default stream");
    if (stream->capture != nullptr) return refuse(*stream->capture);
    return run_until([&] { return stream->queue.empty(); }, false);
  }
  cudaError_t synchronize_all() {
    if (const cudaError_t status = refuse_in_capture(true); status != cudaSuccess) return status;
    return run_until([] { return false; }, true);
  }

  cudaEvent_t make_event(bool timing) {
    events_.push_back(std::make_unique<CUevent_st>());
    events_.back()->timing = timing;
    return events_.back().get();
  }
  cudaError_t destroy(cudaEvent_t event) { return erase(events_, event); }

  cudaError_t record(cudaEvent_t event, cudaStream_t stream) {
    if (stream == nullptr) throw Fault("work on the default stream");
    event->captured = stream->capture != nullptr;
    if (event->captured) {
      event->capture = stream->capture;
      event->nodes = stream->tail;
      return cudaSuccess;
    }
    event->point = std::make_shared<Point>();
    Operation operation;
    operation.kind = Operation::Kind::record;
    operation.point = event->point;
    stream->queue.push_back(std::move(operation));
    return cudaSuccess;
  }

  cudaError_t wait(cudaStream_t stream, cudaEvent_t event) {
    if (stream == nullptr) throw Fault("work on the default stream");
    if (event->captured) {
      const std::shared_ptr<Capture> capture = event->capture.lock();
      if (capture == nullptr) return cudaErrorCapturedEvent;
      if (stream->capture == nullptr) {  // forks
        stream->capture = capture;
        stream->tail.clear();
        capture->streams.push_back(stream);
      } else if (stream->capture != capture) {
        return refuse(*capture);
      }
      for (const size_t node : event->nodes)
        if (std::find(stream->tail.begin(), stream->tail.end(), node) == stream->tail.end())
          stream->tail.push_back(node);
      return cudaSuccess;
    }
    if (stream->capture != nullptr) {
      stream->capture->invalid = true;
      return cudaErrorStreamCaptureIsolation;
    }
    if (event->point == nullptr) return cudaSuccess;
    Operation operation;
    operation.kind = Operation::Kind::wait;
    operation.point = event->point;
    stream->queue.push_back(std::move(operation));
    return cudaSuccess;
  }

  cudaError_t synchronize(cudaEvent_t event) {
    if (event->captured) {
      if (const std::shared_ptr<Capture> capture = event->capture.lock()) return refuse(*capture);
      return cudaErrorCapturedEvent;
    }
    if (event->point == nullptr) return cudaSuccess;
    const std::shared_ptr<Point> point = event->point;
    return run_until([&] { return point->reached; }, false);
  }
  cudaError_t query(cudaEvent_t event) {
    if (const cudaError_t status = refuse_in_capture(); status != cudaSuccess) return status;
    if (event->point == nullptr || event->point->reached) return cudaSuccess;
    int left = 1 + static_cast<int>(draw() % 4);  // the device works on while the host polls
    const std::shared_ptr<Point> point = event->point;
    const cudaError_t status = run_until([&] { return point->reached || left-- <= 0; }, false);
    return status != cudaSuccess ? status : point->reached ? cudaSuccess : cudaErrorNotReady;
  }
  static cudaError_t elapsed(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
    if (!start->timing || !stop->timing || start->point == nullptr || stop->point == nullptr)
      return cudaErrorInvalidResourceHandle;
    if (!start->point->reached || !stop->point->reached) return cudaErrorNotReady;
    *milliseconds =
        static_cast<float>((stop->point->microseconds - start->point->microseconds) / 1000);
    return cudaSuccess;
  }

  cudaError_t begin_capture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    if (stream == nullptr) throw Fault("a capture of the default stream");
    if (stream->capture != nullptr) return refuse(*stream->capture);
    stream->capture = std::make_shared<Capture>();
    stream->capture->origin = stream;
    stream->capture->streams = {stream};
    stream->capture->relaxed = mode == cudaStreamCaptureModeRelaxed;
    stream->capture->thread = std::this_thread::get_id();
    stream->tail.clear();
    captures_.push_back(stream->capture);
    return cudaSuccess;
  }
  cudaError_t end_capture(cudaStream_t stream, cudaGraph_t* graph) {
    *graph = nullptr;
    const std::shared_ptr<Capture> capture = stream->capture;
    if (capture == nullptr || capture->origin != stream) return cudaErrorStreamCaptureUnmatched;
    std::vector<uint8_t> joined(capture->nodes.size());
    for (const size_t node : stream->tail) joined[node] = 1;
    for (size_t node = joined.size(); node-- > 0;)  // nodes come after those they follow
      if (joined[node] != 0)
        for (const size_t before : capture->nodes[node].after) joined[before] = 1;
    bool complete = true;
    for (cudaStream_t member : capture->streams) {
      for (const size_t node : member->tail) complete = complete && joined[node] != 0;
      member->capture = nullptr;
      member->tail.clear();
    }
    if (capture->invalid) return cudaErrorStreamCaptureInvalidated;
    if (!complete) return cudaErrorStreamCaptureUnjoined;
    graphs_.push_back(std::make_unique<CUgraph_st>());
    *graph = graphs_.back().get();
    (*graph)->nodes = std::make_shared<GraphNodes>(std::move(capture->nodes));
    return cudaSuccess;
  }
  cudaError_t destroy(cudaGraph_t graph) { return erase(graphs_, graph); }
  cudaError_t instantiate(cudaGraphExec_t* executable, cudaGraph_t graph) {
    executables_.push_back(std::make_unique<CUgraphExec_st>());
    executables_.back()->nodes = graph->nodes;
    *executable = executables_.back().get();
    return cudaSuccess;
  }
  cudaError_t destroy(cudaGraphExec_t executable) { return erase(executables_, executable); }
  cudaError_t launch(cudaGraphExec_t executable, cudaStream_t stream) {
    if (stream == nullptr) throw Fault("work on the default stream");
    if (stream->capture != nullptr) return refuse(*stream->capture);
    Operation operation;
    operation.kind = Operation::Kind::graph;
    operation.order = static_cast<Operation::Order>(draw() % 3);
    operation.graph = executable->nodes;
    operation.done.resize(executable->nodes->size());
    stream->queue.push_back(std::move(operation));
    return cudaSuccess;
  }

  uint64_t draw() {
    random_ = random_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return random_ >> 33;
  }

  int ordinal = 0;
  std::map<void*, size_t> shared_bytes_allowed;  // of kernels

 private:
  // Device memory can be touched while one of these lives.
  class Open {
   public:
    explicit Open(Device& device) : device_(device) {
      if (device_.open_++ == 0) device_.protect_all(true);
    }
    ~Open() {
      if (--device_.open_ == 0) device_.protect_all(false);
    }
    Open(const Open&) = delete;
    Open& operator=(const Open&) = delete;

   private:
    Device& device_;
  };

  void protect_all(bool open) {
    for (auto& [address, memory] : memory_)
      if (memory.device) protect(memory, open);
  }
  static void protect(const Memory& memory, bool open) {
    const size_t page = page_bytes();
    mprotect(memory.map + page, memory.mapped - 2 * page,
             open ? PROT_READ | PROT_WRITE : PROT_NONE);
    if (!open) return;
    for (char* guard : memory.guards) mprotect(guard, page, PROT_NONE);
  }

  template <typename Handles, typename Handle>
  static cudaError_t erase(Handles& handles, Handle handle) {
    const auto found = std::find_if(handles.begin(), handles.end(),
                                    [&](const auto& owned) { return owned.get() == handle; });
    if (found == handles.end()) return cudaErrorInvalidResourceHandle;
    handles.erase(found);
    return cudaSuccess;
  }

  static cudaError_t refuse(Capture& capture) {
    capture.invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  // Calls that a capture on this thread forbids (`always`: in the relaxed mode too).
  cudaError_t refuse_in_capture(bool always = false) {
    std::erase_if(captures_, [](const auto& capture) { return capture.expired(); });
    for (const auto& weak : captures_) {
      const std::shared_ptr<Capture> capture = weak.lock();
      if (capture->origin->capture != capture) continue;  // ended
      if (always || (!capture->relaxed && capture->thread == std::this_thread::get_id()))
        return refuse(*capture);
    }
    return cudaSuccess;
  }

  cudaError_t run_now(const std::function<void()>& run) {
    return attempt([&] {
      const Open open(*this);
      ++works_run_;
      run();
    });
  }

  // What a work throws loses the device.
  template <typename Run>
  cudaError_t attempt(const Run& run) {
    try {
      run();
    } catch (...) {
      sticky_ = cudaErrorIllegalAddress;
      throw;
    }
    return cudaSuccess;
  }

  // Runs work of randomly picked streams until `done`, or all of it.
  template <typename Done>
  cudaError_t run_until(const Done& done, bool all) {
    return attempt([&] {
      const Open open(*this);
      for (;;) {
        if (!all && done()) return;
        std::vector<cudaStream_t> runnable;
        bool left = false;
        for (const auto& stream : streams_) {
          left = left || !stream->queue.empty();
          if (can_step(*stream)) runnable.push_back(stream.get());
        }
        if (runnable.empty()) {
          if (!left && all) break;
          throw Fault("a synchronisation waits for work that can never run");
        }
        CUstream_st& stream = *runnable[draw() % runnable.size()];
        // Sometimes one step, sometimes a long run: the one that gets far ahead finds the races.
        for (uint64_t steps = draw() % 4 == 0 ? 64 : 1; steps > 0 && can_step(stream); --steps) {
          step(stream);
          if (!all && done()) return;
        }
      }
      std::erase_if(streams_, [](const auto& stream) { return stream->destroyed; });
    });
  }

  static bool can_step(const CUstream_st& stream) {
    if (stream.queue.empty()) return false;
    const Operation& head = stream.queue.front();
    return head.kind != Operation::Kind::wait || head.point->reached;
  }

  void step(CUstream_st& stream) {
    Operation& head = stream.queue.front();
    switch (head.kind) {
      case Operation::Kind::work:
        execute(head.work);
        break;
      case Operation::Kind::record:
        head.point->reached = true;
        head.point->microseconds = microseconds_;
        break;
      case Operation::Kind::wait:
        break;
      case Operation::Kind::graph: {
        std::vector<size_t> ready;
        for (size_t node = 0; node < head.done.size(); ++node) {
          const auto& after = (*head.graph)[node].after;
          if (head.done[node] == 0 &&
              std::all_of(after.begin(), after.end(), [&](size_t i) { return head.done[i] != 0; }))
            ready.push_back(node);
        }
        if (!ready.empty()) {
          const size_t node = head.order == Operation::Order::random ? ready[draw() % ready.size()]
                              : head.order == Operation::Order::first_captured ? ready.front()
                                                                               : ready.back();
          execute((*head.graph)[node].work);
          head.done[node] = 1;
          if (std::count(head.done.begin(), head.done.end(), uint8_t{0}) > 0) return;
        }
        break;
      }
    }
    stream.queue.pop_front();
  }

  void execute(const Work& work) {
    work.run();
    microseconds_ += work.microseconds;
    ++works_run_;
  }

  DeviceOptions options_;
  std::recursive_mutex mutex_;
  uint64_t random_;
  cudaError_t sticky_ = cudaSuccess, last_error_ = cudaSuccess;
  std::string pending_fault_;
  std::map<uintptr_t, Memory> memory_;
  size_t used_ = 0;
  int open_ = 0;
  double microseconds_ = 0;
  uint64_t works_run_ = 0;
  std::vector<std::unique_ptr<CUstream_st>> streams_;
  std::vector<std::unique_ptr<CUevent_st>> events_;
  std::vector<std::unique_ptr<CUgraph_st>> graphs_;
  std::vector<std::unique_ptr<CUgraphExec_st>> executables_;
  std::vector<std::weak_ptr<Capture>> captures_;
};

// ---- What of a kernel fits on a multiprocessor ----

// Without a Device, of one by default.
inline const DeviceOptions& processor() {
  static const DeviceOptions none;
  return Device::current == nullptr ? none : Device::current->options();
}
inline constexpr int kReservedSharedBytes = 1024;  // of each block, by the driver
inline size_t shared_bytes_of_a_block() {
  return static_cast<size_t>(processor().shared_bytes - kReservedSharedBytes);
}
// The dynamic shared memory that a kernel was allowed; without a Device, in this thread.
inline std::map<void*, size_t>& shared_bytes_allowed() {
  static thread_local std::map<void*, size_t> without;
  return Device::current == nullptr ? without : Device::current->shared_bytes_allowed;
}
inline int resident_blocks(void* kernel, int threads, size_t shared_bytes) {
  const auto allowed = shared_bytes_allowed().find(kernel);
  if (shared_bytes > (allowed == shared_bytes_allowed().end() ? 48 << 10 : allowed->second))
    return 0;
  return std::min(
      processor().threads / threads,
      processor().shared_bytes / (static_cast<int>(shared_bytes) + kReservedSharedBytes));
}

// ---- For Arena (cuda/runtime.cpp): arrays that end at a guard page ----

inline size_t guarded_bytes(size_t bytes) {
  return round_up(bytes, page_bytes()) + page_bytes();
}
inline void* guard(void* begin, size_t bytes) {
  if (Device::current == nullptr) throw Fault("an arena without a device");
  return Device::current->guard(begin, bytes);
}

// ---- For fakes of libraries: work in the order of a stream, captured like a kernel ----

inline void enqueue(cudaStream_t stream, std::function<void()> run, double microseconds = 1) {
  if (Device::current == nullptr) throw Fault("library work without a device");
  Device::call([&](Device& device) {
    device.enqueue(stream, {[run = std::move(run)] { guarded(run); }, microseconds});
    return cudaSuccess;
  });
}

}  // namespace simt

// ---- The runtime's functions ----

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define HARDMINE_NAME(name) \
  case name:                \
    return #name;
    HARDMINE_NAME(cudaSuccess)
    HARDMINE_NAME(cudaErrorInvalidValue)
    HARDMINE_NAME(cudaErrorMemoryAllocation)
    HARDMINE_NAME(cudaErrorNoDevice)
    HARDMINE_NAME(cudaErrorNotReady)
    HARDMINE_NAME(cudaErrorIllegalAddress)
    HARDMINE_NAME(cudaErrorLaunchFailure)
    HARDMINE_NAME(cudaErrorCooperativeLaunchTooLarge)
    HARDMINE_NAME(cudaErrorECCUncorrectable)
    HARDMINE_NAME(cudaErrorInsufficientDriver)
    HARDMINE_NAME(cudaErrorStreamCaptureUnsupported)
    HARDMINE_NAME(cudaErrorStreamCaptureInvalidated)
    HARDMINE_NAME(cudaErrorStreamCaptureUnjoined)
    HARDMINE_NAME(cudaErrorStreamCaptureIsolation)
#undef HARDMINE_NAME
    default:
      return "an error";
  }
}
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    default:
      return cudaGetErrorName(error);
  }
}
inline cudaError_t cudaGetLastError() {
  return simt::Device::current == nullptr ? cudaSuccess : simt::Device::current->take_last_error();
}

inline cudaError_t cudaPeekAtLastError() {
  return simt::Device::current == nullptr ? cudaSuccess : simt::Device::current->last_error();
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  return simt::Device::call([&](simt::Device& device) {
    *count = device.options().count;
    return cudaSuccess;
  });
}
inline cudaError_t cudaGetDevice(int* ordinal) {
  return simt::Device::call([&](simt::Device& device) {
    *ordinal = device.ordinal;
    return cudaSuccess;
  });
}
inline cudaError_t cudaSetDevice(int ordinal) {
  return simt::Device::call([&](simt::Device& device) {
    if (ordinal < 0 || ordinal >= device.options().count) return cudaErrorInvalidDevice;
    device.ordinal = ordinal;
    return cudaSuccess;
  });
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal) {
  return simt::Device::call([&](simt::Device& device) {
    if (ordinal < 0 || ordinal >= device.options().count) return cudaErrorInvalidDevice;
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "Emulated GPU");
    properties->totalGlobalMem = device.options().memory_bytes;
    properties->major = device.options().major;
    properties->minor = device.options().minor;
    properties->multiProcessorCount = device.options().multiprocessors;
    properties->l2CacheSize = 1 << 20;
    return cudaSuccess;
  });
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int ordinal) {
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, ordinal);
  if (status != cudaSuccess) return status;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = simt::processor().cooperative ? 1 : 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(simt::shared_bytes_of_a_block());
      break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = simt::Device::current == nullptr ? 0 : 13000;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() {
  return simt::Device::call([](simt::Device& device) { return device.synchronize_all(); });
}

inline cudaError_t cudaMalloc(void** address, size_t bytes) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.allocate(address, bytes, true); });
}
template <typename T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(address), bytes);
}
inline cudaError_t cudaFree(void* address) {
  return simt::Device::call_quietly(
      [&](simt::Device& device) { return device.release(address, true); });
}
inline cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.allocate(address, bytes, false); });
}
inline cudaError_t cudaMallocHost(void** address, size_t bytes) {
  return cudaHostAlloc(address, bytes, cudaHostAllocDefault);
}
inline cudaError_t cudaFreeHost(void* address) {
  return simt::Device::call_quietly(
      [&](simt::Device& device) { return device.release(address, false); });
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return simt::Device::call([&](simt::Device& device) {
    *total = device.options().memory_bytes;
    *free = *total - std::min(*total, device.used_bytes());
    return cudaSuccess;
  });
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.copy(to, from, bytes, kind, stream, true); });
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.copy(to, from, bytes, kind, nullptr, false); });
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.fill(to, value, bytes, stream, true); });
}
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.fill(to, value, bytes, nullptr, false); });
}

inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;  // as an H100's
  return simt::Device::call([](simt::Device&) { return cudaSuccess; });
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return simt::Device::call([&](simt::Device& device) {
    if (flags != cudaStreamNonBlocking)
      throw simt::Fault("a stream that waits for the default stream");
    *stream = device.make_stream();
    return cudaSuccess;
  });
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return simt::Device::call_quietly([&](simt::Device& device) { return device.destroy(stream); });
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return simt::Device::call([&](simt::Device& device) { return device.synchronize(stream); });
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned = 0) {
  return simt::Device::call([&](simt::Device& device) { return device.wait(stream, event); });
}
inline cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void*), void* data) {
  return simt::Device::call([&](simt::Device& device) {
    device.enqueue(stream, {[=] { function(data); }});
    return cudaSuccess;
  });
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return simt::Device::call([&](simt::Device& device) {
    *event = device.make_event((flags & cudaEventDisableTiming) == 0);
    return cudaSuccess;
  });
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return simt::Device::call_quietly([&](simt::Device& device) { return device.destroy(event); });
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return simt::Device::call([&](simt::Device& device) { return device.record(event, stream); });
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return simt::Device::call([&](simt::Device& device) { return device.synchronize(event); });
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
  return simt::Device::call([&](simt::Device& device) { return device.query(event); });
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t stop) {
  return simt::Device::call(
      [&](simt::Device&) { return simt::Device::elapsed(milliseconds, start, stop); });
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.begin_capture(stream, mode); });
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.end_capture(stream, graph); });
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return simt::Device::call_quietly([&](simt::Device& device) { return device.destroy(graph); });
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                        unsigned long long = 0) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.instantiate(executable, graph); });
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return simt::Device::call_quietly(
      [&](simt::Device& device) { return device.destroy(executable); });
}
inline cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  return simt::Device::call([](simt::Device&) { return cudaSuccess; });
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return simt::Device::call(
      [&](simt::Device& device) { return device.launch(executable, stream); });
}

// ---- Kernels ----

// Static shared arrays, which only running a kernel would show, count as none.
template <typename Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Function*) {
  *attributes = {};
  return cudaSuccess;
}
template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > simt::shared_bytes_of_a_block())
    return cudaErrorInvalidValue;
  simt::shared_bytes_allowed()[reinterpret_cast<void*>(kernel)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
template <typename Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* kernel,
                                                          int threads, size_t shared_bytes) {
  *blocks = simt::resident_blocks(reinterpret_cast<void*>(kernel), threads, shared_bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

// Without a Device and a stream the kernel runs at once: tests of single kernels on simt::Buffers.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool cooperative = config->numAttrs > 0 && config->attrs->val.cooperative != 0;
  const int resident = simt::resident_blocks(reinterpret_cast<void*>(kernel),
                                             static_cast<int>(block.x * block.y * block.z),
                                             config->dynamicSmemBytes);
  if (resident == 0) return cudaErrorInvalidValue;
  if (cooperative) {
    if (!simt::processor().cooperative) return cudaErrorNotSupported;
    if (uint64_t{grid.x} * grid.y * grid.z >
        static_cast<uint64_t>(resident) * static_cast<uint64_t>(simt::processor().multiprocessors))
      return cudaErrorCooperativeLaunchTooLarge;
  }
  const simt::Blocks kind = cooperative ? simt::Blocks::cooperative : simt::Blocks::independent;
  if (config->stream == nullptr && simt::Device::current == nullptr) {
    simt::launch(
        grid, block, config->dynamicSmemBytes,
        [&] { kernel(static_cast<Parameters>(arguments)...); }, 1, kind);
    return cudaSuccess;
  }
  return simt::Device::call([&](simt::Device& device) {
    const auto check = [&]<typename Parameter>(const Parameter& value) {
      if constexpr (std::is_pointer_v<Parameter>)
        if (value != nullptr) device.check_address(value, 1, "a kernel");
    };
    std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
    std::apply([&](const auto&... value) { (check(value), ...); }, values);
    device.enqueue(config->stream, {[=, bytes = config->dynamicSmemBytes, &device] {
                     simt::launch(
                         grid, block, bytes, [&] { std::apply(kernel, values); }, device.draw(),
                         kind);
                   }});
    return cudaSuccess;
  });
}
