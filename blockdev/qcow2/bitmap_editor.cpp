#include "blockdev/qcow2/bitmap_editor.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;
using blockdev::Task;

namespace {

constexpr std::uint64_t kDefaultGranularityMin = 4096;
constexpr std::uint64_t kDefaultGranularityMax = 65536;
// "Bitmap directory": the flags, in an entry, and what is before them.
constexpr std::size_t kFlagsWordAt = 8;

}  // namespace

Task<int> BitmapEditor::load() {
  if (!header_.bitmap_directory) co_return 0;
  std::vector<std::byte> bytes;
  int error = co_await read_bitmap_directory(file_, context_, file_.data_bytes(),
                                             *header_.bitmap_directory, bytes);
  for (std::size_t at = 0; error == 0 && at < bytes.size();) {
    const auto rest = std::span(bytes).subspan(at);
    BitmapEntry entry;
    if (!decode_bitmap_entry(rest, entry) || entry.length_bytes > rest.size()) {
      error = EINVAL;
      break;
    }
    const auto own = rest.first(entry.length_bytes);
    Kept kept{.entry = entry,
              .name = std::string(entry.name),
              .bytes{own.begin(), own.end()},
              .bits = {}};
    kept.entry.name = {};
    bitmaps_.push_back(std::move(kept));
    at += entry.length_bytes;
  }
  if (error == EINVAL) why_ = "its bitmap directory is damaged; see 'vblk img check'";
  co_return error;
}

BitmapEditor::Kept* BitmapEditor::find(std::string_view name) {
  const auto found = std::ranges::find(bitmaps_, name, &Kept::name);
  return found == bitmaps_.end() ? nullptr : &*found;
}

int BitmapEditor::check_usable(const BitmapEntry& entry, std::string_view name) {
  if ((entry.flags & kBitmapInUse) != 0) {
    why_ = fmt::format("bitmap '{}' is inconsistent and can only be removed", name);
    return EUCLEAN;
  }
  const bool is_known = entry.type == kBitmapDirtyTracking &&
                        (entry.flags & ~kBitmapFlagsKnown) == 0 &&
                        (entry.extra_bytes == 0 || (entry.flags & kBitmapExtraCompatible) != 0) &&
                        entry.granularity_bits >= kBitmapGranularityBitsMin &&
                        entry.granularity_bits <= kBitmapGranularityBitsMax;
  if (!is_known) {
    why_ = fmt::format("bitmap '{}' is of a kind that is not known here", name);
    return EOPNOTSUPP;
  }
  return 0;
}

int BitmapEditor::find_usable(std::string_view name, Kept*& found) {
  found = find(name);
  if (found != nullptr) return check_usable(found->entry, name);
  why_ = fmt::format("there is no bitmap '{}'", name);
  return ENOENT;
}

