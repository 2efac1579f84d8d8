#include "blockdev/demo/scratch_image.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/noise.h"
#include "blockdev/image_lock.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::demo {

using vhost_user::UniqueFd;

namespace {

constexpr std::uint64_t kStampMagic = 0x6d656420'6b6c6276;  // "vblk dem"
constexpr std::size_t kChunkBytes = std::size_t{4} << 20;

std::unexpected<Error> failed(const char* what, const std::string& path, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot {} '{}': {}", what, path, describe_errno(error)), error);
}

Expected<void> check_space(int fd, const std::string& directory, std::uint64_t size_bytes) {
  struct statvfs space{};
  if (::fstatvfs(fd, &space) != 0) return failed("ask for the free space of", directory, errno);
  const std::uint64_t free_bytes = std::uint64_t{space.f_bavail} * space.f_frsize;
  if (free_bytes >= size_bytes) return {};
  return make_error(ErrorKind::kExhausted,
                    fmt::format("'{}' has {} MiB free and the image needs {} MiB; use a smaller "
                                "--size or another --directory",
                                directory, free_bytes >> 20U, size_bytes >> 20U));
}

}  // namespace

namespace {

// Marks `block` as the content of block number `number`.
void stamp(std::span<std::byte> block, std::uint64_t number) {
  virtio::store_le<std::uint64_t>(block.data(), kStampMagic);
  virtio::store_le<std::uint64_t>(block.data() + 8, number);
}

}  // namespace

void StampedContent::before_write(std::uint64_t offset_bytes, std::span<std::byte> data) {
  stamp(data, offset_bytes / kBlockBytes);
}

bool StampedContent::before_read(std::uint64_t offset_bytes, std::span<std::byte> data) {
  stamp(data, ~(offset_bytes / kBlockBytes));
  return true;
}

bool StampedContent::is_right(std::uint64_t offset_bytes, std::span<const std::byte> data) {
  return virtio::load_le<std::uint64_t>(data.data()) == kStampMagic &&
         virtio::load_le<std::uint64_t>(data.data() + 8) == offset_bytes / kBlockBytes;
}

Expected<ScratchImage> ScratchImage::create_temporary(const std::string& directory,
                                                      std::uint64_t size_bytes) {
  std::string path = directory + "/vblk-demo-XXXXXX";
  UniqueFd fd(::mkostemp(path.data(), O_CLOEXEC));
  if (!fd) return failed("make a temporary image in", directory, errno);
  ::unlink(path.c_str());
  if (auto enough = check_space(fd.get(), directory, size_bytes); !enough)
    return std::unexpected(std::move(enough.error()));
  if (::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0)
    return failed("size a temporary image in", directory, errno);
  return ScratchImage(std::move(fd), fmt::format("a temporary file in {}", directory), false,
                      size_bytes);
}

Expected<ScratchImage> ScratchImage::create_at(const std::string& path, std::uint64_t size_bytes,
                                               bool overwrite) {
  if (auto checked = blockdev::check_is_not_mounted(path); !checked)
    return std::unexpected(std::move(checked.error()));
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | (overwrite ? 0 : O_CREAT | O_EXCL), 0600));
  if (!fd && errno == EEXIST) {
    return make_error(ErrorKind::kBusy,
                      fmt::format("'{}' exists and the demo would destroy its content; add "
                                  "--overwrite to allow that, or name another",
                                  path));
  }
  if (!fd) return failed("open the image", path, errno);
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) return failed("look at the image", path, errno);
  // Before anything of it is changed, its size included.
  if (const auto locked = blockdev::lock_image(fd.get(), path, false); !locked) {
    return make_error(
        ErrorKind::kBusy,
        fmt::format("'{}' is in use by another process; stop that one first, or name another",
                    path),
        EAGAIN);
  }
  if (S_ISBLK(status.st_mode)) {
    std::uint64_t device_bytes = 0;
    if (::ioctl(fd.get(), BLKGETSIZE64, &device_bytes) != 0)
      return failed("ask for the size of", path, errno);
    const std::uint64_t usable_bytes = std::min(size_bytes, device_bytes);
    return ScratchImage(std::move(fd), path, true, usable_bytes);
  }
  if (!S_ISREG(status.st_mode)) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("'{}' is neither a file nor a block device", path));
  }
  if (auto enough = check_space(fd.get(), path, size_bytes); !enough)
    return std::unexpected(std::move(enough.error()));
  if (::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0)
    return failed("size the image", path, errno);
  return ScratchImage(std::move(fd), path, true, size_bytes);
}

Expected<void> ScratchImage::precondition(std::uint64_t seed, const Progress& progress) {
  std::vector<std::byte> chunk(kChunkBytes);
  const std::uint64_t end_bytes = block_count() * kBlockBytes;
  for (std::uint64_t offset = 0; offset < end_bytes;) {
    const std::size_t length = std::min<std::uint64_t>(kChunkBytes, end_bytes - offset);
    bench::fill_with_noise(chunk, seed + offset);
    for (std::size_t i = 0; i < length; i += kBlockBytes)
      stamp(std::span(chunk).subspan(i, kBlockBytes), (offset + i) / kBlockBytes);
    for (std::size_t done = 0; done < length;) {
      const ssize_t written = ::pwrite(fd_.get(), chunk.data() + done, length - done,
                                       static_cast<off_t>(offset + done));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return failed("fill", name_, errno);
      done += static_cast<std::size_t>(written);
    }
    offset += length;
    progress(offset);
  }
  if (::fsync(fd_.get()) != 0) return failed("make stable", name_, errno);
  // The engines bypass the page cache; what lies there only costs memory.
  ::posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_DONTNEED);
  // The servers take their own locks.
  blockdev::unlock_image(fd_.get());
  return {};
}

std::string ScratchImage::path_for_child(int fd_there) const {
  return has_path_ ? name_ : fmt::format("/proc/self/fd/{}", fd_there);
}

}  // namespace vblk::demo
