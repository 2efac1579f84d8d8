#include "blockdev/qcow2/check.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/refcount_layout.h"
#include "blockdev/qcow2/snapshot_editor.h"
#include "blockdev/qcow2/snapshots.h"
#include "blockdev/qcow2/table_reader.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::IoContext;
using blockdev::Task;

namespace {

// Beyond it nothing can be read. The last GiB before 2^63 is where qemu-img, too, ends.
constexpr std::uint64_t kReadableEnd = (std::uint64_t{1} << 63) - (std::uint64_t{1} << 30);

constexpr std::uint32_t kUnknown = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint32_t kCountMax = kUnknown - 1;

// A table, and how often it is named: by the disk as it is now, and altogether.
struct Named {
  std::uint64_t offset;
  std::uint32_t active;
  std::uint32_t total;
};

class Checker {
 public:
  Checker(blockdev::RawNode& file, IoContext& context, const Header& header,
          const TellFinding& tell, CheckResult& result)
      : file_(file),
        context_(context),
        header_(header),
        geometry_(header.geometry),
        tell_(tell),
        result_(result) {}

  Task<int> run();
  // After run(), which has kept the references for it, and with kAll leaves out what repair() will
  // take away.
  Task<int> repair(Repair repair, Header& header, RepairResult& result);
  void keep_references() { keeps_references_ = true; }
  void prepare_repair(Repair repair) {
    keeps_references_ = true;
    is_repair_ = true;
    repairs_entries_ = repair == Repair::kAll;
  }
  // Without those of the refcount table to itself and its blocks.
  [[nodiscard]] std::vector<std::uint32_t> take_references() {
    references_of_content_.resize(geometry_.clusters_of(file_.data_bytes()));
    return std::move(references_of_content_);
  }

 private:
  struct Sector {
    std::uint64_t offset;
    AlignedBuffer bytes;
  };
  // As the references say; `lower_only`: not higher than it is.
  Task<int> set_refcounts(bool lower_only, RepairResult& result);
  Task<int> rewrite_refcounts(Header& header, RepairResult& result);
  Task<int> set_copied_flags(RepairResult& result);
  void set_flags_of_l1(std::span<const std::byte> table, std::uint64_t offset,
                       std::vector<Sector>& sectors, RepairResult& result);
  void set_flags_of_l2(std::span<const std::byte> table, std::uint64_t offset,
                       std::vector<Sector>& sectors, RepairResult& result);
  static void change_word(std::span<const std::byte> table, std::uint64_t offset, std::size_t at,
                          std::uint64_t word, std::vector<Sector>& sectors);
  Task<int> write_sectors(std::vector<Sector>& sectors);
  void set_flag(std::span<const std::byte> table, std::uint64_t offset, std::size_t at,
                std::vector<Sector>& sectors, RepairResult& result) const;
  Task<int> flush();

  // What could not be judged makes all that was counted worthless.
  void give_up(std::string why) {
    result_.failure = std::move(why);
    ++result_.check_errors;
  }
  void corrupt(const std::string& what, std::uint64_t times = 1) {
    tell_("ERROR " + what);
    result_.corruptions += times;
  }
  void add(std::uint64_t offset, std::uint64_t length, std::uint32_t times, const char* what);
  Task<int> read_words(std::uint64_t offset, std::uint64_t entries,
                       std::vector<std::uint64_t>& words);
  Task<int> load_refcounts();
  void load_block(std::uint64_t block, std::span<const std::byte> bytes);
  Task<int> name_tables(Extent l1_table, bool is_active);
  Task<int> check_snapshots();
  Task<int> check_tables();
  void check_l2_table(const Named& table, std::span<const std::byte> bytes);
  void check_compressed(const Named& table, std::size_t index, const L2Entry& entry);
  void check_standard(const Named& table, std::size_t index, const L2Entry& entry,
                      std::uint64_t& expected_offset);
  void check_copied(bool is_copied, std::uint64_t offset, const std::string& what,
                    std::uint32_t times);
  Task<int> check_bitmaps();
  Task<int> check_bitmap_table(const BitmapEntry& bitmap, std::string& why);
  void check_refcount_table();
  void compare();
  [[nodiscard]] std::uint64_t cluster_of(std::uint64_t offset) const {
    return offset >> geometry_.cluster_bits;
  }
  // Space that cannot be, of a cluster that does not need it: nothing is lost with it.
  [[nodiscard]] bool is_misplaced_reserve(const L2Entry& entry) const {
    if ((entry.descriptor & kFlagCompressed) != 0 ||
        (host_offset(entry) & geometry_.cluster_mask()) == 0)
      return false;
    return geometry_.extended_l2 ? (entry.bitmap & (~std::uint64_t{0} >> kSubclusters)) == 0
                                 : (entry.descriptor & kFlagZero) != 0;
  }
  // Whether a repair would change what it goes by.
  [[nodiscard]] bool overlaps_what_changes();
  // Whether the snapshot table may be written anew by whoever looks at the image.
  [[nodiscard]] bool mends_snapshots() const {
    return is_repair_ ? repairs_entries_ : keeps_references_;
  }
  // Of a table of words: what is not zeroes beyond the end of the file.
  [[nodiscard]] std::uint64_t readable_bytes(const Extent& table) const {
    const std::uint64_t file_end = file_.data_bytes();
    if (table.offset >= file_end) return 0;
    return std::min(table.length, (file_end - table.offset + 7) / 8 * 8);
  }
  // What the refcount blocks say.
  [[nodiscard]] std::uint32_t refcount_at(std::uint64_t offset) const {
    const std::uint64_t cluster = cluster_of(offset);
    return cluster < refcounts_.size() ? refcounts_[cluster] : 0;
  }

