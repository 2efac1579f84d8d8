#include "blockdev/bench/progress.h"

#include <cstdio>
#include <unistd.h>

#include <fmt/core.h>

namespace vblk::bench {

namespace {
constexpr std::chrono::seconds kPlainLineInterval{10};
// Without one that is asked for: each time that there is something new.
constexpr std::chrono::seconds kNoInterval{0};
}  // namespace

ProgressLine::ProgressLine(ShowProgress when)
    : is_terminal_(::isatty(STDERR_FILENO) == 1),
      is_on_(when != ShowProgress::kNever),
      interval_(is_terminal_ || when == ShowProgress::kAlways ? kNoInterval : kPlainLineInterval),
      last_(std::chrono::steady_clock::now()) {}

ProgressLine::~ProgressLine() {
  if (is_dirty_) fmt::print(stderr, "\r\033[K");
}

void ProgressLine::show(const std::string& title, const Progress& progress) {
  if (!is_on_) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - last_ < interval_) return;
  last_ = now;
  const double elapsed = std::chrono::duration<double>(progress.elapsed).count();
  const double planned = std::chrono::duration<double>(progress.planned).count();
  double left = planned - elapsed;
  if (progress.done_fraction > 0)
    left = elapsed * (1 - progress.done_fraction) / progress.done_fraction;
  fmt::print(stderr, "{}{}: {}{:.0f} s, about {:.0f} s left, {:.0f} IOPS, p99 {:.1f} us{}",
             is_terminal_ ? "\r\033[K" : "", title, progress.ramping ? "ramp, " : "", elapsed,
             left > 0 ? left : 0.0, progress.operations_per_second, progress.p99_ns / 1000,
             is_terminal_ ? "" : "\n");
  is_dirty_ = is_terminal_;
  std::fflush(stderr);
}

}  // namespace vblk::bench
