// Flushes that share a call: every order in which a few of them can meet changes, polls and ends of
// calls, each checked against what a flush promises.
#include "blockdev/flush_group.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"
#include "blockdev/io_thread.h"
#include "blockdev/raw_node.h"
#include "tests/blockdev/flushing_writer.h"
#include "tests/support/every_order.h"
#include "tests/support/seed.h"

namespace vblk::blockdev {
namespace {

using testing::FlushingWriter;

constexpr std::size_t kThreads = 2;
constexpr std::size_t kFlushesMax = 4;

// What can happen next: a change; a flush on the first I/O thread or on the second; a poll of
// either; the end of the call that is under way, or its failure.
constexpr std::string_view kEvents = "WabABex";

// Two I/O threads on this one, whose loops run when told to. Lives for all orders.
struct Threads {
  struct Thread {
    IoLoop loop;
    std::unique_ptr<IoContext> context;
  };
  Threads() {
    for (Thread& thread : threads) {
      auto engines = std::make_unique<aio::EngineSet>(aio::SimulatedEngine::create(disk).value());
      thread.context = std::make_unique<IoContext>(thread.loop, std::move(engines));
    }
  }
  aio::SimulatedDisk disk{{}};
  std::array<Thread, kThreads> threads;
};

// One order of events. A change and a call to the kernel are numbers here: a call makes stable what
// had been changed when it began.
class World {
 public:
  explicit World(Threads& threads, GroupCommitPolicy policy = GroupCommitPolicy::never())
      : threads_(threads),
        group_(
            [](BlockRequest& leader) {
              static_cast<Flush&>(leader).world->call_begins(static_cast<Flush&>(leader));
            },
            policy) {
    for (Flush& flush : flushes_) {
      flush.operation = BlockOperation::kFlush;
      flush.world = this;
      flush.complete = [](BlockRequest& request, int error) {
        static_cast<Flush&>(request).world->completed(static_cast<Flush&>(request), error);
      };
    }
  }

  [[nodiscard]] bool is_possible(char event) const {
    switch (event) {
      case 'a':
      case 'b':
        return submitted_ < kFlushesMax;
      case 'e':
      case 'x':
        return leader_ != nullptr;
      default:
        return true;
    }
  }
  void happen(char event) {
    switch (event) {
      case 'W':
        ++changes_;
        return group_.note_change();
      case 'a':
        return submit(0);
      case 'b':
        return submit(1);
      case 'A':
        return poll(0);
      case 'B':
        return poll(1);
      case 'e':
        return call_ends(0);
      default:
        return call_ends(EIO);
    }
  }
  // Lets everything that was submitted come to its end.
  void settle() {
    for (int round = 0; round < 20 && completed_ < submitted_; ++round) {
      if (leader_ != nullptr) call_ends(0);
      for (std::size_t i = 0; i < kThreads; ++i) poll(i);
    }
    if (completed_ != submitted_) problem_ = "a flush never completes";
  }

  [[nodiscard]] const std::string& problem() const { return problem_; }
  [[nodiscard]] unsigned calls() const { return calls_; }
  [[nodiscard]] FlushStatistics statistics() const { return group_.statistics(); }

 private:
  struct Flush : BlockRequest {
    World* world{nullptr};
    std::uint64_t changes_before{0};
    unsigned failures_before{0};
    bool done{false};
  };

  void submit(std::size_t thread) {
    Flush& flush = flushes_[submitted_++];
    flush.context = threads_.threads[thread].context.get();
    flush.changes_before = changes_;
    flush.failures_before = failures_;
    submitting_ = true;
    group_.submit(flush);
    submitting_ = false;
  }
  void poll(std::size_t thread) {
    running_ = threads_.threads[thread].context.get();
    running_->poll();
    running_ = nullptr;
  }
  void call_begins(Flush& leader) {
    if (leader_ != nullptr) problem_ = "two calls at once";
    if (leader.context != running_) problem_ = "a call begins on another thread than its leader's";
    leader_ = &leader;
    call_covers_ = changes_;
    ++calls_;
  }
  // As the leader's engine would: from its thread's reap().
  void call_ends(int error) {
    Flush& leader = *std::exchange(leader_, nullptr);
    if (error == 0) {
      stable_ = std::max(stable_, call_covers_);
    } else {
      ++failures_;
    }
    running_ = leader.context;
    group_.finished(leader, error);
    running_ = nullptr;
  }
  void completed(Flush& flush, int error) {
    if (flush.done) problem_ = "a flush completes twice";
    if (submitting_) problem_ = "a flush completes inside submit()";
    if (flush.context != running_) problem_ = "a flush completes on another thread than its own";
    if (error == 0 && stable_ < flush.changes_before)
      problem_ = "a flush completes, and what was changed before it is not stable";
    if (error != 0 && flush.failures_before == failures_) problem_ = "an error from nowhere";
    flush.done = true;
    ++completed_;
  }

