#include "blockdev/qcow2/image_amender.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/table_reader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::Task;

namespace {

// Of version 2.
constexpr unsigned kRefcountOrderV2 = 4;
// L2 tables that are looked through in one go, in bytes.
constexpr std::uint64_t kTableBytesPerStep = std::uint64_t{8} << 20;

}  // namespace

int ImageAmender::refuse(std::string why) {
  why_ = std::move(why);
  return EINVAL;
}

bool ImageAmender::changes_tables(const Amendment& amendment) const {
  const std::uint32_t version = amendment.version.value_or(header_.version);
  return version < header_.version ||
         amendment.refcount_order.value_or(geometry_.refcount_order) != geometry_.refcount_order ||
         (version > header_.version && !snapshots_.empty());
}

int ImageAmender::check_properties(const Amendment& amendment, std::uint64_t disk_bytes) {
  const std::uint32_t version = amendment.version.value_or(header_.version);
  const unsigned order = amendment.refcount_order.value_or(geometry_.refcount_order);
  if (version < 3 && order != kRefcountOrderV2)
    return refuse("refcounts of other than 16 bits need compat=1.1");
  const bool is_lazy = (header_.compatible_features & kCompatLazyRefcounts) != 0;
  if (version < 3 && amendment.lazy_refcounts.value_or(false) && !is_lazy)
    return refuse("lazy_refcounts needs compat=1.1");
  if (amendment.data_file && !header_.has_data_file())
    return refuse("data_file is for images that have their data in a data file");
  return version < header_.version ? check_downgrade(disk_bytes) : 0;
}

int ImageAmender::check_downgrade(std::uint64_t disk_bytes) {
  if (header_.has_data_file()) return refuse("compat=0.10 has no data files");
  if (geometry_.extended_l2) return refuse("compat=0.10 has no extended L2 entries");
  if (header_.compression != Compression::kZlib)
    return refuse("compat=0.10 has no compression but zlib");
  if (header_.incompatible_features != 0)
    return refuse("it has a feature that compat=0.10 does not have");
  for (const KeptSnapshot& snapshot : snapshots_) {
    if (snapshot.entry.disk_bytes != disk_bytes ||
        snapshot.entry.vm_state_bytes > std::numeric_limits<std::uint32_t>::max()) {
      return refuse(fmt::format(
          "snapshot '{}' has another size than the disk, or too large a machine state, for "
          "compat=0.10",
          snapshot.name));
    }
  }
  return 0;
}

int ImageAmender::check_refcounts() {
  const std::uint64_t count_max = header_.geometry.refcount_max();
  const auto found = std::ranges::find_if(
      references_, [count_max](std::uint32_t count) { return count > count_max; });
  if (found == references_.end()) return 0;
  return refuse(fmt::format("a cluster has {} owners, too many for refcounts of {} bits", *found,
                            1U << header_.geometry.refcount_order));
}

Task<int> ImageAmender::drop_bitmaps() {
  if (!header_.bitmap_directory) co_return 0;
  const Extent directory = *header_.bitmap_directory;
  std::vector<std::byte> bytes;
  int error = co_await read_bitmap_directory(file_, context_, file_.data_bytes(), directory, bytes);
  for (std::size_t at = 0; error == 0 && at < bytes.size();) {
    BitmapEntry entry;
    if (!decode_bitmap_entry(std::span(bytes).subspan(at), entry)) co_return EINVAL;
    at += entry.length_bytes;
    error = co_await release_bitmap(entry);
  }
  static_cast<void>(count_clusters(directory.offset, directory.length, -1));
  header_.bitmap_directory.reset();
  co_return error;
}

Task<int> ImageAmender::load_l1_tables(std::vector<L1Table>& tables) {
  tables.push_back(
      {.extent = {header_.l1_table_offset, std::uint64_t{header_.l1_entries} * 8}, .entries = {}});
  for (const KeptSnapshot& snapshot : snapshots_)
    tables.push_back({.extent = snapshot.entry.l1_table, .entries = {}});
  for (L1Table& table : tables) {
    const int error = co_await read_words(table.extent, table.entries);
    if (error != 0) co_return error;
  }
  co_return 0;
}

