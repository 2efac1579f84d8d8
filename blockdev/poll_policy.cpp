#include "blockdev/poll_policy.h"

#include <algorithm>

namespace vblk::blockdev {

namespace {

// The mean changes by an eighth of the difference: five looks in vain outweigh a good one.
constexpr int kMeanWeight = 8;
constexpr unsigned kSleepsBetweenMax = 256;

}  // namespace

bool PollPolicy::looks_now() {
  if (window_.count() == 0) return false;
  if (sleeps_ < sleeps_between_) {
    ++sleeps_;
    return false;
  }
  sleeps_ = 0;
  return true;
}

void PollPolicy::note(std::chrono::nanoseconds saved) {
  saved = std::max(saved, -window_);
  const bool tried_again = sleeps_between_ > 0;
  saved_mean_ = tried_again ? saved : saved_mean_ + (saved - saved_mean_) / kMeanWeight;
  if (saved_mean_.count() >= 0) {
    sleeps_between_ = 0;
  } else {
    sleeps_between_ = std::clamp(2 * sleeps_between_, 1U, kSleepsBetweenMax);
  }
}

}  // namespace vblk::blockdev
