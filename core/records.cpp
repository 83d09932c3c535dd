#include "core/records.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <system_error>
#include <utility>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

#include "core/error.h"

namespace hardmine {
namespace {

static_assert(std::endian::native == std::endian::little, "RecordIO is read as it lies in memory");

using Bytes = std::span<const uint8_t>;

constexpr uint32_t kMagic = 0xCED7230A;
constexpr uint64_t kChunkHeaderBytes = 8;
constexpr uint64_t kImageHeaderBytes = 24;
constexpr uint32_t kLengthMask = (1U << 29) - 1;
// dmlc-core's writer refuses records of 2^29 bytes and more, in parts too.
constexpr uint64_t kMaxRecordBytes = kLengthMask;
constexpr float kFloatIntegers = 16777216;  // 2^24: float32 counts exactly up to here

constexpr char kCrcMagic[] = "HMCRC32C";
constexpr uint32_t kCrcVersion = 1;
constexpr uint64_t kCrcHeaderBytes = 16;

template <typename T>
T load(const uint8_t* from) {  // records are aligned to four bytes, their fields need not be
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::string hex(uint32_t value) {
  char digits[11] = "0x";
  for (int i = 0; i < 8; ++i) digits[2 + i] = "0123456789abcdef"[value >> (28 - 4 * i) & 15];
  return digits;
}

std::string number(float value) {
  char digits[32];
  return std::string(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
}

[[noreturn]] void refuse_io(const std::string& action, const std::string& path) {
  throw Error(codes::kIo, "Could not " + action + " " + path + ": " +
                              std::generic_category().message(errno) +
                              "; check that the path is right and may be read");
}

class MappedFile {
 public:
  explicit MappedFile(std::string path) : path_(std::move(path)) {
    // O_NONBLOCK: opening a pipe must fail below, not wait for a writer.
    descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor_ < 0) refuse_io("open", path_);
    try {
      map();
    } catch (...) {
      ::close(descriptor_);
      throw;
    }
  }
  ~MappedFile() {
    if (data_ != nullptr) ::munmap(data_, size_);
    ::close(descriptor_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }
  uint64_t size() const { return size_; }
  const std::string& path() const { return path_; }

  // Advice alone: a kernel that refuses it reads the same bytes, slower.
  void advise(int advice) const { ::madvise(data_, size_, advice); }

  // Reading a mapping beyond a file's end kills the process (SIGBUS), so a file that somebody cut
  // after it was opened is refused first.
  void check_size() const {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) refuse_io("read the size of", path_);
    if (static_cast<uint64_t>(status.st_size) < size_) {
      throw Error(codes::kData, path_ + " shrank from " + std::to_string(size_) + " to " +
                                    std::to_string(status.st_size) +
                                    " bytes while it was in use; restore it and start again");
    }
  }

 private:
  void map() {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) refuse_io("read the size of", path_);
    if (!S_ISREG(status.st_mode)) {
      throw Error(codes::kData, path_ + " is not a file; give the path of a RecordIO file");
    }
    size_ = static_cast<size_t>(status.st_size);
    if (size_ == 0) {
      throw Error(codes::kData, path_ + " is empty; copy it again or pack the data set again");
    }
    void* mapping = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
    if (mapping == MAP_FAILED) refuse_io("map", path_);
    data_ = mapping;
  }

  std::string path_;
  int descriptor_ = -1;
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct Entry {
  uint64_t key = 0;
  uint64_t offset = 0;
  int32_t label = -1;
  bool has_image = false;
};

bool by_key(const Entry& a, const Entry& b) {
  return a.key < b.key;
}
bool by_offset(const Entry& a, const Entry& b) {
  return a.offset < b.offset;
}

template <typename Less>
void sort_entries(std::vector<Entry>& entries, Less less) {
  // Most files are in both orders already, and millions of entries take half a second to sort.
  if (!std::is_sorted(entries.begin(), entries.end(), less)) {
    std::sort(entries.begin(), entries.end(), less);
  }
}

// The index in key order: text, one "key TAB offset" a line, in any order.
std::vector<Entry> read_index(const MappedFile& index, const MappedFile& rec) {
  const auto* at = reinterpret_cast<const char*>(index.data());
  const char* const end = at + index.size();
  // No record is shorter than its headers: what the file can hold bounds the memory taken here.
  const uint64_t most = std::min<uint64_t>(rec.size() / (kChunkHeaderBytes + kImageHeaderBytes),
                                           std::numeric_limits<int32_t>::max());
  const auto lines = static_cast<uint64_t>(std::count(at, end, '\n')) + 1;
  std::vector<Entry> entries;
  entries.reserve(std::min(lines, most));

  uint64_t line = 1;
  const auto refuse = [&](const char* found) {
    throw Error(codes::kData, "Line " + std::to_string(line) + " of " + index.path() + " " + found +
                                  "; every line is a key, a tab and a byte offset: copy the index "
                                  "again or pack the data set again");
  };
  const auto skip_blanks = [&] {
    while (at != end && (*at == ' ' || *at == '\t' || *at == '\r')) ++at;
  };
  const auto read_number = [&](const char* missing) {
    uint64_t value = 0;
    const auto [rest, status] = std::from_chars(at, end, value);
    if (status == std::errc::result_out_of_range) refuse("holds a number of more than 64 bits");
    if (status != std::errc{}) refuse(missing);
    at = rest;
    return value;
  };
  for (;; ++line) {
    skip_blanks();
    if (at == end) break;
    if (*at != '\n') {
      Entry entry;
      entry.key = read_number("does not start with a key");
      if (at != end && *at != ' ' && *at != '\t') refuse("has no tab after its key");
      skip_blanks();
      entry.offset = read_number("has no byte offset");
      skip_blanks();
      if (at != end && *at != '\n') refuse("goes on after its byte offset");
      if (entries.size() == most) {
        throw Error(codes::kData, index.path() + " lists more than " + std::to_string(most) +
                                      " records, the most that the " + std::to_string(rec.size()) +
                                      " bytes of " + rec.path() +
                                      " can hold; the .rec is cut short or the index belongs to "
                                      "another file: copy both again or pack the data set again");
      }
      entries.push_back(entry);
      if (at == end) break;
    }
    ++at;
  }
  if (entries.empty()) {
    throw Error(codes::kData,
                index.path() + " lists no record; copy it again or pack the data set again");
  }
  sort_entries(entries, by_key);
  const auto twin =
      std::adjacent_find(entries.begin(), entries.end(),
                         [](const Entry& a, const Entry& b) { return a.key == b.key; });
  if (twin != entries.end()) {
    throw Error(codes::kData, "Key " + std::to_string(twin->key) + " stands twice in " +
                                  index.path() + ", at bytes " + std::to_string(twin->offset) +
                                  " and " + std::to_string(std::next(twin)->offset) +
                                  "; every key must be unique: pack the data set again");
  }
  return entries;
}

// What the first bytes of a payload say.
struct ImageHeader {
  uint32_t flag = 0;         // labels in the array; 0: the label stands in the header
  float label = 0;           // the header's, or the array's first
  uint64_t image_begin = 0;  // byte of the payload at which the encoded image starts
};

class MappedRecords final : public RecordFile {
 public:
  MappedRecords(const std::string& rec_path, const std::string& idx_path) : rec_(rec_path) {
    const MappedFile index(idx_path);
    std::vector<Entry> entries = read_index(index, rec_);
    rec_.advise(MADV_SEQUENTIAL);
    select_images(entries, index.path());
    rec_.advise(MADV_RANDOM);
    read_checksums();
  }

  int64_t images() const override { return static_cast<int64_t>(keys_.size()); }
  std::span<const int32_t> labels() const override { return labels_; }
  std::span<const int64_t> offsets() const override { return offsets_; }
  std::span<const uint64_t> keys() const override { return keys_; }
  int64_t bytes() const override { return static_cast<int64_t>(rec_.size()); }
  const std::string& path() const override { return rec_.path(); }

  Bytes image(int64_t index, std::vector<uint8_t>& joined) const override {
    const Bytes record = payload(index, joined);
    const auto i = static_cast<size_t>(index);
    if (!checksums_.empty()) {
      const uint32_t found = crc32c(record);
      if (found != checksums_[i]) {
        throw Error(codes::kData, "The " + describe(index) + " is damaged: its CRC32C is " +
                                      hex(found) + ", " + checksums_path_ + " has " +
                                      hex(checksums_[i]) +
                                      "; copy the file again or pack the data set again");
      }
    }
    const ImageHeader header = read_header(record, record.size(), keys_[i], record_offset(i));
    return record.subspan(header.image_begin);
  }

  std::vector<uint32_t> payload_crcs() const override {
    std::vector<uint32_t> crcs;
    crcs.reserve(keys_.size());
    std::vector<uint8_t> joined;
    for (int64_t i = 0; i < images(); ++i) crcs.push_back(crc32c(payload(i, joined)));
    return crcs;
  }

 private:
  uint64_t record_offset(size_t index) const { return static_cast<uint64_t>(offsets_[index]); }

  [[noreturn]] void refuse(uint64_t key, uint64_t offset, const std::string& found) const {
    throw Error(codes::kData, "The record of key " + std::to_string(key) + " at byte " +
                                  std::to_string(offset) + " of " + rec_.path() + " " + found +
                                  "; copy the .rec and .idx again or pack the data set again");
  }

  [[noreturn]] void refuse_truncated(uint64_t key, uint64_t offset, uint64_t needed) const {
    refuse(key, offset,
           "is cut short: it needs the file's bytes up to " + std::to_string(needed) +
               ", but the file ends at byte " + std::to_string(rec_.size()));
  }

  // Calls piece(Bytes) for every stretch of the record's payload, in order, and returns the byte
  // after the record. The writer cuts a record at each aligned magic word in its payload and drops
  // the word; it is put back between the parts.
  template <typename Piece>
  uint64_t walk(uint64_t key, uint64_t offset, Piece&& piece) const {
    static constexpr uint32_t magic_word = kMagic;
    uint64_t at = offset;
    uint64_t total = 0;
    if (offset >= rec_.size()) {
      throw Error(codes::kData, "The index puts key " + std::to_string(key) + " at byte " +
                                    std::to_string(offset) + ", but " + rec_.path() + " has only " +
                                    std::to_string(rec_.size()) +
                                    " bytes: it is cut short or the index belongs to another "
                                    "file; copy both again or pack the data set again");
    }
    for (bool first = true;; first = false) {
      if (rec_.size() - at < kChunkHeaderBytes) {
        refuse_truncated(key, offset, at + kChunkHeaderBytes);
      }
      const auto magic = load<uint32_t>(rec_.data() + at);
      const auto word = load<uint32_t>(rec_.data() + at + 4);
      if (magic != kMagic) {
        refuse(key, offset,
               "has " + hex(magic) + " at byte " + std::to_string(at) +
                   ", expected the magic word " + hex(kMagic) +
                   (first ? " of a record" : " of its next part"));
      }
      const uint32_t part = word >> 29;  // 0 whole, 1 first, 2 middle, 3 last
      const uint64_t length = word & kLengthMask;
      if (part > 3 || (part < 2) != first) {
        refuse(key, offset,
               "holds part flag " + std::to_string(part) + " at byte " + std::to_string(at) +
                   ", expected " + (first ? "0 or 1" : "2 or 3"));
      }
      const uint64_t padded = (length + 3) & ~uint64_t{3};
      if (rec_.size() - at - kChunkHeaderBytes < padded) {
        refuse_truncated(key, offset, at + kChunkHeaderBytes + padded);
      }
      total += length + (first ? 0 : sizeof magic_word);
      if (total > kMaxRecordBytes) {
        refuse(key, offset, "is longer than " + std::to_string(kMaxRecordBytes) + " bytes");
      }
      if (!first) {
        piece(Bytes(reinterpret_cast<const uint8_t*>(&magic_word), sizeof magic_word));
      }
      piece(Bytes(rec_.data() + at + kChunkHeaderBytes, length));
      at += kChunkHeaderBytes + padded;
      if (part == 0 || part == 3) return at;
    }
  }

  // `start` holds the payload's first bytes, as far as the first label of an array.
  ImageHeader read_header(Bytes start, uint64_t payload_bytes, uint64_t key,
                          uint64_t offset) const {
    if (payload_bytes < kImageHeaderBytes) {
      refuse(
          key, offset,
          "has " + std::to_string(payload_bytes) + " bytes, fewer than the 24 of an image header");
    }
    ImageHeader header;
    header.flag = load<uint32_t>(start.data());
    header.image_begin = kImageHeaderBytes + uint64_t{header.flag} * sizeof(float);
    if (header.image_begin > payload_bytes) {
      refuse(key, offset,
             "announces " + std::to_string(header.flag) + " labels, more than its " +
                 std::to_string(payload_bytes) + " bytes can hold");
    }
    header.label = load<float>(start.data() + (header.flag > 0 ? kImageHeaderBytes : 4));
    return header;
  }

  struct Scanned {
    ImageHeader header;
    bool has_image = false;
    uint64_t end = 0;
  };

  // Touches the headers of the record's parts and the start of its payload, nothing else.
  Scanned scan(const Entry& entry) const {
    std::array<uint8_t, kImageHeaderBytes + sizeof(float)> start{};
    size_t filled = 0;
    uint64_t total = 0;
    Scanned scanned;
    scanned.end = walk(entry.key, entry.offset, [&](Bytes piece) {
      const size_t take = std::min(piece.size(), start.size() - filled);
      std::copy_n(piece.begin(), take, start.begin() + static_cast<std::ptrdiff_t>(filled));
      filled += take;
      total += piece.size();
    });
    scanned.header = read_header(start, total, entry.key, entry.offset);
    scanned.has_image = total > scanned.header.image_begin;
    return scanned;
  }

  // Checks every entry (in key order) against the file and keeps the images.
  void select_images(std::vector<Entry>& entries, const std::string& index_path) {
    // Record 0 of InsightFace's layout: no image, label[0] is one past the last image's key.
    float one_past = 0;
    if (entries.front().key == 0) {
      const Scanned zero = scan(entries.front());
      if (zero.header.flag > 0 && !zero.has_image) one_past = zero.header.label;
    }
    const bool insightface = one_past != 0;
    if (insightface &&
        !(one_past >= 2 && one_past <= 0x1p31F && one_past == std::trunc(one_past))) {
      refuse(0, entries.front().offset,
             "announces images up to key " + number(one_past) + " - 1, which is no key");
    }
    // A count above 2^24 was rounded to float32 when it was written.
    const uint64_t last_possible =
        insightface ? static_cast<uint64_t>(std::nextafter(one_past, 0x1p32F)) : 0;

    // In file order the disk is read once, forwards, and records that overlap meet.
    sort_entries(entries, by_offset);
    const Entry* previous = nullptr;
    uint64_t previous_end = 0;
    for (Entry& entry : entries) {
      if (entry.offset < previous_end) {
        refuse(entry.key, entry.offset,
               "lies inside that of key " + std::to_string(previous->key) +
                   ", which ends at byte " + std::to_string(previous_end));
      }
      const Scanned scanned = scan(entry);
      previous = &entry;
      previous_end = scanned.end;
      entry.has_image = scanned.has_image;
      if (!scanned.has_image || (insightface && entry.key > last_possible)) continue;
      const float label = scanned.header.label;
      if (!(label >= 0 && label < kFloatIntegers && label == std::trunc(label))) {
        refuse(entry.key, entry.offset,
               "has label " + number(label) + ", expected a whole number from 0 to 16777215");
      }
      entry.label = static_cast<int32_t>(label);
    }
    sort_entries(entries, by_key);

    size_t begin = 0;
    size_t end = entries.size();
    if (insightface) {
      begin = 1;
      uint64_t images = static_cast<uint64_t>(one_past) - 1;
      if (one_past > kFloatIntegers) {
        // The first record without an image is the first identity's.
        images = static_cast<uint64_t>(std::nextafter(one_past, 0.0F)) - 1;
        while (images + 1 < entries.size() && entries[images + 1].has_image &&
               static_cast<float>(images + 2) <= one_past) {
          ++images;
        }
      }
      end = std::min<uint64_t>(entries.size(), images + 1);
      for (size_t i = begin; i < images + 1; ++i) {
        if (i < entries.size() && entries[i].key == i) continue;
        throw Error(codes::kData, "Record 0 of " + rec_.path() + " announces images 1 to " +
                                      std::to_string(images) + ", but " + index_path +
                                      " has no key " + std::to_string(i) +
                                      "; copy the index again or pack the data set again");
      }
    }
    keys_.reserve(end - begin);
    offsets_.reserve(end - begin);
    labels_.reserve(end - begin);
    for (size_t i = begin; i < end; ++i) {
      if (!entries[i].has_image) refuse(entries[i].key, entries[i].offset, "holds no image");
      keys_.push_back(entries[i].key);
      offsets_.push_back(static_cast<int64_t>(entries[i].offset));
      labels_.push_back(entries[i].label);
    }
  }

  void read_checksums() {
    const std::string path = std::filesystem::path(rec_.path()).replace_extension(".crc").string();
    std::error_code status;
    if (!std::filesystem::exists(path, status) && !status) return;
    const MappedFile file(path);
    const uint64_t expected = kCrcHeaderBytes + keys_.size() * sizeof(uint32_t);
    if (file.size() < kCrcHeaderBytes || std::memcmp(file.data(), kCrcMagic, 8) != 0 ||
        load<uint32_t>(file.data() + 8) != kCrcVersion) {
      throw Error(codes::kData,
                  path +
                      " is not a list of checksums of version 1 (HMCRC32C); delete it or pack "
                      "the data set again");
    }
    if (file.size() != expected || load<uint32_t>(file.data() + 12) != keys_.size()) {
      throw Error(codes::kData,
                  path + " announces " + std::to_string(load<uint32_t>(file.data() + 12)) +
                      " checksums in " + std::to_string(file.size()) + " bytes, but " +
                      rec_.path() + " has " + std::to_string(keys_.size()) +
                      " images, which take " + std::to_string(expected) +
                      " bytes; it belongs to another file: delete it or pack the data set again");
    }
    checksums_.resize(keys_.size());
    std::memcpy(checksums_.data(), file.data() + kCrcHeaderBytes,
                checksums_.size() * sizeof(uint32_t));
    checksums_path_ = path;
  }

  // The record's payload: in the mapping, or put together in `joined`.
  Bytes payload(int64_t index, std::vector<uint8_t>& joined) const {
    if (index < 0 || index >= images()) {
      throw Error(codes::kInput, "Image " + std::to_string(index) +
                                     " does not exist: " + rec_.path() + " has images 0 to " +
                                     std::to_string(images() - 1));
    }
    rec_.check_size();
    const auto i = static_cast<size_t>(index);
    Bytes whole;
    bool in_parts = false;
    walk(keys_[i], record_offset(i), [&](Bytes piece) {
      if (whole.data() == nullptr) {
        whole = piece;
        return;
      }
      if (!in_parts) joined.assign(whole.begin(), whole.end());
      in_parts = true;
      joined.insert(joined.end(), piece.begin(), piece.end());
    });
    return in_parts ? Bytes(joined) : whole;
  }

  MappedFile rec_;
  std::vector<uint64_t> keys_;
  std::vector<int64_t> offsets_;
  std::vector<int32_t> labels_;
  std::vector<uint32_t> checksums_;  // empty: no NAME.crc
  std::string checksums_path_;
};

constexpr uint32_t kCastagnoli = 0x82F63B78;  // the polynomial, bits reversed

constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kCastagnoli : 0);
    table[byte] = crc;
  }
  return table;
}

