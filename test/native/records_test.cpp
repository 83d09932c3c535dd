#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "core/decode.h"
#include "core/error.h"
#include "core/random.h"
#include "core/records.h"
#include "test/native/record_files.h"

using namespace hardmine;
using namespace hardmine::test;

namespace {

std::shared_ptr<const RecordFile> open_set(const RecordSet& set, const TemporaryFolder& folder) {
  const auto [rec, idx] = set.write(folder);
  return RecordFile::open(rec, idx);
}

ByteString image_of(const RecordFile& records, int64_t index) {
  ByteString joined;
  const auto bytes = records.image(index, joined);
  return ByteString(bytes.begin(), bytes.end());
}

ByteString bytes_of(const std::string& text) {
  return ByteString(text.begin(), text.end());
}

ByteString first_bytes(const ByteString& whole, size_t bytes) {
  return ByteString(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(bytes));
}

// Runs f, which must throw an Error, and gives "CODE sentence".
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

// Five images with labels 10, 10, 11, 11, 12 in InsightFace's layout, every second one with an
// array.
RecordSet insightface_set() {
  RecordSet set;
  set.add(0, image_payload({6, 9}, {}));
  const float labels[] = {10, 10, 11, 11, 12};
  for (int i = 0; i < 5; ++i) {
    const ByteString image = bytes_of("image " + std::to_string(i + 1));
    set.add(i + 1, image_payload(i % 2 == 0 ? std::vector{labels[i]} : std::vector{labels[i], 7.5F},
                                 image, i + 1));
  }
  set.add(6, image_payload({1, 3}, {}));
  set.add(7, image_payload({3, 5}, {}));
  set.add(8, image_payload({5, 6}, {}));
  return set;
}

}  // namespace

TEST_CASE("crc32c: published vectors, and a bitwise reference at every alignment") {
  const ByteString digits = bytes_of("123456789");
  CHECK(RecordFile::crc32c(digits) == 0xE3069283);
  ByteString data(32, 0);
  CHECK(RecordFile::crc32c(data) == 0x8A9136AA);  // RFC 3720, B.4
  data.assign(32, 0xFF);
  CHECK(RecordFile::crc32c(data) == 0x62A8AB43);
  for (size_t i = 0; i < 32; ++i) data[i] = static_cast<uint8_t>(i);
  CHECK(RecordFile::crc32c(data) == 0x46DD794E);

  ByteString noise(100);
  for (size_t i = 0; i < noise.size(); ++i) noise[i] = static_cast<uint8_t>(random_bits(1, 2, i));
  for (size_t begin = 0; begin < 9; ++begin) {
    for (size_t size = 0; size + begin <= noise.size(); ++size) {
      const std::span<const uint8_t> part(noise.data() + begin, size);
      uint32_t crc = ~0U;
      for (const uint8_t byte : part) {
        crc ^= byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0x82F63B78 & (0 - (crc & 1)));
      }
      REQUIRE(RecordFile::crc32c(part) == ~crc);
    }
  }
}

TEST_CASE("records: im2rec's layout, index not in file order") {
  const TemporaryFolder folder;
  RecordSet set;
  for (const int key : {3, 0, 4, 1, 2}) {
    set.add(key,
            image_payload({static_cast<float>(key / 2)}, bytes_of("image " + std::to_string(key))));
  }
  const auto records = open_set(set, folder);
  REQUIRE(records->images() == 5);
  CHECK(records->bytes() == static_cast<int64_t>(set.rec.size()));
  CHECK(records->path() == folder / "train.rec");
  for (int i = 0; i < 5; ++i) {
    CHECK(records->keys()[i] == static_cast<uint64_t>(i));
    CHECK(records->labels()[i] == i / 2);
    CHECK(image_of(*records, i) == bytes_of("image " + std::to_string(i)));
  }
  CHECK(records->offsets()[3] == 0);
  check_contains(records->describe(3), {"image key 3 at byte 0 of", "train.rec (label 1)"});
  check_contains(error_of([&] { image_of(*records, 5); }), {codes::kInput, "images 0 to 4"});
  check_contains(error_of([&] { image_of(*records, -1); }), {codes::kInput});
}

