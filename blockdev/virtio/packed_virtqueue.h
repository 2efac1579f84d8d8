// The device's side of a packed virtqueue; what virtqueue.h is for split ones, and used the same
// way. virtio 1.2, "Packed Virtqueues".
//
// Each descriptor is read once, into a copy, before anything of its chain is believed: the id by
// which a buffer is given back stands in its last descriptor. The copies stay for as long as the
// buffer is in flight, for the ring's own may be overwritten by used descriptors. A chain is as
// long as the driver has made it, up to the descriptors that the device does not have already;
// whoever makes more available breaks the ring, and so do a chain that goes on in a descriptor
// which is not available, an id beyond the queue size, and an indirect descriptor that is not
// alone.
//
// Used descriptors are written as they come and published together: the flags of the first of a
// batch are held back, and the driver, which looks at one after the other, sees none before it.
//
// Not here: VIRTIO_F_IN_ORDER. A disk answers as its requests end; in order, a fast one would wait
// for every slow one before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <sys/uio.h>
#include <vector>

#include "blockdev/virtio/chain.h"
#include "blockdev/virtio/guest_memory.h"
#include "blockdev/virtio/packed_inflight_region.h"
#include "blockdev/virtio/packed_ring.h"

namespace vblk::virtio {

class PackedVirtqueue {
 public:
  struct Layout {
    std::byte* descriptor_ring;
    std::byte* driver_event;  // Driver Event Suppression
    std::byte* device_event;  // Device Event Suppression
    std::uint16_t size;       // 1 to kPackedRingSizeMax, any number
    PackedPosition next_avail;
    PackedPosition next_used;       // apart from next_avail by what is in flight
    bool event_idx;                 // VIRTIO_F_EVENT_IDX negotiated
    bool indirect;                  // VIRTIO_F_INDIRECT_DESC negotiated
    PackedInflightRegion inflight;  // recovered; or nothing: buffers in flight are not tracked
    std::vector<PackedInflightRecovery::Buffer> in_flight;  // of a predecessor
  };
  using Pop = virtio::Pop;

  // `memory` must outlive the queue. Leaves the driver's notifications suppressed.
  // Error: std::bad_alloc.
  PackedVirtqueue(Layout layout, const GuestMemory& memory);

  // Id of the next available buffer, or nothing: none is there, or the ring is broken
  // (broken_reason()).
  [[nodiscard]] std::optional<std::uint16_t> peek_head();
  // Takes it, after peek_head() has shown that there is one and that its id is not in flight. After
  // kBroken, broken_reason() tells why, and nothing more is popped.
  Pop pop(std::span<iovec> room, Chain& chain);
  // Takes the buffer `id` again, which is in flight: popped before, or one of Layout::in_flight.
  Pop take_again(std::uint16_t id, std::span<iovec> room, Chain& chain);

  // Writes the used descriptor of a buffer that was taken; seen by the driver only after publish().
  // `length_bytes`: bytes written to the buffer's writable part.
  void push_used(std::uint16_t id, std::uint32_t length_bytes);
  [[nodiscard]] bool has_unpublished() const { return unpublished_ != 0; }
  // Publishes the used descriptors; true if the driver wants an interrupt for them
  // ("Driver and Device Event Suppression").
  [[nodiscard]] bool publish();

  // enable_notifications() asks for a kick at the next descriptor and returns false if it is
  // available already.
  [[nodiscard]] bool enable_notifications();
  void disable_notifications();

  // Where the ring stands, as GET_VRING_BASE has it.
  [[nodiscard]] std::uint32_t next_avail() const { return packed_base(next_avail_, next_used_); }
  [[nodiscard]] std::uint16_t size() const { return layout_.size; }
  [[nodiscard]] const char* broken_reason() const { return broken_reason_; }

 private:
  // A buffer in flight: its copies, linked, and its entry in the in-flight region.
  struct Buffer {
    std::uint16_t first{0};
    std::uint16_t last{0};
    std::uint16_t length{0};
    std::uint16_t entry{0};
  };

  bool broken(const char* reason);
  Pop take(std::uint16_t id, const Buffer& buffer, std::span<iovec> room, Chain& chain);
  bool walk_indirect(const PackedDescriptor& descriptor, ChainBuilder& builder);
  void add(const PackedDescriptor& descriptor, ChainBuilder& builder) {
    builder.add(translator_, descriptor.guest_address, descriptor.length_bytes,
                (descriptor.flags & kDescFWrite) != 0);
  }
  void recover(const PackedInflightRecovery::Buffer& recovered);
  [[nodiscard]] std::byte* descriptor(std::uint16_t index) const {
    return layout_.descriptor_ring + index * kDescriptorBytes;
  }
  [[nodiscard]] std::uint16_t load_flags(std::uint16_t index) const;

  const Layout layout_;
  AddressTranslator translator_;
  PackedInflightRegion inflight_;
  PackedPosition next_avail_;
  PackedPosition next_used_;
  std::size_t outstanding_{0};    // descriptors popped and not published as used
  std::size_t unpublished_{0};    // of these: of used buffers
  std::uint16_t first_index_{0};  // where the first of those was written, and the flags it gets
  std::uint16_t first_flags_{0};
  std::vector<PackedDescriptor> copies_;
  std::vector<std::uint16_t> next_copy_;
  std::uint16_t free_copy_{0};   // first of the list of those that nobody has
  Buffer peeked_;                // what peek_head() has read, into the first free copies
  std::vector<Buffer> buffers_;  // by id
  std::vector<std::uint16_t> unpublished_entries_;
  bool published_before_{false};
  const char* broken_reason_{nullptr};
};

}  // namespace vblk::virtio
