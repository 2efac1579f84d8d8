// Reads that are not one piece of the file: several extents, tables to be loaded, compressed
// clusters, a backing file that ends earlier. Also how copy on write gets what was there before.
#include <algorithm>
#include <cerrno>
#include <utility>

#include <fmt/core.h>

#include "blockdev/alignment.h"
#include "blockdev/block_io.h"
#include "blockdev/qcow2/compression.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/slice_loader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::IoGroup;

// All extents are read at once; compressed ones are decompressed one after another meanwhile.
// Beyond the end of the disk, where a cluster may reach, there are zeroes.
Task<int> Qcow2Node::read(BlockRequest& token, std::uint64_t guest_offset, std::uint64_t length,
                          std::span<const iovec> memory) {
  IoContext& context = *token.context;
  IovCursor cursor(memory);
  IoGroup group(context);
  const std::uint64_t disk_bytes = size_bytes();
  int error = 0;
  while (length > 0 && error == 0) {
    if (guest_offset >= disk_bytes) {
      cursor.zero(length);
      break;
    }
    Run run;
    if (!state_.lookup(guest_offset, std::min(length, disk_bytes - guest_offset), run)) {
      error = co_await load_l2_slice(state_, write_back_, context, token, guest_offset);
      continue;
    }
    switch (run.mapping) {
      case Mapping::kNormal:
        group.start(state_.data(), BlockOperation::kRead, run.host_offset, cursor.take(run.length));
        break;
      case Mapping::kZero:
      case Mapping::kZeroWithSpace:
        cursor.zero(run.length);
        break;
      case Mapping::kUnallocated:
      case Mapping::kUnallocatedWithSpace: {
        const std::uint64_t backed =
            state_.has_backing_at(guest_offset)
                ? std::min(run.length, state_.backing->size_bytes() - guest_offset)
                : 0;
        if (backed > 0)
          group.start(*state_.backing, BlockOperation::kRead, guest_offset, cursor.take(backed));
        cursor.zero(run.length - backed);
        break;
      }
      case Mapping::kCompressed:
        error = co_await read_compressed(context, run.descriptor,
                                         guest_offset & state_.geometry.cluster_mask(),
                                         cursor.take(run.length));
        break;
      case Mapping::kInvalid:
        mark_corrupt(state_, context,
                     fmt::format("the L2 entry for guest offset {} is not valid", guest_offset));
        error = EIO;
        break;
    }
    guest_offset += run.length;
    length -= run.length;
  }
  const int group_error = co_await group;
  co_return error != 0 ? error : group_error;
}

Task<int> Qcow2Node::read_into(BlockRequest& token, std::uint64_t guest_offset,
                               std::span<std::byte> bytes) {
  const iovec memory{bytes.data(), bytes.size()};
  const int error = co_await read(token, guest_offset, bytes.size(), {&memory, 1});
  co_return error;
}

Task<int> Qcow2Node::read_compressed(IoContext& context, std::uint64_t descriptor,
                                     std::uint64_t in_cluster, std::vector<iovec> memory) {
  const CompressedExtent extent = compressed_extent(state_.geometry, descriptor);
  const std::uint64_t file_end = state_.file_end.load(std::memory_order_relaxed);
  if (extent.offset >= file_end) {
    mark_corrupt(
        state_, context,
        fmt::format("compressed data at {} lies beyond the end of the file", extent.offset));
    co_return EIO;
  }
  // The last sector of the last cluster may be cut short by the end of the file.
  AlignedBuffer compressed(std::min(extent.length, file_end - extent.offset));
  const int error = co_await BlockIo(state_.file, context, BlockOperation::kRead, extent.offset,
                                     compressed.bytes());
  if (error != 0) co_return error;
  AlignedBuffer cluster(state_.geometry.cluster_bytes());
  if (!decompress(state_.compression, compressed.bytes(), cluster.bytes())) {
    mark_corrupt(state_, context, fmt::format("compressed data at {} is damaged", extent.offset));
    co_return EIO;
  }
  blockdev::scatter(cluster.data() + in_cluster, memory);
  co_return 0;
}

Task<int> Qcow2Node::range_status(IoContext& context, std::uint64_t offset_bytes,
                                  std::uint64_t length_bytes, blockdev::RangeStatus& status) {
  BlockRequest token;
  token.context = &context;
  const unsigned epoch = enter_epoch(context);
  Run run;
  int error = 0;
  while (error == 0 && !state_.lookup(offset_bytes, length_bytes, run))
    error = co_await load_l2_slice(state_, write_back_, context, token, offset_bytes);
  leave_epoch(context, epoch);
  if (error == 0 && run.mapping == Mapping::kInvalid) {
    mark_corrupt(state_, context,
                 fmt::format("the L2 entry for guest offset {} is not valid", offset_bytes));
    error = EIO;
  }
  if (error != 0) co_return error;
  using Kind = blockdev::RangeStatus::Kind;
  status = {.length_bytes = run.length};
  if (reads_zero(run.mapping)) {
    status.kind = Kind::kZero;
  } else if (run.mapping == Mapping::kUnallocated ||
             run.mapping == Mapping::kUnallocatedWithSpace) {
    status.kind = Kind::kBacking;
  }
  if (has_space(run.mapping)) {
    status.file_offset = run.host_offset;
    const blockdev::RawNode& file = parts_.data_file ? *parts_.data_file : *parts_.file;
    status.file = &file.name();
    status.fd = file.buffered_fd();
  }
  co_return 0;
}

}  // namespace vblk::qcow2
