// When a host cluster that has been freed may get a new owner: after every request that may still
// read or write it has ended.
//
// A request enters the current epoch before it looks a mapping up, and leaves it when it has ended.
// A cluster that loses its last reference in epoch e may be used again from epoch e + 2 on: the
// epoch goes from n to n + 1 only when no request of epoch n - 1 is left, so by then all requests
// of e and before have left; those of e + 1 and after saw the new mapping, because the epoch
// changed after it did.
//
// Threads: enter() and leave() on the I/O thread of the participant, on memory that only it writes:
// queues share nothing but reads of the epoch. Everything else under the owner's mutex.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace vblk::qcow2 {

class RequestEpochs {
 public:
  // One I/O thread's part.
  class alignas(64) Participant {
   private:
    friend class RequestEpochs;
    std::atomic<std::uint64_t> in_flight_[2]{};  // of even and of odd epochs
  };

  void join(Participant& participant) { participants_.push_back(&participant); }
  void leave_for_good(Participant& participant) { std::erase(participants_, &participant); }

  // Returns what leave() wants back.
  [[nodiscard]] unsigned enter(Participant& participant) const {
    for (;;) {
      const std::uint64_t epoch = epoch_.load(std::memory_order_seq_cst);
      auto& count = participant.in_flight_[epoch & 1];
      count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_seq_cst);
      // Whoever moves the epoch on from here sees the count.
      if (epoch_.load(std::memory_order_seq_cst) == epoch) return epoch & 1;
      count.store(count.load(std::memory_order_relaxed) - 1, std::memory_order_release);
    }
  }
  static void leave(Participant& participant, unsigned entered) {
    auto& count = participant.in_flight_[entered];
    count.store(count.load(std::memory_order_relaxed) - 1, std::memory_order_release);
  }

  [[nodiscard]] std::uint64_t current() const { return epoch_.load(std::memory_order_relaxed); }
  // Moves the epoch on as far as it goes: by two at most, which is all that anybody waits for.
  void advance() {
    for (int step = 0; step < 2; ++step) {
      const std::uint64_t epoch = epoch_.load(std::memory_order_relaxed);
      const bool earlier_have_left =
          std::ranges::all_of(participants_, [epoch](const Participant* participant) {
            return participant->in_flight_[(epoch - 1) & 1].load(std::memory_order_seq_cst) == 0;
          });
      if (!earlier_have_left) return;
      epoch_.store(epoch + 1, std::memory_order_seq_cst);
    }
  }
  [[nodiscard]] bool is_over(std::uint64_t freed_in) const { return current() >= freed_in + 2; }

 private:
  std::atomic<std::uint64_t> epoch_{1};
  std::vector<Participant*> participants_;
};

}  // namespace vblk::qcow2
