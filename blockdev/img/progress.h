// Progress of a long command, as `-p` shows it on standard output.
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

 private:
  void print(double percent);

  const bool shown_;
  const std::uint64_t total_;
  std::mutex mutex_;
  std::uint64_t done_{0};
  double printed_{0};
};

}  // namespace vblk::img
