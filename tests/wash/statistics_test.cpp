// What statistics.h promises: textbook values, edge cases, and error rates over many experiments.
// tests/wash/statistics_test.py asks R the same.
#include "blockdev/wash/statistics.h"

#include <cmath>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/wash/digest.h"
#include "tests/support/seed.h"

namespace vblk::wash {
namespace {

constexpr double kAlpha = 0.05;

std::vector<double> normal_samples(std::mt19937_64& random, std::size_t count, double mean,
                                   double deviation) {
  std::normal_distribution<double> distribution(mean, deviation);
  std::vector<double> samples(count);
  for (double& sample : samples) sample = distribution(random);
  return samples;
}

TEST(Estimate, is_that_of_a_t_table) {
  // t(0.95, 4) is 2.131847; of 1 to 5 the mean is 3 and the deviation sqrt(2.5).
  const std::vector<double> samples{1, 2, 3, 4, 5};
  const Estimate result = estimate(samples, kAlpha);
  EXPECT_DOUBLE_EQ(result.mean, 3);
  EXPECT_NEAR(result.standard_deviation, std::sqrt(2.5), 1e-12);
  EXPECT_NEAR(result.upper - 3, 2.131846786 * std::sqrt(2.5 / 5), 1e-8);
  EXPECT_NEAR(3 - result.lower, result.upper - 3, 1e-12);
}

TEST(Estimate, knows_nothing_of_one_sample) {
  const Estimate result = estimate(std::vector<double>{1}, kAlpha);
  EXPECT_TRUE(std::isinf(result.lower));
  EXPECT_TRUE(std::isinf(result.upper));
  const MarginTests tests = test_margin(std::vector<double>{1}, 0.1);
  EXPECT_EQ(tests.equivalent, 1);
  EXPECT_EQ(tests.above, 1);
}

TEST(MarginTests, agree_with_the_interval) {
  const std::uint64_t seed = test::test_seed();
  std::mt19937_64 random(seed);
  for (int i = 0; i < 500; ++i) {
    const auto samples = normal_samples(random, 3 + random() % 20, 0.1 * (i % 7 - 3), 0.1);
    const Estimate interval = estimate(samples, kAlpha);
    const double margin = 0.07;
    const MarginTests tests = test_margin(samples, margin);
    EXPECT_EQ(tests.equivalent <= kAlpha, interval.lower >= -margin && interval.upper <= margin);
    EXPECT_EQ(tests.above <= kAlpha, interval.lower >= margin);
    EXPECT_EQ(tests.below <= kAlpha, interval.upper <= -margin);
  }
}

TEST(MarginTests, take_samples_that_are_all_alike_for_certain) {
  const std::vector<double> same{0.01, 0.01, 0.01};
  EXPECT_EQ(test_margin(same, 0.05).equivalent, 0);
  EXPECT_EQ(test_margin(same, 0.005).above, 0);
  EXPECT_EQ(test_margin(same, 0.005).equivalent, 1);
}

TEST(Holm, is_the_textbook_example) {
  // Holm 1979: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02.
  const auto adjusted = holm(std::vector<double>{0.01, 0.04, 0.03, 0.005});
  EXPECT_NEAR(adjusted[0], 0.03, 1e-12);
  EXPECT_NEAR(adjusted[1], 0.06, 1e-12);
  EXPECT_NEAR(adjusted[2], 0.06, 1e-12);
  EXPECT_NEAR(adjusted[3], 0.02, 1e-12);
  EXPECT_TRUE(holm(std::vector<double>{}).empty());
  EXPECT_EQ(holm(std::vector<double>{0.9, 0.9})[0], 1);
}

TEST(Line, goes_through_points_that_lie_on_one) {
  const std::vector<double> x{1, 2, 3, 4};
  const std::vector<double> y{3, 5, 7, 9};
  const auto line = fit_line(x, y, kAlpha);
  ASSERT_TRUE(line);
  EXPECT_NEAR(line->slope, 2, 1e-12);
  EXPECT_NEAR(line->intercept, 1, 1e-12);
  EXPECT_NEAR(line->r_squared, 1, 1e-12);
  EXPECT_FALSE(fit_line(std::vector<double>{1, 1, 1}, std::vector<double>{1, 2, 3}, kAlpha));
}

TEST(BlocksForWash, are_those_of_the_plan) {
  // A wash within 5 % where runs vary by 5 %, that is by sqrt(2) * 5 % within a pair: 25 blocks.
  EXPECT_NEAR(
      static_cast<double>(blocks_for_wash(0.05 * std::sqrt(2.0), std::log1p(0.05), 0.05, 0.9)), 25,
      1);
  EXPECT_NEAR(
      static_cast<double>(blocks_for_wash(0.02 * std::sqrt(2.0), std::log1p(0.10), 0.05, 0.9)), 3,
      1);
}

TEST(Bootstrap, lies_near_the_t_interval_of_normal_samples) {
  std::mt19937_64 random(test::test_seed());
  const auto samples = normal_samples(random, 40, 1, 0.2);
  const auto interval = bootstrap(samples, kAlpha, 7);
  const auto by_t = estimate(samples, kAlpha);
  ASSERT_TRUE(interval);
  const double half = (by_t.upper - by_t.lower) / 2;
  EXPECT_NEAR(interval->lower, by_t.lower, half / 2);
  EXPECT_NEAR(interval->upper, by_t.upper, half / 2);
  EXPECT_FALSE(bootstrap(std::vector<double>{1, 1, 1, 1}, kAlpha, 7));
}

// How many of `experiments`, each a family of `cells` whose true mean is `mean`, hold a cell that
// is called `wrong`.
unsigned families_with(Direction wrong, double mean, double deviation, unsigned experiments,
                       std::size_t cells, std::mt19937_64& random) {
  unsigned count = 0;
  for (unsigned i = 0; i < experiments; ++i) {
    std::vector<std::vector<double>> family;
    for (std::size_t cell = 0; cell < cells; ++cell)
      family.push_back(normal_samples(random, 10, mean, deviation));
    bool any = false;
    for (const CellDecision& decision : decide(family, std::log1p(0.05), kAlpha))
      any = any || decision.direction == wrong;
    if (any) ++count;
  }
  return count;
}

// 2000 families; at 5 % some 100 of them, and 140 would be four standard deviations more.
constexpr unsigned kFamilies = 2000;
constexpr unsigned kFamiliesMost = 140;

TEST(Decide, calls_no_more_differences_than_promised_where_there_are_none) {
  std::mt19937_64 random(test::test_seed());
  for (const double deviation : {0.01, 0.05, 0.3}) {
    EXPECT_LE(families_with(Direction::kAbove, 0, deviation, kFamilies, 6, random) +
                  families_with(Direction::kBelow, 0, deviation, kFamilies, 6, random),
              2 * kFamiliesMost)
        << deviation;
  }
}

TEST(Decide, calls_no_more_washes_than_promised_at_the_margin) {
  std::mt19937_64 random(test::test_seed());
  for (const double deviation : {0.01, 0.05})
    EXPECT_LE(
        families_with(Direction::kEquivalent, std::log1p(0.05), deviation, kFamilies, 6, random),
        kFamiliesMost)
        << deviation;
}

TEST(Decide, finds_a_difference_of_ten_percent_and_a_wash) {
  std::mt19937_64 random(test::test_seed());
  std::vector<std::vector<double>> family;
  for (const double mean : {std::log(1.10), 0.0, -std::log(1.10)})
    family.push_back(normal_samples(random, 12, mean, 0.015));
  const auto decisions = decide(family, std::log1p(0.05), kAlpha);
  EXPECT_EQ(decisions[0].direction, Direction::kAbove);
  EXPECT_EQ(decisions[1].direction, Direction::kEquivalent);
  EXPECT_EQ(decisions[2].direction, Direction::kBelow);
}

TEST(Decide, asks_about_one_side_alone_where_it_is_known) {
  std::mt19937_64 random(test::test_seed());
  std::vector<std::vector<double>> family;
  for (const double mean : {std::log(1.10), std::log(1.06), -std::log(1.10)})
    family.push_back(normal_samples(random, 12, mean, 0.05));
  const double margin = std::log1p(0.05);
  std::vector<double> above;
  for (const auto& samples : family) above.push_back(test_margin(samples, margin).above);
  const auto expected = holm(above);
  const auto decisions = decide(family, margin, kAlpha, Sides::kAbove);
  for (std::size_t i = 0; i < family.size(); ++i) {
    EXPECT_DOUBLE_EQ(decisions[i].p_above, expected[i]);
    EXPECT_EQ(decisions[i].p_below, 1);
    EXPECT_NE(decisions[i].direction, Direction::kBelow);
  }
  EXPECT_EQ(decide(family, margin, kAlpha, Sides::kBelow)[0].p_above, 1);
}

TEST(Decide, does_not_take_noise_for_a_wash) {
  std::mt19937_64 random(test::test_seed());
  unsigned washes = 0;
  for (int i = 0; i < 200; ++i) {
    std::vector<std::vector<double>> family{normal_samples(random, 8, 0, 0.3)};
    if (decide(family, std::log1p(0.05), kAlpha)[0].direction == Direction::kEquivalent) ++washes;
  }
  EXPECT_LE(washes, 2U);
}

TEST(Digest, is_the_standard_s_examples) {
  // FIPS 180-4's examples, and a length at which the padding needs a chunk of its own.
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

}  // namespace
}  // namespace vblk::wash
