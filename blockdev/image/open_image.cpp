#include "blockdev/image/open_image.h"

#include <algorithm>
#include <filesystem>
#include <string>
#include <sys/stat.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "aio/engine_set.h"
#include "blockdev/image/format_probe.h"
#include "blockdev/image_file.h"
#include "blockdev/log.h"
#include "blockdev/null_node.h"
#include "blockdev/private_context.h"
#include "blockdev/qcow2/qcow2_node.h"
#include "blockdev/qcow2/snapshots.h"
#include "blockdev/raw_node.h"

namespace vblk::blockdev {

namespace {

Expected<std::unique_ptr<PrivateContext>> make_private_context() {
  auto engines = aio::EngineSet::create(aio::AioSelection{}, aio::EngineOptions{});
  if (!engines) return std::unexpected(std::move(engines.error()));
  return std::make_unique<PrivateContext>(std::move(*engines));
}

// Files of a chain by what they are, however they are named.
struct FileIdentity {
  dev_t device;
  ino_t inode;
  bool operator==(const FileIdentity&) const = default;
};

FileIdentity identity_of(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) return {};
  if (S_ISBLK(status.st_mode)) return {.device = status.st_rdev, .inode = 0};
  return {.device = status.st_dev, .inode = status.st_ino};
}

GroupCommitPolicy group_commit(const ImageOptions& options) {
  return options.share_flushes ? GroupCommitPolicy::adaptive() : GroupCommitPolicy::never();
}

class Opener {
 public:
  Expected<std::unique_ptr<BlockNode>> open(const ImageOptions& options);
  static Expected<DiskShape> look_at(const ImageOptions& options);

 private:
  static Expected<std::unique_ptr<RawNode>> open_raw(const ImageOptions& options,
                                                     bool holds_format);
  Expected<std::unique_ptr<BlockNode>> open_qcow2(const ImageOptions& options);
  Expected<std::unique_ptr<BlockNode>> open_backing(const ImageOptions& options,
                                                    const qcow2::Header& header);
  Expected<std::unique_ptr<RawNode>> open_data_file(const ImageOptions& options,
                                                    const qcow2::Header& header) const;

  std::vector<FileIdentity> chain_;
  bool error_names_link_{false};  // whose backing file could not be opened is told
};

// Names in headers are anybody's: in messages they hold nothing that a terminal would act on.
std::string printable(std::string text) {
  std::ranges::replace_if(text, [](char c) { return (c >= 0 && c < ' ') || c == '\x7f'; }, '?');
  return text;
}

// A name in a header is relative to the folder of the image whose header it is.
Expected<std::string> resolve(const std::string& image, const std::string& name, const char* what) {
  if (name.starts_with("json:"))
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("image '{}' names its {} by a 'json:' description, which is not "
                                  "supported; give it a path with 'vblk img rebase -u'",
                                  image, what));
  std::string path = name.starts_with("file:") ? name.substr(5) : name;
  // QEMU's protocols: a colon before the first slash.
  const std::size_t colon = path.find(':');
  if (colon != std::string::npos && colon < path.find('/') && !name.starts_with("file:"))
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("the {} '{}' of image '{}' is not a file; only files and block devices are "
                    "supported",
                    what, name, image));
  if (path.starts_with('/')) return path;
  return (std::filesystem::path(image).parent_path() / path).string();
}

Expected<std::unique_ptr<RawNode>> Opener::open_raw(const ImageOptions& options,
                                                    bool holds_format) {
  ImageOptions file_options = options;
  file_options.lock = options.lock && !options.is_locked;
  auto file = ImageFile::open(file_options);
  if (!file) return std::unexpected(std::move(file.error()));
  return std::make_unique<RawNode>(
      std::move(*file), RawNodeOptions{.name = printable(options.path),
                                       .discard = options.discard,
                                       .ignore_flush = options.cache == CacheMode::kUnsafe,
                                       .share_flushes = options.share_flushes,
                                       // Of a format, its own flushes wait, and once is enough.
                                       .group_commit = holds_format ? GroupCommitPolicy::never()
                                                                    : group_commit(options),
                                       .write_behind_bytes = options.write_behind_bytes,
                                       .holds_format = holds_format});
}

