// Writes that are not one piece of the file, or that need new clusters.
//
// A write goes piece by piece:
//   1. mapped, and nobody else's: written in place, all such pieces at once
//   2. unmapped, reading as zeroes: mapped to fresh clusters, and then 1 (map_zeroed_cluster())
//   3. anything else by copying: new clusters get what the request brings and, around that, what
//   was
//      there before; then the mapping is changed. Meanwhile others who want to change the mapping
//      of these guest clusters wait (Allocation). A request copies one piece at a time, so nobody
//      who waits holds what others wait for.
//
// What is copied is no more than the format asks for: the rest of the first and the last cluster,
// or of the first and the last subcluster where there are subclusters.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>

#include <fmt/core.h>

#include "blockdev/alignment.h"
#include "blockdev/block_io.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/slice_loader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::IoGroup;

namespace {

// A piece of a cluster up to this length is read together with what lies around it, to be thrown
// away.
constexpr std::uint64_t kReadThroughBytesMax = 65536;

}  // namespace

// A piece that is written by copying.
struct Qcow2Node::CopyPlan {
  enum class Outcome : std::uint8_t { kReady, kNoClusters, kInvalid };
  Outcome outcome{Outcome::kInvalid};
  std::uint64_t begin{0};  // guest bytes that the request brings
  std::uint64_t end{0};
  std::uint64_t copy_begin{0};  // guest bytes that are written, with what was there before
  std::uint64_t copy_end{0};
  std::uint64_t first_cluster{0};  // guest clusters whose entries change
  std::uint64_t cluster_count{0};
  bool in_same_cluster{false};  // the entry has the space already
  bool old_is_zero{false};      // all that the guest can read there now
  HostClusters host;
  Allocation allocation;
};

// Whether the guest reads zeroes in [guest_offset, end). Under the mutex, with the slice there.
bool Qcow2Node::is_read_as_zero(std::uint64_t guest_offset, std::uint64_t end) const {
  end = std::min(end, size_bytes());
  while (guest_offset < end) {
    Run run;
    if (!state_.lookup(guest_offset, end - guest_offset, run)) return false;
    const bool is_unallocated =
        run.mapping == Mapping::kUnallocated || run.mapping == Mapping::kUnallocatedWithSpace;
    if (!reads_zero(run.mapping) && !(is_unallocated && !state_.has_backing_at(guest_offset)))
      return false;
    guest_offset += run.length;
  }
  return true;
}

// Under the mutex: whether a host cluster is one that data may be written to.
bool Qcow2Node::can_hold_data(std::uint64_t cluster) const {
  return (cluster + 1) << state_.geometry.cluster_bits <=
             state_.file_end.load(std::memory_order_relaxed) &&
         !state_.metadata_map.contains(cluster);
}