  blockdev::RawNode& file_;
  IoContext& context_;
  const Header& header_;
  const Geometry geometry_;
  const TellFinding& tell_;
  CheckResult& result_;
  std::vector<std::uint64_t> refcount_table_;
  std::vector<std::uint32_t> refcounts_;   // by cluster, as the image says, or kUnknown
  std::vector<std::uint32_t> references_;  // by cluster, as counted
  std::vector<Named> tables_;
  bool keeps_references_{false};
  std::vector<std::uint32_t> references_of_content_;  // references_ without the refcounts' own
  std::uint64_t unreadable_refcounts_{0};             // of check_errors
  bool needs_rewrite_{false};                         // of all refcount structures
  bool is_repair_{false};
  bool repairs_entries_{false};
  // What is read by what it says itself and not by what the disk's tables say: the snapshot table,
  // its L1 tables, the bitmap directory, bitmap tables.
  std::vector<Extent> told_by_themselves_;
  std::vector<Sector> entry_repairs_;
  std::uint64_t entries_repaired_{0};
};

// Counts [offset, +length) as referenced. The last cluster of a file may be cut short, no more.
void Checker::add(std::uint64_t offset, std::uint64_t length, std::uint32_t times,
                  const char* what) {
  if (length == 0) return;
  const std::uint64_t file_end = file_.data_bytes();
  if (offset + length < offset ||
      (offset + length > file_end && offset + length - file_end >= geometry_.cluster_bytes())) {
    return corrupt(fmt::format("{} at offset {:#x} lies beyond the end of the file, size {:#x}",
                               what, offset, length),
                   times);
  }
  const std::uint32_t count_max =
      static_cast<std::uint32_t>(std::min<std::uint64_t>(geometry_.refcount_max(), kCountMax));
  const std::uint64_t last = cluster_of(offset + length - 1);
  for (std::uint64_t cluster = cluster_of(offset); cluster <= last; ++cluster) {
    std::uint32_t& count = references_[cluster];
    const std::uint32_t room = count_max - count;
    count += std::min(room, times);
    if (times > room) {
      corrupt(fmt::format("cluster {} has more references than its refcount can hold", cluster),
              times - room);
    }
  }
}

// Beyond the end of the file there are zeroes.
Task<int> Checker::read_words(std::uint64_t offset, std::uint64_t entries,
                              std::vector<std::uint64_t>& words) {
  words.clear();
  if (entries == 0) co_return 0;
  AlignedBuffer bytes((entries * 8 + 511) / 512 * 512);
  const int error = co_await BlockIo(file_, context_, BlockOperation::kRead, offset, bytes.bytes());
  if (error != 0) co_return error;
  words.resize(entries);
  for (std::size_t i = 0; i < words.size(); ++i)
    words[i] = load_be<std::uint64_t>(bytes.data() + i * 8);
  co_return 0;
}

void Checker::load_block(std::uint64_t block, std::span<const std::byte> bytes) {
  const std::uint64_t first = block << geometry_.refcount_block_bits();
  const std::uint64_t count =
      std::min(std::uint64_t{1} << geometry_.refcount_block_bits(), refcounts_.size() - first);
  if (geometry_.refcount_order == 4) {
    for (std::uint64_t i = 0; i < count; ++i)
      refcounts_[first + i] = load_be<std::uint16_t>(bytes.data() + i * 2);
    return;
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    const RefcountPlace place = refcount_place(geometry_.refcount_order, i);
    const auto word = load_be<std::uint64_t>(bytes.data() + place.word * 8);
    refcounts_[first + i] = static_cast<std::uint32_t>(
        std::min<std::uint64_t>(word >> place.shift & place.mask, kCountMax));
  }
}

// Blocks that have a place; check_refcount_table() judges the others.
Task<int> Checker::load_refcounts() {
  const std::uint64_t entries =
      (std::uint64_t{header_.refcount_table_clusters} << geometry_.cluster_bits) / 8;
  int error = co_await read_words(header_.refcount_table_offset, entries, refcount_table_);
  if (error != 0) co_return error;
  struct Block {
    std::uint64_t offset;
    std::uint64_t index;
  };
  std::vector<Block> blocks;
  for (std::uint64_t i = 0; i < refcount_table_.size(); ++i) {
    const std::uint64_t first = i << geometry_.refcount_block_bits();
    // All of the bits from 9 on, unlike other tables'.
    const std::uint64_t offset = refcount_table_[i] & ~kRefcountTableReservedMask;
    if (first >= refcounts_.size()) break;
    if ((offset & geometry_.cluster_mask()) != 0 || offset > kReadableEnd) {
      const std::uint64_t count = std::min(std::uint64_t{1} << geometry_.refcount_block_bits(),
                                           geometry_.clusters_of(file_.data_bytes()) - first);
      tell_(fmt::format("refcounts of {} clusters from {} on cannot be read", count, first));
      result_.check_errors += count;
      unreadable_refcounts_ += count;
      needs_rewrite_ = true;
      std::fill_n(refcounts_.begin() + static_cast<std::ptrdiff_t>(first), count, kUnknown);
    } else if (offset != 0 && offset < file_.data_bytes()) {
      blocks.push_back({offset, i});
    }
  }
  std::ranges::sort(blocks, {}, &Block::offset);
  const auto offset_of = [&blocks](std::size_t i) { return blocks[i].offset; };
  const auto visit = [this, &blocks](std::size_t i, std::span<const std::byte> bytes) {
    load_block(blocks[i].index, bytes);
  };
  error = co_await read_tables(file_, context_, geometry_.cluster_bytes(), blocks.size(), offset_of,
                               visit);
  co_return error;
}

// Notes the L2 tables that an L1 table names.
Task<int> Checker::name_tables(Extent l1_table, bool is_active) {
  add(l1_table.offset, l1_table.length, 1, "L1 table");
  std::vector<std::uint64_t> entries;
  const int error = co_await read_words(l1_table.offset, readable_bytes(l1_table) / 8, entries);
  if (error != 0) co_return error;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const std::uint64_t entry = entries[i];
    if (entry == 0) continue;
    if ((entry & kL1ReservedMask) != 0)
      corrupt(fmt::format("L1 entry {} has reserved bits set: {:#x}", i, entry));
    const std::uint64_t offset = entry & kOffsetMask;
    // The header is no table; what it would say as one changes with every repair.
    if (offset == 0 && is_repair_) continue;
    add(offset, geometry_.cluster_bytes(), 1, "L2 table");
    if ((offset & geometry_.cluster_mask()) != 0)
      corrupt(fmt::format("L2 table at {:#x} does not begin with a cluster", offset));
    tables_.push_back({offset, is_active ? 1U : 0U, 1U});
    if (is_active && offset != 0)
      check_copied((entry & kFlagCopied) != 0, offset, fmt::format("L1 entry {}", i), 1);
  }
  co_return 0;
}

