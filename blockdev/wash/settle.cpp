#include "blockdev/wash/settle.h"

#include <cerrno>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/core.h>

#include "blockdev/vhost_user/socket.h"

namespace vblk::wash {

namespace {

std::unexpected<Error> failed(const std::string& what, const std::string& path, int error) {
  return make_error(kind_of_errno(error),
                    fmt::format("cannot {} '{}': {}", what, path, describe_errno(error)), error);
}

}  // namespace

Expected<void> settle(const std::string& path, const BeforeRun& rules) {
  const vhost_user::UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return failed("open", path, errno);
  struct stat status{};
  if (::fstat(fd.get(), &status) != 0) return failed("look at", path, errno);
  if (rules.sync) {
    if (::fsync(fd.get()) != 0) return failed("sync", path, errno);
    // The file system of a device's node is another than what is on the device.
    if (!S_ISBLK(status.st_mode) && ::syncfs(fd.get()) != 0)
      return failed("sync the file system of", path, errno);
  }
  if (!rules.drop_cache || S_ISDIR(status.st_mode)) return {};
  if (const int error = ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED); error != 0)
    return failed("drop from the page cache", path, error);
  return {};
}

}  // namespace vblk::wash
