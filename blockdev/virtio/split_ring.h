// The split virtqueue in memory, seen from neither side: layout only. virtio 1.2, "Split
// Virtqueues". Device side: virtqueue.h. Driver side: blockdev/driver/.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vblk::virtio {

// One entry of the descriptor table, decoded. On the wire: le64 addr, le32 len, le16 flags, le16
// next.
struct Descriptor {
  std::uint64_t guest_address;
  std::uint32_t length_bytes;
  std::uint16_t flags;
  std::uint16_t next;
};
inline constexpr std::size_t kDescriptorBytes = 16;
inline constexpr std::uint16_t kDescFNext = 1;
inline constexpr std::uint16_t kDescFWrite = 2;  // device-writable
inline constexpr std::uint16_t kDescFIndirect = 4;

inline constexpr std::uint16_t kAvailFNoInterrupt = 1;
inline constexpr std::uint16_t kUsedFNoNotify = 1;

// avail ring: le16 flags, le16 idx, le16 ring[size], le16 used_event.
inline constexpr std::size_t kAvailFlagsOffset = 0;
inline constexpr std::size_t kAvailIndexOffset = 2;
inline constexpr std::size_t kAvailRingOffset = 4;
constexpr std::size_t avail_used_event_offset(std::size_t size) { return 4 + 2 * size; }
constexpr std::size_t avail_ring_bytes(std::size_t size) { return 6 + 2 * size; }

// used ring: le16 flags, le16 idx, {le32 id, le32 len} ring[size], le16 avail_event.
inline constexpr std::size_t kUsedFlagsOffset = 0;
inline constexpr std::size_t kUsedIndexOffset = 2;
inline constexpr std::size_t kUsedRingOffset = 4;
inline constexpr std::size_t kUsedElementBytes = 8;
constexpr std::size_t used_avail_event_offset(std::size_t size) { return 4 + 8 * size; }
constexpr std::size_t used_ring_bytes(std::size_t size) { return 6 + 8 * size; }

constexpr std::size_t descriptor_table_bytes(std::size_t size) { return kDescriptorBytes * size; }

// "Used Buffer Notification Suppression": whether moving an index from `old_index` to `new_index`
// has passed `event_index`.
constexpr bool need_event(std::uint16_t event_index, std::uint16_t new_index,
                          std::uint16_t old_index) {
  return static_cast<std::uint16_t>(new_index - event_index - 1) <
         static_cast<std::uint16_t>(new_index - old_index);
}

}  // namespace vblk::virtio