TEST_CASE("records: InsightFace's layout leaves the identity records out") {
  const TemporaryFolder folder;
  const auto records = open_set(insightface_set(), folder);
  REQUIRE(records->images() == 5);
  const int32_t labels[] = {10, 10, 11, 11, 12};
  for (int i = 0; i < 5; ++i) {
    CHECK(records->keys()[i] == static_cast<uint64_t>(i + 1));
    CHECK(records->labels()[i] == labels[i]);
    CHECK(image_of(*records, i) == bytes_of("image " + std::to_string(i + 1)));
  }
}

TEST_CASE("records: an image with an array label under key 0 is an image, not a header") {
  const TemporaryFolder folder;
  RecordSet set;
  set.add(0, image_payload({4, 1}, bytes_of("first")));
  set.add(1, image_payload({5, 1}, bytes_of("second")));
  const auto records = open_set(set, folder);
  REQUIRE(records->images() == 2);
  CHECK(records->labels()[0] == 4);
  CHECK(image_of(*records, 0) == bytes_of("first"));
}

TEST_CASE("records: payloads that hold the magic word are put together again") {
  const TemporaryFolder folder;
  ByteString magic;
  append(magic, kRecordMagic);
  const auto join = [](std::initializer_list<ByteString> pieces) {
    ByteString all;
    for (const ByteString& piece : pieces) all.insert(all.end(), piece.begin(), piece.end());
    return all;
  };
  const std::vector<ByteString> images = {
      join({magic, bytes_of("after")}),                       // the first word of the image
      join({bytes_of("four"), magic}),                        // the last
      join({bytes_of("four"), magic, magic, bytes_of("x")}),  // two in a row: an empty middle part
      join({bytes_of("odd"), magic, bytes_of("unaligned")}),  // not cut by the writer
      join({magic, magic, magic}),
  };
  RecordSet set;
  for (size_t i = 0; i < images.size(); ++i) {
    // Identifiers equal to the magic word cut the image header itself.
    const uint64_t id = i % 2 == 0 ? 7 : kRecordMagic;
    set.add(i, image_payload({static_cast<float>(i), 1}, images[i], id));
  }
  const auto records = open_set(set, folder);
  REQUIRE(records->images() == static_cast<int64_t>(images.size()));
  for (size_t i = 0; i < images.size(); ++i) {
    CHECK(image_of(*records, static_cast<int64_t>(i)) == images[i]);
    CHECK(records->labels()[i] == static_cast<int32_t>(i));
  }
  const auto crcs = records->payload_crcs();
  REQUIRE(crcs.size() == images.size());
  CHECK(crcs[2] == RecordFile::crc32c(image_payload({2, 1}, images[2], 7)));
}

TEST_CASE("records: what an index may look like") {
  const TemporaryFolder folder;
  RecordSet set = insightface_set();
  const auto reread = [&](const std::string& idx) {
    set.idx = idx;
    return open_set(set, folder)->images();
  };
  const std::string idx = set.idx;
  CHECK(reread(idx.substr(0, idx.size() - 1)) == 5);  // no newline at the end
  CHECK(reread("\n" + idx + "\n  \n") == 5);
  std::string windows;
  std::string spaces;
  for (const char c : idx) {
    windows += c == '\n' ? std::string("\r\n") : std::string(1, c);
    spaces += c == '\t' ? ' ' : c;
  }
  CHECK(reread(windows) == 5);
  CHECK(reread(spaces) == 5);
}

TEST_CASE("records: labels are whole numbers from 0 to 2^24 - 1") {
  const TemporaryFolder folder;
  const auto open_label = [&](float label) {
    RecordSet set;
    set.add(0, image_payload({0}, bytes_of("a")));
    set.add(1, image_payload({label}, bytes_of("b")));
    set.add(2, image_payload({label, 0}, bytes_of("c")));
    return open_set(set, folder);
  };
  CHECK(open_label(16777215)->labels()[2] == 16777215);
  CHECK(open_label(-0.0F)->labels()[1] == 0);
  for (const float label :
       {-1.0F, 0.5F, 16777216.0F, 1e30F, -1e30F, std::numeric_limits<float>::quiet_NaN(),
        std::numeric_limits<float>::infinity()}) {
    check_contains(error_of([&] { open_label(label); }),
                   {codes::kData, "key 1 at byte 36", "has label", "0 to 16777215"});
  }
}

