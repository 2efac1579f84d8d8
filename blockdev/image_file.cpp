#include "blockdev/image_file.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <fcntl.h>
#include <limits>
#include <linux/fs.h>
#include <linux/stat.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/image_lock.h"

namespace vblk::blockdev {

namespace {

// statx(2), STATX_DIOALIGN, Linux 6.1: newer than Debian 12's headers. The two fields follow
// `stx_mnt_id`.
constexpr unsigned kStatxDioAlign = 0x2000;
constexpr std::size_t kStatxDioMemoryAlignOffset = 0x98;
constexpr std::size_t kStatxDioOffsetAlignOffset = 0x9c;
constexpr std::size_t kStatxBytes = 0x100;
static_assert(offsetof(struct statx, stx_mnt_id) == 0x90, "the kernel's struct statx");

// What every file system with O_DIRECT takes, where the kernel does not tell.
constexpr std::uint32_t kSafeAlignment = 4096;

struct DirectAlignment {
  std::uint32_t offset_bytes;
  std::uint32_t memory_bytes;
};

// Asking is better than trying: a read that works on a hole proves nothing about a block that is
// there.
DirectAlignment ask_alignment(int fd) {
  alignas(8) std::byte status[kStatxBytes]{};
  const long result = ::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kStatxDioAlign, status);
  std::uint32_t mask = 0;
  std::memcpy(&mask, status, sizeof mask);
  DirectAlignment alignment{};
  if (result != 0 || (mask & kStatxDioAlign) == 0) return {kSafeAlignment, kSafeAlignment};
  std::memcpy(&alignment.memory_bytes, status + kStatxDioMemoryAlignOffset, sizeof(std::uint32_t));
  std::memcpy(&alignment.offset_bytes, status + kStatxDioOffsetAlignOffset, sizeof(std::uint32_t));
  const auto usable = [](std::uint32_t bytes) {
    return bytes > 0 && bytes <= kSafeAlignment && (bytes & (bytes - 1)) == 0;
  };
  if (!usable(alignment.memory_bytes) || !usable(alignment.offset_bytes))
    return {kSafeAlignment, kSafeAlignment};
  return alignment;
}

std::string_view type_name(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISCHR(mode)) return "a character device";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISSOCK(mode)) return "a socket";
  return "not a regular file";
}

std::string_view advice(int error) {
  switch (error) {
    case ENOENT:
      return "create it first, for example with 'vblk img create PATH 10G'";
    case EACCES:
    case EPERM:
      return "check its permissions, run as a user that may open it, or add --read-only if it may "
             "only be read";
    case EROFS:
      return "its file system is read-only; add --read-only";
    default:
      return "check the path";
  }
}

std::unexpected<Error> open_error(const ImageOptions& options, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot open image '{}' for {}: {}; {}", options.path,
                                options.read_only ? "reading" : "reading and writing",
                                describe_errno(error), advice(error)),
                    error);
}

bool can_be_image(mode_t mode) { return S_ISREG(mode) || S_ISBLK(mode); }

std::unexpected<Error> type_error(const std::string& path, mode_t mode) {
  return make_error(ErrorKind::kNotSupported,
                    fmt::format("image '{}' is {}; an image is a regular file or a block device",
                                path, type_name(mode)));
}

int open_path(const ImageOptions& options, int extra_flags) {
  const int access = options.read_only ? O_RDONLY : O_RDWR;
  // O_NONBLOCK: opening a pipe must not wait for somebody at its other end. It means nothing to
  // files and disks.
  return ::open(options.path.c_str(), access | O_CLOEXEC | O_NONBLOCK | extra_flags);
}

}  // namespace

Expected<std::unique_ptr<ImageFile>> ImageFile::open(const ImageOptions& options) {
  // Before it is opened, since opening can be refused for a worse reason (sockets, directories) or
  // do something (watchdogs, tapes). What cannot be looked at is left to the open to explain.
  struct stat status{};
  if (::stat(options.path.c_str(), &status) == 0 && !can_be_image(status.st_mode))
    return type_error(options.path, status.st_mode);
  std::unique_ptr<ImageFile> file(new ImageFile);
  file->owned_ = true;
  file->read_only_ = options.read_only;
  // First without O_DIRECT: what is wrong with the path is told apart from what is wrong with the
  // cache mode.
  file->buffered_fd_ = open_path(options, 0);
  if (file->buffered_fd_ < 0) return open_error(options, errno);
  file->fd_ = file->buffered_fd_;
  if (auto measured = file->measure(options.path, options.may_be_empty); !measured)
    return std::unexpected(std::move(measured.error()));
  if (uses_direct_io(options.cache)) {
    const int direct_fd = open_path(options, O_DIRECT);
    if (direct_fd < 0) {
      const int error = errno;
      if (error != EINVAL) return open_error(options, error);
      return make_error(
          ErrorKind::kNotSupported,
          fmt::format(
              "the file system of '{}' has no O_DIRECT, which --cache {} needs; use --cache "
              "writeback or --cache writethrough",
              options.path, to_string(options.cache)),
          error);
    }
    file->fd_ = direct_fd;
    // Readahead would bring whole folios of neighbours into the page cache, which direct writes to
    // them would find in their way (alignment.h).
    ::posix_fadvise(file->buffered_fd_, 0, 0, POSIX_FADV_RANDOM);
    file->probe_alignment();
  }
  if (!options.lock) return file;
  if (auto locked = lock_image(file->fd_, options.path, options.read_only); !locked) {
    return std::unexpected(std::move(locked.error()));
  }
  file->locked_ = true;
  return file;
}

