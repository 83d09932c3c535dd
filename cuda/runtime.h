// The CUDA runtime as the backend uses it: errors as hardmine::Error, and owners of streams,
// events, captured graphs, page-locked arrays and device memory. Compiles with nvcc, and with g++
// against the toolkit's headers or test/simt's emulated device.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <new>
#include <span>
#include <string>
#include <utility>

#include "core/batch.h"
#include "core/error.h"
#include "cuda/check.h"

namespace hardmine::cuda {

// "12.5 MiB", for messages.
std::string mebibytes(size_t bytes);

// Owns a CUDA handle that `destroy` gives back; whoever makes it checks the status.
template <typename Handle, cudaError_t (*destroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    // A lost device refuses this too, and there is nobody left to tell.
    if (handle_ != nullptr) static_cast<void>(destroy(handle_));
  }
  Handle get() const { return handle_; }

 private:
  Handle handle_ = nullptr;
};

// Makes `ordinal` this thread's device. It stays that: to make the one before the thread's device
// again would take memory there.
void use_device(int ordinal);
// For destructors: where the device is lost nothing changes, and there is nothing to give back.
void use_device(int ordinal, std::nothrow_t) noexcept;

class Event;

// Which work a GPU that has room for one of two takes first.
enum class Priority : uint8_t { usual, high };

// A stream that does not wait for the default stream.
class Stream {
 public:
  explicit Stream(Priority priority = Priority::usual);
  cudaStream_t get() const { return stream_.get(); }
  void synchronize() const;
  void wait(const Event& event) const;  // what is enqueued from now on runs after `event`

 private:
  Owned<cudaStream_t, cudaStreamDestroy> stream_;
};

enum class Timing : uint8_t { off, on };

class Event {
 public:
  explicit Event(Timing timing = Timing::off);
  void record(cudaStream_t stream) const;
  void synchronize() const;  // returns at once when it was never recorded
  // From `start` to this event; both recorded with Timing::on and complete.
  float milliseconds_since(const Event& start) const;

 private:
  Owned<cudaEvent_t, cudaEventDestroy> event_;
  friend class Stream;
};

// A stream that takes work beside another's: it forks from that one and joins it again, within a
// capture too.
class SideStream {
 public:
  const Stream& stream() const { return stream_; }
  // What is enqueued here from now on runs after what `from` has been given.
  void fork(const Stream& from) const;
  // And the other way round.
  void join(const Stream& to) const;

 private:
  Stream stream_;
  Event forked_, joined_;
};

// Held by whoever captures, and by what waits for the whole device: that ends the captures of all
// threads, cudaStreamCaptureModeThreadLocal or not.
std::unique_lock<std::mutex> no_capture_beside();

// Destroys a library's handle, which waits for the whole device (cudnnDestroy's documentation).
template <typename Handle, typename Status>
struct HandleDestroyer {
  Status (*destroy)(Handle);
  void operator()(Handle handle) const {
    const std::unique_lock alone = no_capture_beside();
    static_cast<void>(destroy(handle));  // there is nobody to tell
  }
};

// Work that was enqueued once and is launched many times. Pointers, shapes, values given to kernels
// and the streams' priorities are those of the capture.
class CapturedGraph {
 public:
  // Runs `work`, which enqueues on `stream` (and on streams that it forks from and joins to it);
  // nothing executes. What `work` throws leaves no capture behind.
  CapturedGraph(const Stream& stream, const std::function<void()>& work);
  void launch(const Stream& stream) const;

 private:
  Owned<cudaGraphExec_t, cudaGraphExecDestroy> graph_;
};

// How long work takes on the device: several runs of it as one graph, because the host takes as
// long to launch a kernel as a small one runs.
class TimedWork {
 public:
  // Runs `enqueue`, which is as CapturedGraph wants it, once outside a capture, so that all is
  // loaded.
  TimedWork(const Stream& stream, const std::function<void()>& enqueue);
  // Of one run. Waits for the stream.
  double milliseconds() const;
  double median_milliseconds() const;  // of five times

 private:
  static constexpr int kRuns = 8;
  static CapturedGraph capture(const Stream& stream, const std::function<void()>& enqueue);

  const Stream& stream_;
  CapturedGraph graph_;
};

void* allocate_pinned(size_t bytes);

// Page-locked host memory: what asynchronous copies need. Values are not initialised.
template <typename T>
class PinnedArray {
 public:
  PinnedArray() = default;
  explicit PinnedArray(size_t count)
      : memory_(count == 0 ? nullptr : allocate_pinned(count * sizeof(T))), count_(count) {}
  PinnedArray(PinnedArray&& other) noexcept
      : memory_(std::move(other.memory_)), count_(std::exchange(other.count_, 0)) {}
  PinnedArray& operator=(PinnedArray&& other) noexcept {
    memory_ = std::move(other.memory_);
    std::swap(count_, other.count_);
    return *this;
  }
  T* data() const { return static_cast<T*>(memory_.get()); }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }
  T& operator[](size_t index) const { return data()[index]; }
  std::span<T> span() const { return {data(), count_}; }

 private:
  Owned<void*, cudaFreeHost> memory_;
  size_t count_ = 0;
};

// The decode ring's memory when it feeds `device`.
class PinnedAllocator : public HostAllocator {
 public:
  explicit PinnedAllocator(int device) : device_(device) {}
  void* allocate(size_t bytes) override;
  void release(void* memory) noexcept override;

 private:
  int device_;
};

// One cudaMalloc.
class DeviceBlock {
 public:
  DeviceBlock() = default;
  DeviceBlock(void* memory, size_t bytes) : memory_(memory), bytes_(bytes) {}
  void* data() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  Owned<void*, cudaFree> memory_;
  size_t bytes_ = 0;
};

// Throws codes::kOutOfMemory that says what was wanted for `purpose` ("a training session at batch
// 64"), what is free and what there is; the device stays usable.
DeviceBlock allocate_device(size_t bytes, const std::string& purpose);

// Hands out parts of one block. A component's layout(Arena&) runs twice: with a counting arena,
// which gives null pointers, to learn the size, and with the block.
class Arena {
 public:
  static constexpr size_t kAlignment = 256;  // bytes; as cudaMalloc's, more than any load needs

  Arena() = default;  // counts
  explicit Arena(const DeviceBlock& block)
      : base_(static_cast<char*>(block.data())), capacity_(block.bytes()) {}

  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  size_t bytes() const { return used_; }  // taken so far

 private:
  void* take_bytes(size_t bytes);
  char* base_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

}  // namespace hardmine::cuda
