// A small emulator that runs CUDA kernels on the CPU, so that the very sources of cuda/kernels/ are
// tested where there is no GPU and no CUDA toolkit. test/simt/include/ holds stand-ins for the
// toolkit's headers that bring this one in.
//
// One fiber a thread, blocks one after the other in permuted order, lanes of a block started in
// permuted order. Blocks of a cooperative launch are in flight together and take turns, from
// barrier to barrier, in an order that changes every time. What it reports as simt::Fault:
//   - a __syncthreads or warp operation that not every lane reaches (exited lanes included), or
//   that
//     lanes reach from different lines;
//   - a warp operation whose mask leaves out the caller, names an exited lane, or differs among
//   lanes;
//   - an access outside a Buffer (page-guarded on both ends) or past dynamic shared memory;
//   - blocks that wait for each other for ever, or at all where the launch is not cooperative;
//   - shared memory read before it was written shows as NaN (it is filled with 0xFF at block
//   start).
// It does not find races between lanes that happen to run in a harmless order, and knows no tensor
// cores, TMA or clusters.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace simt {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr int kWarp = 32;
inline constexpr size_t kStackBytes = 64 * 1024;  // kernels keep arrays of a few KB at most

// Device memory between two inaccessible pages. The data ends at the upper page, so that the first
// byte past it faults; bytes before it, up to the lower page, are canaries checked by check().
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count, std::string name = "a buffer")
      : count_(count), name_(std::move(name)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    // Vector loads need 16-byte alignment, so up to 15 bytes of slack stay behind the last element.
    data_bytes_ = (count * sizeof(T) + 15) & ~size_t{15};
    body_bytes_ = (std::max<size_t>(data_bytes_, 1) + page - 1) / page * page;
    mapped_bytes_ = body_bytes_ + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    body_ = base_ + page;
    mprotect(body_, body_bytes_, PROT_READ | PROT_WRITE);
    std::memset(body_, kCanary, body_bytes_);
    data_ = reinterpret_cast<T*>(body_ + body_bytes_ - data_bytes_);
  }
  Buffer(const std::vector<T>& values, std::string name) : Buffer(values.size(), std::move(name)) {
    std::copy(values.begin(), values.end(), data_);
  }
  ~Buffer() { munmap(base_, mapped_bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + count_); }
  void fill(const T& value) { std::fill(data_, data_ + count_, value); }

  // Throws when bytes around the data were written.
  void check() const {
    const char* data = reinterpret_cast<const char*>(data_);
    for (const char* p = body_; p < data; ++p)
      if (*p != kCanary) throw Fault("a write before the start of " + name_);
    for (const char* p = data + count_ * sizeof(T); p < body_ + body_bytes_; ++p)
      if (*p != kCanary) throw Fault("a write past the end of " + name_);
  }

 private:
  static constexpr char kCanary = 0x5A;
  size_t count_, data_bytes_, body_bytes_, mapped_bytes_;
  std::string name_;
  char* base_;
  char* body_;
  T* data_;
};

// Where a fiber, or who runs it, goes on. glibc's swapcontext makes a system call for the signal
// mask at every switch, twenty times what the switch itself costs; other processors would need
// theirs.
#ifndef __x86_64__
#error "The emulator's fibers are written for x86-64."
#endif
class Context {
 public:
  // Starts at `entry` on `stack`, which it must never return from.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    // entry's address where `ret` takes it, 16 bytes aligned as the ABI wants a call's stack.
    auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes - 32) &
                                          ~uintptr_t{15});
    *top = reinterpret_cast<void*>(entry);
    top -= 6;  // the registers that exchange() takes back
    std::memset(top, 0, 6 * sizeof(void*));
    stack_ = top;
  }
  // Goes on in `to` and returns when somebody switches back to this.
  void switch_to(Context& to) { exchange(&stack_, to.stack_); }

 private:
  [[gnu::naked, gnu::noinline]] static void exchange(void** /*rdi*/, void* /*rsi*/) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
        "mov %rsp, (%rdi); mov %rsi, %rsp;"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
  }
  void* stack_ = nullptr;
};

// Puts `values` into an order drawn from `seed`, which it moves on.
template <typename T>
void permute(std::span<T> values, uint64_t& seed) {
  for (size_t i = values.size(); i > 1; --i) {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    std::swap(values[i - 1], values[(seed >> 33) % i]);
  }
}

