#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <iterator>
#include <limits>
#include <mutex>
#include <numeric>
#include <system_error>
#include <thread>
#include <unordered_set>
#include <utility>

#include "core/decode.h"
#include "core/error.h"
#include "core/random.h"

namespace hardmine {
namespace {

using Clock = std::chrono::steady_clock;

// Images that a decoder takes at once: about 0.2 ms of work, so that all decoders work on the batch
// whose turn is next and the lock costs nothing beside it.
constexpr int64_t kGroup = 4;
// The consumer holds two batches; two more let decoders run ahead while it works.
constexpr int kLeastSlots = 4;
constexpr int kMostSlots = 1024;
constexpr int kMostThreads = 256;
// Training's own threads come first: decoding needs about one percent of a CPU step's time, and at
// this niceness the scheduler still gives it about ten percent of a contended core.
constexpr int kDecoderNiceness = 10;

uint64_t epoch_stream(const char* purpose, int64_t epoch) {
  return stream_of(purpose) ^ mix64(static_cast<uint64_t>(epoch));
}

void check(const RecordFile& records, const RingSpec& spec) {
  const auto n = static_cast<int64_t>(spec.images.size());
  const auto demand = [](bool holds, const std::string& sentence) {
    if (!holds) throw Error(codes::kInput, sentence);
  };
  demand(spec.labels.size() == spec.images.size(),
         "There are " + std::to_string(spec.labels.size()) + " labels for " + std::to_string(n) +
             " images; give one label to each image");
  demand(spec.batch >= 1, "The batch is " + std::to_string(spec.batch) + "; it must be at least 1");
  demand(spec.crop >= 0 && spec.crop <= kImageSize / 2,
         "The crop shift is " + std::to_string(spec.crop) + " pixels; it must be 0 to 56");
  demand(spec.threads >= 1 && spec.threads <= kMostThreads,
         "There are " + std::to_string(spec.threads) + " decode threads; give 1 to 256");
  demand(spec.slots >= kLeastSlots && spec.slots <= kMostSlots,
         "The ring has " + std::to_string(spec.slots) + " slots; give 4 to 1024");
  demand(spec.skips >= 0 && (spec.skips == 0 || spec.skips < n),
         "The images that may be skipped are " + std::to_string(spec.skips) + " of " +
             std::to_string(n) + "; give a number from 0 that leaves at least one");
  for (size_t i = 0; i < spec.images.size(); ++i) {
    if (spec.images[i] < 0 || spec.images[i] >= records.images()) {
      demand(false, "Image " + std::to_string(spec.images[i]) +
                        " does not exist: " + records.path() + " has images 0 to " +
                        std::to_string(records.images() - 1));
    }
    if (spec.labels[i] < 0) {
      demand(false, "The label of image " + std::to_string(spec.images[i]) + " is " +
                        std::to_string(spec.labels[i]) + "; labels start at 0");
    }
  }
  if (n < spec.batch) {
    throw Error(codes::kData, "There are " + std::to_string(n) + " images for a batch of " +
                                  std::to_string(spec.batch) +
                                  "; give more images or a smaller batch");
  }
}

class DecodeRing final : public BatchRing {
 public:
  DecodeRing(std::shared_ptr<const RecordFile> records, RingSpec spec,
             std::unique_ptr<HostAllocator> allocator)
      : records_(std::move(records)),
        spec_(std::move(spec)),
        steps_(static_cast<int64_t>(spec_.images.size()) / spec_.batch),
        memory_(std::move(allocator), spec_.slots, spec_.batch),
        known_(spec_.skipped.begin(), spec_.skipped.end()) {
    slots_.resize(static_cast<size_t>(spec_.slots));
    for (size_t i = 0; i < slots_.size(); ++i) memory_.place(slots_[i], i, spec_.batch);
    threads_.reserve(static_cast<size_t>(spec_.threads));
    try {
      for (int i = 0; i < spec_.threads; ++i) threads_.emplace_back([this] { run_decoder(); });
    } catch (const std::system_error& error) {
      stop();
      throw Error(codes::kIo, "Could not start decode thread " +
                                  std::to_string(threads_.size() + 1) + " of " +
                                  std::to_string(spec_.threads) + ": " + error.what() +
                                  "; ask for fewer threads");
    }
  }

