#include "blockdev/img/target.h"

#include <cerrno>
#include <fcntl.h>
#include <filesystem>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/image_file.h"
#include "blockdev/image_lock.h"
#include "blockdev/img/source.h"

namespace vblk::img {

namespace {

constexpr mode_t kMode = 0644;

std::string path_of(int fd) { return fmt::format("/proc/self/fd/{}", fd); }

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// What a file system answers that has no files without names.
bool has_no_unnamed_files(int error) {
  return error == EOPNOTSUPP || error == EISDIR || error == ENOENT || error == EINVAL;
}

// Of an empty file: ioctl_iflags(2), ioctl_xfs_fssetxattr(2).
void give_hints(int fd, const FileHints& hints) {
  if (hints.nocow) {
    int flags = 0;
    if (::ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0) {
      flags |= FS_NOCOW_FL;
      [[maybe_unused]] const int ignored = ::ioctl(fd, FS_IOC_SETFLAGS, &flags);
    }
  }
  if (hints.extent_size_bytes > 0) {
    struct fsxattr attributes{};
    if (::ioctl(fd, FS_IOC_FSGETXATTR, &attributes) == 0) {
      attributes.fsx_xflags |= FS_XFLAG_EXTSIZE;
      attributes.fsx_extsize = hints.extent_size_bytes;
      [[maybe_unused]] const int ignored = ::ioctl(fd, FS_IOC_FSSETXATTR, &attributes);
    }
  }
}

// A file that is mounted over another keeps its name, as containers have it.
bool is_mounted(const std::string& path) {
  struct statx status{};
  return ::statx(AT_FDCWD, path.c_str(), 0, STATX_BASIC_STATS, &status) == 0 &&
         (status.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

}  // namespace

bool is_same_target(const std::string& one, const std::string& other) {
  if (is_same_file(one, other)) return true;
  std::error_code one_failed;
  std::error_code other_failed;
  const auto one_path =
      std::filesystem::weakly_canonical(std::filesystem::absolute(one), one_failed);
  const auto other_path =
      std::filesystem::weakly_canonical(std::filesystem::absolute(other), other_failed);
  return !one_failed && !other_failed && one_path == other_path;
}

std::unexpected<Error> Target::error(const char* what, int errno_value) const {
  return make_error(kind_of_errno(errno_value),
                    fmt::format("cannot {} '{}': {}", what, path_, describe_errno(errno_value)),
                    errno_value);
}

std::string Target::temporary_name() const {
  const std::filesystem::path path(real_path_);
  return fmt::format("{}/.{}.vblk-{}", folder_of(real_path_), path.filename().string(), ::getpid());
}

Expected<std::unique_ptr<Target>> Target::create(const std::string& path, blockdev::CacheMode cache,
                                                 FileHints hints) {
  std::unique_ptr<Target> target(new Target(hints));
  target->path_ = path;
  std::error_code ignored;
  const auto real_path = std::filesystem::weakly_canonical(path, ignored);
  target->real_path_ = ignored ? path : real_path.string();
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) {
    if (errno != ENOENT) return target->error("look at", errno);
    auto made = target->make_unnamed(cache);
    if (!made) return std::unexpected(std::move(made.error()));
    return target;
  }
  if (!S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) {
    return make_error(
        ErrorKind::kNotSupported,
        fmt::format("'{}' is neither a file nor a block device and cannot hold an image", path));
  }
  if (S_ISREG(status.st_mode)) {
    // Also for one that is to be replaced: it may be in use, and a file that may not be written is
    // not to be replaced either.
    target->old_fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (target->old_fd_ < 0) return target->error("open for writing", errno);
    if (auto locked = blockdev::lock_image(target->old_fd_, path, false); !locked)
      return std::unexpected(std::move(locked.error()));
    target->replaces_ = true;
    const bool folder_is_open = ::access(folder_of(target->real_path_).c_str(), W_OK | X_OK) == 0;
    if (status.st_nlink == 1 && folder_is_open && !is_mounted(path)) {
      auto made = target->make_unnamed(cache);
      if (!made) return std::unexpected(std::move(made.error()));
      // As far as this user may: the old owner may be somebody else.
      [[maybe_unused]] const int owner = ::fchown(target->fd_, status.st_uid, status.st_gid);
      [[maybe_unused]] const int mode = ::fchmod(target->fd_, status.st_mode & 07777);
      return target;
    }
  }
  if (auto checked = blockdev::check_is_not_mounted(path); !checked)
    return std::unexpected(std::move(checked.error()));
  auto opened = target->open_in_place(cache);
  if (!opened) return std::unexpected(std::move(opened.error()));
  return target;
}

Expected<void> Target::make_unnamed(blockdev::CacheMode cache) {
  fd_ = ::open(folder_of(real_path_).c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, kMode);
  if (fd_ < 0 && has_no_unnamed_files(errno)) {
    temporary_ = temporary_name();
    fd_ = ::open(temporary_.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, kMode);
    if (fd_ < 0) temporary_.clear();
  }
  if (fd_ < 0) return error("create", errno);
  give_hints(fd_, hints_);
  // An image file has a size; whoever writes this one makes it longer.
  if (::ftruncate(fd_, blockdev::kSectorBytes) != 0) return error("write", errno);
  auto file = blockdev::ImageFile::open(
      {.path = path_of(fd_), .format = blockdev::ImageFormat::kRaw, .cache = cache, .lock = false});
  if (!file) return std::unexpected(std::move(file.error()));
  file_ = std::make_unique<blockdev::RawNode>(
      std::move(*file), blockdev::RawNodeOptions{.name = path_, .holds_format = true});
  return {};
}

Expected<void> Target::open_in_place(blockdev::CacheMode cache) {
  in_place_ = true;
  if (old_fd_ >= 0) {
    // What was there must not look like the new image.
    if (::ftruncate(old_fd_, 0) != 0) return error("write", errno);
    give_hints(old_fd_, hints_);
    if (::ftruncate(old_fd_, blockdev::kSectorBytes) != 0) return error("write", errno);
  }
  auto file = blockdev::ImageFile::open(
      {.path = path_, .format = blockdev::ImageFormat::kRaw, .cache = cache, .lock = old_fd_ < 0});
  if (!file) return std::unexpected(std::move(file.error()));
  fd_ = ::open(path_.c_str(), O_RDWR | O_CLOEXEC);
  if (fd_ < 0) return error("open for writing", errno);
  file_ = std::make_unique<blockdev::RawNode>(
      std::move(*file), blockdev::RawNodeOptions{.name = path_, .holds_format = true});
  return {};
}

int Target::allocate(std::uint64_t bytes) {
  if (bytes == 0 || is_block_device()) return 0;
  return ::fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
}

Expected<void> Target::stand_by() {
  if (!replaces() || !temporary_.empty()) return {};
  temporary_ = temporary_name();
  if (::linkat(AT_FDCWD, path_of(fd_).c_str(), AT_FDCWD, temporary_.c_str(), AT_SYMLINK_FOLLOW) ==
      0)
    return {};
  const int failed = errno;
  temporary_.clear();
  return error("give the complete image a name beside", failed);
}

Expected<void> Target::publish(bool stable) {
  if (in_place_) return {};
  if (auto ready = stand_by(); !ready) return ready;
  if (temporary_.empty()) {
    if (::linkat(AT_FDCWD, path_of(fd_).c_str(), AT_FDCWD, real_path_.c_str(), AT_SYMLINK_FOLLOW) !=
        0)
      return error("give the complete image its name", errno);
  } else if (::rename(temporary_.c_str(), real_path_.c_str()) != 0) {
    return error("replace", errno);
  }
  has_name_ = true;
  temporary_.clear();
  return stable ? flush_folder() : Expected<void>();
}

Expected<void> Target::flush_folder() const {
  const int folder = ::open(folder_of(real_path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool is_stable = folder >= 0 && ::fsync(folder) == 0;
  const int failed = errno;
  if (folder >= 0) ::close(folder);
  if (!is_stable) return error("flush the folder of", failed);
  return {};
}

Expected<void> Target::remove_old(bool stable) {
  if (!replaces()) return {};
  if (::unlink(real_path_.c_str()) != 0 && errno != ENOENT) return error("replace", errno);
  return stable ? flush_folder() : Expected<void>();
}

void Target::take_name_back() {
  if (has_name_ && !replaces_) ::unlink(real_path_.c_str());
}

Target::~Target() {
  file_.reset();
  if (fd_ >= 0) ::close(fd_);
  if (old_fd_ >= 0) ::close(old_fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

}  // namespace vblk::img
