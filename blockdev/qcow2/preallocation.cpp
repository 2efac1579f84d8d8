// Clusters for what reads as zeroes, before anybody writes there.
#include <algorithm>
#include <cerrno>
#include <mutex>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/slice_loader.h"

namespace vblk::qcow2 {

using blockdev::BlockIo;
using blockdev::BlockOperation;

Task<int> Qcow2Node::allocate(IoContext& context, std::uint64_t offset_bytes,
                              std::uint64_t length_bytes, bool takes_space) {
  if (limits().read_only) co_return EROFS;
  if (state_.is_corrupt.load(std::memory_order_relaxed)) co_return EIO;
  BlockRequest token;
  token.context = &context;
  const unsigned epoch = enter_epoch(context);
  int error = 0;
  if (state_.data_file != nullptr) {
    error = co_await allocate_in_data_file(token, offset_bytes, offset_bytes + length_bytes,
                                           takes_space);
  } else {
    {
      const std::lock_guard lock(state_.mutex);
      allocator_.set_takes_space(takes_space);
    }
    error = co_await allocate_clusters(token, offset_bytes, offset_bytes + length_bytes);
    const std::lock_guard lock(state_.mutex);
    allocator_.set_takes_space(true);
  }
  leave_epoch(context, epoch);
  flushes_.note_change();
  co_return error;
}

// Fresh clusters read as zeroes and need no writing; others, and what the mapping cannot say, are
// written.
Task<int> Qcow2Node::allocate_clusters(BlockRequest& token, std::uint64_t guest_offset,
                                       std::uint64_t end) {
  IoContext& context = *token.context;
  int error = 0;
  std::unique_lock lock(state_.mutex);
  while (guest_offset < end && error == 0) {
    const std::uint64_t cluster = state_.cluster_of(guest_offset);
    const std::uint64_t piece_end =
        std::min(end, (guest_offset | state_.geometry.cluster_mask()) + 1);
    if (Allocation* const other = state_.conflict(cluster, cluster); other != nullptr) {
      co_await other->ended.wait(lock, token);
      continue;
    }
    if (map_zeroed_cluster(guest_offset, piece_end)) {
      guest_offset = piece_end;
      continue;
    }
    const bool has_slice = state_.l2_slot(guest_offset) != nullptr;
    const bool has_table = state_.l2_table_is_ours(guest_offset);
    const bool has_reserve = !allocator_.is_empty();
    lock.unlock();
    if (!has_slice) {
      error = co_await load_l2_slice(state_, write_back_, context, token, guest_offset);
    } else if (!has_table) {
      error = co_await make_l2_table_ours(token, guest_offset);
    } else if (!has_reserve) {
      error = co_await allocator_.refill(context, token);
    } else {
      error = co_await write_zero_bytes(token, guest_offset, piece_end - guest_offset);
      guest_offset = piece_end;
    }
    lock.lock();
  }
  co_return error;
}

// There every cluster has its place, with whatever content; the part of one that the range begins
// with stays as it is.
Task<int> Qcow2Node::allocate_in_data_file(BlockRequest& token, std::uint64_t guest_offset,
                                           std::uint64_t end, bool takes_space) {
  IoContext& context = *token.context;
  const Geometry& geometry = state_.geometry;
  guest_offset = geometry.clusters_of(guest_offset) << geometry.cluster_bits;
  if (guest_offset >= end) co_return 0;
  BlockIo zeroes(*state_.data_file, context, BlockOperation::kWriteZeroes, guest_offset,
                 end - guest_offset);
  zeroes.may_unmap = !takes_space;
  int error = co_await zeroes;
  std::unique_lock lock(state_.mutex);
  while (guest_offset < end && error == 0) {
    const std::uint64_t cluster = state_.cluster_of(guest_offset);
    TableCache::Slot* const slot = state_.l2_slot(guest_offset);
    const bool has_table = state_.l2_table_is_ours(guest_offset);
    if (slot == nullptr || !has_table) {
      lock.unlock();
      if (slot == nullptr) {
        error = co_await load_l2_slice(state_, write_back_, context, token, guest_offset);
      } else {
        error = co_await make_l2_table_ours(token, guest_offset);
      }
      lock.lock();
      continue;
    }
    if (Allocation* const other = state_.conflict(cluster, cluster); other != nullptr) {
      co_await other->ended.wait(lock, token);
      continue;
    }
    L2Entry entry = state_.entry(*slot, guest_offset);
    entry.descriptor = guest_offset | kFlagCopied;
    if (geometry.extended_l2) entry.bitmap = ~std::uint64_t{0} >> kSubclusters;
    state_.set_entry(*slot, guest_offset, entry, {.barrier = state_.next_barrier()});
    guest_offset += geometry.cluster_bytes();
  }
  co_return error;
}

}  // namespace vblk::qcow2
