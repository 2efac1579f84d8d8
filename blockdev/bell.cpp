#include "blockdev/bell.h"

#include <unistd.h>

#include "aio/event_fd.h"

namespace vblk::blockdev {

Expected<Bell> Bell::make(const char* whose) {
  const auto fd = aio::make_event_fd(whose);
  if (!fd) return std::unexpected(fd.error());
  return Bell(*fd);
}

Bell::~Bell() {
  if (fd_ >= 0) ::close(fd_);
}

void Bell::ring() const noexcept { aio::signal_event_fd(fd_); }
void Bell::silence() const noexcept { aio::drain_event_fd(fd_); }

}  // namespace vblk::blockdev
