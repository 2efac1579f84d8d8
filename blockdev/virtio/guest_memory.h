// The guest's memory as the frontend shared it: checked translation of guest addresses to pointers.
//
// A GuestMemory is an immutable table; a change of the frontend's memory makes a new one, and the
// queues are quiesced before the old mappings go (vhost_user/). Bytes inside are hostile and change
// under our feet: read each once, into a copy.
//
// A frontend can also shrink the file behind a region after we mapped it: shared_mapping.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <sys/uio.h>
#include <vector>

#include "aio/error.h"
#include "blockdev/virtio/shared_mapping.h"

namespace vblk::virtio {

// One mapped region. Owns its mapping: unmapped with the last copy of the shared_ptr.
class MemoryRegion {
 public:
  // Maps `size_bytes` bytes of `fd` from `mmap_offset` on. `fd` stays the caller's.
  // Errors: kInvalidArgument (empty, wraps around, beyond the end of the file), kExhausted.
  static Expected<std::shared_ptr<const MemoryRegion>> map(int fd, std::uint64_t guest_address,
                                                           std::uint64_t size_bytes,
                                                           std::uint64_t user_address,
                                                           std::uint64_t mmap_offset);
  // A region over memory that is already there (tests): `host` must outlive it.
  static std::shared_ptr<const MemoryRegion> wrap(std::byte* host, std::uint64_t guest_address,
                                                  std::uint64_t size_bytes,
                                                  std::uint64_t user_address);
  MemoryRegion(const MemoryRegion&) = delete;
  MemoryRegion& operator=(const MemoryRegion&) = delete;

  [[nodiscard]] std::uint64_t guest_address() const { return guest_address_; }
  [[nodiscard]] std::uint64_t size_bytes() const { return size_bytes_; }
  [[nodiscard]] std::uint64_t user_address() const { return user_address_; }
  [[nodiscard]] std::byte* host() const { return host_; }
  // As SharedMapping::faulted().
  [[nodiscard]] bool faulted() const { return mapping_.faulted(); }

 private:
  MemoryRegion() = default;
  std::uint64_t guest_address_{0};
  std::uint64_t size_bytes_{0};
  std::uint64_t user_address_{0};  // the frontend's virtual address of the region
  std::byte* host_{nullptr};
  SharedMapping mapping_;  // nothing where the region is wrapped
};

class GuestMemory {
 public:
  // Most regions a table takes: QEMU's 509 memory slots, rounded up.
  static constexpr std::size_t kMaxRegions = 512;

  // Error: kInvalidArgument for overlapping guest ranges or too many regions.
  static Expected<std::shared_ptr<const GuestMemory>> create(
      std::vector<std::shared_ptr<const MemoryRegion>> regions);

  // The region that `guest_address` lies in, or nullptr.
  [[nodiscard]] const MemoryRegion* find(std::uint64_t guest_address) const;
  // Host pointer for a range of frontend virtual addresses (vhost-user gives ring addresses so), or
  // nullptr unless it lies in one region whole.
  [[nodiscard]] std::byte* translate_user(std::uint64_t user_address,
                                          std::uint64_t length_bytes) const;

  // Guest address of a byte that translate() and its kin have given a pointer to.
  [[nodiscard]] std::uint64_t guest_address_of(const std::byte* host) const;

  // Whether any region has faulted. Any thread.
  [[nodiscard]] bool faulted() const;

  [[nodiscard]] std::span<const std::shared_ptr<const MemoryRegion>> regions() const {
    return regions_;
  }

 private:
  GuestMemory() = default;

  std::vector<std::shared_ptr<const MemoryRegion>> regions_;  // sorted by guest address
};

// Guest addresses to host pointers, for one thread. Remembers the region of the last one, in which
// nearly every next one lies. `memory` must outlive it.
class AddressTranslator {
 public:
  explicit AddressTranslator(const GuestMemory& memory) : memory_(memory) {}

  // Host pointer for [guest_address, +length_bytes), or nullptr unless it lies in one region whole.
  [[nodiscard]] std::byte* translate(std::uint64_t guest_address, std::uint64_t length_bytes) {
    if (is_in_last_region(guest_address, length_bytes)) return host_ + (guest_address - begin_);
    return look_up(guest_address) && is_in_last_region(guest_address, length_bytes)
               ? host_ + (guest_address - begin_)
               : nullptr;
  }
  // Splits a guest range that may cross adjacent regions into at most `room.size()` iovecs. Returns
  // how many, or 0 if any byte lies outside or room runs out. `length_bytes` is not 0.
  [[nodiscard]] std::size_t translate(std::uint64_t guest_address, std::uint64_t length_bytes,
                                      std::span<iovec> room) {
    if (!is_in_last_region(guest_address, length_bytes) || room.empty())
      return split(guest_address, length_bytes, room);
    room[0] = {.iov_base = host_ + (guest_address - begin_), .iov_len = length_bytes};
    return 1;
  }

 private:
  [[nodiscard]] bool is_in_last_region(std::uint64_t guest_address,
                                       std::uint64_t length_bytes) const {
    // Below the region this wraps to more than its size.
    const std::uint64_t offset_bytes = guest_address - begin_;
    return offset_bytes < size_bytes_ && length_bytes <= size_bytes_ - offset_bytes;
  }
  // Makes the region of `guest_address` the last one; false if there is none.
  bool look_up(std::uint64_t guest_address);
  std::size_t split(std::uint64_t guest_address, std::uint64_t length_bytes, std::span<iovec> room);

  const GuestMemory& memory_;
  std::uint64_t begin_{0};  // of the last region, in guest addresses
  std::uint64_t size_bytes_{0};
  std::byte* host_{nullptr};
};

}  // namespace vblk::virtio
