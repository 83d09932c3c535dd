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

// Reads the header alone. Throws codes::kData for anything that is not a JPEG (and names what it
// is), a damaged header, and more than 4096 x 4096 pixels.
JpegInfo read_jpeg_info(std::span<const uint8_t> jpeg, const std::string& what);

// Decodes one 112x112 JPEG to RGB [112, 112, 3]; grey is expanded. Throws codes::kData for every
// warning of libjpeg (a truncated or damaged file), another size, and CMYK. `what` names the image
// in the message: "The <what> is ...".
void decode_jpeg(std::span<const uint8_t> jpeg, const std::string& what, uint8_t* pixels);

// An image that was left out of training, and why.
struct SkippedImage {
  int64_t image = 0;   // index in the RecordFile
  std::string reason;  // the sentence of its error
};

struct RingSpec {
  std::vector<int64_t> images;  // indices into the RecordFile that take part
  std::vector<int32_t> labels;  // class of each of them, from 0
  int64_t batch = 64;
  uint64_t seed = 1;
  bool mirror = true;  // flip half of the images
  int crop = 0;        // shift by up to this many pixels each way: 0 to 56
  int threads = 1;     // decoders: 1 to 256, of low priority
  int slots = 4;       // batches held: 4 to 1024, two of them the consumer's
  int64_t skips = 0;   // damaged images that may be left out; 0: the first one is an error
  std::vector<int64_t> skipped;  // those known already, which count towards `skips`
};

// Epoch e (from 1) is the seeded permutation of RingSpec::images, floor(n / batch) batches; the
// rest is dropped. Mirror and shift depend on (seed, epoch, image) alone, image being the index in
// the RecordFile. Epochs follow each other without end.
//
// Where RingSpec::skips allows it, the row of a damaged image is given to the next sound image in
// the epoch's order (after the last comes the first), with that image's label and augmentation: a
// batch keeps its size and depends on the seed, the epoch and the file alone. Damaged means
// codes::kData; an operating system that refuses to read is an error as ever.
//
// next() throws a damaged image's error (file, key, byte, label) when the turn of its batch comes,
// and again at every further call until seek() goes past it; so it does, for good, when more images
// than RingSpec::skips turn out damaged. codes::kAborted when the ring is destroyed while it waits.
// next() and seek() are called from one thread; the destructor may be
// called from another.
class BatchRing : public BatchSource {
 public:
  // Throws codes::kInput for a setting out of range, codes::kData for fewer images than a batch.
  static std::unique_ptr<BatchRing> make(std::shared_ptr<const RecordFile> records, RingSpec spec,
                                         std::unique_ptr<HostAllocator> allocator);
  // The next batch given out is number `step` (from 0) of `epoch` (from 1).
  virtual void seek(int64_t epoch, int64_t step) = 0;
  virtual int64_t steps_per_epoch() const = 0;
  // Total time next() has waited for decoders, in milliseconds, the first batch's included; it does
  // not grow while input is not the bottleneck. May be asked from any thread.
  virtual double waited_ms() const = 0;
  // Images left out of the batches given out so far, each once, in the order of their rows; without
  // RingSpec::skipped. May be asked from any thread.
  virtual std::vector<SkippedImage> skipped() const = 0;
};

// What augmentation does to one image of an epoch: flips half of them where `mirror`, shifts by up
// to `crop` pixels each way.
Augmentation draw_augmentation(uint64_t seed, bool mirror, int crop, int64_t epoch, int64_t image);

// The order of one epoch: a permutation of 0..n-1 from (seed, epoch).
std::vector<int64_t> epoch_permutation(int64_t n, uint64_t seed, int64_t epoch);

}  // namespace hardmine