// What a lane waits for. `others`: it waits in a loop for what another lane or block is to write.
enum class Wait : uint8_t { nothing, block, warp, others, exited };

// A lane's stack, from those that lanes before it have left: a launch has thousands of lanes, and
// fresh pages for all of them take longer than most kernels run.
class Stack {
 public:
  Stack() {
    if (left_.empty()) left_.emplace_back(new char[kStackBytes]);
    memory_ = std::move(left_.back());
    left_.pop_back();
  }
  ~Stack() { left_.push_back(std::move(memory_)); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* data() const { return memory_.get(); }

 private:
  static inline thread_local std::vector<std::unique_ptr<char[]>> left_;
  std::unique_ptr<char[]> memory_;
};

struct Lane {
  Context context;
  Stack stack;
  uint3 thread{};
  int index = 0;  // linear in the block
  Wait wait = Wait::nothing;
  unsigned line = 0;                  // source line of the operation waited for
  unsigned mask = 0;                  // warp operations
  uint64_t posted = 0;                // the value this lane gives to a warp operation
  uint64_t lanes_values[kWarp] = {};  // what the warp gave, once released
  unsigned lanes_active = 0;
};

// One block in flight. thread_local: tests of two suites may run in two threads.
class Block {
 public:
  static thread_local Block* current;

  Block(dim3 grid, dim3 block, size_t shared_bytes) : grid_(grid), block_(block) {
    if (shared_bytes > 0) shared_.emplace(shared_bytes, "dynamic shared memory");
  }

  Lane& lane() { return *running_; }
  const dim3& grid() const { return grid_; }
  const dim3& block() const { return block_; }
  uint3 block_index{};

  // Dynamic shared memory, 0xFF at block start.
  void* dynamic_shared() {
    if (!shared_) fail("dynamic shared memory that the launch has not asked for");
    return shared_->data();
  }

  // A named static shared array: the same memory for every lane of the block.
  void* static_shared(const void* key, size_t bytes) {
    for (auto& entry : statics_)
      if (entry.key == key) return entry.memory.data();
    statics_.push_back({key, std::vector<char>(bytes, static_cast<char>(0xFF))});
    return statics_.back().memory.data();
  }

  void wait_block(unsigned line) {
    running_->wait = Wait::block;
    running_->line = line;
    yield();
  }

  // Returns when the other lanes and blocks have had a turn.
  void give_way() {
    running_->wait = Wait::others;
    yield();
  }

  // Posts `value` and returns when every lane of `mask` has; the values are in lane().lanes_values.
  void wait_warp(unsigned mask, uint64_t value, unsigned line) {
    if ((mask >> (running_->index % kWarp) & 1U) == 0)
      fail("a warp operation on line " + std::to_string(line) +
           " whose mask leaves out its caller");
    running_->wait = Wait::warp;
    running_->line = line;
    running_->mask = mask;
    running_->posted = value;
    yield();
  }

  [[noreturn]] void fail(const std::string& what) {
    const Lane& l = *running_;
    throw_later_ = what + " [block " + std::to_string(block_index.x) + "," +
                   std::to_string(block_index.y) + " thread " + std::to_string(l.index) + "]";
    running_->context.switch_to(scheduler_);
    std::abort();  // never resumed
  }

  // Makes every lane ready to run `kernel`, which must live until the block has ended.
  void start(const std::function<void()>& kernel, uint64_t order_seed) {
    if (shared_) shared_->fill(static_cast<char>(0xFF));
    statics_.clear();
    kernel_ = &kernel;
    ended_ = false;
    const int n = static_cast<int>(block_.x * block_.y * block_.z);
    if (n < 1 || n > 1024)
      throw Fault("a block of " + std::to_string(n) + " threads; 1 to 1024 fit");
    while (static_cast<int>(lanes_.size()) < n) lanes_.push_back(std::make_unique<Lane>());
    order_.resize(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
      order_[static_cast<size_t>(i)] = i;
      Lane& l = *lanes_[static_cast<size_t>(i)];
      l.index = i;
      l.thread = {static_cast<unsigned>(i) % block_.x,
                  static_cast<unsigned>(i) / block_.x % block_.y,
                  static_cast<unsigned>(i) / (block_.x * block_.y)};
      l.wait = Wait::nothing;
      l.context.prepare(l.stack.data(), kStackBytes, &Block::enter);
    }
    permute<int>(order_, order_seed);
  }

