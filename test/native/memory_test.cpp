// What the CPU backend takes for available, and that it takes no more.
#include "cpu/memory.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "core/error.h"

namespace hardmine {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;
constexpr Memory kMachine{64 * kGiB, 40 * kGiB};

// A folder with the files of a control group.
class Group {
 public:
  Group() { std::filesystem::create_directory(path_); }
  ~Group() { std::filesystem::remove_all(path_); }
  void write(const char* name, const std::string& text) const {
    std::ofstream(path_ / name) << text;
  }
  Memory leaves(Memory outside = kMachine) const { return within_group(path_.string(), outside); }

 private:
  std::filesystem::path path_ =
      std::filesystem::temp_directory_path() / ("hardmine-group-" + std::to_string(getpid()));
};

std::string gib(int64_t count) {
  return std::to_string(count * kGiB) + "\n";
}

}  // namespace

TEST_CASE("a control group leaves its limit less what is in use, cached files aside") {
  const Group group;
  group.write("memory.max", gib(8));
  group.write("memory.current", gib(7));
  group.write("memory.stat", "anon 1\ninactive_file " + gib(3) + "active_file " + gib(2) + "x 1\n");
  CHECK(group.leaves().total_bytes == 8 * kGiB);
  CHECK(group.leaves().available_bytes == 6 * kGiB);
  // No more than there is outside.
  CHECK(group.leaves({64 * kGiB, kGiB}).available_bytes == kGiB);
}

TEST_CASE("so does one of version 1") {
  const Group group;
  group.write("memory.limit_in_bytes", gib(8));
  group.write("memory.usage_in_bytes", gib(7));
  group.write("memory.stat", "inactive_file 9\ntotal_inactive_file " + gib(1));
  CHECK(group.leaves().available_bytes == 2 * kGiB);
}

TEST_CASE("a control group without a limit, or with a larger one, changes nothing") {
  const Group group;
  CHECK(group.leaves().available_bytes == kMachine.available_bytes);
  group.write("memory.current", gib(7));
  for (const std::string& limit : {std::string("max\n"), gib(64), std::string()}) {
    group.write("memory.max", limit);
    CHECK(group.leaves().total_bytes == kMachine.total_bytes);
    CHECK(group.leaves().available_bytes == kMachine.available_bytes);
  }
}

TEST_CASE("a full control group leaves nothing") {
  const Group group;
  group.write("memory.max", gib(8));
  group.write("memory.current", gib(9));
  CHECK(group.leaves().available_bytes == 0);
}

TEST_CASE("memory is zeroed and aligned; what is not there is refused") {
  const Memory memory = memory_of_process();
  CHECK(memory.available_bytes > 0);
  CHECK(memory.available_bytes <= memory.total_bytes);
  const std::unique_ptr<void, void (*)(void*)> block(take_memory(1000, "A test"), std::free);
  CHECK(reinterpret_cast<uintptr_t>(block.get()) % kMemoryAlignment == 0);
  CHECK(static_cast<const char*>(block.get())[999] == 0);
  const auto more = static_cast<size_t>(memory.total_bytes) + 1;
  CHECK_THROWS_WITH_AS(take_memory(more, "A test"), doctest::Contains("A test needs"), Error);
}

}  // namespace hardmine
