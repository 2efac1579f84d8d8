#include "blockdev/qcow2/bitmaps.h"

#include <cerrno>
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
constexpr std::size_t kGranularityAt = 17;
constexpr std::size_t kNameBytesAt = 18;
constexpr std::size_t kExtraBytesAt = 20;
constexpr std::size_t kFixedBytes = 24;

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
           .granularity_bits = std::to_integer<unsigned>(from[kGranularityAt]),
           .name = {reinterpret_cast<const char*>(from) + kFixedBytes + extra_bytes, name_bytes},
           .length_bytes = (used + 7) / 8 * 8};
  return true;
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
  bool is_whole = error == 0;
  for (std::size_t at = 0; is_whole && at < bytes.size();) {
    BitmapEntry entry;
    is_whole =
        decode_bitmap_entry(std::span(bytes).subspan(at), entry) && entry.granularity_bits < 64;
    if (!is_whole) break;
    at += entry.length_bytes;
    bitmaps.push_back({entry, std::string(entry.name)});
    bitmaps.back().entry.name = {};
  }
  if (!is_whole) {
    return make_error(
        ErrorKind::kCorrupt,
        fmt::format("qcow2 image '{}' is damaged: its bitmap directory is not whole", file.name()));
  }
  return bitmaps;
}

}  // namespace vblk::qcow2