  // Runs the lanes until all of them wait, and lets them through a barrier that all have reached.
  // False when lanes did nothing but wait for other blocks.
  bool step() {
    Block* outer = current;
    current = this;
    struct Restore {
      Block* outer;
      ~Restore() { Block::current = outer; }
    } restore{outer};
    const int n = static_cast<int>(order_.size());
    bool moved = false;
    for (const int i : order_) {
      Lane& l = *lanes_[static_cast<size_t>(i)];
      if (l.wait == Wait::others) moved = resume(l) || moved;
    }
    for (bool ran = true; ran;) {
      ran = false;
      for (const int i : order_) {
        Lane& l = *lanes_[static_cast<size_t>(i)];
        if (l.wait != Wait::nothing) continue;
        resume(l);
        ran = true;
      }
      ran = release_warps(n) || ran;
      moved = moved || ran;
    }
    for (const int i : order_)
      if (lanes_[static_cast<size_t>(i)]->wait == Wait::others) return moved;
    ended_ = all(n, Wait::exited);
    if (!ended_) {
      release_block(n);
    } else if (shared_) {
      shared_->check();
    }
    return true;
  }
  bool ended() const { return ended_; }

 private:
  static void enter() {
    Block* block = current;
    (*block->kernel_)();
    block->running_->wait = Wait::exited;
    block->running_->context.switch_to(block->scheduler_);
  }

  void yield() { running_->context.switch_to(scheduler_); }

  // Runs a lane until it waits; false when that is for others.
  bool resume(Lane& l) {
    l.wait = Wait::nothing;
    running_ = &l;
    scheduler_.switch_to(l.context);
    if (!throw_later_.empty()) {
      const std::string what = std::exchange(throw_later_, {});
      throw Fault(what);
    }
    return l.wait != Wait::others;
  }

  bool all(int n, Wait wait) const {
    for (int i = 0; i < n; ++i)
      if (lanes_[static_cast<size_t>(i)]->wait != wait) return false;
    return true;
  }

  // Completes every warp operation whose lanes have all arrived.
  bool release_warps(int n) {
    bool any = false;
    for (int base = 0; base < n; base += kWarp) {
      const int lanes = std::min(kWarp, n - base);
      for (int i = 0; i < lanes; ++i) {
        const Lane& first = *lanes_[static_cast<size_t>(base + i)];
        if (first.wait != Wait::warp) continue;
        const unsigned mask = first.mask;
        const unsigned present = lanes == kWarp ? ~0U : (1U << lanes) - 1;
        bool complete = true;
        for (int j = 0; j < kWarp && complete; ++j) {
          if ((mask & present) >> j % kWarp == 0) break;
          if ((mask & present & (1U << j)) == 0) continue;
          const Lane& other = *lanes_[static_cast<size_t>(base + j)];
          if (other.wait == Wait::exited)
            throw Fault("a warp operation on line " + std::to_string(first.line) +
                        " whose mask names a lane that has exited");
          complete = other.wait == Wait::warp;
          if (complete && (other.mask != mask || other.line != first.line))
            throw Fault("lanes of one warp wait in different warp operations (lines " +
                        std::to_string(first.line) + " and " + std::to_string(other.line) + ")");
        }
        if (!complete) continue;
        uint64_t values[kWarp] = {};
        for (int j = 0; j < lanes; ++j)
          if (mask & (1U << j)) values[j] = lanes_[static_cast<size_t>(base + j)]->posted;
        for (int j = 0; j < lanes; ++j) {
          if ((mask & (1U << j)) == 0) continue;
          Lane& l = *lanes_[static_cast<size_t>(base + j)];
          std::copy(std::begin(values), std::end(values), std::begin(l.lanes_values));
          l.lanes_active = mask & present;
          l.wait = Wait::nothing;
        }
        any = true;
      }
    }
    return any;
  }

  void release_block(int n) {
    const Lane& first = *lanes_[0];
    for (int i = 0; i < n; ++i) {
      const Lane& l = *lanes_[static_cast<size_t>(i)];
      if (l.wait != Wait::block)
        throw Fault("not every lane reaches a barrier: lane " + std::to_string(i) +
                    (l.wait == Wait::exited
                         ? " has exited"
                         : " waits in a warp operation on line " + std::to_string(l.line)));
      if (l.line != first.line)
        throw Fault("lanes wait at different barriers (lines " + std::to_string(first.line) +
                    " and " + std::to_string(l.line) + ")");
    }
    for (int i = 0; i < n; ++i) lanes_[static_cast<size_t>(i)]->wait = Wait::nothing;
  }

