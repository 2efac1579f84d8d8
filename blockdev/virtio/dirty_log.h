// The pages of guest memory that the device has written, marked while the guest is being migrated:
// whoever copies the memory copies them again. vhost-user.rst, "Migration".
//
//   a bit per page of 4 KiB, of guest address 0 and up:
//   page = address / 4096      log[page / 8] |= 1 << page % 8      (atomically)
//
// A page is marked after it was written and before the driver, or the frontend, is told of it.
// Marked before, it could be copied in between as it was.
//
// Hostile as all memory that a frontend shares, and guarded like guest memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "aio/error.h"
#include "blockdev/virtio/shared_mapping.h"

namespace vblk::virtio {

class DirtyLog {
 public:
  // VHOST_LOG_PAGE.
  static constexpr std::uint64_t kPageBytes = 4096;

  // Maps `size_bytes` bytes of `fd` from `offset_bytes` on; `fd` stays the caller's. Errors: those
  // of SharedMapping::map(). Any thread.
  static Expected<std::shared_ptr<const DirtyLog>> map(int fd, std::uint64_t size_bytes,
                                                       std::uint64_t offset_bytes);

  // Whether all of [address, +length) has its bits; of no bytes, whether `address` has.
  [[nodiscard]] bool covers(std::uint64_t address, std::uint64_t length_bytes) const;
  // Marks the pages of [address, +length_bytes), which must be covered (asserted). A page that is
  // marked already costs one load. Any thread.
  void mark(std::uint64_t address, std::uint64_t length_bytes) const;
  // As SharedMapping::faulted().
  [[nodiscard]] bool faulted() const { return mapping_.faulted(); }

 private:
  DirtyLog(SharedMapping mapping, std::uint64_t size_bytes)
      : mapping_(std::move(mapping)), size_bytes_(size_bytes) {}

  SharedMapping mapping_;
  const std::uint64_t size_bytes_;
};

}  // namespace vblk::virtio
