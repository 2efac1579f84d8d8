// Writes of whole clusters that are stored compressed (qcow2.txt, "Compressed Clusters
// Descriptor"): for who fills an image that there is, not for guests.
//
// Compressed data lies one behind the other, in whole sectors, and goes on in the next cluster
// where that is to be had. A cluster's refcount is how much data touches it, and one more while
// there is room in it: that is the stream's own reference, so that a cluster whose data is freed
// meanwhile is not free. What is lost by a crash is that reference: a leak.
#include <algorithm>
#include <cerrno>
#include <mutex>
#include <optional>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/compression.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/slice_loader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;

Task<int> Qcow2Node::write_compressed(IoContext& context, std::uint64_t offset_bytes,
                                      std::span<std::byte> unit) {
  if (state_.data_file != nullptr) co_return EOPNOTSUPP;
  if (limits().read_only) co_return EROFS;
  if (state_.is_corrupt.load(std::memory_order_relaxed)) co_return EIO;
  if ((offset_bytes & state_.geometry.cluster_mask()) != 0 || offset_bytes >= size_bytes() ||
      unit.size() != state_.geometry.cluster_bytes())
    co_return EINVAL;
  // A cluster less than its last sector: otherwise it is better off as it is.
  AlignedBuffer compressed(unit.size());
  const std::size_t length = compress(state_.compression, unit,
                                      compressed.bytes().first(unit.size() - kHeaderSectorBytes));
  if (length == 0) {
    const std::uint64_t inside = std::min<std::uint64_t>(unit.size(), size_bytes() - offset_bytes);
    const int error =
        co_await BlockIo(*this, context, BlockOperation::kWrite, offset_bytes, unit.first(inside));
    co_return error;
  }
  BlockRequest token;
  token.context = &context;
  const unsigned epoch = enter_epoch(context);
  int error =
      co_await write_compressed_cluster(token, offset_bytes, compressed.bytes().first(length));
  leave_epoch(context, epoch);
  flushes_.note_change();
  if (error == 0) error = co_await flush_if_much_is_freed(context);
  refill_if_low(context);
  co_return error;
}

Task<int> Qcow2Node::write_compressed_cluster(BlockRequest& token, std::uint64_t guest_offset,
                                              std::span<const std::byte> compressed) {
  IoContext& context = *token.context;
  const std::uint64_t cluster = state_.cluster_of(guest_offset);
  Allocation allocation{.first_cluster = cluster, .last_cluster = cluster, .ended = {}};
  int error = 0;
  std::unique_lock lock(state_.mutex);
  for (;;) {
    if (error != 0) co_return error;
    if (!state_.l2_table_is_ours(guest_offset)) {
      lock.unlock();
      error = co_await make_l2_table_ours(token, guest_offset);
      lock.lock();
    } else if (Allocation* const other = state_.conflict(cluster, cluster); other != nullptr) {
      co_await other->ended.wait(lock, token);
    } else {
      break;
    }
  }
  state_.begin(allocation);
  lock.unlock();
  std::uint64_t offset = 0;
  WriteOrder order;
  error = co_await place_compressed(token, compressed.size(), offset, order.refcount_change);
  if (error == 0) {
    AlignedBuffer sectors((compressed.size() + kHeaderSectorBytes - 1) / kHeaderSectorBytes *
                          kHeaderSectorBytes);
    std::ranges::copy(compressed, sectors.data());
    std::ranges::fill(sectors.bytes().subspan(compressed.size()), std::byte{0});
    error = co_await BlockIo(state_.file, context, BlockOperation::kWrite, offset, sectors.bytes());
  }
  lock.lock();
  TableCache::Slot* slot = nullptr;
  while (error == 0 && (slot = state_.l2_slot(guest_offset)) == nullptr) {
    lock.unlock();
    error = co_await load_l2_slice(state_, write_back_, context, token, guest_offset);
    lock.lock();
  }
  L2Entry old;
  if (error == 0) {
    old = state_.entry(*slot, guest_offset);
    for (unsigned i = 0; i < state_.geometry.subclusters(); ++i) {
      if (mapping_of(state_.geometry, old, i, std::nullopt) == Mapping::kInvalid) error = EIO;
    }
  }
  if (error == 0) {
    order.barrier = state_.next_barrier();
    const L2Entry entry{
        .descriptor = compressed_descriptor(state_.geometry, offset, compressed.size()),
        .bitmap = 0};
    state_.set_entry(*slot, guest_offset, entry, order);
    state_.free_entry(old);
  }
  const bool is_damaged = error == EIO && slot != nullptr;
  state_.end(allocation, context);
  lock.unlock();
  if (is_damaged) {
    mark_corrupt(state_, context,
                 fmt::format("the L2 entry for guest offset {} is not valid", guest_offset));
  }
  co_return error;
}

