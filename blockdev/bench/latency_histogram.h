// Latencies, counted in buckets whose width grows with the value: 128 to each power of two, so that
// a quantile is off by less than 0.8 %, however long the run, in 60 KiB.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace vblk::bench {

class LatencyHistogram {
 public:
  void add(std::uint64_t latency_ns) {
    ++counts_[bucket_of(latency_ns)];
    ++total_;
    sum_ns_ += latency_ns;
    min_ns_ = std::min(min_ns_, latency_ns);
    max_ns_ = std::max(max_ns_, latency_ns);
  }
  [[nodiscard]] double mean_ns() const {
    return total_ == 0 ? 0 : static_cast<double>(sum_ns_) / static_cast<double>(total_);
  }
  void merge(const LatencyHistogram& other) {
    for (std::size_t i = 0; i < kBuckets; ++i) counts_[i] += other.counts_[i];
    total_ += other.total_;
    sum_ns_ += other.sum_ns_;
    min_ns_ = std::min(min_ns_, other.min_ns_);
    max_ns_ = std::max(max_ns_, other.max_ns_);
  }
  void clear() { *this = {}; }

  [[nodiscard]] std::uint64_t total() const { return total_; }
  // Exact; 0 without any.
  [[nodiscard]] std::uint64_t min_ns() const { return total_ == 0 ? 0 : min_ns_; }
  [[nodiscard]] std::uint64_t max_ns() const { return max_ns_; }
  // Of the buckets' middles.
  [[nodiscard]] double standard_deviation_ns() const {
    if (total_ < 2) return 0;
    double sum = 0;
    for_each([&](double latency_ns, std::uint64_t count) {
      sum += static_cast<double>(count) * (latency_ns - mean_ns()) * (latency_ns - mean_ns());
    });
    return std::sqrt(sum / static_cast<double>(total_ - 1));
  }
  // Calls `function(middle_ns, count)` for each bucket that is not empty, in order.
  template <typename Function>
  void for_each(Function&& function) const {
    for (std::size_t i = 0; i < kBuckets; ++i) {
      if (counts_[i] != 0) function(middle_of(i), counts_[i]);
    }
  }
  // The position, from 1, of the latency that is the quantile `fraction` (0 to 1) of `total` sorted
  // ones: the first that at least that part of all does not exceed (the nearest rank). The product
  // is taken down by a few ulps first, as 0.07 * 100 is 7.000000000000001 and its rank is 7.
  [[nodiscard]] static std::uint64_t rank_of(double fraction, std::uint64_t total) {
    const double exact =
        fraction * static_cast<double>(total) * (1 - 4 * std::numeric_limits<double>::epsilon());
    return std::clamp<std::uint64_t>(static_cast<std::uint64_t>(std::ceil(exact)), 1,
                                     std::max<std::uint64_t>(total, 1));
  }
  // The middle of the bucket of the latency with that rank, but never outside min and max; 0
  // without any.
  [[nodiscard]] double quantile_ns(double fraction) const {
    if (total_ == 0) return 0;
    const std::uint64_t rank = rank_of(fraction, total_);
    std::uint64_t below = 0;
    std::size_t bucket = 0;
    while (below + counts_[bucket] < rank) below += counts_[bucket++];
    return std::clamp(middle_of(bucket), static_cast<double>(min_ns_),
                      static_cast<double>(max_ns_));
  }

 private:
  static constexpr unsigned kPrecisionBits = 7;
  static constexpr std::size_t kSubBuckets = std::size_t{1} << kPrecisionBits;
  // Values below 128 have buckets of their own; each further power of two has 128.
  static constexpr std::size_t kBuckets = (64 - kPrecisionBits + 1) * kSubBuckets;

  static std::size_t bucket_of(std::uint64_t value) {
    if (value < kSubBuckets) return value;
    const auto shift = static_cast<unsigned>(std::bit_width(value)) - 1 - kPrecisionBits;
    return (shift + 1) * kSubBuckets + (value >> shift) - kSubBuckets;
  }
  static double middle_of(std::size_t bucket) {
    if (bucket < kSubBuckets) return static_cast<double>(bucket);
    const std::size_t shift = bucket / kSubBuckets - 1;
    const auto lowest = static_cast<double>((bucket % kSubBuckets + kSubBuckets) << shift);
    return lowest + static_cast<double>((std::uint64_t{1} << shift) - 1) / 2;
  }

  std::array<std::uint64_t, kBuckets> counts_{};
  std::uint64_t total_{0};
  std::uint64_t sum_ns_{0};
  std::uint64_t min_ns_{std::numeric_limits<std::uint64_t>::max()};
  std::uint64_t max_ns_{0};
};

}  // namespace vblk::bench
