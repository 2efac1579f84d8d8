// Which way a loop prefers once it has tried both.
#include "blockdev/poll_trial.h"

#include <random>

#include <gtest/gtest.h>

#include "tests/support/seed.h"

namespace vblk::blockdev {
namespace {

using Cost = PollTrial::Cost;

// Goes through `count` epochs of a load that costs these; in how many of them it looked.
int looks(PollTrial& trial, int count, const Cost& looking, const Cost& sleeping) {
  int looked = 0;
  for (int i = 0; i < count; ++i) {
    const bool looks = trial.looks();
    looked += looks ? 1 : 0;
    trial.epoch_ended(looks ? looking : sleeping);
  }
  return looked;
}

TEST(PollTrial, keeps_looking_where_that_is_faster_though_it_takes_more_processor_time) {
  PollTrial trial;
  EXPECT_GT(looks(trial, 1000, {.time = 40, .cpu_time = 40}, {.time = 80, .cpu_time = 30}), 970);
}

TEST(PollTrial, stops_looking_where_it_slows_the_load_down) {
  PollTrial trial;
  EXPECT_LT(looks(trial, 1000, {.time = 30, .cpu_time = 12}, {.time = 20, .cpu_time = 12}), 40);
}

TEST(PollTrial, stops_looking_where_it_is_no_faster_and_takes_more_processor_time) {
  PollTrial trial;
  EXPECT_LT(looks(trial, 1000, {.time = 19, .cpu_time = 20}, {.time = 20, .cpu_time = 12}), 40);
}

TEST(PollTrial, changes_nothing_where_there_is_no_difference) {
  PollTrial trial;
  const Cost same{.time = 20, .cpu_time = 10};
  EXPECT_GT(looks(trial, 1000, same, same), 970);
}

TEST(PollTrial, follows_a_load_that_changes) {
  PollTrial trial;
  const Cost slow{.time = 80, .cpu_time = 30};
  const Cost fast{.time = 40, .cpu_time = 30};
  looks(trial, 1000, slow, fast);
  ASSERT_FALSE(trial.looks());
  looks(trial, 300, fast, slow);
  EXPECT_GT(looks(trial, 500, fast, slow), 480);
}

TEST(PollTrial, begins_anew_the_way_it_went_and_looks_for_a_better_one_soon) {
  PollTrial trial;
  const Cost slow{.time = 80, .cpu_time = 30};
  const Cost fast{.time = 40, .cpu_time = 30};
  looks(trial, 2000, fast, slow);
  while (trial.looks()) trial.epoch_ended(fast);
  trial.begin_anew();
  EXPECT_TRUE(trial.looks()) << "not the way that was only being tried";
  EXPECT_LT(looks(trial, 20, slow, fast), 20);
  EXPECT_FALSE(trial.looks());
}

TEST(PollTrial, is_not_misled_by_a_load_that_grows_and_shrinks) {
  PollTrial trial;
  std::mt19937_64 random(test::test_seed());
  int looked = 0;
  double load = 1;
  for (int i = 0; i < 2000; ++i) {
    load *= 0.9 + 0.2 * static_cast<double>(random() % 1000) / 1000;
    const bool looks = trial.looks();
    looked += looks ? 1 : 0;
    trial.epoch_ended({.time = (looks ? 40 : 80) * load, .cpu_time = 30 * load});
  }
  EXPECT_GT(looked, 1800);
}

}  // namespace
}  // namespace vblk::blockdev
