// The packed virtqueue in memory, seen from neither side: layout, positions and wrap counters.
// virtio 1.2, "Packed Virtqueues". Device side: packed_virtqueue.h. Driver side: blockdev/driver/.
//
// One ring of descriptors, written by both sides. Both walk it in circles, each with a counter of
// one bit that changes at its end ("Driver and Device Ring Wrap Counters"), and two bits of a
// descriptor tell whose it is:
//
//   AVAIL  USED   to whoever is in a lap of counter w
//   w      !w     made available in this lap
//   w      w      used in this lap
//   else          left over from the lap before
#pragma once

#include <cstddef>
#include <cstdint>

#include "blockdev/virtio/split_ring.h"

namespace vblk::virtio {

// One entry of the descriptor ring, decoded; the flags NEXT, WRITE and INDIRECT are those of a
// split ring. On the wire: le64 addr, le32 len, le16 id, le16 flags.
struct PackedDescriptor {
  std::uint64_t guest_address;
  std::uint32_t length_bytes;
  std::uint16_t id;  // of the buffer; valid in the last descriptor of a chain
  std::uint16_t flags;
};
inline constexpr std::size_t kPackedLengthOffset = 8;
inline constexpr std::size_t kPackedIdOffset = 12;
inline constexpr std::size_t kPackedFlagsOffset = 14;
inline constexpr std::uint16_t kPackedFAvail = 1 << 7;
inline constexpr std::uint16_t kPackedFUsed = 1 << 15;

// Most entries of a packed ring: what a position has bits for.
inline constexpr std::size_t kPackedRingSizeMax = 1 << 15;

// The AVAIL and USED bits of a descriptor made available, or used, in a lap of counter `wrap`.
constexpr std::uint16_t packed_available_flags(bool wrap) {
  return wrap ? kPackedFAvail : kPackedFUsed;
}
constexpr std::uint16_t packed_used_flags(bool wrap) {
  return wrap ? kPackedFAvail | kPackedFUsed : 0;
}
constexpr bool is_packed_available(std::uint16_t flags, bool wrap) {
  return (flags & (kPackedFAvail | kPackedFUsed)) == packed_available_flags(wrap);
}
constexpr bool is_packed_used(std::uint16_t flags, bool wrap) {
  return (flags & (kPackedFAvail | kPackedFUsed)) == packed_used_flags(wrap);
}

// A place in the ring and the lap it belongs to. In 16 bits as event suppression structures and
// vhost-user's ring bases have it: the index, and the wrap counter in bit 15.
struct PackedPosition {
  std::uint16_t index{0};
  bool wrap{true};

  static constexpr PackedPosition decode(std::uint16_t bits) {
    return {.index = static_cast<std::uint16_t>(bits & 0x7fffU), .wrap = (bits & 0x8000U) != 0};
  }
  [[nodiscard]] constexpr std::uint16_t encode() const {
    return static_cast<std::uint16_t>(index | (wrap ? 0x8000U : 0U));
  }
  // `count` is at most `ring_size`.
  constexpr void advance(std::size_t count, std::size_t ring_size) {
    const std::size_t next = index + count;
    const bool is_past_end = next >= ring_size;
    index = static_cast<std::uint16_t>(is_past_end ? next - ring_size : next);
    wrap ^= is_past_end;
  }
  constexpr bool operator==(const PackedPosition&) const = default;
};

// Event suppression structure ("Event Suppression Structure Format"): le16 desc, le16 flags; read
// and written as one le32, so that the two always belong together.
inline constexpr std::size_t kPackedEventBytes = 4;
inline constexpr std::uint32_t kPackedEventEnable = 0;
inline constexpr std::uint32_t kPackedEventDisable = 1;
inline constexpr std::uint32_t kPackedEventAtDescriptor = 2;
constexpr std::uint32_t packed_event(std::uint32_t flags, PackedPosition at = {0, false}) {
  return flags << 16 | at.encode();
}
constexpr std::uint32_t packed_event_flags(std::uint32_t event) { return event >> 16 & 3U; }

// Whether whoever wrote `event` wants to be notified: the other side has gone on by `count`
// descriptors, to `now`. One that waits for a descriptor can have waited for one of the lap before,
// or of the next lap; the latter looks a lap too old, and then one notification too many may come
// of it, never one too few. Flags that are reserved count as "always", for the same reason.
constexpr bool packed_need_event(std::uint32_t event, PackedPosition now, std::uint16_t count,
                                 std::size_t ring_size) {
  const std::uint32_t flags = packed_event_flags(event);
  if (flags == kPackedEventDisable) return false;
  if (flags != kPackedEventAtDescriptor) return true;
  const PackedPosition wanted = PackedPosition::decode(static_cast<std::uint16_t>(event));
  const auto event_index =
      static_cast<std::uint16_t>(wanted.wrap == now.wrap ? wanted.index : wanted.index - ring_size);
  return need_event(event_index, now.index, static_cast<std::uint16_t>(now.index - count));
}

// Base of a ring as SET_VRING_BASE and GET_VRING_BASE carry it (vhost-user.rst, "Vring descriptor
// indices for packed virtqueues"): where the driver's descriptors go on to be read in the lower
// half, where used ones go on to be written in the upper.
constexpr std::uint32_t packed_base(PackedPosition next_avail, PackedPosition next_used) {
  return std::uint32_t{next_used.encode()} << 16 | next_avail.encode();
}
// Of a ring that nobody has used yet: at index 0 with both counters 1.
inline constexpr std::uint32_t kPackedBaseInitial = packed_base({}, {});

}  // namespace vblk::virtio