void Checker::check_copied(bool is_copied, std::uint64_t offset, const std::string& what,
                           std::uint32_t times) {
  const std::uint32_t refcount = refcount_at(offset);
  if ((refcount == 1) == is_copied || refcount == kUnknown) return;
  corrupt(fmt::format("OFLAG_COPIED of {}: set={} offset={:#x} refcount={}", what, is_copied,
                      offset, refcount),
          times);
}

Task<int> Checker::check_snapshots() {
  std::vector<Extent> l1_tables;
  std::uint32_t index = 0;
  bool has_too_much = false;
  bool is_readable = true;
  const auto corrupt_entry = [this, &index](const char* what) {
    corrupt(fmt::format("snapshot table entry {} {}", index, what));
    ++result_.snapshot_corruptions;
  };
  const VisitSnapshot visit = [&](const SnapshotEntry& entry) {
    const Extent l1_table = entry.l1_table;
    if (header_.version >= 3 && entry.extra_bytes < kSnapshotExtraBytesV3)
      corrupt_entry("is incomplete");
    if (entry.extra_bytes > kSnapshotExtraBytesMax) {
      corrupt_entry("has too much extra data");
      has_too_much = true;
    }
    if ((l1_table.offset & geometry_.cluster_mask()) != 0) {
      corrupt(fmt::format("snapshot {}: its L1 table at {:#x} does not begin with a cluster", index,
                          l1_table.offset));
    } else if (l1_table.length > kL1BytesMax) {
      corrupt(fmt::format("snapshot {}: its L1 table is too large", index));
    } else {
      l1_tables.push_back(l1_table);
      is_readable = is_readable && (l1_table.length == 0 || l1_table.offset <= kReadableEnd);
    }
    ++index;
    return true;
  };
  SnapshotTable table;
  int error =
      co_await visit_snapshots(file_, context_, header_, snapshot_table_end(header_), visit, table);
  if (!table.why.empty()) {
    give_up(table.why);
    co_return 0;
  }
  if (error != 0) co_return error;
  if (has_too_much && !mends_snapshots()) {
    give_up("a snapshot has too much extra data, which -r all takes away");
    co_return 0;
  }
  if (!is_readable) {
    give_up("the L1 table of a snapshot is where nothing can be read");
    co_return 0;
  }
  const std::uint64_t corruptions = result_.corruptions;
  told_by_themselves_ = l1_tables;
  told_by_themselves_.push_back({header_.snapshots_offset, table.length_bytes});
  add(header_.snapshots_offset, table.length_bytes, 1, "snapshot table");
  result_.snapshot_corruptions += result_.corruptions - corruptions;
  // Each has clusters of its own. More than there are, and following them could take for ever.
  std::uint64_t all_bytes = 0;
  for (const Extent& l1_table : l1_tables) all_bytes += readable_bytes(l1_table);
  if (all_bytes > file_.data_bytes()) {
    corrupt("the L1 tables of the snapshots are larger than the file");
    ++result_.check_errors;
    co_return 0;
  }
  for (const Extent& l1_table : l1_tables) {
    error = co_await name_tables(l1_table, false);
    if (error != 0) co_return error;
  }
  co_return 0;
}

