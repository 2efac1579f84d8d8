#include "blockdev/qcow2/image_editor.h"

#include <algorithm>
#include <cerrno>
#include <limits>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/bitmaps.h"
#include "blockdev/qcow2/header_rewrite.h"
#include "blockdev/qcow2/refcount_layout.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::Task;

namespace {

// Holes that are kept in mind: enough to make use of those that earlier changes have left, and few
// enough to be looked through for each table.
constexpr std::size_t kRunsMax = 4096;

AlignedBuffer zeroes(std::uint64_t bytes) {
  AlignedBuffer buffer(bytes);
  std::ranges::fill(buffer.bytes(), std::byte{0});
  return buffer;
}

}  // namespace

int ImageEditor::too_large(const char* what) {
  why_ = fmt::format("{} would be too large", what);
  return EFBIG;
}

Task<int> ImageEditor::flush() {
  const int error = co_await BlockIo(file_, context_, BlockOperation::kFlush, 0, 0);
  co_return error;
}

Task<int> ImageEditor::read_words(Extent extent, std::vector<std::uint64_t>& words) {
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

Task<int> ImageEditor::survey(bool only_refcounts) {
  CheckResult result;
  const TellFinding silent = [](const std::string&) {};
  int error = co_await survey_image(file_, context_, header_, silent, result, references_);
  const std::uint64_t corruptions =
      only_refcounts ? result.refcounts_too_low + result.leaks : result.corruptions;
  if (error == 0 && (corruptions > 0 || result.check_errors > 0)) {
    why_ = "it has errors; see 'vblk img check' for them";
    error = EINVAL;
  }
  if (error == 0) error = co_await find_free_clusters();
  co_return error;
}

Task<int> ImageEditor::find_free_clusters() {
  std::vector<std::uint64_t> table;
  const Extent extent{header_.refcount_table_offset,
                      std::uint64_t{header_.refcount_table_clusters} << geometry_.cluster_bits};
  const int error = co_await read_words(extent, table);
  if (error != 0) co_return error;
  std::vector<bool> is_taken(references_.size());
  const auto take = [&](std::uint64_t cluster) {
    if (cluster < is_taken.size()) is_taken[cluster] = true;
  };
  const std::uint64_t first = extent.offset >> geometry_.cluster_bits;
  for (std::uint64_t i = 0; i < header_.refcount_table_clusters; ++i) take(first + i);
  for (const std::uint64_t entry : table) {
    if (entry != 0) take(entry >> geometry_.cluster_bits);
  }
  for (std::uint64_t at = 0; at < references_.size() && free_runs_.size() < kRunsMax; ++at) {
    const std::uint64_t begin = at;
    while (at < references_.size() && references_[at] == 0 && !is_taken[at]) ++at;
    if (at > begin) free_runs_.push_back({begin, at - begin});
  }
  co_return 0;
}

bool ImageEditor::count_clusters(std::uint64_t offset, std::uint64_t length, int change) {
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

std::optional<std::uint64_t> ImageEditor::take_run(std::uint64_t clusters) {
  const auto found = std::ranges::find_if(
      free_runs_, [clusters](const Run& run) { return run.count >= clusters; });
  if (found == free_runs_.end()) return std::nullopt;
  const std::uint64_t first = found->first;
  found->first += clusters;
  found->count -= clusters;
  return first;
}

std::uint64_t ImageEditor::take_clusters(std::uint64_t length_bytes) {
  const std::uint64_t clusters = geometry_.clusters_of(length_bytes);
  const std::uint64_t first = take_run(clusters).value_or(references_.size());
  if (first + clusters > references_.size()) references_.resize(first + clusters);
  std::fill_n(references_.begin() + static_cast<std::ptrdiff_t>(first), clusters, 1U);
  return first << geometry_.cluster_bits;
}

Task<int> ImageEditor::write(std::uint64_t offset, std::span<std::byte> bytes) {
  int error = file_.grow(offset + bytes.size());
  if (error == 0) error = co_await BlockIo(file_, context_, BlockOperation::kWrite, offset, bytes);
  co_return error;
}

Task<int> ImageEditor::write_words(std::uint64_t offset, const std::vector<std::uint64_t>& words) {
  if (words.empty()) co_return 0;
  AlignedBuffer bytes = zeroes(geometry_.clusters_of(words.size() * 8) << geometry_.cluster_bits);
  for (std::size_t i = 0; i < words.size(); ++i) store_be(bytes.data() + i * 8, words[i]);
  const int error = co_await write(offset, bytes.bytes());
  co_return error;
}

Task<int> ImageEditor::release_bitmap(const BitmapEntry& entry) {
  const Extent table{entry.table_offset, std::uint64_t{entry.table_entries} * 8};
  std::vector<std::uint64_t> words;
  const int error = co_await read_words(table, words);
  if (error != 0) co_return error;
  for (const std::uint64_t word : words) {
    if ((word & kOffsetMask) != 0)
      static_cast<void>(count_clusters(word & kOffsetMask, geometry_.cluster_bytes(), -1));
  }
  static_cast<void>(count_clusters(table.offset, table.length, -1));
  co_return 0;
}

Task<int> ImageEditor::load_snapshots() {
  const int error = co_await load_snapshots(file_.data_bytes());
  co_return error;
}

void ImageEditor::complete_snapshots() {
  for (KeptSnapshot& snapshot : snapshots_) {
    if (snapshot.entry.extra_bytes >= kSnapshotExtraBytesV3) continue;
    SnapshotEntry entry = snapshot.entry;
    entry.name = snapshot.name;
    snapshot.bytes = encode_snapshot(entry, snapshot.id);
  }
}

Task<int> ImageEditor::load_snapshots(std::uint64_t file_end) {
  const VisitSnapshot visit = [this](const SnapshotEntry& entry) {
    snapshots_.push_back({{entry, std::string(entry.id), std::string(entry.name)}, {}});
    snapshots_.back().entry.id = {};
    snapshots_.back().entry.name = {};
    const std::uint64_t length =
        SnapshotEntry::kFixedBytes + entry.extra_bytes + entry.id.size() + entry.name.size();
    snapshots_.back().bytes.resize((length + 7) / 8 * 8);
    return true;
  };
  SnapshotTable table;
  int error = co_await visit_snapshots(file_, context_, header_, file_end, visit, table);
  if (!table.why.empty()) why_ = table.why;
  if (error != 0 || table.length_bytes == 0) co_return error;
  snapshots_bytes_ = table.length_bytes;
  // As they are, with what in them nobody here knows.
  AlignedBuffer bytes((snapshots_bytes_ + 511) / 512 * 512);
  error = co_await BlockIo(file_, context_, BlockOperation::kRead, header_.snapshots_offset,
                           bytes.bytes());
  const std::byte* from = bytes.data();
  for (KeptSnapshot& snapshot : snapshots_) {
    std::copy_n(from, snapshot.bytes.size(), snapshot.bytes.begin());
    from += snapshot.bytes.size();
  }
  co_return error;
}

Task<int> ImageEditor::write_snapshots() {
  static_cast<void>(count_clusters(header_.snapshots_offset, snapshots_bytes_, -1));
  std::uint64_t length = 0;
  for (const KeptSnapshot& snapshot : snapshots_) length += snapshot.bytes.size();
  if (length > kSnapshotTableBytesMax || snapshots_.size() > kSnapshotsMax)
    co_return too_large("the snapshot table");
  header_.snapshot_count = static_cast<std::uint32_t>(snapshots_.size());
  if (snapshots_.empty()) {
    header_.snapshots_offset = 0;
    co_return 0;
  }
  header_.snapshots_offset = take_clusters(length);
  AlignedBuffer bytes(geometry_.clusters_of(length) << geometry_.cluster_bits);
  std::ranges::fill(bytes.bytes(), std::byte{0});
  std::byte* to = bytes.data();
  for (const KeptSnapshot& snapshot : snapshots_) to = std::ranges::copy(snapshot.bytes, to).out;
  const int error = co_await write(header_.snapshots_offset, bytes.bytes());
  co_return error;
}

Task<int> ImageEditor::write_refcounts() {
  const Geometry& geometry = header_.geometry;
  const std::uint64_t range = std::uint64_t{1} << geometry.refcount_block_bits();
  // In a hole, if there is one that is large enough.
  RefcountLayout layout{.blocks = (references_.size() + range - 1) / range};
  layout.table_clusters = geometry.clusters_of(layout.blocks * 8);
  if (const auto place = take_run(layout.table_clusters + layout.blocks)) {
    layout.first = *place;
  } else {
    layout = plan_refcounts(geometry, references_.size());
  }
  if (!layout.is_possible(geometry)) co_return too_large("the refcount table");
  if (layout.end() << geometry.cluster_bits > kHostOffsetMax) co_return too_large("the file");
  references_.resize(std::max<std::uint64_t>(references_.size(), layout.end()));
  const auto counts = std::span(references_);
  std::ranges::fill(counts.subspan(layout.first, layout.end() - layout.first), 1U);
  int error = file_.grow(layout.end() << geometry.cluster_bits);
  AlignedBuffer table = zeroes(layout.table_clusters << geometry.cluster_bits);
  AlignedBuffer block(geometry.cluster_bytes());
  for (std::uint64_t i = 0; i < layout.blocks && error == 0; ++i) {
    const std::uint64_t offset = (layout.first_block() + i) << geometry.cluster_bits;
    store_be(table.data() + i * 8, offset);
    const std::uint64_t first = i * range;
    const std::uint64_t count = std::min(range, references_.size() - first);
    encode_refcounts(geometry, counts.subspan(first, count), block.bytes());
    error = co_await write(offset, block.bytes());
  }
  if (error == 0) error = co_await write(layout.first << geometry.cluster_bits, table.bytes());
  header_.refcount_table_offset = layout.first << geometry.cluster_bits;
  header_.refcount_table_clusters = static_cast<std::uint32_t>(layout.table_clusters);
  co_return error;
}

// "Header", autoclear_features: whoever writes clears those that it does not know.
void ImageEditor::clear_unknown_features() {
  header_.autoclear_features &= kAutoclearBitmaps | kAutoclearRawDataFile;
}

Task<int> ImageEditor::switch_fields() {
  clear_unknown_features();
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

Task<int> ImageEditor::switch_header() {
  clear_unknown_features();
  int error = co_await flush();
  if (error == 0) error = co_await replace_header(file_, context_, header_, why_);
  co_return error;
}

Task<int> ImageEditor::discard_free() {
  if (!file_.limits().can_discard || file_.is_block_device()) co_return 0;
  for (std::uint64_t cluster = 0; cluster < references_.size();) {
    std::uint64_t after = cluster;
    while (after < references_.size() && references_[after] == 0) ++after;
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

}  // namespace vblk::qcow2
