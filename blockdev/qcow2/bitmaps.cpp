#include "blockdev/qcow2/bitmaps.h"

#include <algorithm>
#include <cerrno>
#include <set>
#include <span>
#include <utility>

#include <fmt/core.h>

#include "blockdev/block_io.h"

namespace vblk::qcow2 {

using blockdev::AlignedBuffer;
using blockdev::BlockIo;
using blockdev::BlockOperation;

namespace {

// "Bitmap directory": byte offsets of an entry.
constexpr std::size_t kTableEntriesAt = 8;
constexpr std::size_t kFlagsAt = 12;
constexpr std::size_t kTypeAt = 16;
constexpr std::size_t kGranularityAt = 17;
constexpr std::size_t kNameBytesAt = 18;
constexpr std::size_t kExtraBytesAt = 20;
constexpr std::size_t kFixedBytes = 24;

// No bits behind the last granule.
void clear_tail(std::uint64_t disk_bytes, unsigned granularity_bits, std::span<std::byte> bits) {
  const std::uint64_t granules = ((disk_bytes - 1) >> granularity_bits) + 1;
  if (granules % 8 != 0) bits[granules / 8] &= static_cast<std::byte>((1U << (granules % 8)) - 1);
}

void set_bits(std::span<std::byte> bits, std::uint64_t first, std::uint64_t last) {
  for (std::uint64_t bit = first; bit <= last;) {
    if (bit % 8 == 0 && last - bit >= 7) {
      bits[bit / 8] = std::byte{0xff};
      bit += 8;
    } else {
      bits[bit / 8] |= static_cast<std::byte>(1U << (bit % 8));
      ++bit;
    }
  }
}

}  // namespace

bool decode_bitmap_entry(std::span<const std::byte> bytes, BitmapEntry& entry) {
  if (bytes.size() < kFixedBytes) return false;
  const std::byte* const from = bytes.data();
  const auto name_bytes = load_be<std::uint16_t>(from + kNameBytesAt);
  const auto extra_bytes = load_be<std::uint32_t>(from + kExtraBytesAt);
  const std::uint64_t used = kFixedBytes + std::uint64_t{name_bytes} + extra_bytes;
  if (used > bytes.size()) return false;
  entry = {.table_offset = load_be<std::uint64_t>(from),
           .table_entries = load_be<std::uint32_t>(from + kTableEntriesAt),
           .flags = load_be<std::uint32_t>(from + kFlagsAt),
           .type = std::to_integer<std::uint8_t>(from[kTypeAt]),
           .granularity_bits = std::to_integer<unsigned>(from[kGranularityAt]),
           .extra_bytes = extra_bytes,
           .name = {reinterpret_cast<const char*>(from) + kFixedBytes + extra_bytes, name_bytes},
           .length_bytes = (used + 7) / 8 * 8};
  return true;
}

namespace {

// "Bitmap directory": what an entry breaks.
const char* broken_rule(const Header& header, const BitmapEntry& entry) {
  const Geometry& geometry = header.geometry;
  if (entry.name.empty() || entry.name.size() > kBitmapNameBytesMax) return "a name";
  if (entry.type != kBitmapDirtyTracking) return "a type that is known";
  if ((entry.flags & ~kBitmapFlagsKnown) != 0) return "only flags that are known";
  if (entry.granularity_bits < kBitmapGranularityBitsMin ||
      entry.granularity_bits > kBitmapGranularityBitsMax)
    return "a granularity from 512 to 2G";
  if (entry.table_entries == 0 || entry.table_offset == 0 ||
      (entry.table_offset & geometry.cluster_mask()) != 0 ||
      std::uint64_t{entry.table_entries} << geometry.cluster_bits > kBitmapBytesMax)
    return "a table";
  // What was not closed is of no use, and may be of a disk of another size.
  const std::uint64_t needed =
      geometry.clusters_of(bitmap_bytes(header.size_bytes, entry.granularity_bits));
  if ((entry.flags & kBitmapInUse) == 0 && entry.table_entries != needed)
    return "a table for a disk of this size";
  return nullptr;
}

}  // namespace

std::string decode_bitmap_directory(std::span<const std::byte> bytes, const Header& header,
                                    std::vector<Bitmap>& bitmaps) {
  std::set<std::string_view> names;
  while (!bytes.empty()) {
    BitmapEntry entry;
    if (!decode_bitmap_entry(bytes, entry) || entry.length_bytes > bytes.size())
      return "the bitmap directory is not whole";
    const std::size_t number = bitmaps.size();
    if (const char* const rule = broken_rule(header, entry); rule != nullptr)
      return fmt::format("entry {} of the bitmap directory does not have {}", number, rule);
    if (!names.insert(entry.name).second)
      return fmt::format("entry {} of the bitmap directory has the name of another", number);
    bitmaps.push_back({entry, std::string(entry.name)});
    bitmaps.back().entry.name = {};
    bytes = bytes.subspan(entry.length_bytes);
  }
  if (bitmaps.size() != header.bitmap_count || bitmaps.size() > kBitmapsMax)
    return fmt::format("the bitmap directory has {} entries, not {}", bitmaps.size(),
                       header.bitmap_count);
  return {};
}

std::vector<std::byte> encode_bitmap_entry(const BitmapEntry& entry) {
  std::vector<std::byte> bytes((kFixedBytes + entry.name.size() + 7) / 8 * 8);
  bytes[kTypeAt] = static_cast<std::byte>(entry.type);
  bytes[kGranularityAt] = static_cast<std::byte>(entry.granularity_bits);
  store_be(bytes.data() + kNameBytesAt, static_cast<std::uint16_t>(entry.name.size()));
  std::ranges::copy(std::as_bytes(std::span(entry.name)),
                    bytes.begin() + static_cast<std::ptrdiff_t>(kFixedBytes));
  update_bitmap_entry(entry, bytes);
  return bytes;
}

void update_bitmap_entry(const BitmapEntry& entry, std::span<std::byte> bytes) {
  store_be(bytes.data(), entry.table_offset);
  store_be(bytes.data() + kTableEntriesAt, entry.table_entries);
  store_be(bytes.data() + kFlagsAt, entry.flags);
}

blockdev::Task<int> read_bitmap_bits(blockdev::BlockNode& file, blockdev::IoContext& context,
                                     const Geometry& geometry, std::uint64_t disk_bytes,
                                     const BitmapEntry& entry, std::vector<std::byte>& bits) {
  const std::uint64_t length = bitmap_bytes(disk_bytes, entry.granularity_bits);
  if (length > kBitmapBytesMax) co_return EFBIG;
  if (length == 0 || entry.table_entries != geometry.clusters_of(length) ||
      (entry.table_offset & geometry.cluster_mask()) != 0 || entry.table_offset > kHostOffsetMax)
    co_return EINVAL;
  AlignedBuffer table((std::uint64_t{entry.table_entries} * 8 + 511) / 512 * 512);
  int error =
      co_await BlockIo(file, context, BlockOperation::kRead, entry.table_offset, table.bytes());
  if (error != 0) co_return error;
  bits.assign(length, std::byte{0});
  AlignedBuffer cluster(geometry.cluster_bytes());
  for (std::uint32_t i = 0; i < entry.table_entries; ++i) {
    const auto word = load_be<std::uint64_t>(table.data() + std::size_t{i} * 8);
    const std::uint64_t offset = word & kOffsetMask;
    const bool is_all_ones = (word & kBitmapAllOnes) != 0;
    if ((word & kBitmapReservedMask) != 0 || (offset & geometry.cluster_mask()) != 0 ||
        (offset != 0 && is_all_ones))
      co_return EINVAL;
    const std::uint64_t at = std::uint64_t{i} << geometry.cluster_bits;
    const auto place = std::span(bits).subspan(at, std::min(length - at, geometry.cluster_bytes()));
    if (offset != 0) {
      error = co_await BlockIo(file, context, BlockOperation::kRead, offset, cluster.bytes());
      if (error != 0) co_return error;
      std::copy_n(cluster.data(), place.size(), place.begin());
    } else if (is_all_ones) {
      std::ranges::fill(place, std::byte{0xff});
    }
  }
  clear_tail(disk_bytes, entry.granularity_bits, bits);
  co_return 0;
}

void merge_bitmap_bits(std::uint64_t disk_bytes, std::span<const std::byte> from,
                       unsigned from_granularity_bits, std::span<std::byte> to,
                       unsigned to_granularity_bits) {
  if (from_granularity_bits == to_granularity_bits) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] |= from[i];
    return;
  }
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (from[i] == std::byte{0}) continue;
    for (unsigned bit = 0; bit < 8; ++bit) {
      if ((from[i] & static_cast<std::byte>(1U << bit)) == std::byte{0}) continue;
      const std::uint64_t granule = std::uint64_t{i} * 8 + bit;
      const std::uint64_t first_byte = granule << from_granularity_bits;
      const std::uint64_t last_byte =
          std::min(disk_bytes, (granule + 1) << from_granularity_bits) - 1;
      set_bits(to, first_byte >> to_granularity_bits, last_byte >> to_granularity_bits);
    }
  }
}