int BitmapEditor::add(std::string_view name, std::optional<std::uint64_t> granularity_bytes) {
  const auto refuse = [this](int error, std::string why) {
    why_ = std::move(why);
    return error;
  };
  if (name.empty()) return refuse(EINVAL, "a bitmap needs a name");
  if (name.size() > kBitmapNameBytesMax)
    return refuse(EINVAL, fmt::format("a name has {} bytes at most", kBitmapNameBytesMax));
  const std::uint64_t granularity = granularity_bytes.value_or(
      std::clamp(geometry_.cluster_bytes(), kDefaultGranularityMin, kDefaultGranularityMax));
  const auto bits = static_cast<unsigned>(std::countr_zero(granularity));
  if (!std::has_single_bit(granularity) || bits < kBitmapGranularityBitsMin ||
      bits > kBitmapGranularityBitsMax)
    return refuse(EINVAL, "the granularity is a power of two from 512 to 2G");
  if (header_.version < 3)
    return refuse(
        EOPNOTSUPP,
        "images of version 2 have no bitmaps; 'vblk img amend -o compat=1.1' makes it one "
        "of version 3");
  if (header_.size_bytes == 0) return refuse(EOPNOTSUPP, "a disk of no bytes has no bitmaps");
  if (find(name) != nullptr)
    return refuse(EEXIST, fmt::format("there is a bitmap '{}' already", name));
  const std::uint64_t length = bitmap_bytes(header_.size_bytes, bits);
  const std::uint64_t table_entries = geometry_.clusters_of(length);
  // What check.h takes for a table.
  if (length > kBitmapBytesMax || table_entries > kL1BytesMax / 8)
    return refuse(EFBIG, "the bitmap would be too large; use a larger granularity");
  const BitmapEntry entry{.table_entries = static_cast<std::uint32_t>(table_entries),
                          .flags = kBitmapAuto,
                          .type = kBitmapDirtyTracking,
                          .granularity_bits = bits};
  std::uint64_t directory_bytes = 24 + name.size() + 7;
  for (const Kept& bitmap : bitmaps_) directory_bytes += 24 + bitmap.name.size() + 7;
  if (bitmaps_.size() >= kBitmapsMax || directory_bytes > kBitmapDirectoryBytesMax)
    return refuse(EFBIG, "there are too many bitmaps already");
  bitmaps_.push_back({.entry = entry,
                      .name = std::string(name),
                      .bytes = {},
                      .bits = std::vector<std::byte>(length)});
  is_rewritten_ = true;
  return 0;
}

int BitmapEditor::remove(std::string_view name) {
  const Kept* const found = find(name);
  if (found == nullptr) {
    why_ = fmt::format("there is no bitmap '{}'", name);
    return ENOENT;
  }
  if (found->entry.table_offset != 0) released_.push_back(found->entry);
  bitmaps_.erase(bitmaps_.begin() + (found - bitmaps_.data()));
  is_rewritten_ = true;
  return 0;
}

int BitmapEditor::clear(std::string_view name) {
  Kept* found = nullptr;
  if (const int error = find_usable(name, found); error != 0) return error;
  const std::uint64_t length = bitmap_bytes(header_.size_bytes, found->entry.granularity_bits);
  if (length > kBitmapBytesMax || length == 0) {
    why_ = fmt::format("bitmap '{}' is too large", name);
    return EFBIG;
  }
  found->bits.emplace(length);
  is_rewritten_ = true;
  return 0;
}

int BitmapEditor::enable(std::string_view name, bool enabled) {
  Kept* found = nullptr;
  if (const int error = find_usable(name, found); error != 0) return error;
  const std::uint32_t others = found->entry.flags & ~kBitmapAuto;
  const std::uint32_t flags = enabled ? others | kBitmapAuto : others;
  flags_change_ = flags_change_ || flags != found->entry.flags;
  found->entry.flags = flags;
  return 0;
}

Task<int> BitmapEditor::read_bits(blockdev::RawNode& file, const Geometry& geometry,
                                  const BitmapEntry& entry, std::vector<std::byte>& bits) {
  const int error =
      co_await read_bitmap_bits(file, context_, geometry, header_.size_bytes, entry, bits);
  if (error == EINVAL) why_ = "the bitmap's table is damaged, or that of a disk of another size";
  if (error == EFBIG) why_ = "the bitmap is too large";
  co_return error;
}

Task<int> BitmapEditor::merge_bits(Kept& into, unsigned granularity_bits,
                                   const std::vector<std::byte>& bits) {
  if (!into.bits) {
    std::vector<std::byte> own;
    const int error = co_await read_bits(file_, geometry_, into.entry, own);
    if (error != 0) co_return error;
    into.bits = std::move(own);
  }
  merge_bitmap_bits(header_.size_bytes, bits, granularity_bits, *into.bits,
                    into.entry.granularity_bits);
  is_rewritten_ = true;
  co_return 0;
}

Task<int> BitmapEditor::merge(std::string_view name, std::string_view source) {
  Kept* into = nullptr;
  Kept* from = nullptr;
  int error = find_usable(name, into);
  if (error == 0) error = find_usable(source, from);
  std::vector<std::byte> bits;
  if (error == 0 && from->bits) bits = *from->bits;
  if (error == 0 && !from->bits) error = co_await read_bits(file_, geometry_, from->entry, bits);
  if (error == 0) error = co_await merge_bits(*into, from->entry.granularity_bits, bits);
  co_return error;
}

