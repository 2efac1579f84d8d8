#include "blockdev/group_commit_policy.h"

#include <algorithm>

namespace vblk::blockdev {

namespace {

// Means change by an eighth of the difference.
constexpr int kMeanWeight = 8;
constexpr unsigned kCallsBetweenMax = 1024;
// A call counts as that many times the mean at most: a disk that has become slower is followed all
// the same, by three eighths with each call.
constexpr int kSlowdownMax = 4;

}  // namespace

std::chrono::nanoseconds GroupCommitPolicy::window(unsigned here) {
  if (mode_ == kNever || here >= expected_) return {};
  if (mode_ == kAlways) return call_mean_;
  if (call_mean_ < kCallMin) return {};
  if (calls_ < calls_between_) {
    ++calls_;
    return {};
  }
  calls_ = 0;
  return std::min(call_mean_ / kPartOfCall, kWaitMax);
}

// What was saved, for each of those that were there: so that large groups do not outweigh others.
void GroupCommitPolicy::has_waited(std::chrono::nanoseconds wait, unsigned here, unsigned joined) {
  const auto saved =
      std::clamp(call_mean_ * joined / std::max(here, 1U) - 2 * wait, -call_mean_, call_mean_);
  const bool tried_again = calls_between_ > 0;
  saved_mean_ = tried_again ? saved : saved_mean_ + (saved - saved_mean_) / kMeanWeight;
  if (saved_mean_.count() >= 0) {
    calls_between_ = 0;
  } else {
    calls_between_ = std::clamp(2 * calls_between_, 1U, kCallsBetweenMax);
  }
}

void GroupCommitPolicy::call_ended(std::chrono::nanoseconds duration, unsigned members,
                                   unsigned waiting) {
  if (mode_ != kAdaptive) return;
  // A stall is no speed.
  if (call_mean_.count() > 0) duration = std::min(duration, kSlowdownMax * call_mean_);
  call_mean_ =
      call_mean_.count() == 0 ? duration : call_mean_ + (duration - call_mean_) / kMeanWeight;
  expected_ = members + waiting;
}

}  // namespace vblk::blockdev
