// The pool and the way back from it.
#include "threadpool/thread_pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <poll.h>
#include <set>
#include <string>
#include <sys/eventfd.h>
#include <thread>
#include <unistd.h>
#include <vector>

#include <gtest/gtest.h>

#include "threadpool/completion_queue.h"

namespace vblk::threadpool {
namespace {

// A gate that works wait at until the test opens it.
class Gate {
 public:
  void wait() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void wait_for_arrivals(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this, count] { return waiting_ >= count; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t waiting_{0};
  bool open_{false};
};

struct BlockedWork : Work {
  Gate* gate{nullptr};
  BlockedWork() {
    run = [](Work& work) noexcept { static_cast<BlockedWork&>(work).gate->wait(); };
  }
};

struct RecordedWork : Work {
  std::vector<int>* order{nullptr};
  int number{0};
  RecordedWork() {
    run = [](Work& work) noexcept {
      auto& self = static_cast<RecordedWork&>(work);
      self.order->push_back(self.number);
    };
  }
};

struct CountedWork : Work {
  std::atomic<int>* count{nullptr};
  CountedWork() {
    run = [](Work& work) noexcept { static_cast<CountedWork&>(work).count->fetch_add(1); };
  }
};

TEST(WorkList, keeps_order_through_append_and_pop) {
  Work works[5];
  WorkList first;
  WorkList second;
  first.push_back(works[0]);
  first.push_back(works[1]);
  second.push_back(works[2]);
  first.append(second);
  first.append(second);  // empty now: changes nothing
  EXPECT_TRUE(second.empty());
  EXPECT_EQ(first.size(), 3U);
  EXPECT_EQ(first.pop_front(), &works[0]);
  EXPECT_EQ(first.pop_front(), &works[1]);
  EXPECT_EQ(first.pop_front(), &works[2]);
  EXPECT_EQ(first.pop_front(), nullptr);
  second.append(first);
  EXPECT_TRUE(second.empty());
}

TEST(ThreadPool, has_no_thread_before_there_is_work) {
  const ThreadPool pool({.max_threads = 4});
  EXPECT_EQ(pool.statistics().threads, 0U);
}

TEST(ThreadPool, starts_as_many_as_are_asked_for_up_front) {
  const ThreadPool pool({.min_threads = 3, .max_threads = 4});
  EXPECT_EQ(pool.statistics().threads, 3U);
}

TEST(ThreadPool, grows_with_blocked_work_up_to_its_bound) {
  Gate gate;
  std::vector<BlockedWork> works(10);
  ThreadPool pool({.max_threads = 4});
  WorkList batch;
  for (auto& work : works) {
    work.gate = &gate;
    batch.push_back(work);
  }
  pool.submit(batch);
  EXPECT_TRUE(batch.empty());
  gate.wait_for_arrivals(4);
  EXPECT_EQ(pool.statistics().threads, 4U);
  gate.open();
}

TEST(ThreadPool, keeps_its_threads_and_uses_them_again) {
  std::atomic<int> count{0};
  std::vector<CountedWork> works(200);
  ThreadPool pool({.max_threads = 8});
  for (auto& work : works) {
    work.count = &count;
    WorkList batch;
    batch.push_back(work);
    const int before = count.load();
    pool.submit(batch);
    while (count.load() == before) std::this_thread::yield();
  }
  // One at a time: a second thread is started only while the first has not fallen asleep again.
  EXPECT_LE(pool.statistics().threads, 8U);
  EXPECT_EQ(pool.statistics().works, 200U);
  EXPECT_EQ(pool.statistics().batches, 200U);
}

TEST(ThreadPool, starts_works_in_the_order_they_came) {
  std::vector<int> order;
  std::vector<RecordedWork> works(100);
  {
    ThreadPool pool({.max_threads = 1});
    WorkList batch;
    for (int i = 0; i < 100; ++i) {
      works[static_cast<std::size_t>(i)].order = &order;
      works[static_cast<std::size_t>(i)].number = i;
      batch.push_back(works[static_cast<std::size_t>(i)]);
      if (i % 7 == 0) pool.submit(batch);
    }
    pool.submit(batch);
  }
  ASSERT_EQ(order.size(), 100U);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[static_cast<std::size_t>(i)], i);
}

TEST(ThreadPool, makes_no_wake_up_call_while_all_workers_are_busy) {
  Gate gate;
  std::vector<BlockedWork> busy(2);
  std::vector<BlockedWork> more(50);
  ThreadPool pool({.max_threads = 2});
  WorkList batch;
  for (auto& work : busy) {
    work.gate = &gate;
    batch.push_back(work);
  }
  pool.submit(batch);
  gate.wait_for_arrivals(2);
  const auto wakeups = pool.statistics().wakeups;
  for (auto& work : more) {
    work.gate = &gate;
    batch.push_back(work);
    pool.submit(batch);
  }
  EXPECT_EQ(pool.statistics().wakeups, wakeups);
  gate.open();
}

// Brings the mean service time down to that of works that do nothing.
void run_short_works(ThreadPool& pool) {
  std::atomic<int> count{0};
  CountedWork work;
  work.count = &count;
  for (int i = 1; i <= 2000; ++i) {
    WorkList batch;
    batch.push_back(work);
    pool.submit(batch);
    while (count != i) std::this_thread::yield();
  }
}

TEST(ThreadPool, wakes_no_worker_for_a_short_work_while_another_runs) {
  struct Round {
    Gate gate;
    BlockedWork first;
    std::atomic<int> count{0};
    CountedWork second;
  };
  std::deque<Round> rounds;  // outlives the pool: a worker may still be inside when a round ends
  ThreadPool pool({.min_threads = 4, .max_threads = 4, .wake_cost = std::chrono::seconds(1)});
  run_short_works(pool);
  EXPECT_LT(pool.statistics().service_time, std::chrono::milliseconds(1));
  // Now and then the guard is called, or a millisecond passes and it wakes somebody.
  int without_call = 0;
  for (int i = 0; i < 2000 && without_call < 10; ++i) {
    Round& round = rounds.emplace_back();
    round.first.gate = &round.gate;
    round.second.count = &round.count;
    WorkList batch;
    batch.push_back(round.first);
    pool.submit(batch);
    round.gate.wait_for_arrivals(1);
    const auto wakeups = pool.statistics().wakeups;
    batch.push_back(round.second);
    pool.submit(batch);
    without_call += pool.statistics().wakeups == wakeups ? 1 : 0;
    round.gate.open();
    while (round.count == 0) std::this_thread::yield();
  }
  EXPECT_EQ(without_call, 10);
}

// The mean says that a running worker is back soon, and it is not.
TEST(ThreadPool, lets_nothing_wait_behind_a_work_that_blocks_unexpectedly) {
  for (const std::size_t min_threads : {std::size_t{0}, std::size_t{4}}) {
    Gate gate;
    ThreadPool pool(
        {.min_threads = min_threads, .max_threads = 4, .wake_cost = std::chrono::seconds(1)});
    run_short_works(pool);
    BlockedWork blocked;
    blocked.gate = &gate;
    WorkList batch;
    batch.push_back(blocked);
    pool.submit(batch);
    gate.wait_for_arrivals(1);
    std::atomic<int> count{0};
    std::vector<CountedWork> works(10);
    for (int i = 0; i < 10; ++i) {
      works[static_cast<std::size_t>(i)].count = &count;
      batch.push_back(works[static_cast<std::size_t>(i)]);
      pool.submit(batch);
      while (count != i + 1) std::this_thread::yield();  // would hang
    }
    gate.open();
  }
}

// All of a batch blocks unexpectedly, and nothing is submitted afterwards that would wake anybody.
TEST(ThreadPool, lets_no_work_wait_behind_another_of_its_batch_that_blocks) {
  for (int round = 0; round < 20; ++round) {
    Gate gate;
    ThreadPool pool({.max_threads = 4, .wake_cost = std::chrono::seconds(1)});
    run_short_works(pool);
    BlockedWork blocked[3];
    WorkList batch;
    for (auto& work : blocked) {
      work.gate = &gate;
      batch.push_back(work);
    }
    pool.submit(batch);
    gate.wait_for_arrivals(3);
    run_short_works(pool);
    gate.open();
  }
}

TEST(ThreadPool, lets_nothing_wait_behind_what_takes_long) {
  for (int round = 0; round < 20; ++round) {
    Gate gate;
    ThreadPool pool({.max_threads = 3, .wake_cost = std::chrono::seconds(1)});
    run_short_works(pool);
    BlockedWork slow[2];
    WorkList batch;
    for (auto& work : slow) {
      work.gate = &gate;
      work.takes_long = true;
      batch.push_back(work);
      pool.submit(batch);
    }
    gate.wait_for_arrivals(2);
    run_short_works(pool);
    gate.open();
  }
}

TEST(ThreadPool, takes_more_works_than_its_ring_has_room_for_in_their_order) {
  constexpr int kWorks = 20000;
  Gate gate;
  ThreadPool pool({.max_threads = 1});
  BlockedWork blocked;
  blocked.gate = &gate;
  WorkList batch;
  batch.push_back(blocked);
  pool.submit(batch);
  gate.wait_for_arrivals(1);
  std::vector<int> order;
  std::vector<RecordedWork> works(kWorks);
  for (int i = 0; i < kWorks; ++i) {
    works[static_cast<std::size_t>(i)].order = &order;
    works[static_cast<std::size_t>(i)].number = i;
    batch.push_back(works[static_cast<std::size_t>(i)]);
    if (i % 7 == 0) pool.submit(batch);
  }
  std::atomic<int> done{0};
  CountedWork last;
  last.count = &done;
  batch.push_back(last);
  pool.submit(batch);
  gate.open();
  while (done == 0) std::this_thread::yield();
  ASSERT_EQ(order.size(), static_cast<std::size_t>(kWorks));
  EXPECT_TRUE(std::ranges::is_sorted(order));
}

// Bursts with pauses, from several threads: whatever is asleep when a burst comes must wake.
TEST(ThreadPool, never_forgets_a_work) {
  ThreadPool pool({.max_threads = 8});
  std::vector<std::thread> submitters;
  submitters.reserve(3);
  for (int s = 0; s < 3; ++s) {
    submitters.emplace_back([&pool, s] {
      std::atomic<int> count{0};
      std::vector<CountedWork> works(40);
      for (auto& work : works) work.count = &count;
      for (int burst = 0; burst < 1500; ++burst) {
        WorkList batch;
        const int size = 1 + (burst * 7 + s) % 40;
        for (int i = 0; i < size; ++i) batch.push_back(works[static_cast<std::size_t>(i)]);
        count = 0;
        pool.submit(batch);
        while (count != size) std::this_thread::yield();
        if (burst % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      }
    });
  }
  for (auto& submitter : submitters) submitter.join();
}

TEST(ThreadPool, runs_everything_before_it_is_destroyed) {
  std::atomic<int> count{0};
  std::vector<CountedWork> works(1000);
  {
    ThreadPool pool({.max_threads = 3});
    WorkList batch;
    for (auto& work : works) {
      work.count = &count;
      batch.push_back(work);
    }
    pool.submit(batch);
  }
  EXPECT_EQ(count.load(), 1000);
}

// ---- What every kind of pool promises.

class AnyPool : public testing::TestWithParam<PoolKind> {};

TEST_P(AnyPool, has_a_name_that_leads_back_to_it) {
  EXPECT_EQ(pool_kind_named(to_string(GetParam())), GetParam());
  EXPECT_EQ(pool_kind_named("warp"), std::nullopt);
}

TEST_P(AnyPool, never_forgets_a_work_however_many_come_at_once) {
  constexpr int kRounds = 2000;
  const auto pool = make_pool(GetParam(), {.max_threads = 4});
  std::atomic<int> count{0};
  std::array<CountedWork, 16> works;
  int expected = 0;
  for (int round = 0; round < kRounds; ++round) {
    WorkList batch;
    const int size = 1 + round % static_cast<int>(works.size());
    for (int i = 0; i < size; ++i) {
      works[static_cast<std::size_t>(i)].count = &count;
      batch.push_back(works[static_cast<std::size_t>(i)]);
    }
    expected += size;
    pool->submit(batch);
    // Sometimes the workers are asleep when the next batch comes, sometimes on their way.
    while (count.load() != expected) std::this_thread::yield();
    if (round % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(pool->statistics().works, static_cast<std::uint64_t>(expected));
}

TEST_P(AnyPool, starts_as_many_blocking_works_at_once_as_it_has_threads) {
  Gate gate;
  std::array<BlockedWork, 4> works;
  const auto pool = make_pool(GetParam(), {.max_threads = 4});
  WorkList batch;
  for (BlockedWork& work : works) {
    work.gate = &gate;
    batch.push_back(work);
  }
  pool->submit(batch);
  gate.wait_for_arrivals(works.size());
  gate.open();
}

TEST_P(AnyPool, runs_everything_before_it_is_destroyed) {
  std::atomic<int> count{0};
  std::vector<CountedWork> works(500);
  {
    const auto pool = make_pool(GetParam(), {.max_threads = 3});
    WorkList batch;
    for (CountedWork& work : works) {
      work.count = &count;
      batch.push_back(work);
    }
    pool->submit(batch);
    EXPECT_TRUE(batch.empty());
  }
  EXPECT_EQ(count.load(), 500);
}

INSTANTIATE_TEST_SUITE_P(AllPools, AnyPool, testing::ValuesIn(kAllPoolKinds),
                         [](const testing::TestParamInfo<PoolKind>& kind) {
                           std::string name(to_string(kind.param));
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

// A batch of works for sleeping workers: how many calls wake them is what the kinds differ in.
std::uint64_t wakeups_for_eight_sleepers(PoolKind kind) {
  Gate gate;
  std::array<BlockedWork, 8> works;
  const auto pool = make_pool(kind, {.max_threads = works.size()});
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // until they sleep
  WorkList batch;
  for (BlockedWork& work : works) {
    work.gate = &gate;
    batch.push_back(work);
  }
  pool->submit(batch);
  gate.wait_for_arrivals(works.size());
  gate.open();
  return pool->statistics().wakeups;
}

TEST(PoolKinds, wake_eight_sleepers_by_as_many_calls_as_they_say) {
  EXPECT_LE(wakeups_for_eight_sleepers(PoolKind::kOneWord), 2U);
  EXPECT_GE(wakeups_for_eight_sleepers(PoolKind::kWordPerWorker), 4U);
  EXPECT_GE(wakeups_for_eight_sleepers(PoolKind::kChained), 4U);
  EXPECT_EQ(wakeups_for_eight_sleepers(PoolKind::kCondition), 8U);
}

TEST(CompletionQueue, hands_out_what_one_producer_pushed_in_its_order) {
  CompletionQueue queue;
  Work works[3];
  for (Work& work : works) EXPECT_FALSE(queue.push(work)) << "nobody asked for a signal";
  WorkList list;
  EXPECT_EQ(queue.take_all(list), 3U);
  for (const Work& work : works) EXPECT_EQ(list.pop_front(), &work);
  EXPECT_EQ(queue.take_all(list), 0U);
}

TEST(CompletionQueue, asks_exactly_one_push_per_arming_for_a_signal) {
  CompletionQueue queue;
  Work works[4];
  ASSERT_TRUE(queue.arm());
  EXPECT_TRUE(queue.push(works[0]));
  EXPECT_FALSE(queue.push(works[1]));
  EXPECT_TRUE(queue.disarm()) << "a signal was asked for";
  EXPECT_FALSE(queue.arm()) << "there is something already";
  WorkList list;
  queue.take_all(list);
  ASSERT_TRUE(queue.arm());
  EXPECT_FALSE(queue.disarm());
  EXPECT_FALSE(queue.push(works[2]));
}

// A consumer that sleeps whenever it may, against producers that never wait: a lost signal hangs
// here.
TEST(CompletionQueue, never_loses_a_signal) {
  constexpr std::size_t kProducers = 4;
  constexpr std::size_t kPerProducer = 20000;
  CompletionQueue queue;
  const int fd = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  std::vector<std::vector<Work>> works(kProducers, std::vector<Work>(kPerProducer));
  std::vector<std::thread> producers;
  producers.reserve(kProducers);
  for (auto& own : works) {
    producers.emplace_back([&queue, &own, fd] {
      for (Work& work : own) {
        const std::uint64_t one = 1;
        if (queue.push(work)) {
          ASSERT_EQ(::write(fd, &one, sizeof one), static_cast<ssize_t>(sizeof one));
        }
      }
    });
  }
  std::set<Work*> seen;
  WorkList list;
  while (seen.size() < kProducers * kPerProducer) {
    if (queue.take_all(list) == 0 && queue.arm()) {
      pollfd descriptor{.fd = fd, .events = POLLIN, .revents = 0};
      ASSERT_GT(::poll(&descriptor, 1, 20000), 0) << "a signal was lost";
      std::uint64_t value;
      [[maybe_unused]] const auto consumed = ::read(fd, &value, sizeof value);
      queue.disarm();
    }
    while (Work* const work = list.pop_front())
      EXPECT_TRUE(seen.insert(work).second) << "handed out twice";
  }
  for (auto& producer : producers) producer.join();
  ::close(fd);
}

}  // namespace
}  // namespace vblk::threadpool
