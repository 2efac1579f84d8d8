#include "blockdev/img/source.h"

#include <algorithm>
#include <optional>
#include <span>
#include <sys/stat.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/image/format_probe.h"
#include "blockdev/image/open_image.h"
#include "blockdev/image_file.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/names.h"
#include "blockdev/qcow2/qcow2_node.h"

namespace vblk::img {

namespace {

// Stretches of data that are worth remembering: those that are asked for again and again.
constexpr std::uint64_t kLongBytes = std::uint64_t{4} << 20;

blockdev::ImageOptions image_options(const SourceOptions& options) {
  return {.path = options.path,
          .format = options.format == "qcow2" ? blockdev::ImageFormat::kQcow2
                                              : blockdev::ImageFormat::kRaw,
          .cache = options.cache,
          .read_only = options.read_only,
          .snapshot = options.snapshot,
          .may_be_empty = options.may_be_empty,
          .lock = options.lock,
          .is_locked = options.is_locked};
}

}  // namespace

Expected<std::string> decide_format(const std::string& path, const std::string& format) {
  if (format == "raw" || format == "qcow2") return format;
  if (!format.empty()) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("format '{}' is not known here; raw and qcow2 are supported", format));
  }
  const auto found = blockdev::probe_format(path);
  if (!found) return std::unexpected(found.error());
  if (*found == "qcow2") return "qcow2";
  if (!found->empty()) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("'{}' looks like an image of format {}; raw and qcow2 are supported, and -f "
                    "raw takes the file as it is",
                    path, *found));
  }
  return "raw";
}

Expected<std::unique_ptr<blockdev::RawNode>> open_file(const SourceOptions& options) {
  if (blockdev::is_empty_file(options.path)) return nullptr;
  auto file = blockdev::ImageFile::open(image_options(options));
  if (!file) return std::unexpected(std::move(file.error()));
  return std::make_unique<blockdev::RawNode>(
      std::move(*file), blockdev::RawNodeOptions{.name = options.path, .holds_format = true});
}

Expected<qcow2::Header> read_header(blockdev::RawNode& file) {
  return qcow2::read_header(file, make_context);
}

Expected<qcow2::Header> header_of(const std::string& path, bool lock) {
  const auto file = open_file({.path = path, .format = "qcow2", .lock = lock});
  if (!file) return std::unexpected(file.error());
  if (!*file)
    return make_error(ErrorKind::kInvalidArgument, fmt::format("'{}' is no qcow2 image", path));
  return read_header(**file);
}

Expected<Source> open_source(const SourceOptions& options) {
  const auto format = decide_format(options.path, options.format);
  if (!format) return std::unexpected(format.error());
  Source source{.path = options.path, .format = *format, .node = nullptr};
  SourceOptions decided = options;
  decided.format = *format;
  if (*format == "raw" && !options.snapshot.empty()) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("'{}' is raw and has no snapshots", options.path));
  }
  if (blockdev::is_empty_file(options.path)) {
    if (*format == "raw") return source;
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is not a qcow2 image: it is empty", options.path));
  }
  if (*format == "qcow2" && options.snapshot.empty() && !options.may_be_empty) {
    // A disk of no bytes has a header and nothing else.
    SourceOptions looking = decided;
    looking.read_only = true;
    looking.lock = false;
    const auto file = open_file(looking);
    if (!file) return std::unexpected(file.error());
    const auto header = read_header(**file);
    if (!header) return std::unexpected(header.error());
    if (header->size_bytes == 0) return source;
  }
  auto node = blockdev::open_image(image_options(decided));
  if (!node) return std::unexpected(std::move(node.error()));
  source.node = std::move(*node);
  return source;
}

bool is_same_file(const std::string& one, const std::string& other) {
  struct stat a{};
  struct stat b{};
  if (::stat(one.c_str(), &a) != 0 || ::stat(other.c_str(), &b) != 0) return false;
  if (S_ISBLK(a.st_mode) && S_ISBLK(b.st_mode)) return a.st_rdev == b.st_rdev;
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

Expected<void> check_target_is_apart(const Source& source, const std::string& target) {
  if (is_same_file(source.path, target)) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is the source and the target", source.path));
  }
  struct stat status{};
  if (::stat(target.c_str(), &status) != 0) return {};
  const auto refuse = [&target] {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is the target, and the source is based on it", target));
  };
  const BlockNode* node = source.node ? source.node->backing_node() : nullptr;
  for (; node != nullptr; node = node->backing_node()) {
    if (is_same_file(node->name(), target)) return refuse();
  }
  // Data files, which no node tells of. What is opened has a chain that ends.
  std::string path = source.path;
  std::string format = source.format;
  while (format == "qcow2") {
    const auto header = header_of(path, false);
    if (!header) return std::unexpected(header.error());
    if (!header->data_file.empty() && is_same_file(resolve_name(path, header->data_file), target))
      return refuse();
    format = header->backing_format;
    path = resolve_name(path, header->backing_file);
    if (header->backing_file.empty()) break;
  }
  return {};
}

Expected<blockdev::CacheMode> parse_cache(const std::string& text, blockdev::CacheMode otherwise) {
  if (text.empty()) return otherwise;
  return blockdev::parse_cache_mode(text);
}

Task<int> chain_status(BlockNode& top, IoContext& context, std::uint64_t offset,
                       std::uint64_t length, unsigned depth_max, ChainStatus& status) {
  using Kind = blockdev::RangeStatus::Kind;
  status = {};
  BlockNode* node = &top;
  for (unsigned depth = 0;; ++depth) {
    blockdev::RangeStatus found;
    const int error = co_await node->range_status(context, offset, length, found);
    if (error != 0) co_return error;
    BlockNode* const backing = node->backing_node();
    length = found.length_bytes;
    status.length_bytes = length;
    status.depth = depth;
    status.file_offset = found.file_offset;
    status.file = found.file;
    status.fd = found.fd;
    if (found.kind != Kind::kBacking) {
      status.is_present = true;
      status.is_data = found.kind == Kind::kData;
      status.is_zero = found.kind == Kind::kZero;
      status.is_compressed = status.is_data && !found.file_offset;
      co_return 0;
    }
    if (backing == nullptr || offset >= backing->size_bytes()) {
      status.is_zero = true;
      co_return 0;
    }
    if (depth >= depth_max) co_return 0;
    length = std::min(length, backing->size_bytes() - offset);
    status.length_bytes = length;
    node = backing;
  }
}

Task<int> StatusReader::read(IoContext& context, std::uint64_t offset, std::uint64_t length,
                             ChainStatus& status) {
  status = {.is_zero = true, .length_bytes = length};
  if (top_ == nullptr) co_return 0;
  {
    const std::lock_guard lock(mutex_);
    if (offset >= begin_ && offset - begin_ < data_.length_bytes) {
      status = data_;
      status.length_bytes = std::min(length, data_.length_bytes - (offset - begin_));
      co_return 0;
    }
  }
  // As far as the disk goes.
  const int error = co_await chain_status(*top_, context, offset, top_->size_bytes() - offset,
                                          depth_max_, status);
  if (error != 0) co_return error;
  status.file_offset.reset();
  status.file = nullptr;
  if (status.is_data && status.length_bytes >= kLongBytes) {
    const std::lock_guard lock(mutex_);
    begin_ = offset;
    data_ = status;
  }
  status.length_bytes = std::min(length, status.length_bytes);
  co_return 0;
}

}  // namespace vblk::img