  ~DecodeRing() override {
    stop();
    std::unique_lock lock(mutex_);
    left_.wait(lock, [&] { return callers_ == 0; });
  }

  Batch next() override {
    std::unique_lock lock(mutex_);
    const Visit visit(*this);
    // The batch of the call before last goes back to the decoders.
    held_ = std::max(held_, position_ - 1);
    work_.notify_all();
    const auto settled = [&] {
      return stopping_ || broken_.code != nullptr ||
             (position_ < claim_sequence_ && slot_of(position_).missing == 0);
    };
    if (!settled()) {
      const auto start = Clock::now();
      ready_.wait(lock, settled);
      waited_ += Clock::now() - start;
    }
    if (stopping_)
      throw Error(codes::kAborted, "The decode ring was closed while a batch was awaited");
    if (broken_.code != nullptr) throw Error(broken_.code, broken_.message);
    Slot& slot = slot_of(position_);
    // The position stays: a damaged batch is never passed over in silence.
    if (slot.failure.code != nullptr) throw Error(slot.failure.code, slot.failure.message);
    take_skips(slot);
    ++position_;
    return {slot.images, slot.labels, slot.augmentations, spec_.batch, slot.sources.data()};
  }

  void seek(int64_t epoch, int64_t step) override {
    if (epoch < 1 || epoch > std::numeric_limits<int32_t>::max() || step < 0 || step >= steps_) {
      throw Error(codes::kInput, "Step " + std::to_string(step) + " of epoch " +
                                     std::to_string(epoch) +
                                     " does not exist: epochs count from 1, steps from 0 to " +
                                     std::to_string(steps_ - 1));
    }
    std::unique_lock lock(mutex_);
    const Visit visit(*this);
    seeking_ = true;
    left_.wait(lock, [&] { return busy_ == 0; });
    seeking_ = false;
    // Batches that the consumer holds keep their slots: the numbering goes on, its meaning changes.
    claim_sequence_ = position_;
    claim_row_ = 0;
    claim_epoch_ = epoch;
    claim_step_ = step;
    work_.notify_all();
  }

  int64_t steps_per_epoch() const override { return steps_; }

  double waited_ms() const override {
    const std::lock_guard lock(mutex_);
    return std::chrono::duration<double, std::milli>(waited_).count();
  }

  std::vector<SkippedImage> skipped() const override {
    const std::lock_guard lock(mutex_);
    return skipped_;
  }

 private:
  struct Failure {
    const char* code = nullptr;  // null: none
    std::string message;
    int64_t row = 0;
  };

  struct Skip {
    int64_t row = 0;  // that the image would have had
    SkippedImage skipped;
  };

  // What became of a claim.
  struct Outcome {
    Failure failure;
    std::vector<Skip> skips;
  };

  struct Slot {
    uint8_t* images = nullptr;
    int32_t* labels = nullptr;
    Augmentation* augmentations = nullptr;
    std::vector<int64_t> sources;  // RecordFile's index of each row
    int64_t missing = 0;           // rows not decoded yet
    Failure failure;               // of the lowest row that failed
    std::vector<Skip> skips;
  };

