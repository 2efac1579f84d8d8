// The driver's side of a packed virtqueue with every byte in the test's hands: what ring.h is for
// split ones. virtio 1.2, "Packed Virtqueues".
//
// Checks nothing; remembers how long the list of each buffer id was, for the device goes on behind
// the list whose one used descriptor it has written. One thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "blockdev/conform/doorbells.h"
#include "blockdev/conform/probe.h"
#include "blockdev/conform/ring.h"
#include "blockdev/driver/driver_memory.h"
#include "blockdev/virtio/packed_ring.h"

namespace vblk::conform {

class PackedRing : public Doorbells {
 public:
  // A used descriptor as the device has written it.
  struct Used {
    std::uint16_t id;
    std::uint16_t flags;
    std::uint32_t length_bytes;
  };

  // `start`: where both sides stand, as after so many descriptors.
  PackedRing(driver::DriverMemory& memory, std::uint16_t size, virtio::PackedPosition start);
  PackedRing(const PackedRing&) = delete;
  PackedRing& operator=(const PackedRing&) = delete;

  // Writes one descriptor, its flags last.
  static void write_entry(std::byte* table, std::size_t index,
                          const virtio::PackedDescriptor& entry);
  void write_descriptor(std::size_t index, const virtio::PackedDescriptor& entry) {
    write_entry(ring_, index, entry);
  }
  [[nodiscard]] virtio::PackedDescriptor descriptor(std::size_t index) const;
  void set_flags(std::size_t index, std::uint16_t flags);

  // Writes a list from where the driver stands on; its first descriptor becomes available after the
  // rest. Only its last has the buffer's id; the others have another one, which means nothing.
  void offer(std::span<const Piece> pieces, std::uint16_t id);
  // The same of descriptors that say what they like; their AVAIL and USED bits alone are added.
  void offer_raw(std::span<const virtio::PackedDescriptor> entries);

  // Kicks if the backend asks for it ("Driver and Device Event Suppression").
  bool kick_if_wanted();
  void kick();
  // The next used descriptor, if there is one.
  std::optional<Used> take();
  [[nodiscard]] bool has_used() const;
  bool wait_used(std::chrono::milliseconds patience = kPatience) const;

  // The Driver Event Suppression structure, and what the device has written into its own.
  void set_driver_event(std::uint32_t event);
  void wait_for(virtio::PackedPosition position) {
    set_driver_event(virtio::packed_event(virtio::kPackedEventAtDescriptor, position));
  }
  [[nodiscard]] std::uint32_t device_event() const;

  [[nodiscard]] virtio::PackedPosition next_avail() const { return next_avail_; }
  [[nodiscard]] virtio::PackedPosition next_used() const { return next_used_; }
  [[nodiscard]] std::uint32_t base() const { return virtio::packed_base(next_avail_, next_used_); }
  [[nodiscard]] std::uint16_t size() const { return size_; }
  [[nodiscard]] std::byte* ring() const { return ring_; }
  [[nodiscard]] std::byte* driver_area() const { return driver_event_; }
  [[nodiscard]] std::byte* device_area() const { return device_event_; }
  // The ring's parts for SET_VRING_ADDR.
  [[nodiscard]] vhost_user::VringAddress addresses(std::uint32_t index) const;

 private:
  const std::uint16_t size_;
  std::byte* ring_;
  std::byte* driver_event_;
  std::byte* device_event_;
  virtio::PackedPosition next_avail_;
  virtio::PackedPosition next_used_;
  std::uint16_t unkicked_{0};           // descriptors made available since the last kick
  std::vector<std::uint16_t> lengths_;  // by id: descriptors of its list
};

}  // namespace vblk::conform
