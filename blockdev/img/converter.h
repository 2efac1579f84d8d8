// The work of `vblk img convert`: reads a disk, or several behind each other, and writes it into a
// new image or an existing one.
//
// Workers on several threads take the disk chunk by chunk: look how it is stored, read what is
// data, look for zeroes, compress, and write. With `in_order` they submit their writes in the order
// of the chunks, so that a new image lies in its file as the disk does; everything else goes on
// beside each other. What has no data is passed over in strides.
//
// A plain copy into a file that takes one write at a time is the work of one thread, with half of
// the workers: writes of several threads would wait for each other, spinning, while those of one
// ring are lined up by the kernel. Data that turns out to be compressed brings the others in.
//
// With `compression` and a disk to be written to, it is the disk that compresses, whole units of
// its own (BlockNode::write_compressed()).
//
// Memory: a chunk for each worker, 1 MiB or a cluster of the target if that is larger; twice that
// where data is compressed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "blockdev/block_io.h"
#include "blockdev/img/progress.h"
#include "blockdev/img/source.h"
#include "blockdev/img/workers.h"
#include "blockdev/qcow2/image_writer.h"

namespace vblk::img {

struct ConvertPlan {
  std::vector<Source*> sources;  // one behind the other
  std::uint64_t size_bytes{0};   // of the new disk: at least all of them, in whole sectors
  // One of the two: a new qcow2 image, or a disk that is written to.
  qcow2::ImageWriter* writer{nullptr};
  BlockNode* target{nullptr};
  bool target_reads_zero{false};  // what is not written to `target` is zero already
  // What the source's images down to this depth do not have is left to the target, and what they
  // have may have to be zeroed there. kWholeChain: the target has nothing of the source's.
  unsigned depth_max{kWholeChain};
  // Runs of zeroes of this length are not written; 0: everything is.
  std::uint64_t sparse_bytes{4096};
  // Only this part of the sources, which need not begin or end with a sector; what the new disk has
  // behind it is zeroes. All of it counts as data, and `sparse_bytes` is 0.
  struct Window {
    std::uint64_t skip_bytes;
    std::uint64_t length_bytes;
  };
  std::optional<Window> window;
  std::optional<qcow2::Compression> compression;
  bool in_order{true};
  // The kernel lets one write at a time into what takes the data: a regular file written through
  // the page cache.
  bool one_write_at_a_time{false};
  unsigned workers_max{8};
  std::uint64_t rate_bytes{0};  // per second; 0: no limit
  // Told of each range of `target` before it is written, by any thread; may be empty.
  std::function<void(std::uint64_t offset, std::uint64_t length)> written{};
  // The file of a raw `target`, if the kernel is to copy into it what is data (copy_file_range(2)),
  // zeroes and all, as far as it can; -1: it is not.
  int copy_fd{-1};
  // What cannot be read becomes zeroes, and is told of.
  bool salvage{false};
  bool quiet{false};
};

class Converter {
 public:
  Converter(const ConvertPlan& plan, Progress& progress);
  // Errors: what could not be read or written, and where.
  Expected<void> run();

 private:
  enum class Content : std::uint8_t { kData, kZero, kBacking, kCopied };
  struct Piece {
    std::uint64_t begin;
    std::uint64_t end;
    Content content;
  };
  struct Chunk {
    std::uint64_t number{0};
    std::uint64_t skipped_from{0};  // from here to `begin` there is nothing to write
    std::uint64_t begin{0};
    std::uint64_t end{0};
  };
  struct Buffers;

  Expected<void> run_on(unsigned workers, unsigned threads_max);
  [[nodiscard]] bool take(Chunk& chunk);
  Task<int> work(IoContext& context);
  Task<int> convert(IoContext& context, const Chunk& chunk, Buffers& buffers);
  Task<int> look(IoContext& context, const Chunk& chunk, std::vector<Piece>& pieces);
  Task<int> read(IoContext& context, const Chunk& chunk, const std::vector<Piece>& pieces,
                 Buffers& buffers);
  Task<int> read_piece(IoContext& context, std::uint64_t begin, std::span<std::byte> bytes);
  Task<int> salvage(IoContext& context, std::uint64_t begin, std::span<std::byte> bytes);
  void widen_to_clusters(const Chunk& chunk, std::vector<Piece>& pieces) const;
  void plan_clusters(const Chunk& chunk, const std::vector<Piece>& pieces, Buffers& buffers) const;
  Task<int> write_clusters(IoContext& context, const Chunk& chunk, Buffers& buffers);
  void split_at_zeroes(const Chunk& chunk, std::vector<Piece>& pieces, Buffers& buffers) const;
  Task<int> write_disk(IoContext& context, const Chunk& chunk, const std::vector<Piece>& pieces,
                       Buffers& buffers);
  Task<int> write_zeroes(IoContext& context, std::uint64_t begin, std::uint64_t end);
  Task<int> write_compressed(IoContext& context, const Chunk& chunk, Buffers& buffers);
  Task<int> copy_in_kernel(IoContext& context, std::vector<Piece>& pieces);
  Task<int> copy_piece(IoContext& context, const Piece& piece, std::uint64_t& copied_until);
  void pace(std::uint64_t bytes);
  void note_error(const char* what, std::uint64_t offset, int error);
  // Whether a range that reads as zeroes needs nothing to be done.
  [[nodiscard]] bool zeroes_need_nothing() const {
    if (plan_.sparse_bytes == 0) return false;
    return plan_.writer != nullptr ? plan_.depth_max == kWholeChain : plan_.target_reads_zero;
  }
  // A source, and where it begins in the new disk.
  struct Part {
    Source* source;
    std::uint64_t begin;
    std::unique_ptr<StatusReader> status;
  };
  [[nodiscard]] const Part* part_at(std::uint64_t offset) const;

  [[nodiscard]] bool fills_clusters() const {
    return plan_.writer != nullptr || (plan_.target != nullptr && plan_.compression);
  }

  const ConvertPlan& plan_;
  Progress& progress_;
  std::vector<Part> parts_;
  std::uint64_t cluster_bytes_{0};  // of what fills_clusters()
  std::uint64_t chunk_bytes_;
  bool may_skip_;
  Turns turns_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> has_compressed_{false};  // the source, as far as it was looked at
  bool on_one_thread_;                       // changes while no worker runs
  std::atomic<bool> kernel_copies_;          // as long as it has not refused to

  std::mutex mutex_;  // over what follows
  std::uint64_t next_{0};
  std::uint64_t next_number_{0};
  std::uint64_t skipped_from_{0};  // where the last chunk that was taken ends
  std::uint64_t empty_until_{0};   // from next_ on there is nothing to write before this
  std::chrono::steady_clock::time_point next_write_;
  std::optional<Error> error_;
};

}  // namespace vblk::img