Expected<std::unique_ptr<BlockNode>> Opener::open_backing(const ImageOptions& options,
                                                          const qcow2::Header& header) {
  const auto path = resolve(options.path, header.backing_file, "backing file");
  if (!path) return std::unexpected(path.error());
  if (header.backing_format.empty()) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format(
            "image '{0}' does not say of what format its backing file '{1}' is, and guessing "
            "would be unsafe; record it with 'vblk img rebase -u -F FORMAT -b {1} {0}'",
            options.path, header.backing_file));
  }
  ImageOptions backing = options;
  backing.path = *path;
  backing.read_only = true;
  backing.write_behind_bytes = 0;
  backing.snapshot.clear();
  backing.may_be_empty = true;  // then it backs nothing
  backing.is_locked = false;
  if (header.backing_format == "raw") {
    backing.format = ImageFormat::kRaw;
  } else if (header.backing_format == "qcow2") {
    backing.format = ImageFormat::kQcow2;
  } else {
    const std::string format = header.backing_format.substr(0, 32);
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("the backing file '{}' of image '{}' is of format '{}'; raw and "
                                  "qcow2 are supported",
                                  header.backing_file, options.path, format));
  }
  if (backing.format == ImageFormat::kRaw && is_empty_file(backing.path)) return nullptr;
  auto node = open(backing);
  // Of a long chain the message names the last link, and not all that lead there.
  if (node || std::exchange(error_names_link_, true)) return node;
  Error error = std::move(node.error());
  error.message = fmt::format("the backing file of '{}': {}", options.path, error.message);
  return std::unexpected(std::move(error));
}

Expected<std::unique_ptr<RawNode>> Opener::open_data_file(const ImageOptions& options,
                                                          const qcow2::Header& header) const {
  if (header.data_file.empty()) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("image '{}' does not name its external data file; record it with "
                                  "'vblk img amend -o data_file=PATH {}'",
                                  options.path, options.path));
  }
  const auto path = resolve(options.path, header.data_file, "external data file");
  if (!path) return std::unexpected(path.error());
  if (std::ranges::find(chain_, identity_of(*path)) != chain_.end()) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("the external data file '{}' of '{}' is an image of its chain, or "
                    "the image itself",
                    header.data_file, options.path));
  }
  ImageOptions data = options;
  data.path = *path;
  data.format = ImageFormat::kRaw;
  data.is_locked = false;
  auto node = open_raw(data, true);
  if (!node) {
    Error error = std::move(node.error());
    error.message = fmt::format("the external data file of '{}': {}", options.path, error.message);
    return std::unexpected(std::move(error));
  }
  const int error = options.read_only ? 0 : (*node)->grow(header.size_bytes);
  if (error != 0) {
    return make_error(
        kind_of_errno(error),
        fmt::format("the external data file '{}' of '{}' is shorter than the disk and "
                    "cannot be made longer: {}",
                    *path, options.path, describe_errno(error)),
        error);
  }
  return std::move(*node);
}

Expected<std::unique_ptr<BlockNode>> Opener::open_qcow2(const ImageOptions& options) {
  // Write-behind is for data, and in a file that holds a format that is all over the place; the
  // windows take any range.
  auto file = open_raw(options, true);
  if (!file) return std::unexpected(std::move(file.error()));
  auto header = qcow2::read_header(**file, make_private_context);
  if (!header) return std::unexpected(std::move(header.error()));
  if (!options.snapshot.empty()) {
    header = qcow2::header_of_snapshot(**file, *header, options.snapshot, make_private_context);
    if (!header) return std::unexpected(std::move(header.error()));
  }
  std::unique_ptr<RawNode> data_file;
  if (header->has_data_file()) {
    auto opened = open_data_file(options, *header);
    if (!opened) return std::unexpected(std::move(opened.error()));
    data_file = std::move(*opened);
  }
  std::unique_ptr<BlockNode> backing;
  if (!header->backing_file.empty()) {
    auto opened = open_backing(options, *header);
    if (!opened) return opened;
    backing = std::move(*opened);
  }
  auto node = qcow2::Qcow2Node::open({.file = std::move(*file),
                                      .data_file = std::move(data_file),
                                      .backing = std::move(backing),
                                      .header = std::move(*header)},
                                     {.read_only = options.read_only,
                                      .discard = options.discard,
                                      .group_commit = group_commit(options),
                                      .may_be_empty = options.may_be_empty,
                                      .l2_cache_bytes = options.l2_cache_bytes,
                                      .refcount_cache_bytes = options.refcount_cache_bytes},
                                     make_private_context);
  if (!node) return std::unexpected(std::move(node.error()));
  return std::unique_ptr<BlockNode>(std::move(*node));
}

