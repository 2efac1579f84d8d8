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
#include "blockdev/qcow2/refcount_layout.h"
#include "blockdev/qcow2/snapshots.h"
#include "blockdev/qcow2/table_reader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::Task;

namespace {

AlignedBuffer zeroes(std::uint64_t bytes) {
  AlignedBuffer buffer(bytes);
  std::ranges::fill(buffer.bytes(), std::byte{0});
  return buffer;
}

// L2 tables that are written anew in one go, in bytes.
constexpr std::uint64_t kTableBytesPerStep = std::uint64_t{8} << 20;

// An L2 table, and which entry of the L1 table names it.
struct NamedTable {
  std::uint64_t offset;
  std::size_t l1_index;
};

}  // namespace

int SnapshotEditor::too_large(const char* what) {
  why_ = fmt::format("{} would be too large", what);
  return EFBIG;
}

Task<int> SnapshotEditor::flush() {
  const int error = co_await BlockIo(file_, context_, BlockOperation::kFlush, 0, 0);
  co_return error;
}

Task<int> SnapshotEditor::read_words(Extent extent, std::vector<std::uint64_t>& words) {
  words.clear();
  if (extent.length == 0) co_return 0;
  AlignedBuffer bytes((extent.length + 511) / 512 * 512);
  const int error =
      co_await BlockIo(file_, context_, BlockOperation::kRead, extent.offset, bytes.bytes());
  if (error != 0) co_return error;
  words.resize(extent.length / 8);
  for (std::size_t i = 0; i < words.size(); ++i)
    words[i] = load_be<std::uint64_t>(bytes.data() + i * 8);
  co_return 0;
}

Task<int> SnapshotEditor::load() {
  CheckResult result;
  const TellFinding silent = [](const std::string&) {};
  int error = co_await survey_image(file_, context_, header_, silent, result, references_);
  if (error == 0 && (result.corruptions > 0 || result.check_errors > 0)) {
    why_ = "it has errors; see 'vblk img check' for them";
    error = EINVAL;
  }
  if (error != 0) co_return error;
  survey_clusters_ = references_.size();
  const Extent l1_table{header_.l1_table_offset, std::uint64_t{header_.l1_entries} * 8};
  error = co_await read_words(l1_table, l1_table_);
  if (error == 0) error = co_await load_entries();
  co_return error;
}

Task<int> SnapshotEditor::load_entries() {
  const VisitSnapshot visit = [this](const SnapshotEntry& entry) {
    entries_.push_back({.bytes = {},
                        .l1_table = entry.l1_table,
                        .disk_bytes = entry.disk_bytes,
                        .id = std::string(entry.id),
                        .name = std::string(entry.name)});
    const std::uint64_t length =
        SnapshotEntry::kFixedBytes + entry.extra_bytes + entry.id.size() + entry.name.size();
    entries_.back().bytes.resize((length + 7) / 8 * 8);
    return true;
  };
  SnapshotTable table;
  int error = co_await visit_snapshots(file_, context_, header_, file_.data_bytes(), visit, table);
  if (error != 0 || table.length_bytes == 0) co_return error;
  entries_bytes_ = table.length_bytes;
  // As they are, with what in them nobody here knows.
  AlignedBuffer bytes((entries_bytes_ + 511) / 512 * 512);
  error = co_await BlockIo(file_, context_, BlockOperation::kRead, header_.snapshots_offset,
                           bytes.bytes());
  const std::byte* from = bytes.data();
  for (Entry& entry : entries_) {
    std::copy_n(from, entry.bytes.size(), entry.bytes.begin());
    from += entry.bytes.size();
  }
  co_return error;
}

