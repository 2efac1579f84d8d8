#include "blockdev/img/progress.h"

#include <atomic>
#include <csignal>

#include "blockdev/img/output.h"

namespace vblk::img {

namespace {
// Often enough to be seen to move, seldom enough to cost nothing.
constexpr double kStepPercent = 0.5;

std::atomic<bool> is_asked_for{false};
static_assert(std::atomic<bool>::is_always_lock_free, "a signal handler sets it");

void answer_signals() {
  struct sigaction action{};
  action.sa_handler = [](int) { is_asked_for.store(true, std::memory_order_relaxed); };
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGUSR1, &action, nullptr);
}

}  // namespace

Progress::Progress(bool shown, std::uint64_t total) : shown_(shown), total_(total) {
  if (shown_) {
    print(0);
  } else {
    answer_signals();
  }
}

void Progress::print(double percent) {
  printed_ = percent;
  say("    ({:3.2f}/100%)\r", percent);
  flush_output();
}

void Progress::advance(std::uint64_t done) {
  if (total_ == 0) return;
  const std::lock_guard lock(mutex_);
  done_ += done;
  if (shown_) {
    if (percent() - printed_ >= kStepPercent) print(percent());
  } else if (is_asked_for.exchange(false, std::memory_order_relaxed)) {
    warn("    ({:3.2f}/100%)\n", percent());
  }
}

void Progress::finish() {
  if (shown_ && printed_ < 100) print(100);
  end();
}

void Progress::end() const {
  if (shown_) say("\n");
}

}  // namespace vblk::img