// Under the mutex: plans as much of the beginning of [guest_offset, +length) as can be written
// together. The L2 slice is there, its table is ours, and nobody else is allocating for the first
// cluster. False: look again, somebody else was faster.
bool Qcow2Node::plan_copy(std::uint64_t guest_offset, std::uint64_t length, CopyPlan& plan) {
  const Geometry& geometry = state_.geometry;
  const std::uint64_t cluster_bytes = geometry.cluster_bytes();
  const TableCache::Slot& slot = *state_.l2_slot(guest_offset);
  const L2Entry first = state_.entry(slot, guest_offset);
  const bool external = state_.data_file != nullptr;
  const auto place = state_.place_in_data_file(guest_offset);
  const auto is_standard = [](const L2Entry& entry) {
    return (entry.descriptor & kFlagCompressed) == 0;
  };
  const auto has_own_space = [&](const L2Entry& entry) {
    return is_standard(entry) && (entry.descriptor & kFlagCopied) != 0 &&
           (external || host_offset(entry) != 0);
  };
  // All of it, also what is not written: what it names is freed, or gets new neighbours.
  const auto is_valid = [&](const L2Entry& entry, std::uint64_t entry_offset) {
    const auto its_place = state_.place_in_data_file(entry_offset);
    for (unsigned i = 0; i < geometry.subclusters(); ++i) {
      if (mapping_of(geometry, entry, i, its_place) == Mapping::kInvalid) return false;
    }
    return true;
  };
  // Subclusters are filled one by one as long as the entry has no cluster that others share.
  const auto granule = [&](const L2Entry& entry) {
    const bool by_subcluster =
        has_own_space(entry) || (is_standard(entry) && host_offset(entry) == 0);
    return by_subcluster ? geometry.subcluster_bytes() : cluster_bytes;
  };
  const auto subcluster =
      static_cast<unsigned>((guest_offset & geometry.cluster_mask()) >> geometry.subcluster_bits());
  plan.outcome = CopyPlan::Outcome::kInvalid;
  if (!is_valid(first, guest_offset)) return true;

  plan.first_cluster = state_.cluster_of(guest_offset);
  plan.in_same_cluster = has_own_space(first);
  // Its space must be its own indeed: here it is not written by way of can_write_in_place().
  if (plan.in_same_cluster && !external && !can_hold_data(state_.cluster_of(host_offset(first))))
    return true;
  std::uint64_t count = 1;
  if (!plan.in_same_cluster) {
    const std::uint64_t last = state_.cluster_of(guest_offset + length - 1);
    const std::uint64_t slice_last =
        plan.first_cluster | ((std::uint64_t{1} << geometry.l2_slice_bits()) - 1);
    while (plan.first_cluster + count <= std::min(last, slice_last)) {
      const std::uint64_t next = plan.first_cluster + count;
      const std::uint64_t next_offset = next << geometry.cluster_bits;
      const L2Entry entry = state_.entry(slot, next_offset);
      if (has_own_space(entry) || !is_valid(entry, next_offset) ||
          state_.conflict(next, next) != nullptr)
        break;
      ++count;
    }
  }
  const std::uint64_t identity = plan.first_cluster;  // host = guest in an external data file
  if (plan.in_same_cluster) {
    plan.host = {.first = state_.cluster_of(host_offset(first)), .count = 1};
  } else if (external) {
    plan.host = {.first = identity, .count = count};
  } else {
    const auto taken = allocator_.take(count, false);
    if (!taken) {
      plan.outcome = CopyPlan::Outcome::kNoClusters;
      return true;
    }
    plan.host = *taken;
    count = taken->count;
  }
  plan.cluster_count = count;
  const std::uint64_t clusters_end = (plan.first_cluster + count) << geometry.cluster_bits;
  plan.begin = guest_offset;
  plan.end = std::min(guest_offset + length, clusters_end);
  if (plan.in_same_cluster) {
    // Up to the next subcluster that is in use: that is written in place, by others as well, and
    // must not be copied.
    unsigned next = subcluster + 1;
    while (next < geometry.subclusters() &&
           mapping_of(geometry, first, next, place) != Mapping::kNormal)
      ++next;
    plan.end = std::min(plan.end, (plan.first_cluster << geometry.cluster_bits) +
                                      (std::uint64_t{next} << geometry.subcluster_bits()));
  }
  const L2Entry last = state_.entry(slot, plan.end - 1);
  const std::uint64_t head = granule(first);
  const std::uint64_t tail = granule(last);
  plan.copy_begin = plan.begin / head * head;
  plan.copy_end = (plan.end + tail - 1) / tail * tail;
  // A data file ends where the disk does: there may be no room for a whole cluster, and a raw one
  // would be longer than the disk. A larger disk zeroes what is behind its old end (resize.cpp).
  if (external) plan.copy_end = std::min(plan.copy_end, std::max(plan.end, size_bytes()));
  plan.old_is_zero = is_read_as_zero(plan.copy_begin, plan.copy_end);
  plan.outcome = CopyPlan::Outcome::kReady;
  plan.allocation.first_cluster = plan.first_cluster;
  plan.allocation.last_cluster = plan.first_cluster + count - 1;
  state_.begin(plan.allocation);
  return true;
}

