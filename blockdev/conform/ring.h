// The driver's side of a split virtqueue with every byte in the test's hands. virtio 1.2, "Split
// Virtqueues".
//
// Checks nothing and remembers little: which descriptors are in use is the test's business. For
// tests that want a driver as it should be there is blockdev/driver. One thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "blockdev/conform/channel.h"
#include "blockdev/conform/doorbells.h"
#include "blockdev/driver/driver_memory.h"
#include "blockdev/virtio/split_ring.h"

namespace vblk::conform {

// A descriptor as a test wants it: `next` is filled in by Ring::chain().
struct Piece {
  std::uint64_t guest_address{0};
  std::uint32_t length_bytes{0};
  bool writable{false};
  std::uint16_t extra_flags{0};
};

class Ring : public Doorbells {
 public:
  struct Used {
    std::uint32_t id;
    std::uint32_t length_bytes;
  };

  // `base`: where both indices start, as after so many requests.
  Ring(driver::DriverMemory& memory, std::uint16_t size, std::uint16_t base);
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Writes one descriptor into a table: the ring's own, or an indirect one.
  static void write_entry(std::byte* table, std::size_t index, const virtio::Descriptor& entry);
  void write_descriptor(std::size_t index, const virtio::Descriptor& entry) {
    write_entry(table_, index, entry);
  }
  // Writes consecutive descriptors from `first`, each linked to the one behind it.
  void chain(std::uint16_t first, std::span<const Piece> pieces) {
    chain_in(table_, first, pieces);
  }
  static void chain_in(std::byte* table, std::uint16_t first, std::span<const Piece> pieces);

  // Puts a head into the avail ring; published by publish().
  void offer(std::uint16_t head);
  void publish() { publish_at(avail_index_); }
  void publish_at(std::uint16_t index);  // whatever has been offered
  // Kicks if the backend asks for it ("Available Buffer Notification Suppression").
  bool kick_if_wanted();
  void kick();
  // The next used element, if there is one.
  std::optional<Used> take();
  [[nodiscard]] bool has_used() const { return device_used_index() != used_index_; }
  // Waits until there is one, looking at memory.
  bool wait_used(std::chrono::milliseconds patience = kPatience);

  // Drives the ring by EVENT_IDX from now on, as if whoever had it before was waiting for a kick.
  void use_event_idx();
  void set_used_event(std::uint16_t index);
  void set_avail_flags(std::uint16_t flags);
  [[nodiscard]] std::uint16_t used_flags() const;
  [[nodiscard]] std::uint16_t device_used_index() const;
  [[nodiscard]] std::uint16_t used_index() const { return used_index_; }  // what has been taken
  [[nodiscard]] std::uint16_t avail_index() const { return avail_index_; }

  [[nodiscard]] std::uint16_t size() const { return size_; }
  [[nodiscard]] std::byte* table() const { return table_; }
  [[nodiscard]] std::byte* avail() const { return avail_; }
  [[nodiscard]] std::byte* used() const { return used_; }
  // The ring's parts for SET_VRING_ADDR.
  [[nodiscard]] vhost_user::VringAddress addresses(std::uint32_t index) const;

 private:
  const std::uint16_t size_;
  std::byte* table_;
  std::byte* avail_;
  std::byte* used_;
  std::uint16_t avail_index_;
  std::uint16_t published_index_;
  std::uint16_t used_index_;
  bool event_idx_{false};
};

}  // namespace vblk::conform
