// The memory in which all queues of a device keep what they have in flight: a region for each
// (inflight_region.h, packed_inflight_region.h), one behind the other, in a file that the frontend
// holds on to. vhost-user.rst, "Inflight I/O tracking".
//
// Behind the regions an area that was made here has room for one more thing that a successor must
// know and that no frontend tells it: whether the driver has set `writeback`. A driver that chose
// write-through sends no flushes; it would lose data at a power cut if the successor began with the
// initial value. Areas of other backends end with their regions.
//
// Hostile as all memory that a frontend shares, and guarded like guest memory.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>

#include "aio/error.h"
#include "blockdev/virtio/inflight_region.h"
#include "blockdev/virtio/packed_inflight_region.h"
#include "blockdev/virtio/shared_mapping.h"

namespace vblk::virtio {

// "Inflight description".
struct InflightDescription {
  std::uint64_t size_bytes{0};
  std::uint64_t offset_bytes{0};
  std::uint16_t queue_count{0};
  std::uint16_t queue_size{0};
  bool is_packed{false};  // the rings that it is for: VIRTIO_F_RING_PACKED
};

class InflightArea {
 public:
  // What an area for so many queues of so many entries takes when it is made here, and what the
  // regions of any take.
  static constexpr std::uint64_t bytes_for(std::uint16_t queue_count, std::uint16_t queue_size,
                                           bool is_packed = false) {
    return region_bytes_for(queue_count, queue_size, is_packed) + sizeof(std::uint64_t);
  }
  static constexpr std::uint64_t region_bytes_for(std::uint16_t queue_count,
                                                  std::uint16_t queue_size, bool is_packed) {
    return std::uint64_t{queue_count} * region_bytes(queue_size, is_packed);
  }

  // Maps and checks the area in `fd`, which stays the caller's. Errors: kInvalidArgument (no
  // queues, too small, not aligned, beyond its file, a region that cannot be used), and those of
  // SharedMapping::map(). Any thread.
  static Expected<std::shared_ptr<const InflightArea>> map(int fd,
                                                           const InflightDescription& description);

  [[nodiscard]] std::uint16_t queue_count() const { return description_.queue_count; }
  [[nodiscard]] std::uint16_t queue_size() const { return description_.queue_size; }
  [[nodiscard]] bool is_packed() const { return description_.is_packed; }
  // Of a queue below queue_count(), of split rings or of packed ones (asserted); valid as long as
  // the area lives.
  [[nodiscard]] InflightRegion region(std::uint16_t queue) const {
    assert(!is_packed());
    return {region_begin(queue), description_.queue_size};
  }
  [[nodiscard]] PackedInflightRegion packed_region(std::uint16_t queue) const {
    assert(is_packed());
    return {region_begin(queue), description_.queue_size};
  }
  // The `writeback` of the config space that keep_writeback() was last given, by a predecessor
  // perhaps; nothing if there is no room for it or it was never given. The server's thread.
  [[nodiscard]] std::optional<bool> writeback() const;
  void keep_writeback(bool writeback) const;
  // The same memory as an area that no ring has used, for rings of either kind: nothing is in
  // flight, and nothing known of any ring; `writeback` is kept. No ring may be using it.
  // Error: kInvalidArgument: packed rings take more than it has.
  [[nodiscard]] Expected<std::shared_ptr<const InflightArea>> renewed(bool is_packed) const;
  // As SharedMapping::faulted().
  [[nodiscard]] bool faulted() const { return mapping_->faulted(); }

 private:
  static constexpr std::uint64_t region_bytes(std::uint16_t queue_size, bool is_packed) {
    return is_packed ? PackedInflightRegion::region_bytes(queue_size)
                     : InflightRegion::region_bytes(queue_size);
  }
  [[nodiscard]] std::byte* region_begin(std::uint16_t queue) const {
    return mapping_->host() + queue * region_bytes(queue_size(), is_packed());
  }
  [[nodiscard]] Expected<void> check_region(std::uint16_t queue) const;
  [[nodiscard]] std::byte* kept_writeback() const;
  InflightArea(std::shared_ptr<const SharedMapping> mapping, const InflightDescription& description)
      : mapping_(std::move(mapping)), description_(description) {}

  const std::shared_ptr<const SharedMapping> mapping_;  // shared by those renewed from each other
  const InflightDescription description_;
};

}  // namespace vblk::virtio
