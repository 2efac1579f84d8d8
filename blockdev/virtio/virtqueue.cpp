#include "blockdev/virtio/virtqueue.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

// One read of the whole descriptor: what is checked is what is used.
Descriptor read_descriptor(const std::byte* table, std::size_t index) {
  std::byte copy[kDescriptorBytes];
  std::memcpy(copy, table + index * kDescriptorBytes, kDescriptorBytes);
  return {.guest_address = load_le<std::uint64_t>(copy),
          .length_bytes = load_le<std::uint32_t>(copy + 8),
          .flags = load_le<std::uint16_t>(copy + 12),
          .next = load_le<std::uint16_t>(copy + 14)};
}

}  // namespace

Virtqueue::Virtqueue(const Layout& layout, const GuestMemory& memory)
    : layout_(layout),
      translator_(memory),
      inflight_(layout.inflight),
      next_avail_(layout.next_avail),
      avail_index_(layout.next_avail),
      used_index_(load_acquire_le<std::uint16_t>(layout.used_ring + kUsedIndexOffset)),
      published_used_index_(used_index_) {
  // "Available Buffer Notification Suppression": with the event index, flags is to be 0, whatever
  // ran the ring before has left there.
  if (layout_.event_idx)
    store_release_le(layout_.used_ring + kUsedFlagsOffset, std::uint16_t{0});
  else
    disable_notifications();
}

// Always false, so that a check can end with it.
bool Virtqueue::broken(const char* reason) {
  broken_reason_ = reason;
  return false;
}

std::uint16_t Virtqueue::load_avail_index() const {
  return load_acquire_le<std::uint16_t>(layout_.avail_ring + kAvailIndexOffset);
}

std::optional<std::uint16_t> Virtqueue::peek_head() {
  if (broken_reason_ != nullptr) return std::nullopt;
  if (avail_index_ == next_avail_) {
    avail_index_ = load_avail_index();
    if (avail_index_ == next_avail_) return std::nullopt;
    // A driver can have at most one entry per descriptor outstanding.
    if (static_cast<std::uint16_t>(avail_index_ - next_avail_) > layout_.size) {
      broken("the driver claims more available buffers than the ring has entries");
      return std::nullopt;
    }
  }
  const std::size_t entry = next_avail_ & (layout_.size - 1U);
  head_ = load_acquire_le<std::uint16_t>(layout_.avail_ring + kAvailRingOffset + 2 * entry);
  if (head_ < layout_.size) return head_;
  broken("an available entry names a descriptor beyond the table");
  return std::nullopt;
}

// Inline, because one of its two callers pops every request.
[[gnu::always_inline]] inline Virtqueue::Pop Virtqueue::take(std::span<iovec> room, Chain& chain) {
  ChainBuilder builder(room);
  if (!walk(builder)) return Pop::kBroken;
  chain = builder.chain(head_);
  return Pop::kChain;
}

Virtqueue::Pop Virtqueue::pop(std::span<iovec> room, Chain& chain) {
  if (take(room, chain) == Pop::kBroken) return Pop::kBroken;
  ++next_avail_;
  if (inflight_) inflight_.popped(head_);
  return Pop::kChain;
}

Virtqueue::Pop Virtqueue::take_again(std::uint16_t head, std::span<iovec> room, Chain& chain) {
  head_ = head;
  return take(room, chain);
}

// Follows the chain in the descriptor table. False if its structure does not hold (the ring is
// broken).
bool Virtqueue::walk(ChainBuilder& builder) {
  std::uint16_t index = head_;
  for (std::size_t count = 1;; ++count) {
    const Descriptor descriptor = read_descriptor(layout_.descriptor_table, index);
    // A chain that is longer than the table runs in a circle.
    if (count > layout_.size)
      return broken("a descriptor chain is longer than the queue size: it loops");
    if ((descriptor.flags & kDescFIndirect) != 0) return walk_indirect(descriptor, builder);
    add(descriptor, builder);
    if ((descriptor.flags & kDescFNext) == 0) return true;
    if (descriptor.next >= layout_.size)
      return broken("a descriptor's next field lies beyond the table");
    index = descriptor.next;
  }
}

