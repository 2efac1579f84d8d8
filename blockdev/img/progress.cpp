#include "blockdev/img/progress.h"

#include "blockdev/img/output.h"

namespace vblk::img {

namespace {
// Often enough to be seen to move, seldom enough to cost nothing.
constexpr double kStepPercent = 0.5;
}  // namespace

Progress::Progress(bool shown, std::uint64_t total) : shown_(shown), total_(total) {
  if (shown_) print(0);
}

void Progress::print(double percent) {
  printed_ = percent;
  say("    ({:3.2f}/100%)\r", percent);
  flush_output();
}

void Progress::advance(std::uint64_t done) {
  if (!shown_ || total_ == 0) return;
  const std::lock_guard lock(mutex_);
  done_ += done;
  const double percent = 100.0 * static_cast<double>(done_) / static_cast<double>(total_);
  if (percent - printed_ >= kStepPercent) print(percent);
}

void Progress::finish() {
  if (!shown_) return;
  print(100);
  say("\n");
}

}  // namespace vblk::img
