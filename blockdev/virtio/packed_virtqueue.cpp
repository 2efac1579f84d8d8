#include "blockdev/virtio/packed_virtqueue.h"

#include <atomic>
#include <cstring>
#include <numeric>
#include <utility>

#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

// One read of the whole descriptor: what is checked is what is used.
PackedDescriptor read_descriptor(const std::byte* from) {
  std::byte copy[kDescriptorBytes];
  std::memcpy(copy, from, kDescriptorBytes);
  return {.guest_address = load_le<std::uint64_t>(copy),
          .length_bytes = load_le<std::uint32_t>(copy + kPackedLengthOffset),
          .id = load_le<std::uint16_t>(copy + kPackedIdOffset),
          .flags = load_le<std::uint16_t>(copy + kPackedFlagsOffset)};
}

}  // namespace

PackedVirtqueue::PackedVirtqueue(Layout layout, const GuestMemory& memory)
    : layout_(std::move(layout)),
      translator_(memory),
      inflight_(layout_.inflight),
      next_avail_(layout_.next_avail),
      next_used_(layout_.next_used),
      copies_(layout_.size),
      next_copy_(layout_.size),
      buffers_(layout_.size) {
  std::iota(next_copy_.begin(), next_copy_.end(), std::uint16_t{1});
  if (inflight_) unpublished_entries_.reserve(layout_.size);
  for (const auto& recovered : layout_.in_flight) recover(recovered);
  disable_notifications();
}

// A buffer that a predecessor has popped.
void PackedVirtqueue::recover(const PackedInflightRecovery::Buffer& recovered) {
  Buffer& buffer = buffers_[recovered.chain.back().id];
  buffer = {.first = free_copy_,
            .last = free_copy_,
            .length = static_cast<std::uint16_t>(recovered.chain.size()),
            .entry = recovered.entry};
  for (const PackedDescriptor& copy : recovered.chain) {
    buffer.last = free_copy_;
    copies_[free_copy_] = copy;
    free_copy_ = next_copy_[free_copy_];
  }
  outstanding_ += recovered.chain.size();
}

// Always false, so that a check can end with it.
bool PackedVirtqueue::broken(const char* reason) {
  broken_reason_ = reason;
  return false;
}

std::uint16_t PackedVirtqueue::load_flags(std::uint16_t index) const {
  return load_acquire_le<std::uint16_t>(descriptor(index) + kPackedFlagsOffset);
}

std::optional<std::uint16_t> PackedVirtqueue::peek_head() {
  if (broken_reason_ != nullptr) return std::nullopt;
  if (!is_packed_available(load_flags(next_avail_.index), next_avail_.wrap)) return std::nullopt;
  PackedPosition position = next_avail_;
  std::uint16_t copy = free_copy_;
  std::uint16_t count = 0;
  for (;;) {
    if (count == layout_.size) {
      broken("a descriptor chain is longer than the queue size: it loops");
      return std::nullopt;
    }
    if (outstanding_ + count == layout_.size) {
      broken("the driver makes more descriptors available than the ring has entries");
      return std::nullopt;
    }
    const PackedDescriptor next = read_descriptor(descriptor(position.index));
    // "The driver always makes the first descriptor in the list available after the rest."
    if (!is_packed_available(next.flags, position.wrap)) {
      broken("a descriptor chain goes on in a descriptor that is not available");
      return std::nullopt;
    }
    copies_[copy] = next;
    ++count;
    if ((next.flags & kDescFNext) == 0) break;
    copy = next_copy_[copy];
    position.advance(1, layout_.size);
  }
  peeked_ = {.first = free_copy_, .last = copy, .length = count, .entry = 0};
  const std::uint16_t id = copies_[copy].id;
  if (id < layout_.size) return id;
  broken("a buffer id beyond the queue size");
  return std::nullopt;
}

// From the buffer's copies. Inline, because one of its two callers pops every request.
[[gnu::always_inline]] inline PackedVirtqueue::Pop PackedVirtqueue::take(std::uint16_t id,
                                                                         const Buffer& buffer,
                                                                         std::span<iovec> room,
                                                                         Chain& chain) {
  ChainBuilder builder(room);
  std::uint16_t copy = buffer.first;
  for (std::uint16_t left = buffer.length; left > 0; --left) {
    const PackedDescriptor& next = copies_[copy];
    if ((next.flags & kDescFIndirect) == 0) {
      add(next, builder);
    } else if (buffer.length > 1) {
      // "Each list only contains descriptors of a given type."
      broken("an indirect descriptor in a chain with others");
      return Pop::kBroken;
    } else if (!walk_indirect(next, builder)) {
      return Pop::kBroken;
    }
    copy = next_copy_[copy];
  }
  chain = builder.chain(id);
  return Pop::kChain;
}