  struct Static {
    const void* key;
    std::vector<char> memory;
  };
  dim3 grid_, block_;
  std::optional<Buffer<char>> shared_;
  std::vector<Static> statics_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<int> order_;  // in which lanes run
  bool ended_ = false;
  Lane* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  Context scheduler_;
  std::string throw_later_;
};
inline thread_local Block* Block::current = nullptr;

namespace detail {
inline thread_local sigjmp_buf fault_return;
inline thread_local volatile sig_atomic_t armed = 0;
inline void on_fault(int signal) {
  if (!armed) {
    ::signal(signal, SIG_DFL);
    raise(signal);
    return;
  }
  siglongjmp(fault_return, 1);
}

// On its own so that nothing lives in a register across sigsetjmp.
[[gnu::noinline]] inline bool run_armed(const std::function<void()>& run) {
  if (sigsetjmp(fault_return, 1) != 0) return false;
  armed = 1;
  run();
  return true;
}

// False when run() touched memory that is not there.
inline bool without_fault(const std::function<void()>& run) {
  struct sigaction action {
  }, before_segv{}, before_bus{};
  action.sa_handler = on_fault;
  action.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);
  struct Restore {
    struct sigaction &segv, &bus;
    ~Restore() {
      armed = 0;
      sigaction(SIGSEGV, &segv, nullptr);
      sigaction(SIGBUS, &bus, nullptr);
    }
  } restore{before_segv, before_bus};
  return run_armed(run);
}
}  // namespace detail

// Turns in which every block that is left does nothing but wait: then it does for ever.
inline constexpr int kIdleRounds = 100'000;

// Runs blocks that are in flight together to their ends.
inline void run_together(std::span<Block*> blocks, uint64_t& seed, const char* idle_for_ever) {
  for (int idle = 0; !blocks.empty();) {
    bool moved = false;
    permute(blocks, seed);
    for (Block* block : blocks) moved = block->step() || moved;
    const auto ended = std::partition(blocks.begin(), blocks.end(),
                                      [](const Block* block) { return !block->ended(); });
    blocks = {blocks.begin(), ended};
    idle = moved ? 0 : idle + 1;
    if (idle > kIdleRounds) throw Fault(idle_for_ever);
  }
}

enum class Blocks : uint8_t { independent, cooperative };

// Runs kernel() for every thread of the grid. Throws Fault.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel,
                   uint64_t seed = 1, Blocks kind = Blocks::independent) {
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  permute<uint64_t>(order, seed);
  const size_t in_flight = kind == Blocks::cooperative ? order.size() : 1;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Block*> together;
  for (size_t i = 0; i < in_flight; ++i) {
    blocks.push_back(std::make_unique<Block>(grid, block, shared_bytes));
    together.push_back(blocks.back().get());
  }
  const bool clean = detail::without_fault([&] {
    for (size_t first = 0; first < order.size(); first += in_flight) {
      for (size_t k = 0; k < in_flight; ++k) {
        const uint64_t i = order[first + k];
        blocks[k]->block_index = {static_cast<unsigned>(i % grid.x),
                                  static_cast<unsigned>(i / grid.x % grid.y),
                                  static_cast<unsigned>(i / (uint64_t{grid.x} * grid.y))};
        blocks[k]->start(kernel, seed ^ i);
      }
      run_together(together, seed,
                   kind == Blocks::cooperative
                       ? "blocks wait for each other for ever"
                       : "a block waits for another, but the launch is not cooperative");
    }
  });
  if (clean) return;
  Block& at = *std::exchange(Block::current, nullptr);
  throw Fault("an access outside every buffer [block " + std::to_string(at.block_index.x) + "," +
              std::to_string(at.block_index.y) + " thread " + std::to_string(at.lane().index) +
              "]");
}

// Bits of a value that a warp operation moves; 8 bytes at most, as on the device.
template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, unsigned line) {
  Block& block = *Block::current;
  block.wait_warp(mask, to_bits(value), line);
  Lane& lane = block.lane();
  if (source < 0 || source >= kWarp) return value;  // out of the segment: the lane's own value
  if ((lane.lanes_active & (1U << source)) == 0)
    block.fail("a shuffle on line " + std::to_string(line) + " reads lane " +
               std::to_string(source) + ", which takes no part");
  return from_bits<T>(lane.lanes_values[source]);
}