void Checker::check_compressed(const Named& table, std::size_t index, const L2Entry& entry) {
  const auto where = [&] {
    return fmt::format("L2 table at {:#x}, entry {}", table.offset, index);
  };
  std::uint64_t descriptor = entry.descriptor;
  if ((descriptor & kFlagCopied) != 0) {
    corrupt(where() + ": the copied flag must never be set for a compressed cluster", table.total);
    descriptor &= ~kFlagCopied;
  }
  if (header_.has_data_file())
    return corrupt(where() + ": compressed cluster with a data file", table.total);
  if (geometry_.extended_l2 && entry.bitmap != 0) {
    return corrupt(where() + ": compressed cluster with a subcluster allocation bitmap",
                   table.total);
  }
  result_.allocated_clusters += table.active;
  result_.compressed_clusters += table.active;
  result_.fragmented_clusters += table.active;  // by nature
  const CompressedExtent extent = compressed_extent(geometry_, descriptor);
  add(extent.offset, extent.length, table.total, "compressed data");
}

void Checker::check_standard(const Named& table, std::size_t index, const L2Entry& entry,
                             std::uint64_t& expected_offset) {
  const auto where = [&] {
    return fmt::format("L2 table at {:#x}, entry {}", table.offset, index);
  };
  if ((entry.descriptor & kL2ReservedMask) != 0) {
    corrupt(fmt::format("{} has reserved bits set: {:#x}", where(), entry.descriptor), table.total);
  }
  const std::uint64_t offset = host_offset(entry);
  const std::uint64_t allocated = entry.bitmap & (~std::uint64_t{0} >> kSubclusters);
  // Byte 0 of a data file is told from no space by the flag; zeroes have none there.
  const bool is_zero = !geometry_.extended_l2 && (entry.descriptor & kFlagZero) != 0;
  const bool has_space =
      offset != 0 || (header_.has_data_file() && (entry.descriptor & kFlagCopied) != 0 && !is_zero);
  if (!has_space) {
    if (geometry_.extended_l2 && allocated != 0)
      corrupt(where() + ": unallocated cluster with allocated subclusters", table.total);
    return;
  }
  if (geometry_.extended_l2 && (entry.bitmap >> kSubclusters & allocated) != 0) {
    corrupt(where() + ": subclusters that are allocated and read as zeroes", table.total);
  }
  if ((offset & geometry_.cluster_mask()) != 0) {
    corrupt(fmt::format("{}: data at {:#x} does not begin with a cluster", where(), offset),
            table.total);
  }
  result_.allocated_clusters += table.active;
  if (expected_offset != 0 && offset != expected_offset)
    result_.fragmented_clusters += table.active;
  expected_offset = offset + geometry_.cluster_bytes();
  const bool is_copied = (entry.descriptor & kFlagCopied) != 0;
  if (header_.has_data_file()) {
    if (!is_copied && table.active > 0)
      corrupt(where() + ": OFLAG_COPIED is not set, though the data is in a data file",
              table.active);
    return;
  }
  add(offset, geometry_.cluster_bytes(), table.total, "data");
  // Flags of a table of which it is not known how often it is shared say nothing.
  const bool has_flags =
      table.active > 0 && table.offset != 0 && refcount_at(table.offset) != kUnknown;
  if (has_flags && (refcount_at(offset) == 1) != is_copied)
    check_copied(is_copied, offset, where(), table.active);
}

void Checker::check_l2_table(const Named& table, std::span<const std::byte> bytes) {
  std::uint64_t expected_offset = 0;
  // What something else claims too may be no table.
  const bool may_repair = repairs_entries_ && table.offset != 0 &&
                          (table.offset & geometry_.cluster_mask()) == 0 &&
                          refcount_at(table.offset) == table.total;
  const std::size_t step = std::size_t{geometry_.l2_entry_words()} * 8;
  for (std::size_t at = 0; at < bytes.size(); at += step) {
    const L2Entry entry{load_be<std::uint64_t>(bytes.data() + at),
                        geometry_.extended_l2 ? load_be<std::uint64_t>(bytes.data() + at + 8) : 0};
    if ((entry.descriptor | entry.bitmap) == 0) continue;
    if (may_repair && is_misplaced_reserve(entry)) {
      tell_(fmt::format("Repairing L2 table at {:#x}, entry {}: it has no cluster at {:#x}",
                        table.offset, at / step, host_offset(entry)));
      change_word(bytes, table.offset, at, geometry_.extended_l2 ? 0 : kFlagZero, entry_repairs_);
      ++entries_repaired_;
      continue;
    }
    if ((entry.descriptor & kFlagCompressed) != 0) {
      check_compressed(table, at / step, entry);
    } else {
      check_standard(table, at / step, entry, expected_offset);
    }
  }
}

Task<int> Checker::check_tables() {
  // Each table once, however often it is named.
  std::ranges::sort(tables_, {}, &Named::offset);
  std::size_t kept = 0;
  for (std::size_t i = 0; i < tables_.size(); ++i) {
    if (kept > 0 && tables_[kept - 1].offset == tables_[i].offset) {
      tables_[kept - 1].active += tables_[i].active;
      tables_[kept - 1].total += tables_[i].total;
    } else {
      tables_[kept++] = tables_[i];
    }
  }
  tables_.resize(kept);
  const auto offset_of = [this](std::size_t i) { return tables_[i].offset; };
  const auto visit = [this](std::size_t i, std::span<const std::byte> bytes) {
    check_l2_table(tables_[i], bytes);
  };
  const int error = co_await read_tables(file_, context_, geometry_.cluster_bytes(), tables_.size(),
                                         offset_of, visit);
  co_return error;
}

