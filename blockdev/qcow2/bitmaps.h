// The directory of persistent bitmaps (qcow2.txt, "Bitmaps").
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "aio/error.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/header.h"
#include "blockdev/raw_node.h"
#include "blockdev/task.h"

namespace vblk::qcow2 {

// "Bitmap directory": flags.
inline constexpr std::uint32_t kBitmapInUse = 1U << 0;
inline constexpr std::uint32_t kBitmapAuto = 1U << 1;
inline constexpr std::uint32_t kBitmapExtraCompatible = 1U << 2;
inline constexpr std::uint32_t kBitmapFlagsKnown =
    kBitmapInUse | kBitmapAuto | kBitmapExtraCompatible;
// "Bitmap directory": type.
inline constexpr std::uint8_t kBitmapDirtyTracking = 1;
// "Bitmap table": entries. Without an offset, bit 0 says that all of the cluster is ones.
inline constexpr std::uint64_t kBitmapReservedMask = 0xff00'0000'0000'01fe;
inline constexpr std::uint64_t kBitmapAllOnes = 1;

// QEMU's limits, so that it takes what is made here.
inline constexpr std::size_t kBitmapsMax = 65535;
inline constexpr std::uint64_t kBitmapDirectoryBytesMax = 1024 * kBitmapsMax;
inline constexpr std::size_t kBitmapNameBytesMax = 1023;
inline constexpr unsigned kBitmapGranularityBitsMin = 9;
inline constexpr unsigned kBitmapGranularityBitsMax = 31;
inline constexpr std::uint64_t kBitmapBytesMax = std::uint64_t{512} << 20;

struct BitmapEntry {
  std::uint64_t table_offset{0};
  std::uint32_t table_entries{0};
  std::uint32_t flags{0};
  std::uint8_t type{0};
  unsigned granularity_bits{0};
  std::uint32_t extra_bytes{0};
  std::string_view name;          // the directory's own
  std::uint64_t length_bytes{0};  // of the entry, up to the next
};

// The entry at the beginning of `bytes`, which end with the directory. False: it is not whole.
[[nodiscard]] bool decode_bitmap_entry(std::span<const std::byte> bytes, BitmapEntry& entry);

struct Bitmap {
  BitmapEntry entry;  // without its name
  std::string name;
};

// All entries of the directory of `header`, in order. What is wrong with one of them, or with all
// together, as QEMU judges it; empty: nothing. Extra data that nobody knows is nothing wrong here.
[[nodiscard]] std::string decode_bitmap_directory(std::span<const std::byte> bytes,
                                                  const Header& header,
                                                  std::vector<Bitmap>& bitmaps);

// Reads the directory's bytes. Errors: EINVAL (it has no place in a file of `file_end` bytes),
// others of the file.
blockdev::Task<int> read_bitmap_directory(blockdev::BlockNode& file, blockdev::IoContext& context,
                                          std::uint64_t file_end, Extent directory,
                                          std::vector<std::byte>& bytes);

// The bytes of an entry, padded, without extra data.
[[nodiscard]] std::vector<std::byte> encode_bitmap_entry(const BitmapEntry& entry);
// What changes of an entry that stays, extra data and all.
void update_bitmap_entry(const BitmapEntry& entry, std::span<std::byte> bytes);

[[nodiscard]] inline std::uint64_t granules_of(std::uint64_t disk_bytes,
                                               unsigned granularity_bits) {
  return (disk_bytes >> granularity_bits) +
         ((disk_bytes & ((std::uint64_t{1} << granularity_bits) - 1)) != 0 ? 1 : 0);
}
// Bytes of a bitmap of a disk: one bit for each granule, the first in bit 0 of the first byte.
[[nodiscard]] inline std::uint64_t bitmap_bytes(std::uint64_t disk_bytes,
                                                unsigned granularity_bits) {
  return (granules_of(disk_bytes, granularity_bits) + 7) / 8;
}

// The bits of a bitmap that is not in use, of a disk of this size ("Bitmap data"). Errors: EINVAL
// (its table is not one for such a disk, or breaks the specification), EFBIG (above
// kBitmapBytesMax), others of the file.
blockdev::Task<int> read_bitmap_bits(blockdev::BlockNode& file, blockdev::IoContext& context,
                                     const Geometry& geometry, std::uint64_t disk_bytes,
                                     const BitmapEntry& entry, std::vector<std::byte>& bits);

// Sets in `to` what is set in `from`, both of a disk of `disk_bytes`; where the granularities
// differ, every granule that one of `from` touches.
void merge_bitmap_bits(std::uint64_t disk_bytes, std::span<const std::byte> from,
                       unsigned from_granularity_bits, std::span<std::byte> to,
                       unsigned to_granularity_bits);

// All that `header` names, in order; none without a directory. Errors: kCorrupt, kIo.
Expected<std::vector<Bitmap>> read_bitmaps(blockdev::RawNode& file, const Header& header,
                                           const blockdev::MakePrivateContext& make);

}  // namespace vblk::qcow2
