// Writes a new image from one end to the other: what `vblk img create` and `convert` make.
//
// Nothing of the new image is ever read back, and nobody else uses it, so there is no cache and no
// order of writes but one: the header comes last. Until then the file is not a qcow2 image, however
// the process or the machine ends.
//
//   cluster 0      header, written last
//   1 ...          L1 table, written by write_tables()
//   then           data, compressed data and L2 tables, as they come: place() gives host clusters
//                  away one after another, in the order of its calls
//   at the end     refcount table and refcount blocks, when it is known what they count
//
// An L2 table is in memory from the first cluster that it maps until all that come before its end
// have been placed, so that clusters which are placed in order need two tables at a time.
// Compressed data goes into a stream of clusters that fill up byte by byte; of those there is one
// in memory.
//
// Memory: the L1 table (32 MiB at most), the tables and the stream's cluster just told of, and 16
// bytes for each host cluster of compressed data.
//
// Threads: place() any; the tasks on the thread of their context. The writer does not flush.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <span>
#include <vector>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

struct ImageWriterOptions {
  // Every guest cluster gets a host cluster, also where nothing is written. What is not written in
  // `file` must read as zeroes then.
  bool map_everything{false};
};

// A guest cluster of the new image.
struct NewCluster {
  enum class Content : std::uint8_t {
    kNothing,  // reads as the backing file, or zeroes
    kZero,
    kData,        // `bytes` are a whole cluster
    kCompressed,  // `bytes` are what compress() made, fewer than a cluster
  };
  Content content{Content::kNothing};
  std::span<const std::byte> bytes;
};

class ImageWriter {
 public:
  // What place() leaves to be written. The memory of data is the caller's; the rest is in here.
  class Writes {
   public:
    [[nodiscard]] bool is_empty() const { return pieces_.empty(); }

   private:
    friend class ImageWriter;
    struct Piece {
      blockdev::BlockNode* node;
      std::uint64_t offset;
      std::uint64_t length;
      std::vector<iovec> memory;
    };
    void add(blockdev::BlockNode& node, std::uint64_t offset, std::span<const std::byte> bytes);
    void add_owned(blockdev::BlockNode& node, std::uint64_t offset, blockdev::AlignedBuffer buffer);

    std::vector<Piece> pieces_;
    std::deque<blockdev::AlignedBuffer> owned_;
  };

  // `header` says version, geometry (refcounts of 16 bits in version 2), size, features and names;
  // the writer adds where things are. With `data_file`, which must be as long as the disk, data
  // goes there. Both nodes outlive the writer.
  ImageWriter(blockdev::RawNode& file, blockdev::RawNode* data_file, Header header,
              ImageWriterOptions options);
  ImageWriter(const ImageWriter&) = delete;
  ImageWriter& operator=(const ImageWriter&) = delete;

  // First: makes sure that the file holds no image any more. For one that may hold something.
  blockdev::Task<int> erase_header(blockdev::IoContext& context);

  // Gives [first_cluster, +clusters.size()) what they are to be, each guest cluster once. EFBIG:
  // the image becomes too large; ENOSPC and others: the file cannot be so long.
  int place(std::uint64_t first_cluster, std::span<const NewCluster> clusters, Writes& writes);
  // The same for many that are nothing, without map_everything.
  void skip(std::uint64_t first_cluster, std::uint64_t count);
  // Writes what place() has left. The data of `writes` is not needed afterwards.
  static blockdev::Task<int> carry_out(blockdev::IoContext& context, Writes& writes);

  // When all has been placed and carried out: everything but the header. Errors as place().
  blockdev::Task<int> write_tables(blockdev::IoContext& context);
  // Where the file ends after write_tables().
  [[nodiscard]] std::uint64_t end_bytes() const { return frontier_ << geometry_.cluster_bits; }
  // The last writes: a header without the number that it is known by, so that the file is no image
  // yet, though those who have header() can change it as one; and that number, in one sector.
  // Error: EINVAL: the names do not fit (encode_header()).
  blockdev::Task<int> write_hidden_header(blockdev::IoContext& context);
  blockdev::Task<int> reveal_header(blockdev::IoContext& context);

  [[nodiscard]] const Header& header() const { return header_; }
  [[nodiscard]] bool maps_everything() const { return options_.map_everything; }

 private:
  struct StreamCount {
    std::uint64_t cluster;
    std::uint64_t count;
  };
  [[nodiscard]] std::uint64_t take_cluster() { return frontier_++; }
  [[nodiscard]] int make_room();
  [[nodiscard]] std::byte* entry(std::uint64_t guest_cluster);
  void place_one(std::uint64_t guest_cluster, const NewCluster& cluster, Writes& writes);
  void map_cluster(std::uint64_t guest_cluster, std::span<const std::byte> bytes,
                   bool reads_backing, Writes& writes);
  void map_zero(std::uint64_t guest_cluster, Writes& writes);
  [[nodiscard]] std::uint64_t append(std::span<const std::byte> bytes, Writes& writes);
  void open_stream();
  void emit_stream(Writes& writes);
  void mark_placed(std::uint64_t first_cluster, std::uint64_t count);
  void emit_tables(std::uint64_t end_table, Writes& writes);
  blockdev::Task<int> write_refcounts(blockdev::IoContext& context);
  void counts_of(std::uint64_t first, std::span<std::uint32_t> counts);

  blockdev::RawNode& file_;
  blockdev::RawNode* const data_file_;
  const Geometry geometry_;
  const ImageWriterOptions options_;
  Header header_;

  std::mutex mutex_;           // over what follows, until write_tables()
  std::uint64_t frontier_{1};  // first host cluster that nobody has
  std::vector<std::uint64_t> l1_table_;
  std::map<std::uint64_t, blockdev::AlignedBuffer> tables_;  // L2, by their index
  std::uint64_t placed_until_{0};                            // guest clusters
  std::map<std::uint64_t, std::uint64_t> placed_ahead_;      // beyond: first, end
  blockdev::AlignedBuffer stream_;                           // the cluster that fills up
  std::uint64_t stream_cluster_{0};                          // 0: none
  std::uint64_t stream_fill_{0};
  std::vector<StreamCount> stream_counts_;  // ascending
  std::size_t next_count_{0};               // of them, for counts_of()
  blockdev::AlignedBuffer zero_cluster_;
};

}  // namespace vblk::qcow2
