// A device's I/O limits, between its queues and its disk. limit_schedule.h says who goes on when;
// here are the clock, the lock, and the timers by which the queues' threads learn of it.
//
//   queue's thread                                   any thread
//   admit()  -> go on at once, or wait
//   timer    -> look(): what may go on by now, of    set(), then look() by every queue on its
//   thread
//               all queues; takes its own
//
// Whoever looks, looks for all: what another queue may do lies granted for that one's own timer,
// which was set for a moment no later. So no thread wakes another for a request.
//
// A queue's timer is not set closer than kTickNs, and a look grants all that has become due. So a
// fast limit costs some thousand wake-ups per second at most, and no request comes later than a
// tick for it.
//
// Where nothing is limited a queue reads one flag per request and comes no further. Where something
// is, it takes a lock: a limit is one number that all threads share.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "blockdev/io_limits.h"
#include "blockdev/io_loop.h"
#include "blockdev/limit_schedule.h"

namespace vblk::blockdev {

class IoLimiter {
 public:
  using Ticket = LimitSchedule::Ticket;
  using Direction = LimitSchedule::Direction;
  using Clock = std::uint64_t (*)();  // nanoseconds from some moment on, monotonic

  static constexpr std::uint64_t kTickNs = 500'000;

  static std::uint64_t steady_ns();
  explicit IoLimiter(Clock clock = steady_ns) : clock_(clock) {}
  IoLimiter(const IoLimiter&) = delete;
  IoLimiter& operator=(const IoLimiter&) = delete;

  // Any thread. Queues with waiting requests notice when they look().
  void set(const IoLimits& limits);
  [[nodiscard]] IoLimits limits() const;
  // Whether admit() has to be asked. Any thread; one relaxed load.
  [[nodiscard]] bool is_active() const { return active_.load(std::memory_order_relaxed); }

  // One queue's requests; on its thread only.
  class Queue {
   public:
    // `go_on` is called with each ticket that had to wait, from the loop or look().
    using GoOn = std::function<void(Ticket& ticket)>;
    Queue(IoLimiter& limiter, IoLoop& loop, GoOn go_on);
    // Nothing waits (asserted): release_all() first.
    ~Queue();
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;

    // True: go on at once. False: `ticket`, which stays the caller's and in place, will be told.
    [[nodiscard]] bool admit(Ticket& ticket);
    // Lets go on what may.
    void look();
    // Lets go on all that waits, at the expense of what comes later.
    void release_all();
    // Gives all that waits back, each to `taker`, which does not let it go on: nobody pays for it.
    void withdraw_all(const GoOn& taker);
    [[nodiscard]] std::size_t waiting() const { return waiting_count_; }

   private:
    // All that waits goes to `taker`, as `take` has it.
    void give_up(Ticket* (LimitSchedule::*take)(LimitSchedule::Member&), const GoOn& taker);
    void hand_over(Ticket* tickets, const GoOn& taker);
    void set_timer(std::uint64_t due_ns, std::uint64_t now_ns);

    IoLimiter& limiter_;
    GoOn go_on_;
    std::unique_ptr<IoLoop::Timer> timer_;
    LimitSchedule::Member member_;  // under the limiter's mutex
    std::size_t waiting_count_{0};
  };

 private:
  const Clock clock_;
  std::atomic<bool> active_{false};
  mutable std::mutex mutex_;
  LimitSchedule schedule_;
  IoLimits limits_;
};

}  // namespace vblk::blockdev
