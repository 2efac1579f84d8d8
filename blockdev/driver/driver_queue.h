// The driver's side of a virtqueue. virtio 1.2, "Split Virtqueues" and "Packed Virtqueues", as a
// driver. What is special to packed rings is in packed_driver_ring.h.
//
// The backend is not trusted: what it puts into the used ring is checked, and a lie is an Error.
// One thread.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "aio/error.h"
#include "blockdev/driver/driver_memory.h"
#include "blockdev/driver/packed_driver_ring.h"
#include "blockdev/vhost_user/protocol.h"
#include "blockdev/vhost_user/socket.h"
#include "blockdev/virtio/split_ring.h"

namespace vblk::driver {

// A piece of a chain. Device-readable pieces come first (the caller's duty; hostile tests break
// it).
struct Buffer {
  std::uint64_t guest_address;
  std::uint32_t length_bytes;
  bool device_writable;
};

struct DriverQueueOptions {
  std::uint16_t size{128};  // of a split ring a power of two
  bool packed{false};       // VIRTIO_F_RING_PACKED negotiated
  bool event_idx{false};    // VIRTIO_F_EVENT_IDX negotiated
  bool indirect{false};     // one indirect descriptor per chain (VIRTIO_F_INDIRECT_DESC negotiated)
  std::uint16_t indirect_max{0};  // longest chain put into an indirect table
};

class DriverQueue {
 public:
  struct Used {
    std::uint16_t token;
    std::uint32_t length_bytes;
  };

  // Lays the rings out in `memory`, which must outlive the queue. Error: kExhausted.
  static Expected<std::unique_ptr<DriverQueue>> create(DriverMemory& memory,
                                                       const DriverQueueOptions& options);
  DriverQueue(const DriverQueue&) = delete;
  DriverQueue& operator=(const DriverQueue&) = delete;

  // Puts a chain into the ring; not seen by the device before publish(). Nothing if there is no
  // descriptor left. The token, below the queue size, comes back in Used.
  std::optional<std::uint16_t> add(std::span<const Buffer> chain);
  // Makes everything added visible and kicks if the device wants that.
  void publish();
  // One used element, or nothing. Error: kCorrupt if the device claims what it never had.
  Expected<std::optional<Used>> take_used();
  // Sleeps until the device interrupts, `other_fd` (-1: none) becomes readable or is hung up,
  // `timeout` has passed, or a signal comes. Call with nothing to take; arms the interrupt itself.
  struct Wakening {
    bool by_device{false};
    bool by_other_fd{false};
  };
  Wakening wait(std::chrono::nanoseconds timeout, int other_fd = -1);

  [[nodiscard]] std::size_t in_flight() const { return in_flight_; }
  [[nodiscard]] const DriverQueueOptions& options() const { return options_; }
  [[nodiscard]] int kick_fd() const { return kick_.get(); }
  [[nodiscard]] int call_fd() const { return call_.get(); }
  [[nodiscard]] int error_fd() const { return error_.get(); }
  // Where the rings are, for SET_VRING_ADDR.
  [[nodiscard]] vhost_user::VringAddress addresses(std::uint32_t index) const;
  // Times the device was kicked, and times it ended a sleep.
  [[nodiscard]] std::uint64_t kicks() const { return kicks_; }
  [[nodiscard]] std::uint64_t wake_ups() const { return wake_ups_; }

  // SET_VRING_BASE: of a new ring, and where a backend goes on that finds nothing in flight, which
  // is behind what the device has used.
  [[nodiscard]] std::uint32_t initial_base() const;
  [[nodiscard]] std::uint32_t resume_base() const;

  // The rings themselves, for tests that write into them what no driver would. Of a packed ring:
  // the descriptor ring, the driver's and the device's event suppression structures.
  [[nodiscard]] std::byte* descriptor_table() const { return descriptors_; }
  [[nodiscard]] std::byte* avail_ring() const { return avail_; }
  [[nodiscard]] std::byte* used_ring() const { return used_; }

 private:
  DriverQueue(DriverMemory& memory, const DriverQueueOptions& options);
  Expected<void> lay_out();
  [[nodiscard]] bool is_indirect(std::span<const Buffer> chain) const {
    return options_.indirect && chain.size() > 1 && chain.size() <= options_.indirect_max;
  }
  // Fills in the indirect table of `index`; the buffer that it is.
  Buffer write_table(std::uint16_t index, std::span<const Buffer> chain);
  std::optional<std::uint16_t> add_packed(std::span<const Buffer> chain);
  std::optional<std::uint16_t> add_split(std::span<const Buffer> chain);
  Expected<std::optional<Used>> take_used_split();
  bool publish_split();
  Expected<void> check_length(std::uint16_t token, std::uint32_t length_bytes) const;
  void write_descriptor(std::byte* table, std::size_t index, const Buffer& buffer, bool has_next,
                        std::uint16_t next, std::uint16_t extra_flags);
  std::optional<std::uint16_t> add_direct(std::span<const Buffer> chain);
  std::optional<std::uint16_t> add_indirect(std::span<const Buffer> chain);
  void release(std::uint16_t head);
  [[nodiscard]] std::uint16_t device_used_index() const;
  [[nodiscard]] bool has_used() const;

  DriverMemory& memory_;
  const DriverQueueOptions options_;
  std::byte* descriptors_{nullptr};
  std::byte* avail_{nullptr};
  std::byte* used_{nullptr};
  std::byte* indirect_tables_{nullptr};  // one of options_.indirect_max entries per descriptor
  vhost_user::UniqueFd kick_;
  vhost_user::UniqueFd call_;
  vhost_user::UniqueFd error_;
  std::vector<std::uint16_t> free_;            // descriptors nobody uses
  std::vector<std::uint16_t> chain_length_;    // by head; 0: not in flight
  std::vector<std::uint64_t> writable_bytes_;  // by token: the most that a used element can claim
  std::vector<std::uint16_t>
      next_;  // our own copy of the links: the device may write over the table
  std::optional<PackedDriverRing> packed_;  // instead of what follows
  std::vector<PackedPiece> pieces_;         // room for a chain
  std::uint16_t avail_index_{0};
  std::uint16_t published_avail_index_{0};
  std::uint16_t used_index_{0};
  std::size_t in_flight_{0};
  std::uint64_t kicks_{0};
  std::uint64_t wake_ups_{0};
};

}  // namespace vblk::driver
