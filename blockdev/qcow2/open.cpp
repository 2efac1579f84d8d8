// Opening an image, and closing it: with a context of its own, before and after all I/O threads.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/log.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/refcount_rebuild.h"
#include "blockdev/qcow2/snapshots.h"
#include "blockdev/qcow2/table_io.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;

namespace {

Task<int> read_bytes(blockdev::RawNode& file, IoContext& context, std::span<std::byte> bytes) {
  const int error = co_await BlockIo(file, context, BlockOperation::kRead, 0, bytes);
  co_return error;
}

std::unexpected<Error> read_error(const std::string& path, int error) {
  return make_error(ErrorKind::kIo,
                    fmt::format("cannot read qcow2 image '{}': {}", path, describe_errno(error)),
                    error);
}

}  // namespace

Expected<Header> read_header(blockdev::RawNode& file, const blockdev::MakePrivateContext& make) {
  const auto context = make();
  if (!context) return std::unexpected(context.error());
  const std::uint64_t file_bytes = file.data_bytes();
  const auto part = [file_bytes](std::uint64_t bytes) {
    return static_cast<std::size_t>(std::min(bytes, file_bytes));
  };
  AlignedBuffer sector(kHeaderSectorBytes);
  int error = (*context)->run(read_bytes(file, (*context)->context(), sector.bytes()));
  if (error != 0) return read_error(file.name(), error);
  const auto cluster_bytes =
      header_cluster_bytes(sector.bytes().first(part(kHeaderSectorBytes)), file.name());
  if (!cluster_bytes) return std::unexpected(cluster_bytes.error());
  AlignedBuffer cluster(*cluster_bytes);
  error = (*context)->run(read_bytes(file, (*context)->context(), cluster.bytes()));
  if (error != 0) return read_error(file.name(), error);
  return decode_header(cluster.bytes().first(part(*cluster_bytes)), file.name());
}

Expected<std::unique_ptr<Qcow2Node>> Qcow2Node::open(Qcow2Parts parts, const Qcow2Options& options,
                                                     blockdev::MakePrivateContext make_context) {
  const std::string path = parts.file->name();
  if (parts.header.size_bytes == 0 && parts.header.l1_entries == 0 && !options.may_be_empty) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("qcow2 image '{}' has a size of 0; give it one with "
                                  "'vblk img resize'",
                                  path));
  }
  if (parts.header.has(kIncompatCorrupt) && !options.read_only) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("qcow2 image '{}' is marked corrupt and must not be written; run "
                                  "'vblk img check -r all' on it, or open it with --read-only",
                                  path));
  }
  const auto context = make_context();
  if (!context) return std::unexpected(context.error());
  std::unique_ptr<Qcow2Node> node;
  try {
    node.reset(new Qcow2Node(std::move(parts), options, std::move(make_context)));
  } catch (const std::bad_alloc&) {
    return make_error(ErrorKind::kExhausted,
                      fmt::format("there is not enough memory for the tables of '{}'; make its "
                                  "caches smaller (--l2-cache-size, --refcount-cache-size)",
                                  path),
                      ENOMEM);
  }
  std::string why;
  const int error = (*context)->run(node->load((*context)->context(), why));
  if (error != 0) {
    if (why.empty()) return read_error(path, error);
    return make_error(
        ErrorKind::kCorrupt,
        fmt::format("qcow2 image '{}' is damaged: {}; run 'vblk img check' on it", path, why));
  }
  node->is_open_ = true;
  return node;
}

Qcow2Node::~Qcow2Node() {
  if (!is_open_ || state_.read_only) return;
  const auto context = make_context_();
  if (!context) {
    log::error("'{}' could not be closed cleanly: {}", name_, context.error().message);
    return;
  }
  const int error = (*context)->run(close((*context)->context()));
  if (error != 0) {
    log::error("'{}' could not be closed cleanly: {}; what was flushed is there", name_,
               describe_errno(error));
  }
}

Task<int> Qcow2Node::load(IoContext& context, std::string& why) {
  const Header& header = state_.header;
  state_.file_end.store(parts_.file->data_bytes());
  AlignedBuffer sector(kHeaderSectorBytes);
  int error = co_await BlockIo(state_.file, context, BlockOperation::kRead, 0, sector.bytes());
  if (error != 0) co_return error;
  std::ranges::copy(sector.bytes(), state_.header_sector.begin());
  error = co_await read_table(state_.file, context, state_.file_end.load(), header.l1_table_offset,
                              header.l1_entries, state_.l1_table);
  if (error == EINVAL) why = "its L1 table lies beyond the end of the file";
  if (error == 0) error = co_await load_snapshots(context, why);
  if (error != 0) co_return error;
  const bool writable = !state_.read_only;
  if (writable) error = fill_last_cluster(why);
  if (error != 0) co_return error;
  if (writable && header.has(kIncompatDirty)) {
    log::info("'{}' was not closed, and has lazy refcounts: counting anew", name_);
    error = co_await rebuild_refcounts(state_, write_back_, context, snapshot_l1_tables_,
                                       snapshot_table_, why);
    if (error != 0) co_return error;
  }
  const std::uint64_t refcount_entries =
      (std::uint64_t{header.refcount_table_clusters} << state_.geometry.cluster_bits) / 8;
  if (writable) {
    error =
        co_await read_table(state_.file, context, state_.file_end.load(),
                            header.refcount_table_offset, refcount_entries, state_.refcount_table);
    if (error == EINVAL) why = "its refcount table lies beyond the end of the file";
    if (error != 0) co_return error;
    // Not marked corrupt: what is refused is not written to either, and is refused again.
    if (!map_metadata(why)) co_return EINVAL;
    allocator_.opened();
    error = co_await clear_autoclear_features(context);
  }
  co_return error;
}

