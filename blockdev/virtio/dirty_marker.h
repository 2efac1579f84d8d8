// One queue's marks in a log of dirty pages (dirty_log.h): for each request the memory that the
// driver gave it to be written, whether it was written or not, and of the ring what the device
// writes there.
//
// Thread: the queue's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <sys/uio.h>
#include <utility>
#include <vector>

#include "aio/error.h"
#include "blockdev/virtio/dirty_log.h"
#include "blockdev/virtio/guest_memory.h"

namespace vblk::virtio {

class DirtyMarker {
 public:
  // A part of the ring that the device writes to, by where it begins in the log.
  struct RingPart {
    std::uint64_t address{0};
    std::uint64_t length_bytes{0};
  };

  // `heads`: how many requests can be in flight, by head. Error: kInvalidArgument: the log does not
  // reach to the end of `memory`, or of the ring.
  static Expected<std::unique_ptr<DirtyMarker>> create(std::shared_ptr<const DirtyLog> log,
                                                       std::shared_ptr<const GuestMemory> memory,
                                                       std::vector<RingPart> ring_parts,
                                                       std::size_t heads);

  // A request may now write to `writable`, and to `status`, until it is answered.
  void popped(std::uint16_t head, std::span<const iovec> writable, const std::byte* status);
  // It has written all that it will, and the driver does not know yet.
  void written(std::uint16_t head);
  // Something was written to the ring.
  void ring_written() const;

  [[nodiscard]] bool faulted() const { return log_->faulted(); }

 private:
  struct Range {
    std::uint64_t guest_address;
    std::uint64_t length_bytes;
  };
  DirtyMarker(std::shared_ptr<const DirtyLog> log, std::shared_ptr<const GuestMemory> memory,
              std::vector<RingPart> ring_parts, std::size_t heads)
      : log_(std::move(log)),
        memory_(std::move(memory)),
        ring_parts_(std::move(ring_parts)),
        ranges_(heads) {}

  const std::shared_ptr<const DirtyLog> log_;
  const std::shared_ptr<const GuestMemory> memory_;
  const std::vector<RingPart> ring_parts_;
  std::vector<std::vector<Range>> ranges_;  // by head
};

}  // namespace vblk::virtio
