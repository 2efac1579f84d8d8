#include "blockdev/unix_listener.h"

#include <cerrno>
#include <cstring>
#include <string_view>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::blockdev {

namespace {

// One frontend at a time is served; a few more may wait their turn.
constexpr int kBacklog = 16;

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

int make_socket() { return ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }

// What the user can do where a socket cannot be made.
std::string_view advice(int error) {
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return "make its folder first, or choose another path";
    case EACCES:
    case EPERM:
    case EROFS:
      return "choose a folder that this user may write";
    default:
      return "choose another path";
  }
}

// Whether somebody accepts connections at `path`: 0 if so, otherwise why not (an errno value).
int probe_listener(const std::string& path) {
  const int fd = make_socket();
  if (fd < 0) return errno;
  const sockaddr_un address = address_of(path);
  const int error =
      ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? 0 : errno;
  ::close(fd);
  return error;
}

// Makes room at `path` if a dead server's socket is all that lies there.
Expected<void> clear_path(const std::string& path, const std::string& what) {
  struct stat status{};
  if (::lstat(path.c_str(), &status) != 0) {
    if (errno == ENOENT) return {};
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot look at the {} '{}': {}; {}", what, path,
                                  describe_errno(error), advice(error)),
                      error);
  }
  if (!S_ISSOCK(status.st_mode)) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("the {} '{}' exists and is not a socket; choose another path or move it away",
                    what, path),
        EEXIST);
  }
  const int error = probe_listener(path);
  // EAGAIN: the listener's backlog is full, so there is one.
  if (error == 0 || error == EAGAIN) {
    return make_error(
        ErrorKind::kBusy,
        fmt::format(
            "the {} '{}' is in use by another process; stop that one or choose another path", what,
            path),
        EADDRINUSE);
  }
  if (error != ECONNREFUSED) {
    return make_error(
        kind_of_errno(error),
        fmt::format("cannot tell whether the {} '{}' is in use: {}; remove it if it is "
                    "not, or choose another path",
                    what, path, describe_errno(error)),
        error);
  }
  if (::unlink(path.c_str()) != 0 && errno != ENOENT) {
    const int unlink_error = errno;
    return make_error(kind_of_errno(unlink_error),
                      fmt::format("cannot remove the abandoned {} '{}': {}; {}", what, path,
                                  describe_errno(unlink_error), advice(unlink_error)),
                      unlink_error);
  }
  return {};
}

}  // namespace

UnixListener::UnixListener(int fd, std::string path) : fd_(fd), path_(std::move(path)) {
  struct stat status{};
  if (::lstat(path_.c_str(), &status) == 0) {
    device_ = status.st_dev;
    inode_ = status.st_ino;
  }
}

UnixListener::UnixListener(UnixListener&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      path_(std::move(other.path_)),
      device_(other.device_),
      inode_(other.inode_) {}

UnixListener::~UnixListener() {
  if (fd_ < 0) return;
  ::close(fd_);
  struct stat status{};
  if (::lstat(path_.c_str(), &status) == 0 && status.st_dev == device_ && status.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
}

Expected<UnixListener> UnixListener::listen(const std::string& path, const std::string& what) {
  if (path.empty())
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("the path of the {} is empty", what));
  if (path.size() > kPathBytesMax) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("the path of the {} has {} bytes and Unix sockets take {}: '{}'; use a shorter "
                    "one, or a relative one from its directory",
                    what, path.size(), kPathBytesMax, path),
        ENAMETOOLONG);
  }
  if (auto cleared = clear_path(path, what); !cleared)
    return std::unexpected(std::move(cleared.error()));
  const int fd = make_socket();
  const sockaddr_un address = address_of(path);
  if (fd < 0 || ::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    const int error = errno;
    if (fd >= 0) ::close(fd);
    return make_error(kind_of_errno(error),
                      fmt::format("cannot create the {} '{}': {}; {}", what, path,
                                  describe_errno(error), advice(error)),
                      error);
  }
  UnixListener listener(fd, path);
  if (::listen(fd, kBacklog) != 0) {
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot listen on the {} '{}': {}; {}", what, path,
                                  describe_errno(error), advice(error)),
                      error);
  }
  return listener;
}

}  // namespace vblk::blockdev