// Where the L1 tables of the snapshots are.
Task<int> Qcow2Node::load_snapshots(IoContext& context, std::string& why) {
  const std::uint64_t file_end = state_.file_end.load();
  const VisitSnapshot visit = [this, &why, file_end](const SnapshotEntry& entry) {
    const Extent& l1_table = entry.l1_table;
    if ((l1_table.offset & state_.geometry.cluster_mask()) != 0 || l1_table.length > kL1BytesMax ||
        l1_table.offset > file_end || l1_table.length > file_end - l1_table.offset) {
      why = fmt::format("the L1 table of its snapshot {} has no place in the file",
                        snapshot_l1_tables_.size());
      return false;
    }
    snapshot_l1_tables_.push_back(l1_table);
    return true;
  };
  SnapshotTable table;
  const int error =
      co_await visit_snapshots(state_.file, context, state_.header, file_end, visit, table);
  if (!table.why.empty()) why = table.why;
  snapshot_table_ = {state_.header.snapshots_offset, table.length_bytes};
  co_return error;
}

bool Qcow2Node::map_extent(const Extent& extent, const char* what, std::string& why) {
  if (extent.length == 0) return true;
  const std::uint64_t file_end = state_.file_end.load();
  if (extent.offset > file_end || extent.length > file_end - extent.offset) {
    why = fmt::format("{} lies beyond the end of the file", what);
    return false;
  }
  const std::uint64_t last = state_.cluster_of(extent.offset + extent.length - 1);
  for (std::uint64_t cluster = state_.cluster_of(extent.offset); cluster <= last; ++cluster) {
    if (state_.metadata_map.add(cluster)) continue;
    why = fmt::format("{} overlaps with other metadata in cluster {}", what, cluster);
    return false;
  }
  return true;
}

// The tables that another table names.
bool Qcow2Node::map_tables(const std::vector<std::uint64_t>& table, std::uint64_t reserved,
                           const char* what, std::string& why) {
  for (const std::uint64_t entry : table) {
    const std::uint64_t offset = entry & kOffsetMask;
    if (entry == 0) continue;
    if ((entry & reserved) != 0 || (offset & state_.geometry.cluster_mask()) != 0 ||
        (offset == 0 && entry != 0)) {
      why = fmt::format("the entry {:#x} for {} is not valid", entry, what);
      return false;
    }
    if (!map_extent({offset, state_.geometry.cluster_bytes()}, what, why)) return false;
  }
  return true;
}

bool Qcow2Node::map_metadata(std::string& why) {
  const Header& header = state_.header;
  const Geometry& geometry = state_.geometry;
  bool fits =
      map_extent({0, 1}, "the header", why) &&
      map_extent({header.l1_table_offset, std::uint64_t{header.l1_entries} * 8}, "the L1 table",
                 why) &&
      map_extent({header.refcount_table_offset,
                  std::uint64_t{header.refcount_table_clusters} << geometry.cluster_bits},
                 "the refcount table", why) &&
      map_extent(snapshot_table_, "the snapshot table", why) &&
      map_tables(state_.refcount_table, kRefcountTableReservedMask, "a refcount block", why) &&
      map_tables(state_.l1_table, kL1ReservedMask, "an L2 table", why);
  for (const Extent& extent : snapshot_l1_tables_)
    fits = fits && map_extent(extent, "a snapshot's L1 table", why);
  if (fits && header.bitmap_directory)
    fits = map_extent(*header.bitmap_directory, "the bitmap directory", why);
  return fits;
}

// Whole clusters, so that every cluster that has a refcount can be written in place.
int Qcow2Node::fill_last_cluster(std::string& why) {
  const std::uint64_t end = state_.geometry.clusters_of(state_.file_end.load())
                            << state_.geometry.cluster_bits;
  if (end <= state_.file_end.load()) return 0;
  const int error = parts_.file->grow(end);
  if (error == 0) {
    state_.file_end.store(end);
  } else {
    why = fmt::format("its last cluster is not whole and cannot be made so: {}",
                      describe_errno(error));
  }
  return error;
}

// "Header", autoclear_features: cleared by whoever writes without knowing them, or, for bitmaps,
// without keeping them.
Task<int> Qcow2Node::clear_autoclear_features(IoContext& context) {
  if ((state_.header.autoclear_features & ~kAutoclearRawDataFile) == 0) co_return 0;
  if ((state_.header.autoclear_features & kAutoclearBitmaps) != 0) {
    log::warning(
        "'{}' has persistent bitmaps, which are not kept up to date here: they are marked "
        "inconsistent, and the next incremental backup must be a full one",
        name_);
  }
  state_.header.autoclear_features &= kAutoclearRawDataFile;
  int error = co_await write_header(state_, context);
  if (error == 0) error = co_await write_back_.barrier(context);
  co_return error;
}

Task<int> Qcow2Node::close(IoContext& context) {
  BlockRequest token;
  token.context = &context;
  if (state_.is_corrupt.load()) co_return 0;
  if (compressed_stream_.cluster != 0) {
    const std::lock_guard lock(state_.mutex);
    state_.free_clusters(compressed_stream_.cluster, 1);
    flushes_.note_change();
  }
  int error = co_await write_back_.flush(context, token);
  // No request is left: whatever is in quarantine may leave it.
  while (error == 0) {
    FreedClusters clusters;
    {
      const std::lock_guard lock(state_.mutex);
      if (state_.quarantine.empty()) break;
      clusters = state_.quarantine.front().clusters;
      state_.quarantine.pop_front();
    }
    error = co_await allocator_.release(context, token, clusters);
  }
  if (error == 0) error = co_await allocator_.close(context, token);
  if (error == 0) error = co_await write_back_.flush(context, token);
  co_return error;
}

}  // namespace vblk::qcow2