TEST_CASE("records: damaged files, each with a sentence that says what, where and how to mend it") {
  struct Case {
    std::string name;
    std::function<void(RecordSet&)> damage;
    std::vector<std::string> expected;
  };
  const auto set_u32 = [](RecordSet& set, size_t at, uint32_t value) {
    std::memcpy(&set.rec[at], &value, 4);
  };
  const auto set_f32 = [](RecordSet& set, size_t at, float value) {
    std::memcpy(&set.rec[at], &value, 4);
  };
  // Record 0 takes bytes 0 to 39 and record 1 ("image 1", scalar label) 40 to 79.
  const std::vector<Case> cases = {
      {"empty .rec", [](RecordSet& s) { s.rec.clear(); }, {"train.rec is empty", "again"}},
      {"empty .idx", [](RecordSet& s) { s.idx.clear(); }, {"train.idx is empty"}},
      {"blank .idx", [](RecordSet& s) { s.idx = "\n \n"; }, {"lists no record"}},
      {"text as .idx", [](RecordSet& s) { s.idx = "hello\n"; }, {"Line 1 of", "a key, a tab"}},
      {"no offset", [](RecordSet& s) { s.idx += "9\t\n"; }, {"Line 10 of", "no byte offset"}},
      {"no tab", [](RecordSet& s) { s.idx += "9,1"; }, {"Line 10 of", "no tab"}},
      {"a third column", [](RecordSet& s) { s.idx += "9\t1\t2"; }, {"Line 10", "goes on"}},
      {"negative offset", [](RecordSet& s) { s.idx += "9\t-4"; }, {"Line 10", "no byte offset"}},
      {"fraction", [](RecordSet& s) { s.idx += "9\t4.5"; }, {"Line 10", "goes on"}},
      {"overflow",
       [](RecordSet& s) { s.idx += "9\t18446744073709551616"; },
       {"Line 10", "64 bits"}},
      {"NUL bytes", [](RecordSet& s) { s.idx = std::string(64, '\0'); }, {"Line 1 of"}},
      {"duplicate key", [](RecordSet& s) { s.idx += "3\t40"; }, {"Key 3 stands twice", "40"}},
      {"offset twice", [](RecordSet& s) { s.idx += "9\t40"; }, {"lies inside that of key"}},
      {"offset at the end",
       [](RecordSet& s) { s.idx += "9\t" + std::to_string(s.rec.size()); },
       {"key 9 at byte", "has only", "cut short or the index belongs to another"}},
      {"offset far outside",
       [](RecordSet& s) { s.idx += "9\t18446744073709551615"; },
       {"key 9 at byte 18446744073709551615", "has only"}},
      {"offset in a record", [](RecordSet& s) { s.idx += "9\t44"; }, {"lies inside that of key 1"}},
      {"offset beside a record",
       [](RecordSet& s) { s.idx = "0\t0\n1\t44\n"; },
       {"key 1 at byte 44", "has 0x0000001f", "expected the magic word 0xced7230a"}},
      {"more lines than records fit",
       [](RecordSet& s) {
         for (int i = 0; i < 1000; ++i) s.idx += std::to_string(100 + i) + "\t0\n";
       },
       {"lists more than", "can hold"}},
      {"magic word",
       [&](RecordSet& s) { set_u32(s, 40, 0x3ED7230A); },
       {"key 1 at byte 40", "0x3ed7230a", "0xced7230a"}},
      {"starts in mid-record",
       [&](RecordSet& s) { set_u32(s, 44, 2U << 29 | 31); },
       {"part flag 2", "expected 0 or 1"}},
      {"unknown part flag", [&](RecordSet& s) { set_u32(s, 44, 5U << 29 | 31); }, {"part flag 5"}},
      {"a first part without a last",
       [&](RecordSet& s) { set_u32(s, 44, 1U << 29 | 31); },
       {"part flag 0 at byte 80", "expected 2 or 3"}},
      {"length beyond the file",
       [&](RecordSet& s) { set_u32(s, 44, 5000); },
       {"key 1 at byte 40", "cut short", "up to 5048", "ends at byte "}},
      {"length into the next record",
       [&](RecordSet& s) { set_u32(s, 44, 60); },
       {"key 2 at byte 80", "lies inside that of key 1", "108"}},
      {"shorter than its header", [&](RecordSet& s) { set_u32(s, 44, 20); }, {"fewer than the 24"}},
      {"more labels than bytes",
       [&](RecordSet& s) { set_u32(s, 48, 1U << 30); },
       {"announces 1073741824 labels"}},
      {"no image", [&](RecordSet& s) { set_u32(s, 44, 24); }, {"key 1", "holds no image"}},
      {"record 0 counts too many",
       [&](RecordSet& s) { set_f32(s, 32, 8); },
       {"key 6", "holds no image"}},
      {"record 0 counts beyond the index",
       [&](RecordSet& s) { set_f32(s, 32, 12); },
       {"announces images 1 to 11", "has no key 9"}},
      {"record 0 counts NaN", [&](RecordSet& s) { set_f32(s, 32, NAN); }, {"key 0", "nan"}},
      {"record 0 counts below zero", [&](RecordSet& s) { set_f32(s, 32, -3); }, {"-3 - 1"}},
      {"record 0 counts no image", [&](RecordSet& s) { set_f32(s, 32, 1); }, {"which is no key"}},
      {"a key missing",
       [](RecordSet& s) { s.idx.erase(s.idx.find("3\t"), s.idx.find("4\t") - s.idx.find("3\t")); },
       {"announces images 1 to 5", "has no key 3"}},
  };
  for (const Case& c : cases) {
    CAPTURE(c.name);
    const TemporaryFolder folder;
    RecordSet set = insightface_set();
    c.damage(set);
    const std::string error = error_of([&] { open_set(set, folder); });
    CHECK(error.substr(0, 8) == codes::kData);
    check_contains(error, c.expected);
    check_contains(error, {"; "});  // the mend follows
  }
}

