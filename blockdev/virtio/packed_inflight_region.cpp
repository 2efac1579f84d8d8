#include "blockdev/virtio/packed_inflight_region.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <utility>

#include <fmt/format.h>

#include "blockdev/virtio/inflight_region.h"
#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

// Words of the region that are stored whole.
struct FreeHeads {
  std::uint16_t free_head;
  std::uint16_t old_free_head;
};
struct UsedState {
  std::uint16_t used_index;
  std::uint16_t old_used_index;
  std::uint8_t used_wrap_counter;
  std::uint8_t old_used_wrap_counter;
  std::uint16_t padding;
};
struct EntryState {
  std::uint8_t is_in_flight;
  std::uint8_t padding;
  std::uint16_t next;
  std::uint16_t last;
  std::uint16_t count;  // `num`
};
struct EntryDescriptor {
  std::uint16_t id;
  std::uint16_t flags;
  std::uint32_t length_bytes;
};
static_assert(sizeof(FreeHeads) == 4 && sizeof(UsedState) == 8 && sizeof(EntryState) == 8 &&
              sizeof(EntryDescriptor) == 8);

template <typename Word, typename T>
T load_whole(const std::byte* from) {
  return std::bit_cast<T>(load_acquire<Word>(from));
}

template <typename Word, typename T>
void store_whole(std::byte* to, const T& value) {
  store_release<Word>(to, std::bit_cast<Word>(value));
}

std::unexpected<Error> unusable(std::string why) {
  return make_error(ErrorKind::kInvalidArgument, "the in-flight region " + std::move(why));
}

}  // namespace

// What recover() finds out before it changes anything.
struct PackedInflightRegion::Walk {
  std::uint16_t ring_size{0};
  std::vector<bool> is_free;                                   // by entry
  std::vector<bool> is_taken;                                  // by entry: in a chain in flight
  std::size_t free_count{0};                                   // entries
  std::size_t taken_count{0};                                  // entries, each a descriptor
  std::vector<std::pair<std::uint64_t, std::uint16_t>> heads;  // in flight: counter, entry
  std::vector<PackedInflightRecovery::Buffer> in_flight;
};

Expected<void> PackedInflightRegion::check() const {
  return InflightRegion(begin_, desc_num_).check();  // both begin alike
}

bool PackedInflightRegion::is_fresh() const {
  return load_acquire<std::uint16_t>(begin_ + kInflightVersionOffset) == 0;
}

void PackedInflightRegion::store_free_heads(std::uint16_t free_head, std::uint16_t old_free_head) {
  store_whole<std::uint32_t>(begin_ + kPackedInflightFreeHeadOffset,
                             FreeHeads{free_head, old_free_head});
}

void PackedInflightRegion::store_used(PackedPosition used, PackedPosition old_used) {
  store_whole<std::uint64_t>(
      begin_ + kPackedInflightUsedOffset,
      UsedState{.used_index = used.index,
                .old_used_index = old_used.index,
                .used_wrap_counter = used.wrap ? std::uint8_t{1} : std::uint8_t{0},
                .old_used_wrap_counter = old_used.wrap ? std::uint8_t{1} : std::uint8_t{0},
                .padding = 0});
}

void PackedInflightRegion::initialize(PackedPosition next_used) {
  store_release<std::uint64_t>(begin_ + kInflightFeaturesOffset, 0);
  store_release<std::uint16_t>(begin_ + kInflightDescNumOffset, desc_num_);
  for (std::uint16_t i = 0; i < desc_num_; ++i) {
    next_[i] = static_cast<std::uint16_t>(i + 1);
    store_whole<std::uint64_t>(
        desc(i),
        EntryState{.is_in_flight = 0, .padding = 0, .next = next_[i], .last = 0, .count = 0});
  }
  store_free_heads(0, 0);
  store_used(next_used, next_used);
  free_head_ = 0;
  next_used_ = next_used;
  // Last: until then it is as if nothing had happened.
  store_release<std::uint16_t>(begin_ + kInflightVersionOffset, kInflightVersion);
}

