// The raw leaf: a file or block device whose bytes are the disk's bytes.
//
// The fast path (an aligned request on O_DIRECT, any request in the buffered modes) is one engine
// request with the caller's own iovecs. Everything else goes piece by piece, slower and right:
//
//   unaligned write, under O_DIRECT   edges buffered, body direct, bounced if memory is unaligned
//   unaligned read, under O_DIRECT    direct, of the whole blocks around it, bounced
//   read beyond the end of the file   zeroes: the guest sees the size rounded up to whole sectors
//   write zeroes                      by the kernel as far as it can, otherwise writes of zeroes
//   write zeroes, write-through       then a flush
//
// Threads: any I/O thread. What they share: the size of the data (grows to a whole sector at most),
// the first flush error, what the kernel turned out not to support, single atomics all; and the
// flushes (flush_group.h).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "blockdev/alignment.h"
#include "blockdev/block_node.h"
#include "blockdev/flush_group.h"
#include "blockdev/group_commit_policy.h"
#include "blockdev/image_file.h"
#include "blockdev/task.h"

namespace vblk::blockdev {

struct RawNodeOptions {
  std::string name;
  bool discard{true};        // discards and unmapping write zeroes reach the file
  bool ignore_flush{false};  // cache=unsafe
  bool share_flushes{true};  // flush_group.h; otherwise each flush is a call of its own
  // With share_flushes: whether they wait for each other.
  GroupCommitPolicy group_commit{GroupCommitPolicy::never()};
  // Not under O_DIRECT: the window of write_behind.h, on each I/O thread that is attached. 0: none.
  std::uint64_t write_behind_bytes{0};
  // The file holds an image of a format that grows: the node has no end, beyond the file's it reads
  // as zeroes, and grow() comes before what is written there.
  bool holds_format{false};
};

class WriteBehind;

class RawNode final : public BlockNode {
 public:
  RawNode(std::unique_ptr<ImageFile> file, RawNodeOptions options);

  void attach(IoContext& context) override;
  void detach(IoContext& context) override;
  [[nodiscard]] FlushStatistics flush_statistics() const override { return flushes_.statistics(); }
  [[nodiscard]] bool has_lost_writes() const override {
    return flush_error_.load(std::memory_order_relaxed) != 0;
  }

  // By what the file system says of holes.
  [[nodiscard]] Task<int> range_status(IoContext& context, std::uint64_t offset_bytes,
                                       std::uint64_t length_bytes, RangeStatus& status) override;

  // Where the file ends. Any thread.
  [[nodiscard]] std::uint64_t data_bytes() const {
    return data_bytes_.load(std::memory_order_relaxed);
  }
  [[nodiscard]] bool is_block_device() const { return file_->is_block_device(); }
  // Through the page cache; the node's own.
  [[nodiscard]] int buffered_fd() const { return file_->buffered_fd(); }
  // Of a file that holds a format: makes it end at `size_bytes`, and what is new read as zeroes.
  // The next flush makes that stable. 0, or an errno value. One at a time; system calls. shrink():
  // no request beyond the new end is in flight. For other disks there is resize(), which makes them
  // larger only: a write in flight beyond a new end would make the file longer again.
  [[nodiscard]] int grow(std::uint64_t size_bytes);
  [[nodiscard]] int shrink(std::uint64_t size_bytes);

 protected:
  void do_submit(BlockRequest& request, IoContext& context) override;
  void do_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) override;

 private:
  Detached run_grow(std::uint64_t size_bytes, IoContext& context, ResizeDone done);
  int set_file_end(std::uint64_t size_bytes);
  void submit_transfer(BlockRequest& request);
  void submit_flush(BlockRequest& request);
  void queue_flush(BlockRequest& request);
  void submit_discard(BlockRequest& request);
  void submit_write_zeroes(BlockRequest& request);
  void submit_taking_space(BlockRequest& request);

  void start_pieces(BlockRequest& request);
  void next_step(BlockRequest& request);
  bool step_data(BlockRequest& request, std::uint64_t offset_bytes, std::uint64_t end_bytes);
  void step_zeroes(BlockRequest& request, std::uint64_t offset_bytes, std::uint64_t end_bytes);
  void zero_by_kernel(BlockRequest& request, std::uint64_t length_bytes);
  void zero_by_writing(BlockRequest& request, std::uint64_t offset_bytes, std::uint64_t end_bytes);
  void bounce(BlockRequest& request, std::uint64_t offset_bytes, std::uint64_t end_bytes,
              BlockRange blocks);
  void start_bounce(BlockRequest& request, std::byte* buffer);
  void piece_done(BlockRequest& request, int error);
  void finish_pieces(BlockRequest& request, int error);
  void queue_io(BlockRequest& request, aio::IoKind kind, int fd,
                aio::IoRequest::Completion complete);

  [[nodiscard]] AlignmentRules rules() const {
    return {.offset_bytes = rules_.offset_bytes,
            .memory_bytes = rules_.memory_bytes,
            .direct_end = direct_end_.load(std::memory_order_relaxed)};
  }
  void set_data_bytes(std::uint64_t size_bytes);
  [[nodiscard]] WriteBehind* write_behind_of(const BlockRequest& request) const;
  void note_change(const BlockRequest& request, int error);
  void note_write_behind_error(int error);
  void note_flush_error(int error);
  void note_kernel_cannot_zero(bool unmapping, int error);
  void note_write_error(const BlockRequest& request, int error);

  std::unique_ptr<ImageFile> file_;
  const RawNodeOptions options_;
  AlignmentRules rules_;  // used under O_DIRECT only, by rules()
  std::atomic<std::uint64_t> direct_end_{0};
  std::atomic<std::uint64_t>
      data_bytes_;  // end of the file: the rest of its last sector reads as zeroes
  std::atomic<bool> resizing_{false};
  std::atomic<int> flush_error_{0};  // the first failed flush; all later ones fail with it
  FlushGroup flushes_;
  std::atomic<bool> discard_works_{true};
  std::atomic<bool> kernel_zeroes_{true};  // fallocate(2) writes zeroes here without unmapping
  std::atomic<bool> kernel_zeroes_unmap_{true};
  std::atomic<bool> write_behind_works_{true};
};

}  // namespace vblk::blockdev
