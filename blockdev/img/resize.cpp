// `vblk img resize`.
#include "blockdev/img/resize.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <fcntl.h>
#include <optional>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/block_io.h"
#include "blockdev/image_lock.h"
#include "blockdev/img/arguments.h"
#include "blockdev/img/command.h"
#include "blockdev/img/create_options.h"
#include "blockdev/img/engines.h"
#include "blockdev/img/kept_bitmaps.h"
#include "blockdev/img/output.h"
#include "blockdev/img/source.h"

namespace vblk::img {

namespace {

constexpr std::uint64_t kZeroBytesPerWrite = std::uint64_t{1} << 20;

// "+1G", "-512k", "10G".
struct NewSize {
  int sign{0};  // of a change; 0: the size itself
  std::uint64_t bytes{0};

  [[nodiscard]] std::optional<std::uint64_t> of(std::uint64_t old_bytes) const {
    if (sign == 0) return bytes;
    if (sign < 0 && bytes > old_bytes) return std::nullopt;
    return sign > 0 ? old_bytes + bytes : old_bytes - bytes;
  }
};

Expected<NewSize> parse_new_size(std::string_view text) {
  NewSize size;
  if (text.starts_with('+') || text.starts_with('-')) {
    size.sign = text.front() == '+' ? 1 : -1;
    text.remove_prefix(1);
  }
  const auto bytes = parse_size(text, "the new size");
  if (!bytes) return std::unexpected(bytes.error());
  size.bytes = *bytes;
  return size;
}

std::unexpected<Error> failed(const std::string& path, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot change the size of '{}': {}", path, describe_errno(error)),
                    error);
}

// A file as it is: any size, also none.
class RawFile {
 public:
  static Expected<RawFile> open(const std::string& path) {
    RawFile file;
    file.fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK);
    struct stat status{};
    if (file.fd_ < 0 || ::fstat(file.fd_, &status) != 0) return failed(path, errno);
    if (!S_ISREG(status.st_mode)) {
      return make_error(ErrorKind::kNotSupported,
                        fmt::format("'{}' is no regular file and has the size that it has", path));
    }
    if (auto locked = blockdev::lock_image(file.fd_, path, false); !locked)
      return std::unexpected(std::move(locked.error()));
    file.bytes_ = static_cast<std::uint64_t>(status.st_size);
    return file;
  }
  RawFile(RawFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)), bytes_(other.bytes_) {}
  RawFile(const RawFile&) = delete;
  RawFile& operator=(const RawFile&) = delete;
  RawFile& operator=(RawFile&&) = delete;
  ~RawFile() {
    if (fd_ >= 0) ::close(fd_);
  }

  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  // 0, or an errno value.
  [[nodiscard]] int resize(std::uint64_t bytes, Preallocation mode) const {
    if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0) return errno;
    if (mode == Preallocation::kFalloc &&
        ::fallocate(fd_, 0, static_cast<off_t>(bytes_), static_cast<off_t>(bytes - bytes_)) != 0) {
      const int error = errno;
      // As it was: what has been promised is not there.
      [[maybe_unused]] const int undone = ::ftruncate(fd_, static_cast<off_t>(bytes_));
      return error;
    }
    if (mode == Preallocation::kFull) {
      const std::vector<char> zeroes(kZeroBytesPerWrite);
      for (std::uint64_t at = bytes_; at < bytes;) {
        const std::size_t length = std::min<std::uint64_t>(zeroes.size(), bytes - at);
        const ssize_t count = ::pwrite(fd_, zeroes.data(), length, static_cast<off_t>(at));
        if (count < 0 && errno != EINTR) {
          const int error = errno;
          [[maybe_unused]] const int undone = ::ftruncate(fd_, static_cast<off_t>(bytes_));
          return error;
        }
        if (count > 0) at += static_cast<std::uint64_t>(count);
      }
    }
    return ::fsync(fd_) == 0 ? 0 : errno;
  }

 private:
  RawFile() = default;
  int fd_{-1};
  std::uint64_t bytes_{0};
};

struct ResizeOptions {
  NewSize size;
  bool may_shrink{false};
  Preallocation preallocation{Preallocation::kOff};
};

