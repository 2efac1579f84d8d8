#include "blockdev/qcow2/snapshot_editor.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <limits>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/snapshots.h"
#include "blockdev/qcow2/table_reader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::Task;

namespace {

// L2 tables that are written anew in one go, in bytes.
constexpr std::uint64_t kTableBytesPerStep = std::uint64_t{8} << 20;

// An L2 table, and which entry of the L1 table names it.
struct NamedTable {
  std::uint64_t offset;
  std::size_t l1_index;
};

}  // namespace

Task<int> SnapshotEditor::load() {
  if (is_loaded_) co_return 0;
  int error = co_await survey();
  if (error != 0) co_return error;
  const Extent l1_table{header_.l1_table_offset, std::uint64_t{header_.l1_entries} * 8};
  error = co_await read_words(l1_table, l1_table_);
  if (error == 0) error = co_await load_snapshots();
  is_loaded_ = error == 0;
  co_return error;
}

Task<int> SnapshotEditor::count(const std::vector<std::uint64_t>& l1_table, int change,
                                bool with_tables) {
  std::vector<std::uint64_t> tables;
  bool fits = true;
  for (const std::uint64_t entry : l1_table) {
    if ((entry & kOffsetMask) == 0) continue;
    tables.push_back(entry & kOffsetMask);
    if (with_tables)
      fits = fits && count_clusters(tables.back(), geometry_.cluster_bytes(), change);
  }
  std::ranges::sort(tables);
  const auto offset_of = [&tables](std::size_t i) { return tables[i]; };
  const auto visit = [this, change, &fits](std::size_t, std::span<const std::byte> table) {
    const std::size_t step = std::size_t{geometry_.l2_entry_words()} * 8;
    for (std::size_t at = 0; at < table.size(); at += step) {
      const auto descriptor = load_be<std::uint64_t>(table.data() + at);
      if ((descriptor & kFlagCompressed) != 0) {
        const CompressedExtent extent = compressed_extent(geometry_, descriptor);
        fits = fits && count_clusters(extent.offset, extent.length, change);
      } else if ((descriptor & kOffsetMask) != 0) {
        fits = fits && count_clusters(descriptor & kOffsetMask, geometry_.cluster_bytes(), change);
      }
    }
  };
  const int error = co_await read_tables(file_, context_, geometry_.cluster_bytes(), tables.size(),
                                         offset_of, visit);
  if (error != 0 || fits) co_return error;
  why_ = fmt::format("its refcounts of {} bits have no room for another owner of a cluster",
                     1U << geometry_.refcount_order);
  co_return EFBIG;
}

Task<int> SnapshotEditor::renew_tables(std::vector<std::uint64_t>& l1_table, bool all) {
  const auto with_flag = [this](std::uint64_t entry) {
    if ((entry & kFlagCompressed) != 0 || (entry & kOffsetMask) == 0) return entry;
    const std::uint64_t cluster = (entry & kOffsetMask) >> geometry_.cluster_bits;
    const bool is_ours = cluster < references_.size() && references_[cluster] == 1;
    return is_ours ? entry | kFlagCopied : entry & ~kFlagCopied;
  };
  std::vector<NamedTable> tables;
  for (std::size_t i = 0; i < l1_table.size(); ++i) {
    if ((l1_table[i] & kOffsetMask) != 0) tables.push_back({l1_table[i] & kOffsetMask, i});
  }
  std::ranges::sort(tables, {}, &NamedTable::offset);
  const std::size_t step = std::max<std::uint64_t>(1, kTableBytesPerStep >> geometry_.cluster_bits);
  for (std::size_t first = 0; first < tables.size(); first += step) {
    const auto some = std::span(tables).subspan(first, std::min(step, tables.size() - first));
    std::vector<std::pair<NamedTable, AlignedBuffer>> renewed;
    const auto offset_of = [some](std::size_t i) { return some[i].offset; };
    const auto visit = [&](std::size_t i, std::span<const std::byte> table) {
      AlignedBuffer copy(table.size());
      std::ranges::copy(table, copy.data());
      bool changes = all;
      const std::size_t entry_bytes = std::size_t{geometry_.l2_entry_words()} * 8;
      for (std::size_t at = 0; at < table.size(); at += entry_bytes) {
        const auto entry = load_be<std::uint64_t>(table.data() + at);
        changes = changes || with_flag(entry) != entry;
        store_be(copy.data() + at, with_flag(entry));
      }
      if (changes) renewed.emplace_back(some[i], std::move(copy));
    };
    int error = co_await read_tables(file_, context_, geometry_.cluster_bytes(), some.size(),
                                     offset_of, visit);
    for (auto& [table, bytes] : renewed) {
      if (error != 0) break;
      const std::uint64_t offset = take_clusters(bytes.size());
      static_cast<void>(count_clusters(table.offset, bytes.size(), -1));
      l1_table[table.l1_index] = offset;
      error = co_await write(offset, bytes.bytes());
    }
    if (error != 0) co_return error;
  }
  for (std::uint64_t& entry : l1_table) entry = with_flag(entry);
  co_return 0;
}

Task<int> SnapshotEditor::renew_l1_table(const std::vector<std::uint64_t>& l1_table) {
  header_.l1_table_offset = l1_table.empty() ? 0 : take_clusters(l1_table.size() * 8);
  header_.l1_entries = static_cast<std::uint32_t>(l1_table.size());
  const int error = co_await write_words(header_.l1_table_offset, l1_table);
  co_return error;
}

Task<int> SnapshotEditor::finish() {
  int error = co_await write_snapshots();
  if (error == 0) error = co_await write_refcounts();
  if (error == 0) error = co_await switch_fields();
  if (error == 0) error = co_await discard_free();
  co_return error;
}