// "Indirect Descriptors": always the last of its chain, one level only.
bool Virtqueue::walk_indirect(const Descriptor& descriptor, ChainBuilder& builder) {
  if (!layout_.indirect) return broken("an indirect descriptor without VIRTIO_F_INDIRECT_DESC");
  if ((descriptor.flags & kDescFNext) != 0)
    return broken("an indirect descriptor that has a next one");
  const std::size_t entries = descriptor.length_bytes / kDescriptorBytes;
  if (descriptor.length_bytes % kDescriptorBytes != 0 || entries == 0 ||
      entries > kIndirectEntriesMax)
    return broken(
        "an indirect table whose length is no multiple of 16, zero, or beyond 1024 entries");
  const std::byte* const table =
      translator_.translate(descriptor.guest_address, descriptor.length_bytes);
  if (table == nullptr) return broken("an indirect table outside guest memory");
  std::size_t index = 0;
  for (std::size_t steps = 0;; ++steps) {
    const Descriptor entry = read_descriptor(table, index);
    if (steps == entries) return broken("an indirect descriptor chain loops");
    if ((entry.flags & kDescFIndirect) != 0)
      return broken("an indirect descriptor inside an indirect table");
    add(entry, builder);
    if ((entry.flags & kDescFNext) == 0) return true;
    if (entry.next >= entries)
      return broken("an indirect descriptor's next field lies beyond its table");
    index = entry.next;
  }
}

void Virtqueue::push_used(std::uint16_t head, std::uint32_t length_bytes) {
  const std::size_t slot = used_index_ & (layout_.size - 1U);
  std::byte* const element = layout_.used_ring + kUsedRingOffset + slot * kUsedElementBytes;
  store_le<std::uint32_t>(element, head);
  store_le<std::uint32_t>(element + 4, length_bytes);
  ++used_index_;
  if (inflight_) inflight_.completed(head);
}

bool Virtqueue::publish() {
  const std::uint16_t old_index = published_used_index_;
  store_release_le(layout_.used_ring + kUsedIndexOffset, used_index_);
  published_used_index_ = used_index_;
  if (inflight_)
    inflight_.published(used_index_, static_cast<std::uint16_t>(used_index_ - old_index));
  // The index must be visible before the driver's wish is read: the driver does the opposite, so
  // that one of the two sees the other ("Receiving Used Buffers From The Device").
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!layout_.event_idx) {
    const auto flags = load_acquire_le<std::uint16_t>(layout_.avail_ring + kAvailFlagsOffset);
    return (flags & kAvailFNoInterrupt) == 0;
  }
  // Whether the interrupt for the last elements of whoever ran this ring before us went out is not
  // known. One too many is harmless; one too few hangs the guest.
  if (!std::exchange(published_before_, true)) return true;
  const auto used_event =
      load_acquire_le<std::uint16_t>(layout_.avail_ring + avail_used_event_offset(layout_.size));
  return need_event(used_event, used_index_, old_index);
}

bool Virtqueue::enable_notifications() {
  // avail_event exists only if the feature was negotiated; some firmware keeps other data there.
  if (layout_.event_idx) {
    store_release_le(layout_.used_ring + used_avail_event_offset(layout_.size), next_avail_);
  } else {
    store_release_le(layout_.used_ring + kUsedFlagsOffset, std::uint16_t{0});
  }
  // The wish must be visible before the ring is looked at once more.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return load_avail_index() == next_avail_;
}

void Virtqueue::disable_notifications() {
  // With the event index nothing is to be done: it is behind us already, so the driver does not
  // kick.
  if (!layout_.event_idx) store_release_le(layout_.used_ring + kUsedFlagsOffset, kUsedFNoNotify);
}

}  // namespace vblk::virtio
