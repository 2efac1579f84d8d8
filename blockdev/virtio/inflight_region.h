// What is in flight on one split ring, kept where it outlives this process.
// vhost-user.rst, "Inflight I/O tracking".
//
// A device that dies takes with it which buffers it had taken off the avail ring: the ring alone
// does not tell, because requests complete in any order. So the frontend keeps a region of shared
// memory for each queue (inflight_area.h), in which the device marks what it has:
//
//   popped       desc[i].counter = next counter; desc[i].inflight = 1
//   completed    desc[i].next = last_batch_head; last_batch_head = i      used element written
//   published    used ring's idx += n; the n of the list: inflight = 0; used_idx = used ring's idx
//
// Each step is one store, ordered behind those before it, and after each the region and the used
// ring together tell what a successor must do (recover()):
//
//   killed after ...              the successor finds
//   counter, not inflight         a buffer that was never popped: it is popped again
//   inflight                      a buffer in flight
//   next, or last_batch_head      the same; the list counts only as far as used_idx falls behind
//   used ring's idx               the first n of the list are done, whatever their `inflight` says
//   some inflight = 0             the same n, cleared once more
//   used_idx                      nothing left to do
//
// The next avail index needs no field of its own: whatever has been popped is either in the used
// ring or in flight.
//
// The frontend may write anything here at any time. What is read while requests run is masked to
// the ring; a region that contradicts itself or its ring is refused when the ring starts.
//
// Thread: the queue's. Nothing here allocates but recover().
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "aio/error.h"

namespace vblk::virtio {

// QueueRegionSplit and DescStateSplit. In the byte order of the machine, as all of vhost-user.
inline constexpr std::size_t kInflightFeaturesOffset = 0;        // u64, 0
inline constexpr std::size_t kInflightVersionOffset = 8;         // u16, 0: not initialized yet
inline constexpr std::size_t kInflightDescNumOffset = 10;        // u16
inline constexpr std::size_t kInflightLastBatchHeadOffset = 12;  // u16
inline constexpr std::size_t kInflightUsedIndexOffset = 14;      // u16
inline constexpr std::size_t kInflightDescOffset = 16;
inline constexpr std::size_t kInflightDescBytes = 16;
// Within DescStateSplit.
inline constexpr std::size_t kInflightFlagOffset = 0;     // u8
inline constexpr std::size_t kInflightNextOffset = 6;     // u16
inline constexpr std::size_t kInflightCounterOffset = 8;  // u64
inline constexpr std::uint16_t kInflightVersion = 1;

// What a queue that starts has to do before anything else.
struct InflightRecovery {
  // Nothing is known of the ring's past: it goes on where the frontend says (SET_VRING_BASE).
  bool is_fresh{true};
  // Where the avail ring goes on, unless fresh.
  std::uint16_t next_avail{0};
  // Head indices of the buffers in flight, in the order in which they were popped.
  std::vector<std::uint16_t> heads;
};

// A value: two of them on the same memory are the same region, but only one may be in use.
class InflightRegion {
 public:
  // Tracks nothing: `if (region)` is false, and nothing else may be called.
  InflightRegion() = default;
  // `begin`: region_bytes(desc_num) of memory, aligned to 8 bytes, which must outlive this.
  InflightRegion(std::byte* begin, std::uint16_t desc_num) : begin_(begin), desc_num_(desc_num) {}
  [[nodiscard]] explicit operator bool() const { return begin_ != nullptr; }

  // Bytes of a region. Rounded up to 64, so that two queues' never share a cache line.
  static constexpr std::size_t region_bytes(std::size_t desc_num) {
    return (kInflightDescOffset + desc_num * kInflightDescBytes + 63) & ~std::size_t{63};
  }

  // Whether the region can be used at all. Error: kInvalidArgument (features or a version that are
  // not known, a size that is not what the frontend said).
  [[nodiscard]] Expected<void> check() const;

  // To be called once, before the rest: initializes a fresh region, or does what a predecessor did
  // not come to ("When reconnecting"). `used_index` is the used ring's, `ring_size` a power of two
  // up to desc_num. Killed in here, the next one does it again. Errors: as check(), and for a
  // region that is not this ring's.
  Expected<InflightRecovery> recover(std::uint16_t used_index, std::uint16_t ring_size);

  // "When receiving available buffers from the driver". `head` is below ring_size here and below.
  void popped(std::uint16_t head);
  // "When supplying used buffers to the driver", steps 1 to 3.
  void completed(std::uint16_t head);
  // The steps after the used ring's idx has become `used_index`, for the `count` completed last.
  void published(std::uint16_t used_index, std::uint16_t count);

 private:
  [[nodiscard]] std::byte* desc(std::size_t index) const {
    return begin_ + kInflightDescOffset + index * kInflightDescBytes;
  }
  void initialize(std::uint16_t used_index);
  void clear_last_batch(std::uint16_t count);

  std::byte* begin_{nullptr};
  std::uint16_t desc_num_{0};
  std::uint16_t index_mask_{0};  // ring_size - 1
  std::uint16_t last_batch_head_{0};
  std::uint64_t counter_{0};
};

}  // namespace vblk::virtio
