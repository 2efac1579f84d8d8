#include "blockdev/wash/precondition.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <memory>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/core.h>

#include "blockdev/bench/image_target.h"
#include "blockdev/bench/measure.h"
#include "blockdev/byte_size.h"
#include "blockdev/image_lock.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::wash {

using vhost_user::UniqueFd;

namespace {

constexpr std::uint64_t kLeastBytes = std::uint64_t{16} << 20;
constexpr std::size_t kChunkBytes = std::size_t{1} << 20;

std::unexpected<Error> failed(const std::string& what, const std::string& path, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot {} '{}': {}", what, path, describe_errno(error)), error);
}

constexpr std::size_t kExtents = 64;

// Room for what FIEMAP answers: a header, and so many extents behind it.
struct alignas(fiemap) Extents {
  std::array<std::byte, sizeof(fiemap) + kExtents * sizeof(fiemap_extent)> bytes{};
  [[nodiscard]] fiemap& header() { return *reinterpret_cast<fiemap*>(bytes.data()); }
  [[nodiscard]] const fiemap_extent& extent(std::size_t i) { return header().fm_extents[i]; }
};

Expected<void> fill(bench::Target& target, std::uint64_t region_bytes,
                    const std::atomic<bool>& interrupted,
                    const std::function<void(double fraction)>& show) {
  bench::Workload workload;
  workload.name = "precondition";
  workload.read_percent = 0;
  workload.distribution = bench::Distribution::kSequential;
  workload.block_bytes = kChunkBytes;
  workload.depth = 4;
  workload.size_bytes = region_bytes;
  workload.amount_bytes = region_bytes;
  auto run = bench::measure_on(target, {workload},
                               {.interrupted = &interrupted, .show = [&](const auto& progress) {
                                  show(progress.done_fraction);
                                }});
  if (!run) return std::unexpected(run.error());
  if (run->result.error) return std::unexpected(*run->result.error);
  return {};
}

}  // namespace

Expected<bool> make_image(const std::string& path, std::uint64_t size_bytes) {
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd && errno == EEXIST) return false;
  if (!fd) return failed("make", path, errno);
  if (::ftruncate(fd.get(), static_cast<off_t>(size_bytes)) != 0) {
    const int error = errno;
    ::unlink(path.c_str());
    return failed("make", path, error);
  }
  return true;
}

Expected<std::optional<bool>> is_all_written(const std::string& path, std::uint64_t length_bytes) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return failed("open", path, errno);
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) return failed("look at", path, errno);
  if (!S_ISREG(status.st_mode)) return std::nullopt;
  for (std::uint64_t next = 0; next < length_bytes;) {
    Extents map;
    fiemap& header = map.header();
    header.fm_start = next;
    header.fm_length = length_bytes - next;
    header.fm_flags = FIEMAP_FLAG_SYNC;
    header.fm_extent_count = kExtents;
    if (::ioctl(fd.get(), FS_IOC_FIEMAP, &map) != 0) {
      if (errno == EOPNOTSUPP || errno == ENOTTY) return std::nullopt;
      return failed("look at the extents of", path, errno);
    }
    if (header.fm_mapped_extents == 0) return false;
    for (std::size_t i = 0; i < header.fm_mapped_extents; ++i) {
      const fiemap_extent& extent = map.extent(i);
      if (extent.fe_logical > next || (extent.fe_flags & FIEMAP_EXTENT_UNWRITTEN) != 0)
        return false;
      next = extent.fe_logical + extent.fe_length;
    }
  }
  return true;
}

namespace {

Expected<bool> is_device(const std::string& path) {
  struct stat status{};
  if (::stat(path.c_str(), &status) != 0) return failed("look at", path, errno);
  return S_ISBLK(status.st_mode);
}

}  // namespace

Expected<Preconditioned> precondition(const std::string& path, std::uint64_t region_bytes,
                                      const std::atomic<bool>& interrupted,
                                      const std::function<void(double fraction)>& show) {
  const auto device = is_device(path);
  if (!device) return std::unexpected(device.error());
  if (auto checked = blockdev::check_is_not_mounted(path); !checked)
    return std::unexpected(std::move(checked.error()));
  bench::ImageTargetOptions options;
  options.image.path = path;
  options.image.format = blockdev::ImageFormat::kByName;
  Preconditioned outcome;
  {
    auto target = bench::open_image_target(options);
    if (!target) return std::unexpected(std::move(target.error()));
    if ((*target)->is_read_only())
      return make_error(ErrorKind::kNotSupported,
                        fmt::format("'{}' is read-only, and vblk wash writes to it", path));
    outcome.region_bytes =
        std::min(region_bytes, (*target)->size_bytes()) / kChunkBytes * kChunkBytes;
    if (outcome.region_bytes < kLeastBytes) {
      return make_error(
          ErrorKind::kInvalidArgument,
          fmt::format("'{}' has {} bytes, too few to measure anything; give it at least {}", path,
                      (*target)->size_bytes(), blockdev::format_byte_size(kLeastBytes)));
    }
    const bool is_qcow2 = path.ends_with(".qcow2");
    const auto written = is_all_written(path, outcome.region_bytes);
    if (!written) return std::unexpected(written.error());
    // What a device or an image of another format holds nobody tells.
    outcome.was_written = !written->value_or(false) || is_qcow2;
    if (outcome.was_written) {
      if (auto filled = fill(**target, outcome.region_bytes, interrupted, show); !filled)
        return std::unexpected(std::move(filled.error()));
    }
    if (interrupted || *device || is_qcow2) return outcome;
  }
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!fd) return failed("open", path, errno);
  if (::fsync(fd.get()) != 0) return failed("sync", path, errno);
  ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
  const auto checked = is_all_written(path, outcome.region_bytes);
  if (!checked) return std::unexpected(checked.error());
  if (checked->value_or(true)) return outcome;
  return make_error(ErrorKind::kIo,
                    fmt::format("'{}' was written and has holes all the same; use a file system "
                                "that keeps what is written",
                                path));
}

}  // namespace vblk::wash
