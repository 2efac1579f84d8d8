#include "blockdev/conform/ring.h"

#include <atomic>
#include <thread>
#include <utility>

#include "blockdev/virtio/little_endian.h"

namespace vblk::conform {

using namespace virtio;

namespace {

constexpr std::size_t kTableAlignment = 16;
constexpr std::size_t kRingAlignment = 64;
constexpr std::chrono::microseconds kLookAgain{20};

}  // namespace

Ring::Ring(driver::DriverMemory& memory, std::uint16_t size, std::uint16_t base)
    : size_(size),
      table_(ring_room(memory, descriptor_table_bytes(size), kTableAlignment)),
      avail_(ring_room(memory, avail_ring_bytes(size), kRingAlignment)),
      used_(ring_room(memory, used_ring_bytes(size), kRingAlignment)),
      avail_index_(base),
      published_index_(base),
      used_index_(base) {
  store_release_le(avail_ + kAvailIndexOffset, base);
  store_release_le(used_ + kUsedIndexOffset, base);
}

void Ring::write_entry(std::byte* table, std::size_t index, const Descriptor& entry) {
  std::byte* const at = table + index * kDescriptorBytes;
  store_le<std::uint64_t>(at, entry.guest_address);
  store_le<std::uint32_t>(at + 8, entry.length_bytes);
  store_le<std::uint16_t>(at + 12, entry.flags);
  store_le<std::uint16_t>(at + 14, entry.next);
}

void Ring::chain_in(std::byte* table, std::uint16_t first, std::span<const Piece> pieces) {
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const bool has_next = i + 1 < pieces.size();
    const unsigned flags = (has_next ? kDescFNext : 0U) | (pieces[i].writable ? kDescFWrite : 0U) |
                           pieces[i].extra_flags;
    write_entry(table, first + i,
                {.guest_address = pieces[i].guest_address,
                 .length_bytes = pieces[i].length_bytes,
                 .flags = static_cast<std::uint16_t>(flags),
                 .next = static_cast<std::uint16_t>(has_next ? first + i + 1 : 0)});
  }
}

void Ring::offer(std::uint16_t head) {
  store_release_le(avail_ + kAvailRingOffset + 2 * (avail_index_ & (size_ - 1U)), head);
  ++avail_index_;
}

void Ring::publish_at(std::uint16_t index) { store_release_le(avail_ + kAvailIndexOffset, index); }

bool Ring::kick_if_wanted() {
  const std::uint16_t old_index = std::exchange(published_index_, avail_index_);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  const bool wanted =
      event_idx_
          ? need_event(load_acquire_le<std::uint16_t>(used_ + used_avail_event_offset(size_)),
                       avail_index_, old_index)
          : (used_flags() & kUsedFNoNotify) == 0;
  if (wanted) kick();
  return wanted;
}

void Ring::kick() {
  published_index_ = avail_index_;
  signal_kick();
}

std::optional<Ring::Used> Ring::take() {
  if (!has_used()) return std::nullopt;
  const std::byte* const element =
      used_ + kUsedRingOffset + (used_index_ & (size_ - 1U)) * kUsedElementBytes;
  ++used_index_;
  return Used{.id = load_le<std::uint32_t>(element),
              .length_bytes = load_le<std::uint32_t>(element + 4)};
}

bool Ring::wait_used(std::chrono::milliseconds patience) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!has_used()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(kLookAgain);
  }
  return true;
}

void Ring::use_event_idx() {
  event_idx_ = true;
  store_release_le(used_ + used_avail_event_offset(size_), avail_index_);
}

void Ring::set_used_event(std::uint16_t index) {
  store_release_le(avail_ + avail_used_event_offset(size_), index);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void Ring::set_avail_flags(std::uint16_t flags) {
  store_release_le(avail_ + kAvailFlagsOffset, flags);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

std::uint16_t Ring::used_flags() const {
  return load_acquire_le<std::uint16_t>(used_ + kUsedFlagsOffset);
}

std::uint16_t Ring::device_used_index() const {
  return load_acquire_le<std::uint16_t>(used_ + kUsedIndexOffset);
}

vhost_user::VringAddress Ring::addresses(std::uint32_t index) const {
  return {.index = index,
          .flags = 0,
          .descriptor_user_address = reinterpret_cast<std::uint64_t>(table_),
          .used_user_address = reinterpret_cast<std::uint64_t>(used_),
          .avail_user_address = reinterpret_cast<std::uint64_t>(avail_),
          .log_guest_address = 0};
}

}  // namespace vblk::conform