Task<int> SnapshotEditor::create(std::string_view name) {
  int error = co_await load();
  if (error != 0) co_return error;
  std::uint64_t id = 0;
  for (const KeptSnapshot& snapshot : snapshots_) {
    std::uint64_t number = 0;
    std::from_chars(snapshot.id.data(), snapshot.id.data() + snapshot.id.size(), number);
    id = std::max(id, number);
  }
  // The snapshot keeps the tables that there are.
  const Extent l1_extent{header_.l1_table_offset, l1_table_.size() * 8};
  error = co_await count(l1_table_, +1, false);
  if (error != 0) co_return error;
  // The tables that the copies are made of are the snapshot's now.
  for (const std::uint64_t entry : l1_table_) {
    if ((entry & kOffsetMask) != 0)
      static_cast<void>(count_clusters(entry & kOffsetMask, geometry_.cluster_bytes(), +1));
  }
  error = co_await renew_tables(l1_table_, true);
  if (error == 0) error = co_await renew_l1_table(l1_table_);
  if (error != 0) co_return error;
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now);
  const SnapshotEntry entry{
      .l1_table = l1_extent,
      .id = {},
      .name = name,
      .date_seconds = static_cast<std::uint32_t>(seconds.count()),
      .date_nanoseconds = static_cast<std::uint32_t>(
          std::chrono::duration_cast<std::chrono::nanoseconds>(now - seconds).count()),
      .disk_bytes = header_.size_bytes};
  const std::string new_id = std::to_string(id + 1);
  snapshots_.push_back({{entry, new_id, std::string(name)}, encode_snapshot(entry, new_id)});
  error = co_await finish();
  co_return error;
}

Task<int> SnapshotEditor::remove(std::string_view name) {
  int error = co_await load();
  if (error != 0) co_return error;
  const auto found = std::ranges::find(snapshots_, name, &KeptSnapshot::name);
  if (found == snapshots_.end()) {
    why_ = "it has no such snapshot";
    co_return ENOENT;
  }
  std::vector<std::uint64_t> l1_table;
  error = co_await read_words(found->entry.l1_table, l1_table);
  if (error == 0) error = co_await count(l1_table, -1, true);
  if (error != 0) co_return error;
  static_cast<void>(count_clusters(found->entry.l1_table.offset, found->entry.l1_table.length, -1));
  snapshots_.erase(found);
  const Extent old_l1_table{header_.l1_table_offset, l1_table_.size() * 8};
  const std::vector<std::uint64_t> as_it_was = l1_table_;
  error = co_await renew_tables(l1_table_, false);
  if (error == 0 && l1_table_ != as_it_was) {
    static_cast<void>(count_clusters(old_l1_table.offset, old_l1_table.length, -1));
    error = co_await renew_l1_table(l1_table_);
  }
  if (error == 0) error = co_await finish();
  co_return error;
}

Task<int> SnapshotEditor::apply(std::string_view id_or_name) {
  int error = co_await load();
  if (error != 0) co_return error;
  auto found = std::ranges::find(snapshots_, id_or_name, &KeptSnapshot::id);
  if (found == snapshots_.end())
    found = std::ranges::find(snapshots_, id_or_name, &KeptSnapshot::name);
  if (found == snapshots_.end()) {
    why_ = "it has no such snapshot";
    co_return ENOENT;
  }
  std::vector<std::uint64_t> l1_table;
  error = co_await read_words(found->entry.l1_table, l1_table);
  if (error != 0) co_return error;
  if (found->entry.disk_bytes > 0 &&
      geometry_.l1_index(found->entry.disk_bytes - 1) >= l1_table.size()) {
    why_ = "the L1 table of the snapshot is too small for its disk";
    co_return EINVAL;
  }
  // The disk lets go of what it has, and shares what the snapshot has.
  const std::uint64_t disk_bytes = found->entry.disk_bytes;
  error = co_await count(l1_table, +1, true);
  if (error == 0) error = co_await count(l1_table_, -1, true);
  if (error != 0) co_return error;
  static_cast<void>(
      count_clusters(header_.l1_table_offset, std::uint64_t{header_.l1_entries} * 8, -1));
  error = co_await renew_tables(l1_table, true);
  if (error == 0) error = co_await renew_l1_table(l1_table);
  header_.size_bytes = disk_bytes;
  if (error == 0) error = co_await finish();
  co_return error;
}

Task<int> SnapshotEditor::mend() {
  int error = co_await survey(true);
  if (error == 0) error = co_await load_snapshots(snapshot_table_end(header_));
  if (error != 0) co_return error;
  // What a count that is too high or a table beyond the end makes of zeroes.
  std::erase_if(snapshots_, [](const KeptSnapshot& snapshot) {
    return snapshot.id.empty() && snapshot.name.empty() && snapshot.entry.l1_table.length == 0;
  });
  for (KeptSnapshot& snapshot : snapshots_) snapshot.bytes = trim_snapshot(snapshot.bytes);
  if (header_.version >= 3) complete_snapshots();
  // Nothing is punched out of a file with errors.
  error = co_await write_snapshots();
  if (error == 0) error = co_await write_refcounts();
  if (error == 0) error = co_await switch_fields();
  co_return error;
}

Task<int> SnapshotEditor::empty() {
  int error = co_await load();
  if (error == 0) error = co_await count(l1_table_, -1, true);
  if (error != 0) co_return error;
  static_cast<void>(count_clusters(header_.l1_table_offset, l1_table_.size() * 8, -1));
  std::ranges::fill(l1_table_, 0);
  error = co_await renew_l1_table(l1_table_);
  if (error == 0) error = co_await finish();
  co_return error;
}

}  // namespace vblk::qcow2
