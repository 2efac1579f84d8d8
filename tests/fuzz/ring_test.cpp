// Hostile rings without coverage to guide them, mostly to see that the harness gets into the queue.
#include <cstdint>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/fuzz/hostile_ring.h"
#include "tests/support/seed.h"

namespace vblk::fuzz {
namespace {

TEST(HostileRings, are_taken_and_broken_without_harm) {
  std::mt19937_64 random(test::test_seed());
  for (const std::uint8_t kind : {std::uint8_t{0}, std::uint8_t{1}}) {
    std::uint64_t requests = 0;
    int broken = 0;
    constexpr int kRuns = 400;
    for (int run = 0; run < kRuns; ++run) {
      std::vector<std::uint8_t> input(8 + random() % 400);
      for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(random());
      input[0] = static_cast<std::uint8_t>((input[0] & 0xfeU) | kind);
      const RingOutcome outcome = run_hostile_ring(input);
      ASSERT_EQ(outcome.failure, "") << "run " << run << ", kind " << int{kind};
      requests += outcome.requests;
      broken += outcome.is_broken ? 1 : 0;
    }
    EXPECT_GT(requests, 20U) << int{kind};
    EXPECT_GT(broken, kRuns / 10) << int{kind};
  }
}

}  // namespace
}  // namespace vblk::fuzz
