#include "blockdev/qcow2/refcount_rebuild.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <mutex>
#include <unordered_set>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/refcount_layout.h"
#include "blockdev/qcow2/table_io.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;

namespace {

// What is counted, and how long that takes, is bounded by the file, whatever the tables say: tables
// that belong to one owner are counted once and nowhere else (add_table()), and an L1 table names
// an L2 table once. Without that, a file of a mebibyte could name one table a hundred thousand
// times, from each of as many snapshots.
//
// 4 bytes each: 1 GiB. With clusters of 64 KiB an image of 16 TiB.
constexpr std::uint64_t kClustersMax = std::uint64_t{1} << 28;

class Counter {
 public:
  Counter(ImageState& state, IoContext& context, std::string& why)
      : state_(state), context_(context), why_(why) {}

  Task<int> count(std::span<const Extent> snapshot_l1_tables, Extent snapshot_table);
  [[nodiscard]] std::vector<std::uint32_t>& counts() { return counts_; }

 private:
  [[nodiscard]] bool add(std::uint64_t offset, std::uint64_t length, const char* what);
  // The same for what lies in clusters of its own.
  [[nodiscard]] bool add_table(std::uint64_t offset, std::uint64_t length, const char* what);
  Task<int> count_l1(const std::vector<std::uint64_t>& table);
  Task<int> count_l2(std::uint64_t offset);
  Task<int> count_bitmaps(Extent directory);
  Task<int> table(std::uint64_t offset, std::uint64_t entries, const char* what,
                  std::vector<std::uint64_t>& table);

  ImageState& state_;
  IoContext& context_;
  std::string& why_;
  std::vector<std::uint32_t> counts_;
};

// Counts every cluster that [offset, +length) touches once.
bool Counter::add(std::uint64_t offset, std::uint64_t length, const char* what) {
  if (length == 0) return true;
  const std::uint64_t first = state_.cluster_of(offset);
  const std::uint64_t last = state_.cluster_of(offset + length - 1);
  if (offset + length < offset || last >= counts_.size()) {
    why_ = fmt::format("{} at {} lies beyond the end of the file", what, offset);
    return false;
  }
  const std::uint64_t count_max = std::min<std::uint64_t>(
      state_.geometry.refcount_max(), std::numeric_limits<std::uint32_t>::max());
  for (std::uint64_t cluster = first; cluster <= last; ++cluster) {
    if (counts_[cluster] >= count_max) {
      why_ = fmt::format("cluster {} has more references than a refcount can hold", cluster);
      return false;
    }
    ++counts_[cluster];
  }
  return true;
}

bool Counter::add_table(std::uint64_t offset, std::uint64_t length, const char* what) {
  if (!add(offset, length, what)) return false;
  if (length == 0) return true;
  const std::uint64_t last = state_.cluster_of(offset + length - 1);
  for (std::uint64_t cluster = state_.cluster_of(offset); cluster <= last; ++cluster) {
    if (counts_[cluster] == 1) continue;
    why_ = fmt::format("{} at {} shares a cluster with something else", what, offset);
    return false;
  }
  return true;
}

Task<int> Counter::table(std::uint64_t offset, std::uint64_t entries, const char* what,
                         std::vector<std::uint64_t>& table) {
  const int error =
      co_await read_table(state_.file, context_, state_.file_end.load(), offset, entries, table);
  if (error != 0) why_ = fmt::format("{} at {} cannot be read", what, offset);
  co_return error;
}

Task<int> Counter::count_l2(std::uint64_t offset) {
  if (!add(offset, state_.geometry.cluster_bytes(), "an L2 table")) co_return EINVAL;
  std::vector<std::uint64_t> words;
  const int error =
      co_await table(offset, state_.geometry.cluster_bytes() / 8, "an L2 table", words);
  if (error != 0) co_return error;
  const unsigned step = state_.geometry.l2_entry_words();
  for (std::size_t i = 0; i < words.size(); i += step) {
    const std::uint64_t descriptor = words[i];
    if ((descriptor & kFlagCompressed) != 0) {
      const CompressedExtent extent = compressed_extent(state_.geometry, descriptor);
      // The last sector may reach beyond the end of the file.
      const std::uint64_t end = std::min(extent.offset + extent.length,
                                         std::max(extent.offset + 1, state_.file_end.load()));
      if (!add(extent.offset, end - extent.offset, "compressed data")) co_return EINVAL;
    } else if ((descriptor & kOffsetMask) != 0 && state_.data_file == nullptr) {
      if (!add(descriptor & kOffsetMask, state_.geometry.cluster_bytes(), "data")) co_return EINVAL;
    }
  }
  co_return 0;
}

Task<int> Counter::count_l1(const std::vector<std::uint64_t>& l1_table) {
  std::unordered_set<std::uint64_t> named;
  for (const std::uint64_t entry : l1_table) {
    const std::uint64_t offset = entry & kOffsetMask;
    if (offset == 0) continue;
    if (!named.insert(offset).second) {
      why_ = fmt::format("an L1 table names the L2 table at {} twice", offset);
      co_return EINVAL;
    }
    const int error = co_await count_l2(offset);
    if (error != 0) co_return error;
  }
  co_return 0;
}

// "Bitmap directory", "Bitmap table".
Task<int> Counter::count_bitmaps(Extent directory) {
  std::vector<std::byte> bytes;
  int error = co_await read_bitmap_directory(state_.file, context_, state_.file_end.load(),
                                             directory, bytes);
  if (error == EINVAL) why_ = "the bitmap directory lies beyond the end of the file";
  if (error != 0) co_return error;
  if (!add_table(directory.offset, directory.length, "the bitmap directory")) co_return EINVAL;
  BitmapEntry entry;
  for (std::size_t at = 0;
       error == 0 && decode_bitmap_entry(std::span(bytes).subspan(at), entry);) {
    std::vector<std::uint64_t> words;
    error = co_await table(entry.table_offset, entry.table_entries, "a bitmap table", words);
    if (error == 0 &&
        !add_table(entry.table_offset, std::uint64_t{entry.table_entries} * 8, "a bitmap table"))
      error = EINVAL;
    for (const std::uint64_t word : words) {
      if (error != 0 || (word & kOffsetMask) == 0) continue;
      if (!add(word & kOffsetMask, state_.geometry.cluster_bytes(), "a bitmap")) error = EINVAL;
    }
    at = std::min<std::size_t>(at + entry.length_bytes, bytes.size());
  }
  co_return error;
}

Task<int> Counter::count(std::span<const Extent> snapshot_l1_tables, Extent snapshot_table) {
  const Header& header = state_.header;
  const std::uint64_t clusters = state_.geometry.clusters_of(state_.file_end.load());
  if (clusters > kClustersMax) {
    why_ = "it has too many clusters to be repaired here; run 'qemu-img check -r all' on it";
    co_return EFBIG;
  }
  counts_.resize(clusters);
  bool fits =
      add_table(0, 1, "the header") &&
      add_table(header.l1_table_offset, std::uint64_t{header.l1_entries} * 8, "the L1 table") &&
      add_table(snapshot_table.offset, snapshot_table.length, "the snapshot table");
  for (const Extent& extent : snapshot_l1_tables)
    fits = fits && add_table(extent.offset, extent.length, "a snapshot's L1 table");
  if (fits && header.encryption_header)
    fits = add(header.encryption_header->offset, header.encryption_header->length,
               "the encryption header");
  if (!fits) co_return EINVAL;
  int error = co_await count_l1(state_.l1_table);
  for (const Extent& extent : snapshot_l1_tables) {
    std::vector<std::uint64_t> l1_table;
    if (error != 0) break;
    error = co_await table(extent.offset, extent.length / 8, "a snapshot's L1 table", l1_table);
    if (error == 0) error = co_await count_l1(l1_table);
  }
  if (error == 0 && header.bitmap_directory)
    error = co_await count_bitmaps(*header.bitmap_directory);
  co_return error;
}

}  // namespace