Task<int> BitmapEditor::merge(std::string_view name, std::string_view source, const Other& other) {
  Kept* into = nullptr;
  int error = find_usable(name, into);
  if (error != 0) co_return error;
  const auto from = std::ranges::find(other.bitmaps, source, &Bitmap::name);
  if (from == other.bitmaps.end()) {
    why_ = fmt::format("'{}' has no bitmap '{}'", other.file.name(), source);
    co_return ENOENT;
  }
  error = check_usable(from->entry, source);
  if (error == 0 && other.header.size_bytes != header_.size_bytes) {
    why_ = fmt::format("the disk of '{}' has {} bytes, not {}", other.file.name(),
                       other.header.size_bytes, header_.size_bytes);
    error = EINVAL;
  }
  std::vector<std::byte> bits;
  if (error == 0) error = co_await read_bits(other.file, other.header.geometry, from->entry, bits);
  if (error == 0) error = co_await merge_bits(*into, from->entry.granularity_bits, bits);
  co_return error;
}

Task<int> BitmapEditor::take_out(bool may_be_inconsistent, std::vector<Loose>& bitmaps) {
  std::vector<Loose> taken;
  for (const Kept& kept : bitmaps_) {
    const bool is_inconsistent = (kept.entry.flags & kBitmapInUse) != 0;
    BitmapEntry entry = kept.entry;
    if (may_be_inconsistent) entry.flags &= ~kBitmapInUse;
    int error = check_usable(entry, kept.name);
    Loose loose{.name = kept.name,
                .granularity_bits = kept.entry.granularity_bits,
                .enabled = (kept.entry.flags & kBitmapAuto) != 0,
                .inconsistent = is_inconsistent,
                .bits = {}};
    if (error == 0 && kept.bits) loose.bits = *kept.bits;
    if (error == 0 && !kept.bits && !is_inconsistent)
      error = co_await read_bits(file_, geometry_, kept.entry, loose.bits);
    if (error != 0) co_return error;
    taken.push_back(std::move(loose));
  }
  for (const Loose& loose : taken) static_cast<void>(remove(loose.name));
  bitmaps = std::move(taken);
  co_return 0;
}

int BitmapEditor::put_in(Loose bitmap) {
  if (const int error = add(bitmap.name, std::uint64_t{1} << bitmap.granularity_bits); error != 0)
    return error;
  std::vector<std::byte>& bits = *bitmaps_.back().bits;
  bitmap.bits.resize(bits.size());
  bits = std::move(bitmap.bits);
  const std::uint64_t granules = granules_of(header_.size_bytes, bitmap.granularity_bits);
  if (granules % 8 != 0) bits.back() &= std::byte((1U << (granules % 8)) - 1);
  if (!bitmap.enabled) bitmaps_.back().entry.flags &= ~kBitmapAuto;
  if (bitmap.inconsistent) bitmaps_.back().entry.flags |= kBitmapInUse;
  return 0;
}

// Zeroes need no cluster.
Task<int> BitmapEditor::write_bits(Kept& bitmap) {
  const std::span<const std::byte> bits(*bitmap.bits);
  std::vector<std::uint64_t> table(geometry_.clusters_of(bits.size()));
  AlignedBuffer cluster(geometry_.cluster_bytes());
  for (std::size_t i = 0; i < table.size(); ++i) {
    const std::uint64_t at = std::uint64_t{i} << geometry_.cluster_bits;
    const auto piece = bits.subspan(at, std::min<std::uint64_t>(cluster.size(), bits.size() - at));
    const bool is_zero =
        std::ranges::all_of(piece, [](std::byte byte) { return byte == std::byte{0}; });
    if (is_zero) continue;
    std::ranges::fill(cluster.bytes(), std::byte{0});
    std::ranges::copy(piece, cluster.data());
    table[i] = take_clusters(cluster.size());
    const int error = co_await write(table[i], cluster.bytes());
    if (error != 0) co_return error;
  }
  bitmap.entry.table_offset = take_clusters(table.size() * 8);
  bitmap.entry.table_entries = static_cast<std::uint32_t>(table.size());
  const int error = co_await write_words(bitmap.entry.table_offset, table);
  co_return error;
}

