// A node of the block graph: a protocol leaf (raw file, null), a format, later a filter.
//
// A node is the shared, thread-safe description of a disk and its state; the I/O threads bring what
// must not be shared in an IoContext. submit() is the one gate: it checks a request against the
// node's limits once, so that the pieces behind it hold no defensive code.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>

#include "aio/error.h"
#include "blockdev/block_request.h"
#include "blockdev/flush_group.h"
#include "blockdev/task.h"

namespace vblk::blockdev {

class IoContext;

// What a node can do and how big it is. Fixed while requests run, except the size (live resize).
struct BlockLimits {
  // Granularity that goes to the disk in one piece; a power of two. A hint for the guest's
  // topology: nodes take any sectors.
  std::uint32_t optimal_alignment_bytes{512};
  bool read_only{false};
  bool can_discard{false};
  bool can_write_zeroes{false};
  bool write_zeroes_may_unmap{false};  // whether may_unmap can free space here
  bool operator==(const BlockLimits&) const = default;
};

// What is known of a range of a disk without reading it; all of it is alike.
struct RangeStatus {
  enum class Kind : std::uint8_t {
    kData,
    kZero,
    kBacking,  // what the backing node has there; zeroes where that is none, or ends
  };
  Kind kind{Kind::kData};
  std::uint64_t length_bytes{0};
  // Where the range lies, if it has space as it is: in which file, and from where on. Not for
  // compressed data.
  std::optional<std::uint64_t> file_offset;
  const std::string* file{nullptr};  // the node's own
  int fd{-1};                        // of that file, through the page cache; the node's own
};

class BlockNode {
 public:
  BlockNode() = default;
  virtual ~BlockNode() = default;
  BlockNode(const BlockNode&) = delete;
  BlockNode& operator=(const BlockNode&) = delete;

  // Size of the disk as the guest sees it. Any thread.
  [[nodiscard]] std::uint64_t size_bytes() const {
    return size_bytes_.load(std::memory_order_relaxed);
  }
  [[nodiscard]] const BlockLimits& limits() const { return limits_; }
  // For messages: the path, or "null".
  [[nodiscard]] const std::string& name() const { return name_; }

  // What has become of the guest's flushes. Any thread; a moment old.
  [[nodiscard]] virtual FlushStatistics flush_statistics() const { return {}; }

  // Whether what was written may be gone, so that all flushes fail from now on and no repetition
  // helps. Any thread.
  [[nodiscard]] virtual bool has_lost_writes() const { return false; }

  // An I/O thread announces that it will submit requests, and takes that back when none is in
  // flight. Calls nest. For what engines do better if they know before. Loop thread of `context`.
  virtual void attach(IoContext& /*context*/) {}
  virtual void detach(IoContext& /*context*/) {}

  // Carries out `request` on the calling I/O thread with what `context` lends. Never fails by
  // itself: every outcome arrives through request.complete(). Errors decided at the gate: EINVAL
  // (beyond the end, a change that is not whole sectors, lengths that do not add up), EROFS (change
  // of a read-only disk), EOPNOTSUPP.
  void submit(BlockRequest& request, IoContext& context);

  // How [offset_bytes, +length_bytes) is stored, as far as it is alike from its beginning on; the
  // range lies within the disk and is not empty. Not for the data path: system calls. On the loop
  // thread of `context`. 0, or an errno value.
  [[nodiscard]] virtual Task<int> range_status(IoContext& context, std::uint64_t offset_bytes,
                                               std::uint64_t length_bytes, RangeStatus& status);
  // What is read where range_status() says kBacking; nullptr: zeroes.
  [[nodiscard]] virtual BlockNode* backing_node() const { return nullptr; }

  // Gives [offset_bytes, +length_bytes), which lies within the disk and reads as zeroes, clusters
  // of its own, as preallocation does; what has some already keeps them. `takes_space`: the file
  // below gets its space as well, where it can without writing. Not for the data path. Loop thread
  // of `context`. 0, or an errno value: EOPNOTSUPP where nothing is mapped.
  [[nodiscard]] virtual Task<int> allocate(IoContext& context, std::uint64_t offset_bytes,
                                           std::uint64_t length_bytes, bool takes_space);

  // What write_compressed() takes at a time; 0: the disk stores nothing compressed. Any thread.
  [[nodiscard]] virtual std::uint64_t compressed_unit_bytes() const { return 0; }
  // Writes one unit, at a multiple of its size and not behind the disk's end, compressed, or as it
  // is where that takes less. `unit` is what the guest is to read, and zeroes behind the disk's
  // end. It compresses on the calling thread, the loop thread of `context`. 0, or an errno value.
  [[nodiscard]] virtual Task<int> write_compressed(IoContext& context, std::uint64_t offset_bytes,
                                                   std::span<std::byte> unit);

  // Makes the disk `size_bytes` long while requests run, on the loop thread of `context`. `done` is
  // called there, at once or later; the new size is stable on the disk by then, and new space reads
  // as zeroes. Requests beyond a smaller end fail from the beginning of the call on, and what was
  // there is lost. Errors: kInvalidArgument (not whole sectors, or none), kNotSupported (what can
  // be done instead is in the message), kPermission (read only), kBusy (another change of size is
  // under way), kExhausted, kIo; the disk then has its old size.
  using ResizeDone = std::function<void(Expected<void>)>;
  void resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done);

 protected:
  // The node's own work on a request that passed the gate: in range, not empty (empty requests are
  // completed by the gate), allowed. Must end in exactly one completion, never synchronously:
  // through an engine or context.complete_later().
  virtual void do_submit(BlockRequest& request, IoContext& context) = 0;

  // resize() to another size that is possible as far as the node's limits tell.
  virtual void do_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done);

  std::atomic<std::uint64_t> size_bytes_{0};
  BlockLimits limits_;
  std::string name_;
};

}  // namespace vblk::blockdev
