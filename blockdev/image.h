// Opening an image: the one factory that turns the user's options into a node.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "aio/error.h"
#include "blockdev/block_node.h"

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

enum class ImageFormat : std::uint8_t { kRaw, kNull };
Expected<ImageFormat> parse_image_format(std::string_view text);

struct ImageOptions {
  std::string path;  // ignored by the null format
  ImageFormat format{ImageFormat::kRaw};
  CacheMode cache{CacheMode::kNone};
  bool read_only{false};
  bool discard{true};                // discard and unmapping write zeroes reach the file
  std::uint64_t null_size_bytes{0};  // kNull only
};

// Opens, locks and measures the image. The node holds the file and its locks until it is destroyed.
// Errors: kNotFound, kPermission, kBusy (locked by another process: names the file), kNotSupported
// (a directory, a character device, a file system without O_DIRECT), kInvalidArgument (empty).
Expected<std::unique_ptr<BlockNode>> open_image(const ImageOptions& options);

}  // namespace vblk::blockdev