Task<int> BitmapEditor::write_directory() {
  std::vector<std::byte> bytes;
  for (Kept& bitmap : bitmaps_) {
    if (bitmap.bytes.empty()) {
      BitmapEntry entry = bitmap.entry;
      entry.name = bitmap.name;
      bitmap.bytes = encode_bitmap_entry(entry);
    } else {
      update_bitmap_entry(bitmap.entry, bitmap.bytes);
    }
    bytes.insert(bytes.end(), bitmap.bytes.begin(), bitmap.bytes.end());
  }
  header_.bitmap_count = static_cast<std::uint32_t>(bitmaps_.size());
  header_.bitmap_directory.reset();
  header_.autoclear_features &= ~kAutoclearBitmaps;
  if (bitmaps_.empty()) co_return 0;
  const Extent directory{take_clusters(bytes.size()), bytes.size()};
  header_.bitmap_directory = directory;
  header_.autoclear_features |= kAutoclearBitmaps;
  AlignedBuffer clusters(geometry_.clusters_of(bytes.size()) << geometry_.cluster_bits);
  std::ranges::fill(clusters.bytes(), std::byte{0});
  std::ranges::copy(bytes, clusters.data());
  const int error = co_await write(directory.offset, clusters.bytes());
  co_return error;
}

// An entry's flags lie within a sector: entries begin at multiples of 8.
Task<int> BitmapEditor::write_flags() {
  AlignedBuffer sector(kHeaderSectorBytes);
  std::uint64_t place = header_.bitmap_directory->offset + kFlagsWordAt;
  for (Kept& bitmap : bitmaps_) {
    const auto word = std::span(bitmap.bytes).subspan(kFlagsWordAt, 8);
    const auto before = load_be<std::uint64_t>(word.data());
    update_bitmap_entry(bitmap.entry, bitmap.bytes);
    if (load_be<std::uint64_t>(word.data()) != before) {
      const std::uint64_t in_sector = place % sector.size();
      int error = co_await BlockIo(file_, context_, BlockOperation::kRead, place - in_sector,
                                   sector.bytes());
      if (error != 0) co_return error;
      std::ranges::copy(word, sector.data() + in_sector);
      error = co_await write(place - in_sector, sector.bytes());
      if (error != 0) co_return error;
    }
    place += bitmap.bytes.size();
  }
  const int error = co_await flush();
  co_return error;
}

Task<int> BitmapEditor::save() {
  why_.clear();
  int error = 0;
  // Features that nobody here knows have to be cleared in the header.
  const bool knows_features =
      (header_.autoclear_features & ~(kAutoclearBitmaps | kAutoclearRawDataFile)) == 0;
  if (!is_rewritten_ && (!flags_change_ || knows_features)) {
    if (flags_change_) error = co_await write_flags();
    co_return error;
  }
  error = co_await survey();
  if (error != 0) co_return error;
  for (Kept& bitmap : bitmaps_) {
    if (error != 0 || !bitmap.bits) continue;
    if (bitmap.entry.table_offset != 0) released_.push_back(bitmap.entry);
    error = co_await write_bits(bitmap);
  }
  for (const BitmapEntry& entry : released_) {
    if (error == 0) error = co_await release_bitmap(entry);
  }
  if (error != 0) co_return error;
  if (const auto old = header_.bitmap_directory)
    static_cast<void>(count_clusters(old->offset, old->length, -1));
  error = co_await write_directory();
  if (error == 0) error = co_await write_refcounts();
  if (error == 0) error = co_await switch_header();
  if (error == 0) error = co_await discard_free();
  co_return error;
}

}  // namespace vblk::qcow2
