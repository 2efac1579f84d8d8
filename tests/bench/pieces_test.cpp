// The parts of a load by themselves: histogram, offsets, arrivals, content.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/bench/arrivals.h"
#include "blockdev/bench/backlog.h"
#include "blockdev/bench/latency_histogram.h"
#include "blockdev/bench/offsets.h"
#include "blockdev/bench/pattern.h"
#include "tests/support/seed.h"

namespace vblk::bench {
namespace {

TEST(LatencyHistogram, finds_quantiles_within_a_percent) {
  std::mt19937_64 random(test::test_seed());
  std::lognormal_distribution<double> distribution(11, 1.5);
  LatencyHistogram histogram;
  std::vector<std::uint64_t> values;
  for (int i = 0; i < 50'000; ++i) {
    values.push_back(static_cast<std::uint64_t>(distribution(random)));
    histogram.add(values.back());
  }
  std::ranges::sort(values);
  for (const std::uint64_t per_mille : {10U, 500U, 900U, 990U, 999U, 1000U}) {
    // The nearest rank, without floating point.
    const std::uint64_t rank = (per_mille * values.size() + 999) / 1000;
    const auto exact = static_cast<double>(values[rank - 1]);
    const double fraction = static_cast<double>(per_mille) / 1000;
    EXPECT_EQ(LatencyHistogram::rank_of(fraction, values.size()), rank) << fraction;
    EXPECT_NEAR(histogram.quantile_ns(fraction), exact, exact * 0.01) << fraction;
  }
  EXPECT_EQ(histogram.min_ns(), values.front());
  EXPECT_EQ(histogram.max_ns(), values.back());
  EXPECT_EQ(histogram.total(), values.size());
}

TEST(LatencyHistogram, takes_the_nearest_rank) {
  LatencyHistogram histogram;
  for (const std::uint64_t value : {10U, 20U, 30U, 40U})
    histogram.add(value);  // each in a bucket of its own
  EXPECT_EQ(histogram.quantile_ns(0), 10);
  EXPECT_EQ(histogram.quantile_ns(0.25), 10);
  EXPECT_EQ(histogram.quantile_ns(0.26), 20);
  EXPECT_EQ(histogram.quantile_ns(0.5), 20);
  EXPECT_EQ(histogram.quantile_ns(0.99), 40);
  EXPECT_EQ(histogram.quantile_ns(1), 40);
  for (std::uint64_t total = 1; total <= 1000; ++total) {
    for (std::uint64_t percent = 0; percent <= 100; ++percent) {
      EXPECT_EQ(LatencyHistogram::rank_of(static_cast<double>(percent) / 100, total),
                std::max<std::uint64_t>((percent * total + 99) / 100, 1))
          << percent << "% of " << total;
    }
  }
}

TEST(LatencyHistogram, has_no_quantile_outside_what_was_seen) {
  LatencyHistogram histogram;
  histogram.add(1'000'000);
  EXPECT_EQ(histogram.quantile_ns(0.5), 1'000'000);
  EXPECT_EQ(histogram.quantile_ns(1), 1'000'000);
}

TEST(LatencyHistogram, of_two_merged_is_that_of_all_values) {
  LatencyHistogram low;
  LatencyHistogram high;
  for (std::uint64_t i = 0; i < 100; ++i) {
    low.add(1000 + i);
    high.add(1'000'000 + i);
  }
  low.merge(high);
  EXPECT_EQ(low.total(), 200U);
  EXPECT_LT(low.quantile_ns(0.49), 2000);
  EXPECT_GT(low.quantile_ns(0.51), 900'000);
  EXPECT_EQ(low.max_ns(), 1'000'099U);
  EXPECT_NEAR(low.standard_deviation_ns(), 500'752, 5000);
}

TEST(Backlog, that_never_comes_back_to_what_it_was_grows) {
  for (const int seconds : {1, 7, 300}) {
    Backlog growing;
    Backlog steady;
    Backlog in_bursts;
    for (int i = 0; i < seconds * 1000; ++i) {
      const std::chrono::milliseconds now(i);
      const auto count = static_cast<std::uint64_t>(i);
      growing.sample(now, 5 + count * 100 / static_cast<std::uint64_t>(seconds) / 1000);
      steady.sample(now, count % 17);
      in_bursts.sample(now, count % 200);  // done together, every so often
    }
    EXPECT_TRUE(growing.grows()) << seconds;
    EXPECT_FALSE(steady.grows()) << seconds;
    EXPECT_FALSE(in_bursts.grows()) << seconds;
  }
  EXPECT_FALSE(Backlog().grows());
}

TEST(LatencyHistogram, of_nothing_is_zero) {
  const LatencyHistogram empty;
  EXPECT_EQ(empty.quantile_ns(0.5), 0);
  EXPECT_EQ(empty.min_ns(), 0U);
  EXPECT_EQ(empty.standard_deviation_ns(), 0);
}

TEST(OffsetSource, goes_through_a_sequence_from_its_start_and_around) {
  OffsetSource source(Distribution::kSequential, 1, 5, 3, 1);
  std::vector<std::uint64_t> blocks;
  for (int i = 0; i < 7; ++i) blocks.push_back(source.next());
  EXPECT_EQ(blocks, (std::vector<std::uint64_t>{3, 4, 0, 1, 2, 3, 4}));
}

TEST(OffsetSource, reaches_every_block_at_random) {
  OffsetSource source(Distribution::kUniform, 1, 100, 0, test::test_seed());
  std::set<std::uint64_t> blocks;
  for (int i = 0; i < 5000; ++i) blocks.insert(source.next());
  EXPECT_EQ(blocks.size(), 100U);
  EXPECT_EQ(*blocks.rbegin(), 99U);
}

TEST(OffsetSource, repeats_itself_with_the_same_seed_alone) {
  OffsetSource one(Distribution::kZipf, 1.1, 1'000'000, 0, 7);
  OffsetSource same(Distribution::kZipf, 1.1, 1'000'000, 0, 7);
  OffsetSource other(Distribution::kZipf, 1.1, 1'000'000, 0, 8);
  int differences = 0;
  for (int i = 0; i < 100; ++i) {
    const std::uint64_t block = one.next();
    EXPECT_EQ(block, same.next());
    if (block != other.next()) ++differences;
  }
  EXPECT_GT(differences, 50);
}

// The share of the k-th most frequent block is k^-theta / sum.
class ZipfTest : public ::testing::TestWithParam<double> {};

TEST_P(ZipfTest, draws_blocks_as_often_as_their_rank_says) {
  constexpr std::uint64_t kBlocks = 1000;
  constexpr int kDraws = 200'000;
  const double theta = GetParam();
  OffsetSource source(Distribution::kZipf, theta, kBlocks, 0, test::test_seed());
  std::map<std::uint64_t, int> counts;
  for (int i = 0; i < kDraws; ++i) {
    const std::uint64_t block = source.next();
    ASSERT_LT(block, kBlocks);
    ++counts[block];
  }
  std::vector<int> sorted;
  for (const auto& [block, count] : counts) sorted.push_back(count);
  std::ranges::sort(sorted, std::greater());
  double sum = 0;
  for (std::uint64_t k = 1; k <= kBlocks; ++k) sum += std::pow(static_cast<double>(k), -theta);
  for (const std::size_t rank : {1U, 2U, 5U, 20U}) {
    const double expected = kDraws * std::pow(static_cast<double>(rank), -theta) / sum;
    EXPECT_NEAR(sorted[rank - 1], expected, 6 * std::sqrt(expected) + expected * 0.02) << rank;
  }
}
INSTANTIATE_TEST_SUITE_P(Thetas, ZipfTest, ::testing::Values(0.5, 0.99, 1.0, 1.2, 2.0));

TEST(Arrivals, come_at_a_fixed_distance) {
  const auto begin = Arrivals::Clock::now();
  Arrivals arrivals(false, 1000, begin, 1);
  for (int i = 1; i <= 10; ++i) {
    EXPECT_EQ(arrivals.next() - begin, std::chrono::milliseconds(i));
    arrivals.advance();
  }
}

TEST(Arrivals, of_a_poisson_process_vary_as_much_as_they_are_apart) {
  const auto begin = Arrivals::Clock::now();
  Arrivals arrivals(true, 1'000'000, begin, test::test_seed());
  constexpr int kCount = 100'000;
  double sum = 0;
  double sum_of_squares = 0;
  auto last = begin;
  for (int i = 0; i < kCount; ++i) {
    const auto distance =
        static_cast<double>(std::chrono::nanoseconds(arrivals.next() - last).count());
    last = arrivals.next();
    arrivals.advance();
    sum += distance;
    sum_of_squares += distance * distance;
  }
  const double mean = sum / kCount;
  EXPECT_NEAR(mean, 1000, 20);
  EXPECT_NEAR(std::sqrt(sum_of_squares / kCount - mean * mean) / mean, 1, 0.03);
}

TEST(Pattern, is_right_only_where_and_by_whose_seed_it_was_written) {
  const auto pattern = Pattern::everywhere(1);
  std::vector<std::byte> data(4096);
  pattern->before_write(8192, data);
  EXPECT_TRUE(pattern->is_right(8192, data));
  EXPECT_FALSE(pattern->is_right(4096, data));
  EXPECT_FALSE(Pattern::everywhere(2)->is_right(8192, data));
  data[4095] ^= std::byte{1};
  EXPECT_FALSE(pattern->is_right(8192, data));
}

TEST(Pattern, is_wrong_in_every_sector_that_a_read_leaves_alone) {
  const auto pattern = Pattern::everywhere(1);
  for (std::size_t sector = 0; sector < 8; ++sector) {
    std::vector<std::byte> data(4096);
    pattern->before_write(0, data);
    const std::vector<std::byte> written = data;
    EXPECT_TRUE(pattern->before_read(0, data));
    for (std::size_t i = 0; i < 8; ++i) {
      if (i != sector)
        std::copy_n(written.begin() + static_cast<std::ptrdiff_t>(i * 512), 512,
                    data.begin() + static_cast<std::ptrdiff_t>(i * 512));
    }
    EXPECT_FALSE(pattern->is_right(0, data)) << "sector " << sector;
  }
}

TEST(Pattern, checks_only_what_was_written_where_it_keeps_count) {
  const auto pattern = Pattern::where_written(1, 4096, 4096 + 100 * 4096, 4096);
  std::vector<std::byte> data(4096);
  EXPECT_FALSE(pattern->before_read(4096, data));
  pattern->written(4096, 4096);
  pattern->written(4096 + 99 * 4096, 4096);
  EXPECT_TRUE(pattern->before_read(4096, data));
  EXPECT_FALSE(pattern->before_read(8192, data));
  EXPECT_EQ(pattern->written_blocks(), 2U);
}

}  // namespace
}  // namespace vblk::bench
