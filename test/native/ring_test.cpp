#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <ctime>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "core/decode.h"
#include "core/error.h"
#include "core/random.h"
#include "core/records.h"
#include "test/native/record_files.h"

using namespace hardmine;
using namespace hardmine::test;

namespace {

using Clock = std::chrono::steady_clock;

double thread_cpu_ms() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return 1e3 * static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_nsec);
}

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

// What allocators of a test have handed out; the k-th request can be made to fail.
struct Ledger {
  std::atomic<int> held{0};
  std::atomic<int> requests{0};
  int fail_at = 0;  // 0: never
  bool fail_with_null = false;
};

class TestAllocator final : public HostAllocator {
 public:
  explicit TestAllocator(Ledger& ledger) : ledger_(ledger) {}
  void* allocate(size_t bytes) override {
    if (++ledger_.requests == ledger_.fail_at) {
      if (ledger_.fail_with_null) return nullptr;
      throw std::bad_alloc();
    }
    ++ledger_.held;
    return ::operator new(bytes);
  }
  void release(void* memory) noexcept override {
    --ledger_.held;
    ::operator delete(memory);
  }

 private:
  Ledger& ledger_;
};

// Records in memory, whose images can be held back or refused.
class FakeRecords final : public RecordFile {
 public:
  explicit FakeRecords(int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      jpegs_.push_back(draw_jpeg(static_cast<uint64_t>(i)));
      labels_.push_back(static_cast<int32_t>(i / 2));
      offsets_.push_back(1000 * i);
      keys_.push_back(static_cast<uint64_t>(i + 1));
    }
  }
  int64_t images() const override { return static_cast<int64_t>(jpegs_.size()); }
  std::span<const int32_t> labels() const override { return labels_; }
  std::span<const int64_t> offsets() const override { return offsets_; }
  std::span<const uint64_t> keys() const override { return keys_; }
  int64_t bytes() const override { return 0; }
  const std::string& path() const override { return path_; }
  std::vector<uint32_t> payload_crcs() const override { return {}; }
  std::span<const uint8_t> image(int64_t index, std::vector<uint8_t>&) const override {
    std::unique_lock lock(mutex_);
    gate_.wait(lock, [&] { return open_; });
    return jpegs_[static_cast<size_t>(index)];
  }

  void set_open(bool open) {
    const std::lock_guard lock(mutex_);
    open_ = open;
    gate_.notify_all();
  }
  void damage(int64_t index) { jpegs_[static_cast<size_t>(index)].resize(500); }
  const ByteString& jpeg(int64_t index) const { return jpegs_[static_cast<size_t>(index)]; }

 private:
  std::vector<ByteString> jpegs_;
  std::vector<int32_t> labels_;
  std::vector<int64_t> offsets_;
  std::vector<uint64_t> keys_;
  std::string path_ = "fake.rec";
  mutable std::mutex mutex_;
  mutable std::condition_variable gate_;
  bool open_ = true;
};

// Classes 100 + i for the first n images.
RingSpec spec_of(int64_t n, int64_t batch, int threads) {
  RingSpec spec;
  for (int64_t i = 0; i < n; ++i) {
    spec.images.push_back(i);
    spec.labels.push_back(static_cast<int32_t>(100 + i));
  }
  spec.batch = batch;
  spec.threads = threads;
  spec.seed = 5;
  return spec;
}

std::unique_ptr<BatchRing> make_ring(std::shared_ptr<const RecordFile> records, RingSpec spec,
                                     Ledger& ledger) {
  return BatchRing::make(std::move(records), std::move(spec),
                         std::make_unique<TestAllocator>(ledger));
}

// A batch's whole contents.
struct Copy {
  ByteString images;
  std::vector<int32_t> labels;
  std::vector<int> augmentations;
  std::vector<int64_t> sources;
  bool operator==(const Copy&) const = default;
};