bool ImageAmender::drop_zero_flags_of(std::span<std::byte> table, std::uint32_t owners) {
  bool any = false;
  for (std::size_t at = 0; at < table.size(); at += 8) {
    const auto entry = load_be<std::uint64_t>(table.data() + at);
    if ((entry & kFlagCompressed) != 0 || (entry & kFlagZero) == 0) continue;
    any = true;
    // Its space may be somebody else's data: it is not written.
    const std::uint64_t space = entry & kOffsetMask;
    if (space != 0)
      static_cast<void>(
          count_clusters(space, geometry_.cluster_bytes(), -static_cast<int>(owners)));
    if (header_.backing_file.empty()) {
      store_be(table.data() + at, std::uint64_t{0});
      continue;
    }
    const std::uint64_t zeroes = take_clusters(geometry_.cluster_bytes());
    references_[zeroes >> geometry_.cluster_bits] = owners;
    zero_clusters_.push_back(zeroes);
    store_be(table.data() + at, owners == 1 ? zeroes | kFlagCopied : zeroes);
  }
  return any;
}

// Of each table once, however many name it.
Task<int> ImageAmender::drop_zero_flags(const std::vector<std::uint64_t>& tables) {
  const std::size_t step = std::max<std::uint64_t>(1, kTableBytesPerStep >> geometry_.cluster_bits);
  for (std::size_t first = 0; first < tables.size(); first += step) {
    const auto some = std::span(tables).subspan(first, std::min(step, tables.size() - first));
    std::vector<std::pair<std::uint64_t, AlignedBuffer>> changed;
    const auto offset_of = [some](std::size_t i) { return some[i]; };
    const auto visit = [&](std::size_t i, std::span<const std::byte> table) {
      AlignedBuffer copy(table.size());
      std::ranges::copy(table, copy.data());
      const std::uint32_t owners = references_[some[i] >> geometry_.cluster_bits];
      if (drop_zero_flags_of(copy.bytes(), owners)) changed.emplace_back(some[i], std::move(copy));
    };
    int error = co_await read_tables(file_, context_, geometry_.cluster_bytes(), some.size(),
                                     offset_of, visit);
    for (auto& [offset, bytes] : changed) {
      if (error != 0) break;
      const std::uint64_t place = take_clusters(bytes.size());
      std::swap(references_[place >> geometry_.cluster_bits],
                references_[offset >> geometry_.cluster_bits]);
      references_[offset >> geometry_.cluster_bits] = 0;
      renewed_[offset] = place;
      error = co_await write(place, bytes.bytes());
    }
    if (error == 0) error = co_await write_zero_clusters();
    if (error != 0) co_return error;
  }
  co_return 0;
}

Task<int> ImageAmender::write_zero_clusters() {
  const std::uint64_t cluster_bytes = geometry_.cluster_bytes();
  std::ranges::sort(zero_clusters_);
  for (std::size_t i = 0; i < zero_clusters_.size();) {
    const std::uint64_t begin = zero_clusters_[i];
    std::uint64_t end = begin;
    while (i < zero_clusters_.size() && zero_clusters_[i] == end) {
      end += cluster_bytes;
      ++i;
    }
    int error = file_.grow(end);
    BlockIo zeroes(file_, context_, BlockOperation::kWriteZeroes, begin, end - begin);
    zeroes.may_unmap = true;
    if (error == 0) error = co_await zeroes;
    if (error != 0) co_return error;
  }
  zero_clusters_.clear();
  co_return 0;
}