  // One block of the allocator's for each slot: images, labels, augmentations.
  class Memory {
   public:
    Memory(std::unique_ptr<HostAllocator> allocator, int slots, int64_t batch)
        : allocator_(std::move(allocator)) {
      const auto rows = static_cast<size_t>(batch);
      const size_t bytes = rows * (kImageBytes + sizeof(int32_t) + sizeof(Augmentation));
      blocks_.reserve(static_cast<size_t>(slots));
      try {
        for (int i = 0; i < slots; ++i) {
          void* block = allocator_->allocate(bytes);
          if (block == nullptr) {
            throw Error(codes::kIo, "Could not take " + std::to_string(bytes) +
                                        " bytes for one of " + std::to_string(slots) +
                                        " decoded batches; use a smaller batch");
          }
          blocks_.push_back(block);
        }
      } catch (...) {
        release();
        throw;
      }
    }
    ~Memory() { release(); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    void place(Slot& slot, size_t index, int64_t batch) const {
      const auto rows = static_cast<size_t>(batch);
      slot.images = static_cast<uint8_t*>(blocks_[index]);
      slot.labels = reinterpret_cast<int32_t*>(slot.images + rows * kImageBytes);
      slot.augmentations = reinterpret_cast<Augmentation*>(slot.labels + rows);
      slot.sources.resize(rows);
    }

   private:
    void release() {
      for (void* block : blocks_) allocator_->release(block);
    }

    std::unique_ptr<HostAllocator> allocator_;
    std::vector<void*> blocks_;
  };

  // A consumer inside the ring: the destructor waits until it has left. Made and ended under
  // mutex_.
  class Visit {
   public:
    explicit Visit(DecodeRing& ring) : ring_(ring) { ++ring_.callers_; }
    ~Visit() {
      --ring_.callers_;
      ring_.left_.notify_all();
    }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;

   private:
    DecodeRing& ring_;
  };

  struct Order {
    int64_t epoch = 0;
    std::vector<int64_t> rows;  // of RingSpec::images
  };

  // Rows of one batch that a decoder has taken on.
  struct Claim {
    int64_t sequence = 0;
    int64_t row = 0;
    int64_t count = 0;
    int64_t epoch = 0;
    int64_t step = 0;
    std::shared_ptr<const Order> order;
  };

  Slot& slot_of(int64_t sequence) { return slots_[static_cast<size_t>(sequence % spec_.slots)]; }

  std::shared_ptr<const Order>& order_of(int64_t epoch) {
    return orders_[static_cast<size_t>(epoch % 2)];
  }
  bool has_order(int64_t epoch) {
    return order_of(epoch) != nullptr && order_of(epoch)->epoch == epoch;
  }
  bool has_room() const { return !seeking_ && claim_sequence_ < held_ + spec_.slots; }

  // The epoch whose order is to be drawn now, or 0: the present one's at once, the following one's
  // when the decoders have nothing else to do, so that no epoch starts with a wait.
  int64_t order_wanted() {
    if (drawing_) return 0;
    if (!has_order(claim_epoch_)) return claim_epoch_;
    return !has_room() && !has_order(claim_epoch_ + 1) ? claim_epoch_ + 1 : 0;
  }

  void run_decoder() {
    settle_thread();
    try {
      decode_until_stopped();
    } catch (const std::exception& error) {  // memory for an order ran out
      const std::lock_guard lock(mutex_);
      broken_ = {codes::kIo, std::string("A decode thread failed: ") + error.what(), 0};
      ready_.notify_all();
    }
  }

  static void settle_thread() {
    // Threads inherit the affinity of the thread that makes them, which may be a pinned training
    // thread; the process's own (that of its main thread) is what decoders may use. Where either
    // call is refused, decoding works as well, only less evenly.
    cpu_set_t allowed;
    if (sched_getaffinity(getpid(), sizeof allowed, &allowed) == 0) {
      sched_setaffinity(0, sizeof allowed, &allowed);
    }
    setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kDecoderNiceness);
  }