Task<int> Checker::check_bitmaps() {
  if (!header_.bitmap_directory) co_return 0;
  const Extent directory = *header_.bitmap_directory;
  told_by_themselves_.push_back(directory);
  add(directory.offset, directory.length, 1, "bitmap directory");
  std::vector<std::byte> bytes;
  int error = co_await read_bitmap_directory(file_, context_, file_.data_bytes(), directory, bytes);
  if (error != 0 && error != EINVAL) co_return error;
  std::vector<Bitmap> bitmaps;
  std::string why = error == EINVAL ? "the bitmap directory has no place in the file"
                                    : decode_bitmap_directory(bytes, header_, bitmaps);
  // Each table has clusters of its own, as with snapshots.
  std::uint64_t all_bytes = 0;
  for (const Bitmap& bitmap : bitmaps)
    all_bytes +=
        readable_bytes({bitmap.entry.table_offset, std::uint64_t{bitmap.entry.table_entries} * 8});
  if (why.empty() && all_bytes > file_.data_bytes())
    why = "the tables of the bitmaps are larger than the file";
  for (std::size_t i = 0; i < bitmaps.size() && why.empty(); ++i) {
    error = co_await check_bitmap_table(bitmaps[i].entry, why);
    if (error != 0) co_return error;
  }
  if (!why.empty()) give_up(std::move(why));
  co_return 0;
}

// `why`: what makes it impossible.
Task<int> Checker::check_bitmap_table(const BitmapEntry& bitmap, std::string& why) {
  const Extent table{bitmap.table_offset, std::uint64_t{bitmap.table_entries} * 8};
  if (table.offset > kReadableEnd) {
    why = "the table of a bitmap is where nothing can be read";
    co_return 0;
  }
  told_by_themselves_.push_back(table);
  add(table.offset, table.length, 1, "bitmap table");
  std::vector<std::uint64_t> words;
  const int error = co_await read_words(table.offset, readable_bytes(table) / 8, words);
  if (error != 0) co_return error;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::uint64_t offset = words[i] & kOffsetMask;
    if ((words[i] & kBitmapReservedMask) != 0 || (offset & geometry_.cluster_mask()) != 0 ||
        (offset != 0 && (words[i] & kBitmapAllOnes) != 0)) {
      why = fmt::format("bitmap table at {:#x}: entry {} is not valid: {:#x}", table.offset, i,
                        words[i]);
      co_return 0;
    }
    if (offset != 0) add(offset, geometry_.cluster_bytes(), 1, "bitmap");
  }
  co_return 0;
}

void Checker::check_refcount_table() {
  if (keeps_references_) references_of_content_ = references_;
  add(header_.refcount_table_offset, refcount_table_.size() * 8, 1, "refcount table");
  const std::uint64_t clusters = geometry_.clusters_of(file_.data_bytes());
  for (std::size_t i = 0; i < refcount_table_.size(); ++i) {
    const std::uint64_t entry = refcount_table_[i];
    if (entry == 0) continue;
    const std::uint64_t corruptions = result_.corruptions;
    if ((entry & kRefcountTableReservedMask) != 0) {
      corrupt(fmt::format("refcount table entry {} has reserved bits set", i));
    } else if ((entry & geometry_.cluster_mask()) != 0) {
      corrupt(fmt::format("refcount block {} does not begin with a cluster", i));
    } else if (cluster_of(entry) >= clusters) {
      corrupt(fmt::format("refcount block {} is outside of the image", i));
    } else {
      add(entry, geometry_.cluster_bytes(), 1, "refcount block");
      const std::uint32_t count = references_[cluster_of(entry)];
      if (count != 1)
        corrupt(fmt::format("refcount block {} has {} references instead of 1", i, count));
    }
    if (result_.corruptions != corruptions) needs_rewrite_ = true;
  }
  for (std::uint64_t i = 0; i < header_.refcount_table_clusters; ++i) {
    const std::uint64_t cluster = cluster_of(header_.refcount_table_offset) + i;
    if (cluster < references_.size() && references_[cluster] != 1) needs_rewrite_ = true;
  }
}

void Checker::compare() {
  std::uint64_t last = 0;
  for (std::uint64_t cluster = 0; cluster < references_.size(); ++cluster) {
    const std::uint32_t refcount = refcounts_[cluster];
    const std::uint32_t references = references_[cluster];
    if (refcount == kUnknown) continue;
    // What is said of clusters beyond the end says nothing.
    if (references == 0 && cluster + 1 == references_.size()) break;
    if ((refcount | references) != 0) last = cluster;
    if (refcount == references) continue;
    const std::uint64_t block = cluster >> geometry_.refcount_block_bits();
    if (refcount == 0 && (block >= refcount_table_.size() || refcount_table_[block] == 0))
      needs_rewrite_ = true;
    tell_(fmt::format("{} cluster {} refcount={} reference={}",
                      refcount < references ? "ERROR" : "Leaked", cluster, refcount, references));
    ++(refcount < references ? result_.corruptions : result_.leaks);
    if (refcount < references) ++result_.refcounts_too_low;
  }
  result_.image_end_offset = (last + 1) << geometry_.cluster_bits;
}

