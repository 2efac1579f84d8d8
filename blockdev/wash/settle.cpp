#include "blockdev/wash/settle.h"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

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

Expected<std::uint64_t> cached_bytes(const std::string& path) {
  const vhost_user::UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return failed("open", path, errno);
  const off_t end = ::lseek(fd.get(), 0, SEEK_END);
  if (end <= 0) return 0;
  const auto length = static_cast<std::size_t>(end);
  void* const mapped = ::mmap(nullptr, length, PROT_READ, MAP_SHARED, fd.get(), 0);
  if (mapped == MAP_FAILED) return failed("map", path, errno);
  const auto page_bytes = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages((length + page_bytes - 1) / page_bytes);
  const int error = ::mincore(mapped, length, pages.data()) == 0 ? 0 : errno;
  ::munmap(mapped, length);
  if (error != 0) return failed("ask for the cached pages of", path, error);
  return static_cast<std::uint64_t>(
             std::ranges::count_if(pages, [](unsigned char page) { return (page & 1) != 0; })) *
         page_bytes;
}

}  // namespace vblk::wash
