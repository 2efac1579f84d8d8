#include "blockdev/virtio/interrupt_hold.h"

#include <algorithm>
#include <utility>

namespace vblk::virtio {

InterruptHold::InterruptHold(const InterruptOptions& options, blockdev::IoLoop& loop,
                             std::function<void()> time_is_up)
    : options_(options), time_is_up_(std::move(time_is_up)) {
  if (is_on()) timer_ = loop.make_timer([this] { look_at_time(); });
}

bool InterruptHold::hold() {
  if (is_holding_) return false;
  is_holding_ = true;
  deadline_ = Clock::now() + options_.hold_max;
  return true;
}

bool InterruptHold::is_due(std::uint64_t answered) const {
  return answered - answered_at_last_ >= options_.batch_max || Clock::now() >= deadline_;
}

void InterruptHold::sent(std::uint64_t answered) {
  is_holding_ = false;
  answered_at_last_ = answered;
}

// A timer that still runs was set for an earlier deadline.
void InterruptHold::prepare_to_sleep() {
  if (!is_holding_ || timer_->is_running()) return;
  timer_->start(std::max(deadline_ - Clock::now(), Clock::duration::zero()));
}

void InterruptHold::look_at_time() {
  if (!is_holding_) return;
  const auto left = deadline_ - Clock::now();
  if (left > Clock::duration::zero()) return timer_->start(left);
  time_is_up_();
}

}  // namespace vblk::virtio
