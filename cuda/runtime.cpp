#include "cuda/runtime.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>

namespace hardmine::cuda {
namespace {

// How an error is told apart for whoever has to act on it.
const char* code_of(cudaError_t status) {
  // cudaErrorContained and cudaErrorTensorMemoryLeak, which CUDA 12.4 has no names for; see below.
  if (const auto number = static_cast<int>(status); number == 226 || number == 721)
    return codes::kDeviceLost;
  switch (status) {
    case cudaErrorMemoryAllocation:
      return codes::kOutOfMemory;
    // The driver_types.h of CUDA says of each: "the process must be terminated and relaunched", or
    // that the device must be reset.
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorContextIsDestroyed:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorMpsClientTerminated:
    case cudaErrorExternalDevice:
      return codes::kDeviceLost;
    case cudaErrorNoDevice:
    case cudaErrorInvalidDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorInitializationError:
    case cudaErrorDevicesUnavailable:
    case cudaErrorSystemNotReady:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorNoKernelImageForDevice:
      return codes::kUnavailable;
    default:
      return codes::kBackend;
  }
}

const char* advice(const char* code) {
  if (code == codes::kDeviceLost)
    return " The GPU refuses everything else in this process: start it again, from the last "
           "checkpoint.";
  if (code == codes::kUnavailable)
    return " `hardmine doctor` says what is missing; `--device cpu` works without a GPU.";
  if (code == codes::kOutOfMemory) return " A smaller batch needs less.";
  return "";
}

}  // namespace

void check(cudaError_t status, std::string_view what) {
  if (status == cudaSuccess) return;
  // Errors that are not sticky would be seen again by whoever asks next.
  static_cast<void>(cudaGetLastError());
  const char* code = code_of(status);
  throw Error(code, "CUDA failed in " + std::string(what) + ": " + cudaGetErrorString(status) +
                        " (" + cudaGetErrorName(status) + ")." + advice(code));
}

void check_not_lost(std::string_view what) {
  const cudaError_t status = cudaPeekAtLastError();
  if (code_of(status) == std::string_view(codes::kDeviceLost)) check(status, what);
}

std::string mebibytes(size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
  return text;
}

void use_device(int ordinal) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (ordinal < 0 || ordinal >= count) {
    throw Error(codes::kUnavailable,
                "The device cuda:" + std::to_string(ordinal) + " was asked for, but CUDA sees " +
                    std::to_string(count) + (count == 1 ? " GPU" : " GPUs") +
                    " here; ordinals count from 0 among those of CUDA_VISIBLE_DEVICES.");
  }
  check(cudaSetDevice(ordinal), "cudaSetDevice(" + std::to_string(ordinal) + ")");
}

void use_device(int ordinal, std::nothrow_t) noexcept {
  static_cast<void>(cudaSetDevice(ordinal));
}

Stream::Stream(Priority priority) {
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking,
                                     priority == Priority::high ? greatest : least),
        "cudaStreamCreateWithPriority");
  stream_ = Owned<cudaStream_t, cudaStreamDestroy>(stream);
}

void Stream::synchronize() const {
  check(cudaStreamSynchronize(get()), "cudaStreamSynchronize");
}

void Stream::wait(const Event& event) const {
  check(cudaStreamWaitEvent(get(), event.event_.get(), 0), "cudaStreamWaitEvent");
}

Event::Event(Timing timing) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event,
                                 timing == Timing::on ? cudaEventDefault : cudaEventDisableTiming),
        "cudaEventCreateWithFlags");
  event_ = Owned<cudaEvent_t, cudaEventDestroy>(event);
}

void Event::record(cudaStream_t stream) const {
  check(cudaEventRecord(event_.get(), stream), "cudaEventRecord");
}

void Event::synchronize() const {
  check(cudaEventSynchronize(event_.get()), "cudaEventSynchronize");
}

float Event::milliseconds_since(const Event& start) const {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, start.event_.get(), event_.get()),
        "cudaEventElapsedTime");
  return milliseconds;
}

void SideStream::fork(const Stream& from) const {
  forked_.record(from.get());
  stream_.wait(forked_);
}

void SideStream::join(const Stream& to) const {
  joined_.record(stream_.get());
  to.wait(joined_);
}

