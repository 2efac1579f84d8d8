// When it pays to look on before a sleep.
#include "blockdev/poll_policy.h"

#include <gtest/gtest.h>

namespace vblk::blockdev {
namespace {

using namespace std::chrono_literals;

// Goes through `count` idle moments in which work comes after `wait`; how many were looked through.
int looks(PollPolicy& policy, int count, std::chrono::nanoseconds wait) {
  int looked = 0;
  for (int i = 0; i < count; ++i) {
    if (!policy.looks_now()) continue;
    ++looked;
    if (wait < policy.window()) {
      policy.saw_work(wait);
    } else {
      policy.saw_nothing();
    }
  }
  return looked;
}

TEST(PollPolicy, looks_every_time_while_work_comes_soon) {
  PollPolicy policy(20us);
  EXPECT_EQ(looks(policy, 1000, 3us), 1000);
}

TEST(PollPolicy, never_looks_without_a_window) {
  PollPolicy policy(0us);
  EXPECT_EQ(looks(policy, 1000, 0us), 0);
}

TEST(PollPolicy, pays_for_less_than_one_look_in_a_hundred_sleeps_where_work_is_late) {
  PollPolicy policy(20us);
  EXPECT_LT(looks(policy, 100'000, 50us), 1000);
}

TEST(PollPolicy, stops_after_some_looks_in_vain_however_good_the_earlier_ones_were) {
  PollPolicy policy(20us);
  looks(policy, 1000, 0us);
  EXPECT_LT(looks(policy, 1000, 50us), 30);
}

TEST(PollPolicy, notices_within_some_hundred_sleeps_that_work_comes_soon_again) {
  PollPolicy policy(20us);
  looks(policy, 100'000, 50us);
  EXPECT_GT(looks(policy, 600, 3us), 300);
}

TEST(PollPolicy, goes_on_where_a_few_looks_in_vain_are_outweighed) {
  PollPolicy policy(20us);
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(looks(policy, 9, 2us), 9);
    EXPECT_EQ(looks(policy, 1, 50us), 1);
  }
}

TEST(PollPolicy, stops_where_a_look_lasts_longer_than_its_window) {
  PollPolicy policy(20us);
  int looked = 0;
  for (int i = 0; i < 1000; ++i) {
    if (!policy.looks_now()) continue;
    ++looked;
    policy.saw_work(4ms);  // somebody else had the processor
  }
  EXPECT_LT(looked, 30);
}

}  // namespace
}  // namespace vblk::blockdev
