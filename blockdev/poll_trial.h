// Whether looking before a sleep pays at all, found by trying both.
//
// What a single look saves (poll_policy.h) leaves out what it costs others: on a machine that is
// short of processors, a loop that looks takes one from the very threads it waits for. So the loop
// counts its work in epochs, and now and then goes through one the other way. Of the two ways the
// faster one is preferred, and of equally fast ones that which takes less processor time.
//
//   preferred  ...  preferred  other  preferred  ...
//                          \     |     /
//                           compared, twice before anything changes
#pragma once

#include <cstdint>

namespace vblk::blockdev {

class PollTrial {
 public:
  // Of one epoch, per unit of work; any unit, always the same.
  struct Cost {
    double time{0};
    double cpu_time{0};
  };

  // Whether the loop is to look in the epoch that has begun.
  [[nodiscard]] bool looks() const { return looks_preferred_ != other_way_; }
  // An epoch is over and the next begins.
  void epoch_ended(const Cost& cost);
  // What has been compared is no longer how it is: goes the preferred way, and compares soon.
  void begin_anew();

 private:
  enum class Stage : std::uint8_t { kPreferred, kOther, kPreferredAgain };
  void compare(const Cost& preferred, const Cost& other);

  Stage stage_{Stage::kPreferred};
  bool looks_preferred_{true};
  bool other_way_{false};
  unsigned epochs_until_trial_{kEpochsBetweenMin};
  unsigned epochs_between_{kEpochsBetweenMin};
  unsigned votes_{0};  // trials in a row that the other way has won
  Cost before_;
  Cost other_;

  static constexpr unsigned kEpochsBetweenMin = 4;
  static constexpr unsigned kEpochsBetweenMax = 128;
  static constexpr unsigned kVotesToChange = 2;
};

}  // namespace vblk::blockdev
