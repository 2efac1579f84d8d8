#include "blockdev/virtio/dirty_log.h"

#include <atomic>
#include <cassert>

namespace vblk::virtio {

Expected<std::shared_ptr<const DirtyLog>> DirtyLog::map(int fd, std::uint64_t size_bytes,
                                                        std::uint64_t offset_bytes) {
  auto mapping = SharedMapping::map(fd, size_bytes, offset_bytes, "the log of dirty pages");
  if (!mapping) return std::unexpected(std::move(mapping.error()));
  return std::shared_ptr<const DirtyLog>(new DirtyLog(std::move(*mapping), size_bytes));
}

bool DirtyLog::covers(std::uint64_t address, std::uint64_t length_bytes) const {
  const std::uint64_t last_offset = length_bytes == 0 ? 0 : length_bytes - 1;
  std::uint64_t last = 0;
  if (__builtin_add_overflow(address, last_offset, &last)) return false;
  return last / kPageBytes / 8 < size_bytes_;
}

void DirtyLog::mark(std::uint64_t address, std::uint64_t length_bytes) const {
  if (length_bytes == 0) return;
  assert(covers(address, length_bytes));
  const std::uint64_t last = (address + (length_bytes - 1)) / kPageBytes;
  // The frontend takes bits with an exchange, and copies after that: a bit that is still set after
  // the page was written has not been taken since. The fence keeps the two in this order.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  for (std::uint64_t page = address / kPageBytes; page <= last; ++page) {
    auto* const byte = reinterpret_cast<std::uint8_t*>(mapping_.host() + page / 8);
    const std::atomic_ref<std::uint8_t> bits(*byte);
    const auto bit = static_cast<std::uint8_t>(1U << page % 8);
    if ((bits.load(std::memory_order_relaxed) & bit) == 0) bits.fetch_or(bit);
  }
}

}  // namespace vblk::virtio