  void decode_until_stopped() {
    std::vector<uint8_t> joined;
    std::unique_lock lock(mutex_);
    for (;;) {
      work_.wait(lock, [&] {
        return stopping_ || order_wanted() != 0 || (has_room() && has_order(claim_epoch_));
      });
      if (stopping_) return;
      if (const int64_t epoch = order_wanted(); epoch != 0) {
        draw_order(lock, epoch);
        continue;
      }
      const Claim claim = take_claim();
      ++busy_;
      lock.unlock();
      Outcome outcome = fill(claim, joined);
      lock.lock();
      --busy_;
      Slot& slot = slot_of(claim.sequence);
      slot.missing -= claim.count;
      std::move(outcome.skips.begin(), outcome.skips.end(), std::back_inserter(slot.skips));
      const Failure& failure = outcome.failure;
      if (failure.code != nullptr &&
          (slot.failure.code == nullptr || failure.row < slot.failure.row)) {
        slot.failure = failure;
      }
      if (slot.missing == 0) ready_.notify_all();
      if (busy_ == 0) left_.notify_all();
    }
  }

  void draw_order(std::unique_lock<std::mutex>& lock, int64_t epoch) {
    drawing_ = true;
    lock.unlock();
    auto order = std::make_shared<const Order>(Order{
        epoch, epoch_permutation(static_cast<int64_t>(spec_.images.size()), spec_.seed, epoch)});
    lock.lock();
    drawing_ = false;
    order_of(epoch) = std::move(order);
    work_.notify_all();
  }

  Claim take_claim() {
    const Claim claim{claim_sequence_, claim_row_,  std::min(kGroup, spec_.batch - claim_row_),
                      claim_epoch_,    claim_step_, order_of(claim_epoch_)};
    if (claim.row == 0) {
      Slot& slot = slot_of(claim.sequence);
      slot.missing = spec_.batch;
      slot.failure = {};
      slot.skips.clear();
    }
    claim_row_ += claim.count;
    if (claim_row_ == spec_.batch) {
      claim_row_ = 0;
      ++claim_sequence_;
      if (++claim_step_ == steps_) {
        claim_step_ = 0;
        ++claim_epoch_;
      }
    }
    return claim;
  }

  Outcome fill(const Claim& claim, std::vector<uint8_t>& joined) {
    Outcome outcome;
    for (int64_t row = claim.row; row < claim.row + claim.count; ++row) {
      if (!fill_row(claim, row, joined, outcome)) break;
    }
    return outcome;
  }

  // False: nothing sound was found for the row, and `outcome` says why.
  bool fill_row(const Claim& claim, int64_t row, std::vector<uint8_t>& joined, Outcome& outcome) {
    Slot& slot = slot_of(claim.sequence);
    const std::vector<int64_t>& order = claim.order->rows;
    const size_t place = static_cast<size_t>(claim.step * spec_.batch + row);
    // One more than may be skipped settles it: next() refuses the batch.
    for (int64_t passed = 0; passed <= spec_.skips; ++passed) {
      const auto at =
          static_cast<size_t>(order[(place + static_cast<size_t>(passed)) % order.size()]);
      const int64_t image = spec_.images[at];
      try {
        const std::span<const uint8_t> jpeg = records_->image(image, joined);
        decode_jpeg(jpeg, records_->describe(image),
                    slot.images + static_cast<size_t>(row) * kImageBytes);
        slot.labels[row] = spec_.labels[at];
        slot.sources[static_cast<size_t>(row)] = image;
        slot.augmentations[row] =
            draw_augmentation(spec_.seed, spec_.mirror, spec_.crop, claim.epoch, image);
        return true;
      } catch (const Error& error) {
        if (spec_.skips == 0 || std::strcmp(error.code(), codes::kData) != 0) {
          outcome.failure = {error.code(), error.what(), row};
          return false;
        }
        outcome.skips.push_back({row, {image, error.what()}});
      } catch (const std::exception& error) {
        outcome.failure = {codes::kIo,
                           "Could not read the " + records_->describe(image) + ": " + error.what(),
                           row};
        return false;
      }
    }
    return false;
  }

