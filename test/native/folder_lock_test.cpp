#include <doctest/doctest.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>

#include "core/error.h"
#include "core/folder_lock.h"
#include "test/native/record_files.h"

using namespace hardmine;
using namespace hardmine::test;

namespace {

// What flock() fails with; 0: nothing.
int planted_error = 0;

std::string file_of(const std::string& folder) {
  return folder + "/" + FolderLock::kFile;
}

std::string text_of(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

// A folder with nothing in it.
std::string make_folder(const TemporaryFolder& temporary) {
  const std::string folder = temporary / "run";
  std::filesystem::create_directory(folder);
  return folder;
}

// The code of the error that taking the lock ends with.
std::string refusal(const std::string& folder) {
  try {
    FolderLock::take(folder, "another");
  } catch (const Error& error) {
    CHECK(std::string(error.what()).find(folder) == 0);
    return error.code();
  }
  return "none";
}

}  // namespace

// In place of the C library's, for errors that this machine's file systems do not have.
extern "C" int flock(int descriptor, int operation) noexcept {
  if (planted_error == 0) return static_cast<int>(::syscall(SYS_flock, descriptor, operation));
  errno = planted_error;
  return -1;
}

TEST_CASE("a file system without locks keeps nobody out, and says so") {
  const TemporaryFolder temporary;
  const std::string folder = make_folder(temporary);
  for (const int error : {ENOLCK, EOPNOTSUPP, ENOSYS}) {
    planted_error = error;
    {
      const auto first = FolderLock::take(folder, "first");
      const auto second = FolderLock::take(folder, "second");
      CHECK(first->unsupported() == std::generic_category().message(error));
      CHECK(second->unsupported() == first->unsupported());
    }
    CHECK(std::filesystem::is_empty(folder));
  }
  planted_error = EIO;
  CHECK(refusal(folder) == codes::kIo);
  planted_error = 0;
}

TEST_CASE("a folder is locked once, and free with nothing left in it when the lock goes") {
  const TemporaryFolder temporary;
  const std::string folder = make_folder(temporary);
  {
    const auto lock = FolderLock::take(folder, "a note");
    CHECK(lock->unsupported().empty());
    CHECK(text_of(file_of(folder)) == "a note");
    CHECK(refusal(folder) == codes::kBusy);
    // Refusing leaves everything as it was.
    CHECK(text_of(file_of(folder)) == "a note");
  }
  CHECK(std::filesystem::is_empty(folder));
  CHECK(refusal(folder) == "none");
}

TEST_CASE("a process that is killed leaves no lock, whatever is left of its file") {
  const TemporaryFolder temporary;
  const std::string folder = make_folder(temporary);
  int ready[2];
  REQUIRE(::pipe(ready) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    const auto lock = FolderLock::take(folder, "of a child, and longer than the next one");
    static_cast<void>(::write(ready[1], "x", 1) == 1);
    for (;;) ::pause();
  }
  char byte = 0;
  REQUIRE(::read(ready[0], &byte, 1) == 1);
  CHECK(refusal(folder) == codes::kBusy);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  CHECK(std::filesystem::exists(file_of(folder)));
  const auto lock = FolderLock::take(folder, "mine");
  CHECK(text_of(file_of(folder)) == "mine");
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST_CASE("a child that is started meanwhile does not inherit the lock") {
  const TemporaryFolder temporary;
  const std::string folder = make_folder(temporary);
  auto lock = FolderLock::take(folder, "");
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    ::execlp("sleep", "sleep", "30", nullptr);
    ::_exit(1);
  }
  // From fork to exec the child has everything that its parent has.
  while (std::filesystem::read_symlink("/proc/" + std::to_string(child) + "/exe") ==
         std::filesystem::read_symlink("/proc/self/exe")) {
    ::usleep(1000);
  }
  lock.reset();
  CHECK(refusal(folder) == "none");
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST_CASE("a file that somebody else has made meanwhile stays") {
  const TemporaryFolder temporary;
  const std::string folder = make_folder(temporary);
  const std::string path = file_of(folder);
  auto lock = FolderLock::take(folder, "");
  std::filesystem::remove(path);
  const auto next = FolderLock::take(folder, "next");
  lock.reset();
  CHECK(text_of(path) == "next");
}

TEST_CASE("what is no folder, or has no room for the file, is refused") {
  const TemporaryFolder temporary;
  const std::string folder = make_folder(temporary);
  CHECK(refusal(folder + "/none") == codes::kIo);
  const std::string elsewhere = folder + "/elsewhere";
  std::ofstream(elsewhere) << "kept";
  std::filesystem::create_symlink(elsewhere, file_of(folder));
  CHECK(refusal(folder) == codes::kIo);
  CHECK(text_of(elsewhere) == "kept");
  std::filesystem::remove(file_of(folder));
  std::filesystem::create_directory(file_of(folder));
  CHECK(refusal(folder) == codes::kIo);
}
