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
// the first flush error, and what the kernel turned out not to support; single atomics all.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "blockdev/alignment.h"
#include "blockdev/block_node.h"
#include "blockdev/image_file.h"

namespace vblk::blockdev {

struct RawNodeOptions {
  std::string name;
  bool discard{true};        // discards and unmapping write zeroes reach the file
  bool ignore_flush{false};  // cache=unsafe
};

class RawNode final : public BlockNode {
 public:
  RawNode(std::unique_ptr<ImageFile> file, RawNodeOptions options);

  void attach(IoContext& context) override;
  void detach(IoContext& context) override;

 protected:
  void do_submit(BlockRequest& request, IoContext& context) override;

 private:
  void submit_transfer(BlockRequest& request);
  void submit_flush(BlockRequest& request);
  void submit_discard(BlockRequest& request);
  void submit_write_zeroes(BlockRequest& request);

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

  void note_flush_error(int error);
  void note_kernel_cannot_zero(bool unmapping, int error);
  void note_write_error(const BlockRequest& request, int error);

  std::unique_ptr<ImageFile> file_;
  const RawNodeOptions options_;
  AlignmentRules rules_;  // used under O_DIRECT only
  std::atomic<std::uint64_t>
      data_bytes_;                   // end of the file: the rest of its last sector reads as zeroes
  std::atomic<int> flush_error_{0};  // the first failed flush; all later ones fail with it
  std::atomic<bool> discard_works_{true};
  std::atomic<bool> kernel_zeroes_{true};  // fallocate(2) writes zeroes here without unmapping
  std::atomic<bool> kernel_zeroes_unmap_{true};
};

}  // namespace vblk::blockdev
