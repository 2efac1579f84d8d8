#include "blockdev/qcow2/cluster_allocator.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <mutex>
#include <tuple>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/log.h"
#include "blockdev/qcow2/slice_loader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;

namespace {

constexpr std::uint64_t kFirstBatchClusters = 8;

std::uint64_t batch_max(const Geometry& geometry) {
  return std::max(ClusterAllocator::kReserveBytesMax >> geometry.cluster_bits,
                  ClusterAllocator::kReserveClustersMin);
}

}  // namespace

ClusterAllocator::ClusterAllocator(ImageState& state, WriteBack& write_back)
    : state_(state),
      write_back_(write_back),
      batch_(std::min(kFirstBatchClusters, batch_max(state.geometry))) {}

void ClusterAllocator::opened() {
  // What a block device holds beyond the image is anything.
  zero_from_ = state_.file.is_block_device() ? std::numeric_limits<std::uint64_t>::max()
                                             : state_.geometry.clusters_of(state_.file_end.load());
}

std::optional<HostClusters> ClusterAllocator::take(std::uint64_t count_max, bool must_read_zero) {
  if (reserve_.empty()) return std::nullopt;
  HostClusters& first = reserve_.front();
  if (must_read_zero && !first.reads_zero) return std::nullopt;
  HostClusters taken = first;
  taken.count = std::min(first.count, count_max);
  first.first += taken.count;
  first.count -= taken.count;
  if (first.count == 0) reserve_.pop_front();
  reserved_ -= taken.count;
  return taken;
}

void ClusterAllocator::give_back(const HostClusters& clusters) {
  HostClusters used = clusters;
  used.reads_zero = false;  // who knows what has been written there
  reserved_ += used.count;
  reserve_.push_back(used);
}

// Several clusters of one kind.
void ClusterAllocator::add_to_reserve(std::uint64_t first, std::uint64_t count) {
  const std::uint64_t used_before = std::min(count, zero_from_ > first ? zero_from_ - first : 0);
  for (const auto& [from, length, zero] :
       {std::tuple{first, used_before, false},
        std::tuple{first + used_before, count - used_before, true}}) {
    if (length == 0) continue;
    reserve_.push_back({.first = from,
                        .count = length,
                        .reads_zero = zero,
                        .refcount_change = state_.refcount_changes});
  }
  reserved_ += count;
  if (used_before < count) zero_from_ = first + count;
}

std::uint64_t ClusterAllocator::refcount_in(const TableCache::Slot& slot,
                                            std::uint64_t cluster) const {
  const Geometry& geometry = state_.geometry;
  const std::uint64_t index = cluster & ((std::uint64_t{1} << geometry.refcount_slice_bits()) - 1);
  const RefcountPlace place = refcount_place(geometry.refcount_order, index);
  return (state_.refcount_cache.word(slot, place.word) >> place.shift) & place.mask;
}

void ClusterAllocator::set_refcount(TableCache::Slot& slot, std::uint64_t cluster,
                                    std::uint64_t count) {
  const Geometry& geometry = state_.geometry;
  const std::uint64_t index = cluster & ((std::uint64_t{1} << geometry.refcount_slice_bits()) - 1);
  const RefcountPlace place = refcount_place(geometry.refcount_order, index);
  const std::uint64_t word = state_.refcount_cache.word(slot, place.word);
  state_.refcount_cache.set_word(slot, place.word,
                                 (word & ~(place.mask << place.shift)) | (count << place.shift));
  ++state_.refcount_changes;
  state_.refcount_cache.mark_dirty(slot, state_.next_change(), {});
}

// Not under the mutex: it is a system call. One at a time, by refill().
int ClusterAllocator::grow_file(std::uint64_t end_cluster) {
  const std::uint64_t end = end_cluster << state_.geometry.cluster_bits;
  if (end <= state_.file_end.load(std::memory_order_relaxed)) return 0;
  const int error = state_.file.grow(end);
  if (error == 0) state_.file_end.store(end, std::memory_order_relaxed);
  return error;
}

