// A qcow2 image as a disk. docs/qcow2.md tells the whole; here is who does what.
//
//   a request                                               goes
//   read or write of clusters that are mapped side by side  straight to the file (forward()): no
//   lock,
//                                                           no coroutine, no copy
//   write to clusters that read as zeroes and are unmapped  a short lock to map fresh clusters, and
//                                                           then the same way (map_zeroed())
//   anything else                                           a coroutine, on its own I/O thread
//
// Children: the file that holds the image, which only this node uses; an external data file; the
// backing node, read only.
//
// Threads: any I/O thread, as image_state.h says. A request is completed on the thread that brought
// it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/block_node.h"
#include "blockdev/flush_group.h"
#include "blockdev/group_commit_policy.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/cluster_allocator.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/qcow2/image_state.h"
#include "blockdev/qcow2/iov_cursor.h"
#include "blockdev/qcow2/write_back.h"
#include "blockdev/raw_node.h"

namespace vblk::qcow2 {

struct Qcow2Options {
  bool read_only{false};
  bool discard{true};  // discards free clusters, and punch holes for them
  // Whether flushes wait for each other (flush_group.h).
  blockdev::GroupCommitPolicy group_commit{blockdev::GroupCommitPolicy::never()};
  bool may_be_empty{false};  // a disk of no bytes is opened too: to be given some
  // 0: the whole disk's L2 tables, from kL2CacheBytesMin (the disk may grow) to kL2CacheBytesMax.
  std::uint64_t l2_cache_bytes{0};
  // 0: a quarter of what the L2 cache takes, kRefcountCacheBytesMin at least.
  std::uint64_t refcount_cache_bytes{0};
};

// What is opened of an image, from bottom to top.
struct Qcow2Parts {
  std::unique_ptr<blockdev::RawNode> file;       // of a file that may grow
  std::unique_ptr<blockdev::RawNode> data_file;  // the same; nullptr: none
  std::unique_ptr<blockdev::BlockNode> backing;  // nullptr: none
  Header header;
};

// Reads and checks the header of the image in `file`. Errors as decode_header(), and kIo.
Expected<Header> read_header(blockdev::RawNode& file, const blockdev::MakePrivateContext& make);

class Qcow2Node final : public blockdev::BlockNode {
 public:
  // 32 MiB map 256 GiB with clusters of 64 KiB.
  static constexpr std::uint64_t kL2CacheBytesMin = std::uint64_t{4} << 20;
  static constexpr std::uint64_t kL2CacheBytesMax = std::uint64_t{32} << 20;
  static constexpr std::uint64_t kRefcountCacheBytesMin = std::uint64_t{256} << 10;
  // What an image of 1 MiB can make a node take, whatever it says of itself, with automatic caches
  // and one request at a time:
  //
  //   the caches                             40 MiB  above; a quarter of it for refcounts
  //   their slots, 80 + 16 bytes each         8 MiB  with the smallest slices, 512 bytes
  //   first cluster, and what it names        5 MiB  2 MiB; names of features in a map
  //   tables                                  3 MiB  whole ones must lie in the file
  //   (read_table());
  //                                                  the list of snapshots; the map of metadata
  //   a compressed cluster, or a copy         8 MiB  2 MiB, its data, zstd's window as far as used
  //
  // Each further request in flight takes two clusters at most. tests/fuzz/image_memory_test.cpp
  // counts.
  static constexpr std::uint64_t kSmallImageMemoryBytesMax = std::uint64_t{64} << 20;

  // Errors: kCorrupt (tables that cannot be, or an image marked corrupt and not read only; says
  // what to do), kIo, kNotSupported. Refcounts of an image that was not closed ("dirty bit") are
  // rebuilt first.
  static Expected<std::unique_ptr<Qcow2Node>> open(Qcow2Parts parts, const Qcow2Options& options,
                                                   blockdev::MakePrivateContext make_context);
  // Writes what is left to write, gives unused clusters back. Errors are logged. No request is in
  // flight and no other thread uses the node any more.
  ~Qcow2Node() override;

