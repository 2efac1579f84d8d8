#include "blockdev/image_lock.h"

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <fcntl.h>
#include <sys/stat.h>
#include <thread>
#include <unistd.h>

#include <fmt/core.h>

#include "blockdev/log.h"

namespace vblk::blockdev {

namespace {

constexpr off_t kPermissionBase = 100;
constexpr off_t kUnsharedBase = 200;

enum Permission : std::uint8_t {
  kConsistentRead = 0,
  kWrite = 1,
  kWriteUnchanged = 2,
  kResize = 3
};
constexpr std::array kAllPermissions{kConsistentRead, kWrite, kWriteUnchanged, kResize};

constexpr unsigned bit(Permission permission) { return 1U << permission; }

struct flock one_byte(short type, off_t offset) {
  struct flock lock{};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = offset;
  lock.l_len = 1;
  return lock;
}

// 0, or an errno value.
int set_byte(int fd, short type, off_t offset) {
  struct flock lock = one_byte(type, offset);
  return ::fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : errno;
}

bool is_held_by_others(int fd, off_t offset) {
  struct flock lock = one_byte(F_WRLCK, offset);
  return ::fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

int take_bytes(int fd, unsigned used, unsigned unshared) {
  for (const Permission permission : kAllPermissions) {
    if ((used & bit(permission)) != 0) {
      if (const int error = set_byte(fd, F_RDLCK, kPermissionBase + permission); error != 0)
        return error;
    }
    if ((unshared & bit(permission)) != 0) {
      if (const int error = set_byte(fd, F_RDLCK, kUnsharedBase + permission); error != 0)
        return error;
    }
  }
  return 0;
}

bool conflicts(int fd, unsigned used, unsigned unshared) {
  for (const Permission permission : kAllPermissions) {
    if ((used & bit(permission)) != 0 && is_held_by_others(fd, kUnsharedBase + permission))
      return true;
    if ((unshared & bit(permission)) != 0 && is_held_by_others(fd, kPermissionBase + permission))
      return true;
  }
  return false;
}

}  // namespace

// Both sides first mark their bytes and then look at the other's, so that of two that start at once
// at least one sees the conflict.
Expected<void> lock_image(int fd, const std::string& path, bool read_only) {
  const unsigned used = read_only ? bit(kConsistentRead) : bit(kConsistentRead) | bit(kWrite);
  const unsigned unshared = bit(kWrite) | bit(kResize);
  for (int attempt = 1;; ++attempt) {
    const int error = take_bytes(fd, used, unshared);
    if (error != 0 && error != EAGAIN && error != EACCES) {
      log::warning("'{}' cannot be locked ({}): make sure that nobody else writes it", path,
                   describe_errno(error));
      return {};
    }
    if (error == 0 && !conflicts(fd, used, unshared)) return {};
    unlock_image(fd);
    if (attempt == kLockAttempts) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(kLockRetryMilliseconds));
  }
  return make_error(
      ErrorKind::kBusy,
      read_only ? fmt::format("'{}' is being written by another process; stop that one first", path)
                : fmt::format("'{}' is in use by another process; stop that one first", path),
      EAGAIN);
}

void unlock_image(int fd) {
  for (const Permission permission : kAllPermissions) {
    set_byte(fd, F_UNLCK, kPermissionBase + permission);
    set_byte(fd, F_UNLCK, kUnsharedBase + permission);
  }
}

// open(2): O_EXCL without O_CREAT fails with EBUSY where a block device is in use by the system.
Expected<void> check_is_not_mounted(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0 || !S_ISBLK(status.st_mode)) return {};
  const int fd = ::open(path.c_str(), O_RDONLY | O_EXCL | O_NONBLOCK | O_CLOEXEC);
  if (fd >= 0) ::close(fd);
  if (fd >= 0 || errno != EBUSY) return {};
  return make_error(
      ErrorKind::kBusy,
      fmt::format("'{}' is mounted or in use by the kernel; unmount it first, or name another",
                  path),
      EBUSY);
}

}  // namespace vblk::blockdev
