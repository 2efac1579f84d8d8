#include "threadpool/work_queue.h"

#include <bit>
#include <cassert>

namespace vblk::threadpool {

WorkQueue::WorkQueue(std::size_t capacity)
    : mask_(capacity - 1), cells_(std::make_unique<Cell[]>(capacity)) {
  assert(capacity >= 2 && std::has_single_bit(capacity));
  for (std::size_t i = 0; i < capacity; ++i) cells_[i].sequence.store(i);
}

bool WorkQueue::push(Work& work) noexcept {
  std::uint64_t ticket = next_push_.load(std::memory_order_relaxed);
  for (;;) {
    Cell& cell = cells_[ticket & mask_];
    const std::uint64_t sequence = cell.sequence.load(std::memory_order_acquire);
    if (sequence == ticket) {
      if (!next_push_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_relaxed))
        continue;
      cell.work = &work;
      cell.sequence.store(ticket + 1, std::memory_order_release);
      return true;
    }
    if (sequence < ticket) return false;  // still holds the work of one round earlier
    ticket = next_push_.load(std::memory_order_relaxed);
  }
}

Work* WorkQueue::pop() noexcept {
  std::uint64_t ticket = next_pop_.load(std::memory_order_relaxed);
  for (;;) {
    Cell& cell = cells_[ticket & mask_];
    const std::uint64_t sequence = cell.sequence.load(std::memory_order_acquire);
    if (sequence == ticket + 1) {
      if (!next_pop_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_relaxed)) continue;
      Work* const work = cell.work;
      cell.sequence.store(ticket + mask_ + 1, std::memory_order_release);
      return work;
    }
    if (sequence < ticket + 1) return nullptr;
    ticket = next_pop_.load(std::memory_order_relaxed);
  }
}

std::size_t WorkQueue::size() const noexcept {
  const std::uint64_t popped = next_pop_.load(std::memory_order_acquire);
  const std::uint64_t pushed = next_push_.load(std::memory_order_acquire);
  return pushed > popped ? static_cast<std::size_t>(pushed - popped) : 0;
}

}  // namespace vblk::threadpool