// Those that name tables which have moved; the first is the disk's, the others are the snapshots'.
Task<int> ImageAmender::write_l1_tables(std::vector<L1Table>& tables) {
  bool snapshots_change = false;
  for (std::size_t i = 0; i < tables.size(); ++i) {
    L1Table& table = tables[i];
    for (std::uint64_t& entry : table.entries) {
      const auto moved = renewed_.find(entry & kOffsetMask);
      if (moved == renewed_.end()) continue;
      entry = (entry & ~kOffsetMask) | moved->second;
      table.has_changed = true;
    }
    if (!table.has_changed) continue;
    static_cast<void>(count_clusters(table.extent.offset, table.extent.length, -1));
    const std::uint64_t place = take_clusters(table.extent.length);
    const int error = co_await write_words(place, table.entries);
    if (error != 0) co_return error;
    if (i == 0) {
      header_.l1_table_offset = place;
    } else {
      KeptSnapshot& snapshot = snapshots_[i - 1];
      snapshot.entry.l1_table.offset = place;
      // "Snapshot table entry": the offset is what it begins with.
      store_be(snapshot.bytes.data(), place);
      snapshots_change = true;
    }
  }
  if (!snapshots_change) co_return 0;
  const int error = co_await write_snapshots();
  co_return error;
}

Task<int> ImageAmender::downgrade() {
  int error = co_await drop_bitmaps();
  std::vector<L1Table> l1_tables;
  if (error == 0) error = co_await load_l1_tables(l1_tables);
  if (error != 0) co_return error;
  std::vector<std::uint64_t> tables;
  for (const L1Table& l1_table : l1_tables) {
    for (const std::uint64_t entry : l1_table.entries) {
      if ((entry & kOffsetMask) != 0) tables.push_back(entry & kOffsetMask);
    }
  }
  std::ranges::sort(tables);
  const auto repeated = std::ranges::unique(tables);
  tables.erase(repeated.begin(), repeated.end());
  error = co_await drop_zero_flags(tables);
  if (error == 0) error = co_await write_l1_tables(l1_tables);
  co_return error;
}

Task<int> ImageAmender::prepare(const Amendment& amendment, std::uint64_t disk_bytes) {
  int error = co_await load_snapshots();
  if (error == 0) error = check_properties(amendment, disk_bytes);
  if (error != 0 || !changes_tables(amendment)) co_return error;
  error = co_await survey();
  if (error != 0) co_return error;
  header_.geometry.refcount_order = amendment.refcount_order.value_or(geometry_.refcount_order);
  co_return check_refcounts();
}

Task<int> ImageAmender::check(const Amendment& amendment, std::uint64_t disk_bytes) {
  const int error = co_await prepare(amendment, disk_bytes);
  co_return error;
}

Task<int> ImageAmender::amend(const Amendment& amendment) {
  const std::uint32_t version = amendment.version.value_or(header_.version);
  const bool is_downgrade = version < header_.version;
  const bool is_upgrade = version > header_.version;
  int error = co_await prepare(amendment, header_.size_bytes);
  if (error != 0) co_return error;
  const bool rewrites = changes_tables(amendment);
  if (is_upgrade && !snapshots_.empty()) {
    complete_snapshots();
    error = co_await write_snapshots();
  }
  if (is_downgrade && error == 0) error = co_await downgrade();
  if (rewrites && error == 0) error = co_await write_refcounts();
  if (error != 0) co_return error;
  header_.version = version;
  if (amendment.lazy_refcounts) {
    header_.compatible_features &= ~kCompatLazyRefcounts;
    if (*amendment.lazy_refcounts) header_.compatible_features |= kCompatLazyRefcounts;
  }
  if (amendment.data_file) header_.data_file = *amendment.data_file;
  if (amendment.data_file_is_raw_no_more) header_.autoclear_features &= ~kAutoclearRawDataFile;
  if (version < 3) {
    header_.compatible_features = 0;
    header_.autoclear_features = 0;
  }
  error = co_await switch_header();
  if (error == 0 && rewrites) error = co_await discard_free();
  co_return error;
}

}  // namespace vblk::qcow2
