// A disk that becomes larger or smaller while requests run.
//
// Larger: a larger L1 table where the old one is too small; what lies beyond the old end and may
// read as something else is zeroed: the rest of the old last cluster, what the backing file has
// there, what a crash while shrinking left. The header's size comes last, so that until then
// nothing has happened.
//
// Smaller: first no request may begin beyond the new end, then those that had begun are waited for,
// then the header says the new size, and only then the clusters are freed: a crash leaves them
// mapped, and the next growth zeroes them. L2 tables stay for when the disk grows again.
#include <algorithm>
#include <cerrno>
#include <mutex>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/table_io.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::Detached;

namespace {

std::uint64_t l1_entries_for(const Geometry& geometry, std::uint64_t size_bytes) {
  return geometry.l1_index(size_bytes - 1) + 1;
}

}  // namespace

void Qcow2Node::do_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) {
  if (auto possible = can_resize(size_bytes); !possible) return done(std::move(possible));
  {
    const std::lock_guard lock(state_.mutex);
    if (resizing_) {
      return done(make_error(ErrorKind::kBusy,
                             fmt::format("the size of '{}' is being changed already", name_),
                             EBUSY));
    }
    resizing_ = true;
  }
  run_resize(size_bytes, context, std::move(done));
}

Expected<void> Qcow2Node::can_resize(std::uint64_t size_bytes) {
  // Version 2 does not record the size that a snapshot has ("Snapshots").
  if (state_.version < 3 && state_.header.snapshot_count > 0) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("'{}' has snapshots, which in version 2 have the size of the "
                                  "disk; 'vblk img amend -o compat=1.1' makes it version 3",
                                  name_),
                      EOPNOTSUPP);
  }
  const Geometry& geometry = state_.geometry;
  if (l1_entries_for(geometry, size_bytes) * 8 > kL1BytesMax) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("with clusters of {} bytes '{}' cannot have more than {} bytes",
                    geometry.cluster_bytes(), name_, kL1BytesMax / 8 * geometry.l2_table_reach()),
        EFBIG);
  }
  return {};
}

Detached Qcow2Node::run_resize(std::uint64_t size_bytes, IoContext& context, ResizeDone done) {
  BlockRequest token;
  token.context = &context;
  const std::uint64_t old_bytes = this->size_bytes();
  int error = state_.is_corrupt.load(std::memory_order_relaxed) ? EIO : 0;
  if (error == 0 && size_bytes > old_bytes) error = co_await grow(token, size_bytes);
  if (error == 0 && size_bytes < old_bytes) error = co_await shrink(token, size_bytes);
  {
    const std::lock_guard lock(state_.mutex);
    resizing_ = false;
  }
  if (error == 0) {
    done({});
  } else {
    done(make_error(kind_of_errno(error),
                    fmt::format("cannot change the size of '{}': {}", name_, describe_errno(error)),
                    error));
  }
}

Task<int> Qcow2Node::grow(BlockRequest& token, std::uint64_t new_bytes) {
  const std::uint64_t old_bytes = size_bytes();
  const std::uint64_t entries = l1_entries_for(state_.geometry, new_bytes);
  int error = parts_.data_file ? parts_.data_file->grow(new_bytes) : 0;
  // Only a change of size changes its length.
  if (error == 0 && entries > state_.l1_table.size())
    error = co_await grow_l1_table(token, entries);
  if (error != 0) co_return error;
  // No guest has been told of it yet.
  size_bytes_.store(new_bytes, std::memory_order_relaxed);
  const unsigned epoch = enter_epoch(*token.context);
  error = co_await zero_mapped(token, old_bytes, new_bytes, false);
  leave_epoch(*token.context, epoch);
  if (error == 0) error = co_await write_size(token, new_bytes);
  if (error != 0) size_bytes_.store(old_bytes, std::memory_order_relaxed);
  co_return error;
}

