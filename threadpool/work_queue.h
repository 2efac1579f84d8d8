// A bounded FIFO of Work that many threads put into and take from without a lock.
//
// A ring of cells, each with a sequence number that says whose turn it is (Dmitry Vyukov, "Bounded
// MPMC queue"): cell i is free for the ticket t when its number is t, and holds t's work when its
// number is t + 1. Producers and consumers draw tickets by one compare-and-swap each and meet only
// in a cell.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "threadpool/work.h"

namespace vblk::threadpool {

class WorkQueue {
 public:
  // `capacity`: a power of two, at least 2 (asserted).
  explicit WorkQueue(std::size_t capacity);

  // Any thread. False if it is full.
  [[nodiscard]] bool push(Work& work) noexcept;
  // Any thread. The oldest work, or nullptr if there is none whose push() has finished.
  [[nodiscard]] Work* pop() noexcept;
  // Any thread. An estimate while others push and pop; exact for whoever is alone.
  [[nodiscard]] std::size_t size() const noexcept;
  // Works taken since the start.
  [[nodiscard]] std::uint64_t taken() const noexcept {
    return next_pop_.load(std::memory_order_relaxed);
  }

 private:
  struct Cell {
    std::atomic<std::uint64_t> sequence;
    Work* work;
  };
  static constexpr std::size_t kCacheLineBytes = 64;

  const std::uint64_t mask_;
  const std::unique_ptr<Cell[]> cells_;
  alignas(kCacheLineBytes) std::atomic<std::uint64_t> next_push_{0};
  alignas(kCacheLineBytes) std::atomic<std::uint64_t> next_pop_{0};
};

}  // namespace vblk::threadpool
