// RecordIO files and JPEGs made for the tests, by a writer that shares no code with the reader.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <jpeglib.h>
#include <unistd.h>

#include "core/batch.h"
#include "core/random.h"
#include "test/native/temporary_folder.h"

namespace hardmine::test {

using ByteString = std::vector<uint8_t>;

// The folder of real data, or empty where there is none.
inline std::filesystem::path shared_faces() {
  const char* given = std::getenv("HARDMINE_SHARED");
  const std::filesystem::path root =
      given != nullptr ? std::filesystem::path(given)
                       : std::filesystem::path(__FILE__).parent_path() / "../../../shared";
  return std::filesystem::exists(root / "faces") ? root / "faces" : std::filesystem::path();
}

inline ByteString read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return ByteString(std::istreambuf_iterator<char>(file), {});
}

inline void write_file(const std::string& path, const void* data, size_t bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  if (!file) throw std::runtime_error("cannot write " + path);
}
inline void write_file(const std::string& path, const ByteString& data) {
  write_file(path, data.data(), data.size());
}
inline void write_file(const std::string& path, const std::string& data) {
  write_file(path, data.data(), data.size());
}

template <typename T>
void append(ByteString& to, T value) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

inline constexpr uint32_t kRecordMagic = 0xCED7230A;

// dmlc-core's RecordIOWriter::WriteRecord: cut at every aligned magic word.
inline void append_record(ByteString& rec, const ByteString& payload) {
  const auto chunk = [&](uint32_t part, size_t begin, size_t end) {
    append(rec, kRecordMagic);
    append(rec, static_cast<uint32_t>(part << 29 | (end - begin)));
    rec.insert(rec.end(), payload.begin() + static_cast<std::ptrdiff_t>(begin),
               payload.begin() + static_cast<std::ptrdiff_t>(end));
    while (rec.size() % 4 != 0) rec.push_back(0);
  };
  size_t begin = 0;
  for (size_t i = 0; i + 4 <= payload.size(); i += 4) {
    if (std::memcmp(&payload[i], &kRecordMagic, 4) != 0) continue;
    chunk(begin == 0 ? 1 : 2, begin, i);
    begin = i + 4;
  }
  chunk(begin == 0 ? 0 : 3, begin, payload.size());
}

// An image record's payload; more than one label is stored as an array.
inline ByteString image_payload(const std::vector<float>& labels, const ByteString& image,
                                uint64_t id = 0) {
  ByteString payload;
  const bool array = labels.size() > 1;
  append(payload, static_cast<uint32_t>(array ? labels.size() : 0));
  append(payload, array ? 0.0F : labels.at(0));
  append(payload, id);
  append(payload, uint64_t{0});
  if (array) {
    for (const float label : labels) append(payload, label);
  }
  payload.insert(payload.end(), image.begin(), image.end());
  return payload;
}

// A data set under construction: records in file order, index lines beside them.
struct RecordSet {
  ByteString rec;
  std::string idx;

  void add(uint64_t key, const ByteString& payload) {
    idx += std::to_string(key) + '\t' + std::to_string(rec.size()) + '\n';
    append_record(rec, payload);
  }
  std::pair<std::string, std::string> write(const TemporaryFolder& folder) const {
    write_file(folder / "train.rec", rec);
    write_file(folder / "train.idx", idx);
    return {folder / "train.rec", folder / "train.idx"};
  }
};

struct JpegOptions {
  int width = kImageSize, height = kImageSize;
  int components = 3;  // 1 grey, 3 RGB, 4 CMYK
  int quality = 95;
  bool progressive = false;
  bool one_scan_each = false;  // sequential, every component in a scan of its own
};

// A JPEG of `pixels` [height, width, components].
inline ByteString encode_jpeg(const ByteString& pixels, const JpegOptions& options) {
  jpeg_compress_struct info{};
  jpeg_error_mgr errors{};
  info.err = jpeg_std_error(&errors);
  jpeg_create_compress(&info);
  unsigned char* memory = nullptr;
  unsigned long bytes = 0;
  jpeg_mem_dest(&info, &memory, &bytes);
  info.image_width = static_cast<JDIMENSION>(options.width);
  info.image_height = static_cast<JDIMENSION>(options.height);
  info.input_components = options.components;
  info.in_color_space = options.components == 1   ? JCS_GRAYSCALE
                        : options.components == 3 ? JCS_RGB
                                                  : JCS_CMYK;
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, options.quality, TRUE);
  const jpeg_scan_info scans[3] = {
      {1, {0}, 0, 63, 0, 0}, {1, {1}, 0, 63, 0, 0}, {1, {2}, 0, 63, 0, 0}};
  if (options.progressive) jpeg_simple_progression(&info);
  if (options.one_scan_each) {
    info.scan_info = scans;
    info.num_scans = options.components;
  }
  jpeg_start_compress(&info, TRUE);
  const size_t stride =
      static_cast<size_t>(options.width) * static_cast<size_t>(options.components);
  while (info.next_scanline < info.image_height) {
    auto* row = const_cast<JSAMPROW>(&pixels[info.next_scanline * stride]);
    jpeg_write_scanlines(&info, &row, 1);
  }
  jpeg_finish_compress(&info);
  ByteString jpeg(memory, memory + bytes);
  jpeg_destroy_compress(&info);
  std::free(memory);
  return jpeg;
}

// Gradients with a little noise, different for every seed.
inline ByteString draw_pixels(uint64_t seed, const JpegOptions& options = {}) {
  ByteString pixels(static_cast<size_t>(options.width) * static_cast<size_t>(options.height) *
                    static_cast<size_t>(options.components));
  const uint64_t bits = random_bits(seed, 0, 0);
  size_t at = 0;
  for (int y = 0; y < options.height; ++y) {
    for (int x = 0; x < options.width; ++x) {
      for (int c = 0; c < options.components; ++c, ++at) {
        const auto slope = static_cast<int>(bits >> (8 * c) & 3);
        const auto noise = static_cast<int>(random_bits(seed, 1, at) & 15);
        pixels[at] = static_cast<uint8_t>((slope * x + (3 - slope) * y) / 3 + noise + 40 * c);
      }
    }
  }
  return pixels;
}

inline ByteString draw_jpeg(uint64_t seed, const JpegOptions& options = {}) {
  return encode_jpeg(draw_pixels(seed, options), options);
}

}  // namespace hardmine::test
