// Progress of a long command, as `-p` shows it on standard output. Without `-p` SIGUSR1 asks for
// it, which is answered by a line on standard error.
#pragma once

#include <cstdint>
#include <mutex>

namespace vblk::img {

// Any thread.
class Progress {
 public:
  // `total`: 0 is done at once.
  Progress(bool shown, std::uint64_t total);
  void advance(std::uint64_t done);
  // Everything is done: ends the line.
  void finish();
  // Ends the line where it is: what is left will not be done.
  void end() const;

 private:
  void print(double percent);
  [[nodiscard]] double percent() const {
    return 100.0 * static_cast<double>(done_) / static_cast<double>(total_);
  }

  const bool shown_;
  const std::uint64_t total_;
  std::mutex mutex_;
  std::uint64_t done_{0};
  double printed_{0};
};

}  // namespace vblk::img
