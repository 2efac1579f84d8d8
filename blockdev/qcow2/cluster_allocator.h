// Host clusters: who is free, and what their refcounts are (qcow2.txt, "Host cluster management").
//
// Clusters are taken in advance. refill() finds free ones, sets their refcounts to 1 in the cache
// and puts them into the reserve; take() hands them out without any I/O, under the mutex. The
// refcounts reach the disk with the next write-back, most often long before a mapping needs them
// there, so that a guest's flush needs no second flush for the order. What is in the reserve when
// the process is killed is leaked: some MiB at most (kReserveBytesMax, kReserveClustersMin).
// close() gives it back.
//
// Clusters beyond what the file had when it was opened read as zeroes, until they are first
// written: a mapping to one may be put into place before its data is written, as long as the guest
// saw zeroes there before.
//
// New refcount blocks count themselves: each lies in the first cluster of the range that it counts
// that is still free.
//
// Threads: take() and others said so under the mutex. One refill() at a time, one release() at a
// time; only refill() raises refcounts from 0, only release() lowers them, so that neither has to
// look twice. raise() is for clusters that the caller keeps a reference to.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <vector>

#include "blockdev/qcow2/image_state.h"
#include "blockdev/qcow2/write_back.h"

namespace vblk::qcow2 {

// Clusters side by side, with refcounts of 1.
struct HostClusters {
  std::uint64_t first{0};
  std::uint64_t count{0};
  bool reads_zero{false};
  std::uint64_t refcount_change{0};  // that made them ours (write_order.h)
};

class ClusterAllocator {
 public:
  // Leaked at most by a crash: twice the larger of these, while one batch is used and the next is
  // there already.
  static constexpr std::uint64_t kReserveBytesMax = std::uint64_t{4} << 20;
  static constexpr std::uint64_t kReserveClustersMin = 4;

  ClusterAllocator(ImageState& state, WriteBack& write_back);
  ClusterAllocator(const ClusterAllocator&) = delete;
  ClusterAllocator& operator=(const ClusterAllocator&) = delete;

  // Under the mutex: up to `count_max` clusters side by side from the reserve; nothing if it is
  // empty, or if `must_read_zero` and the next ones do not. give_back(): what has not been used.
  std::optional<HostClusters> take(std::uint64_t count_max, bool must_read_zero);
  void give_back(const HostClusters& clusters);
  [[nodiscard]] bool is_empty() const { return reserve_.empty(); }
  // Under the mutex: whether new clusters at the file's end get their space at once.
  void set_takes_space(bool takes_space) { takes_space_ = takes_space; }
  // Under the mutex: whether it is time to refill, before it is empty.
  [[nodiscard]] bool runs_low() const { return reserved_ < batch_ / 2 && !refilling_; }

  // Puts a batch into the reserve, or waits for who is doing so. Errors: ENOSPC, EFBIG (the
  // format's limit), EIO. `token` as for WaitList.
  Task<int> refill(IoContext& context, BlockRequest& token);

  // `count` clusters side by side that nobody else has, for a table. Error as refill().
  Task<int> allocate_table(IoContext& context, BlockRequest& token, std::uint64_t count,
                           HostClusters& clusters);

  // One more reference to a cluster that has some, and fewer than the format can count; `change` is
  // that of write_order.h. Errors as refcount().
  Task<int> raise(IoContext& context, BlockRequest& token, std::uint64_t cluster,
                  std::uint64_t& change);

  // Lowers the refcounts of clusters that have left quarantine; punches holes first where that is
  // asked for.
  Task<int> release(IoContext& context, BlockRequest& token, FreedClusters clusters);

  // The refcount of a cluster, 0 where no refcount block exists.
  Task<int> refcount(IoContext& context, BlockRequest& token, std::uint64_t cluster,
                     std::uint64_t& count);

  // The file has got its size, and nobody has allocated yet.
  void opened();
  // Nobody allocates any more: empties the reserve and cuts the file's unused end off.
  Task<int> close(IoContext& context, BlockRequest& token);

 private:
  Task<int> refill_alone(IoContext& context, BlockRequest& token);
  Task<int> reserve_at(IoContext& context, BlockRequest& token, std::uint64_t count_max,
                       std::uint64_t& found);
  Task<int> create_refcount_block(IoContext& context, BlockRequest& token, std::uint64_t cluster);
  Task<int> grow_refcount_table(IoContext& context, BlockRequest& token, std::uint64_t cluster);
  Task<int> lower_refcount(IoContext& context, BlockRequest& token, std::uint64_t cluster);
  Task<int> allocate_with_blocks(IoContext& context, BlockRequest& token, std::uint64_t count,
                                 HostClusters& clusters);
  void fill_with_ones(std::span<std::byte> blocks, std::uint64_t count) const;
  int grow_file(std::uint64_t end_cluster);
  Task<int> grow_file_with_space(IoContext& context, std::uint64_t end_cluster);
  void add_to_reserve(std::uint64_t first, std::uint64_t count);
  [[nodiscard]] std::uint64_t slice_of(std::uint64_t cluster) const {
    return cluster >> state_.geometry.refcount_slice_bits();
  }
  [[nodiscard]] std::uint64_t refcount_in(const TableCache::Slot& slot,
                                          std::uint64_t cluster) const;
  void set_refcount(TableCache::Slot& slot, std::uint64_t cluster, std::uint64_t count);

  ImageState& state_;
  WriteBack& write_back_;
  std::deque<HostClusters> reserve_;
  std::uint64_t reserved_{0};  // clusters in it
  std::uint64_t batch_;
  std::uint64_t search_from_{0};  // no free cluster before this
  std::uint64_t zero_from_{0};    // clusters from here on read as zeroes
  bool takes_space_{true};        // grow_file_with_space()
  bool refilling_{false};
  int refill_error_{0};
  blockdev::WaitList refilled_;
};

}  // namespace vblk::qcow2
