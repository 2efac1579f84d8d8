// One kernel I/O, as every engine takes it: caller-owned, intrusive, allocated by nobody.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sys/uio.h>

#include "aio/transfer.h"
#include "threadpool/work.h"

namespace vblk::aio {

// The kinds of operation that can be routed to engines one by one (`--aio read=...,flush=...`).
enum class IoKind : std::uint8_t { kRead, kWrite, kFlush, kDiscard, kWriteZeroes, kWriteBehind };
inline constexpr std::size_t kIoKindCount = 6;

// A request to an engine.
//
// Ownership: the caller owns it, its iovec array and the buffers, and keeps all of them in place
// and unchanged from EngineSet::queue() until `complete` runs. The engine may rewrite the iovec
// array's elements while it works off short transfers.
// Thread: queued on, and completed on, the thread that owns the engine.
// Completion: exactly once, never inside queue() or submit(), always from reap().
// All or nothing: `complete` gets 0 only if every byte was transferred. End of file inside a read
// is ENODATA. A write that the kernel keeps ending short without progress is ENOSPC.
struct IoRequest : threadpool::Work {
  using Completion = void (*)(IoRequest& request, int error);

  IoKind kind{IoKind::kRead};
  // kWrite: stable on the disk when it completes (RWF_DSYNC, never write + fdatasync).
  bool write_through{false};
  // kWriteZeroes: may deallocate (PUNCH_HOLE); otherwise ZERO_RANGE keeps the space.
  bool may_unmap{false};
  // kWriteBehind: also wait until what the page cache holds of the range has been written; that
  // makes it no more durable. Otherwise the writing is only started.
  bool until_written{false};
  // kDiscard: `fd` is a block device, to be discarded by BLKDISCARD instead of PUNCH_HOLE.
  bool on_block_device{false};
  // kRead: `fd` is not O_DIRECT, so the page cache may have the data already.
  bool may_be_cached{false};
  int fd{-1};
  std::uint64_t offset_bytes{0};  // unused by kFlush
  std::uint64_t length_bytes{0};  // sum of the iovecs for kRead and kWrite; unused by kFlush
  iovec* iov{nullptr};            // kRead and kWrite only; 1 to IOV_MAX elements
  std::uint32_t iov_count{0};
  Completion complete{nullptr};  // `error` is an errno value, 0 for success

  // Below: the engine's own, valid between queue() and completion.
  Transfer transfer;
  class Engine* engine{nullptr};
  long result{0};  // bytes, or a negated errno value
};

}  // namespace vblk::aio
