#include "blockdev/virtio/inflight_area.h"

#include <fmt/format.h>

#include "blockdev/virtio/little_endian.h"

namespace vblk::virtio {

namespace {

// "vblk-wb" and the value, so that nothing another backend may keep there is taken for it.
constexpr std::uint64_t kWritebackOff = 0x7662'6c6b'2d77'6200;
constexpr std::uint64_t kWritebackOn = kWritebackOff | 1;

Expected<void> check_size(const InflightDescription& description) {
  const auto [size_bytes, offset_bytes, queue_count, queue_size, is_packed] = description;
  const std::uint64_t needed = InflightArea::region_bytes_for(queue_count, queue_size, is_packed);
  if (size_bytes >= needed) return {};
  return make_error(
      ErrorKind::kInvalidArgument,
      fmt::format("an in-flight area of {} bytes; {} {} queues of {} entries take {}", size_bytes,
                  queue_count, is_packed ? "packed" : "split", queue_size, needed));
}

}  // namespace

Expected<std::shared_ptr<const InflightArea>> InflightArea::map(
    int fd, const InflightDescription& description) {
  const auto [size_bytes, offset_bytes, queue_count, queue_size, is_packed] = description;
  if (queue_count == 0 || queue_size == 0) {
    return make_error(
        ErrorKind::kInvalidArgument,
        fmt::format("an in-flight area for {} queues of {} entries", queue_count, queue_size));
  }
  if (auto fits = check_size(description); !fits) return std::unexpected(std::move(fits.error()));
  // The counters in it are written whole.
  if (offset_bytes % alignof(std::uint64_t) != 0) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("an in-flight area at offset {}, which is no multiple of {}",
                                  offset_bytes, alignof(std::uint64_t)));
  }
  auto mapping = SharedMapping::map(fd, size_bytes, offset_bytes, "the in-flight area");
  if (!mapping) return std::unexpected(std::move(mapping.error()));
  std::shared_ptr<const InflightArea> area(
      new InflightArea(std::make_shared<const SharedMapping>(std::move(*mapping)), description));
  for (std::uint16_t queue = 0; queue < queue_count; ++queue) {
    if (auto checked = area->check_region(queue); !checked) {
      return make_error(checked.error().kind,
                        fmt::format("queue {}: {}", queue, checked.error().message));
    }
  }
  if (area->faulted()) {
    return make_error(ErrorKind::kInvalidArgument, "the in-flight area's file is being shortened");
  }
  return area;
}

Expected<void> InflightArea::check_region(std::uint16_t queue) const {
  return is_packed() ? packed_region(queue).check() : region(queue).check();
}

Expected<std::shared_ptr<const InflightArea>> InflightArea::renewed(bool is_packed) const {
  InflightDescription description = description_;
  description.is_packed = is_packed;
  if (auto fits = check_size(description); !fits) return std::unexpected(std::move(fits.error()));
  std::shared_ptr<const InflightArea> area(new InflightArea(mapping_, description));
  const auto kept = writeback();
  // Both kinds of regions have it in the same place; the rest is set when a ring starts.
  for (std::uint16_t queue = 0; queue < queue_count(); ++queue)
    store_release<std::uint16_t>(area->region_begin(queue) + kInflightVersionOffset, 0);
  if (kept) area->keep_writeback(*kept);
  return area;
}

std::byte* InflightArea::kept_writeback() const {
  const std::uint64_t offset = region_bytes_for(queue_count(), queue_size(), is_packed());
  const bool has_room = description_.size_bytes - offset >= sizeof(std::uint64_t);
  return has_room ? mapping_->host() + offset : nullptr;
}

std::optional<bool> InflightArea::writeback() const {
  const std::byte* const kept = kept_writeback();
  if (kept == nullptr) return std::nullopt;
  const auto value = load_acquire<std::uint64_t>(kept);
  if (value != kWritebackOff && value != kWritebackOn) return std::nullopt;
  return value == kWritebackOn;
}

void InflightArea::keep_writeback(bool writeback) const {
  if (std::byte* const kept = kept_writeback(); kept != nullptr)
    store_release<std::uint64_t>(kept, writeback ? kWritebackOn : kWritebackOff);
}

}  // namespace vblk::virtio
