// The queue and the sleep below the pool.
#include "threadpool/work_queue.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "threadpool/wake_word.h"

namespace vblk::threadpool {
namespace {

TEST(WorkQueue, is_a_fifo_that_says_when_it_is_full) {
  WorkQueue queue(4);
  Work works[5];
  for (int round = 0; round < 3; ++round) {
    EXPECT_EQ(queue.pop(), nullptr);
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(queue.push(works[i]));
    EXPECT_EQ(queue.size(), 4U);
    EXPECT_FALSE(queue.push(works[4]));
    for (int i = 0; i < 4; ++i) EXPECT_EQ(queue.pop(), &works[i]);
    EXPECT_EQ(queue.size(), 0U);
  }
  EXPECT_EQ(queue.taken(), 12U);
}

struct OwnedWork : Work {
  std::atomic<int> owners{0};
};

// Each work goes round: whoever takes it is alone with it and puts it back.
TEST(WorkQueue, hands_each_work_to_one_thread_at_a_time) {
  constexpr std::size_t kWorks = 24;
  constexpr int kTakesPerThread = 20000;
  WorkQueue queue(32);
  std::vector<OwnedWork> works(kWorks);
  for (auto& work : works) ASSERT_TRUE(queue.push(work));
  std::atomic<int> shared{0};
  std::vector<std::thread> threads;
  threads.reserve(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int taken = 0; taken < kTakesPerThread;) {
        auto* const work = static_cast<OwnedWork*>(queue.pop());
        if (work == nullptr) continue;
        if (work->owners.fetch_add(1) != 0) ++shared;
        ++taken;
        work->owners.fetch_sub(1);
        while (!queue.push(*work)) {
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(shared, 0);
  EXPECT_EQ(queue.size(), kWorks);
}

TEST(WakeWord, keeps_whoever_has_announced_itself_from_falling_asleep) {
  WakeWord word;
  EXPECT_EQ(word.wake(1), 0U);
  const auto ticket = word.prepare();
  EXPECT_EQ(word.sleepers(), 1U);
  EXPECT_EQ(word.wake(1), 0U) << "announced, not asleep";
  EXPECT_FALSE(word.sleep(ticket)) << "the ticket is old: no sleep";
  EXPECT_EQ(word.sleepers(), 0U);
}

TEST(WakeWord, ends_a_sleep_by_its_timeout) {
  WakeWord word;
  EXPECT_TRUE(word.sleep(word.prepare(), std::chrono::milliseconds(1)));
  EXPECT_EQ(word.sleepers(), 0U);
}

TEST(WakeWord, wakes_several_by_one_call) {
  WakeWord word;
  std::atomic<int> awake{0};
  std::vector<std::thread> threads;
  threads.reserve(3);
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      word.sleep(word.prepare());
      ++awake;
    });
  }
  // Announced is not asleep yet, so some calls find nobody.
  std::size_t woken = 0;
  std::size_t most = 0;
  while (awake < 3) {
    const std::size_t now = word.sleepers() > 0 ? word.wake(2) : 0;
    woken += now;
    most = std::max(most, now);
    std::this_thread::yield();
  }
  for (auto& thread : threads) thread.join();
  EXPECT_LE(woken, 3U);
  EXPECT_LE(most, 2U);
  EXPECT_EQ(word.sleepers(), 0U);
}

// Two threads take turns by nothing but the word: a lost wake-up would stop them for good.
TEST(WakeWord, loses_no_wake_up) {
  constexpr int kTurns = 50000;
  WakeWord words[2];
  std::atomic<int> turn{0};
  const auto play = [&](int me) {
    for (int i = 0; i < kTurns; ++i) {
      while (turn.load(std::memory_order_acquire) != me) {
        const auto ticket = words[me].prepare();
        if (turn.load(std::memory_order_acquire) == me) {
          words[me].cancel();
          break;
        }
        words[me].sleep(ticket);
      }
      turn.store(1 - me, std::memory_order_release);
      words[1 - me].wake(1);
    }
  };
  std::thread other([&] { play(1); });
  play(0);
  other.join();
  EXPECT_EQ(words[0].sleepers() + words[1].sleepers(), 0U);
}

}  // namespace
}  // namespace vblk::threadpool
