// Holds a queue's interrupts back, so that several answers share one.
//
// Answers are published at once, always; only the interrupt waits, until the first of these holds:
//
//   its time is up            hold_max after the first answer that it is for was published
//   enough answers            batch_max of them since the last interrupt
//   nothing more will come    nothing is in flight, or the queue stops, pauses, breaks, recovers
//
// The last is for guests with little in flight: with one request at a time nothing is ever held.
// When the driver wants an interrupt is decided as ever, by flags or event index, when answers are
// published; what was wanted once is sent, also if the driver has looked by itself meanwhile.
//
// Nobody makes a system call for it while the loop is awake: it looks at the clock once in each
// cycle in which something is held. For a sleep one timer is set, unless it still runs from an
// earlier hold; it then begins anew when it comes too early. So there is at most one timer for each
// hold_max, however many requests there are.
//
// Thread: the queue's loop.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>

#include "blockdev/io_loop.h"

namespace vblk::virtio {

struct InterruptOptions {
  std::chrono::microseconds hold_max{0};  // 0: none is held back
  std::uint32_t batch_max{16};
};

class InterruptHold {
 public:
  // `time_is_up` sends what is held; it runs on the loop's thread. `loop` must outlive this.
  InterruptHold(const InterruptOptions& options, blockdev::IoLoop& loop,
                std::function<void()> time_is_up);
  InterruptHold(const InterruptHold&) = delete;
  InterruptHold& operator=(const InterruptHold&) = delete;

  [[nodiscard]] bool is_on() const { return options_.hold_max.count() > 0; }
  [[nodiscard]] bool is_holding() const { return is_holding_; }
  // An interrupt is wanted now. False if it is one with another that is held already.
  bool hold();
  // Whether the held one is to be sent, of a queue that has answered so many requests in all and
  // has not come to an end of any kind.
  [[nodiscard]] bool is_due(std::uint64_t answered) const;
  // It is sent.
  void sent(std::uint64_t answered);
  // The loop may sleep from now on: it is woken in time.
  void prepare_to_sleep();

 private:
  using Clock = std::chrono::steady_clock;
  void look_at_time();

  const InterruptOptions options_;
  const std::function<void()> time_is_up_;
  bool is_holding_{false};
  Clock::time_point deadline_;
  std::uint64_t answered_at_last_{0};
  std::unique_ptr<blockdev::IoLoop::Timer> timer_;  // none where nothing is ever held
};

}  // namespace vblk::virtio
