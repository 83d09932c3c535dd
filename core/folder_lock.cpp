#include "core/folder_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "core/error.h"

namespace hardmine {
namespace {

// Of finding that the file was removed between opening and locking it. Once is rare.
constexpr int kAttempts = 100;

std::string reason(int error) {
  return std::generic_category().message(error);
}

[[noreturn]] void refuse_io(const std::string& folder, const std::string& why) {
  throw Error(codes::kIo, folder + " could not be locked (" + why +
                              "): give a folder that exists and that you may write to");
}

int open_file(const std::string& folder, const std::string& path) {
  // A link planted here must not lead to a file elsewhere, nor a pipe keep the caller waiting.
  const int flags = O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  const int descriptor = ::open(path.c_str(), flags, 0666);
  if (descriptor < 0) refuse_io(folder, reason(errno));
  return descriptor;
}

// NFS without a lock service, and file systems that leave flock out, as Lustre by default.
bool has_no_locks(int error) {
  return error == ENOLCK || error == EOPNOTSUPP || error == ENOSYS;
}

}  // namespace

std::shared_ptr<const FolderLock> FolderLock::take(const std::string& folder,
                                                   const std::string& note) {
  const std::string path = folder + "/" + kFile;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const std::shared_ptr<FolderLock> lock(new FolderLock(path, open_file(folder, path)));
    if (!lock->lock(folder)) {
      throw Error(codes::kBusy,
                  folder + " is in use: wait for whoever uses it, or give another one");
    }
    // Its last holder may have removed the file just before: then the lock is one on nothing.
    if (!lock->stands()) continue;
    lock->write(note);
    return lock;
  }
  refuse_io(folder, std::string(kFile) + " goes as often as it is made");
}

FolderLock::FolderLock(std::string path, int descriptor)
    : path_(std::move(path)), descriptor_(descriptor) {}

FolderLock::~FolderLock() {
  if (descriptor_ < 0) return;
  // While it is locked, so that nobody removes the file of the next holder.
  if (stands()) ::unlink(path_.c_str());
  ::close(descriptor_);
}

// False: somebody else has it.
bool FolderLock::lock(const std::string& folder) {
  while (::flock(descriptor_, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    if (error == EINTR) continue;
    if (has_no_locks(error)) {
      unsupported_ = reason(error);
      return true;
    }
    ::close(std::exchange(descriptor_, -1));
    if (error == EWOULDBLOCK) return false;
    refuse_io(folder, reason(error));
  }
  return true;
}

// Whether the file is still the one at its path.
bool FolderLock::stands() const {
  struct stat own {};
  struct stat found {};
  return ::fstat(descriptor_, &own) == 0 && ::lstat(path_.c_str(), &found) == 0 &&
         own.st_dev == found.st_dev && own.st_ino == found.st_ino;
}

void FolderLock::write(const std::string& note) const {
  // On a full disk the lock holds all the same, and says less to whoever is refused.
  const bool written =
      ::ftruncate(descriptor_, 0) == 0 &&
      ::pwrite(descriptor_, note.data(), note.size(), 0) == static_cast<ssize_t>(note.size());
  static_cast<void>(written);
}

}  // namespace hardmine