std::unique_ptr<ImageFile> ImageFile::wrap(int fd, int buffered_fd, std::uint64_t size_bytes,
                                           std::uint32_t alignment_bytes, bool read_only,
                                           SetSize set_size) {
  std::unique_ptr<ImageFile> file(new ImageFile);
  file->set_size_ = std::move(set_size);
  file->fd_ = fd;
  file->buffered_fd_ = buffered_fd;
  file->size_bytes_ = size_bytes;
  file->offset_alignment_bytes_ = fd == buffered_fd ? 1 : alignment_bytes;
  file->memory_alignment_bytes_ = file->offset_alignment_bytes_;
  file->read_only_ = read_only;
  return file;
}

ImageFile::~ImageFile() {
  if (!owned_) return;
  if (locked_) unlock_image(fd_);
  if (direct() && fd_ >= 0) ::close(fd_);
  if (buffered_fd_ >= 0) ::close(buffered_fd_);
}

// ftruncate(2) zeroes the rest of a file's last page in the page cache, whether or not it moves the
// end, and collides there with a direct write to the same page that is in flight (alignment.h).
// Written directly, zeroes come after that write.
int ImageFile::fill_last_page(std::uint64_t old_bytes, std::uint64_t end_bytes) {
  const auto page_bytes = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t into_page = old_bytes % page_bytes;
  const std::uint64_t end = std::min(end_bytes, old_bytes - into_page + page_bytes);
  if (into_page == 0 || end <= old_bytes || old_bytes % offset_alignment_bytes_ != 0 ||
      end % offset_alignment_bytes_ != 0)
    return 0;
  // A fresh mapping is aligned to pages, and zeroes.
  const std::size_t bytes = end - old_bytes;
  void* const zeroes = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (zeroes == MAP_FAILED) return errno;
  ssize_t count = 0;
  do {
    count = ::pwrite(fd_, zeroes, bytes, static_cast<off_t>(old_bytes));
  } while (count < 0 && errno == EINTR);
  const int error = count < 0 ? errno : 0;
  ::munmap(zeroes, bytes);
  if (error != 0) return error;
  return static_cast<std::size_t>(count) == bytes ? 0 : ENOSPC;
}

int ImageFile::resize(std::uint64_t size_bytes) {
  if (!owned_) return set_size_ ? set_size_(size_bytes) : EOPNOTSUPP;
  if (is_block_device_) return size_bytes <= size_bytes_ ? 0 : ENOSPC;
  if (size_bytes > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max())) return EFBIG;
  if (direct()) {
    struct stat status{};
    if (::fstat(fd_, &status) != 0) return errno;
    const int error = fill_last_page(static_cast<std::uint64_t>(status.st_size), size_bytes);
    if (error != 0) return error;
    if (::fstat(fd_, &status) != 0) return errno;
    if (static_cast<std::uint64_t>(status.st_size) == size_bytes) return 0;
  }
  int result = 0;
  do {
    result = ::ftruncate(buffered_fd_, static_cast<off_t>(size_bytes));
  } while (result != 0 && errno == EINTR);
  return result == 0 ? 0 : errno;
}

Expected<void> ImageFile::measure(const std::string& path, bool may_be_empty) {
  struct stat status{};
  if (::fstat(fd_, &status) != 0) {
    const int error = errno;
    return make_error(kind_of_errno(error),
                      fmt::format("cannot stat image '{}': {}", path, describe_errno(error)),
                      error);
  }
  is_block_device_ = S_ISBLK(status.st_mode);
  if (!can_be_image(status.st_mode)) return type_error(path, status.st_mode);
  size_bytes_ = static_cast<std::uint64_t>(status.st_size);
  if (is_block_device_) {
    if (auto measured = measure_device(path); !measured) return measured;
  }
  if (size_bytes_ == 0 && !may_be_empty) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format(
            "image '{}' is empty; make a disk of it, for example with 'vblk img create{} {} 10G'",
            path, path.ends_with(".qcow2") ? " -f qcow2" : "", path));
  }
  return {};
}

Expected<void> ImageFile::measure_device(const std::string& path) {
  int logical_block_bytes = 0;
  if (::ioctl(fd_, BLKGETSIZE64, &size_bytes_) != 0 ||
      ::ioctl(fd_, BLKSSZGET, &logical_block_bytes) != 0) {
    const int error = errno;
    return make_error(
        kind_of_errno(error),
        fmt::format("cannot read the size of block device '{}': {}", path, describe_errno(error)),
        error);
  }
  logical_block_bytes_ = static_cast<std::uint32_t>(logical_block_bytes);
  // Linux opens such a device for writing and only fails the writes.
  int device_is_read_only = 0;
  if (!read_only_ && ::ioctl(fd_, BLKROGET, &device_is_read_only) == 0 &&
      device_is_read_only != 0) {
    return make_error(ErrorKind::kPermission,
                      fmt::format("block device '{}' is read-only; add --read-only", path));
  }
  return {};
}

void ImageFile::probe_alignment() {
  const DirectAlignment alignment = ask_alignment(fd_);
  memory_alignment_bytes_ = alignment.memory_bytes;
  offset_alignment_bytes_ = is_block_device_ ? logical_block_bytes_ : alignment.offset_bytes;
}

}  // namespace vblk::blockdev
