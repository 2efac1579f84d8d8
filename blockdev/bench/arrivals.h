// The times at which requests of an open loop come.
#pragma once

#include <chrono>
#include <random>

#include "blockdev/bench/workload.h"

namespace vblk::bench {

// At a fixed distance, or as a Poisson process: distances that are exponentially distributed, as of
// many users who know nothing of each other.
class Arrivals {
 public:
  using Clock = std::chrono::steady_clock;
  // Requires rate_per_second > 0.
  Arrivals(bool poisson, double rate_per_second, Clock::time_point begin, std::uint64_t seed)
      : poisson_(poisson), distance_ns_(1e9 / rate_per_second), begin_(begin), random_(seed) {
    advance();
  }
  [[nodiscard]] Clock::time_point next() const {
    return begin_ + std::chrono::nanoseconds(static_cast<std::int64_t>(elapsed_ns_));
  }
  void advance() { elapsed_ns_ += poisson_ ? distance_ns_ * exponential_(random_) : distance_ns_; }

 private:
  const bool poisson_;
  const double distance_ns_;
  const Clock::time_point begin_;
  double elapsed_ns_{0};
  std::mt19937_64 random_;
  std::exponential_distribution<double> exponential_{1.0};
};

}  // namespace vblk::bench
