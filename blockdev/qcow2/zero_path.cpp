// Discard and write zeroes: as far as whole clusters or subclusters go by changing the mapping, for
// the rest by writing zeroes, or not at all for a discard, which is a hint.
//
//   a whole unit becomes      discard, or zeroes that may unmap   zeroes that keep their space
//   without backing           unallocated                         zero, with the space it has
//   with backing, version 3   zero                                zero, with the space it has
//   with backing, version 2   discard: as it was; zeroes: written out, version 2 has no zero flag
#include <algorithm>
#include <cerrno>
#include <mutex>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/slice_loader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;

enum class Qcow2Node::ZeroStep : std::uint8_t {
  kDone,
  kNothingToDo,
  kNeedsTable,    // the L2 table is shared or does not exist
  kMustBeWritten  // the mapping cannot say it
};

Task<int> Qcow2Node::zero(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t length,
                          bool unmap, bool is_discard) {
  if (state_.data_file_is_raw) {
    // The data file must read as the disk does, without the mapping.
    BlockIo io(*state_.data_file, *token.context,
               is_discard ? BlockOperation::kDiscard : BlockOperation::kWriteZeroes, guest_offset,
               length);
    io.may_unmap = unmap;
    const int error = co_await io;
    co_return is_discard&& error == EOPNOTSUPP ? 0 : error;
  }
  const std::uint64_t unit = state_.geometry.subcluster_bytes();
  const std::uint64_t end = guest_offset + length;
  const std::uint64_t units_begin = (guest_offset + unit - 1) / unit * unit;
  // The last cluster of the disk may be cut short by its end.
  const std::uint64_t units_end = end == size_bytes() ? end : end / unit * unit;
  int error = 0;
  if (units_begin >= units_end) {
    if (!is_discard) error = co_await write_zero_bytes(token, guest_offset, length);
    co_return error;
  }
  if (!is_discard && guest_offset < units_begin)
    error = co_await write_zero_bytes(token, guest_offset, units_begin - guest_offset);
  if (error == 0) error = co_await zero_units(token, units_begin, units_end, unmap, is_discard);
  if (error == 0 && !is_discard && units_end < end)
    error = co_await write_zero_bytes(token, units_end, end - units_end);
  co_return error;
}

Task<int> Qcow2Node::zero_units(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t end,
                                bool unmap, bool is_discard) {
  IoContext& context = *token.context;
  const Geometry& geometry = state_.geometry;
  int error = 0;
  std::uint64_t punched_end = guest_offset;
  std::unique_lock lock(state_.mutex);
  while (guest_offset < end && error == 0) {
    const std::uint64_t cluster = state_.cluster_of(guest_offset);
    const std::uint64_t piece_end = std::min(end, (guest_offset | geometry.cluster_mask()) + 1);
    // A table that does not exist says zeroes already, for all that it would map: a whole disk may
    // be one request, and must not be walked cluster by cluster.
    if (state_.l1_table[geometry.l1_index(guest_offset)] == 0 &&
        !state_.has_backing_at(guest_offset)) {
      guest_offset = std::min(end, (guest_offset | (geometry.l2_table_reach() - 1)) + 1);
      continue;
    }
    if (state_.l2_slot(guest_offset) == nullptr) {
      lock.unlock();
      error = co_await load_l2_slice(state_, write_back_, context, token, guest_offset);
      lock.lock();
      continue;
    }
    if (Allocation* const other = state_.conflict(cluster, cluster); other != nullptr) {
      co_await other->ended.wait(lock, token);
      continue;
    }
    if (unmap && guest_offset >= punched_end) {
      const std::uint64_t space = space_in_data_file(guest_offset, end);
      if (space > 0) {
        lock.unlock();
        // A hint: what cannot be punched stays as it is.
        [[maybe_unused]] const int ignored = co_await BlockIo(
            *state_.data_file, context, BlockOperation::kDiscard, guest_offset, space);
        lock.lock();
        punched_end = guest_offset + space;
        continue;
      }
    }
    const ZeroStep step = zero_in_entry(guest_offset, piece_end, unmap);
    if (step == ZeroStep::kNeedsTable) {
      lock.unlock();
      error = co_await make_l2_table_ours(token, guest_offset);
      lock.lock();
      continue;
    }
    if (step == ZeroStep::kMustBeWritten && !is_discard) {
      lock.unlock();
      error = co_await write_zero_bytes(token, guest_offset, piece_end - guest_offset);
      lock.lock();
    }
    guest_offset = piece_end;
  }
  co_return error;
}