TEST_CASE("records: paths that are no files") {
  const TemporaryFolder folder;
  const auto [rec, idx] = insightface_set().write(folder);
  check_contains(error_of([&] { RecordFile::open(folder / "none.rec", idx); }),
                 {codes::kIo, "none.rec", "No such file"});
  check_contains(error_of([&] { RecordFile::open(rec, folder / "none.idx"); }),
                 {codes::kIo, "none.idx"});
  check_contains(error_of([&] { RecordFile::open(folder / ".", idx); }),
                 {codes::kData, "not a file"});
  const std::string pipe = folder / "pipe.rec";
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  check_contains(error_of([&] { RecordFile::open(pipe, idx); }), {codes::kData, "not a file"});
}

TEST_CASE("records: a .rec cut at any byte is refused") {
  const TemporaryFolder folder;
  const RecordSet whole = insightface_set();
  for (size_t bytes = 0; bytes < whole.rec.size(); ++bytes) {
    RecordSet cut = whole;
    cut.rec = first_bytes(whole.rec, bytes);
    const std::string error = error_of([&] { open_set(cut, folder); });
    CAPTURE(bytes);
    REQUIRE(error.substr(0, 8) == codes::kData);
  }
}

TEST_CASE("records: a file cut after it was opened is refused, not read") {
  const TemporaryFolder folder;
  const auto records = open_set(insightface_set(), folder);
  CHECK_NOTHROW(image_of(*records, 4));
  std::filesystem::resize_file(folder / "train.rec", 60);
  check_contains(error_of([&] { image_of(*records, 4); }), {codes::kData, "shrank from", "to 60"});
}

