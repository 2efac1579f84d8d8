// The directory of persistent bitmaps (qcow2.txt, "Bitmaps").
#pragma once

#include <cstdint>
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

struct BitmapEntry {
  std::uint64_t table_offset{0};
  std::uint32_t table_entries{0};
  std::uint32_t flags{0};
  unsigned granularity_bits{0};
  std::string_view name;          // the directory's own
  std::uint64_t length_bytes{0};  // of the entry, up to the next
};

// The entry at the beginning of `bytes`, which end with the directory. False: it is not whole.
[[nodiscard]] bool decode_bitmap_entry(std::span<const std::byte> bytes, BitmapEntry& entry);

// Reads the directory's bytes. Errors: EINVAL (it has no place in a file of `file_end` bytes),
// others of the file.
blockdev::Task<int> read_bitmap_directory(blockdev::BlockNode& file, blockdev::IoContext& context,
                                          std::uint64_t file_end, Extent directory,
                                          std::vector<std::byte>& bytes);

struct Bitmap {
  BitmapEntry entry;  // without its name
  std::string name;
};

// All that `header` names, in order; none without a directory. Errors: kCorrupt, kIo.
Expected<std::vector<Bitmap>> read_bitmaps(blockdev::RawNode& file, const Header& header,
                                           const blockdev::MakePrivateContext& make);

}  // namespace vblk::qcow2
