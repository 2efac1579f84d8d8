// What is in flight on one packed ring, kept where it outlives this process. What
// inflight_region.h is for split rings. vhost-user.rst, "Inflight I/O tracking".
//
// A packed ring tells a successor nothing: used descriptors overwrite those of buffers that are
// still in flight, and where the device stands in the ring is written nowhere. So the region has
// copies of the descriptors that are in flight, each in an entry that comes from a list of free
// ones, and the position at which the next used descriptor belongs.
//
//   popped       the first n free entries: descriptors, counter, inflight = 1
//             P  free_head = old_free_head = next of the n-th
//   publishing   of each buffer: desc[last].next = free_head; free_head = its first entry
//                used_idx, used_wrap_counter = behind the batch
//             P  (the ring) flags of the batch's first used descriptor, the others' before
//   published    of each buffer: inflight = 0
//                old_free_head = free_head
//                old_used_idx, old_used_wrap_counter = used_idx, used_wrap_counter
//
// Each line is a store, or stores of which none counts without the next line; P marks those that
// make a buffer in flight, or done. An entry is in flight when it is not in the list of free ones:
// the one that begins at old_free_head, or, from the second P on, at free_head.
//
//   killed with                             the successor
//   used_idx = old_used_idx                 believes the old values: whatever else is begun has
//                                           not happened
//   others, and the descriptor at           the same; the batch has not been published
//   old_used_idx is still available
//   others, and it is not                   does what is left of "published"
//
// Fields that belong together lie in one word and change by one store: a killed process never
// leaves an index of one lap with the wrap counter of another.
//
// One thing the specification does not say. The driver looks at one used descriptor after the
// other, and those behind the first of a batch may have been written when the process was killed,
// before the first was. A successor that publishes a smaller batch would have them taken for its
// own. So recover() marks every descriptor as available again that belongs to a buffer in flight.
//
// The frontend may write anything here at any time. While requests run nothing is read back, but
// from copies; a region that contradicts itself or its ring is refused when the ring starts.
//
// Thread: the queue's. Nothing here allocates but recover().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "aio/error.h"
#include "blockdev/virtio/packed_ring.h"

namespace vblk::virtio {

// QueueRegionPacked and DescStatePacked. In the byte order of the machine, as all of vhost-user.
inline constexpr std::size_t kPackedInflightFreeHeadOffset = 12;     // u16
inline constexpr std::size_t kPackedInflightOldFreeHeadOffset = 14;  // u16
// used_idx u16, old_used_idx u16, used_wrap_counter u8, old_used_wrap_counter u8, padding.
inline constexpr std::size_t kPackedInflightUsedOffset = 16;
inline constexpr std::size_t kPackedInflightDescOffset = 32;
inline constexpr std::size_t kPackedInflightDescBytes = 32;
// Within DescStatePacked: inflight u8, padding, next u16, last u16, num u16; counter u64; id u16,
// flags u16, len u32; addr u64.
inline constexpr std::size_t kPackedInflightFlagOffset = 0;
inline constexpr std::size_t kPackedInflightNextOffset = 2;
inline constexpr std::size_t kPackedInflightCounterOffset = 8;
inline constexpr std::size_t kPackedInflightIdOffset = 16;
inline constexpr std::size_t kPackedInflightAddressOffset = 24;

// What a queue that starts has to do before anything else.
struct PackedInflightRecovery {
  struct Buffer {
    std::uint16_t entry{0};               // by which the region knows it
    std::vector<PackedDescriptor> chain;  // as it was popped; the last has the id
  };
  // Nothing is known of the ring's past: it goes on where the frontend says (SET_VRING_BASE).
  bool is_fresh{true};
  // Where the ring goes on, unless fresh.
  PackedPosition next_avail;
  PackedPosition next_used;
  // Buffers in flight, in the order in which they were popped; ids are below the ring's size and
  // differ.
  std::vector<Buffer> in_flight;
};

// May be moved; two of them on the same memory must not be in use.
class PackedInflightRegion {
 public:
  // Tracks nothing: `if (region)` is false, and nothing else may be called.
  PackedInflightRegion() = default;
  // `begin`: region_bytes(desc_num) of memory, aligned to 8 bytes, which must outlive this.
  PackedInflightRegion(std::byte* begin, std::uint16_t desc_num)
      : begin_(begin), desc_num_(desc_num) {}
  [[nodiscard]] explicit operator bool() const { return begin_ != nullptr; }

  // Bytes of a region. Rounded up to 64, so that two queues' never share a cache line.
  static constexpr std::size_t region_bytes(std::size_t desc_num) {
    return (kPackedInflightDescOffset + desc_num * kPackedInflightDescBytes + 63) &
           ~std::size_t{63};
  }

  // Nobody has used it yet.
  [[nodiscard]] bool is_fresh() const;
  // As InflightRegion::check().
  [[nodiscard]] Expected<void> check() const;

  // To be called once, before the rest: initializes a fresh region for a ring that stands at
  // `next_used`, or does what a predecessor did not come to ("When reconnecting"). `ring`: the
  // descriptor ring, of `ring_size` entries, up to desc_num. Killed in here, the next one does it
  // again. Errors: as check(), and for a region that contradicts itself or is not this ring's.
  Expected<PackedInflightRecovery> recover(std::byte* ring, std::uint16_t ring_size,
                                           PackedPosition next_used);

  // "When receiving available buffers from the driver": each descriptor of a chain in its order,
  // and then that it is popped. All that is in flight has at most ring_size. Returns the entry.
  void popping(const PackedDescriptor& descriptor);
  std::uint16_t popped();
  // "When supplying used buffers to the driver": the steps before the flags of the batch's first
  // descriptor change, and those after. `entries`: the batch; `next_used`: behind it.
  void publishing(std::span<const std::uint16_t> entries, PackedPosition next_used);
  void published(std::span<const std::uint16_t> entries);

 private:
  struct Walk;
  [[nodiscard]] std::byte* desc(std::size_t index) const {
    return begin_ + kPackedInflightDescOffset + index * kPackedInflightDescBytes;
  }
  void initialize(PackedPosition next_used);
  [[nodiscard]] PackedDescriptor load_descriptor(std::uint16_t entry) const;
  Expected<void> find_free(Walk& walk);
  Expected<void> find_in_flight(Walk& walk);
  void store_free_heads(std::uint16_t free_head, std::uint16_t old_free_head);
  void store_used(PackedPosition used, PackedPosition old_used);

  std::byte* begin_{nullptr};
  std::uint16_t desc_num_{0};
  std::uint16_t free_head_{0};  // desc_num_: the list is empty
  PackedPosition next_used_;
  std::uint64_t counter_{0};
  // The chain that is being popped.
  std::uint16_t popping_next_{0};  // the entry for its next descriptor
  std::uint16_t popping_last_{0};
  std::uint16_t popping_count_{0};
  // Copies of the entries' links, by entry; `last` of those in flight.
  std::vector<std::uint16_t> next_;
  std::vector<std::uint16_t> last_;
};

}  // namespace vblk::virtio