PackedDescriptor PackedInflightRegion::load_descriptor(std::uint16_t entry) const {
  const auto rest =
      load_whole<std::uint64_t, EntryDescriptor>(desc(entry) + kPackedInflightIdOffset);
  return {.guest_address = load_acquire<std::uint64_t>(desc(entry) + kPackedInflightAddressOffset),
          .length_bytes = rest.length_bytes,
          .id = rest.id,
          .flags = rest.flags};
}

// From free_head_ on, and the links of those it passes.
Expected<void> PackedInflightRegion::find_free(Walk& walk) {
  for (std::uint16_t entry = free_head_; entry < desc_num_; entry = next_[entry]) {
    if (walk.is_free[entry]) return unusable("has a list of free entries that runs in a circle");
    walk.is_free[entry] = true;
    ++walk.free_count;
    next_[entry] = load_acquire<std::uint16_t>(desc(entry) + kPackedInflightNextOffset);
  }
  return {};
}

// The chains in flight, in the order in which they were popped.
Expected<void> PackedInflightRegion::find_in_flight(Walk& walk) {
  for (std::uint16_t i = 0; i < desc_num_; ++i) {
    if (walk.is_free[i] || load_acquire<std::uint8_t>(desc(i) + kPackedInflightFlagOffset) == 0)
      continue;
    walk.heads.emplace_back(load_acquire<std::uint64_t>(desc(i) + kPackedInflightCounterOffset), i);
  }
  std::ranges::sort(walk.heads);
  std::vector<bool> has_id(walk.ring_size);
  for (const auto& [counter, head] : walk.heads) {
    const auto state = load_whole<std::uint64_t, EntryState>(desc(head));
    PackedInflightRecovery::Buffer buffer{.entry = head, .chain = {}};
    std::uint16_t entry = head;
    for (std::uint16_t left = state.count; left > 0; --left) {
      if (entry >= desc_num_ || walk.is_free[entry] || walk.is_taken[entry])
        return unusable(fmt::format("has a chain at entry {} with an entry of another", head));
      walk.is_taken[entry] = true;
      buffer.chain.push_back(load_descriptor(entry));
      last_[head] = entry;
      next_[entry] = load_acquire<std::uint16_t>(desc(entry) + kPackedInflightNextOffset);
      entry = next_[entry];
    }
    walk.taken_count += buffer.chain.size();
    if (buffer.chain.empty() || last_[head] != state.last) {
      return unusable(fmt::format("has a chain at entry {} that does not end where it says", head));
    }
    const std::uint16_t id = buffer.chain.back().id;
    if (id >= walk.ring_size || has_id[id]) {
      return unusable(
          fmt::format("has buffer {} in flight twice, or in a ring of {}", id, walk.ring_size));
    }
    has_id[id] = true;
    walk.in_flight.push_back(std::move(buffer));
  }
  if (walk.free_count + walk.taken_count != desc_num_)
    return unusable("has entries that are neither free nor in flight");
  if (walk.taken_count > walk.ring_size) {
    return unusable(fmt::format("has {} descriptors in flight in a ring of {}", walk.taken_count,
                                walk.ring_size));
  }
  return {};
}

