// A folder that belongs to one process at a time.
#pragma once

#include <memory>
#include <string>

namespace hardmine {

// The kernel keeps the lock (flock) and takes it back when its holder ends, however that ends:
// there is no stale lock to find, and no process id that another process may have by now. It keeps
// out other processes and other objects of this one, and with a file system that several hosts
// share, theirs.
class FolderLock {
 public:
  // The file in the folder that is locked; src/data/folder-lock.ts reads it under this name.
  static constexpr const char* kFile = ".hardmine.lock";

  // Never waits. `note` is for whoever is refused meanwhile: it is what the file then holds. Throws
  // ERR_BUSY while the folder is locked, ERR_IO where the file cannot be made.
  static std::shared_ptr<const FolderLock> take(const std::string& folder, const std::string& note);

  // Removes the file and gives the lock back.
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

  // Empty; or the reason why nobody is kept out: the file system has no locks.
  const std::string& unsupported() const { return unsupported_; }

 private:
  FolderLock(std::string path, int descriptor);
  bool lock(const std::string& folder);
  bool stands() const;
  void write(const std::string& note) const;

  std::string path_;
  int descriptor_;
  std::string unsupported_;
};

}  // namespace hardmine
