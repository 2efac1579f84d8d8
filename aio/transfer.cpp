#include "aio/transfer.h"

#include <cerrno>
#include <cstddef>

#include "aio/io_request.h"

namespace vblk::aio {

namespace {

bool moves_data(IoKind kind) { return kind == IoKind::kRead || kind == IoKind::kWrite; }

}  // namespace

void Transfer::begin(IoRequest& request) {
  offset_bytes_ = request.offset_bytes;
  length_bytes_ = request.length_bytes;
  iov_first_ = 0;
  stall_count_ = 0;
  error_ = 0;
  // An iovec array may start with empty elements; the rest of this file relies on a first that is
  // not.
  if (moves_data(request.kind)) skip(request, 0);
}

Transfer::Next Transfer::advance(IoRequest& request, long result) {
  if (result < 0) return fail_or_retry(static_cast<int>(-result));
  if (!moves_data(request.kind)) return Next::kFinished;
  const auto moved = static_cast<std::uint64_t>(result);
  if (moved == length_bytes_) return Next::kFinished;
  // The kernel moved more than it was asked for: whatever that was, it was not this request.
  if (moved > length_bytes_) return finish(EIO);
  if (moved == 0) {
    if (request.kind == IoKind::kRead) return finish(ENODATA);
    return stall(ENOSPC);
  }
  stall_count_ = 0;
  offset_bytes_ += moved;
  length_bytes_ -= moved;
  skip(request, moved);
  return Next::kResubmit;
}

Transfer::Next Transfer::fail_or_retry(int error) {
  if (error == EINTR) return Next::kResubmit;
  if (error == EAGAIN) return stall(EAGAIN);
  return finish(error);
}

Transfer::Next Transfer::stall(int error) {
  return ++stall_count_ < kMaxStalls ? Next::kResubmit : finish(error);
}

Transfer::Next Transfer::finish(int error) {
  error_ = error;
  return Next::kFinished;
}

// Drops `bytes` bytes from the front of what remains, and any empty elements behind them.
void Transfer::skip(IoRequest& request, std::uint64_t bytes) {
  while (iov_first_ < request.iov_count) {
    iovec& front = request.iov[iov_first_];
    if (front.iov_len > bytes) {
      front.iov_base = static_cast<std::byte*>(front.iov_base) + bytes;
      front.iov_len -= bytes;
      return;
    }
    bytes -= front.iov_len;
    ++iov_first_;
  }
}

}  // namespace vblk::aio