Copy copy_of(const Batch& batch) {
  Copy copy;
  const auto rows = static_cast<size_t>(batch.size);
  copy.images.assign(batch.images, batch.images + rows * kImageBytes);
  copy.labels.assign(batch.labels, batch.labels + rows);
  copy.sources.assign(batch.sources, batch.sources + rows);
  for (size_t i = 0; i < rows; ++i) {
    const Augmentation& a = batch.augmentations[i];
    copy.augmentations.insert(copy.augmentations.end(), {a.mirror, a.dx, a.dy});
  }
  return copy;
}

template <typename F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return std::string(error.code()) + " " + error.what();
  }
  return "no error";
}

void check_contains(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    INFO("looking for: " << part << "\nin: " << text);
    CHECK(text.find(part) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("epoch_permutation: a permutation, another for each seed and epoch, without bias") {
  for (const int64_t n : {0, 1, 2, 7, 1000}) {
    auto order = epoch_permutation(n, 3, 4);
    CHECK(order == epoch_permutation(n, 3, 4));
    std::ranges::sort(order);
    for (int64_t i = 0; i < n; ++i) REQUIRE(order[static_cast<size_t>(i)] == i);
  }
  CHECK(epoch_permutation(100, 1, 1) != epoch_permutation(100, 1, 2));
  CHECK(epoch_permutation(100, 1, 1) != epoch_permutation(100, 2, 1));
  // Each of the 24 orders of four: 1,000 expected, standard deviation 31, six of them allowed.
  std::map<std::vector<int64_t>, int> counts;
  for (int64_t epoch = 1; epoch <= 24000; ++epoch) ++counts[epoch_permutation(4, 9, epoch)];
  CHECK(counts.size() == 24);
  for (const auto& [order, count] : counts) CHECK(std::abs(count - 1000) < 186);
}

TEST_CASE("ring: the same batches whatever the number of threads, each as the order says") {
  constexpr int64_t n = 37;
  constexpr int64_t batch = 7;
  constexpr int64_t steps = n / batch;
  const auto records = std::make_shared<FakeRecords>(n);
  std::vector<ByteString> pixels(n, ByteString(kImageBytes));
  for (int64_t i = 0; i < n; ++i) {
    decode_jpeg(records->jpeg(i), "image", pixels[static_cast<size_t>(i)].data());
  }
  std::vector<Copy> first;
  for (const int threads : {1, 2, 5}) {
    CAPTURE(threads);
    Ledger ledger;
    RingSpec spec = spec_of(n, batch, threads);
    spec.crop = 3;
    const auto ring = make_ring(records, spec, ledger);
    CHECK(ring->steps_per_epoch() == steps);
    for (int64_t b = 0; b < 3 * steps + 2; ++b) {
      const Copy copy = copy_of(ring->next());
      const auto order = epoch_permutation(n, 5, 1 + b / steps);
      for (size_t row = 0; row < batch; ++row) {
        const auto image = static_cast<size_t>(order[static_cast<size_t>(b % steps) * batch + row]);
        REQUIRE(copy.labels[row] == static_cast<int32_t>(100 + image));
        REQUIRE(copy.sources[row] == static_cast<int64_t>(image));
        REQUIRE(std::equal(pixels[image].begin(), pixels[image].end(),
                           copy.images.begin() + static_cast<std::ptrdiff_t>(row * kImageBytes)));
      }
      if (threads == 1) {
        first.push_back(copy);
      } else {
        REQUIRE(copy == first[static_cast<size_t>(b)]);
      }
    }
  }
}

TEST_CASE("ring: augmentation depends on seed, epoch and image, not on the order or the subset") {
  constexpr int64_t n = 40;
  const auto records = std::make_shared<FakeRecords>(n);
  // [epoch][image] mirror, dx, dy
  using Seen = std::map<std::pair<int64_t, int32_t>, std::vector<int>>;
  const auto collect = [&](RingSpec spec, int64_t epochs) {
    Ledger ledger;
    Seen seen;
    const auto ring = make_ring(records, spec, ledger);
    for (int64_t step = 0; step < epochs * ring->steps_per_epoch(); ++step) {
      const Copy copy = copy_of(ring->next());
      for (size_t row = 0; row < copy.labels.size(); ++row) {
        seen[{step / ring->steps_per_epoch(), copy.labels[row]}] = {
            copy.augmentations[3 * row], copy.augmentations[3 * row + 1],
            copy.augmentations[3 * row + 2]};
      }
    }
    return seen;
  };
  RingSpec spec = spec_of(n, 8, 2);
  spec.crop = 2;
  constexpr int64_t epochs = 25;
  const Seen all = collect(spec, epochs);
  CHECK(all.size() == n * epochs);
  int mirrored = 0;
  std::map<int, int> shifts;
  for (const auto& [which, augmentation] : all) {
    mirrored += augmentation[0];
    ++shifts[augmentation[1]];
    ++shifts[augmentation[2]];
  }
  // 1,000 draws: half of them within five standard deviations of 16; 2,000 shifts over five values,
  // 400 each within five of 18.
  CHECK(std::abs(mirrored - 500) < 80);
  CHECK(shifts.size() == 5);
  for (const auto& [shift, count] : shifts) {
    CHECK(std::abs(shift) <= 2);
    CHECK(std::abs(count - 400) < 90);
  }

  RingSpec part = spec_of(n, 5, 2);
  part.crop = 2;
  std::reverse(part.images.begin(), part.images.end());
  std::reverse(part.labels.begin(), part.labels.end());
  part.images.resize(20);
  part.labels.resize(20);
  for (const auto& [which, augmentation] : collect(part, 3)) {
    REQUIRE(all.at(which) == augmentation);
  }
  RingSpec plain = spec_of(n, 8, 1);
  plain.mirror = false;
  for (const auto& [which, augmentation] : collect(plain, 2)) {
    REQUIRE(augmentation == std::vector<int>{0, 0, 0});
  }
  RingSpec other = spec;
  other.seed = 6;
  CHECK(collect(other, 1) != collect(spec, 1));
}

TEST_CASE("ring: seek gives what running there gives") {
  constexpr int64_t n = 23;
  const auto records = std::make_shared<FakeRecords>(n);
  const RingSpec spec = spec_of(n, 4, 2);
  Ledger ledger;
  const auto ring = make_ring(records, spec, ledger);
  const int64_t steps = ring->steps_per_epoch();
  CHECK(steps == 5);
  std::vector<Copy> run;
  for (int64_t b = 0; b < 4 * steps; ++b) run.push_back(copy_of(ring->next()));
  const auto check_from = [&](BatchRing& r, int64_t at) {
    CAPTURE(at);
    r.seek(1 + at / steps, at % steps);
    for (int64_t b = at; b < std::min(at + 3, 4 * steps); ++b) {
      REQUIRE(copy_of(r.next()) == run[static_cast<size_t>(b)]);
    }
  };
  for (const int64_t at : {0, 19, 7, 7, 4, 5, 11, 0}) check_from(*ring, at);
  const auto fresh = make_ring(records, spec, ledger);
  check_from(*fresh, 13);

  // What the consumer still holds outlives a seek and one next().
  const Batch held = ring->next();
  const Copy copy = copy_of(held);
  ring->seek(3, 1);
  ring->next();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(copy_of(held) == copy);

  for (const auto& [epoch, step] :
       {std::pair<int64_t, int64_t>{0, 0}, {-1, 0}, {1, -1}, {1, 5}, {int64_t{1} << 40, 0}}) {
    check_contains(error_of([&] { ring->seek(epoch, step); }),
                   {codes::kInput, "does not exist", "steps from 0 to 4"});
  }
}

TEST_CASE("ring: a batch stays whole until the second following call") {
  const auto records = std::make_shared<FakeRecords>(30);
  Ledger ledger;
  const auto ring = make_ring(records, spec_of(30, 3, 3), ledger);
  Batch before = ring->next();
  Copy before_copy = copy_of(before);
  for (int round = 0; round < 60; ++round) {
    const Batch now = ring->next();
    REQUIRE(now.images != before.images);
    const Copy now_copy = copy_of(now);
    // Long enough for the decoders to fill every slot that is theirs.
    if (round % 20 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    REQUIRE(copy_of(before) == before_copy);
    before = now;
    before_copy = now_copy;
  }
}

TEST_CASE("ring: a damaged image is reported when its batch's turn comes") {
  constexpr int64_t n = 48;
  constexpr int64_t batch = 8;
  const auto order = epoch_permutation(n, 5, 1);
  for (const int threads : {1, 3}) {
    const auto records = std::make_shared<FakeRecords>(n);
    const int64_t first = order[2 * batch + 1];
    records->damage(first);
    records->damage(order[2 * batch + 6]);  // the same batch: the lower row is reported
    records->damage(order[3 * batch]);
    Ledger ledger;
    const auto ring = make_ring(records, spec_of(n, batch, threads), ledger);
    CHECK_NOTHROW(ring->next());
    CHECK_NOTHROW(ring->next());
    for (int again = 0; again < 3; ++again) {
      check_contains(
          error_of([&] { ring->next(); }),
          {codes::kData,
           "image key " + std::to_string(first + 1) + " at byte " + std::to_string(1000 * first) +
               " of fake.rec (label " + std::to_string(first / 2) + ")",
           "damaged JPEG"});
    }
    ring->seek(1, 4);
    CHECK_NOTHROW(ring->next());
    ring->seek(1, 3);
    check_contains(error_of([&] { ring->next(); }),
                   {"image key " + std::to_string(order[3 * batch] + 1) + " at"});
  }
}

TEST_CASE("ring: a skipped image's row goes to the next sound one of the order") {
  constexpr int64_t n = 29;
  constexpr int64_t batch = 6;
  constexpr int64_t steps = n / batch;
  const auto first_order = epoch_permutation(n, 5, 1);
  // One alone, two that follow each other, and the last of an epoch's order, which the first
  // follows.
  const std::vector<int64_t> damaged = {first_order[2], first_order[9], first_order[10],
                                        epoch_permutation(n, 5, 2)[steps * batch - 1]};
  const auto records = std::make_shared<FakeRecords>(n);
  for (const int64_t image : damaged) records->damage(image);
  const auto is_damaged = [&](int64_t image) {
    return std::find(damaged.begin(), damaged.end(), image) != damaged.end();
  };
  // Straight from the rule.
  const auto expected_image = [&](int64_t b, int64_t row) {
    const auto order = epoch_permutation(n, 5, 1 + b / steps);
    auto place = static_cast<size_t>(b % steps * batch + row);
    while (is_damaged(order[place])) place = (place + 1) % n;
    return order[place];
  };
  std::vector<Copy> run;
  for (const int threads : {1, 3}) {
    CAPTURE(threads);
    Ledger ledger;
    RingSpec spec = spec_of(n, batch, threads);
    spec.crop = 3;
    spec.skips = 4;
    const auto ring = make_ring(records, spec, ledger);
    // The same augmentation as without any damage: it depends on the image.
    RingSpec whole = spec;
    whole.skips = 0;
    std::map<std::pair<int64_t, int32_t>, std::vector<int>> drawn;
    Ledger other;
    const auto sound = make_ring(std::make_shared<FakeRecords>(n), whole, other);
    for (int64_t b = 0; b < 3 * steps; ++b) {
      const Copy copy = copy_of(sound->next());
      for (size_t row = 0; row < batch; ++row) {
        drawn[{b / steps, copy.labels[row]}] = {copy.augmentations[3 * row],
                                                copy.augmentations[3 * row + 1],
                                                copy.augmentations[3 * row + 2]};
      }
    }
    std::vector<int64_t> reported;
    for (int64_t b = 0; b < 3 * steps; ++b) {
      const Copy copy = copy_of(ring->next());
      for (int64_t row = 0; row < batch; ++row) {
        const int64_t image = expected_image(b, row);
        const auto at = static_cast<size_t>(row);
        REQUIRE(copy.labels[at] == static_cast<int32_t>(100 + image));
        ByteString pixels(kImageBytes);
        decode_jpeg(records->jpeg(image), "image", pixels.data());
        REQUIRE(std::equal(pixels.begin(), pixels.end(),
                           copy.images.begin() + static_cast<std::ptrdiff_t>(at * kImageBytes)));
        const auto known = drawn.find({b / steps, copy.labels[at]});
        if (known == drawn.end()) continue;  // of the images that an epoch drops
        REQUIRE(known->second == std::vector<int>{copy.augmentations[3 * at],
                                                  copy.augmentations[3 * at + 1],
                                                  copy.augmentations[3 * at + 2]});
      }
      // Each is reported with its batch, once.
      for (int64_t row = 0; row < batch; ++row) {
        const int64_t image =
            epoch_permutation(n, 5, 1 + b / steps)[static_cast<size_t>(b % steps * batch + row)];
        const bool fresh = std::find(reported.begin(), reported.end(), image) == reported.end();
        if (is_damaged(image) && fresh) reported.push_back(image);
      }
      const auto skipped = ring->skipped();
      REQUIRE(skipped.size() == reported.size());
      for (size_t i = 0; i < skipped.size(); ++i) {
        REQUIRE(skipped[i].image == reported[i]);
        check_contains(skipped[i].reason,
                       {"image key " + std::to_string(reported[i] + 1) + " at byte", "of fake.rec",
                        "damaged JPEG"});
      }
      if (threads == 1) {
        run.push_back(copy);
      } else {
        REQUIRE(copy == run[static_cast<size_t>(b)]);
      }
    }
    CHECK(reported.size() == damaged.size());
    // A run that goes on from here gets what this one got.
    ring->seek(2, 1);
    for (int64_t b = steps + 1; b < 3 * steps; ++b) {
      REQUIRE(copy_of(ring->next()) == run[static_cast<size_t>(b)]);
    }
    CHECK(ring->skipped().size() == damaged.size());
  }
}

TEST_CASE("ring: more damaged images than may be skipped are an error, at the same batch ever") {
  constexpr int64_t n = 40;
  constexpr int64_t batch = 5;
  const auto order = epoch_permutation(n, 5, 1);
  // In batches 1, 2 and 4.
  const std::vector<int64_t> damaged = {order[5], order[13], order[22]};
  const auto records = std::make_shared<FakeRecords>(n);
  for (const int64_t image : damaged) records->damage(image);
  for (const int threads : {1, 4}) {
    CAPTURE(threads);
    Ledger ledger;
    RingSpec spec = spec_of(n, batch, threads);
    spec.skips = 2;
    const auto ring = make_ring(records, spec, ledger);
    for (int b = 0; b < 4; ++b) CHECK_NOTHROW(ring->next());
    for (int again = 0; again < 2; ++again) {
      check_contains(error_of([&] { ring->next(); }),
                     {codes::kData, "More than the 2 images", "fake.rec",
                      "image key " + std::to_string(damaged[2] + 1)});
    }
    // Known ones count towards the two, met again or not, and are not reported.
    spec.skipped = {damaged[0], damaged[2]};
    const auto resumed = make_ring(records, spec, ledger);
    for (int b = 0; b < 2; ++b) CHECK_NOTHROW(resumed->next());
    CHECK(resumed->skipped().empty());
    check_contains(error_of([&] { resumed->next(); }), {"More than the 2 images"});
    spec.skips = 3;
    const auto allowed = make_ring(records, spec, ledger);
    for (int b = 0; b < 8; ++b) CHECK_NOTHROW(allowed->next());
    REQUIRE(allowed->skipped().size() == 1);
    CHECK(allowed->skipped()[0].image == damaged[1]);
  }
  // Where nothing is sound the search ends.
  const auto ruin = std::make_shared<FakeRecords>(n);
  for (int64_t image = 0; image < n; ++image) ruin->damage(image);
  Ledger ledger;
  RingSpec spec = spec_of(n, batch, 2);
  spec.skips = n - 1;
  const auto ring = make_ring(ruin, spec, ledger);
  check_contains(error_of([&] { ring->next(); }), {codes::kData, "More than the 39 images"});
}

TEST_CASE(
    "ring: seek waits for decoders at work, whose rows lie in slots about to be filled anew") {
  const auto records = std::make_shared<FakeRecords>(20);
  records->set_open(false);
  Ledger ledger;
  const auto ring = make_ring(records, spec_of(20, 4, 2), ledger);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // both hold an image by now
  std::atomic<bool> done{false};
  std::thread consumer([&] {
    ring->seek(2, 3);
    done = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(!done);
  records->set_open(true);
  consumer.join();
  CHECK(ring->next().labels[0] == 100 + epoch_permutation(20, 5, 2)[12]);
}

TEST_CASE("ring: wrong settings") {
  const auto records = std::make_shared<FakeRecords>(10);
  struct Case {
    void (*spoil)(RingSpec&);
    std::vector<std::string> expected;
  };
  const std::vector<Case> cases = {
      {[](RingSpec& s) { s.labels.pop_back(); }, {codes::kInput, "9 labels for 10 images"}},
      {[](RingSpec& s) { s.batch = 11; }, {codes::kData, "10 images", "batch of 11"}},
      {[](RingSpec& s) { s.images.clear(), s.labels.clear(); }, {codes::kData, "0 images", "of 4"}},
      {[](RingSpec& s) { s.batch = 0; }, {codes::kInput, "batch is 0"}},
      {[](RingSpec& s) { s.images[3] = 10; }, {codes::kInput, "Image 10", "images 0 to 9"}},
      {[](RingSpec& s) { s.images[3] = -1; }, {codes::kInput, "Image -1"}},
      {[](RingSpec& s) { s.labels[3] = -2; }, {codes::kInput, "label of image 3 is -2"}},
      {[](RingSpec& s) { s.crop = -1; }, {codes::kInput, "crop shift is -1"}},
      {[](RingSpec& s) { s.crop = 57; }, {codes::kInput, "0 to 56"}},
      {[](RingSpec& s) { s.threads = 0; }, {codes::kInput, "0 decode threads"}},
      {[](RingSpec& s) { s.threads = 257; }, {codes::kInput, "1 to 256"}},
      {[](RingSpec& s) { s.slots = 3; }, {codes::kInput, "3 slots"}},
      {[](RingSpec& s) { s.slots = 1 << 20; }, {codes::kInput, "4 to 1024"}},
      {[](RingSpec& s) { s.skips = -1; }, {codes::kInput, "skipped are -1 of 10"}},
      {[](RingSpec& s) { s.skips = 10; }, {codes::kInput, "skipped are 10 of 10"}},
  };
  Ledger ledger;
  for (const Case& c : cases) {
    RingSpec spec = spec_of(10, 4, 1);
    c.spoil(spec);
    check_contains(error_of([&] { make_ring(records, spec, ledger); }), c.expected);
  }
  CHECK(ledger.requests == 0);
}

TEST_CASE("ring: memory that is refused is given back") {
  const auto records = std::make_shared<FakeRecords>(10);
  for (const bool null : {false, true}) {
    for (int k = 1; k <= 5; ++k) {
      Ledger ledger;
      ledger.fail_at = k;
      ledger.fail_with_null = null;
      RingSpec spec = spec_of(10, 4, 2);
      spec.slots = 5;
      if (null) {
        check_contains(error_of([&] { make_ring(records, spec, ledger); }),
                       {codes::kIo, "bytes", "smaller batch"});
      } else {
        CHECK_THROWS_AS(make_ring(records, spec, ledger), std::bad_alloc);
      }
      CHECK(ledger.held == 0);
    }
  }
}

TEST_CASE("ring: it can be closed at any moment") {
  const auto records = std::make_shared<FakeRecords>(50);
  Ledger ledger;
  for (uint64_t round = 0; round < 150; ++round) {
    const auto ring = make_ring(records, spec_of(50, 5, 1 + static_cast<int>(round % 4)), ledger);
    for (uint64_t i = 0; i < round % 7; ++i) ring->next();
    if (round % 3 == 0) ring->seek(2, static_cast<int64_t>(round % 10));
    std::this_thread::sleep_for(
        std::chrono::microseconds(random_below(random_bits(1, 1, round), 500)));
  }
  CHECK(ledger.held == 0);
}

TEST_CASE("ring: closing releases a consumer that waits; waiting is counted, nothing else is") {
  const auto records = std::make_shared<FakeRecords>(20);
  Ledger ledger;
  auto ring = make_ring(records, spec_of(20, 4, 2), ledger);
  for (int i = 0; i < 3; ++i) ring->next();
  // The decoders are ahead by now: the next call finds its batch ready.
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const double waited = ring->waited_ms();
  ring->next();
  CHECK(ring->waited_ms() == waited);

  records->set_open(false);
  std::atomic<bool> released{false};
  std::string error;
  BatchRing& shared_ring = *ring;
  std::thread consumer([&] {
    // At most a few batches are still to come.
    error = error_of([&] {
      for (int i = 0; i < 20; ++i) shared_ring.next();
    });
    released = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  CHECK(!released);
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    records->set_open(true);
  });
  SUBCASE("closed") {
    ring.reset();
    consumer.join();
    opener.join();
    check_contains(error, {codes::kAborted});
    CHECK(ledger.held == 0);
  }
  SUBCASE("waited for") {
    consumer.join();
    opener.join();
    CHECK(error == "no error");
    // The consumer began to wait within the first 60 ms and the images came after 120.
    CHECK(ring->waited_ms() - waited > 50);
  }
}

TEST_CASE("ring: throughput on real faces") {
  const std::filesystem::path faces = shared_faces();
  if (faces.empty()) {
    MESSAGE("SKIPPED: no folder shared/faces beside the repository (HARDMINE_SHARED)");
    return;
  }
  constexpr int64_t kImages = 1024;
  RecordSet set;
  std::vector<ByteString> jpegs;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(faces / "celeba-train")) {
    if (entry.path().extension() != ".jpg") continue;
    jpegs.push_back(read_file(entry.path()));
    set.add(jpegs.size(), image_payload({0}, jpegs.back()));
    if (jpegs.size() == kImages) break;
  }
  REQUIRE(jpegs.size() == kImages);
  const TemporaryFolder folder;
  const auto [rec, idx] = set.write(folder);
  const auto records = RecordFile::open(rec, idx);

  ByteString pixels(kImageBytes);
  // Processor time, so that neighbours on the machine do not count.
  double best_ms = 1e9;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const double start = thread_cpu_ms();
    for (const ByteString& jpeg : jpegs) decode_jpeg(jpeg, "image", pixels.data());
    best_ms = std::min(best_ms, thread_cpu_ms() - start);
  }
  MESSAGE("decode_jpeg: " << std::lround(kImages / best_ms * 1000) << " images/s of one core, "
                          << set.rec.size() / kImages << " bytes each");
  for (const int threads : {1, 2}) {
    Ledger ledger;
    const auto ring = make_ring(records, spec_of(kImages, 64, threads), ledger);
    const auto start = Clock::now();
    for (int64_t i = 0; i < 2 * ring->steps_per_epoch(); ++i) ring->next();
    MESSAGE("ring, " << threads << " threads: " << std::lround(2 * kImages / ms_since(start) * 1000)
                     << " images/s of wall time");
  }
}