  void attach(IoContext& context) override;
  void detach(IoContext& context) override;
  [[nodiscard]] blockdev::FlushStatistics flush_statistics() const override {
    return flushes_.statistics();
  }
  [[nodiscard]] bool has_lost_writes() const override {
    return state_.is_corrupt.load(std::memory_order_relaxed) || parts_.file->has_lost_writes() ||
           (parts_.data_file != nullptr && parts_.data_file->has_lost_writes());
  }
  [[nodiscard]] Task<int> range_status(IoContext& context, std::uint64_t offset_bytes,
                                       std::uint64_t length_bytes,
                                       blockdev::RangeStatus& status) override;
  [[nodiscard]] BlockNode* backing_node() const override { return parts_.backing.get(); }
  [[nodiscard]] Task<int> allocate(IoContext& context, std::uint64_t offset_bytes,
                                   std::uint64_t length_bytes, bool takes_space) override;
  [[nodiscard]] std::uint64_t compressed_unit_bytes() const override {
    return state_.data_file == nullptr ? state_.geometry.cluster_bytes() : 0;
  }
  [[nodiscard]] Task<int> write_compressed(IoContext& context, std::uint64_t offset_bytes,
                                           std::span<std::byte> unit) override;

 protected:
  void do_submit(BlockRequest& request, IoContext& context) override;
  void do_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) override;

 private:
  class ThreadState;
  struct ForwardedRequest;

  Qcow2Node(Qcow2Parts parts, const Qcow2Options& options,
            blockdev::MakePrivateContext make_context);

  // Freed clusters that no flush has made reusable yet, before the node flushes by itself: 65536
  // pieces, 24 bytes each.
  static constexpr std::size_t kFreedExtentsMax = 65536;

  ThreadState& thread_state(IoContext& context);
  // For who works on guest data without a request of a guest.
  [[nodiscard]] unsigned enter_epoch(IoContext& context);
  void leave_epoch(IoContext& context, unsigned epoch);
  // Whether a request is still within the disk: asked again after it entered an epoch, since a
  // smaller disk waits only for those that have.
  [[nodiscard]] bool is_beyond_end(const BlockRequest& request) const {
    return request.offset_bytes + request.length_bytes > size_bytes();
  }

  // ---- Without coroutines (qcow2_node.cpp).
  void submit_read(BlockRequest& request, ThreadState& thread);
  void submit_write(BlockRequest& request, ThreadState& thread);
  [[nodiscard]] bool can_write_in_place(const Run& run, std::uint64_t length) const;
  [[nodiscard]] bool map_zeroed(std::uint64_t guest_offset, std::uint64_t length,
                                IoContext& context);
  [[nodiscard]] bool map_zeroed_cluster(std::uint64_t guest_offset, std::uint64_t end);
  void forward(BlockRequest& request, ThreadState& thread, unsigned epoch, BlockNode& child,
               std::uint64_t offset);
  void finish(BlockRequest& request, ThreadState& thread, int error);
  blockdev::Detached finish_when_written(BlockRequest& request, IoContext& context);
  static void forwarded_done(BlockRequest& request, int error);
  void flush_as_leader(BlockRequest& leader);
  void refill_if_low(IoContext& context);
  void release_quarantine(IoContext& context);

