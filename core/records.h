// MXNet RecordIO files (.rec with .idx), memory-mapped and read by MXNet's own rules: both layouts
// (InsightFace's with identity records, im2rec's without), records stored in parts, labels as
// arrays. Format: u32 magic 0xCED7230A, u32 cflag << 29 | length, payload padded to four bytes; an
// image payload is u32 flag, f32 label, u64 id, u64 id2, then `flag` f32 labels, then the JPEG.
//
// NAME.crc beside NAME.rec (written by `hardmine pack`) guards the payloads: the eight bytes
// "HMCRC32C", u32 version 1, u32 count, then one u32 CRC32C per image in key order, little-endian.
// Where it exists every read is checked against it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace hardmine {

class RecordFile {
 public:
  // Maps the file, checks every index entry against it and reads every image's label. Throws
  // codes::kData (what is damaged, at which byte, how to mend it) or codes::kIo.
  static std::shared_ptr<const RecordFile> open(const std::string& rec_path,
                                                const std::string& idx_path);
  // CRC32C (Castagnoli; RFC 3720, appendix B.4) of `bytes`.
  static uint32_t crc32c(std::span<const uint8_t> bytes);

  virtual ~RecordFile() = default;

  virtual int64_t images() const = 0;                    // in key order, identity records left out
  virtual std::span<const int32_t> labels() const = 0;   // [images]; an array's first element
  virtual std::span<const int64_t> offsets() const = 0;  // [images] byte offset in the .rec
  virtual std::span<const uint64_t> keys() const = 0;    // [images] key in the .idx
  virtual int64_t bytes() const = 0;                     // of the .rec
  virtual const std::string& path() const = 0;
  // The encoded image (JPEG bytes). `joined` holds it when the record was stored in parts; else the
  // span points into the mapping. Any number of threads may call it, each with its own `joined`.
  // Throws codes::kData.
  virtual std::span<const uint8_t> image(int64_t index, std::vector<uint8_t>& joined) const = 0;
  // [images] CRC32C of each image record's payload as it is now: the contents of NAME.crc.
  virtual std::vector<uint32_t> payload_crcs() const = 0;

  // An image's name in messages: "image key 17 at byte 62644 of train.rec (label 3)".
  std::string describe(int64_t index) const;
};

}  // namespace hardmine
