// The memory a driver without a virtual machine shares with its backend: guest memory made of
// memfds.
//
// Regions follow each other in guest addresses and in this process alike, so that a buffer may
// cross from one to the next, as it may in a real guest. Not thread-safe: allocate before threads
// share it.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "aio/error.h"
#include "blockdev/vhost_user/protocol.h"

namespace vblk::driver {

class DriverMemory {
 public:
  // Guest address of the first byte: neither 0 nor equal to any pointer, so that mix-ups show.
  static constexpr std::uint64_t kGuestBase = std::uint64_t{1} << 40;

  // One region per element, sizes in bytes, multiples of the page size (asserted).
  // Errors: kExhausted (memory, address space, descriptors).
  static Expected<std::unique_ptr<DriverMemory>> create(
      const std::vector<std::size_t>& region_bytes);
  ~DriverMemory();
  DriverMemory(const DriverMemory&) = delete;
  DriverMemory& operator=(const DriverMemory&) = delete;

  // Zeroed memory that is never given back, or an empty span if there is not enough left.
  // `alignment` is a power of two.
  [[nodiscard]] std::span<std::byte> allocate(std::size_t bytes, std::size_t alignment);

  // The address that a backend knows `pointer` by; `pointer` lies in the memory (asserted).
  [[nodiscard]] std::uint64_t guest_address(const void* pointer) const {
    const auto* const byte = static_cast<const std::byte*>(pointer);
    assert(byte >= begin_ && byte < begin_ + size_bytes_);
    return kGuestBase + static_cast<std::uint64_t>(byte - begin_);
  }
  [[nodiscard]] std::byte* begin() const { return begin_; }
  [[nodiscard]] std::size_t size_bytes() const { return size_bytes_; }

  struct Region {
    int fd;
    vhost_user::MemoryRegionDescription description;
  };
  [[nodiscard]] std::span<const Region> regions() const { return regions_; }

 private:
  DriverMemory() = default;
  std::byte* begin_{nullptr};
  std::size_t size_bytes_{0};
  std::size_t used_bytes_{0};
  std::vector<Region> regions_;
};

}  // namespace vblk::driver
