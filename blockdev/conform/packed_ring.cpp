#include "blockdev/conform/packed_ring.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace virtio;

namespace {

// "Structure Size and Alignment".
constexpr std::size_t kRingAlignment = 16;
constexpr std::size_t kEventAlignment = 64;
constexpr std::size_t kIds = std::size_t{1} << 16;
constexpr std::chrono::microseconds kLookAgain{20};

}  // namespace

PackedRing::PackedRing(driver::DriverMemory& memory, std::uint16_t size, PackedPosition start)
    : size_(size),
      ring_(ring_room(memory, descriptor_table_bytes(size), kRingAlignment)),
      driver_event_(ring_room(memory, kPackedEventBytes, kEventAlignment)),
      device_event_(ring_room(memory, kPackedEventBytes, kEventAlignment)),
      next_avail_(start),
      next_used_(start),
      lengths_(kIds) {
  // As the lap that ends at `start` has left them: used, each of them.
  for (std::uint16_t i = 0; i < size; ++i) {
    const bool is_of_this_lap = i < start.index;
    set_flags(i, packed_used_flags(is_of_this_lap == start.wrap));
  }
}

void PackedRing::write_entry(std::byte* table, std::size_t index, const PackedDescriptor& entry) {
  std::byte* const at = table + index * kDescriptorBytes;
  store_le<std::uint64_t>(at, entry.guest_address);
  store_le<std::uint32_t>(at + kPackedLengthOffset, entry.length_bytes);
  store_le<std::uint16_t>(at + kPackedIdOffset, entry.id);
  store_release_le(at + kPackedFlagsOffset, entry.flags);
}

PackedDescriptor PackedRing::descriptor(std::size_t index) const {
  const std::byte* const at = ring_ + index * kDescriptorBytes;
  const auto flags = load_acquire_le<std::uint16_t>(at + kPackedFlagsOffset);
  return {.guest_address = load_le<std::uint64_t>(at),
          .length_bytes = load_le<std::uint32_t>(at + kPackedLengthOffset),
          .id = load_le<std::uint16_t>(at + kPackedIdOffset),
          .flags = flags};
}

void PackedRing::set_flags(std::size_t index, std::uint16_t flags) {
  store_release_le(ring_ + index * kDescriptorBytes + kPackedFlagsOffset, flags);
}

void PackedRing::offer(std::span<const Piece> pieces, std::uint16_t id) {
  std::vector<PackedDescriptor> entries;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool has_next = i + 1 < pieces.size();
    const unsigned flags = (has_next ? kDescFNext : 0U) | (pieces[i].writable ? kDescFWrite : 0U) |
                           pieces[i].extra_flags;
    entries.push_back({.guest_address = pieces[i].guest_address,
                       .length_bytes = pieces[i].length_bytes,
                       .id = static_cast<std::uint16_t>(has_next ? (id + 1) % size_ : id),
                       .flags = static_cast<std::uint16_t>(flags)});
  }
  offer_raw(entries);
}

void PackedRing::offer_raw(std::span<const PackedDescriptor> entries) {
  if (entries.empty()) return;
  const PackedPosition head = next_avail_;
  for (PackedDescriptor entry : entries) {
    entry.flags |= packed_available_flags(next_avail_.wrap);
    // The first stays as it was until the rest is there.
    if (next_avail_ == head) entry.flags = descriptor(head.index).flags;
    write_descriptor(next_avail_.index, entry);
    next_avail_.advance(1, size_);
  }
  lengths_[entries.back().id] = static_cast<std::uint16_t>(entries.size());
  unkicked_ = static_cast<std::uint16_t>(unkicked_ + entries.size());
  set_flags(head.index,
            static_cast<std::uint16_t>(entries[0].flags | packed_available_flags(head.wrap)));
}

bool PackedRing::kick_if_wanted() {
  const std::uint16_t count = std::exchange(unkicked_, std::uint16_t{0});
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const bool wanted = packed_need_event(device_event(), next_avail_, count, size_);
  if (wanted) signal_kick();
  return wanted;
}

void PackedRing::kick() {
  unkicked_ = 0;
  signal_kick();
}

bool PackedRing::has_used() const {
  return is_packed_used(descriptor(next_used_.index).flags, next_used_.wrap);
}

std::optional<PackedRing::Used> PackedRing::take() {
  if (!has_used()) return std::nullopt;
  const PackedDescriptor entry = descriptor(next_used_.index);
  next_used_.advance(std::max<std::size_t>(1, lengths_[entry.id]), size_);
  return Used{.id = entry.id, .flags = entry.flags, .length_bytes = entry.length_bytes};
}

bool PackedRing::wait_used(std::chrono::milliseconds patience) const {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!has_used()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(kLookAgain);
  }
  return true;
}

void PackedRing::set_driver_event(std::uint32_t event) {
  store_release_le(driver_event_, event);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

std::uint32_t PackedRing::device_event() const {
  return load_acquire_le<std::uint32_t>(device_event_);
}

vhost_user::VringAddress PackedRing::addresses(std::uint32_t index) const {
  return {.index = index,
          .flags = 0,
          .descriptor_user_address = reinterpret_cast<std::uint64_t>(ring_),
          .used_user_address = reinterpret_cast<std::uint64_t>(device_event_),
          .avail_user_address = reinterpret_cast<std::uint64_t>(driver_event_),
          .log_guest_address = 0};
}

}  // namespace vblk::conform
