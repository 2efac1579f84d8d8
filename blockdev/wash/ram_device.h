// A loop device over memory: a block device that is hardly ever slow, where the kernel permits one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "aio/error.h"
#include "blockdev/vhost_user/socket.h"

namespace vblk::wash {

class RamDevice {
 public:
  // Over a file of tmpfs that has no name, with direct I/O where tmpfs has it (Linux 6.5). Gone
  // with the object, or with the process, however that ends. Errors: kPermission, kNotSupported (no
  // loop driver), kExhausted (no memory).
  static Expected<std::unique_ptr<RamDevice>> create(std::uint64_t size_bytes);
  RamDevice(const RamDevice&) = delete;
  RamDevice& operator=(const RamDevice&) = delete;
  ~RamDevice() = default;

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  RamDevice() = default;
  Expected<void> attach(int control, int backing);

  std::string path_;
  vhost_user::UniqueFd device_;
};

}  // namespace vblk::wash
