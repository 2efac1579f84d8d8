#include "blockdev/virtio/dirty_marker.h"

#include <fmt/format.h>

namespace vblk::virtio {

Expected<std::unique_ptr<DirtyMarker>> DirtyMarker::create(
    std::shared_ptr<const DirtyLog> log, std::shared_ptr<const GuestMemory> memory,
    std::vector<RingPart> ring_parts, std::size_t heads) {
  const auto too_short = [](std::uint64_t address) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("the log of dirty pages does not reach to {:#x}", address));
  };
  for (const auto& region : memory->regions()) {
    if (!log->covers(region->guest_address(), region->size_bytes()))
      return too_short(region->guest_address() + (region->size_bytes() - 1));
  }
  for (const RingPart& part : ring_parts) {
    if (!log->covers(part.address, part.length_bytes)) return too_short(part.address);
  }
  return std::unique_ptr<DirtyMarker>(
      new DirtyMarker(std::move(log), std::move(memory), std::move(ring_parts), heads));
}

void DirtyMarker::popped(std::uint16_t head, std::span<const iovec> writable,
                         const std::byte* status) {
  std::vector<Range>& ranges = ranges_[head];
  ranges.clear();
  for (const iovec& piece : writable) {
    const auto* const begin = static_cast<const std::byte*>(piece.iov_base);
    ranges.push_back({memory_->guest_address_of(begin), piece.iov_len});
  }
  // Beyond `writable` where the chain has a problem.
  ranges.push_back({memory_->guest_address_of(status), 1});
}

void DirtyMarker::written(std::uint16_t head) {
  for (const Range& range : ranges_[head]) log_->mark(range.guest_address, range.length_bytes);
  ranges_[head].clear();
}

void DirtyMarker::ring_written() const {
  for (const RingPart& part : ring_parts_) log_->mark(part.address, part.length_bytes);
}

}  // namespace vblk::virtio