// The new table is a copy of the old one as that is on the disk, not of the one in memory: what
// that has and the disk has not yet may have to wait for something else (write_order.h), and goes
// to the new table as it would have to the old one.
Task<int> Qcow2Node::grow_l1_table(BlockRequest& token, std::uint64_t entries) {
  IoContext& context = *token.context;
  const Geometry& geometry = state_.geometry;
  const std::uint64_t clusters = geometry.clusters_of(entries * 8);
  HostClusters place;
  int error = co_await allocator_.allocate_table(context, token, clusters, place);
  if (error != 0) co_return error;
  co_await write_back_.take_turn(context, token);
  const std::uint64_t new_offset = place.first << geometry.cluster_bits;
  Extent old_table;
  {
    const std::lock_guard lock(state_.mutex);
    old_table = {state_.header.l1_table_offset, std::uint64_t{state_.header.l1_entries} * 8};
  }
  error = co_await write_back_.write_refcounts(context);
  std::vector<std::uint64_t> table;
  if (error == 0)
    error = co_await read_table(state_.file, context, state_.file_end.load(), old_table.offset,
                                old_table.length / 8, table);
  if (error == 0) {
    AlignedBuffer bytes(clusters << geometry.cluster_bits);
    std::ranges::fill(bytes.bytes(), std::byte{0});
    for (std::size_t i = 0; i < table.size(); ++i) store_be(bytes.data() + i * 8, table[i]);
    error =
        co_await BlockIo(state_.file, context, BlockOperation::kWrite, new_offset, bytes.bytes());
  }
  if (error == 0) error = co_await write_back_.barrier(context);
  const auto name_table = [this](std::uint64_t offset, std::uint64_t count) {
    const std::lock_guard lock(state_.mutex);
    state_.header.l1_table_offset = offset;
    state_.header.l1_entries = static_cast<std::uint32_t>(count);
  };
  if (error == 0) {
    name_table(new_offset, entries);
    error = co_await write_header(state_, context);
    if (error == 0) error = co_await write_back_.barrier(context);
    if (error != 0) {
      // The disk may have either; the next flush, which is the next promise, settles on the old.
      name_table(old_table.offset, old_table.length / 8);
      const int undo_error = co_await write_header(state_, context);
      if (undo_error != 0)
        mark_corrupt(state_, context, "its header cannot be written to name its L1 table");
    }
  }
  {
    const std::lock_guard lock(state_.mutex);
    if (error != 0) {
      state_.free_clusters(place.first, clusters);
    } else {
      state_.l1_table.resize(entries);
      for (std::uint64_t i = 0; i < clusters; ++i) state_.metadata_map.add(place.first + i);
      const std::uint64_t old_first = state_.cluster_of(old_table.offset);
      const std::uint64_t old_clusters = geometry.clusters_of(old_table.length);
      for (std::uint64_t i = 0; i < old_clusters; ++i) state_.metadata_map.remove(old_first + i);
      // A disk of no bytes has none.
      if (old_clusters > 0) state_.free_clusters(old_first, old_clusters);
    }
  }
  write_back_.end_turn(context);
  co_return error;
}

Task<int> Qcow2Node::shrink(BlockRequest& token, std::uint64_t new_bytes) {
  const Geometry& geometry = state_.geometry;
  const std::uint64_t old_bytes = size_bytes();
  size_bytes_.store(new_bytes, std::memory_order_seq_cst);
  int error = co_await wait_for_requests(token);
  if (error == 0) error = co_await write_size(token, new_bytes);
  if (error != 0) {
    size_bytes_.store(old_bytes, std::memory_order_relaxed);
    co_return error;
  }
  // From here on the disk is smaller, whatever becomes of the rest.
  const unsigned epoch = enter_epoch(*token.context);
  error = co_await zero_mapped(token, geometry.clusters_of(new_bytes) << geometry.cluster_bits,
                               geometry.clusters_of(old_bytes) << geometry.cluster_bits, true);
  leave_epoch(*token.context, epoch);
  flushes_.note_change();
  if (error == 0) error = co_await BlockIo(*this, *token.context, BlockOperation::kFlush, 0, 0);
  if (error == 0 && parts_.data_file && !parts_.data_file->is_block_device())
    error = parts_.data_file->shrink(new_bytes);
  co_return error;
}

// Until all requests that have begun by now have ended.
Task<int> Qcow2Node::wait_for_requests(BlockRequest& token) {
  std::uint64_t begun = 0;
  {
    const std::lock_guard lock(state_.mutex);
    begun = state_.epochs.current();
  }
  for (;;) {
    {
      const std::lock_guard lock(state_.mutex);
      state_.epochs.advance();
      if (state_.epochs.is_over(begun)) co_return 0;
    }
    // Nobody tells when a request leaves; as long as a flush takes is no time to wait for one.
    const int error = co_await write_back_.barrier(*token.context);
    if (error != 0) co_return error;
  }
}

Task<int> Qcow2Node::write_size(BlockRequest& token, std::uint64_t size_bytes) {
  IoContext& context = *token.context;
  int error = co_await write_back_.flush(context, token);
  if (error != 0) co_return error;
  std::uint64_t old_bytes = 0;
  {
    const std::lock_guard lock(state_.mutex);
    old_bytes = std::exchange(state_.header.size_bytes, size_bytes);
  }
  error = co_await write_header(state_, context);
  if (error == 0) error = co_await write_back_.barrier(context);
  if (error != 0) {
    {
      const std::lock_guard lock(state_.mutex);
      state_.header.size_bytes = old_bytes;
    }
    // Either size is right for what is there; the old one is what the guest has, if it can be had.
    [[maybe_unused]] const int ignored = co_await write_header(state_, context);
  }
  co_return error;
}

// Zeroes [guest_offset, end), or frees it, where an L2 table or the backing file may have something
// for it. Discards take whole clusters.
Task<int> Qcow2Node::zero_mapped(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t end,
                                 bool is_discard) {
  int error = 0;
  while (guest_offset < end && error == 0) {
    const std::uint64_t table_end =
        std::min(end, (guest_offset | (state_.geometry.l2_table_reach() - 1)) + 1);
    bool has_table = false;
    {
      const std::lock_guard lock(state_.mutex);
      has_table = state_.l1_table[state_.geometry.l1_index(guest_offset)] != 0;
    }
    if (is_discard && has_table)
      error = co_await zero_units(token, guest_offset, table_end, true, true);
    if (!is_discard && (has_table || state_.has_backing_at(guest_offset)))
      error = co_await zero(token, guest_offset, table_end - guest_offset, true, false);
    guest_offset = table_end;
  }
  co_return error;
}

}  // namespace vblk::qcow2
