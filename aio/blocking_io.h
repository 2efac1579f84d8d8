// A whole request carried out by blocking system calls: what a worker thread does, and what the
// engines without an asynchronous call for a kind of operation come to.
#pragma once

#include "aio/io_request.h"

namespace vblk::aio {

// Carries `request` out on the calling thread and returns an errno value, 0 for success. All or
// nothing through request.transfer. Does not call request.complete.
//
//   kRead, kWrite   preadv2, pwritev2 (RWF_DSYNC for write_through); preadv2(2)
//   kFlush          fdatasync(2)
//   kWriteBehind    sync_file_range(2)
//   kDiscard        fallocate(2) PUNCH_HOLE, or BLKDISCARD on a block device
//   kWriteZeroes    fallocate(2) PUNCH_HOLE if it may unmap, else ZERO_RANGE; both keep the size
int perform_blocking(IoRequest& request) noexcept;

// Carries a read out on the calling thread if the page cache has all of it; never waits for a disk.
// False if it has not, and nothing has happened. preadv2(2), RWF_NOWAIT.
[[nodiscard]] bool read_from_page_cache(const IoRequest& request) noexcept;

// The flags of sync_file_range(2) for kWriteBehind.
[[nodiscard]] unsigned sync_file_range_flags(const IoRequest& request);
// The flags of fallocate(2) for kDiscard and kWriteZeroes.
[[nodiscard]] int fallocate_mode(const IoRequest& request);

// The iovecs that the next kernel call takes: what remains, at most IOV_MAX elements.
[[nodiscard]] inline iovec* next_iov(const IoRequest& request) {
  return request.iov + request.transfer.iov_first();
}
[[nodiscard]] unsigned next_iov_count(const IoRequest& request);

}  // namespace vblk::aio
