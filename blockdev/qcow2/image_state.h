// What all parts of an open qcow2 image share: its tables in memory, and the mutex over them.
//
// Who may do what, on any I/O thread:
//
//   without the mutex    read the mapping (lookup()), the atomics, what is const after opening
//   with it              everything else; never across I/O: what waits unlocks first
//
// The rules that keep it right, and where:
//   - what is written in which order: write_order.h, write_back.h
//   - who may use a cluster that was freed, and when: "Freeing", below
//   - who may allocate for a guest cluster: Allocation, below
//
// Freeing. A cluster that the mapping no longer names passes through three stations, each a list
// here, before the allocator sees it again:
//   1. freed       the mapping was changed in memory. A flush that begins afterwards writes it.
//   2. quarantine  that flush has ended: no power cut can bring the old mapping back. Requests that
//                  looked it up before are waited for (request_epochs.h).
//   3. release     a hole is punched where that was asked for, then the refcount goes down.
// So a lower refcount is never on the disk before the mapping that no longer needs the cluster, and
// no punched hole or new owner meets an old request. What is lost by a crash on the way is a leak.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "blockdev/block_node.h"
#include "blockdev/qcow2/format.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/qcow2/request_epochs.h"
#include "blockdev/qcow2/table_cache.h"
#include "blockdev/qcow2/write_order.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"
#include "blockdev/wait_list.h"

namespace vblk::qcow2 {

using blockdev::BlockRequest;
using blockdev::IoContext;
using blockdev::Task;

// A run of guest bytes that are mapped alike.
struct Run {
  Mapping mapping{Mapping::kUnallocated};
  bool copied{false};  // its clusters' refcounts are 1: it may be written in place
  std::uint64_t length{0};
  std::uint64_t host_offset{0};  // of its first byte, where it has space
  std::uint64_t descriptor{0};   // of a compressed cluster
};

// Blocks of a table that is wholly in memory and is written in pieces.
class DirtyBlocks {
 public:
  static constexpr std::size_t kEntries = 64;  // 512 bytes
  struct Block {
    std::size_t number;
    std::uint64_t since;
    WriteOrder order;
  };
  void mark(std::size_t entry, std::uint64_t change, const WriteOrder& order) {
    add({entry / kEntries, change, order});
  }
  void add(const Block& block) {
    for (Block& known : blocks_) {
      if (known.number != block.number) continue;
      known.order.include(block.order);
      known.since = std::min(known.since, block.since);
      return;
    }
    blocks_.push_back(block);
  }
  [[nodiscard]] std::vector<Block> take() { return std::exchange(blocks_, {}); }
  [[nodiscard]] bool has_before(std::uint64_t change) const {
    return std::ranges::any_of(blocks_, [change](const Block& b) { return b.since <= change; });
  }
  [[nodiscard]] bool is_empty() const { return blocks_.empty(); }

 private:
  std::vector<Block> blocks_;  // a table has 65536 at most, few of them dirty between two flushes
};

// Host clusters that hold metadata, so that neither data nor other metadata is ever put there.
class MetadataMap {
 public:
  // False: somebody else has the cluster.
  bool add(std::uint64_t cluster) {
    filter_bit(cluster).fetch_or(mask(cluster), std::memory_order_relaxed);
    return clusters_.insert(cluster).second;
  }
  void remove(std::uint64_t cluster) { clusters_.erase(cluster); }
  [[nodiscard]] bool contains(std::uint64_t cluster) const { return clusters_.contains(cluster); }
  // Without the mutex. False: certainly not. A cluster of another's bit says true as well.
  [[nodiscard]] bool may_contain(std::uint64_t cluster) const {
    return (filter_[slot(cluster)].load(std::memory_order_relaxed) & mask(cluster)) != 0;
  }

 private:
  // 2^19 bits, 64 KiB: with 64 KiB clusters a terabyte has some 2,500 metadata clusters.
  static constexpr std::size_t kWords = std::size_t{1} << 13;
  static std::uint64_t hash(std::uint64_t cluster) {
    return (cluster * 0x9e37'79b9'7f4a'7c15U) >> 45;
  }
  static std::size_t slot(std::uint64_t cluster) {
    return static_cast<std::size_t>(hash(cluster) / 64);
  }
  static std::uint64_t mask(std::uint64_t cluster) {
    return std::uint64_t{1} << (hash(cluster) % 64);
  }
  std::atomic<std::uint64_t>& filter_bit(std::uint64_t cluster) { return filter_[slot(cluster)]; }

  std::vector<std::atomic<std::uint64_t>> filter_ = std::vector<std::atomic<std::uint64_t>>(kWords);
  std::unordered_set<std::uint64_t> clusters_;
};

// Guest clusters for which somebody is bringing new host clusters into use: others who would change
// their mapping wait, and look again. In the frame of the coroutine that does it.
struct Allocation {
  std::uint64_t first_cluster{0};
  std::uint64_t last_cluster{0};
  blockdev::WaitList ended;
};

struct FreedClusters {
  std::uint64_t first{0};
  std::uint64_t count{0};
  bool discard{false};  // punch a hole when nobody uses them any more
};

struct ImageState {
  using BlockNode = blockdev::BlockNode;

  ImageState(Header image_header, blockdev::RawNode& image_file, BlockNode* external_data_file,
             BlockNode* backing_node, bool is_read_only, bool punch_holes,
             std::uint64_t l2_cache_bytes, std::uint64_t refcount_cache_bytes);