Task<int> Checker::run() {
  const std::uint64_t clusters = geometry_.clusters_of(file_.data_bytes());
  if (clusters > kCheckClustersMax) co_return EFBIG;
  // One more: what begins in the last cluster may end in the next.
  refcounts_.resize(clusters + 1);
  references_.resize(clusters + 1);
  result_.total_clusters = geometry_.clusters_of(header_.size_bytes);
  int error = co_await load_refcounts();
  if (error != 0) co_return error;
  add(0, geometry_.cluster_bytes(), 1, "header");
  const Extent l1_table{header_.l1_table_offset, std::uint64_t{header_.l1_entries} * 8};
  error = co_await name_tables(l1_table, true);
  if (error == 0 && header_.snapshot_count > 0) error = co_await check_snapshots();
  if (error == 0 && result_.failure.empty()) error = co_await check_tables();
  if (error == 0 && result_.failure.empty()) error = co_await check_bitmaps();
  if (error != 0 || !result_.failure.empty()) co_return error;
  check_refcount_table();
  compare();
  co_return 0;
}

// ---- Repairing.

Task<int> Checker::flush() {
  const int error = co_await BlockIo(file_, context_, BlockOperation::kFlush, 0, 0);
  co_return error;
}

Task<int> Checker::repair(Repair repair, Header& header, RepairResult& result) {
  // What could not be read may name anything.
  if (result_.check_errors > unreadable_refcounts_ || overlaps_what_changes()) co_return 0;
  // First what takes references away: until the refcounts follow, that is a leak.
  int error = co_await write_sectors(entry_repairs_);
  result.corruptions_fixed += entries_repaired_;
  if (error == 0) error = co_await flush();
  if (error != 0) co_return error;
  if (repair == Repair::kAll && needs_rewrite_) {
    error = co_await rewrite_refcounts(header, result);
  } else if (unreadable_refcounts_ == 0) {
    error = co_await set_refcounts(repair == Repair::kLeaks, result);
  }
  if (error == 0) error = co_await flush();
  // What was leaked is what else a cluster was thought to be shared with: flags follow.
  const bool only_leaked =
      result_.corruptions == 0 && result_.check_errors == 0 && result.leaks_fixed == result_.leaks;
  if (error != 0 || (repair != Repair::kAll && !only_leaked)) co_return error;
  error = co_await set_copied_flags(result);
  if (error == 0) error = co_await flush();
  co_return error;
}

bool Checker::overlaps_what_changes() {
  auto& told = told_by_themselves_;
  std::erase_if(told, [](const Extent& extent) { return extent.length == 0; });
  std::ranges::sort(told, {}, &Extent::offset);
  // How far those reach that begin no later.
  std::vector<std::uint64_t> ends;
  ends.reserve(told.size());
  std::uint64_t end = 0;
  for (const Extent& extent : told)
    ends.push_back(end = std::max(end, extent.offset + extent.length));
  const auto overlaps = [&](std::uint64_t offset, std::uint64_t length) {
    const auto after = std::ranges::lower_bound(told, offset + length, {}, &Extent::offset);
    return after != told.begin() &&
           ends[static_cast<std::size_t>(after - told.begin()) - 1] > offset;
  };
  const std::uint64_t cluster_bytes = geometry_.cluster_bytes();
  const auto is_hit = [&](std::uint64_t offset) { return overlaps(offset, cluster_bytes); };
  return is_hit(0) || overlaps(header_.l1_table_offset, std::uint64_t{header_.l1_entries} * 8) ||
         overlaps(header_.refcount_table_offset, refcount_table_.size() * 8) ||
         std::ranges::any_of(refcount_table_,
                             [&](std::uint64_t entry) {
                               return (entry & ~kRefcountTableReservedMask) != 0 &&
                                      is_hit(entry & ~kRefcountTableReservedMask);
                             }) ||
         std::ranges::any_of(tables_, [&](const Named& table) { return is_hit(table.offset); });
}

// In place: blocks that are there, and nobody else's.
Task<int> Checker::set_refcounts(bool lower_only, RepairResult& result) {
  const std::uint64_t range = std::uint64_t{1} << geometry_.refcount_block_bits();
  const std::uint64_t clusters = geometry_.clusters_of(file_.data_bytes());
  AlignedBuffer block(geometry_.cluster_bytes());
  for (std::uint64_t first = 0; first < clusters; first += range) {
    const std::uint64_t index = first / range;
    const std::uint64_t entry = index < refcount_table_.size() ? refcount_table_[index] : 0;
    const std::uint64_t end = std::min(clusters, first + range);
    const auto is_wrong = [&](std::uint64_t cluster) {
      return refcounts_[cluster] > references_[cluster] ||
             (!lower_only && refcounts_[cluster] < references_[cluster]);
    };
    bool any = false;
    for (std::uint64_t cluster = first; cluster < end; ++cluster) any = any || is_wrong(cluster);
    const bool is_usable = entry != 0 &&
                           (entry & (kRefcountTableReservedMask | geometry_.cluster_mask())) == 0 &&
                           cluster_of(entry) < clusters && references_[cluster_of(entry)] == 1;
    if (!any || !is_usable) continue;
    int error = co_await BlockIo(file_, context_, BlockOperation::kRead, entry, block.bytes());
    if (error != 0) co_return error;
    for (std::uint64_t cluster = first; cluster < end; ++cluster) {
      if (!is_wrong(cluster)) continue;
      tell_(fmt::format("Repairing cluster {} refcount={} reference={}", cluster,
                        refcounts_[cluster], references_[cluster]));
      ++(refcounts_[cluster] > references_[cluster] ? result.leaks_fixed
                                                    : result.corruptions_fixed);
      refcounts_[cluster] = references_[cluster];
      const RefcountPlace place = refcount_place(geometry_.refcount_order, cluster - first);
      std::byte* const word = block.data() + place.word * 8;
      const std::uint64_t others = load_be<std::uint64_t>(word) & ~(place.mask << place.shift);
      store_be(word, others | std::uint64_t{references_[cluster]} << place.shift);
    }
    error = co_await BlockIo(file_, context_, BlockOperation::kWrite, entry, block.bytes());
    if (error != 0) co_return error;
  }
  co_return 0;
}