bool SnapshotEditor::count_clusters(std::uint64_t offset, std::uint64_t length, int change) {
  if (length == 0) return true;
  const std::uint64_t count_max = std::min<std::uint64_t>(
      geometry_.refcount_max(), std::numeric_limits<std::uint32_t>::max() - 1);
  const std::uint64_t last = (offset + length - 1) >> geometry_.cluster_bits;
  for (std::uint64_t cluster = offset >> geometry_.cluster_bits; cluster <= last; ++cluster) {
    // What is sound names nothing beyond the end, but for the rest of the last cluster.
    if (cluster >= references_.size()) continue;
    if (change > 0 && references_[cluster] >= count_max) return false;
    references_[cluster] += static_cast<std::uint32_t>(change);
  }
  return true;
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

// Behind everything that there is.
std::uint64_t SnapshotEditor::take_clusters(std::uint64_t length_bytes) {
  const std::uint64_t offset = references_.size() << geometry_.cluster_bits;
  references_.resize(references_.size() + geometry_.clusters_of(length_bytes), 1);
  return offset;
}

Task<int> SnapshotEditor::write_l1_table(std::uint64_t offset,
                                         const std::vector<std::uint64_t>& l1_table) {
  if (l1_table.empty()) co_return 0;
  AlignedBuffer bytes =
      zeroes(geometry_.clusters_of(l1_table.size() * 8) << geometry_.cluster_bits);
  for (std::size_t i = 0; i < l1_table.size(); ++i) store_be(bytes.data() + i * 8, l1_table[i]);
  int error = file_.grow(offset + bytes.size());
  if (error == 0)
    error = co_await BlockIo(file_, context_, BlockOperation::kWrite, offset, bytes.bytes());
  co_return error;
}

// A new snapshot table, for the next header.
Task<int> SnapshotEditor::write_entries() {
  std::uint64_t length = 0;
  for (const Entry& entry : entries_) length += entry.bytes.size();
  if (length > kSnapshotTableBytesMax || entries_.size() > kSnapshotsMax)
    co_return too_large("the snapshot table");
  header_.snapshot_count = static_cast<std::uint32_t>(entries_.size());
  if (entries_.empty()) {
    header_.snapshots_offset = 0;
    co_return 0;
  }
  header_.snapshots_offset = take_clusters(length);
  AlignedBuffer bytes = zeroes(geometry_.clusters_of(length) << geometry_.cluster_bits);
  std::byte* to = bytes.data();
  for (const Entry& entry : entries_) to = std::ranges::copy(entry.bytes, to).out;
  int error = file_.grow(header_.snapshots_offset + bytes.size());
  if (error == 0)
    error = co_await BlockIo(file_, context_, BlockOperation::kWrite, header_.snapshots_offset,
                             bytes.bytes());
  co_return error;
}

// A new refcount table and blocks that say what `references_` does, for the next header. They are
// not in `references_`: the ones after them will come behind, and leave theirs free.
Task<int> SnapshotEditor::write_refcounts() {
  const RefcountLayout layout = plan_refcounts(geometry_, references_.size());
  if (!layout.is_possible(geometry_)) co_return too_large("the refcount table");
  if (layout.end() << geometry_.cluster_bits > kHostOffsetMax) co_return too_large("the file");
  int error = file_.grow(layout.end() << geometry_.cluster_bits);
  AlignedBuffer table = zeroes(layout.table_clusters << geometry_.cluster_bits);
  AlignedBuffer block(geometry_.cluster_bytes());
  const std::uint64_t range = std::uint64_t{1} << geometry_.refcount_block_bits();
  std::vector<std::uint32_t> counts;
  for (std::uint64_t i = 0; i < layout.blocks && error == 0; ++i) {
    const std::uint64_t offset = (layout.first_block() + i) << geometry_.cluster_bits;
    store_be(table.data() + i * 8, offset);
    counts.clear();
    for (std::uint64_t cluster = i * range; cluster < std::min((i + 1) * range, layout.end());
         ++cluster)
      counts.push_back(cluster < references_.size() ? references_[cluster] : 1U);
    encode_refcounts(geometry_, counts, block.bytes());
    error = co_await BlockIo(file_, context_, BlockOperation::kWrite, offset, block.bytes());
  }
  if (error == 0)
    error = co_await BlockIo(file_, context_, BlockOperation::kWrite,
                             layout.first << geometry_.cluster_bits, table.bytes());
  header_.refcount_table_offset = layout.first << geometry_.cluster_bits;
  header_.refcount_table_clusters = static_cast<std::uint32_t>(layout.table_clusters);
  references_.resize(layout.end(), 0);
  co_return error;
}

Task<int> SnapshotEditor::switch_header() {
  int error = co_await flush();
  AlignedBuffer sector(kHeaderSectorBytes);
  if (error == 0)
    error = co_await BlockIo(file_, context_, BlockOperation::kRead, 0, sector.bytes());
  if (error != 0) co_return error;
  encode_header_fields(header_, sector.bytes().first<kHeaderSectorBytes>());
  error = co_await BlockIo(file_, context_, BlockOperation::kWrite, 0, sector.bytes());
  if (error == 0) error = co_await flush();
  co_return error;
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
      error = file_.grow(offset + bytes.size());
      if (error == 0)
        error = co_await BlockIo(file_, context_, BlockOperation::kWrite, offset, bytes.bytes());
    }
    if (error != 0) co_return error;
  }
  for (std::uint64_t& entry : l1_table) entry = with_flag(entry);
  co_return 0;
}