// The same for clusters that are about to be written, which get their space: into a hole, ext4 lets
// one direct write at a time, and keeps all others to the file waiting.
Task<int> ClusterAllocator::grow_file_with_space(IoContext& context, std::uint64_t end_cluster) {
  const std::uint64_t begin = state_.file_end.load(std::memory_order_relaxed);
  const int error = grow_file(end_cluster);
  const std::uint64_t end = state_.file_end.load(std::memory_order_relaxed);
  {
    const std::lock_guard lock(state_.mutex);
    if (error != 0 || begin == end || !takes_space_) co_return error;
  }
  BlockIo space(state_.file, context, blockdev::BlockOperation::kWriteZeroes, begin, end - begin);
  space.only_takes_space = true;
  const int space_error = co_await space;
  co_return space_error;
}

Task<int> ClusterAllocator::refill(IoContext& context, BlockRequest& token) {
  token.context = &context;
  std::unique_lock lock(state_.mutex);
  if (refilling_) {
    co_await refilled_.wait(lock, token);
    co_return refill_error_;
  }
  refilling_ = true;
  lock.unlock();
  const int error = co_await refill_alone(context, token);
  lock.lock();
  refilling_ = false;
  refill_error_ = error;
  batch_ = std::min(batch_ * 2, batch_max(state_.geometry));
  refilled_.wake_all(context);
  co_return error;
}

Task<int> ClusterAllocator::refill_alone(IoContext& context, BlockRequest& token) {
  std::uint64_t missing = batch_;
  while (missing > 0) {
    std::uint64_t found = 0;
    const int error = co_await reserve_at(context, token, missing, found);
    // With something in hand the next refill may tell.
    if (error != 0 && missing < batch_) co_return 0;
    if (error != 0) co_return error;
    missing -= found;
  }
  co_return 0;
}

// One step of the search: up to `count_max` free clusters side by side, in one refcount slice, from
// search_from_ on. `found` may be 0: there were none in it.
Task<int> ClusterAllocator::reserve_at(IoContext& context, BlockRequest& token,
                                       std::uint64_t count_max, std::uint64_t& found) {
  const Geometry& geometry = state_.geometry;
  std::unique_lock lock(state_.mutex);
  std::uint64_t first = search_from_;
  const std::uint64_t block = first >> geometry.refcount_block_bits();
  if (first >= kHostOffsetMax >> geometry.cluster_bits) co_return EFBIG;
  if (block >= state_.refcount_table.size()) {
    lock.unlock();
    const int error = co_await grow_refcount_table(context, token, first);
    co_return error;
  }
  if (state_.refcount_table[block] == 0) {
    lock.unlock();
    const int error = co_await create_refcount_block(context, token, first);
    co_return error;
  }
  TableCache::Slot* slot = state_.refcount_cache.find(slice_of(first));
  if (slot == nullptr || !slot->valid) {
    lock.unlock();
    const int error =
        co_await load_refcount_slice(state_, write_back_, context, token, slice_of(first));
    co_return error;
  }
  const std::uint64_t slice_end = (slice_of(first) + 1) << geometry.refcount_slice_bits();
  while (first < slice_end && refcount_in(*slot, first) != 0) ++first;
  std::uint64_t end = first;
  while (end < slice_end && end - first < count_max && refcount_in(*slot, end) == 0) ++end;
  // Freed clusters may lower it meanwhile, never below what was seen to be in use here.
  search_from_ = first;
  if (first == end) co_return 0;
  if (end << geometry.cluster_bits > state_.file_end.load(std::memory_order_relaxed)) {
    lock.unlock();
    // The slot may be gone after this: the next step looks again.
    const int error = co_await grow_file_with_space(context, end);
    co_return error;
  }
  for (std::uint64_t cluster = first; cluster < end; ++cluster) {
    if (!state_.metadata_map.contains(cluster)) continue;
    lock.unlock();
    mark_corrupt(state_, context,
                 fmt::format("cluster {} holds metadata and has a refcount of 0", cluster));
    co_return EIO;
  }
  for (std::uint64_t cluster = first; cluster < end; ++cluster) set_refcount(*slot, cluster, 1);
  add_to_reserve(first, end - first);
  search_from_ = end;
  found = end - first;
  co_return 0;
}

