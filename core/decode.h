// JPEG to pixels, and the ring of decode threads that feeds training.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/batch.h"
#include "core/records.h"

namespace hardmine {

struct JpegInfo {
  int width = 0, height = 0, components = 0;
};

// Reads the header alone. Throws codes::kData for anything that is not a JPEG.
JpegInfo read_jpeg_info(std::span<const uint8_t> jpeg, const std::string& what);

// Decodes one 112x112 JPEG to RGB [112, 112, 3]. Every warning of libjpeg (a truncated or damaged
// file) is an error, as is another size. `what` names the image in the message.
void decode_jpeg(std::span<const uint8_t> jpeg, const std::string& what, uint8_t* pixels);

struct RingSpec {
  std::vector<int64_t> images;   // indices into the RecordFile that take part
  std::vector<int32_t> labels;   // class of each of them
  int64_t batch = 64;
  uint64_t seed = 1;
  bool mirror = true;            // flip half of the images
  int crop = 0;                  // shift by up to this many pixels each way
  int threads = 1;               // decoders
  int slots = 4;                 // batches held
};

// Epoch e (from 1) is the seeded permutation of RingSpec::images, floor(n / batch) batches; the rest
// is dropped. Mirror and shift depend on (seed, epoch, image) alone.
class BatchRing : public BatchSource {
 public:
  static std::unique_ptr<BatchRing> make(std::shared_ptr<const RecordFile> records, RingSpec spec,
                                         std::unique_ptr<HostAllocator> allocator);
  // The next batch given out is number `step` (from 0) of `epoch` (from 1).
  virtual void seek(int64_t epoch, int64_t step) = 0;
  virtual int64_t steps_per_epoch() const = 0;
  // Total time next() has waited for decoders, in milliseconds: 0 when input is never the bottleneck.
  virtual double waited_ms() const = 0;
};

// The order of one epoch: a permutation of 0..n-1 from (seed, epoch).
std::vector<int64_t> epoch_permutation(int64_t n, uint64_t seed, int64_t epoch);

}  // namespace hardmine