  // ---- Fixed while the image is open.
  const std::string& name;
  const Geometry geometry;
  blockdev::RawNode& file;
  BlockNode* const data_file;  // nullptr: data is in `file`
  BlockNode* const backing;
  const bool read_only;
  const bool discard;  // holes are punched for what is freed
  const bool data_file_is_raw;
  const std::uint32_t version;
  const Compression compression;

  // ---- Any thread.
  std::atomic<bool> is_corrupt{false};
  // Changes of the metadata so far, those that are in the file or the kernel's cache of it, and
  // those that are known to be stable. The first stands for all that was in the file when it was
  // opened: a process that was killed may have written it, and never flushed it.
  std::atomic<std::uint64_t> changes{1};
  std::atomic<std::uint64_t> written_changes{1};
  std::atomic<std::uint64_t> stable_changes{0};
  std::atomic<std::uint64_t> file_end{0};  // bytes of `file`
  TableCache l2_cache;
  MetadataMap metadata_map;
  RequestEpochs epochs;

  // ---- Under the mutex.
  std::mutex mutex;
  Header header;
  std::array<std::byte, kHeaderSectorBytes> header_sector{};
  std::vector<std::uint64_t> l1_table;
  DirtyBlocks l1_dirty;
  std::vector<std::uint64_t> refcount_table;
  DirtyBlocks refcount_table_dirty;
  TableCache refcount_cache;
  blockdev::WaitList slot_changed;  // a slot was loaded, or written
  bool header_writing{false};
  blockdev::WaitList header_written;
  std::vector<Allocation*> allocations;
  std::vector<FreedClusters> freed;
  std::uint64_t freed_count{0};  // clusters in it
  struct Quarantined {
    FreedClusters clusters;
    std::uint64_t epoch;
  };
  std::deque<Quarantined> quarantine;
  // Numbers of write_order.h.
  std::uint64_t refcount_changes{0};
  std::uint64_t refcount_changes_written{0};
  std::uint64_t refcount_changes_stable{0};
  std::uint64_t barriers_begun{0};
  std::uint64_t barriers_done{0};

  [[nodiscard]] BlockNode& data() const { return data_file != nullptr ? *data_file : file; }
  // mapping_of()'s `place`.
  [[nodiscard]] std::optional<std::uint64_t> place_in_data_file(std::uint64_t guest_offset) const {
    if (data_file == nullptr) return std::nullopt;
    return guest_offset & ~geometry.cluster_mask();
  }
  [[nodiscard]] std::uint64_t cluster_of(std::uint64_t offset) const {
    return offset >> geometry.cluster_bits;
  }
  [[nodiscard]] bool has_backing_at(std::uint64_t guest_offset) const {
    return backing != nullptr && guest_offset < backing->size_bytes();
  }
  // Whether the metadata as it was at change number `change` is in the file: what a successor of
  // this process would find there.
  [[nodiscard]] bool is_written(std::uint64_t change) const {
    return written_changes.load(std::memory_order_acquire) >= change;
  }
  [[nodiscard]] bool is_stable() const {
    return changes.load(std::memory_order_acquire) ==
           stable_changes.load(std::memory_order_acquire);
  }

  // How [guest_offset, +length) is mapped, as far as it is mapped alike. False: the cache does not
  // know (a table must be loaded), or the mapping is being changed. Any thread, without the mutex.
  [[nodiscard]] bool lookup(std::uint64_t guest_offset, std::uint64_t length, Run& run) const;

  // ---- Under the mutex.
  // The slot of the slice that maps `guest_offset`, if it is there.
  [[nodiscard]] TableCache::Slot* l2_slot(std::uint64_t guest_offset);
  [[nodiscard]] L2Entry entry(const TableCache::Slot& slot, std::uint64_t guest_offset) const;
  // Changes an entry. `order`: what it reveals.
  void set_entry(TableCache::Slot& slot, std::uint64_t guest_offset, const L2Entry& entry,
                 const WriteOrder& order);
  // Whether the L2 table for `guest_offset` exists and is this image's alone.
  [[nodiscard]] bool l2_table_is_ours(std::uint64_t guest_offset) const {
    return (l1_table[geometry.l1_index(guest_offset)] & kFlagCopied) != 0;
  }
  [[nodiscard]] Allocation* conflict(std::uint64_t first_cluster, std::uint64_t last_cluster) const;
  void begin(Allocation& allocation) { allocations.push_back(&allocation); }
  void end(Allocation& allocation, IoContext& here) {
    std::erase(allocations, &allocation);
    allocation.ended.wake_all(here);
  }
  // The cluster or clusters that an entry names are not needed by it any more.
  void free_entry(const L2Entry& entry);
  void free_clusters(std::uint64_t first, std::uint64_t count);
  // The next barrier to begin covers what has been written by now.
  [[nodiscard]] std::uint64_t next_barrier() const { return barriers_begun + 1; }
  std::uint64_t next_change() { return changes.fetch_add(1, std::memory_order_acq_rel) + 1; }
};

// Something in the file contradicts itself: tells the user, and has the image marked ("corrupt
// bit"), once. From then on every change fails with EIO, and no metadata is written. The caller is
// on the thread of `context`.
void mark_corrupt(ImageState& state, IoContext& context, const std::string& what);

// Writes the header's fields as they are now. One at a time.
Task<int> write_header(ImageState& state, IoContext& context);

}  // namespace vblk::qcow2
