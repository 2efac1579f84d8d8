// The device's side of a split virtqueue: rings and chains, no loop, no requests.
// virtio 1.2, "Split Virtqueues".
//
// Everything the driver wrote is hostile and may change while we look: indices and descriptors are
// read once, into copies. A chain whose structure does not hold breaks the ring (chain.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <sys/uio.h>

#include "blockdev/virtio/chain.h"
#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/inflight_region.h"
#include "blockdev/virtio/split_ring.h"

namespace vblk::virtio {

class Virtqueue {
 public:
  struct Layout {
    std::byte* descriptor_table;
    std::byte* avail_ring;
    std::byte* used_ring;
    std::uint16_t size;        // a power of two
    std::uint16_t next_avail;  // where to go on in the avail ring
    bool event_idx;            // VIRTIO_F_EVENT_IDX negotiated
    bool indirect;             // VIRTIO_F_INDIRECT_DESC negotiated
    InflightRegion inflight;   // recovered; or nothing: buffers in flight are not tracked
  };
  using Pop = virtio::Pop;

  // `memory` must outlive the queue. The used index goes on where the ring's own stands. Leaves
  // the driver's notifications suppressed.
  Virtqueue(const Layout& layout, const GuestMemory& memory);

  // Head of the next available chain, or nothing: none is there, or the ring is broken
  // (broken_reason()).
  [[nodiscard]] std::optional<std::uint16_t> peek_head();
  // Takes the next available chain, after peek_head() has shown that there is one. After kBroken,
  // broken_reason() tells why, and nothing more is popped.
  Pop pop(std::span<iovec> room, Chain& chain);
  // Takes the chain at `head`, which a predecessor has popped and not completed
  // (InflightRecovery::heads): as pop(), but the avail ring stays where it is.
  Pop take_again(std::uint16_t head, std::span<iovec> room, Chain& chain);

  // Adds a used element; seen by the driver only after publish(). `length_bytes`: bytes written to
  // the chain's writable part.
  void push_used(std::uint16_t head, std::uint32_t length_bytes);
  [[nodiscard]] bool has_unpublished() const { return used_index_ != published_used_index_; }
  // Publishes the used elements; true if the driver wants an interrupt for them
  // ("Used Buffer Notification Suppression").
  [[nodiscard]] bool publish();

  // "Available Buffer Notification Suppression". enable_notifications() asks for a kick at the next
  // buffer and returns false if one is there already.
  [[nodiscard]] bool enable_notifications();
  void disable_notifications();

  [[nodiscard]] std::uint16_t next_avail() const { return next_avail_; }
  [[nodiscard]] std::uint16_t size() const { return layout_.size; }
  [[nodiscard]] const char* broken_reason() const { return broken_reason_; }

 private:
  bool broken(const char* reason);
  Pop take(std::span<iovec> room, Chain& chain);
  bool walk(ChainBuilder& builder);
  bool walk_indirect(const Descriptor& descriptor, ChainBuilder& builder);
  void add(const Descriptor& descriptor, ChainBuilder& builder) {
    builder.add(translator_, descriptor.guest_address, descriptor.length_bytes,
                (descriptor.flags & kDescFWrite) != 0);
  }
  [[nodiscard]] std::uint16_t load_avail_index() const;

  const Layout layout_;
  AddressTranslator translator_;
  InflightRegion inflight_;
  std::uint16_t next_avail_;
  std::uint16_t avail_index_;  // the driver's index as last read
  std::uint16_t used_index_;
  std::uint16_t published_used_index_;
  std::uint16_t head_{0};  // as peek_head() has read it, once; or what is taken again
  bool published_before_{false};
  const char* broken_reason_{nullptr};
};

}  // namespace vblk::virtio
