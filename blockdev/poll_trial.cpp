#include "blockdev/poll_trial.h"

#include <algorithm>

namespace vblk::blockdev {

namespace {

// Less than that is no difference: epochs are short, and machines are not quiet.
constexpr double kDifference = 0.1;

bool is_cheaper(const PollTrial::Cost& one, const PollTrial::Cost& than) {
  if (one.time < than.time * (1 - kDifference)) return true;
  if (than.time < one.time * (1 - kDifference)) return false;
  return one.cpu_time < than.cpu_time * (1 - kDifference);
}

}  // namespace

void PollTrial::epoch_ended(const Cost& cost) {
  switch (stage_) {
    case Stage::kPreferred:
      before_ = cost;
      if (epochs_until_trial_-- > 1) return;
      stage_ = Stage::kOther;
      other_way_ = true;
      return;
    case Stage::kOther:
      other_ = cost;
      stage_ = Stage::kPreferredAgain;
      other_way_ = false;
      return;
    case Stage::kPreferredAgain:
      stage_ = Stage::kPreferred;
      // The better of both sides: the other way has to win against the load as it is now.
      compare({.time = std::min(before_.time, cost.time),
               .cpu_time = std::min(before_.cpu_time, cost.cpu_time)},
              other_);
      before_ = cost;
      return;
  }
}

void PollTrial::begin_anew() {
  const bool looks_preferred = looks_preferred_;
  *this = {};
  looks_preferred_ = looks_preferred;
}

void PollTrial::compare(const Cost& preferred, const Cost& other) {
  if (!is_cheaper(other, preferred)) {
    votes_ = 0;
    epochs_between_ = std::min(2 * epochs_between_, kEpochsBetweenMax);
  } else if (++votes_ == kVotesToChange) {
    votes_ = 0;
    looks_preferred_ = !looks_preferred_;
    epochs_between_ = kEpochsBetweenMin;
  } else {
    epochs_between_ = 1;  // once more, to be sure
  }
  epochs_until_trial_ = epochs_between_;
}

}  // namespace vblk::blockdev
