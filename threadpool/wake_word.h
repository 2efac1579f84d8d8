// Where threads sleep until there may be something to do: an event count on one futex.
//
//   sleeper                                waker
//   ticket = prepare();                    make the thing visible
//   look again; if there is something:     wake(n);   // no system call if nobody sleeps
//     cancel();
//   otherwise: sleep(ticket);
//
// Between prepare() and sleep() no wake-up is lost: it changes the word that the futex compares.
// futex(2), FUTEX_WAIT and FUTEX_WAKE.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace vblk::threadpool {

class WakeWord {
 public:
  using Ticket = std::uint32_t;

  // Announces a sleeper. A full fence: what is looked at afterwards is not older.
  [[nodiscard]] Ticket prepare() noexcept;
  void cancel() noexcept;
  // Returns after a wake() since `ticket` was drawn, after `timeout` (none: never), and sometimes
  // for no reason. True if `timeout` has passed.
  bool sleep(Ticket ticket,
             std::optional<std::chrono::nanoseconds> timeout = std::nullopt) noexcept;

  // Ends the sleep of at most `count` sleepers, by one system call, or none where nobody has
  // announced itself. Returns how many slept; who was about to sleep does not, and is not counted.
  // A full fence comes first.
  std::size_t wake(std::size_t count) noexcept;
  // Threads that have announced themselves and have not been woken since: who is on the way back
  // from sleep counts no more.
  [[nodiscard]] std::size_t sleepers() const noexcept {
    return sleepers_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr std::size_t kCacheLineBytes = 64;
  alignas(kCacheLineBytes) std::atomic<std::uint32_t> word_{0};
  std::atomic<std::uint32_t> sleepers_{0};
};

}  // namespace vblk::threadpool