  // Counts what the batch whose turn it is had to leave out: here, and not where decoders come upon
  // it, so that it depends on no thread's timing. Throws when it is too much.
  void take_skips(Slot& slot) {
    std::stable_sort(slot.skips.begin(), slot.skips.end(),
                     [](const Skip& a, const Skip& b) { return a.row < b.row; });
    for (const Skip& skip : slot.skips) {
      if (known_.insert(skip.skipped.image).second) skipped_.push_back(skip.skipped);
    }
    if (spec_.skips == 0 || static_cast<int64_t>(known_.size()) <= spec_.skips) return;
    const std::string last = skipped_.empty() ? "" : " (the last: " + skipped_.back().reason + ")";
    throw Error(codes::kData, "More than the " + std::to_string(spec_.skips) +
                                  " images that may be skipped are damaged in " + records_->path() +
                                  last + "; restore the file or pack the data set again");
  }

  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      work_.notify_all();
      ready_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
  }

  const std::shared_ptr<const RecordFile> records_;
  const RingSpec spec_;
  const int64_t steps_;
  const Memory memory_;

  mutable std::mutex mutex_;                    // guards everything below
  std::condition_variable work_;                // decoders: there may be something to do
  std::condition_variable ready_;               // consumer: a batch is whole
  std::condition_variable left_;                // seek, destructor: someone finished
  std::vector<Slot> slots_;                     // batch number s lies in slot s % slots
  int64_t position_ = 0;                        // number of the batch that next() gives
  int64_t held_ = 0;                            // lowest number that the consumer may still read
  int64_t claim_sequence_ = 0, claim_row_ = 0;  // what the decoders take next ...
  int64_t claim_epoch_ = 1, claim_step_ = 0;    // ... and where that is in training
  std::array<std::shared_ptr<const Order>, 2> orders_;  // of an even and an odd epoch
  bool drawing_ = false;                                // a decoder draws an order
  bool seeking_ = false;
  bool stopping_ = false;
  int busy_ = 0;     // decoders with a claim
  int callers_ = 0;  // threads inside next() or seek()
  Clock::duration waited_{};
  Failure broken_;                     // of the ring as a whole
  std::unordered_set<int64_t> known_;  // images that count towards RingSpec::skips
  std::vector<SkippedImage> skipped_;  // of those, the ones met here

  std::vector<std::thread> threads_;
};

}  // namespace

Augmentation draw_augmentation(uint64_t seed, bool mirror, int crop, int64_t epoch, int64_t image) {
  const uint64_t stream = epoch_stream("augmentation", epoch);
  const auto draw = [&](uint64_t which, int bound) {
    const uint64_t index = 3 * static_cast<uint64_t>(image) + which;
    return static_cast<int>(
        random_below(random_bits(seed, stream, index), static_cast<uint64_t>(bound)));
  };
  Augmentation augmentation;
  augmentation.mirror = static_cast<uint8_t>(draw(0, mirror ? 2 : 1));
  augmentation.dx = static_cast<int8_t>(draw(1, 2 * crop + 1) - crop);
  augmentation.dy = static_cast<int8_t>(draw(2, 2 * crop + 1) - crop);
  return augmentation;
}

std::vector<int64_t> epoch_permutation(int64_t n, uint64_t seed, int64_t epoch) {
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), int64_t{0});
  const uint64_t stream = epoch_stream("epoch order", epoch);
  for (auto i = static_cast<uint64_t>(n); i-- > 1;) {
    std::swap(order[i], order[random_below(random_bits(seed, stream, i), i + 1)]);
  }
  return order;
}

std::unique_ptr<BatchRing> BatchRing::make(std::shared_ptr<const RecordFile> records, RingSpec spec,
                                           std::unique_ptr<HostAllocator> allocator) {
  check(*records, spec);
  return std::make_unique<DecodeRing>(std::move(records), std::move(spec), std::move(allocator));
}

}  // namespace hardmine