// The size that a disk of `old_bytes` is to have.
Expected<std::uint64_t> decide_size(const ResizeOptions& options, std::uint64_t old_bytes) {
  const auto bytes = options.size.of(old_bytes);
  if (!bytes || *bytes == 0) {
    return make_error(ErrorKind::kInvalidArgument, "the new size must be more than 0");
  }
  if (*bytes < old_bytes && !options.may_shrink) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("{} bytes are fewer than the {} that the disk has, and what is "
                                  "beyond them would be lost: say --shrink if it may be",
                                  *bytes, old_bytes));
  }
  if (*bytes <= old_bytes && options.preallocation != Preallocation::kOff)
    return make_error(ErrorKind::kInvalidArgument, "preallocation is for what a disk grows by");
  return *bytes;
}

Expected<void> resize_raw(const std::string& path, const ResizeOptions& options) {
  if (options.preallocation == Preallocation::kMetadata) {
    return make_error(ErrorKind::kNotSupported,
                      "a raw image has no metadata to be preallocated; use off, falloc or full");
  }
  const auto file = RawFile::open(path);
  if (!file) return std::unexpected(file.error());
  // As the disk is seen: in whole sectors.
  const std::uint64_t old_bytes = (file->bytes() + blockdev::kSectorBytes - 1) /
                                  blockdev::kSectorBytes * blockdev::kSectorBytes;
  const auto bytes = decide_size(options, old_bytes);
  if (!bytes) return std::unexpected(bytes.error());
  const int error = file->resize(*bytes, options.preallocation);
  if (error != 0) return failed(path, error);
  return {};
}

Task<int> write_zeroes(BlockNode& node, IoContext& context, std::uint64_t at, std::uint64_t end) {
  blockdev::AlignedBuffer zeroes(kZeroBytesPerWrite);
  std::ranges::fill(zeroes.bytes(), std::byte{0});
  while (at < end) {
    const std::uint64_t length = std::min(kZeroBytesPerWrite, end - at);
    const int error = co_await blockdev::BlockIo(node, context, blockdev::BlockOperation::kWrite,
                                                 at, zeroes.bytes().first(length));
    if (error != 0) co_return error;
    at += length;
  }
  co_return 0;
}

Expected<void> resize_to(BlockNode& node, IoContext& context, std::uint64_t bytes) {
  Expected<void> resized;
  node.resize(bytes, context, [&resized](Expected<void> result) { resized = std::move(result); });
  context.drain();
  return resized;
}

// Space for what a file has become longer by: nobody else is told where there is none
// (BlockNode::allocate()).
class FileSpace {
 public:
  explicit FileSpace(const std::string& path) : fd_(::open(path.c_str(), O_RDWR | O_CLOEXEC)) {
    if (fd_ >= 0) begin_ = end();
  }
  ~FileSpace() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileSpace(const FileSpace&) = delete;
  FileSpace& operator=(const FileSpace&) = delete;

  // 0, or an errno value.
  [[nodiscard]] int take() const {
    const off_t now = end();
    if (now <= begin_) return 0;
    return ::fallocate(fd_, 0, begin_, now - begin_) == 0 ? 0 : errno;
  }

 private:
  // 0: of a block device, which has its space.
  [[nodiscard]] off_t end() const {
    struct stat status{};
    return ::fstat(fd_, &status) == 0 && S_ISREG(status.st_mode) ? status.st_size : 0;
  }

  const int fd_;
  off_t begin_{0};
};

// What a disk has got gets its space, too.
Task<int> preallocate(BlockNode& node, IoContext& context, Preallocation mode, std::uint64_t at) {
  const std::uint64_t end = node.size_bytes();
  int error = 0;
  if (mode == Preallocation::kFull) {
    error = co_await write_zeroes(node, context, at, end);
  } else if (mode != Preallocation::kOff) {
    error = co_await node.allocate(context, at, end - at, mode == Preallocation::kFalloc);
  }
  if (error == 0)
    error = co_await blockdev::BlockIo(node, context, blockdev::BlockOperation::kFlush, 0, 0);
  co_return error;
}

Expected<void> resize_disk(const SourceOptions& source_options, const ResizeOptions& options) {
  auto source = open_source(source_options);
  if (!source) return std::unexpected(std::move(source.error()));
  BlockNode& node = *source->node;
  const std::uint64_t old_bytes = node.size_bytes();
  const auto bytes = decide_size(options, old_bytes);
  if (!bytes) return std::unexpected(bytes.error());
  const auto own = make_context();
  if (!own) return std::unexpected(own.error());
  IoContext& context = (*own)->context();
  const FileSpace file_space(source_options.path);
  node.attach(context);
  auto resized = resize_to(node, context, *bytes);
  if (resized && options.preallocation != Preallocation::kOff) {
    int error = (*own)->run(preallocate(node, context, options.preallocation, old_bytes));
    if (error == 0 && options.preallocation == Preallocation::kFalloc) error = file_space.take();
    if (error != 0) {
      resized = failed(source_options.path, error);
      // As it was: what has been promised is not there.
      if (old_bytes > 0) static_cast<void>(resize_to(node, context, old_bytes));
    }
  }
  node.detach(context);
  return resized;
}

