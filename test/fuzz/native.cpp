// The native readers of files from outside, compiled with sanitizers: reads inputs from a pipe and
// answers each. `records FOLDER` takes three blobs an input (.rec, .idx, .crc) and writes them there;
// `jpeg` takes one. A blob is a u32 length and its bytes; the answer is a u32 length (0: a value) and
// the sentence of an Error. Any other exception, and what a sanitizer finds, ends the process.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "core/batch.h"
#include "core/decode.h"
#include "core/error.h"
#include "core/records.h"

namespace {

using Bytes = std::vector<uint8_t>;

// False at the end of the pipe.
bool read_all(void* to, size_t bytes) {
  auto* at = static_cast<uint8_t*>(to);
  while (bytes > 0) {
    const ssize_t got = ::read(STDIN_FILENO, at, bytes);
    if (got <= 0) return false;
    at += got;
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

// A vector of exactly the blob's size, so that a read beyond it is seen.
bool read_blob(Bytes& blob) {
  uint32_t bytes = 0;
  if (!read_all(&bytes, sizeof bytes)) return false;
  Bytes exact(bytes);
  blob.swap(exact);
  return read_all(blob.data(), bytes);
}

void answer(const std::string& sentence) {
  const auto bytes = static_cast<uint32_t>(sentence.size());
  std::string reply(reinterpret_cast<const char*>(&bytes), sizeof bytes);
  reply += sentence;
  if (::write(STDOUT_FILENO, reply.data(), reply.size()) != static_cast<ssize_t>(reply.size())) {
    std::abort();
  }
}

void write_file(const std::string& path, const Bytes& bytes) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  const auto write = [&] { return std::fwrite(bytes.data(), 1, bytes.size(), file); };
  if (file == nullptr || (!bytes.empty() && write() != bytes.size()) || std::fclose(file) != 0) {
    std::perror(path.c_str());
    std::abort();
  }
}

void read_records(const std::string& folder, const std::vector<Bytes>& files) {
  const std::string rec = folder + "/train.rec", idx = folder + "/train.idx";
  write_file(rec, files[0]);
  write_file(idx, files[1]);
  std::filesystem::remove(folder + "/train.crc");
  if (!files[2].empty()) write_file(folder + "/train.crc", files[2]);
  const auto records = hardmine::RecordFile::open(rec, idx);
  Bytes joined, pixels(hardmine::kImageBytes);
  std::string first;
  for (int64_t i = 0; i < records->images(); ++i) {
    try {
      hardmine::decode_jpeg(records->image(i, joined), records->describe(i), pixels.data());
    } catch (const hardmine::Error& error) {
      if (first.empty()) first = error.what();
    }
  }
  if (!first.empty()) throw hardmine::Error(hardmine::codes::kData, first);
}

void read_jpeg(const Bytes& jpeg) {
  Bytes pixels(hardmine::kImageBytes);
  try {
    hardmine::read_jpeg_info(jpeg, "header");
  } catch (const hardmine::Error&) {  // the decoder says it again
  }
  hardmine::decode_jpeg(jpeg, "image", pixels.data());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  const bool takes_records = what == "records" && argc == 3;
  if (!takes_records && what != "jpeg") return 2;
  std::vector<Bytes> blobs(takes_records ? 3 : 1);
  for (;;) {
    for (Bytes& blob : blobs) {
      if (!read_blob(blob)) return 0;
    }
    try {
      if (takes_records) read_records(argv[2], blobs);
      else read_jpeg(blobs[0]);
      answer("");
    } catch (const hardmine::Error& error) {
      answer(error.what());
    }
  }
}