  // ---- Coroutines. `token` as for WaitList: the guest's request.
  blockdev::Detached run_request(BlockRequest& request, ThreadState& thread);
  blockdev::Detached run_flush(BlockRequest& leader);
  Task<int> flush_if_much_is_freed(IoContext& context);
  blockdev::Detached run_refill(IoContext& context);
  blockdev::Detached run_release(IoContext& context);
  // read_path.cpp
  Task<int> read(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t length,
                 std::span<const iovec> memory);
  Task<int> read_into(BlockRequest& token, std::uint64_t guest_offset, std::span<std::byte> bytes);
  Task<int> read_compressed(IoContext& context, std::uint64_t descriptor, std::uint64_t in_cluster,
                            std::vector<iovec> memory);
  // write_path.cpp
  struct CopyPlan;
  Task<int> write(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t length,
                  std::span<const iovec> memory, bool write_through);
  Task<int> write_copying(BlockRequest& token, CopyPlan& plan, std::vector<iovec> memory,
                          bool write_through);
  Task<int> write_copy(BlockRequest& token, const CopyPlan& plan, std::vector<iovec> memory,
                       bool write_through);
  Task<int> reveal_copy(BlockRequest& token, const CopyPlan& plan);
  [[nodiscard]] bool can_hold_data(std::uint64_t cluster) const;
  [[nodiscard]] bool plan_copy(std::uint64_t guest_offset, std::uint64_t length, CopyPlan& plan);
  [[nodiscard]] bool is_read_as_zero(std::uint64_t guest_offset, std::uint64_t end) const;
  Task<int> make_l2_table_ours(BlockRequest& token, std::uint64_t guest_offset);
  // zero_path.cpp
  Task<int> zero(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t length, bool unmap,
                 bool is_discard);
  Task<int> zero_units(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t end,
                       bool unmap, bool is_discard);
  Task<int> write_zero_bytes(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t length);
  [[nodiscard]] std::uint64_t space_in_data_file(std::uint64_t guest_offset, std::uint64_t end);
  enum class ZeroStep : std::uint8_t;
  [[nodiscard]] ZeroStep zero_in_entry(std::uint64_t guest_offset, std::uint64_t end, bool unmap);
  // compressed_path.cpp
  Task<int> write_compressed_cluster(BlockRequest& token, std::uint64_t guest_offset,
                                     std::span<const std::byte> compressed);
  Task<int> place_compressed(BlockRequest& token, std::uint64_t length, std::uint64_t& offset,
                             std::uint64_t& refcount_change);
  Task<int> place_compressed_alone(BlockRequest& token, std::uint64_t length, std::uint64_t& offset,
                                   std::uint64_t& refcount_change);
  // preallocation.cpp
  Task<int> allocate_clusters(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t end);
  Task<int> allocate_in_data_file(BlockRequest& token, std::uint64_t guest_offset,
                                  std::uint64_t end, bool takes_space);
  // resize.cpp
  blockdev::Detached run_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done);
  [[nodiscard]] Expected<void> can_resize(std::uint64_t size_bytes);
  Task<int> grow(BlockRequest& token, std::uint64_t new_bytes);
  Task<int> grow_l1_table(BlockRequest& token, std::uint64_t entries);
  Task<int> shrink(BlockRequest& token, std::uint64_t new_bytes);
  Task<int> wait_for_requests(BlockRequest& token);
  Task<int> write_size(BlockRequest& token, std::uint64_t size_bytes);
  Task<int> zero_mapped(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t end,
                        bool is_discard);
  // open.cpp
  Task<int> load(IoContext& context, std::string& why);
  Task<int> load_snapshots(IoContext& context, std::string& why);
  [[nodiscard]] bool map_metadata(std::string& why);
  [[nodiscard]] bool map_extent(const Extent& extent, const char* what, std::string& why);
  [[nodiscard]] bool map_tables(const std::vector<std::uint64_t>& table, std::uint64_t reserved,
                                const char* what, std::string& why);
  [[nodiscard]] int fill_last_cluster(std::string& why);
  Task<int> clear_autoclear_features(IoContext& context);
  Task<int> close(IoContext& context);

  const Qcow2Parts parts_;
  const blockdev::MakePrivateContext make_context_;
  ImageState state_;
  WriteBack write_back_;
  ClusterAllocator allocator_;
  blockdev::FlushGroup flushes_;
  std::vector<Extent> snapshot_l1_tables_;
  Extent snapshot_table_;
  // Where compressed data goes next: a cluster, with a reference of its own, and what is used of
  // it. Under the mutex.
  struct CompressedStream {
    std::uint64_t cluster{0};  // 0: none
    std::uint64_t used_bytes{0};
    std::uint64_t references{0};  // its own included
  };
  CompressedStream compressed_stream_;
  bool placing_compressed_{false};  // under the mutex
  blockdev::WaitList compressed_placed_;
  bool is_open_{false};
  bool resizing_{false};           // under the mutex
  bool releasing_{false};          // under the mutex
  bool background_refill_{false};  // under the mutex
};

}  // namespace vblk::qcow2