// `cluster` becomes the block that counts the range in which it lies.
Task<int> ClusterAllocator::create_refcount_block(IoContext& context, BlockRequest& token,
                                                  std::uint64_t cluster) {
  const Geometry& geometry = state_.geometry;
  const std::uint64_t offset = cluster << geometry.cluster_bits;
  // Before anything is written there.
  bool is_metadata = false;
  {
    const std::lock_guard guard(state_.mutex);
    is_metadata = state_.metadata_map.contains(cluster);
  }
  if (is_metadata) {
    mark_corrupt(state_, context,
                 fmt::format("cluster {} holds metadata and has no refcount", cluster));
    co_return EIO;
  }
  int error = grow_file(cluster + 1);
  if (error != 0) co_return error;
  if (cluster < zero_from_) {
    // It has been something else before.
    error = co_await BlockIo(state_.file, context, blockdev::BlockOperation::kWriteZeroes, offset,
                             geometry.cluster_bytes());
    if (error != 0) co_return error;
  }
  const std::uint64_t block = cluster >> geometry.refcount_block_bits();
  const unsigned slices_bits = geometry.refcount_block_bits() - geometry.refcount_slice_bits();
  const std::uint64_t slice_in_block = slice_of(cluster) & ((std::uint64_t{1} << slices_bits) - 1);
  std::unique_lock lock(state_.mutex);
  TableCache::Slot* slot = nullptr;
  while ((slot = state_.refcount_cache.claim(
              slice_of(cluster), offset + slice_in_block * geometry.slice_bytes())) == nullptr) {
    lock.unlock();
    error = co_await make_room(state_, state_.refcount_cache, slice_of(cluster), write_back_,
                               context, token);
    if (error != 0) co_return error;
    lock.lock();
  }
  if (!state_.metadata_map.add(cluster)) {
    state_.refcount_cache.load_failed(*slot);
    lock.unlock();
    mark_corrupt(state_, context,
                 fmt::format("cluster {} holds metadata and has no refcount", cluster));
    co_return EIO;
  }
  // The block and what names it at one moment: a write-back must never find it without its own
  // count.
  state_.refcount_cache.loaded_zeroes(*slot);
  set_refcount(*slot, cluster, 1);
  if (cluster >= zero_from_) zero_from_ = cluster + 1;
  state_.refcount_table[block] = offset;
  state_.refcount_table_dirty.mark(block, state_.next_change(), {});
  if (search_from_ == cluster) search_from_ = cluster + 1;
  co_return 0;
}

