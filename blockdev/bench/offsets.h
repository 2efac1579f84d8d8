// Where the next request goes.
#pragma once

#include <cstdint>
#include <limits>
#include <random>

#include "blockdev/bench/workload.h"

namespace vblk::bench {

// A generator for std's distributions that costs a few instructions, which is what a load must be:
// Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, with the constants
// of its public implementation.
class SplitMix64 {
 public:
  using result_type = std::uint64_t;
  explicit SplitMix64(std::uint64_t seed) : state_(seed) {}
  static constexpr result_type min() { return 0; }
  static constexpr result_type max() { return std::numeric_limits<result_type>::max(); }
  result_type operator()() {
    std::uint64_t mixed = state_ += 0x9e3779b97f4a7c15;
    mixed = (mixed ^ (mixed >> 30U)) * 0xbf58476d1ce4e5b9;
    mixed = (mixed ^ (mixed >> 27U)) * 0x94d049bb133111eb;
    return mixed ^ (mixed >> 31U);
  }

 private:
  std::uint64_t state_;
};

// Numbers of blocks, 0 to `block_count` - 1. The same seed gives the same sequence.
//
// Zipf: block ranks are drawn with probability proportional to 1 / rank^theta, by rejection
// (Hormann and Derflinger, "Rejection-inversion to generate variates from monotone discrete
// distributions", 1996), so that no table is needed; ranks are scattered over the disk by a
// permutation, so that hot blocks are no neighbours.
class OffsetSource {
 public:
  // `first`: where a sequence starts. Requires block_count > 0.
  OffsetSource(Distribution distribution, double zipf_theta, std::uint64_t block_count,
               std::uint64_t first, std::uint64_t seed);
  std::uint64_t next();

 private:
  [[nodiscard]] std::uint64_t next_zipf_rank();
  [[nodiscard]] double zipf_integral(double x) const;
  [[nodiscard]] double zipf_integral_inverse(double x) const;
  [[nodiscard]] double zipf_density(double x) const;
  [[nodiscard]] std::uint64_t scatter(std::uint64_t rank) const;

  const Distribution distribution_;
  const double theta_;
  const std::uint64_t block_count_;
  std::uint64_t next_;
  SplitMix64 random_;
  std::uniform_int_distribution<std::uint64_t> uniform_;
  std::uint64_t scatter_multiplier_{1};
  double integral_first_{0};
  double integral_last_{0};
  double shortcut_{0};
};

}  // namespace vblk::bench
