// A disk whose image is open only while it is used, so that two servers can have it in turn: the
// one that a guest leaves and the one that it goes to (live migration).
//
//   given up   the image is closed and not locked; the disk has the size and the limits that it had
//              when it was last looked at. No requests come.
//   taken      the image is open and locked; everything goes to it.
//
// An image that was written elsewhere meanwhile is read anew, down to its header: nothing that was
// cached survives giving up.
//
// Threads: take() and give_up() on the server's thread, while no I/O thread is attached; the rest
// as for any node.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/io_thread.h"

namespace vblk::blockdev {

// What a disk looks like from outside.
struct DiskShape {
  std::uint64_t size_bytes{0};
  BlockLimits limits;
  std::string name;
};

class HandoverNode final : public BlockNode {
 public:
  using Open = std::function<Expected<std::unique_ptr<BlockNode>>()>;

  // Given up. `open` opens and locks the image.
  HandoverNode(DiskShape shape, Open open);

  [[nodiscard]] bool is_taken() const { return disk_.load() != nullptr; }
  // Error: as `open`; kInvalidArgument if the disk's limits are not what they were, which the guest
  // has been told. Its size may be another. Nothing happens if it is taken.
  Expected<void> take();
  // Flushes, waits until nothing is done on the image any more, and closes it. `threads`: all that
  // have used it. Nothing happens if it is given up. Error: the flush failed, and it stays taken.
  Expected<void> give_up(std::span<const std::unique_ptr<IoThread>> threads);

  [[nodiscard]] FlushStatistics flush_statistics() const override;
  [[nodiscard]] bool has_lost_writes() const override;
  void attach(IoContext& context) override;
  void detach(IoContext& context) override;

 protected:
  void do_submit(BlockRequest& request, IoContext& context) override;
  void do_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) override;

 private:
  const Open open_;
  std::atomic<BlockNode*> disk_{nullptr};  // what `owned_` is; requests come only while it is there
  std::atomic<unsigned> resizes_{0};       // under way
  mutable std::mutex mutex_;               // for those that look at it from other threads
  std::unique_ptr<BlockNode> owned_;
};

}  // namespace vblk::blockdev