Task<int> Qcow2Node::write(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t length,
                           std::span<const iovec> memory, bool write_through) {
  IoContext& context = *token.context;
  IovCursor cursor(memory);
  IoGroup in_place(context);
  int error = 0;
  std::unique_lock lock(state_.mutex);
  while (length > 0 && error == 0) {
    if (state_.l2_slot(guest_offset) == nullptr) {
      lock.unlock();
      error = co_await load_l2_slice(state_, write_back_, context, token, guest_offset);
      lock.lock();
      continue;
    }
    Run run;
    if (state_.lookup(guest_offset, length, run) && can_write_in_place(run, run.length)) {
      in_place.start(state_.data(), BlockOperation::kWrite, run.host_offset,
                     cursor.take(run.length), write_through);
      guest_offset += run.length;
      length -= run.length;
      continue;
    }
    if (run.mapping == Mapping::kNormal && run.copied) {
      // Not in place though it is ours: metadata is there, or the file ends before it. The filter
      // of the metadata map may be wrong; the map is not.
      const std::uint64_t end = run.host_offset + run.length;
      bool is_damaged = end > state_.file_end.load(std::memory_order_relaxed);
      for (std::uint64_t cluster = state_.cluster_of(run.host_offset);
           cluster <= state_.cluster_of(end - 1) && !is_damaged; ++cluster)
        is_damaged = state_.metadata_map.contains(cluster);
      if (!is_damaged) {
        in_place.start(state_.data(), BlockOperation::kWrite, run.host_offset,
                       cursor.take(run.length), write_through);
        guest_offset += run.length;
        length -= run.length;
        continue;
      }
      lock.unlock();
      mark_corrupt(
          state_, context,
          fmt::format("guest offset {} is mapped to metadata or beyond the end of the file",
                      guest_offset));
      lock.lock();
      error = EIO;
      continue;
    }
    if (!state_.l2_table_is_ours(guest_offset)) {
      lock.unlock();
      error = co_await make_l2_table_ours(token, guest_offset);
      lock.lock();
      continue;
    }
    const std::uint64_t cluster = state_.cluster_of(guest_offset);
    if (Allocation* const other = state_.conflict(cluster, cluster); other != nullptr) {
      co_await other->ended.wait(lock, token);
      continue;
    }
    const std::uint64_t cluster_end =
        std::min(guest_offset + length, (guest_offset | state_.geometry.cluster_mask()) + 1);
    if (state_.data_file == nullptr && map_zeroed_cluster(guest_offset, cluster_end)) continue;
    CopyPlan plan;
    if (!plan_copy(guest_offset, length, plan)) continue;
    lock.unlock();
    if (plan.outcome == CopyPlan::Outcome::kReady) {
      const std::uint64_t piece = plan.end - plan.begin;
      error = co_await write_copying(token, plan, cursor.take(piece), write_through);
      guest_offset += piece;
      length -= piece;
    } else if (plan.outcome == CopyPlan::Outcome::kNoClusters) {
      error = co_await allocator_.refill(context, token);
      release_quarantine(context);
    } else {
      mark_corrupt(state_, context,
                   fmt::format("the L2 entry for guest offset {} is not valid", guest_offset));
      error = EIO;
    }
    lock.lock();
  }
  lock.unlock();
  const int in_place_error = co_await in_place;
  refill_if_low(context);
  co_return error != 0 ? error : in_place_error;
}

Task<int> Qcow2Node::write_copying(BlockRequest& token, CopyPlan& plan, std::vector<iovec> memory,
                                   bool write_through) {
  int error = co_await write_copy(token, plan, std::move(memory), write_through);
  const bool is_written = error == 0;
  if (is_written) error = co_await reveal_copy(token, plan);
  const std::lock_guard lock(state_.mutex);
  if (!is_written && !plan.in_same_cluster && state_.data_file == nullptr)
    allocator_.give_back(plan.host);
  state_.end(plan.allocation, *token.context);
  co_return error;
}

Task<int> Qcow2Node::write_copy(BlockRequest& token, const CopyPlan& plan,
                                std::vector<iovec> memory, bool write_through) {
  // Around fresh zeroes that were zeroes before there is nothing to be written.
  const bool needs_copy = !(plan.old_is_zero && plan.host.reads_zero);
  const std::uint64_t head_bytes = needs_copy ? plan.begin - plan.copy_begin : 0;
  const std::uint64_t tail_bytes = needs_copy ? plan.copy_end - plan.end : 0;
  const std::uint64_t data_bytes = plan.end - plan.begin;
  AlignedBuffer copy;
  if (head_bytes + tail_bytes > 0) {
    // One read around a small piece costs less than two beside it.
    const bool is_small = data_bytes <= kReadThroughBytesMax;
    copy = AlignedBuffer(head_bytes + (is_small ? data_bytes : 0) + tail_bytes);
    std::byte* const tail = copy.data() + copy.size() - tail_bytes;
    int error = 0;
    if (plan.old_is_zero) {
      std::memset(copy.data(), 0, copy.size());
    } else if (is_small) {
      error = co_await read_into(token, plan.copy_begin, copy.bytes());
    } else {
      error = co_await read_into(token, plan.copy_begin, {copy.data(), head_bytes});
      if (error == 0) error = co_await read_into(token, plan.end, {tail, tail_bytes});
    }
    if (error != 0) co_return error;
    if (is_small) {
      blockdev::gather(memory, copy.data() + head_bytes);
      memory = {{copy.data(), copy.size()}};
    } else {
      if (head_bytes > 0) memory.insert(memory.begin(), {copy.data(), head_bytes});
      if (tail_bytes > 0) memory.push_back({tail, tail_bytes});
    }
  }
  const std::uint64_t offset = (plan.host.first << state_.geometry.cluster_bits) + plan.begin -
                               head_bytes - (plan.first_cluster << state_.geometry.cluster_bits);
  IoGroup group(*token.context);
  group.start(state_.data(), BlockOperation::kWrite, offset, std::move(memory), write_through);
  const int error = co_await group;
  co_return error;
}

