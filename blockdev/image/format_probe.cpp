#include "blockdev/image/format_probe.h"

#include <array>
#include <cerrno>
#include <cstddef>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::blockdev {

namespace {

struct Magic {
  std::string_view bytes;
  std::size_t offset;
  std::string_view format;
};
constexpr std::array kMagics{Magic{"QFI\xfb", 0, "qcow2"},
                             Magic{"KDMV", 0, "vmdk"},
                             Magic{"COWD", 0, "vmdk"},
                             Magic{"# Disk DescriptorFile", 0, "vmdk"},
                             Magic{"vhdxfile", 0, "vhdx"},
                             Magic{"conectix", 0, "vpc"},
                             Magic{"QED", 0, "qed"},
                             Magic{"LUKS\xba\xbe", 0, "luks"},
                             Magic{"WithoutFreeSpace", 0, "parallels"},
                             Magic{"WithouFreSpacExt", 0, "parallels"},
                             Magic{"\x7f\x10\xda\xbe", 64, "vdi"}};

}  // namespace

Expected<std::string_view> probe_format(const std::string& path) {
  const auto failed = [&path](int error) {
    return make_error(kind_of_errno(error),
                      fmt::format("cannot open '{}': {}", path, describe_errno(error)), error);
  };
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return failed(errno);
  std::array<char, 512> bytes{};
  const ssize_t count = ::pread(fd, bytes.data(), bytes.size(), 0);
  const int error = errno;
  ::close(fd);
  if (count < 0) return failed(error);
  const std::string_view begin(bytes.data(), static_cast<std::size_t>(count));
  for (const Magic& magic : kMagics) {
    if (begin.size() >= magic.offset && begin.substr(magic.offset).starts_with(magic.bytes))
      return magic.format;
  }
  return "";
}

bool is_empty_file(const std::string& path) {
  struct stat status{};
  return ::stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode) && status.st_size == 0;
}

}  // namespace vblk::blockdev