TEST_CASE("records: NAME.crc is checked at every read") {
  const TemporaryFolder folder;
  RecordSet set = insightface_set();
  const auto crcs = open_set(set, folder)->payload_crcs();
  const auto write_crcs = [&](const char* magic, uint32_t version, uint32_t count) {
    ByteString file(magic, magic + 8);
    append(file, version);
    append(file, count);
    for (const uint32_t crc : crcs) append(file, crc);
    write_file(folder / "train.crc", file);
  };
  write_crcs("HMCRC32C", 1, 5);
  CHECK(image_of(*open_set(set, folder), 0) == bytes_of("image 1"));

  SUBCASE("every flipped bit of a record's payload is found") {
    const size_t begin = 80 + 8;  // record 2's payload: image header, two labels, "image 2"
    for (size_t bit = 0; bit < 8 * (24 + 8 + 7); ++bit) {
      RecordSet damaged = set;
      damaged.rec[begin + bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
      const std::string error = error_of([&] {
        const auto records = open_set(damaged, folder);
        CHECK_NOTHROW(image_of(*records, 0));  // its neighbours are well
        CHECK_NOTHROW(image_of(*records, 2));
        image_of(*records, 1);
      });
      CAPTURE(bit);
      REQUIRE(error.substr(0, 8) == codes::kData);
      // Flags and labels may be refused sooner, at open.
      if (bit / 8 >= 32) check_contains(error, {"key 2 at byte 80", "CRC32C", "train.crc"});
    }
  }
  SUBCASE("a list of another file is refused") {
    write_crcs("HMCRC32C", 1, 6);
    check_contains(error_of([&] { open_set(set, folder); }),
                   {codes::kData, "announces 6 checksums", "has 5 images", "delete it"});
    write_crcs("HMCRC32C", 2, 5);
    check_contains(error_of([&] { open_set(set, folder); }), {codes::kData, "version 1"});
    write_crcs("CRC32C  ", 1, 5);
    check_contains(error_of([&] { open_set(set, folder); }), {codes::kData, "version 1"});
    write_file(folder / "train.crc", std::string("HMCRC"));
    check_contains(error_of([&] { open_set(set, folder); }), {codes::kData, "version 1"});
  }
}

TEST_CASE("records: mutated files raise nothing but Error") {
  const TemporaryFolder folder;
  RecordSet whole = insightface_set();
  ByteString magic_image;
  for (int i = 0; i < 3; ++i) append(magic_image, kRecordMagic);
  whole.add(9, image_payload({1}, magic_image));  // not an image of this layout, but checked
  const uint64_t interesting[] = {0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, kRecordMagic, 1U << 29};
  int opened = 0;
  constexpr int kRounds = 4000;
  for (int round = 0; round < kRounds; ++round) {
    RecordSet set = whole;
    uint64_t draws = 0;
    const auto draw = [&](uint64_t bound) {
      return random_below(random_bits(7, static_cast<uint64_t>(round), draws++), bound);
    };
    for (uint64_t n = 1 + draw(3); n > 0; --n) {
      switch (draw(6)) {
        case 0:
          set.rec[draw(set.rec.size())] ^= static_cast<uint8_t>(1 << draw(8));
          break;
        case 1: {
          const auto word = static_cast<uint32_t>(interesting[draw(std::size(interesting))]);
          std::memcpy(&set.rec[4 * draw(set.rec.size() / 4)], &word, 4);
          break;
        }
        case 2:
          set.rec = first_bytes(set.rec, 4 + draw(set.rec.size() - 4));
          break;
        case 3:
          set.idx[draw(set.idx.size())] = static_cast<char>(draw(256));
          break;
        case 4:
          set.idx[draw(set.idx.size())] = "0123456789\t\n"[draw(12)];
          break;
        default:
          set.idx.resize(1 + draw(set.idx.size()));
          break;
      }
    }
    try {
      const auto records = open_set(set, folder);
      ++opened;
      for (int64_t i = 0; i < records->images(); ++i) image_of(*records, i);
      records->payload_crcs();
    } catch (const Error& error) {
      REQUIRE(std::string(error.what()).find("; ") != std::string::npos);
    }
  }
  // Damage to an image's bytes or to identity labels goes unseen without NAME.crc; most is found.
  CHECK(opened > 0);
  CHECK(opened < kRounds / 2);
}

TEST_CASE("records: packs written by independent programs") {
  const std::filesystem::path faces = shared_faces();
  if (faces.empty()) {
    MESSAGE("SKIPPED: no folder shared/faces beside the repository (HARDMINE_SHARED)");
    return;
  }
  const std::filesystem::path interop = faces / "interop";
  const auto open_pack = [&](const char* name) {
    return RecordFile::open((interop / name / "train.rec").string(),
                            (interop / name / "train.idx").string());
  };
  SUBCASE("InsightFace's and im2rec's hold the same 613 images of 25 identities") {
    const auto a = open_pack("insightface_rec");
    const auto b = open_pack("im2rec");
    REQUIRE(a->images() == 613);
    REQUIRE(b->images() == 613);
    CHECK(std::ranges::equal(a->labels(), b->labels()));
    CHECK(std::set<int32_t>(a->labels().begin(), a->labels().end()).size() == 25);
    ByteString pixels(kImageBytes);
    for (int64_t i = 0; i < 613; ++i) {
      CHECK(a->keys()[i] == b->keys()[i] + 1);
      const ByteString jpeg = image_of(*a, i);
      REQUIRE(jpeg == image_of(*b, i));
      decode_jpeg(jpeg, a->describe(i), pixels.data());
    }
  }
  SUBCASE("a record in parts") {
    const auto records = open_pack("split_record");
    REQUIRE(records->images() == 2);
    const ByteString payload = read_file(interop / "split_record/payload1.bin");
    CHECK(image_of(*records, 1) == ByteString(payload.begin() + 24, payload.end()));
    CHECK(records->payload_crcs()[1] == RecordFile::crc32c(payload));
  }
}

namespace {

ByteString decode(const ByteString& jpeg) {
  ByteString pixels(kImageBytes);
  decode_jpeg(jpeg, "test image", pixels.data());
  return pixels;
}

}  // namespace

TEST_CASE("jpeg: pixels come out as RGB, row by row") {
  ByteString pixels(kImageBytes);
  for (size_t y = 0; y < 112; ++y) {
    for (size_t x = 0; x < 112; ++x) {
      uint8_t* pixel = &pixels[3 * (112 * y + x)];
      // Red, green, blue and white quarters: an exchange of channels, rows or columns shows.
      pixel[0] = y < 56 ? (x < 56 ? 255 : 0) : (x < 56 ? 0 : 255);
      pixel[1] = y < 56 ? (x < 56 ? 0 : 255) : (x < 56 ? 0 : 255);
      pixel[2] = y < 56 ? 0 : 255;
    }
  }
  JpegOptions options;
  options.quality = 100;
  const ByteString decoded = decode(encode_jpeg(pixels, options));
  for (const size_t y : {8, 100}) {
    for (const size_t x : {8, 100}) {
      for (size_t c = 0; c < 3; ++c) {
        const size_t at = 3 * (112 * y + x) + c;
        // Flat areas away from the edges at quality 100: only the colour conversion rounds, by up
        // to one level each way.
        CHECK(std::abs(decoded[at] - pixels[at]) <= 2);
      }
    }
  }
}

TEST_CASE("jpeg: grey is expanded, progressive is the same picture, CMYK is refused") {
  JpegOptions grey;
  grey.components = 1;
  const ByteString decoded = decode(draw_jpeg(3, grey));
  for (size_t i = 0; i < decoded.size(); i += 3) {
    REQUIRE(decoded[i] == decoded[i + 1]);
    REQUIRE(decoded[i] == decoded[i + 2]);
  }
  CHECK(read_jpeg_info(draw_jpeg(3, grey), "x").components == 1);
  JpegOptions progressive;
  progressive.progressive = true;
  CHECK(decode(draw_jpeg(4, progressive)) == decode(draw_jpeg(4)));
  JpegOptions cmyk;
  cmyk.components = 4;
  check_contains(error_of([&] { decode(draw_jpeg(5, cmyk)); }),
                 {codes::kData, "test image", "4 colour components", "`hardmine pack`"});
}

TEST_CASE("jpeg: only 112x112 is decoded") {
  for (const auto& [width, height] : {std::pair{111, 112}, {112, 113}, {224, 224}, {1, 1}}) {
    JpegOptions options;
    options.width = width;
    options.height = height;
    const ByteString jpeg = draw_jpeg(1, options);
    check_contains(error_of([&] { decode(jpeg); }),
                   {codes::kData, std::to_string(width) + "x" + std::to_string(height),
                    "expected 112x112", "`hardmine align`"});
    const JpegInfo info = read_jpeg_info(jpeg, "x");
    CHECK(info.width == width);
    CHECK(info.height == height);
    CHECK(info.components == 3);
  }
}

TEST_CASE("jpeg: other formats are named") {
  const std::vector<std::pair<std::string, std::string>> files = {
      {"", "is empty"},
      {"\x89PNG\r\n\x1a\n....", "is a PNG"},
      {"GIF89a", "is a GIF"},
      {std::string("RIFF\0\0\0\0WEBPVP8 ", 16), "is a WebP"},
      {"BM....", "is a BMP"},
      {std::string("II*\0....", 8), "is a TIFF"},
      {std::string("\0\0\0 ftypavif", 12), "is an AVIF or HEIC"},
      {"Not an image at all.\n", "is text"},
      {"caf\xc3\xa9", "is text"},
      {std::string("\x01\x02\x03\x04", 4), "none of the formats known"},
      {"\xff\xd8", "none of the formats known"},
  };
  for (const auto& [content, expected] : files) {
    for (const bool whole : {false, true}) {
      const std::string error = error_of([&] {
        whole ? void(decode(bytes_of(content)))
              : void(read_jpeg_info(bytes_of(content), "test image"));
      });
      check_contains(error,
                     {codes::kData, "test image", "not a JPEG", expected, "`hardmine pack`"});
    }
  }
}

TEST_CASE("jpeg: a header of absurd size is refused without the memory") {
  ByteString jpeg = draw_jpeg(1);
  size_t frame = 0;
  while (jpeg[frame] != 0xFF || jpeg[frame + 1] != 0xC0) ++frame;
  for (size_t i = 5; i < 9; ++i) jpeg[frame + i] = 0xFF;  // 65535 x 65535
  CHECK(error_of([&] { read_jpeg_info(jpeg, "x"); }).substr(0, 8) == codes::kData);
  CHECK(error_of([&] { decode(jpeg); }).substr(0, 8) == codes::kData);
  for (const size_t i : {5, 7}) jpeg[frame + i] = 0x80, jpeg[frame + i + 1] = 0;  // 32768 x 32768
  check_contains(error_of([&] { read_jpeg_info(jpeg, "x"); }), {"32768x32768", "16 megapixels"});
  check_contains(error_of([&] { decode(jpeg); }), {"32768x32768"});
}

TEST_CASE(
    "jpeg: a truncated image is refused at every length, damage never does worse than Error") {
  for (const bool progressive : {false, true}) {
    JpegOptions options;
    options.progressive = progressive;
    const ByteString jpeg = draw_jpeg(2, options);
    for (size_t bytes = 0; bytes < jpeg.size(); ++bytes) {
      CAPTURE(bytes);
      const ByteString cut = first_bytes(jpeg, bytes);
      REQUIRE(error_of([&] { decode(cut); }).substr(0, 8) == codes::kData);
    }
    int refused = 0;
    constexpr int kRounds = 1500;
    for (uint64_t round = 0; round < kRounds; ++round) {
      ByteString damaged = jpeg;
      damaged[random_below(random_bits(3, round, 0), jpeg.size())] ^=
          static_cast<uint8_t>(1 << random_below(random_bits(3, round, 1), 8));
      try {
        decode(damaged);
      } catch (const Error&) {
        ++refused;
      }
    }
    CHECK(refused > 0);
    CHECK(refused < kRounds);  // most flips only change pixels: that is what NAME.crc is for
  }
}

TEST_CASE("jpeg: what libjpeg only warns of is an error") {
  ByteString jpeg = draw_jpeg(6);
  // Bytes that belong to nothing, before the end marker.
  jpeg.insert(jpeg.end() - 2, {1, 2, 3, 4, 5, 6, 7, 8});
  check_contains(error_of([&] { decode(jpeg); }),
                 {codes::kData, "damaged JPEG", "extraneous bytes", "replace the image"});
}

TEST_CASE("jpeg: a file of endless scans is refused") {
  JpegOptions options;
  options.one_scan_each = true;
  ByteString jpeg = draw_jpeg(6, options);
  CHECK(decode(jpeg).size() == kImageBytes);
  size_t scan = jpeg.size();  // the last scan's marker
  while (jpeg[scan - 2] != 0xFF || jpeg[scan - 1] != 0xDA) --scan;
  const ByteString last(jpeg.begin() + static_cast<std::ptrdiff_t>(scan) - 2, jpeg.end() - 2);
  jpeg = first_bytes(jpeg, jpeg.size() - 2);
  for (int i = 0; i < 600; ++i) jpeg.insert(jpeg.end(), last.begin(), last.end());
  jpeg.insert(jpeg.end(), {0xFF, 0xD9});
  check_contains(error_of([&] { decode(jpeg); }), {codes::kData, "more than 500 scans"});
}
