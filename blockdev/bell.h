// What wakes a thread that sleeps in Asio, besides Asio.
//
// Asio wakes a loop by changing how epoll watches a descriptor that is readable all the time, of
// which epoll then has to tell once more. There have been kernels that sometimes did not (Linux
// 5.3, boostorg/asio issue 320), and from then on Asio takes its loop for woken and wakes it no
// more: a server would hear of no SIGTERM until a frontend comes. An eventfd that is written to is
// no such matter. The loop watches it; whoever posts something rings.
#pragma once

#include <utility>

#include "aio/error.h"

namespace vblk::blockdev {

class Bell {
 public:
  // `whose` is for the message. Error: kExhausted: no descriptor is left.
  static Expected<Bell> make(const char* whose);
  ~Bell();
  Bell(Bell&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Bell& operator=(Bell&&) = delete;

  // Readable from ring() on until silence(). Stays the bell's.
  [[nodiscard]] int fd() const { return fd_; }
  // Any thread.
  void ring() const noexcept;
  void silence() const noexcept;

 private:
  explicit Bell(int fd) : fd_(fd) {}

  int fd_;
};

}  // namespace vblk::blockdev
