#include <csetjmp>
#include <cstddef>
#include <cstdio>  // jpeglib.h needs FILE and does not include it
#include <string_view>

#include <jpeglib.h>

#include "core/decode.h"
#include "core/error.h"

namespace hardmine {
namespace {

// A 112x112 progressive file needs ten scans; libjpeg-turbo's own fuzzers stop at 500, because a
// small file of many scans takes minutes.
constexpr int kMaxScans = 500;
constexpr int64_t kMaxPixels = int64_t{4096} * 4096;  // 16 MP: the largest image any command reads

// libjpeg reports errors by longjmp, which must not skip a C++ object: everything alive between
// setjmp and longjmp lies in here and is plain data.
struct Reading {
  jpeg_error_mgr errors;  // first: libjpeg hands its address back
  std::jmp_buf escape;
  char message[JMSG_LENGTH_MAX];
  jpeg_progress_mgr progress;
  jpeg_decompress_struct info;
  JSAMPROW rows[kImageSize];
  JpegInfo header;
};

[[noreturn]] void fail(j_common_ptr info) {
  auto* reading = reinterpret_cast<Reading*>(info->err);
  info->err->format_message(info, reading->message);
  std::longjmp(reading->escape, 1);
}

// Levels below 0 are warnings: libjpeg fills damaged data with grey and goes on; we do not.
void on_message(j_common_ptr info, int level) {
  if (level < 0) fail(info);
}

void on_progress(j_common_ptr info) {
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > kMaxScans) {
    auto* reading = reinterpret_cast<Reading*>(info->err);
    std::snprintf(reading->message, sizeof reading->message, "more than %d scans", kMaxScans);
    std::longjmp(reading->escape, 1);
  }
}

bool decodable(const JpegInfo& header) {
  return header.width == kImageSize && header.height == kImageSize &&
         (header.components == 1 || header.components == 3);
}

// Reads the header, and the pixels where they are wanted and decodable. False: see message.
bool read(Reading& reading, std::span<const uint8_t> jpeg, uint8_t* pixels) {
  jpeg_decompress_struct& info = reading.info;
  info.err = jpeg_std_error(&reading.errors);
  reading.errors.error_exit = fail;
  reading.errors.emit_message = on_message;
  reading.progress.progress_monitor = on_progress;
  if (setjmp(reading.escape) != 0) {
    jpeg_destroy_decompress(&info);
    return false;
  }
  jpeg_create_decompress(&info);
  info.progress = &reading.progress;
  jpeg_mem_src(&info, jpeg.data(), jpeg.size());
  jpeg_read_header(&info, TRUE);
  reading.header = {static_cast<int>(info.image_width), static_cast<int>(info.image_height),
                    info.num_components};
  if (pixels != nullptr && decodable(reading.header)) {
    info.out_color_space = JCS_RGB;  // grey is expanded
    jpeg_start_decompress(&info);
    for (int y = 0; y < kImageSize; ++y) reading.rows[y] = pixels + ptrdiff_t{y} * kImageSize * 3;
    while (info.output_scanline < info.output_height) {
      jpeg_read_scanlines(&info, reading.rows + info.output_scanline,
                          info.output_height - info.output_scanline);
    }
    jpeg_finish_decompress(&info);  // reads up to the end marker: a missing one is a warning
  }
  jpeg_destroy_decompress(&info);
  return true;
}

// What a file that is not a JPEG is instead, as the end of "... is ".
const char* other_format(std::span<const uint8_t> bytes) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  const auto starts = [&](std::string_view magic, size_t at = 0) {
    return text.size() >= at + magic.size() && text.substr(at, magic.size()) == magic;
  };
  using namespace std::string_view_literals;
  if (text.empty()) return "empty";
  if (starts("\x89PNG\r\n\x1a\n"sv)) return "a PNG";
  if (starts("GIF8"sv)) return "a GIF";
  if (starts("RIFF"sv) && starts("WEBP"sv, 8)) return "a WebP";
  if (starts("BM"sv)) return "a BMP";
  if (starts("II*\0"sv) || starts("MM\0*"sv)) return "a TIFF";
  if (starts("ftyp"sv, 4)) return "an AVIF or HEIC";
  if (starts("\xff\x0a"sv) || starts("\0\0\0\x0cJXL "sv)) return "a JPEG XL";
  if (starts("\0\0\0\x0cjP  "sv)) return "a JPEG 2000";
  const std::string_view start = text.substr(0, 64);
  for (const char c : start) {
    const auto byte = static_cast<unsigned char>(c);
    // 0xFE and 0xFF do not occur in UTF-8.
    if (byte == 127 || byte >= 0xFE || (byte < 32 && c != '\n' && c != '\r' && c != '\t')) {
      return "none of the formats known";
    }
  }
  return "text";
}

// Throws unless the header could be read and the image is of a sane size.
void read_or_throw(Reading& reading, std::span<const uint8_t> jpeg, const std::string& what,
                   uint8_t* pixels) {
  const bool starts_as_jpeg =
      jpeg.size() >= 3 && jpeg[0] == 0xFF && jpeg[1] == 0xD8 && jpeg[2] == 0xFF;
  if (!starts_as_jpeg) {
    throw Error(codes::kData, "The " + what + " is not a JPEG, it is " + other_format(jpeg) +
                                  "; `hardmine pack` converts image files to JPEG records");
  }
  if (!read(reading, jpeg, pixels)) {
    throw Error(codes::kData, "The " + what + " is a damaged JPEG (libjpeg: " + reading.message +
                                  "); replace the image or pack the data set again");
  }
  const JpegInfo& header = reading.header;
  if (int64_t{header.width} * header.height > kMaxPixels) {
    throw Error(codes::kData, "The " + what + " is " + std::to_string(header.width) + "x" +
                                  std::to_string(header.height) +
                                  " pixels, more than the 16 megapixels that are read; make it "
                                  "smaller first");
  }
}

}  // namespace

JpegInfo read_jpeg_info(std::span<const uint8_t> jpeg, const std::string& what) {
  Reading reading{};
  read_or_throw(reading, jpeg, what, nullptr);
  return reading.header;
}

void decode_jpeg(std::span<const uint8_t> jpeg, const std::string& what, uint8_t* pixels) {
  Reading reading{};
  read_or_throw(reading, jpeg, what, pixels);
  const JpegInfo& header = reading.header;
  if (header.width != kImageSize || header.height != kImageSize) {
    throw Error(codes::kData,
                "The " + what + " is " + std::to_string(header.width) + "x" +
                    std::to_string(header.height) +
                    " pixels, expected 112x112; `hardmine align` makes 112x112 crops");
  }
  if (!decodable(header)) {
    throw Error(codes::kData, "The " + what + " is a JPEG of " + std::to_string(header.components) +
                                  " colour components (CMYK or YCCK when 4), expected 1 or 3; "
                                  "`hardmine pack` converts it to RGB");
  }
}

}  // namespace hardmine
