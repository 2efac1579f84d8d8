// Whether a loop with nothing to do looks on in user space for a while before it sleeps.
//
// A sleep is not free: two system calls, a switch, and on most virtual machines a halted processor
// to wake. To look costs what it takes. The window is how much looking a sleep is worth; so a look
// that sees work after t has saved the window less t, and one that sees none has cost the window on
// top of the sleep. Looking goes on while it has saved on average. When it has not, it is tried
// again after one sleep, then after two, four and so on: a load with long waits pays for less than
// one look in a hundred sleeps, and one that changes is noticed.
//
// A look that lasts longer than the window, because somebody else got the processor, counts as what
// it took: where processors are scarce, looking stops by itself.
#pragma once

#include <chrono>
#include <cstdint>

namespace vblk::blockdev {

class PollPolicy {
 public:
  // A window of 0: never.
  explicit PollPolicy(std::chrono::nanoseconds window) : window_(window) {}

  [[nodiscard]] std::chrono::nanoseconds window() const { return window_; }
  // Asked each time there is nothing to do. True: look for up to window(), then say how it went.
  [[nodiscard]] bool looks_now();
  // Work came `after` the look had begun.
  void saw_work(std::chrono::nanoseconds after) { note(window_ - after); }
  void saw_nothing() { note(-window_); }

 private:
  void note(std::chrono::nanoseconds saved);

  std::chrono::nanoseconds window_;
  std::chrono::nanoseconds saved_mean_{0};
  unsigned sleeps_between_{0};  // 0: looking pays
  unsigned sleeps_{0};          // of those
};

}  // namespace vblk::blockdev
