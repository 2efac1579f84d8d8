#include "blockdev/io_limiter.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <utility>

namespace vblk::blockdev {

std::uint64_t IoLimiter::steady_ns() {
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                        std::chrono::steady_clock::now().time_since_epoch())
                                        .count());
}

void IoLimiter::set(const IoLimits& limits) {
  const std::lock_guard lock(mutex_);
  limits_ = limits;
  schedule_.configure(limits, clock_());
  active_.store(limits.any(), std::memory_order_relaxed);
}

IoLimits IoLimiter::limits() const {
  const std::lock_guard lock(mutex_);
  return limits_;
}

IoLimiter::Queue::Queue(IoLimiter& limiter, IoLoop& loop, GoOn go_on)
    : limiter_(limiter), go_on_(std::move(go_on)), timer_(loop.make_timer([this] { look(); })) {}

IoLimiter::Queue::~Queue() { assert(waiting_count_ == 0 && "release_all() before destruction"); }

bool IoLimiter::Queue::admit(Ticket& ticket) {
  std::uint64_t now_ns = 0;
  std::uint64_t due_ns = 0;
  {
    const std::lock_guard lock(limiter_.mutex_);
    now_ns = limiter_.clock_();
    if (limiter_.schedule_.admit(member_, ticket, now_ns)) return true;
    if (!timer_->is_running()) due_ns = limiter_.schedule_.next_grant_ns(now_ns);
  }
  ++waiting_count_;
  if (!timer_->is_running()) set_timer(due_ns, now_ns);
  return false;
}

void IoLimiter::Queue::look() {
  Ticket* granted = nullptr;
  std::uint64_t now_ns = 0;
  std::uint64_t due_ns = LimitSchedule::kNever;
  {
    const std::lock_guard lock(limiter_.mutex_);
    now_ns = limiter_.clock_();
    limiter_.schedule_.distribute(now_ns);
    granted = limiter_.schedule_.take_granted(member_);
    if (member_.is_waiting()) due_ns = limiter_.schedule_.next_grant_ns(now_ns);
  }
  if (due_ns == LimitSchedule::kNever) {
    timer_->cancel();
  } else {
    set_timer(due_ns, now_ns);
  }
  hand_over(granted, go_on_);
}

void IoLimiter::Queue::release_all() { give_up(&LimitSchedule::take_all, go_on_); }

void IoLimiter::Queue::withdraw_all(const GoOn& taker) { give_up(&LimitSchedule::withdraw, taker); }

void IoLimiter::Queue::give_up(Ticket* (LimitSchedule::*take)(LimitSchedule::Member&),
                               const GoOn& taker) {
  if (waiting_count_ == 0) return;
  timer_->cancel();
  Ticket* tickets = nullptr;
  {
    const std::lock_guard lock(limiter_.mutex_);
    tickets = (limiter_.schedule_.*take)(member_);
  }
  hand_over(tickets, taker);
}

void IoLimiter::Queue::hand_over(Ticket* tickets, const GoOn& taker) {
  while (tickets != nullptr) {
    Ticket* const next = tickets->next;
    --waiting_count_;
    taker(*tickets);
    tickets = next;
  }
}

void IoLimiter::Queue::set_timer(std::uint64_t due_ns, std::uint64_t now_ns) {
  // Not for ever, should a debt be that long.
  constexpr std::uint64_t kLongest = 3'600'000'000'000;
  const std::uint64_t delay_ns = std::clamp(due_ns - std::min(due_ns, now_ns), kTickNs, kLongest);
  timer_->start(std::chrono::nanoseconds(delay_ns));
}

}  // namespace vblk::blockdev