Task<int> SnapshotEditor::renew_l1_table(const std::vector<std::uint64_t>& l1_table) {
  header_.l1_table_offset = l1_table.empty() ? 0 : take_clusters(l1_table.size() * 8);
  header_.l1_entries = static_cast<std::uint32_t>(l1_table.size());
  const int error = co_await write_l1_table(header_.l1_table_offset, l1_table);
  co_return error;
}

Task<int> SnapshotEditor::finish() {
  static_cast<void>(count_clusters(header_.snapshots_offset, entries_bytes_, -1));
  int error = co_await write_entries();
  if (error == 0) error = co_await write_refcounts();
  if (error == 0) error = co_await switch_header();
  if (error == 0) error = co_await discard_free();
  co_return error;
}

// Gives back what nobody names any more. The image does not need it to be done.
Task<int> SnapshotEditor::discard_free() {
  if (!file_.limits().can_discard || file_.is_block_device()) co_return 0;
  const std::uint64_t table = header_.refcount_table_offset >> geometry_.cluster_bits;
  const std::uint64_t end = std::min<std::uint64_t>(table, references_.size());
  for (std::uint64_t cluster = 0; cluster < end;) {
    std::uint64_t after = cluster;
    while (after < end && references_[after] == 0) ++after;
    if (after > cluster) {
      const int error = co_await BlockIo(file_, context_, BlockOperation::kDiscard,
                                         cluster << geometry_.cluster_bits,
                                         (after - cluster) << geometry_.cluster_bits);
      if (error != 0) co_return error;
    }
    cluster = after + 1;
  }
  co_return 0;
}

Task<int> SnapshotEditor::create(std::string_view name) {
  int error = co_await load();
  if (error != 0) co_return error;
  std::uint64_t id = 0;
  for (const Entry& entry : entries_) {
    std::uint64_t number = 0;
    std::from_chars(entry.id.data(), entry.id.data() + entry.id.size(), number);
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
  entries_.push_back({.bytes = encode_snapshot(entry, std::to_string(id + 1)),
                      .l1_table = entry.l1_table,
                      .disk_bytes = entry.disk_bytes,
                      .id = std::to_string(id + 1),
                      .name = std::string(name)});
  error = co_await finish();
  co_return error;
}

Task<int> SnapshotEditor::remove(std::string_view name) {
  int error = co_await load();
  if (error != 0) co_return error;
  const auto found = std::ranges::find(entries_, name, &Entry::name);
  if (found == entries_.end()) {
    why_ = "it has no such snapshot";
    co_return ENOENT;
  }
  std::vector<std::uint64_t> l1_table;
  error = co_await read_words(found->l1_table, l1_table);
  if (error == 0) error = co_await count(l1_table, -1, true);
  if (error != 0) co_return error;
  static_cast<void>(count_clusters(found->l1_table.offset, found->l1_table.length, -1));
  entries_.erase(found);
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
  auto found = std::ranges::find(entries_, id_or_name, &Entry::id);
  if (found == entries_.end()) found = std::ranges::find(entries_, id_or_name, &Entry::name);
  if (found == entries_.end()) {
    why_ = "it has no such snapshot";
    co_return ENOENT;
  }
  std::vector<std::uint64_t> l1_table;
  error = co_await read_words(found->l1_table, l1_table);
  if (error != 0) co_return error;
  if (found->disk_bytes > 0 && geometry_.l1_index(found->disk_bytes - 1) >= l1_table.size()) {
    why_ = "the L1 table of the snapshot is too small for its disk";
    co_return EINVAL;
  }
  // The disk lets go of what it has, and shares what the snapshot has.
  const std::uint64_t disk_bytes = found->disk_bytes;
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
