#include "blockdev/wash/ram_device.h"

#include <cerrno>
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::wash {

using vhost_user::UniqueFd;

namespace {

std::unexpected<Error> failed(const std::string& what, int error) {
  return make_error(kind_of_errno(error), fmt::format("{}: {}", what, describe_errno(error)),
                    error);
}

}  // namespace

Expected<std::unique_ptr<RamDevice>> RamDevice::create(std::uint64_t size_bytes) {
  const UniqueFd control(::open("/dev/loop-control", O_RDWR | O_CLOEXEC));
  if (!control) return failed("/dev/loop-control", errno);
  const UniqueFd backing(::memfd_create("vblk-wash", MFD_CLOEXEC));
  if (!backing) return failed("memory for a loop device", errno);
  // fallocate, so that the memory is there or is refused now.
  if (::ftruncate(backing.get(), static_cast<off_t>(size_bytes)) != 0 ||
      ::fallocate(backing.get(), 0, 0, static_cast<off_t>(size_bytes)) != 0)
    return failed(fmt::format("{} bytes of memory for a loop device", size_bytes), errno);
  std::unique_ptr<RamDevice> device(new RamDevice);
  if (auto attached = device->attach(control.get(), backing.get()); !attached)
    return std::unexpected(attached.error());
  return device;
}

Expected<void> RamDevice::attach(int control, int backing) {
  // Between asking for a free device and taking it, somebody else may take it.
  constexpr int kAttempts = 100;
  int error = EBUSY;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const int number = ::ioctl(control, LOOP_CTL_GET_FREE);
    if (number < 0) return failed("a free loop device", errno);
    path_ = fmt::format("/dev/loop{}", number);
    device_.reset(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
    if (!device_) return failed(path_, errno);
    loop_config config{};
    config.fd = static_cast<std::uint32_t>(backing);
    config.block_size = 4096;
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
    if (::ioctl(device_.get(), LOOP_CONFIGURE, &config) == 0) return {};
    error = errno;
    if (error == EINVAL) {
      config.info.lo_flags = LO_FLAGS_AUTOCLEAR;
      if (::ioctl(device_.get(), LOOP_CONFIGURE, &config) == 0) return {};
      error = errno;
    }
    if (error != EBUSY) break;
  }
  device_.reset();
  return failed(fmt::format("attach memory to {}", path_), error);
}

}  // namespace vblk::wash
