// The driver's side of a packed virtqueue: what DriverQueue does on one. virtio 1.2, "Packed
// Virtqueues", as a driver.
//
// The backend is not trusted: what it writes into the ring is checked, and a lie is an Error.
// One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "aio/error.h"
#include "blockdev/virtio/packed_ring.h"

namespace vblk::driver {

// A descriptor to be put into the ring: a piece of a chain, or an indirect table.
struct PackedPiece {
  std::uint64_t guest_address;
  std::uint32_t length_bytes;
  std::uint16_t flags;  // WRITE or INDIRECT; the rest is the ring's
};

class PackedDriverRing {
 public:
  struct Parts {
    std::byte* descriptor_ring;  // zeroed
    std::byte* driver_event;
    std::byte* device_event;
  };
  struct Used {
    std::uint16_t id;
    std::uint32_t length_bytes;
  };

  PackedDriverRing(const Parts& parts, std::uint16_t size, bool event_idx);

  // An id that nobody uses, for the next add(); nothing if all are in flight.
  [[nodiscard]] std::optional<std::uint16_t> next_id() const;
  // Puts a chain with that id into the ring; not seen by the device before publish(). False: there
  // are not enough descriptors left.
  bool add(std::span<const PackedPiece> chain);
  // Makes everything added visible; true if the device wants a kick.
  [[nodiscard]] bool publish();
  // One used descriptor, or nothing. Error: kCorrupt if the device claims what it never had.
  Expected<std::optional<Used>> take_used();
  [[nodiscard]] bool has_used() const;
  // Asks for an interrupt for the next used descriptor; look once more afterwards.
  void ask_for_interrupt();
  // Where a backend goes on that finds nothing in flight, as SET_VRING_BASE has it: behind what the
  // device has used, taken or not.
  [[nodiscard]] std::uint32_t base() const;

 private:
  [[nodiscard]] std::byte* descriptor(std::uint16_t index) const {
    return parts_.descriptor_ring + index * virtio::kDescriptorBytes;
  }
  [[nodiscard]] bool is_used(virtio::PackedPosition position) const;

  const Parts parts_;
  const std::uint16_t size_;
  const bool event_idx_;
  std::vector<std::uint16_t> free_ids_;
  std::vector<std::uint16_t> length_of_id_;  // descriptors; 0: not in flight
  virtio::PackedPosition next_avail_;
  virtio::PackedPosition next_used_;
  std::size_t in_flight_{0};      // descriptors
  std::size_t unpublished_{0};    // descriptors added since publish()
  virtio::PackedPosition first_;  // of these, and the flags that make it available
  std::uint16_t first_flags_{0};
};

}  // namespace vblk::driver
