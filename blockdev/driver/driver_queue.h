// The driver's side of a split virtqueue. virtio 1.2, "Split Virtqueues", as a driver.
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
  std::uint16_t size{128};  // a power of two
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

  // Puts a chain into the available ring; not seen by the device before publish(). Nothing if there
  // is no descriptor left. The token comes back in Used; it is the chain's head index.
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

  // The used ring's idx as the device has it now: where a backend goes on that finds nothing in
  // flight (SET_VRING_BASE).
  [[nodiscard]] std::uint16_t device_used_index() const;

  // The rings themselves, for tests that write into them what no driver would.
  [[nodiscard]] std::byte* descriptor_table() const { return descriptors_; }
  [[nodiscard]] std::byte* avail_ring() const { return avail_; }
  [[nodiscard]] std::byte* used_ring() const { return used_; }

 private:
  DriverQueue(DriverMemory& memory, const DriverQueueOptions& options);
  void write_descriptor(std::byte* table, std::size_t index, const Buffer& buffer, bool has_next,
                        std::uint16_t next, std::uint16_t extra_flags);
  std::optional<std::uint16_t> add_direct(std::span<const Buffer> chain);
  std::optional<std::uint16_t> add_indirect(std::span<const Buffer> chain);
  void release(std::uint16_t head);
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
  std::vector<std::uint64_t> writable_bytes_;  // by head: the most that a used element can claim
  std::vector<std::uint16_t>
      next_;  // our own copy of the links: the device may write over the table
  std::uint16_t avail_index_{0};
  std::uint16_t published_avail_index_{0};
  std::uint16_t used_index_{0};
  std::size_t in_flight_{0};
  std::uint64_t kicks_{0};
  std::uint64_t wake_ups_{0};
};

}  // namespace vblk::driver