inline int lane_index() {
  return Block::current->lane().index % kWarp;
}

}  // namespace simt

// threadIdx.x and the like read the running lane.
namespace simt {
template <auto Read>
struct Coordinate {
  operator unsigned() const { return Read(*Block::current); }
};
template <auto X, auto Y, auto Z>
struct Coordinates {
  Coordinate<X> x;
  Coordinate<Y> y;
  Coordinate<Z> z;
};
}  // namespace simt
inline constexpr simt::Coordinates<[](simt::Block& b) { return b.lane().thread.x; },
                                   [](simt::Block& b) { return b.lane().thread.y; },
                                   [](simt::Block& b) { return b.lane().thread.z; }>
    threadIdx{};
inline constexpr simt::Coordinates<[](simt::Block& b) { return b.block_index.x; },
                                   [](simt::Block& b) { return b.block_index.y; },
                                   [](simt::Block& b) { return b.block_index.z; }>
    blockIdx{};
inline constexpr simt::Coordinates<[](simt::Block& b) { return b.block().x; },
                                   [](simt::Block& b) { return b.block().y; },
                                   [](simt::Block& b) { return b.block().z; }>
    blockDim{};
inline constexpr simt::Coordinates<[](simt::Block& b) { return b.grid().x; },
                                   [](simt::Block& b) { return b.grid().y; },
                                   [](simt::Block& b) { return b.grid().z; }>
    gridDim{};
inline constexpr int warpSize = simt::kWarp;

inline void __syncthreads(std::source_location at = std::source_location::current()) {
  simt::Block::current->wait_block(at.line());
}
inline void __syncwarp(unsigned mask = ~0U,
                       std::source_location at = std::source_location::current()) {
  simt::Block::current->wait_warp(mask, 0, at.line());
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = simt::kWarp,
              std::source_location at = std::source_location::current()) {
  const int base = simt::lane_index() / width * width;
  return simt::shuffle(mask, value, base + lane % width, at.line());
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = simt::kWarp,
                  std::source_location at = std::source_location::current()) {
  const int self = simt::lane_index(), source = self ^ lane_mask;
  return simt::shuffle(mask, value, source / width > self / width ? self : source, at.line());
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarp,
                   std::source_location at = std::source_location::current()) {
  const int self = simt::lane_index(), source = self + static_cast<int>(delta);
  return simt::shuffle(mask, value, source / width != self / width ? self : source, at.line());
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarp,
                 std::source_location at = std::source_location::current()) {
  const int self = simt::lane_index(), source = self - static_cast<int>(delta);
  return simt::shuffle(mask, value, source < self / width * width ? self : source, at.line());
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location at = std::source_location::current()) {
  simt::Block& block = *simt::Block::current;
  block.wait_warp(mask, predicate != 0, at.line());
  unsigned votes = 0;
  for (int i = 0; i < simt::kWarp; ++i)
    if ((block.lane().lanes_active >> i & 1U) && block.lane().lanes_values[i]) votes |= 1U << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate,
                      std::source_location at = std::source_location::current()) {
  return __ballot_sync(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      std::source_location at = std::source_location::current()) {
  return __ballot_sync(mask, !predicate, at) == 0;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline void __threadfence() {}
// Where a lane that waits for others lets them run.
inline void __nanosleep(unsigned) {
  simt::Block::current->give_way();
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}

// Lanes are fibers of one thread: plain read-modify-write is atomic.
template <typename T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <typename T>
T atomicMax(T* p, T v) {
  const T old = *p;
  *p = std::max(old, v);
  return old;
}
template <typename T>
T atomicMin(T* p, T v) {
  const T old = *p;
  *p = std::min(old, v);
  return old;
}
template <typename T>
T atomicOr(T* p, T v) {
  const T old = *p;
  *p = old | v;
  return old;
}
template <typename T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <typename T>
T atomicCAS(T* p, T compare, T v) {
  const T old = *p;
  if (old == compare) *p = v;
  return old;
}

inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float rsqrtf(float x) {
  return 1.0F / std::sqrt(x);
}
inline unsigned __float_as_uint(float x) {
  return simt::from_bits<unsigned>(simt::to_bits(x));
}
inline float __uint_as_float(unsigned x) {
  return simt::from_bits<float>(simt::to_bits(x));
}
using std::isfinite;
using std::max;
using std::min;