// A larger refcount table, beyond everything that the old one counts, with the refcount blocks that
// count it: all on the disk before the header names it.
Task<int> ClusterAllocator::grow_refcount_table(IoContext& context, BlockRequest& token,
                                                std::uint64_t cluster) {
  const Geometry& geometry = state_.geometry;
  const unsigned block_bits = geometry.refcount_block_bits();
  const std::uint64_t cluster_bytes = geometry.cluster_bytes();
  const std::uint64_t file_clusters = geometry.clusters_of(state_.file_end.load());
  const std::uint64_t range = std::uint64_t{1} << block_bits;
  const std::uint64_t first = (std::max(cluster, file_clusters) + range - 1) / range * range;
  const std::uint64_t first_block = first >> block_bits;

  std::uint64_t old_offset = 0;
  std::uint64_t old_clusters = 0;
  co_await write_back_.take_turn(context, token);
  // What the old table does not name on the disk yet must not get there by the new one before its
  // time.
  int error = co_await write_back_.write_refcounts(context);
  if (error == 0) error = co_await write_back_.barrier(context);
  std::vector<std::uint64_t> table;
  if (error == 0) {
    const std::lock_guard lock(state_.mutex);
    table = state_.refcount_table;
    old_offset = state_.header.refcount_table_offset;
    old_clusters = state_.header.refcount_table_clusters;
  }
  // Half as large again, and room for the blocks that count the table itself; each block is counted
  // by the blocks, too.
  std::uint64_t table_clusters = 0;
  std::uint64_t block_count = 1;
  for (;;) {
    const std::uint64_t entries =
        std::max(table.size() + table.size() / 2, first_block + block_count + 1);
    table_clusters = geometry.clusters_of(entries * 8);
    const std::uint64_t needed = (table_clusters + block_count + range - 1) / range;
    if (needed == block_count) break;
    block_count = needed;
  }
  if (error == 0 && table_clusters << geometry.cluster_bits > kRefcountTableBytesMax) error = EFBIG;
  const std::uint64_t used = table_clusters + block_count;
  if (error == 0) error = grow_file(first + used);
  if (error == 0) {
    table.resize(table_clusters * cluster_bytes / 8);
    AlignedBuffer bytes(used * cluster_bytes);
    std::ranges::fill(bytes.bytes(), std::byte{0});
    for (std::uint64_t i = 0; i < block_count; ++i)
      table[first_block + i] = (first + table_clusters + i) << geometry.cluster_bits;
    for (std::size_t i = 0; i < table.size(); ++i) store_be(bytes.data() + i * 8, table[i]);
    fill_with_ones(bytes.bytes().subspan(table_clusters * cluster_bytes), used);
    error = co_await BlockIo(state_.file, context, blockdev::BlockOperation::kWrite,
                             first << geometry.cluster_bits, bytes.bytes());
  }
  if (error == 0) error = co_await write_back_.barrier(context);
  if (error == 0) {
    {
      const std::lock_guard lock(state_.mutex);
      state_.header.refcount_table_offset = first << geometry.cluster_bits;
      state_.header.refcount_table_clusters = static_cast<std::uint32_t>(table_clusters);
    }
    error = co_await write_header(state_, context);
    if (error == 0) error = co_await write_back_.barrier(context);
    // Whether or not the header has reached the disk: both tables are right for what is there.
    const std::lock_guard lock(state_.mutex);
    state_.refcount_table = std::move(table);
    for (std::uint64_t i = 0; i < used; ++i) state_.metadata_map.add(first + i);
    const std::uint64_t old_first = old_offset >> geometry.cluster_bits;
    for (std::uint64_t i = 0; i < old_clusters; ++i) state_.metadata_map.remove(old_first + i);
    if (error == 0) state_.free_clusters(old_first, old_clusters);
    if (first >= zero_from_) zero_from_ = first + used;
  }
  write_back_.end_turn(context);
  co_return error;
}

// For a table that no range of a refcount block has room for: at the end of the file, with the
// blocks that count it behind it, which are on the disk before the refcount table names them.
Task<int> ClusterAllocator::allocate_with_blocks(IoContext& context, BlockRequest& token,
                                                 std::uint64_t count, HostClusters& clusters) {
  const Geometry& geometry = state_.geometry;
  const unsigned block_bits = geometry.refcount_block_bits();
  const std::uint64_t range = std::uint64_t{1} << block_bits;
  std::uint64_t block_count = 1;
  while (block_count * range < count + block_count)
    block_count = (count + block_count + range - 1) / range;
  const std::uint64_t used = count + block_count;
  std::uint64_t first = 0;
  int error = 0;
  for (;;) {
    const std::uint64_t file_clusters = geometry.clusters_of(state_.file_end.load());
    first = (file_clusters + range - 1) / range * range;
    bool has_room = false;
    {
      const std::lock_guard lock(state_.mutex);
      const std::vector<std::uint64_t>& table = state_.refcount_table;
      // What is counted behind the end of the file already is left alone.
      std::uint64_t block = first >> block_bits;
      for (std::uint64_t at = block;
           at < std::min<std::uint64_t>(block + block_count, table.size()); ++at) {
        if (table[at] != 0) block = at + 1;
      }
      first = block << block_bits;
      has_room = block + block_count <= table.size();
    }
    if (has_room) break;
    error = co_await grow_refcount_table(context, token, first + used);
    if (error != 0) co_return error;
  }
  if ((first + used) << geometry.cluster_bits > kHostOffsetMax) co_return EFBIG;
  error = grow_file(first + used);
  if (error != 0) co_return error;
  AlignedBuffer blocks(block_count << geometry.cluster_bits);
  fill_with_ones(blocks.bytes(), used);
  error = co_await BlockIo(state_.file, context, blockdev::BlockOperation::kWrite,
                           (first + count) << geometry.cluster_bits, blocks.bytes());
  if (error != 0) co_return error;
  const std::lock_guard lock(state_.mutex);
  for (std::uint64_t i = 0; i < block_count; ++i) {
    const std::uint64_t block = (first >> block_bits) + i;
    state_.refcount_table[block] = (first + count + i) << geometry.cluster_bits;
    state_.refcount_table_dirty.mark(block, state_.next_change(), {});
    state_.metadata_map.add(first + count + i);
  }
  ++state_.refcount_changes;
  clusters = {.first = first,
              .count = count,
              .reads_zero = first >= zero_from_,
              .refcount_change = state_.refcount_changes};
  if (first >= zero_from_) zero_from_ = first + used;
  co_return 0;
}