Task<int> rebuild_refcounts(ImageState& state, WriteBack& write_back, IoContext& context,
                            std::span<const Extent> snapshot_l1_tables, Extent snapshot_table,
                            std::string& why) {
  const Geometry& geometry = state.geometry;
  Counter counter(state, context, why);
  int error = co_await counter.count(snapshot_l1_tables, snapshot_table);
  if (error != 0) co_return error;
  std::vector<std::uint32_t>& counts = counter.counts();
  const RefcountLayout layout = plan_refcounts(geometry, counts.size());
  const std::uint64_t range = std::uint64_t{1} << geometry.refcount_block_bits();
  if (!layout.is_possible(geometry)) {
    why = "its refcounts would need too large a table";
    co_return EFBIG;
  }
  counts.resize(layout.end(), 1);
  error = state.file.grow(counts.size() << geometry.cluster_bits);
  if (error == 0) state.file_end.store(counts.size() << geometry.cluster_bits);
  AlignedBuffer table(layout.table_clusters << geometry.cluster_bits);
  std::ranges::fill(table.bytes(), std::byte{0});
  AlignedBuffer block(geometry.cluster_bytes());
  for (std::uint64_t i = 0; i < layout.blocks && error == 0; ++i) {
    const std::uint64_t offset = (layout.first_block() + i) << geometry.cluster_bits;
    store_be(table.data() + i * 8, offset);
    const auto counted = std::span(counts).subspan(
        i * range, std::min<std::uint64_t>(range, counts.size() - i * range));
    encode_refcounts(geometry, counted, block.bytes());
    error = co_await BlockIo(state.file, context, BlockOperation::kWrite, offset, block.bytes());
  }
  if (error == 0)
    error = co_await BlockIo(state.file, context, BlockOperation::kWrite,
                             layout.first << geometry.cluster_bits, table.bytes());
  if (error == 0) error = co_await write_back.barrier(context);
  if (error == 0) {
    {
      const std::lock_guard lock(state.mutex);
      state.header.refcount_table_offset = layout.first << geometry.cluster_bits;
      state.header.refcount_table_clusters = static_cast<std::uint32_t>(layout.table_clusters);
      state.header.incompatible_features &= ~kIncompatDirty;
    }
    error = co_await write_header(state, context);
    if (error == 0) error = co_await write_back.barrier(context);
  }
  if (error != 0) why = fmt::format("new refcounts cannot be written: {}", describe_errno(error));
  co_return error;
}

}  // namespace vblk::qcow2
