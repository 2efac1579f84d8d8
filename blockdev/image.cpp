#include "blockdev/image.h"

#include <array>
#include <string>

#include <fmt/core.h>

#include "blockdev/byte_size.h"

namespace vblk::blockdev {

namespace {

struct CacheModeTraits {
  CacheMode mode;
  std::string_view name;
  bool direct_io;
  bool write_cache;
};

// Indexed by CacheMode. qemu-system-x86_64(1), "-drive", cache=.
constexpr std::array kCacheModes{
    CacheModeTraits{CacheMode::kNone, "none", true, true},
    CacheModeTraits{CacheMode::kWriteback, "writeback", false, true},
    CacheModeTraits{CacheMode::kWritethrough, "writethrough", false, false},
    CacheModeTraits{CacheMode::kDirectsync, "directsync", true, false},
    CacheModeTraits{CacheMode::kUnsafe, "unsafe", false, true},
};

const CacheModeTraits& traits(CacheMode mode) {
  return kCacheModes[static_cast<std::size_t>(mode)];
}

}  // namespace

Expected<CacheMode> parse_cache_mode(std::string_view text) {
  for (const auto& known : kCacheModes) {
    if (known.name == text) return known.mode;
  }
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("--cache: unknown mode '{}'; there are none, writeback, "
                                "writethrough, directsync and unsafe",
                                text));
}

std::string_view to_string(CacheMode mode) { return traits(mode).name; }
bool uses_direct_io(CacheMode mode) { return traits(mode).direct_io; }
bool has_write_cache(CacheMode mode) { return traits(mode).write_cache; }

Expected<std::uint64_t> parse_write_behind(std::string_view text, CacheMode cache) {
  constexpr std::uint64_t kMin = std::uint64_t{64} << 10;
  constexpr std::uint64_t kMax = std::uint64_t{1} << 30;
  const auto size = parse_byte_size(std::string(text));
  if (!size) return size;
  if (*size < kMin || *size > kMax)
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("--write-behind {}: use 64K to 1G", text));
  if (cache != CacheMode::kWriteback) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("--write-behind is for --cache writeback: with --cache {} {}", to_string(cache),
                    cache == CacheMode::kUnsafe ? "no flush waits for the disk"
                                                : "no written data waits in memory"));
  }
  return size;
}

Expected<ImageFormat> parse_image_format(std::string_view text) {
  if (text == "raw") return ImageFormat::kRaw;
  if (text == "qcow2") return ImageFormat::kQcow2;
  if (text == "null") return ImageFormat::kNull;
  return make_error(
      ErrorKind::kInvalidArgument,
      fmt::format("--format: unknown format '{}'; there are raw, qcow2 and null", text));
}

}  // namespace vblk::blockdev