Expected<PackedInflightRecovery> PackedInflightRegion::recover(std::byte* ring,
                                                               std::uint16_t ring_size,
                                                               PackedPosition next_used) {
  if (auto checked = check(); !checked) return std::unexpected(std::move(checked.error()));
  if (ring_size > desc_num_) {
    return unusable(fmt::format("is for {} descriptors and the ring has {}", desc_num_, ring_size));
  }
  next_.resize(desc_num_);
  last_.resize(desc_num_);
  if (is_fresh()) {
    initialize(next_used);
    return PackedInflightRecovery{};
  }

  // Which of the two states counts. All is looked at before anything is changed, and once: the
  // frontend can change it meanwhile.
  const auto heads = load_whole<std::uint32_t, FreeHeads>(begin_ + kPackedInflightFreeHeadOffset);
  const auto used = load_whole<std::uint64_t, UsedState>(begin_ + kPackedInflightUsedOffset);
  const PackedPosition now{.index = used.used_index, .wrap = used.used_wrap_counter != 0};
  const PackedPosition old{.index = used.old_used_index, .wrap = used.old_used_wrap_counter != 0};
  if (now.index >= ring_size || old.index >= ring_size) {
    return unusable(
        fmt::format("stands at {} and {} in a ring of {}", old.index, now.index, ring_size));
  }
  const auto flags =
      load_acquire_le<std::uint16_t>(ring + old.index * kDescriptorBytes + kPackedFlagsOffset);
  const bool is_published = now != old && !is_packed_available(flags, old.wrap);
  free_head_ = is_published ? heads.free_head : heads.old_free_head;
  next_used_ = is_published ? now : old;
  Walk walk{.ring_size = ring_size,
            .is_free = std::vector<bool>(desc_num_),
            .is_taken = std::vector<bool>(desc_num_),
            .heads = {},
            .in_flight = {}};
  if (auto found = find_free(walk); !found) return std::unexpected(std::move(found.error()));
  if (auto found = find_in_flight(walk); !found) return std::unexpected(std::move(found.error()));

  for (std::uint16_t i = 0; i < desc_num_; ++i) {
    if (walk.is_free[i] && load_acquire<std::uint8_t>(desc(i) + kPackedInflightFlagOffset) != 0)
      store_release<std::uint8_t>(desc(i) + kPackedInflightFlagOffset, 0);
  }
  store_free_heads(free_head_, free_head_);
  store_used(next_used_, next_used_);
  PackedPosition position = next_used_;
  for (std::size_t i = 0; i < walk.taken_count; ++i) {
    store_release_le(ring + position.index * kDescriptorBytes + kPackedFlagsOffset,
                     packed_available_flags(position.wrap));
    position.advance(1, ring_size);
  }
  // Above all that are in flight: who comes after us finds them first.
  counter_ = walk.heads.empty() ? 0 : walk.heads.back().first + 1;
  return PackedInflightRecovery{.is_fresh = false,
                                .next_avail = position,
                                .next_used = next_used_,
                                .in_flight = std::move(walk.in_flight)};
}

void PackedInflightRegion::popping(const PackedDescriptor& descriptor) {
  const std::uint16_t entry = popping_count_ == 0 ? free_head_ : popping_next_;
  assert(entry < desc_num_);
  store_whole<std::uint64_t>(
      desc(entry) + kPackedInflightIdOffset,
      EntryDescriptor{
          .id = descriptor.id, .flags = descriptor.flags, .length_bytes = descriptor.length_bytes});
  store_release<std::uint64_t>(desc(entry) + kPackedInflightAddressOffset,
                               descriptor.guest_address);
  popping_last_ = entry;
  popping_next_ = next_[entry];
  ++popping_count_;
}

std::uint16_t PackedInflightRegion::popped() {
  const std::uint16_t head = free_head_;
  last_[head] = popping_last_;
  store_release<std::uint64_t>(desc(head) + kPackedInflightCounterOffset, counter_++);
  store_whole<std::uint64_t>(desc(head),
                             EntryState{.is_in_flight = 1,
                                        .padding = 0,
                                        .next = next_[head],
                                        .last = popping_last_,
                                        .count = std::exchange(popping_count_, std::uint16_t{0})});
  free_head_ = popping_next_;
  store_free_heads(free_head_, free_head_);
  return head;
}

void PackedInflightRegion::publishing(std::span<const std::uint16_t> entries,
                                      PackedPosition next_used) {
  for (const std::uint16_t entry : entries) {
    const std::uint16_t last = last_[entry];
    next_[last] = free_head_;
    store_release<std::uint16_t>(desc(last) + kPackedInflightNextOffset, free_head_);
    free_head_ = entry;
  }
  store_release<std::uint16_t>(begin_ + kPackedInflightFreeHeadOffset, free_head_);
  store_used(next_used, next_used_);
  next_used_ = next_used;
}

void PackedInflightRegion::published(std::span<const std::uint16_t> entries) {
  for (const std::uint16_t entry : entries)
    store_release<std::uint8_t>(desc(entry) + kPackedInflightFlagOffset, 0);
  store_release<std::uint16_t>(begin_ + kPackedInflightOldFreeHeadOffset, free_head_);
  store_used(next_used_, next_used_);
}

}  // namespace vblk::virtio