PackedVirtqueue::Pop PackedVirtqueue::pop(std::span<iovec> room, Chain& chain) {
  const std::uint16_t id = copies_[peeked_.last].id;
  if (take(id, peeked_, room, chain) == Pop::kBroken) return Pop::kBroken;
  next_avail_.advance(peeked_.length, layout_.size);
  outstanding_ += peeked_.length;
  free_copy_ = next_copy_[peeked_.last];
  Buffer& buffer = buffers_[id];
  buffer = peeked_;
  if (inflight_) {
    std::uint16_t copy = buffer.first;
    for (std::uint16_t left = buffer.length; left > 0; --left) {
      inflight_.popping(copies_[copy]);
      copy = next_copy_[copy];
    }
    buffer.entry = inflight_.popped();
  }
  return Pop::kChain;
}

PackedVirtqueue::Pop PackedVirtqueue::take_again(std::uint16_t id, std::span<iovec> room,
                                                 Chain& chain) {
  return take(id, buffers_[id], room, chain);
}

// "Indirect Flag: Scatter-Gather Support": the whole table, in its order; of its entries' flags
// WRITE alone counts, and ids do not.
bool PackedVirtqueue::walk_indirect(const PackedDescriptor& descriptor, ChainBuilder& builder) {
  if (!layout_.indirect) return broken("an indirect descriptor without VIRTIO_F_INDIRECT_DESC");
  const std::size_t entries = descriptor.length_bytes / kDescriptorBytes;
  if (descriptor.length_bytes % kDescriptorBytes != 0 || entries == 0 ||
      entries > kIndirectEntriesMax)
    return broken(
        "an indirect table whose length is no multiple of 16, zero, or beyond 1024 entries");
  const std::byte* const table =
      translator_.translate(descriptor.guest_address, descriptor.length_bytes);
  if (table == nullptr) return broken("an indirect table outside guest memory");
  for (std::size_t i = 0; i < entries; ++i)
    add(read_descriptor(table + i * kDescriptorBytes), builder);
  return true;
}

void PackedVirtqueue::push_used(std::uint16_t id, std::uint32_t length_bytes) {
  std::byte* const used = descriptor(next_used_.index);
  store_le<std::uint32_t>(used + kPackedLengthOffset, length_bytes);
  store_le<std::uint16_t>(used + kPackedIdOffset, id);
  // "In a used descriptor, this bit is used to specify whether any data has been written": the
  // status byte always has.
  const auto flags = static_cast<std::uint16_t>(packed_used_flags(next_used_.wrap) | kDescFWrite);
  if (unpublished_ == 0) {
    first_index_ = next_used_.index;
    first_flags_ = flags;
  } else {
    store_release_le(used + kPackedFlagsOffset, flags);
  }
  const Buffer& buffer = buffers_[id];
  next_used_.advance(buffer.length, layout_.size);
  unpublished_ += buffer.length;
  next_copy_[buffer.last] = free_copy_;
  free_copy_ = buffer.first;
  if (inflight_) unpublished_entries_.push_back(buffer.entry);
}

bool PackedVirtqueue::publish() {
  if (inflight_) inflight_.publishing(unpublished_entries_, next_used_);
  store_release_le(descriptor(first_index_) + kPackedFlagsOffset, first_flags_);
  const auto count = static_cast<std::uint16_t>(std::exchange(unpublished_, 0));
  outstanding_ -= count;
  if (inflight_) {
    inflight_.published(unpublished_entries_);
    unpublished_entries_.clear();
  }
  // The flags must be visible before the driver's wish is read: the driver does the opposite, so
  // that one of the two sees the other ("Receiving Used Buffers From The Device").
  std::atomic_thread_fence(std::memory_order_seq_cst);
  // Whether the interrupt for the last buffers of whoever ran this ring before us went out is not
  // known. One too many is harmless; one too few hangs the guest.
  if (!std::exchange(published_before_, true)) return true;
  const auto event = load_acquire_le<std::uint32_t>(layout_.driver_event);
  if (!layout_.event_idx) return packed_event_flags(event) != kPackedEventDisable;
  return packed_need_event(event, next_used_, count, layout_.size);
}

bool PackedVirtqueue::enable_notifications() {
  store_release_le(layout_.device_event, layout_.event_idx
                                             ? packed_event(kPackedEventAtDescriptor, next_avail_)
                                             : packed_event(kPackedEventEnable));
  // The wish must be visible before the ring is looked at once more.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return !is_packed_available(load_flags(next_avail_.index), next_avail_.wrap);
}

void PackedVirtqueue::disable_notifications() {
  // With the event index too: the position that was waited for comes again two laps later.
  store_release_le(layout_.device_event, packed_event(kPackedEventDisable));
}

}  // namespace vblk::virtio
