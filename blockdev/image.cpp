#include "blockdev/image.h"

#include <array>
#include <utility>

#include <fmt/core.h>

#include "blockdev/image_file.h"
#include "blockdev/log.h"
#include "blockdev/null_node.h"
#include "blockdev/raw_node.h"

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

Expected<ImageFormat> parse_image_format(std::string_view text) {
  if (text == "raw") return ImageFormat::kRaw;
  if (text == "null") return ImageFormat::kNull;
  return make_error(ErrorKind::kInvalidArgument,
                    fmt::format("--format: unknown format '{}'; there are raw and null", text));
}

Expected<std::unique_ptr<BlockNode>> open_image(const ImageOptions& options) {
  if (options.format == ImageFormat::kNull) {
    auto node = NullNode::create(options.null_size_bytes, options.read_only);
    if (!node) return std::unexpected(std::move(node.error()));
    return std::unique_ptr<BlockNode>(std::move(*node));
  }
  auto file = ImageFile::open(options);
  if (!file) return std::unexpected(std::move(file.error()));
  const bool ignores_flush = options.cache == CacheMode::kUnsafe;
  if (ignores_flush) {
    log::warning(
        "'{}': --cache unsafe ignores flushes; what the guest has written is lost if the host "
        "stops",
        options.path);
  }
  return std::make_unique<RawNode>(std::move(*file), RawNodeOptions{.name = options.path,
                                                                    .discard = options.discard,
                                                                    .ignore_flush = ignores_flush});
}

}  // namespace vblk::blockdev