  Threads& threads_;
  FlushGroup group_;
  std::array<Flush, kFlushesMax> flushes_;
  std::size_t submitted_{0};
  std::size_t completed_{0};
  std::uint64_t changes_{1};  // somebody's, before our time
  std::uint64_t stable_{0};
  std::uint64_t call_covers_{0};
  Flush* leader_{nullptr};
  IoContext* running_{nullptr};
  bool submitting_{false};
  unsigned failures_{0};
  unsigned calls_{0};
  std::string problem_;
};

TEST(FlushGroup, keeps_its_promise_in_every_order_of_seven_events) {
  Threads threads;
  test::EveryOrder orders(kEvents, [&threads] { return std::make_unique<World>(threads); });
  EXPECT_GT(orders.explore(7), 100'000U);
}

// A wait has passed by the next poll: whether that or the number ends it first is up to the order.
TEST(FlushGroup, keeps_its_promise_in_every_order_where_flushes_wait_for_each_other) {
  Threads threads;
  for (const unsigned expected : {2U, 3U}) {
    const auto policy = GroupCommitPolicy::always(std::chrono::nanoseconds(1), expected);
    test::EveryOrder orders(
        kEvents, [&threads, policy] { return std::make_unique<World>(threads, policy); });
    EXPECT_GT(orders.explore(7), 50'000U);
  }
}

// A world after the events that the letters stand for.
class Story {
 public:
  explicit Story(std::string_view events, GroupCommitPolicy policy = GroupCommitPolicy::never())
      : world_(threads_, policy) {
    test::tell(world_, events);
  }
  World* operator->() { return &world_; }

 private:
  Threads threads_;
  World world_;
};

TEST(FlushGroup, begins_one_call_for_all_that_came_before_it) {
  Story story("WaabbA");
  EXPECT_EQ(story->calls(), 1U);
  EXPECT_EQ(story->statistics().submitted, 4U);
}

TEST(FlushGroup, begins_another_call_for_what_was_changed_during_the_first) {
  EXPECT_EQ(Story("WaAWbe")->calls(), 2U);
}

TEST(FlushGroup, begins_one_more_call_for_all_that_came_during_the_first) {
  EXPECT_EQ(Story("WaAWabbe")->calls(), 2U);
}

TEST(FlushGroup, shares_the_call_under_way_where_nothing_was_changed_since_it_began) {
  Story story("WaAbe");
  EXPECT_EQ(story->calls(), 1U);
  EXPECT_EQ(story->statistics().elided, 1U);
}

TEST(FlushGroup, begins_no_call_where_nothing_was_changed_since_the_last) {
  Story story("aAeaAbB");
  EXPECT_EQ(story->calls(), 1U);
  EXPECT_EQ(story->statistics().elided, 2U);
}

TEST(FlushGroup, always_begins_a_first_call) { EXPECT_EQ(Story("aA")->calls(), 1U); }

TEST(FlushGroup, begins_a_call_after_one_that_failed) { EXPECT_EQ(Story("aAxaA")->calls(), 2U); }

// ---- That wait for each other.

constexpr auto kLong = std::chrono::hours(1);

TEST(FlushGroup, that_waits_begins_when_as_many_are_there_as_are_expected) {
  const auto policy = GroupCommitPolicy::always(kLong, 3);
  // The last one comes on the leader's thread, or on another.
  for (const std::string_view events : {"WaAba", "WaAab", "WaAAAbBAb"}) {
    Story story(events, policy);
    EXPECT_EQ(story->calls(), 1U) << events;
    EXPECT_EQ(story->statistics().gathered, 1U) << events;
  }
}

TEST(FlushGroup, that_waits_begins_at_once_where_all_are_there) {
  Story story("WabbA", GroupCommitPolicy::always(kLong, 3));
  EXPECT_EQ(story->calls(), 1U);
  EXPECT_EQ(story->statistics().gathered, 0U);
}

TEST(FlushGroup, that_waits_begins_when_its_time_is_over) {
  Story story("WaAA", GroupCommitPolicy::always(std::chrono::nanoseconds(1), 3));
  EXPECT_EQ(story->calls(), 1U);
  EXPECT_EQ(story->statistics().gathered, 1U);
}

TEST(FlushGroup, that_waits_begins_when_its_thread_drains) {
  struct Flush : BlockRequest {
    bool done{false};
  };
  Threads threads;
  RawNode node(ImageFile::wrap(aio::SimulatedDisk::kDirectFd, aio::SimulatedDisk::kBufferedFd,
                               std::size_t{16} << 10, kSectorBytes, false),
               {.name = "simulated", .group_commit = GroupCommitPolicy::always(kLong, 3)});
  IoContext& context = *threads.threads.front().context;
  Flush flush;
  flush.operation = BlockOperation::kFlush;
  flush.complete = [](BlockRequest& request, int) { static_cast<Flush&>(request).done = true; };
  node.submit(flush, context);
  for (int i = 0; i < 10; ++i) context.poll();
  EXPECT_FALSE(flush.done);
  context.drain();
  EXPECT_TRUE(flush.done);
}

TEST(FlushGroup, that_has_nothing_to_flush_does_not_wait) {
  Story story("WaAbbAeaA", GroupCommitPolicy::always(kLong, 3));
  EXPECT_EQ(story->calls(), 1U);
  EXPECT_EQ(story->statistics().elided, 1U);
}

// Real threads: each writes, flushes and looks at what a power cut would leave, again and again.
struct Outcome {
  int lost;
  FlushStatistics statistics;
};

Outcome run_writers(bool disk_loses_flushes,
                    GroupCommitPolicy policy = GroupCommitPolicy::never()) {
  constexpr std::size_t kIoThreads = 3;
  constexpr std::size_t kWritersPerThread = 4;
  constexpr std::uint64_t kRounds = 200;
  aio::SimulatedDisk disk({.size_bytes = std::size_t{16} << 10,
                           .seed = test::test_seed(),
                           .loses_flushes = disk_loses_flushes});
  RawNode node(ImageFile::wrap(aio::SimulatedDisk::kDirectFd, aio::SimulatedDisk::kBufferedFd,
                               std::size_t{16} << 10, kSectorBytes, false),
               {.name = "simulated", .group_commit = policy});
  std::vector<std::unique_ptr<IoThread>> threads;
  std::vector<std::unique_ptr<FlushingWriter>> writers;
  for (std::size_t i = 0; i < kIoThreads; ++i) {
    threads.push_back(
        IoThread::start("io", {}, [&disk] {
          return Expected<std::unique_ptr<aio::EngineSet>>(
              std::make_unique<aio::EngineSet>(aio::SimulatedEngine::create(disk).value()));
        }).value());
    for (std::size_t j = 0; j < kWritersPerThread; ++j) {
      writers.push_back(
          std::make_unique<FlushingWriter>(node, disk, *threads.back(), writers.size(), kRounds));
    }
  }
  for (const auto& writer : writers) writer->start();
  int lost = 0;
  for (const auto& writer : writers) {
    writer->wait();
    lost += writer->lost();
  }
  // A leader may still be on its way out of the group when the last flush of another is done.
  for (const auto& thread : threads) thread->loop().run_and_wait([] {});
  return {lost, node.flush_statistics()};
}

TEST(FlushGroupThreads, lose_nothing_that_was_written_before_a_flush) {
  const Outcome outcome = run_writers(false);
  EXPECT_EQ(outcome.lost, 0);
  EXPECT_EQ(outcome.statistics.submitted, 2400U);
  EXPECT_LT(outcome.statistics.begun, outcome.statistics.submitted);
}

TEST(FlushGroupThreads, lose_nothing_where_flushes_wait_for_each_other) {
  for (const unsigned expected : {3U, 12U, 50U}) {
    const auto outcome =
        run_writers(false, GroupCommitPolicy::always(std::chrono::microseconds(200), expected));
    EXPECT_EQ(outcome.lost, 0);
    EXPECT_EQ(outcome.statistics.submitted, 2400U);
    EXPECT_GT(outcome.statistics.gathered, 0U);
    EXPECT_LT(outcome.statistics.begun, outcome.statistics.submitted / 2);
  }
}

TEST(FlushGroupThreads, notice_a_disk_that_loses_flushes) { EXPECT_GT(run_writers(true).lost, 0); }

}  // namespace
}  // namespace vblk::blockdev
