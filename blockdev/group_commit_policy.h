// Whether a flush that could begin waits a moment for others to share it: databases call that group
// commit.
//
// Guests that write and flush in turn come back soon after their flush: those of one call all at
// once, while the next call is already under way for the others, so that each call serves half of
// them. To wait for all of them costs the wait and saves a call. A call takes S; where `here` are
// there already and `joined` more come in a wait of w, flushes end at here / S without it and at
// (here + joined) / (S + w) with it: their rate has grown if joined * S > here * w. Twice that is
// asked for: those who come by chance, and not because they were waited for, would only wait
// longer. Waiting goes on while it pays on average. When it has not, it is tried again after one
// call, then after two, four and so on, so that flushes which nobody joins pay for few waits.
//
// Nobody waits who is alone, nor long: who comes back does so in a fraction of S where that is long
// enough for any of this to matter. A wait ends early when as many are there as the last call and
// those behind it were.
#pragma once

#include <chrono>
#include <cstdint>

namespace vblk::blockdev {

class GroupCommitPolicy {
 public:
  // Calls that take less do not wait. A wait is this part of a call at most, and no longer than the
  // last.
  static constexpr std::chrono::nanoseconds kCallMin{400'000};
  static constexpr int kPartOfCall = 4;
  static constexpr std::chrono::nanoseconds kWaitMax{5'000'000};

  static GroupCommitPolicy never() { return GroupCommitPolicy(kNever); }
  static GroupCommitPolicy adaptive() { return GroupCommitPolicy(kAdaptive); }
  // Up to `window` each time, until `expected` are there; for tests.
  static GroupCommitPolicy always(std::chrono::nanoseconds window, unsigned expected) {
    GroupCommitPolicy policy(kAlways);
    policy.call_mean_ = window;
    policy.expected_ = expected;
    return policy;
  }

  [[nodiscard]] bool is_used() const { return mode_ != kNever; }
  // How many a call may expect.
  [[nodiscard]] unsigned expected() const { return expected_; }
  // How long the next call is put off where `here` could share it already; 0: not at all. Asked
  // once for each call.
  [[nodiscard]] std::chrono::nanoseconds window(unsigned here);
  // How that went.
  void has_waited(std::chrono::nanoseconds wait, unsigned here, unsigned joined);
  // A call has ended that served `members`, and `waiting` others have come meanwhile.
  void call_ended(std::chrono::nanoseconds duration, unsigned members, unsigned waiting);

 private:
  enum Mode : std::uint8_t { kNever, kAdaptive, kAlways };
  explicit GroupCommitPolicy(Mode mode) : mode_(mode) {}

  Mode mode_;
  std::chrono::nanoseconds call_mean_{0};
  std::chrono::nanoseconds saved_mean_{0};
  unsigned expected_{1};
  unsigned calls_between_{0};  // 0: waiting pays
  unsigned calls_{0};          // of those
};

}  // namespace vblk::blockdev
