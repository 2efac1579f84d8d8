// Hostile frontends without coverage to guide them, mostly to see that the harness gets to rings
// that run; the inputs that are kept (tests/fuzz/corpus/frontend); and what the fuzzer has found,
// again: every file in tests/fuzz/regressions/frontend is an input that once went wrong, named
// after what it did.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/fuzz/hostile_frontend.h"
#include "tests/support/seed.h"

namespace vblk::fuzz {
namespace {

using InputBytes = std::vector<std::uint8_t>;
constexpr std::uint8_t kSetUp = 7;
constexpr std::uint8_t kRequest = 8;

TEST(HostileFrontends, are_served_and_refused_without_harm) {
  std::mt19937_64 random(test::test_seed());
  FrontendOutcome sum;
  constexpr int kRuns = 300;
  for (int run = 0; run < kRuns; ++run) {
    InputBytes input(2 + random() % 400);
    for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(random());
    // Most begin as a frontend should.
    if (run % 4 != 0) {
      const std::uint8_t how = input[1];
      input.insert(input.begin() + 2, {kSetUp, how, kRequest, 0, 2, 1, kRequest, 1, 2, 1});
    }
    const FrontendOutcome outcome = run_hostile_frontend(input);
    ASSERT_EQ(outcome.failure, "") << "run " << run;
    sum.messages += outcome.messages;
    sum.refused += outcome.refused;
    sum.connections += outcome.connections;
    sum.requests += outcome.requests;
  }
  EXPECT_GT(sum.messages, 10U * kRuns);
  EXPECT_GT(sum.refused, kRuns / 4U);
  EXPECT_GT(sum.connections, kRuns + kRuns / 4U);
  EXPECT_GT(sum.requests, kRuns / 4U);
}

InputBytes read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(HostileFrontends, that_once_went_wrong_do_no_more) {
  int count = 0;
  const std::filesystem::path folder = std::filesystem::path(VBLK_FUZZ_REGRESSIONS) / "frontend";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    EXPECT_EQ(run_hostile_frontend(read_file(entry.path())).failure, "") << entry.path();
    ++count;
  }
  EXPECT_GT(count, 0) << "no files in " << folder;
}

TEST(HostileFrontends, that_are_kept_get_to_requests_and_do_no_harm) {
  int count = 0;
  const std::filesystem::path folder = std::filesystem::path(VBLK_FUZZ_CORPUS) / "frontend";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const FrontendOutcome outcome = run_hostile_frontend(read_file(entry.path()));
    EXPECT_EQ(outcome.failure, "") << entry.path();
    EXPECT_GT(outcome.requests, 0U) << entry.path() << ": it leads nowhere any more";
    ++count;
  }
  EXPECT_GT(count, 0) << "no files in " << folder;
}

}  // namespace
}  // namespace vblk::fuzz