// One after the other: the stream is one.
Task<int> Qcow2Node::place_compressed(BlockRequest& token, std::uint64_t length,
                                      std::uint64_t& offset, std::uint64_t& refcount_change) {
  std::unique_lock lock(state_.mutex);
  while (placing_compressed_) co_await compressed_placed_.wait(lock, token);
  placing_compressed_ = true;
  lock.unlock();
  const int error = co_await place_compressed_alone(token, length, offset, refcount_change);
  lock.lock();
  placing_compressed_ = false;
  compressed_placed_.wake_all(*token.context);
  co_return error;
}

Task<int> Qcow2Node::place_compressed_alone(BlockRequest& token, std::uint64_t length,
                                            std::uint64_t& offset, std::uint64_t& refcount_change) {
  IoContext& context = *token.context;
  const std::uint64_t cluster_bytes = state_.geometry.cluster_bytes();
  const std::uint64_t references_max = state_.geometry.refcount_max();
  const std::uint64_t taken_bytes =
      (length + kHeaderSectorBytes - 1) / kHeaderSectorBytes * kHeaderSectorBytes;
  CompressedStream& stream = compressed_stream_;
  const std::uint64_t left = stream.cluster == 0 ? 0 : cluster_bytes - stream.used_bytes;
  const bool may_share = stream.cluster != 0 && stream.references < references_max;
  const std::uint64_t begin = (stream.cluster << state_.geometry.cluster_bits) + stream.used_bytes;
  if (may_share && taken_bytes <= left) {
    const int error = co_await allocator_.raise(context, token, stream.cluster, refcount_change);
    if (error != 0) co_return error;
    ++stream.references;
    stream.used_bytes += taken_bytes;
    offset = begin;
    co_return 0;
  }
  std::optional<HostClusters> next;
  for (;;) {
    {
      const std::lock_guard lock(state_.mutex);
      next = allocator_.take(1, false);
    }
    if (next) break;
    const int error = co_await allocator_.refill(context, token);
    if (error != 0) co_return error;
    release_quarantine(context);
  }
  refcount_change = next->refcount_change;
  const bool goes_on = may_share && left > 0 && next->first == stream.cluster + 1;
  int error = 0;
  if (goes_on) {
    error = co_await allocator_.raise(context, token, stream.cluster, refcount_change);
    if (error == 0) ++stream.references;
  }
  // Where only one can be counted, the cluster is the data's.
  const bool is_shared = references_max > 1;
  if (error == 0 && is_shared)
    error = co_await allocator_.raise(context, token, next->first, refcount_change);
  const std::lock_guard lock(state_.mutex);
  if (error != 0) {
    allocator_.give_back(*next);
    co_return error;
  }
  if (stream.cluster != 0) state_.free_clusters(stream.cluster, 1);
  offset = goes_on ? begin : next->first << state_.geometry.cluster_bits;
  stream = is_shared ? CompressedStream{.cluster = next->first,
                                        .used_bytes = goes_on ? taken_bytes - left : taken_bytes,
                                        .references = 2}
                     : CompressedStream{};
  co_return 0;
}

}  // namespace vblk::qcow2
