#include "blockdev/driver/packed_driver_ring.h"

#include <atomic>
#include <cassert>
#include <utility>

#include <fmt/core.h>

#include "blockdev/virtio/little_endian.h"

namespace vblk::driver {

using namespace virtio;

PackedDriverRing::PackedDriverRing(const Parts& parts, std::uint16_t size, bool event_idx)
    : parts_(parts), size_(size), event_idx_(event_idx), length_of_id_(size) {
  for (std::size_t i = size; i > 0; --i) free_ids_.push_back(static_cast<std::uint16_t>(i - 1));
}

std::optional<std::uint16_t> PackedDriverRing::next_id() const {
  if (free_ids_.empty()) return std::nullopt;
  return free_ids_.back();
}

bool PackedDriverRing::add(std::span<const PackedPiece> chain) {
  assert(!chain.empty() && !free_ids_.empty());
  if (chain.size() > size_ - in_flight_) return false;
  const std::uint16_t id = free_ids_.back();
  free_ids_.pop_back();
  length_of_id_[id] = static_cast<std::uint16_t>(chain.size());
  const PackedPosition head = next_avail_;
  std::uint16_t head_flags = 0;
  for (std::size_t i = 0; i < chain.size(); ++i) {
    std::byte* const entry = descriptor(next_avail_.index);
    const auto flags =
        static_cast<std::uint16_t>(chain[i].flags | (i + 1 < chain.size() ? kDescFNext : 0) |
                                   packed_available_flags(next_avail_.wrap));
    store_le<std::uint64_t>(entry, chain[i].guest_address);
    store_le<std::uint32_t>(entry + kPackedLengthOffset, chain[i].length_bytes);
    store_le<std::uint16_t>(entry + kPackedIdOffset, id);
    // "MUST NOT make the first descriptor in the list available before all subsequent descriptors".
    if (i == 0)
      head_flags = flags;
    else
      store_release_le(entry + kPackedFlagsOffset, flags);
    next_avail_.advance(1, size_);
  }
  // The device goes no further than the first that is not available: one held back hides all that
  // are added behind it.
  if (unpublished_ == 0) {
    first_ = head;
    first_flags_ = head_flags;
  } else {
    store_release_le(descriptor(head.index) + kPackedFlagsOffset, head_flags);
  }
  in_flight_ += chain.size();
  unpublished_ += chain.size();
  return true;
}

bool PackedDriverRing::publish() {
  if (unpublished_ == 0) return false;
  store_release_le(descriptor(first_.index) + kPackedFlagsOffset, first_flags_);
  const auto count = static_cast<std::uint16_t>(std::exchange(unpublished_, 0));
  // "Sending Available Buffer Notifications": the flags first, then the device's wish.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return packed_need_event(load_acquire_le<std::uint32_t>(parts_.device_event), next_avail_, count,
                           size_);
}

bool PackedDriverRing::is_used(PackedPosition position) const {
  return is_packed_used(
      load_acquire_le<std::uint16_t>(descriptor(position.index) + kPackedFlagsOffset),
      position.wrap);
}

bool PackedDriverRing::has_used() const { return is_used(next_used_); }

Expected<std::optional<PackedDriverRing::Used>> PackedDriverRing::take_used() {
  if (!has_used()) return std::nullopt;
  const std::byte* const entry = descriptor(next_used_.index);
  const Used used{.id = load_le<std::uint16_t>(entry + kPackedIdOffset),
                  .length_bytes = load_le<std::uint32_t>(entry + kPackedLengthOffset)};
  if (used.id >= size_ || length_of_id_[used.id] == 0) {
    return make_error(ErrorKind::kCorrupt,
                      fmt::format("the device returns buffer {}, which it does not have", used.id));
  }
  const std::uint16_t length = std::exchange(length_of_id_[used.id], std::uint16_t{0});
  next_used_.advance(length, size_);
  in_flight_ -= length;
  free_ids_.push_back(used.id);
  return used;
}

void PackedDriverRing::ask_for_interrupt() {
  // Without the event index interrupts stay enabled, as zeroed memory has it.
  if (event_idx_)
    store_release_le(parts_.driver_event, packed_event(kPackedEventAtDescriptor, next_used_));
}

std::uint32_t PackedDriverRing::base() const {
  PackedPosition position = next_used_;
  // Bounded by what is in flight, for a device may have written anything.
  for (std::size_t left = in_flight_; left > 0 && is_used(position);) {
    const auto id = load_le<std::uint16_t>(descriptor(position.index) + kPackedIdOffset);
    const std::size_t length = id < size_ ? length_of_id_[id] : 0;
    if (length == 0 || length > left) break;
    position.advance(length, size_);
    left -= length;
  }
  return packed_base(position, position);
}

}  // namespace vblk::driver
