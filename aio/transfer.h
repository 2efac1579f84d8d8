// The one place that knows what to do with a partial result from the kernel.
//
// Every engine feeds each kernel result through Transfer::advance() and does what it is told:
// finish the request, or issue the rest again. So a short read, a short write, EINTR and EAGAIN
// mean the same under all engines (design law 4: above an engine a transfer is all or nothing).
#pragma once

#include <cstdint>

namespace vblk::aio {

struct IoRequest;

class Transfer {
 public:
  enum class Next : std::uint8_t {
    kFinished,  // complete the request with error()
    kResubmit,  // issue what remains: offset_bytes(), length_bytes() and the request's iov
  };

  // Number of results in a row without progress (EAGAIN, zero-length writes) after which the
  // transfer gives up. EINTR does not count: a signal is not the disk's fault.
  static constexpr std::uint32_t kMaxStalls = 16;

  // Starts on a whole request.
  void begin(IoRequest& request);
  // Digests one kernel result: bytes moved, or a negated errno value. Trims the request's iovecs
  // past what has moved when something remains.
  Next advance(IoRequest& request, long result);

  // errno value of a finished transfer, 0 for success.
  [[nodiscard]] int error() const { return error_; }
  // Where in the file, and how much, the rest is.
  [[nodiscard]] std::uint64_t offset_bytes() const { return offset_bytes_; }
  [[nodiscard]] std::uint64_t length_bytes() const { return length_bytes_; }
  // First iovec that still has bytes to move, and how many from there on.
  [[nodiscard]] std::uint32_t iov_first() const { return iov_first_; }

 private:
  Next fail_or_retry(int error);
  Next stall(int error);
  Next finish(int error);
  void skip(IoRequest& request, std::uint64_t bytes);

  std::uint64_t offset_bytes_{0};
  std::uint64_t length_bytes_{0};
  std::uint32_t iov_first_{0};
  std::uint32_t stall_count_{0};
  int error_{0};
};

}  // namespace vblk::aio
