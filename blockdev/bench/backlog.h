// Whether an open loop's backlog grows: how many requests are due and not done, sampled over a run
// of any length in a bounded table.
//
// A backlog that comes and goes (a stall, flushes that share a call) is latency, and told as such.
// One that never comes back to what it was at first means that the disk cannot follow, though the
// requests in flight may still have room for it.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>

namespace vblk::bench {

class Backlog {
 public:
  // `since_begin` must not go back.
  void sample(std::chrono::nanoseconds since_begin, std::uint64_t count) {
    while (since_begin >= slot_time_ * kSlots) halve();
    last_ = static_cast<std::size_t>(since_begin / slot_time_);
    slots_[last_].least = std::min(slots_[last_].least, count);
    slots_[last_].most = std::max(slots_[last_].most, count);
  }
  // Whether the least of the last quarter is well above the most of the first one.
  [[nodiscard]] bool grows() const {
    const std::size_t quarter = (last_ + 1) / 4;
    if (quarter == 0) return false;
    const auto [first, late] = std::pair(over(0, quarter), over(last_ + 1 - quarter, last_ + 1));
    return late.least != kNone && late.least > first.most + kNoticed;
  }

 private:
  static constexpr std::size_t kSlots = 256;
  // Fewer requests may have come together by chance.
  static constexpr std::uint64_t kNoticed = 8;
  static constexpr std::uint64_t kNone = std::numeric_limits<std::uint64_t>::max();
  struct Slot {
    std::uint64_t least{kNone};
    std::uint64_t most{0};
  };

  [[nodiscard]] Slot over(std::size_t begin, std::size_t end) const {
    Slot sum;
    for (std::size_t i = begin; i < end; ++i) {
      sum.least = std::min(sum.least, slots_[i].least);
      sum.most = std::max(sum.most, slots_[i].most);
    }
    return sum;
  }
  // Makes each slot stand for twice the time.
  void halve() {
    for (std::size_t i = 0; i < kSlots / 2; ++i) slots_[i] = over(2 * i, 2 * i + 2);
    std::fill(slots_.begin() + kSlots / 2, slots_.end(), Slot{});
    slot_time_ *= 2;
  }

  std::chrono::nanoseconds slot_time_{std::chrono::milliseconds(1)};
  std::array<Slot, kSlots> slots_;
  std::size_t last_{0};
};

}  // namespace vblk::bench
