#include "blockdev/conform/doorbells.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "blockdev/conform/probe.h"

namespace vblk::conform {

namespace {

vhost_user::UniqueFd event_fd() {
  return vhost_user::UniqueFd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
}

bool is_readable(int fd, std::chrono::milliseconds patience) {
  pollfd descriptor{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&descriptor, 1, static_cast<int>(patience.count())) > 0;
}

}  // namespace

Doorbells::Doorbells() : kick_(event_fd()), call_(event_fd()), error_(event_fd()) {}

void Doorbells::signal_kick() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(kick_.get(), &one, sizeof one);
}

bool Doorbells::wait_call(std::chrono::milliseconds patience) const {
  return is_readable(call_.get(), patience);
}

std::uint64_t Doorbells::take_calls() {
  std::uint64_t count = 0;
  return ::read(call_.get(), &count, sizeof count) == sizeof count ? count : 0;
}

bool Doorbells::has_error() const {
  return is_readable(error_.get(), std::chrono::milliseconds(0));
}

void Doorbells::replace_call_fd() { call_ = event_fd(); }

std::byte* ring_room(driver::DriverMemory& memory, std::size_t bytes, std::size_t alignment) {
  const auto room = memory.allocate(bytes + kRingMarginBytes, alignment);
  Probe::expect(!room.empty(), "the suite's own guest memory is too small for this ring");
  return room.data();
}

}  // namespace vblk::conform