blockdev::Task<int> read_bitmap_directory(blockdev::BlockNode& file, blockdev::IoContext& context,
                                          std::uint64_t file_end, Extent directory,
                                          std::vector<std::byte>& bytes) {
  if (directory.length > kSnapshotTableBytesMax || directory.offset > file_end ||
      directory.length > file_end - directory.offset)
    co_return EINVAL;
  AlignedBuffer buffer((directory.length + 511) / 512 * 512);
  const int error =
      co_await BlockIo(file, context, BlockOperation::kRead, directory.offset, buffer.bytes());
  if (error == 0) bytes.assign(buffer.data(), buffer.data() + directory.length);
  co_return error;
}

Expected<std::vector<Bitmap>> read_bitmaps(blockdev::RawNode& file, const Header& header,
                                           const blockdev::MakePrivateContext& make) {
  std::vector<Bitmap> bitmaps;
  if (!header.bitmap_directory) return bitmaps;
  const auto context = make();
  if (!context) return std::unexpected(context.error());
  std::vector<std::byte> bytes;
  const int error = (*context)->run(read_bitmap_directory(
      file, (*context)->context(), file.data_bytes(), *header.bitmap_directory, bytes));
  if (error != 0 && error != EINVAL) {
    return make_error(
        ErrorKind::kIo,
        fmt::format("cannot read the bitmaps of '{}': {}", file.name(), describe_errno(error)),
        error);
  }
  const std::string why = error == EINVAL ? "its bitmap directory has no place in the file"
                                          : decode_bitmap_directory(bytes, header, bitmaps);
  if (!why.empty()) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("qcow2 image '{}' is damaged: {}", file.name(), why));
  }
  return bitmaps;
}

}  // namespace vblk::qcow2
