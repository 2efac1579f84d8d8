#include "blockdev/virtio/inflight_region.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

std::unexpected<Error> unusable(std::string why) {
  return make_error(ErrorKind::kInvalidArgument, "the in-flight region " + std::move(why));
}

}  // namespace

Expected<void> InflightRegion::check() const {
  const auto version = load_acquire<std::uint16_t>(begin_ + kInflightVersionOffset);
  if (version == 0) return {};
  if (version != kInflightVersion) return unusable(fmt::format("has version {}, not 1", version));
  const auto features = load_acquire<std::uint64_t>(begin_ + kInflightFeaturesOffset);
  if (features != 0)
    return unusable(fmt::format("has features {:#x}, of which none is known", features));
  const auto desc_num = load_acquire<std::uint16_t>(begin_ + kInflightDescNumOffset);
  if (desc_num != desc_num_) {
    return unusable(fmt::format("is for {} descriptors and announced for {}", desc_num, desc_num_));
  }
  return {};
}

void InflightRegion::initialize(std::uint16_t used_index) {
  store_release<std::uint64_t>(begin_ + kInflightFeaturesOffset, 0);
  store_release<std::uint16_t>(begin_ + kInflightDescNumOffset, desc_num_);
  store_release<std::uint16_t>(begin_ + kInflightLastBatchHeadOffset, 0);
  store_release<std::uint16_t>(begin_ + kInflightUsedIndexOffset, used_index);
  for (std::size_t i = 0; i < desc_num_; ++i)
    store_release<std::uint8_t>(desc(i) + kInflightFlagOffset, 0);
  // Last: until then it is as if nothing had happened.
  store_release<std::uint16_t>(begin_ + kInflightVersionOffset, kInflightVersion);
}

Expected<InflightRecovery> InflightRegion::recover(std::uint16_t used_index,
                                                   std::uint16_t ring_size) {
  if (auto checked = check(); !checked) return std::unexpected(std::move(checked.error()));
  if (ring_size > desc_num_) {
    return unusable(fmt::format("is for {} descriptors and the ring has {}", desc_num_, ring_size));
  }
  index_mask_ = static_cast<std::uint16_t>(ring_size - 1);
  if (load_acquire<std::uint16_t>(begin_ + kInflightVersionOffset) == 0) {
    initialize(used_index);
    return InflightRecovery{};
  }
  // Looked at once, because the frontend can change it meanwhile.
  std::vector<std::pair<std::uint64_t, std::uint16_t>> in_flight;
  const auto collect = [&] {
    in_flight.clear();
    for (std::size_t i = 0; i < desc_num_; ++i) {
      if (load_acquire<std::uint8_t>(desc(i) + kInflightFlagOffset) == 0) continue;
      in_flight.emplace_back(load_acquire<std::uint64_t>(desc(i) + kInflightCounterOffset),
                             static_cast<std::uint16_t>(i));
    }
  };
  last_batch_head_ = load_acquire<std::uint16_t>(begin_ + kInflightLastBatchHeadOffset);
  const auto tracked = load_acquire<std::uint16_t>(begin_ + kInflightUsedIndexOffset);
  const auto last_batch_size = static_cast<std::uint16_t>(used_index - tracked);
  collect();
  // With nothing in flight the ring may have been started anew meanwhile, with other indices.
  if (last_batch_size > ring_size && !in_flight.empty()) {
    return unusable(fmt::format("stands at used index {} and the ring at {}: it is of another ring",
                                tracked, used_index));
  }
  if (last_batch_size != 0 && !in_flight.empty()) {
    clear_last_batch(last_batch_size);
    collect();
  }
  store_release<std::uint16_t>(begin_ + kInflightUsedIndexOffset, used_index);

  std::ranges::sort(in_flight);
  InflightRecovery recovery{.is_fresh = false,
                            .next_avail = static_cast<std::uint16_t>(used_index + in_flight.size()),
                            .heads = {}};
  for (const auto& [counter, head] : in_flight) {
    if (head >= ring_size)
      return unusable(fmt::format("has buffer {} in flight in a ring of {}", head, ring_size));
    recovery.heads.push_back(head);
  }
  // Above all that are in flight: who comes after us finds them first.
  counter_ = in_flight.empty() ? 0 : in_flight.back().first + 1;
  return recovery;
}

void InflightRegion::clear_last_batch(std::uint16_t count) {
  std::uint16_t head = last_batch_head_;
  for (std::uint16_t i = 0; i < count; ++i) {
    std::byte* const entry = desc(head & index_mask_);
    store_release<std::uint8_t>(entry + kInflightFlagOffset, 0);
    head = load_acquire<std::uint16_t>(entry + kInflightNextOffset);
  }
}

void InflightRegion::popped(std::uint16_t head) {
  std::byte* const entry = desc(head);
  store_release<std::uint64_t>(entry + kInflightCounterOffset, counter_++);
  store_release<std::uint8_t>(entry + kInflightFlagOffset, 1);
}

void InflightRegion::completed(std::uint16_t head) {
  store_release<std::uint16_t>(desc(head) + kInflightNextOffset, last_batch_head_);
  last_batch_head_ = head;
  store_release<std::uint16_t>(begin_ + kInflightLastBatchHeadOffset, head);
}

void InflightRegion::published(std::uint16_t used_index, std::uint16_t count) {
  clear_last_batch(count);
  store_release<std::uint16_t>(begin_ + kInflightUsedIndexOffset, used_index);
}

}  // namespace vblk::virtio