// Refcounts of 1 for the first `count` clusters that `blocks` count.
void ClusterAllocator::fill_with_ones(std::span<std::byte> blocks, std::uint64_t count) const {
  std::ranges::fill(blocks, std::byte{0});
  for (std::uint64_t i = 0; i < count; ++i) {
    const RefcountPlace place = refcount_place(state_.geometry.refcount_order, i);
    std::byte* const word = blocks.data() + place.word * 8;
    store_be(word, load_be<std::uint64_t>(word) | (std::uint64_t{1} << place.shift));
  }
}

Task<int> ClusterAllocator::refcount(IoContext& context, BlockRequest& token, std::uint64_t cluster,
                                     std::uint64_t& count) {
  for (;;) {
    {
      const std::lock_guard lock(state_.mutex);
      const std::uint64_t block = cluster >> state_.geometry.refcount_block_bits();
      if (block >= state_.refcount_table.size() || state_.refcount_table[block] == 0) {
        count = 0;
        co_return 0;
      }
      const TableCache::Slot* const slot = state_.refcount_cache.find(slice_of(cluster));
      if (slot != nullptr && slot->valid) {
        count = refcount_in(*slot, cluster);
        co_return 0;
      }
    }
    const int error =
        co_await load_refcount_slice(state_, write_back_, context, token, slice_of(cluster));
    if (error != 0) co_return error;
  }
}

Task<int> ClusterAllocator::raise(IoContext& context, BlockRequest& token, std::uint64_t cluster,
                                  std::uint64_t& change) {
  for (;;) {
    {
      const std::lock_guard lock(state_.mutex);
      TableCache::Slot* const slot = state_.refcount_cache.find(slice_of(cluster));
      if (slot != nullptr && slot->valid) {
        const std::uint64_t count = refcount_in(*slot, cluster);
        if (count >= state_.geometry.refcount_max()) co_return EFBIG;
        set_refcount(*slot, cluster, count + 1);
        change = state_.refcount_changes;
        co_return 0;
      }
    }
    const int error =
        co_await load_refcount_slice(state_, write_back_, context, token, slice_of(cluster));
    if (error != 0) co_return error;
  }
}

Task<int> ClusterAllocator::lower_refcount(IoContext& context, BlockRequest& token,
                                           std::uint64_t cluster) {
  for (;;) {
    std::uint64_t count = 0;
    const int error = co_await refcount(context, token, cluster, count);
    if (error != 0) co_return error;
    if (count == 0) {
      mark_corrupt(state_, context,
                   fmt::format("cluster {} was in use with a refcount of 0", cluster));
      co_return EIO;
    }
    const std::lock_guard lock(state_.mutex);
    TableCache::Slot* const slot = state_.refcount_cache.find(slice_of(cluster));
    if (slot == nullptr || !slot->valid) continue;
    count = refcount_in(*slot, cluster);  // it may have been raised since
    set_refcount(*slot, cluster, count - 1);
    if (count == 1) search_from_ = std::min(search_from_, cluster);
    co_return 0;
  }
}