// New ones, behind everything that there is; the old ones become free with the header's change.
Task<int> Checker::rewrite_refcounts(Header& header, RepairResult& result) {
  const std::uint64_t clusters = geometry_.clusters_of(file_.data_bytes());
  references_of_content_.resize(clusters);
  const RefcountLayout layout = plan_refcounts(geometry_, clusters);
  if (!layout.is_possible(geometry_) || file_.is_block_device()) co_return EFBIG;
  tell_("Repairing the refcounts of the whole image: a new table and new blocks");
  references_of_content_.resize(layout.end(), 1);
  int error = file_.grow(layout.end() << geometry_.cluster_bits);
  AlignedBuffer table(layout.table_clusters << geometry_.cluster_bits);
  std::ranges::fill(table.bytes(), std::byte{0});
  AlignedBuffer block(geometry_.cluster_bytes());
  const std::uint64_t range = std::uint64_t{1} << geometry_.refcount_block_bits();
  for (std::uint64_t i = 0; i < layout.blocks && error == 0; ++i) {
    const std::uint64_t offset = (layout.first_block() + i) << geometry_.cluster_bits;
    store_be(table.data() + i * 8, offset);
    const auto counts = std::span<const std::uint32_t>(references_of_content_)
                            .subspan(i * range, std::min(range, layout.end() - i * range));
    encode_refcounts(geometry_, counts, block.bytes());
    error = co_await BlockIo(file_, context_, BlockOperation::kWrite, offset, block.bytes());
  }
  if (error == 0)
    error = co_await BlockIo(file_, context_, BlockOperation::kWrite,
                             layout.first << geometry_.cluster_bits, table.bytes());
  if (error == 0) error = co_await flush();
  AlignedBuffer sector(kHeaderSectorBytes);
  if (error == 0)
    error = co_await BlockIo(file_, context_, BlockOperation::kRead, 0, sector.bytes());
  if (error != 0) co_return error;
  for (std::uint64_t cluster = 0; cluster < clusters; ++cluster) {
    if (refcounts_[cluster] == kUnknown) continue;
    if (refcounts_[cluster] > references_[cluster]) ++result.leaks_fixed;
    if (refcounts_[cluster] < references_[cluster]) ++result.corruptions_fixed;
  }
  ++result.corruptions_fixed;
  header.refcount_table_offset = layout.first << geometry_.cluster_bits;
  header.refcount_table_clusters = static_cast<std::uint32_t>(layout.table_clusters);
  encode_header_fields(header, sector.bytes().first<kHeaderSectorBytes>());
  error = co_await BlockIo(file_, context_, BlockOperation::kWrite, 0, sector.bytes());
  refcounts_ = references_of_content_;
  co_return error;
}

// Changes the word at byte `at` of a table that lies at `offset`, in a copy of its sector.
void Checker::change_word(std::span<const std::byte> table, std::uint64_t offset, std::size_t at,
                          std::uint64_t word, std::vector<Sector>& sectors) {
  const std::size_t begin = at / blockdev::kSectorBytes * blockdev::kSectorBytes;
  if (sectors.empty() || sectors.back().offset != offset + begin) {
    sectors.push_back({offset + begin, AlignedBuffer(blockdev::kSectorBytes)});
    std::ranges::copy(table.subspan(begin, blockdev::kSectorBytes), sectors.back().bytes.data());
  }
  store_be(sectors.back().bytes.data() + (at - begin), word);
}

void Checker::set_flag(std::span<const std::byte> table, std::uint64_t offset, std::size_t at,
                       std::vector<Sector>& sectors, RepairResult& result) const {
  const std::uint64_t entry = load_be<std::uint64_t>(table.data() + at) ^ kFlagCopied;
  tell_(fmt::format("Repairing OFLAG_COPIED of the entry at {:#x}: {:#x}", offset + at, entry));
  change_word(table, offset, at, entry, sectors);
  ++result.corruptions_fixed;
}

Task<int> Checker::write_sectors(std::vector<Sector>& sectors) {
  for (Sector& sector : sectors) {
    const int error = co_await BlockIo(file_, context_, BlockOperation::kWrite, sector.offset,
                                       sector.bytes.bytes());
    if (error != 0) co_return error;
  }
  co_return 0;
}

void Checker::set_flags_of_l1(std::span<const std::byte> table, std::uint64_t offset,
                              std::vector<Sector>& sectors, RepairResult& result) {
  for (std::size_t at = 0; at < std::size_t{header_.l1_entries} * 8; at += 8) {
    const auto entry = load_be<std::uint64_t>(table.data() + at);
    if ((entry & kOffsetMask) == 0) continue;
    if ((refcount_at(entry & kOffsetMask) == 1) != ((entry & kFlagCopied) != 0))
      set_flag(table, offset, at, sectors, result);
  }
}