Expected<void> resize_qcow2(const std::string& path, const ResizeOptions& options) {
  SourceOptions source_options{
      .path = path, .format = "qcow2", .read_only = false, .may_be_empty = true};
  std::uint64_t old_bytes = 0;
  {
    const auto file = open_file(source_options);
    if (!file) return std::unexpected(file.error());
    if (!*file) {
      return make_error(ErrorKind::kInvalidArgument,
                        fmt::format("'{}' is not a qcow2 image: it is empty", path));
    }
    const auto header = read_header(**file);
    if (!header) return std::unexpected(header.error());
    old_bytes = header->size_bytes;
  }
  const auto bytes = decide_size(options, old_bytes);
  if (!bytes) return std::unexpected(bytes.error());
  // Whoever opens it for writing does not keep its bitmaps.
  if (*bytes == old_bytes) return {};
  KeptBitmaps bitmaps(path);
  if (auto taken = bitmaps.take_out("qcow2", *bytes, false); !taken) return taken;
  source_options.is_locked = bitmaps.has_locked();
  // As they were, where the disk could not be resized.
  return bitmaps.put_in(resize_disk(source_options, options));
}

}  // namespace

Expected<void> resize_qcow2(const std::string& path, std::uint64_t size_bytes) {
  return resize_qcow2(path, ResizeOptions{.size = {.bytes = size_bytes}, .may_shrink = true});
}

Expected<void> grow_empty_disk(const std::string& path, const std::string& format,
                               std::uint64_t size_bytes) {
  const ResizeOptions options{.size = {.bytes = size_bytes}};
  return format == "raw" ? resize_raw(path, options) : resize_qcow2(path, options);
}

Expected<void> can_resize_qcow2(const std::string& path, const qcow2::Header& header,
                                std::uint64_t size_bytes) {
  if (size_bytes % blockdev::kSectorBytes != 0) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("a disk cannot have {} bytes; give a multiple of {}", size_bytes,
                                  blockdev::kSectorBytes));
  }
  const qcow2::Geometry& geometry = header.geometry;
  if ((geometry.l1_index(size_bytes - 1) + 1) * 8 > qcow2::kL1BytesMax) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("a disk of {} bytes is too large for clusters of {} bytes",
                                  size_bytes, geometry.cluster_bytes()));
  }
  if (header.version < 3 && header.snapshot_count > 0) {
    return make_error(ErrorKind::kNotSupported,
                      fmt::format("'{}' has snapshots, which in version 2 have the size of the "
                                  "disk; compat=1.1 makes it version 3",
                                  path));
  }
  return {};
}

int resize_command(std::span<const std::string> words) {
  // The last word is the size, which may begin with a minus.
  if (words.empty()) return fail("give an image and its new size; see vblk img --help");
  constexpr std::array<std::string_view, 6> kOptions{
      "f:", "q", "preallocation:", "shrink", "object:!", "image-opts1"};
  const std::string& size_text = words.back();
  const auto size = parse_new_size(size_text);
  // As qemu-img does, a word that is no size is not looked for elsewhere.
  auto arguments = Arguments::parse(words.first(words.size() - 1), kOptions);
  if (!arguments) return fail(arguments.error().message);
  if (arguments->names().size() != 1)
    return fail("give an image and, as the last word, its new size; see vblk img --help");
  if (!size) return fail(size.error().message);
  ResizeOptions options{.size = *size, .may_shrink = arguments->has("shrink")};
  const auto preallocation = parse_preallocation(arguments->value_or("preallocation", "off"));
  if (!preallocation) return fail(preallocation.error().message);
  options.preallocation = *preallocation;
  const std::string& path = arguments->names()[0];
  const auto format = decide_format(path, arguments->value_or("f", ""));
  if (!format) return fail(format.error().message);
  if (*format == "raw" && !arguments->has("f")) {
    warn("vblk img: warning: '{}' is taken as raw by its first bytes; -f raw says it\n", path);
  }
  auto resized = *format == "raw" ? resize_raw(path, options) : resize_qcow2(path, options);
  if (!resized) return fail(resized.error().message);
  if (!arguments->has("q")) say("Image resized.\n");
  return 0;
}

}  // namespace vblk::img