// The data is in place: the entries are changed, and what they named before is freed.
Task<int> Qcow2Node::reveal_copy(BlockRequest& token, const CopyPlan& plan) {
  const Geometry& geometry = state_.geometry;
  std::unique_lock lock(state_.mutex);
  WriteOrder order{.refcount_change = plan.host.refcount_change};
  // A power cut may leave the mapping without the data: harmless only where both read as zeroes.
  if (!(plan.old_is_zero && plan.host.reads_zero)) order.barrier = state_.next_barrier();
  for (std::uint64_t i = 0; i < plan.cluster_count; ++i) {
    const std::uint64_t guest = (plan.first_cluster + i) << geometry.cluster_bits;
    TableCache::Slot* slot = state_.l2_slot(guest);
    while (slot == nullptr) {
      lock.unlock();
      const int error = co_await load_l2_slice(state_, write_back_, *token.context, token, guest);
      if (error != 0) co_return error;
      lock.lock();
      slot = state_.l2_slot(guest);
    }
    const L2Entry old = state_.entry(*slot, guest);
    L2Entry entry = old;
    entry.descriptor = ((plan.host.first + i) << geometry.cluster_bits) | kFlagCopied;
    if (geometry.extended_l2) {
      const std::uint64_t begin = std::max(plan.copy_begin, guest) - guest;
      const std::uint64_t end = std::min(plan.copy_end - guest, geometry.cluster_bytes());
      const unsigned first = static_cast<unsigned>(begin >> geometry.subcluster_bits());
      const unsigned last = static_cast<unsigned>((end - 1) >> geometry.subcluster_bits());
      const std::uint64_t written =
          ((std::uint64_t{1} << (last + 1)) - 1) & ~((std::uint64_t{1} << first) - 1);
      entry.bitmap = (entry.bitmap | written) & ~(written << kSubclusters);
    }
    state_.set_entry(*slot, guest, entry, order);
    if (!plan.in_same_cluster) state_.free_entry(old);
  }
  co_return 0;
}

// A table that does not exist is made; one that a snapshot shares is copied. An error: there is no
// place for it. Afterwards the caller looks again.
Task<int> Qcow2Node::make_l2_table_ours(BlockRequest& token, std::uint64_t guest_offset) {
  const Geometry& geometry = state_.geometry;
  IoContext& context = *token.context;
  const std::uint64_t l1_index = geometry.l1_index(guest_offset);
  const std::uint64_t first_cluster = l1_index << geometry.l2_bits();
  const std::uint64_t last_cluster = first_cluster + (std::uint64_t{1} << geometry.l2_bits()) - 1;
  std::unique_lock lock(state_.mutex);
  if (Allocation* const other = state_.conflict(first_cluster, last_cluster); other != nullptr) {
    co_await other->ended.wait(lock, token);
    co_return 0;
  }
  if (state_.l2_table_is_ours(guest_offset)) co_return 0;
  const auto table = allocator_.take(1, false);
  if (!table) {
    lock.unlock();
    const int refill_error = co_await allocator_.refill(context, token);
    co_return refill_error;
  }
  Allocation allocation{.first_cluster = first_cluster, .last_cluster = last_cluster, .ended = {}};
  state_.begin(allocation);
  const std::uint64_t old_offset = state_.l1_table[l1_index] & kOffsetMask;
  const std::uint64_t new_offset = table->first << geometry.cluster_bits;
  lock.unlock();
  int error = 0;
  const bool must_write = old_offset != 0 || !table->reads_zero;
  if (must_write) {
    AlignedBuffer content(geometry.cluster_bytes());
    std::memset(content.data(), 0, content.size());
    if (old_offset != 0)
      error = co_await BlockIo(state_.file, context, BlockOperation::kRead, old_offset,
                               content.bytes());
    if (error == 0)
      error = co_await BlockIo(state_.file, context, BlockOperation::kWrite, new_offset,
                               content.bytes());
  }
  lock.lock();
  if (error == 0 && !state_.metadata_map.add(table->first)) {
    lock.unlock();
    mark_corrupt(state_, context, fmt::format("cluster {} is metadata already", table->first));
    lock.lock();
    error = EIO;
  }
  if (error != 0) {
    allocator_.give_back(*table);
    state_.end(allocation, context);
    co_return error;
  }
  state_.l1_table[l1_index] = new_offset | kFlagCopied;
  state_.l1_dirty.mark(l1_index, state_.next_change(),
                       {.refcount_change = table->refcount_change,
                        .barrier = must_write ? state_.next_barrier() : 0});
  const unsigned slices_bits = geometry.l2_bits() - geometry.l2_slice_bits();
  for (std::uint64_t i = 0; i < std::uint64_t{1} << slices_bits; ++i) {
    TableCache::Slot* const slot = state_.l2_cache.find((l1_index << slices_bits) + i);
    if (slot != nullptr) slot->host_offset = new_offset + i * geometry.slice_bytes();
  }
  if (old_offset != 0) {
    state_.metadata_map.remove(state_.cluster_of(old_offset));
    state_.free_clusters(state_.cluster_of(old_offset), 1);
  }
  state_.end(allocation, context);
  co_return 0;
}

}  // namespace vblk::qcow2