void Checker::set_flags_of_l2(std::span<const std::byte> table, std::uint64_t offset,
                              std::vector<Sector>& sectors, RepairResult& result) {
  const std::size_t step = std::size_t{geometry_.l2_entry_words()} * 8;
  for (std::size_t at = 0; at < table.size(); at += step) {
    const auto entry = load_be<std::uint64_t>(table.data() + at);
    if ((entry & kFlagCompressed) != 0 || (entry & kOffsetMask) == 0) continue;
    // What is in a data file has no refcount, and one owner.
    const bool is_owned = header_.has_data_file() || refcount_at(entry & kOffsetMask) == 1;
    if (is_owned != ((entry & kFlagCopied) != 0)) set_flag(table, offset, at, sectors, result);
  }
}

Task<int> Checker::set_copied_flags(RepairResult& result) {
  std::vector<Sector> sectors;
  const std::uint64_t l1_bytes = (std::uint64_t{header_.l1_entries} * 8 + 511) / 512 * 512;
  if (l1_bytes > 0 && refcount_at(header_.l1_table_offset) == 1) {
    AlignedBuffer l1_table(l1_bytes);
    const int error = co_await BlockIo(file_, context_, BlockOperation::kRead,
                                       header_.l1_table_offset, l1_table.bytes());
    if (error != 0) co_return error;
    set_flags_of_l1(l1_table.bytes(), header_.l1_table_offset, sectors, result);
  }
  std::vector<Named> ours;
  for (const Named& table : tables_) {
    const bool is_whole = (table.offset & geometry_.cluster_mask()) == 0 && table.offset != 0;
    if (table.active > 0 && is_whole && refcount_at(table.offset) == table.total)
      ours.push_back(table);
  }
  const auto offset_of = [&ours](std::size_t i) { return ours[i].offset; };
  const auto visit = [this, &ours, &sectors, &result](std::size_t i,
                                                      std::span<const std::byte> bytes) {
    set_flags_of_l2(bytes, ours[i].offset, sectors, result);
  };
  int error = co_await read_tables(file_, context_, geometry_.cluster_bytes(), ours.size(),
                                   offset_of, visit);
  if (error == 0) error = co_await write_sectors(sectors);
  co_return error;
}

}  // namespace

Task<int> check_image(blockdev::RawNode& file, IoContext& context, const Header& header,
                      const TellFinding& tell, CheckResult& result) {
  Checker checker(file, context, header, tell, result);
  const int error = co_await checker.run();
  co_return error;
}

Task<int> survey_image(blockdev::RawNode& file, IoContext& context, const Header& header,
                       const TellFinding& tell, CheckResult& result,
                       std::vector<std::uint32_t>& references) {
  Checker checker(file, context, header, tell, result);
  checker.keep_references();
  const int error = co_await checker.run();
  if (error == 0) references = checker.take_references();
  co_return error;
}

Task<int> repair_image(blockdev::RawNode& file, IoContext& context, Header& header, Repair repair,
                       const TellFinding& tell, RepairResult& result) {
  // Refcounts that have been set right may show that a table can be repaired.
  constexpr int kPasses = 2;
  std::uint64_t snapshot_corruptions = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    CheckResult found;
    RepairResult repaired;
    const Header as_it_was = header;
    Checker checker(file, context, as_it_was, tell, found);
    checker.prepare_repair(repair);
    int error = co_await checker.run();
    if (error == 0) error = co_await checker.repair(repair, header, repaired);
    result.leaks_fixed += repaired.leaks_fixed;
    result.corruptions_fixed += repaired.corruptions_fixed;
    if (error != 0) co_return error;
    snapshot_corruptions = found.snapshot_corruptions;
    if (repaired.leaks_fixed + repaired.corruptions_fixed == 0) break;
  }
  if (repair != Repair::kAll || snapshot_corruptions == 0) co_return 0;
  tell("Repairing the snapshot table: a new one");
  SnapshotEditor editor(file, context, header);
  const int error = co_await editor.mend();
  if (error == 0) {
    header = editor.header();
    result.corruptions_fixed += snapshot_corruptions;
  }
  // What else is wrong forbids it, and stays to be told of.
  co_return error == EINVAL || error == EFBIG ? 0 : error;
}

Task<int> mark_sound(blockdev::RawNode& file, IoContext& context, Header& header) {
  if ((header.incompatible_features & (kIncompatDirty | kIncompatCorrupt)) == 0) co_return 0;
  AlignedBuffer sector(kHeaderSectorBytes);
  int error = co_await BlockIo(file, context, BlockOperation::kRead, 0, sector.bytes());
  if (error != 0) co_return error;
  header.incompatible_features &= ~(kIncompatDirty | kIncompatCorrupt);
  encode_header_fields(header, sector.bytes().first<kHeaderSectorBytes>());
  error = co_await BlockIo(file, context, BlockOperation::kWrite, 0, sector.bytes());
  if (error == 0) error = co_await BlockIo(file, context, BlockOperation::kFlush, 0, 0);
  co_return error;
}

}  // namespace vblk::qcow2