Task<int> ClusterAllocator::release(IoContext& context, BlockRequest& token,
                                    FreedClusters clusters) {
  const std::uint64_t end = clusters.first + clusters.count;
  for (std::uint64_t first = clusters.first; first < end;) {
    // As many as are going to be free: these are punched at once.
    std::uint64_t next = first;
    int error = 0;
    while (next < end) {
      bool is_metadata = false;
      {
        const std::lock_guard lock(state_.mutex);
        is_metadata = state_.metadata_map.contains(next);
      }
      // It was named as data as well: whoever frees it must not punch it, or hand it out.
      if (is_metadata) {
        mark_corrupt(state_, context, fmt::format("cluster {} is data and metadata", next));
        co_return EIO;
      }
      std::uint64_t count = 0;
      error = co_await refcount(context, token, next, count);
      if (error != 0) co_return error;
      if (count != 1) break;
      ++next;
    }
    if (clusters.discard && next > first) {
      const unsigned bits = state_.geometry.cluster_bits;
      // A hint: what cannot be punched stays as it is.
      [[maybe_unused]] const int ignored =
          co_await BlockIo(state_.file, context, blockdev::BlockOperation::kDiscard, first << bits,
                           (next - first) << bits);
    }
    next = std::max(next, first + 1);
    for (; first < next; ++first) {
      error = co_await lower_refcount(context, token, first);
      if (error != 0) co_return error;
    }
  }
  co_return 0;
}

Task<int> ClusterAllocator::allocate_table(IoContext& context, BlockRequest& token,
                                           std::uint64_t count, HostClusters& clusters) {
  token.context = &context;
  std::unique_lock lock(state_.mutex);
  while (refilling_) co_await refilled_.wait(lock, token);
  refilling_ = true;
  // At the end of the file, where everything is free; what was seen to be in use before stays seen.
  const std::uint64_t search_before = search_from_;
  search_from_ = state_.geometry.clusters_of(state_.file_end.load(std::memory_order_relaxed));
  int error = 0;
  HostClusters run;
  std::deque<HostClusters> reserve = std::exchange(reserve_, {});
  // The first cluster of each range is its refcount block.
  if (count >= std::uint64_t{1} << state_.geometry.refcount_block_bits()) {
    lock.unlock();
    error = co_await allocate_with_blocks(context, token, count, run);
    lock.lock();
  }
  while (error == 0 && run.count < count) {
    lock.unlock();
    std::uint64_t found = 0;
    error = co_await reserve_at(context, token, count - run.count, found);
    lock.lock();
    while (!reserve_.empty()) {
      const HostClusters piece = reserve_.front();
      reserve_.pop_front();
      if (run.count > 0 && run.first + run.count == piece.first) {
        run.count += piece.count;
        run.reads_zero = run.reads_zero && piece.reads_zero;
        run.refcount_change = piece.refcount_change;
        continue;
      }
      // A refcount block lies between: begin again behind it.
      if (run.count > 0) reserve.push_back(run);
      run = piece;
    }
  }
  if (error != 0 && run.count > 0) reserve.push_back(run);
  reserve_ = std::move(reserve);
  reserved_ = 0;
  for (const HostClusters& piece : reserve_) reserved_ += piece.count;
  search_from_ = std::min(search_from_, search_before);
  refilling_ = false;
  refill_error_ = 0;  // who waits for clusters looks again
  refilled_.wake_all(context);
  if (error == 0) clusters = run;
  co_return error;
}

Task<int> ClusterAllocator::close(IoContext& context, BlockRequest& token) {
  std::vector<HostClusters> unused;
  {
    const std::lock_guard lock(state_.mutex);
    unused.assign(reserve_.begin(), reserve_.end());
    reserve_.clear();
    reserved_ = 0;
  }
  std::ranges::sort(unused, std::ranges::greater{}, &HostClusters::first);
  std::uint64_t end = state_.geometry.clusters_of(state_.file_end.load());
  for (const HostClusters& clusters : unused) {
    for (std::uint64_t i = 0; i < clusters.count; ++i) {
      const int error = co_await lower_refcount(context, token, clusters.first + i);
      if (error != 0) co_return error;
    }
    if (clusters.first + clusters.count == end) end = clusters.first;
  }
  const std::uint64_t end_bytes = end << state_.geometry.cluster_bits;
  if (end_bytes >= state_.file_end.load() || state_.file.is_block_device()) co_return 0;
  // Lower refcounts first: a file that ends before a cluster with a refcount would be damaged.
  int error = co_await write_back_.flush(context, token);
  if (error != 0) co_return error;
  error = state_.file.shrink(end_bytes);
  if (error == 0) state_.file_end.store(end_bytes);
  co_return error;
}

}  // namespace vblk::qcow2