// Under the mutex, with the slice there: how many bytes from here on are whole clusters that have
// space in an external data file. That is at their guest offset, nobody else's ever, so that it can
// be punched at once, and before the mapping is changed: who reads or writes there meanwhile does
// so beside the request that zeroes it.
std::uint64_t Qcow2Node::space_in_data_file(std::uint64_t guest_offset, std::uint64_t end) {
  const Geometry& geometry = state_.geometry;
  if (state_.data_file == nullptr || !state_.discard ||
      (guest_offset & geometry.cluster_mask()) != 0)
    return 0;
  const TableCache::Slot& slot = *state_.l2_slot(guest_offset);
  const std::uint64_t slice = geometry.l2_slice(guest_offset);
  std::uint64_t at = guest_offset;
  while (at < end && geometry.l2_slice(at) == slice) {
    if (end - at < geometry.cluster_bytes() && end != size_bytes()) break;
    const L2Entry entry = state_.entry(slot, at);
    const bool has_space = host_offset(entry) != 0 || (entry.descriptor & kFlagCopied) != 0;
    if (!has_space || host_offset(entry) != at) break;
    at += geometry.cluster_bytes();
  }
  return std::min(at, end) - guest_offset;
}

// Under the mutex; whole subclusters of one cluster, up to the end of the disk.
Qcow2Node::ZeroStep Qcow2Node::zero_in_entry(std::uint64_t guest_offset, std::uint64_t end,
                                             bool unmap) {
  const Geometry& geometry = state_.geometry;
  TableCache::Slot& slot = *state_.l2_slot(guest_offset);
  const L2Entry old = state_.entry(slot, guest_offset);
  const bool external = state_.data_file != nullptr;
  const auto place = state_.place_in_data_file(guest_offset);
  const std::uint64_t in_cluster = guest_offset & geometry.cluster_mask();
  const auto first = static_cast<unsigned>(in_cluster >> geometry.subcluster_bits());
  const auto last =
      static_cast<unsigned>(((end - 1) & geometry.cluster_mask()) >> geometry.subcluster_bits());
  const std::uint64_t cluster_begin = guest_offset - in_cluster;
  const bool is_backed = state_.has_backing_at(cluster_begin);
  const bool is_whole =
      in_cluster == 0 && (end - cluster_begin == geometry.cluster_bytes() || end == size_bytes());
  const bool is_compressed = (old.descriptor & kFlagCompressed) != 0;
  const bool has_host =
      is_compressed || host_offset(old) != 0 || (external && (old.descriptor & kFlagCopied) != 0);
  for (unsigned subcluster = first; subcluster <= last; ++subcluster) {
    // Reading it will tell.
    if (mapping_of(geometry, old, subcluster, place) == Mapping::kInvalid)
      return ZeroStep::kMustBeWritten;
  }
  // Bits of the subclusters, where there are any.
  const std::uint64_t mask =
      ((std::uint64_t{1} << (last + 1)) - 1) & ~((std::uint64_t{1} << first) - 1);
  const bool has_zero_flag = state_.version >= 3;
  L2Entry entry = old;
  bool frees = false;
  if (is_whole && (unmap || is_compressed || (has_host && (old.descriptor & kFlagCopied) == 0))) {
    if (is_backed && !has_zero_flag) return ZeroStep::kMustBeWritten;
    frees = has_host;
    entry = {};
    if (is_backed && geometry.extended_l2) entry.bitmap = ~std::uint64_t{0} << kSubclusters;
    if (is_backed && !geometry.extended_l2) entry.descriptor = kFlagZero;
  } else if (is_compressed) {  // NOLINT(bugprone-branch-clone): others are so for other reasons
    return ZeroStep::kMustBeWritten;
  } else if (geometry.extended_l2) {
    entry.bitmap = (old.bitmap & ~mask) | (mask << kSubclusters);
    frees = unmap && has_host && (entry.bitmap & 0xffff'ffff) == 0;
    if (frees) entry.descriptor = 0;
  } else if (!is_whole) {
    return ZeroStep::kMustBeWritten;
  } else if (!has_zero_flag) {
    if (has_host || is_backed) return ZeroStep::kMustBeWritten;
  } else if (has_host || is_backed) {
    entry.descriptor |= kFlagZero;
  }
  if (entry.descriptor == old.descriptor && entry.bitmap == old.bitmap)
    return ZeroStep::kNothingToDo;
  // Nobody's data: a table need not be made to say so.
  if (!has_host && !is_backed && (old.descriptor == 0 && old.bitmap == 0))
    return ZeroStep::kNothingToDo;
  if (!state_.l2_table_is_ours(guest_offset)) return ZeroStep::kNeedsTable;
  state_.set_entry(slot, guest_offset, entry, {});
  if (frees) state_.free_entry(old);
  return ZeroStep::kDone;
}

Task<int> Qcow2Node::write_zero_bytes(BlockRequest& token, std::uint64_t guest_offset,
                                      std::uint64_t length) {
  // A cluster at most.
  AlignedBuffer zeroes(length);
  std::fill_n(zeroes.data(), length, std::byte{0});
  const iovec memory{zeroes.data(), length};
  const int error = co_await write(token, guest_offset, length, {&memory, 1}, false);
  co_return error;
}

}  // namespace vblk::qcow2