#if defined(__x86_64__)
// Takes whole words from the front of `bytes` and leaves the rest.
__attribute__((target("sse4.2"))) uint32_t crc_of_words(uint32_t crc, Bytes& bytes) {
  uint64_t state = crc;
  while (bytes.size() >= 8) {
    state = _mm_crc32_u64(state, load<uint64_t>(bytes.data()));
    bytes = bytes.subspan(8);
  }
  return static_cast<uint32_t>(state);
}
#endif

}  // namespace

uint32_t RecordFile::crc32c(std::span<const uint8_t> bytes) {
  static constexpr std::array<uint32_t, 256> table = make_crc_table();
  uint32_t crc = ~0U;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) crc = crc_of_words(crc, bytes);
#endif
  for (const uint8_t byte : bytes) crc = (crc >> 8) ^ table[(crc ^ byte) & 255];
  return ~crc;
}

std::string RecordFile::describe(int64_t index) const {
  const auto i = static_cast<size_t>(index);
  return "image key " + std::to_string(keys()[i]) + " at byte " + std::to_string(offsets()[i]) +
         " of " + path() + " (label " + std::to_string(labels()[i]) + ")";
}

std::shared_ptr<const RecordFile> RecordFile::open(const std::string& rec_path,
                                                   const std::string& idx_path) {
  return std::make_shared<const MappedRecords>(rec_path, idx_path);
}

}  // namespace hardmine
