// What the fuzzer has found, again: every file in tests/fuzz/regressions itself is an input that
// once went wrong, named after what it did. The inputs that are kept (tests/fuzz/corpus/image). And
// the seeds' kinds of input, to see that the harness still opens, writes and refuses.
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "tests/fuzz/hostile_image.h"
#include "tests/support/seed.h"

namespace vblk::fuzz {
namespace {

using InputBytes = std::vector<std::uint8_t>;

InputBytes read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(HostileImages, that_once_went_wrong_do_no_more) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(VBLK_FUZZ_REGRESSIONS)) {
    if (!entry.is_regular_file()) continue;  // frontend_test.cpp's
    const Outcome outcome = run_hostile_image(read_file(entry.path()));
    EXPECT_EQ(outcome.failure, "") << entry.path();
    ++count;
  }
  EXPECT_GT(count, 0) << "no files in " << VBLK_FUZZ_REGRESSIONS;
}

TEST(HostileImages, that_are_kept_do_no_harm) {
  int count = 0;
  int opened = 0;
  const std::filesystem::path folder = std::filesystem::path(VBLK_FUZZ_CORPUS) / "image";
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const Outcome outcome = run_hostile_image(read_file(entry.path()));
    EXPECT_EQ(outcome.failure, "") << entry.path();
    opened += outcome.opened ? 1 : 0;
    ++count;
  }
  EXPECT_GT(count, 0) << "no files in " << folder;
  EXPECT_GT(opened, 0);
}

// Without coverage to guide it, mostly to see that the harness gets into the node at all.
TEST(HostileImages, are_opened_written_and_refused_without_harm) {
  std::mt19937_64 random(test::test_seed());
  int opened = 0;
  int written = 0;
  int refused = 0;
  constexpr int kRuns = 300;
  for (int run = 0; run < kRuns; ++run) {
    InputBytes input(16 + random() % 200);
    for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(random());
    input[0] = 0;
    // Few patches, many requests. Behind the kind: the geometry's six or seven bytes.
    input[6] %= 4;
    input[7] %= 4;
    const Outcome outcome = run_hostile_image(input);
    ASSERT_EQ(outcome.failure, "") << "run " << run;
    opened += outcome.opened ? 1 : 0;
    written += outcome.written ? 1 : 0;
    refused += outcome.opened ? 0 : 1;
  }
  EXPECT_GT(opened, kRuns / 10);
  EXPECT_GT(written, kRuns / 10);
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace vblk::fuzz