std::unique_lock<std::mutex> no_capture_beside() {
  static std::mutex one;
  return std::unique_lock(one);
}

CapturedGraph::CapturedGraph(const Stream& stream, const std::function<void()>& work) {
  std::unique_lock alone = no_capture_beside();
  // Of this thread only: others may allocate page-locked memory meanwhile.
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  std::exception_ptr thrown;
  try {
    work();
  } catch (...) {
    thrown = std::current_exception();
  }
  cudaGraph_t captured = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream.get(), &captured);
  alone.unlock();
  const Owned<cudaGraph_t, cudaGraphDestroy> graph(captured);
  if (thrown) {
    static_cast<void>(cudaGetLastError());  // that the capture was invalidated is no news
    std::rethrow_exception(thrown);
  }
  check(ended, "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  check(cudaGraphInstantiate(&executable, captured, cudaGraphInstantiateFlagUseNodePriority),
        "cudaGraphInstantiate");
  graph_ = Owned<cudaGraphExec_t, cudaGraphExecDestroy>(executable);
  check(cudaGraphUpload(executable, stream.get()), "cudaGraphUpload");
}

void CapturedGraph::launch(const Stream& stream) const {
  check(cudaGraphLaunch(graph_.get(), stream.get()), "cudaGraphLaunch");
}

TimedWork::TimedWork(const Stream& stream, const std::function<void()>& enqueue)
    : stream_(stream), graph_(capture(stream, enqueue)) {
  graph_.launch(stream_);  // the first launch of a graph also uploads it
}

CapturedGraph TimedWork::capture(const Stream& stream, const std::function<void()>& enqueue) {
  enqueue();
  return {stream, [&] {
            for (int run = 0; run < kRuns; ++run) enqueue();
          }};
}

double TimedWork::milliseconds() const {
  const Event start(Timing::on), stop(Timing::on);
  start.record(stream_.get());
  graph_.launch(stream_);
  stop.record(stream_.get());
  stop.synchronize();
  return static_cast<double>(stop.milliseconds_since(start)) / kRuns;
}

double TimedWork::median_milliseconds() const {
  std::array<double, 5> times{};
  for (double& time : times) time = milliseconds();
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

void* allocate_pinned(size_t bytes) {
  void* memory = nullptr;
  check(cudaHostAlloc(&memory, bytes, cudaHostAllocPortable),
        "cudaHostAlloc of " + mebibytes(bytes) + " of page-locked memory");
  return memory;
}

void* PinnedAllocator::allocate(size_t bytes) {
  use_device(device_);  // page-locked memory belongs to a device's context
  return allocate_pinned(bytes);
}

void PinnedAllocator::release(void* memory) noexcept {
  use_device(device_, std::nothrow);
  static_cast<void>(cudaFreeHost(memory));
}

DeviceBlock allocate_device(size_t bytes, const std::string& purpose) {
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  void* memory = nullptr;
  const cudaError_t status = cudaMalloc(&memory, bytes);
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());  // the next call is to succeed
    throw Error(codes::kOutOfMemory, "The GPU's memory does not hold " + purpose + ": " +
                                         mebibytes(bytes) + " wanted, " + mebibytes(free) +
                                         " free of " + mebibytes(total) + ".");
  }
  check(status, "cudaMalloc of " + mebibytes(bytes) + " for " + purpose);
  return {memory, bytes};
}

void* Arena::take_bytes(size_t bytes) {
  if (bytes == 0) return nullptr;
#ifdef HARDMINE_SIMT
  // On the emulated device every array ends where an inaccessible page begins.
  const size_t taken = simt::guarded_bytes(bytes);
#else
  const size_t taken = (bytes + kAlignment - 1) / kAlignment * kAlignment;
#endif
  const size_t begin = used_;
  used_ += taken;
  if (base_ == nullptr) return nullptr;
  if (used_ > capacity_) {
    throw Error(codes::kBackend, "An arena of " + std::to_string(capacity_) +
                                     " bytes was asked for " + std::to_string(used_) +
                                     ": a layout took more than it had counted.");
  }
#ifdef HARDMINE_SIMT
  return simt::guard(base_ + begin, bytes);
#else
  return base_ + begin;
#endif
}

}  // namespace hardmine::cuda