Expected<std::unique_ptr<BlockNode>> Opener::open(const ImageOptions& options) {
  if (options.format == ImageFormat::kNull) {
    auto node = NullNode::create(options.null_size_bytes, options.read_only);
    if (!node) return std::unexpected(std::move(node.error()));
    return std::unique_ptr<BlockNode>(std::move(*node));
  }
  const FileIdentity identity = identity_of(options.path);
  if (chain_.size() >= kBackingChainMax || std::ranges::find(chain_, identity) != chain_.end()) {
    return make_error(
        ErrorKind::kInvalidArgument,
        chain_.size() >= kBackingChainMax
            ? fmt::format("'{}' would be number {} in a chain of backing files; {} are supported",
                          options.path, chain_.size() + 1, kBackingChainMax)
            : fmt::format("'{}' is its own backing file, directly or by others", options.path));
  }
  chain_.push_back(identity);
  if (options.format == ImageFormat::kQcow2) return open_qcow2(options);
  auto node = open_raw(options, false);
  if (!node) return std::unexpected(std::move(node.error()));
  return std::unique_ptr<BlockNode>(std::move(*node));
}

Expected<DiskShape> Opener::look_at(const ImageOptions& options) {
  if (options.format == ImageFormat::kNull) {
    return make_error(ErrorKind::kInvalidArgument,
                      "the null disk keeps nothing that could be handed over");
  }
  const bool holds_format = options.format == ImageFormat::kQcow2;
  auto file = open_raw(options, holds_format);
  if (!file) return std::unexpected(std::move(file.error()));
  DiskShape shape{
      .size_bytes = (*file)->size_bytes(), .limits = (*file)->limits(), .name = (*file)->name()};
  if (holds_format) {
    const auto header = qcow2::read_header(**file, make_private_context);
    if (!header) return std::unexpected(header.error());
    shape.size_bytes = header->size_bytes;
  }
  return shape;
}

// Without a format the name decides, which the guest cannot change. What the file looks like only
// asks for a decision. LUKS may be the guest's own, on the whole of its disk.
Expected<ImageFormat> format_by_name(const ImageOptions& options) {
  if (options.path.ends_with(".qcow2")) return ImageFormat::kQcow2;
  const std::string_view found = probe_format(options.path).value_or("");
  if (found.empty() || found == "luks") return ImageFormat::kRaw;
  if (found == "qcow2") {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' looks like a qcow2 image, though its name does not end in "
                                  "'.qcow2'; say --format qcow2, or --format raw if the guest is "
                                  "to see the file itself",
                                  options.path));
  }
  return make_error(ErrorKind::kNotSupported,
                    fmt::format("'{}' looks like an image of format {}; raw and qcow2 are "
                                "supported, and --format raw is for a guest that is to see the "
                                "file itself",
                                options.path, found));
}

Expected<ImageFormat> decide_format(const ImageOptions& options) {
  return options.format == ImageFormat::kByName ? format_by_name(options) : options.format;
}

}  // namespace

Expected<std::unique_ptr<BlockNode>> open_image(const ImageOptions& options) {
  const auto format = decide_format(options);
  if (!format) return std::unexpected(format.error());
  ImageOptions decided = options;
  decided.format = *format;
  if (options.cache == CacheMode::kUnsafe && decided.format != ImageFormat::kNull) {
    log::warning(
        "'{}': --cache unsafe ignores flushes; what the guest has written is lost if the host "
        "stops",
        options.path);
  }
  auto node = Opener().open(decided);
  if (!node) node.error().message = printable(std::move(node.error().message));
  return node;
}

Expected<DiskShape> look_at_image(const ImageOptions& options) {
  const auto format = decide_format(options);
  if (!format) return std::unexpected(format.error());
  ImageOptions looked_at = options;
  looked_at.format = *format;
  looked_at.lock = false;
  looked_at.read_only = true;
  looked_at.write_behind_bytes = 0;
  auto shape = Opener::look_at(looked_at);
  if (!shape) {
    shape.error().message = printable(std::move(shape.error().message));
    return shape;
  }
  // What both formats can do on a file that may be written.
  const bool can_free = options.discard && !options.read_only;
  shape->limits.read_only = options.read_only;
  shape->limits.can_discard = can_free;
  shape->limits.can_write_zeroes = !options.read_only;
  shape->limits.write_zeroes_may_unmap = can_free;
  return shape;
}

}  // namespace vblk::blockdev
