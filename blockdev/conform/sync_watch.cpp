#include "blockdev/conform/sync_watch.h"

#include <array>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <linux/magic.h>
#include <linux/perf_event.h>
#include <optional>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::conform {

namespace {

using vhost_user::UniqueFd;

constexpr const char* kTracefs = "/sys/kernel/tracing";

struct FileSystem {
  long magic;
  const char* event;
};
// ext4 tells the end of a sync, the others its begin.
constexpr std::array kFileSystems{FileSystem{EXT4_SUPER_MAGIC, "ext4/ext4_sync_file_exit"},
                                  FileSystem{0x58465342 /* xfs */, "xfs/xfs_file_fsync"},
                                  FileSystem{BTRFS_SUPER_MAGIC, "btrfs/btrfs_sync_file"},
                                  FileSystem{F2FS_SUPER_MAGIC, "f2fs/f2fs_sync_file_exit"}};

std::unexpected<Error> missing(std::string what) {
  return make_error(ErrorKind::kNotSupported,
                    "what reaches the disk cannot be observed: " + std::move(what));
}

std::optional<std::uint64_t> id_of(const char* event) {
  std::ifstream file(fmt::format("{}/events/{}/id", kTracefs, event));
  std::uint64_t id = 0;
  if (file >> id) return id;
  return std::nullopt;
}

// Where nobody else sees it.
void mount_tracefs() {
  if (std::filesystem::exists(fmt::format("{}/events", kTracefs))) return;
  if (::unshare(CLONE_NEWNS) != 0) return;
  ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
  ::mount("tracefs", kTracefs, "tracefs", 0, nullptr);
}

}  // namespace

Expected<std::unique_ptr<SyncWatch>> SyncWatch::open(const std::string& path) {
  struct stat file{};
  struct statfs file_system{};
  if (path.empty() || ::stat(path.c_str(), &file) != 0 || ::statfs(path.c_str(), &file_system) != 0)
    return missing("the file that the backend serves is not known (--image)");
  const char* event = nullptr;
  for (const FileSystem& known : kFileSystems) {
    if (known.magic == static_cast<long>(file_system.f_type)) event = known.event;
  }
  if (event == nullptr || !S_ISREG(file.st_mode)) {
    return missing(
        fmt::format("'{}' does not lie on ext4, xfs, btrfs or f2fs; TMPDIR names where "
                    "images are made",
                    path));
  }
  mount_tracefs();
  const auto id = id_of(event);
  if (!id) return missing(fmt::format("the tracepoint {} is not to be had; it takes root", event));
  std::unique_ptr<SyncWatch> watch(new SyncWatch);
  perf_event_attr attributes{};
  attributes.size = sizeof attributes;
  attributes.type = PERF_TYPE_TRACEPOINT;
  attributes.config = *id;
  const std::string filter = fmt::format("ino == {}", file.st_ino);
  const long processors = ::sysconf(_SC_NPROCESSORS_CONF);
  for (int processor = 0; processor < processors; ++processor) {
    UniqueFd fd(static_cast<int>(
        ::syscall(SYS_perf_event_open, &attributes, -1, processor, -1, PERF_FLAG_FD_CLOEXEC)));
    if (!fd && (errno == ENODEV || errno == ENXIO)) continue;  // a processor that is switched off
    if (!fd || ::ioctl(fd.get(), PERF_EVENT_IOC_SET_FILTER, filter.c_str()) != 0)
      return missing(
          fmt::format("the kernel refuses to count {}: {}", event, describe_errno(errno)));
    watch->events_.push_back(std::move(fd));
  }
  return watch;
}

std::uint64_t SyncWatch::count() const {
  std::uint64_t sum = 0;
  for (const UniqueFd& fd : events_) {
    std::uint64_t value = 0;
    if (::read(fd.get(), &value, sizeof value) == sizeof value) sum += value;
  }
  return sum;
}

}  // namespace vblk::conform
