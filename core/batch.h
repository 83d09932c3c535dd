// A training batch as every backend receives it, and where it comes from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace hardmine {

inline constexpr int kImageSize = 112;                                      // pixels, both sides
inline constexpr size_t kImageBytes = size_t{kImageSize} * kImageSize * 3;  // uint8 RGB, HWC

// What augmentation does to one image; the backend applies it while it normalises.
struct Augmentation {
  uint8_t mirror = 0;     // 1: left and right exchanged
  int8_t dx = 0, dy = 0;  // shift in pixels (after mirroring); uncovered pixels are black (0)
};

struct Batch {
  const uint8_t* images = nullptr;              // [size, 112, 112, 3] RGB
  const int32_t* labels = nullptr;              // [size] class of each image
  const Augmentation* augmentations = nullptr;  // [size]
  int64_t size = 0;
  const int64_t* sources =
      nullptr;  // [size] number of each image in what it was read from, or null
};

// Yields batches in an order that depends on the seed and the position alone.
class BatchSource {
 public:
  virtual ~BatchSource() = default;
  // Waits for the next batch, which stays valid until the second following call: a device may still
  // be copying one batch while it asks for the next.
  virtual Batch next() = 0;
};

// Where a ring takes its memory from: plain on the CPU, page-locked for a GPU.
class HostAllocator {
 public:
  virtual ~HostAllocator() = default;
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* memory) noexcept = 0;
};

}  // namespace hardmine
