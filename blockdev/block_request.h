// One operation on a disk, as nodes take it from the front and from each other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <sys/uio.h>

#include "aio/io_request.h"
#include "blockdev/bounce_pool.h"

namespace vblk::blockdev {

// What virtio counts disks in (virtio 1.2, "Block Device"), and the granularity of changes.
inline constexpr std::uint64_t kSectorBytes = 512;

// The kinds of operation are the engines' kinds: a node may turn one into several of another.
using BlockOperation = aio::IoKind;

// Where a request stands that takes several kernel I/Os, one after another (alignment.h).
struct PieceProgress {
  std::uint64_t done_bytes{0};   // of the request
  std::uint64_t piece_bytes{0};  // of the piece in flight
  std::uint32_t iov_first{0};    // first iovec that is not used up
  iovec iov_rest{};              // what the piece leaves of its last iovec
  bool has_iov_rest{false};
  std::byte* bounce{nullptr};          // the piece goes through this buffer
  std::uint64_t bounce_skip_bytes{0};  // what the buffer holds before the piece
  iovec bounce_iov{};
};

// A request to a node.
//
// Ownership: the caller owns it, its iovec array and the buffers, and keeps them in place from
// BlockNode::submit() until `complete` runs; nodes may rewrite the iovec array meanwhile.
// Everything a leaf needs to carry it out is embedded, so that nothing is allocated per request.
// Thread and completion: as for aio::IoRequest: same thread, exactly once, never inside submit().
struct BlockRequest {
  using Completion = void (*)(BlockRequest& request, int error);

  BlockOperation operation{BlockOperation::kRead};
  bool write_through{false};  // kWrite, kWriteZeroes: stable on the disk when it completes
  bool may_unmap{false};      // kWriteZeroes: may deallocate
  // kWriteZeroes, of what reads as zeroes and nobody is writing: only has space found for it. That
  // is a favour: nothing is done where the kernel cannot do it, and it is never an error.
  bool only_takes_space{false};
  // Whatever changes the disk: when it completes, nothing of it is in this process alone, so that
  // SIGKILL cannot take it back. It need not be stable on the disk.
  bool outlives_process{false};
  // Multiples of kSectorBytes for whatever changes the disk (alignment.h says why); reads take any.
  std::uint64_t offset_bytes{0};
  std::uint64_t length_bytes{0};  // sum of the iovecs for kRead and kWrite
  iovec* iov{nullptr};            // kRead and kWrite only
  std::uint32_t iov_count{0};
  Completion complete{nullptr};  // `error` is an errno value, 0 for success

  // Below: scratch of the node that is carrying the request out, and of the I/O context.
  BlockRequest* next{nullptr};  // in a list of the I/O context, or of those it must wait for
  BlockRequest* next_in_group{nullptr};  // flush_group.h
  class BlockNode* node{nullptr};
  class IoContext* context{nullptr};
  int deferred_error{0};
  void* forwarded{nullptr};  // of the formats that have passed it on as it is, the last one's
  void (*resume)(BlockRequest& request, void* argument){nullptr};  // io_context.h
  void* resume_argument{nullptr};
  PieceProgress pieces;
  struct BounceWaiter : BouncePool::Waiter {
    BlockRequest* parent{nullptr};
  } bounce_waiter;
  struct Io : aio::IoRequest {
    BlockRequest* parent{nullptr};
  } io;
};

}  // namespace vblk::blockdev
