// The descriptors by which the two sides of a ring wake each other: the driver's end.
// vhost-user.rst, "Front-end message types" (SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR). One
// thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "blockdev/driver/driver_memory.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::conform {

class Doorbells {
 public:
  Doorbells();

  void signal_kick();
  // Waits for the call descriptor alone.
  [[nodiscard]] bool wait_call(std::chrono::milliseconds patience) const;
  // Takes back what the call descriptor has counted.
  std::uint64_t take_calls();
  // Whether the backend has told an error of this ring.
  [[nodiscard]] bool has_error() const;
  void replace_call_fd();

  [[nodiscard]] int kick_fd() const { return kick_.get(); }
  [[nodiscard]] int call_fd() const { return call_.get(); }
  [[nodiscard]] int error_fd() const { return error_.get(); }

 private:
  vhost_user::UniqueFd kick_;
  vhost_user::UniqueFd call_;
  vhost_user::UniqueFd error_;
};

// Waits for what comes of a request that is wrong: an answer (true), an error of the ring, or
// nothing within so long.
template <typename AnyRing>
bool wait_for_answer(const AnyRing& ring, std::chrono::milliseconds patience) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!ring.has_used()) {
    if (ring.has_error() || std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  return true;
}

// Room for a part of a ring, with a margin behind it, so that a test sees what is written beyond.
// Fails the test where there is none.
inline constexpr std::size_t kRingMarginBytes = 64;
[[nodiscard]] std::byte* ring_room(driver::DriverMemory& memory, std::size_t bytes,
                                   std::size_t alignment);

}  // namespace vblk::conform
