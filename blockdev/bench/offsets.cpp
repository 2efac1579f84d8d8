#include "blockdev/bench/offsets.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>

namespace vblk::bench {

namespace {

// (e^x - 1) / x and log(1 + x) / x, near 0 as well, where theta is near 1.
double expm1_ratio(double x) { return std::abs(x) > 1e-8 ? std::expm1(x) / x : 1 + x / 2; }
double log1p_ratio(double x) { return std::abs(x) > 1e-8 ? std::log1p(x) / x : 1 - x / 2; }

// 2^64 divided by the golden ratio: its multiples are far apart.
constexpr std::uint64_t kScatterMultiplier = 0x9e3779b97f4a7c15;

}  // namespace

std::string_view to_string(Operation operation) {
  constexpr std::array<std::string_view, kOperationCount> kNames{"read", "write", "flush",
                                                                 "discard", "write-zeroes"};
  return kNames[static_cast<std::size_t>(operation)];
}

OffsetSource::OffsetSource(Distribution distribution, double zipf_theta, std::uint64_t block_count,
                           std::uint64_t first, std::uint64_t seed)
    : distribution_(distribution),
      theta_(zipf_theta),
      block_count_(block_count),
      next_(first % block_count),
      random_(seed),
      uniform_(0, block_count - 1) {
  assert(block_count > 0);
  if (distribution != Distribution::kZipf) return;
  scatter_multiplier_ = kScatterMultiplier % block_count;
  while (std::gcd(scatter_multiplier_, block_count) != 1) ++scatter_multiplier_;
  integral_first_ = zipf_integral(1.5) - 1;
  integral_last_ = zipf_integral(static_cast<double>(block_count) + 0.5);
  shortcut_ = 2 - zipf_integral_inverse(zipf_integral(2.5) - zipf_density(2));
}

std::uint64_t OffsetSource::next() {
  switch (distribution_) {
    case Distribution::kUniform:
      return uniform_(random_);
    case Distribution::kZipf:
      return scatter(next_zipf_rank() - 1);
    case Distribution::kSequential:
      break;
  }
  const std::uint64_t block = next_;
  next_ = next_ + 1 == block_count_ ? 0 : next_ + 1;
  return block;
}

// The antiderivative of 1 / x^theta, its inverse, and the function itself.
double OffsetSource::zipf_integral(double x) const {
  const double log_x = std::log(x);
  return expm1_ratio((1 - theta_) * log_x) * log_x;
}
double OffsetSource::zipf_integral_inverse(double x) const {
  const double t = std::max(-1.0, x * (1 - theta_));
  return std::exp(log1p_ratio(t) * x);
}
double OffsetSource::zipf_density(double x) const { return std::exp(-theta_ * std::log(x)); }

std::uint64_t OffsetSource::next_zipf_rank() {
  std::uniform_real_distribution<double> unit(0, 1);
  for (;;) {
    const double u = integral_last_ + unit(random_) * (integral_first_ - integral_last_);
    const double x = zipf_integral_inverse(u);
    const double k = std::min(std::max(std::round(x), 1.0), static_cast<double>(block_count_));
    if (k - x <= shortcut_ || u >= zipf_integral(k + 0.5) - zipf_density(k))
      return static_cast<std::uint64_t>(k);
  }
}

// A permutation: the multiplier has no factor in common with the number of blocks.
std::uint64_t OffsetSource::scatter(std::uint64_t rank) const {
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::uint64_t>(static_cast<Wide>(rank) * scatter_multiplier_ % block_count_);
}

}  // namespace vblk::bench
