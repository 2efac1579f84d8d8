// When it pays that flushes wait for each other.
#include "blockdev/group_commit_policy.h"

#include <gtest/gtest.h>

namespace vblk::blockdev {
namespace {

using namespace std::chrono_literals;

// `count` calls of 2 ms: before each one flush is there, and where the policy waits, `joined`
// more come in half of its window. How many were waited for.
int waits(GroupCommitPolicy& policy, int count, unsigned joined) {
  int waited = 0;
  for (int i = 0; i < count; ++i) {
    const auto window = policy.window(1);
    if (window.count() > 0) {
      ++waited;
      policy.has_waited(window / 2, 1, joined);
    }
    policy.call_ended(2ms, 1, 1);
  }
  return waited;
}

TEST(GroupCommitPolicy, waits_every_time_while_others_come) {
  auto policy = GroupCommitPolicy::adaptive();
  policy.call_ended(2ms, 1, 1);
  EXPECT_EQ(waits(policy, 1000, 1), 1000);
}

TEST(GroupCommitPolicy, waits_for_few_calls_where_nobody_comes) {
  auto policy = GroupCommitPolicy::adaptive();
  policy.call_ended(2ms, 1, 1);
  EXPECT_LT(waits(policy, 100'000, 0), 200);
}

// By chance: they would have come without a wait, and make the call no cheaper for the others.
TEST(GroupCommitPolicy, does_not_go_on_waiting_for_who_comes_now_and_then) {
  auto policy = GroupCommitPolicy::adaptive();
  policy.call_ended(2ms, 1, 1);
  int waited = 0;
  for (int i = 0; i < 10'000; ++i) {
    const auto window = policy.window(1);
    if (window.count() > 0) {
      ++waited;
      policy.has_waited(window, 1, i % 5 == 0 ? 1 : 0);
    }
    policy.call_ended(2ms, 1, 1);
  }
  EXPECT_LT(waited, 1000);
}

TEST(GroupCommitPolicy, notices_that_others_come_again) {
  auto policy = GroupCommitPolicy::adaptive();
  policy.call_ended(2ms, 1, 1);
  waits(policy, 100'000, 0);
  EXPECT_GT(waits(policy, 3000, 1), 1500);
}

TEST(GroupCommitPolicy, never_waits_for_who_is_alone) {
  auto policy = GroupCommitPolicy::adaptive();
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(policy.window(1), 0ns);
    policy.call_ended(1ms, 1, 0);
  }
}

TEST(GroupCommitPolicy, does_not_wait_where_all_are_there) {
  auto policy = GroupCommitPolicy::adaptive();
  policy.call_ended(1ms, 4, 4);
  EXPECT_EQ(policy.expected(), 8U);
  EXPECT_GT(policy.window(7), 0ns);
  EXPECT_EQ(policy.window(8), 0ns);
}

TEST(GroupCommitPolicy, does_not_wait_for_calls_that_take_no_time) {
  auto policy = GroupCommitPolicy::adaptive();
  for (int i = 0; i < 100; ++i) policy.call_ended(10us, 8, 8);
  EXPECT_EQ(policy.window(1), 0ns);
}

TEST(GroupCommitPolicy, does_not_take_one_stall_for_a_slow_disk) {
  auto policy = GroupCommitPolicy::adaptive();
  for (int i = 0; i < 100; ++i) policy.call_ended(100us, 2, 2);
  policy.call_ended(2s, 2, 2);
  EXPECT_EQ(policy.window(1), 0ns);
}

TEST(GroupCommitPolicy, waits_for_a_part_of_a_call_and_no_longer_than_its_bound) {
  auto policy = GroupCommitPolicy::adaptive();
  policy.call_ended(2ms, 8, 8);
  EXPECT_EQ(policy.window(1), 500us);
  for (int i = 0; i < 1000; ++i) policy.call_ended(2s, 8, 8);
  EXPECT_EQ(policy.window(1), GroupCommitPolicy::kWaitMax);
}

TEST(GroupCommitPolicy, that_is_not_wanted_never_waits) {
  auto policy = GroupCommitPolicy::never();
  policy.call_ended(1s, 8, 8);
  EXPECT_FALSE(policy.is_used());
  EXPECT_EQ(policy.window(1), 0ns);
}

}  // namespace
}  // namespace vblk::blockdev
