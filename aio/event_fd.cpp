#include "aio/event_fd.h"

#include <cerrno>
#include <cstdint>
#include <sys/eventfd.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::aio {

Expected<int> make_event_fd(const char* purpose) {
  const int fd = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (fd >= 0) return fd;
  const int error = errno;
  return make_error(
      kind_of_errno(error),
      fmt::format("cannot create an eventfd for {}: {}; raise 'ulimit -n' if it is at its limit",
                  purpose, describe_errno(error)),
      error);
}

void signal_event_fd(int fd) noexcept {
  const std::uint64_t one = 1;
  // EAGAIN alone is possible, and means that it is readable already.
  [[maybe_unused]] const auto written = ::write(fd, &one, sizeof one);
}

void drain_event_fd(int fd) noexcept {
  std::uint64_t count;
  [[maybe_unused]] const auto consumed = ::read(fd, &count, sizeof count);
}

}  // namespace vblk::aio
