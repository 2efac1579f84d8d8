// Hostile rings without coverage to guide them, mostly to see that the harness gets into the queue;
// and the inputs that are kept (tests/fuzz/corpus/ring).
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
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

TEST(HostileRings, that_are_kept_do_no_harm) {
  int count = 0;
  std::uint64_t requests = 0;
  const std::filesystem::path folder = std::filesystem::path(VBLK_FUZZ_CORPUS) / "ring";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<std::uint8_t> input{std::istreambuf_iterator<char>(file), {}};
    const RingOutcome outcome = run_hostile_ring(input);
    EXPECT_EQ(outcome.failure, "") << entry.path();
    requests += outcome.requests;
    ++count;
  }
  EXPECT_GT(count, 0) << "no files in " << folder;
  EXPECT_GT(requests, 0U);
}

}  // namespace
}  // namespace vblk::fuzz
