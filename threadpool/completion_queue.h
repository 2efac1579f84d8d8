// The way back from worker threads: many producers, one consumer, one signal per batch.
//
// An intrusive lock-free stack that the consumer takes whole. The producer that finds the consumer
// armed (about to sleep, or asleep) disarms it and is told to signal; everybody else just pushes.
// So a burst of completions costs one signal, and a consumer that is awake costs none.
#pragma once

#include <atomic>

#include "threadpool/work.h"

namespace vblk::threadpool {

class CompletionQueue {
 public:
  // Any thread. Gives up `work` to the consumer. Returns true if the caller must now wake the
  // consumer (write its eventfd): exactly one producer is told so per arming.
  [[nodiscard]] bool push(Work& work) noexcept;

  // Consumer only. Takes everything pushed so far, oldest first, into `list` (appended).
  // Makes no system call; returns the number taken.
  std::size_t take_all(WorkList& list) noexcept;

  // Consumer only. Asks to be signalled by the next push. Returns false, and stays disarmed, if
  // something is there already: the consumer must take it instead of sleeping.
  [[nodiscard]] bool arm() noexcept;

  // Consumer only. Takes the request of arm() back. Returns true if a producer was told to signal
  // meanwhile: the signal has come or is on its way.
  bool disarm() noexcept;

 private:
  std::atomic<Work*> head_{nullptr};
  std::atomic<bool> armed_{false};
};

}  // namespace vblk::threadpool
