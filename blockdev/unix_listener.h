// A listening Unix socket at a path: made with care for what may lie there already, removed when
// done.
#pragma once

#include <cstddef>
#include <string>
#include <sys/types.h>
#include <sys/un.h>

#include "aio/error.h"

namespace vblk::blockdev {

class UnixListener {
 public:
  // sun_path less its terminating zero: 107 bytes on Linux (unix(7)).
  static constexpr std::size_t kPathBytesMax = sizeof(sockaddr_un::sun_path) - 1;

  // Listens on `path` (non-blocking, close-on-exec). `what` names the socket in messages.
  // A socket that nobody listens on any more (left behind by SIGKILL) is replaced; one with a live
  // listener is kBusy; anything that is not a socket is left untouched and refused.
  // Errors: kInvalidArgument (path empty, too long, or not a socket), kBusy, kNotFound,
  // kPermission.
  static Expected<UnixListener> listen(const std::string& path, const std::string& what);

  // Closes, and removes the path if it is still the socket made here.
  ~UnixListener();
  UnixListener(UnixListener&& other) noexcept;
  UnixListener& operator=(UnixListener&& other) = delete;
  UnixListener(const UnixListener&) = delete;
  UnixListener& operator=(const UnixListener&) = delete;

  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  UnixListener(int fd, std::string path);

  int fd_{-1};
  std::string path_;
  dev_t device_{
      0};  // identity of the socket's directory entry, so that a successor's is not removed
  ino_t inode_{0};
};

}  // namespace vblk::blockdev
