// What a user can say about an image; image/open_image.h makes a node of it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "aio/error.h"

namespace vblk::blockdev {

// QEMU's cache modes, by its names. The write cache is what the guest sees as `writeback`.
//
//   mode          O_DIRECT  guest write cache  flush
//   writeback     no        on                 fdatasync
//   none          yes       on                 fdatasync
//   writethrough  no        off (RWF_DSYNC)    fdatasync
//   directsync    yes       off (RWF_DSYNC)    fdatasync
//   unsafe        no        on                 ignored: data is lost when the host stops
enum class CacheMode : std::uint8_t { kNone, kWriteback, kWritethrough, kDirectsync, kUnsafe };

Expected<CacheMode> parse_cache_mode(std::string_view text);
[[nodiscard]] std::string_view to_string(CacheMode mode);
[[nodiscard]] bool uses_direct_io(CacheMode mode);
[[nodiscard]] bool has_write_cache(CacheMode mode);

// "8M": the window of write-behind. Error: kInvalidArgument: no size, not from 64K to 1G, or not
// kWriteback, the only mode in which written data waits in memory for a flush.
Expected<std::uint64_t> parse_write_behind(std::string_view text, CacheMode cache);

// kByName: qcow2 where the file's name ends in ".qcow2", otherwise raw, which is refused where the
// file begins like a qcow2 image. The content never decides: a guest could have written it.
enum class ImageFormat : std::uint8_t { kRaw, kQcow2, kNull, kByName };
// Every format but kByName.
Expected<ImageFormat> parse_image_format(std::string_view text);

struct ImageOptions {
  std::string path;  // ignored by the null format
  ImageFormat format{ImageFormat::kByName};
  CacheMode cache{CacheMode::kNone};
  bool read_only{false};
  bool share_flushes{true};             // as RawNodeOptions; they wait for each other, too
  std::uint64_t write_behind_bytes{0};  // kWriteback only; as RawNodeOptions
  bool discard{true};                   // discard and unmapping write zeroes reach the file
  std::uint64_t null_size_bytes{0};     // kNull only
  // kQcow2 only; 0: as qcow2_node.h says. For each image of a chain of backing files.
  std::uint64_t l2_cache_bytes{0};
  std::uint64_t refcount_cache_bytes{0};
  // kQcow2, read_only only: the disk as it was in this internal snapshot
  // (qcow2/snapshots.h, header_of_snapshot()).
  std::string snapshot;
  bool may_be_empty{false};  // kQcow2: a disk of no bytes is opened too, to be given some
  // Without it others may write the image meanwhile, and what is read may be anything.
  bool lock{true};
  bool is_locked{false};  // by the caller, the image itself: what it is based on is locked here
};

}  // namespace vblk::blockdev
