// A guest (guest.h) whose queue 0 is a packed virtqueue. virtio 1.2, "Packed Virtqueues".
//
// Buffer ids run against positions, so that the two cannot be taken for each other. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "blockdev/conform/guest.h"
#include "blockdev/conform/packed_ring.h"
#include "blockdev/conform/probe.h"

namespace vblk::conform {

struct PackedGuestOptions {
  std::uint64_t features{0};  // beside those that every guest has
  std::uint64_t protocol_features{kPlainProtocol};
  std::uint16_t size{64};
  virtio::PackedPosition start{};
  bool starts_ring{true};
};

class PackedGuest {
 public:
  // Skips the test where RING_PACKED, or EVENT_IDX or INDIRECT_DESC of `features`, is not offered.
  explicit PackedGuest(Probe& probe, const PackedGuestOptions& options = {});
  PackedGuest(const PackedGuest&) = delete;
  PackedGuest& operator=(const PackedGuest&) = delete;

  [[nodiscard]] Guest& guest() { return guest_; }
  [[nodiscard]] Channel& channel() { return guest_.channel(); }
  [[nodiscard]] PackedRing& ring() { return ring_; }
  [[nodiscard]] std::span<std::byte> data() const { return guest_.data(); }

  void start_ring();
  // GET_VRING_BASE; both indices.
  std::uint32_t stop_ring();

  // Writes header and status of a slot, and says what its list is.
  std::vector<Piece> make_request(std::uint16_t slot, std::uint32_t type, std::uint64_t sector,
                                  std::span<const std::byte> readable,
                                  std::span<std::byte> writable);
  [[nodiscard]] std::uint16_t id_of(std::uint16_t slot) const {
    return static_cast<std::uint16_t>(ring_.size() - 1 - slot);
  }
  // Offers a request, and waits for the one request that is in flight.
  void post(std::uint16_t slot, std::uint32_t type, std::uint64_t sector,
            std::span<const std::byte> readable, std::span<std::byte> writable);
  Answer await(std::uint16_t slot);
  // The next used descriptor, which has to come.
  PackedRing::Used must_take();
  [[nodiscard]] std::uint8_t status_of(std::uint16_t slot) const {
    return guest_.status_of(0, slot);
  }

  Answer read(std::uint64_t sector, std::size_t bytes);
  Answer write(std::uint64_t sector, std::size_t bytes);
  void must_read(std::uint64_t sector, std::size_t bytes);
  void must_write(std::uint64_t sector, std::size_t bytes);

 private:
  Probe& probe_;
  Guest guest_;
  PackedRing ring_;
};

}  // namespace vblk::conform
