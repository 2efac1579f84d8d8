// The I/O thread's loop: what wakes it, what it polls, and that it sleeps when there is nothing to
// do.
#include "blockdev/io_loop.h"

#include <atomic>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

namespace vblk::blockdev {
namespace {

using namespace std::chrono_literals;

// A loop on a thread of its own, stopped and joined at the end of the test.
class RunningLoop {
 public:
  explicit RunningLoop(IoLoopOptions options = {}) : loop_(options) {}
  ~RunningLoop() { stop(); }
  RunningLoop(const RunningLoop&) = delete;
  RunningLoop& operator=(const RunningLoop&) = delete;

  void start() {
    thread_ = std::thread([this] { loop_.run(); });
  }
  void stop() {
    loop_.stop();
    if (thread_.joinable()) thread_.join();
  }
  IoLoop* operator->() { return &loop_; }

 private:
  IoLoop loop_;
  std::thread thread_;
};

// Pops "work" that another thread publishes in an atomic, like an avail ring: notified by an
// eventfd only while it asked to be.
class RingLikePoller final : public Poller {
 public:
  RingLikePoller() : kick_fd_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {}
  ~RingLikePoller() override { ::close(kick_fd_); }

  void publish() {
    available_.fetch_add(1);
    if (notify_.load()) {
      const std::uint64_t one = 1;
      ASSERT_EQ(::write(kick_fd_, &one, sizeof one), static_cast<ssize_t>(sizeof one));
    }
  }
  std::size_t poll() override {
    ++polls;
    const std::uint64_t available = available_.load();
    return available - taken.exchange(available);
  }
  void settle() override { ++settles; }
  bool prepare_to_sleep() override {
    notify_.store(true);
    return available_.load() == taken.load();
  }
  void wake_up() override {
    notify_.store(false);
    std::uint64_t value;
    while (::read(kick_fd_, &value, sizeof value) > 0) {
    }
  }
  [[nodiscard]] int kick_fd() const { return kick_fd_; }

  std::atomic<std::uint64_t> taken{0};
  std::atomic<std::uint64_t> polls{0};
  std::atomic<std::uint64_t> settles{0};

 private:
  int kick_fd_;
  std::atomic<std::uint64_t> available_{0};
  std::atomic<bool> notify_{false};
};

void wait_until(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + 20s;
  while (!condition() && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  ASSERT_TRUE(condition()) << "nothing happened within 20 s";
}

TEST(IoLoop, runs_posted_functions_in_order_on_its_own_thread) {
  RunningLoop loop;
  loop.start();
  std::vector<int> order;
  for (int i = 0; i < 100; ++i) loop->post([&order, i] { order.push_back(i); });
  bool on_loop_thread = false;
  loop->run_and_wait([&] { on_loop_thread = loop->is_loop_thread(); });
  EXPECT_TRUE(on_loop_thread);
  EXPECT_FALSE(loop->is_loop_thread());
  ASSERT_EQ(order.size(), 100U);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(order[static_cast<std::size_t>(i)], i);
}

TEST(IoLoop, runs_what_was_posted_before_stop) {
  RunningLoop loop;
  int ran = 0;
  for (int i = 0; i < 10; ++i) loop->post([&ran] { ++ran; });
  loop->stop();
  loop.start();
  loop.stop();
  EXPECT_EQ(ran, 10);
}

// The lost wake-up is the classic bug of such a loop: a producer that publishes just as the
// consumer goes to sleep. Publishing one by one, each time waiting until it was seen, meets that
// moment often.
TEST(IoLoop, polls_on_while_functions_are_posted_without_end) {
  RunningLoop loop;
  RingLikePoller poller;
  loop->add_poller(poller, PollStage::kDispatch);
  auto watch = loop->watch(poller.kick_fd(), [&] { loop->wake(poller); });
  std::atomic<bool> enough{false};
  std::move_only_function<void()> post_again;
  const auto repost = [&] {
    if (!enough) loop->post([&] { post_again(); });
  };
  post_again = repost;
  loop.start();
  loop->post([&] { post_again(); });
  for (std::uint64_t i = 1; i <= 100; ++i) {
    poller.publish();
    wait_until([&] { return poller.taken.load() == i; });
  }
  enough = true;
  loop->run_and_wait([&] {
    watch.reset();
    loop->remove_poller(poller);
  });
}

TEST(IoLoop, never_misses_work_published_while_it_falls_asleep) {
  for (const auto poll_max : {0us, 20us}) {
    RunningLoop loop(IoLoopOptions{.poll_max = poll_max});
    RingLikePoller poller;
    loop->add_poller(poller, PollStage::kDispatch);
    auto watch = loop->watch(poller.kick_fd(), [&] { loop->wake(poller); });
    ASSERT_NE(watch, nullptr);
    loop.start();
    for (std::uint64_t i = 1; i <= 20000; ++i) {
      poller.publish();
      while (poller.taken.load() < i) std::this_thread::yield();
    }
    loop->run_and_wait([&] {
      watch.reset();
      loop->remove_poller(poller);
    });
    EXPECT_GE(poller.settles.load(), 1U);
  }
}

// Publishes `count` times, `gap` apart, and returns what the loop counted meanwhile.
IoLoopStatistics load_statistics(std::chrono::microseconds poll_max, int count,
                                 std::chrono::microseconds gap) {
  RunningLoop loop(IoLoopOptions{.poll_max = poll_max});
  RingLikePoller poller;
  loop->add_poller(poller, PollStage::kDispatch);
  auto watch = loop->watch(poller.kick_fd(), [&] { loop->wake(poller); });
  loop.start();
  for (int i = 0; i < count; ++i) {
    std::this_thread::sleep_for(gap);
    poller.publish();
  }
  wait_until([&] { return poller.taken.load() == static_cast<std::uint64_t>(count); });
  IoLoopStatistics statistics;
  loop->run_and_wait([&] {
    statistics = loop->statistics();
    watch.reset();
    loop->remove_poller(poller);
  });
  return statistics;
}

TEST(IoLoop, polls_instead_of_sleeping_while_work_keeps_coming) {
  const auto statistics = load_statistics(1s, 300, 200us);
  EXPECT_LT(statistics.sleeps, 100U);
  EXPECT_GT(statistics.polls_won, 100U);
}

TEST(IoLoop, gives_up_polling_where_work_comes_too_rarely_for_it) {
  const auto statistics = load_statistics(100us, 40, 10ms);
  EXPECT_GE(statistics.sleeps, 39U);
  EXPECT_LT(statistics.polls, 15U);
}

TEST(IoLoop, never_polls_where_that_is_turned_off) {
  const auto statistics = load_statistics(0us, 50, 100us);
  EXPECT_EQ(statistics.polls, 0U);
  EXPECT_GE(statistics.sleeps, 1U);
}

TEST(IoLoop, uses_no_processor_time_when_idle) {
  RunningLoop loop(IoLoopOptions{.poll_max = 100us});
  RingLikePoller poller;
  loop->add_poller(poller, PollStage::kDispatch);
  auto watch = loop->watch(poller.kick_fd(), [&] { loop->wake(poller); });
  loop.start();
  poller.publish();
  wait_until([&] { return poller.taken.load() == 1; });
  std::this_thread::sleep_for(50ms);  // the busy-poll window is long over
  const auto polls_before = poller.polls.load();
  std::this_thread::sleep_for(300ms);
  EXPECT_EQ(poller.polls.load(), polls_before);
  loop->run_and_wait([&] {
    watch.reset();
    loop->remove_poller(poller);
  });
}

TEST(IoLoop, settles_after_all_polls_of_a_cycle_and_polls_dispatch_before_engines) {
  struct Recorder final : Poller {
    Recorder(std::vector<int>& log, int poll_mark, int settle_mark)
        : log_(log), poll_mark_(poll_mark), settle_mark_(settle_mark) {}
    std::size_t poll() override {
      if (!done_) log_.push_back(poll_mark_);
      return std::exchange(done_, true) ? 0 : 1;
    }
    void settle() override {
      if (!std::exchange(settled_, true)) log_.push_back(settle_mark_);
    }
    bool prepare_to_sleep() override { return true; }
    void wake_up() override {}
    std::vector<int>& log_;
    int poll_mark_;
    int settle_mark_;
    bool done_{false};
    bool settled_{false};
  };
  std::vector<int> log;
  Recorder engine(log, 2, 4);
  Recorder queue(log, 1, 3);
  RunningLoop loop;
  loop->add_poller(engine, PollStage::kEngine);
  loop->add_poller(queue, PollStage::kDispatch);
  loop.start();
  loop->run_and_wait([&] {
    loop->remove_poller(engine);
    loop->remove_poller(queue);
  });
  loop.stop();
  EXPECT_EQ(log, (std::vector<int>{1, 2, 3, 4}));
}

// What makes the cost of a request independent of the number of queues: those without requests are
// put to rest while another has some, and are looked at in turn, a few in each cycle.
TEST(IoLoop, looks_at_few_idle_pollers_while_one_is_busy_and_at_each_of_them) {
  constexpr std::uint64_t kCycles = 20'000;
  constexpr std::size_t kIdle = 63;
  struct Busy final : Poller {
    std::size_t poll() override {
      if (left == 0) return 0;
      --left;
      return 1;
    }
    void settle() override {}
    bool prepare_to_sleep() override { return left == 0; }
    void wake_up() override {}
    std::atomic<std::uint64_t> left{kCycles};
  };
  Busy busy;
  std::vector<std::unique_ptr<RingLikePoller>> idle(kIdle);
  RunningLoop loop;
  for (auto& each : idle) {
    each = std::make_unique<RingLikePoller>();
    loop->add_poller(*each, PollStage::kDispatch);
  }
  loop->add_poller(busy, PollStage::kDispatch);
  loop.start();
  wait_until([&] { return busy.left == 0; });
  std::uint64_t polls = 0;
  loop->run_and_wait([&] {
    for (const auto& each : idle) {
      EXPECT_GT(each->polls, kCycles / kIdle) << "each is looked at now and then";
      polls += each->polls;
      loop->remove_poller(*each);
    }
    loop->remove_poller(busy);
  });
  // One for the request and one more in each cycle, and all of them until they rest.
  EXPECT_LT(polls, 4 * kCycles);
}

TEST(IoLoop, a_poller_may_remove_itself_while_it_is_polled) {
  struct OneShot final : Poller {
    explicit OneShot(IoLoop& loop) : loop_(loop) {}
    std::size_t poll() override {
      ++count;
      loop_.remove_poller(*this);
      return 1;
    }
    bool prepare_to_sleep() override { return true; }
    void wake_up() override {}
    IoLoop& loop_;
    int count{0};
  };
  IoLoop loop;
  OneShot first(loop);
  OneShot second(loop);
  loop.add_poller(first, PollStage::kDispatch);
  loop.add_poller(second, PollStage::kDispatch);
  loop.stop();
  loop.run();
  EXPECT_EQ(first.count, 1);
  EXPECT_EQ(second.count, 1);
}

TEST(IoLoop, a_watch_may_destroy_itself_from_its_callback) {
  RunningLoop loop;
  loop.start();
  const int fd = ::eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC);
  std::unique_ptr<IoLoop::Watch> watch;
  std::atomic<int> calls{0};
  loop->run_and_wait([&] {
    watch = loop->watch(fd, [&] {
      ++calls;
      watch.reset();
    });
  });
  wait_until([&] { return calls.load() == 1; });
  loop.stop();
  EXPECT_EQ(calls.load(), 1);
  EXPECT_EQ(::close(fd), 0) << "the watch must not close the caller's descriptor";
}

TEST(IoLoop, refuses_to_watch_a_descriptor_that_the_kernel_cannot_wait_on) {
  IoLoop loop;
  const int fd = ::open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  EXPECT_EQ(loop.watch(fd, [] {}), nullptr);
  EXPECT_EQ(::close(fd), 0);
}

TEST(IoLoopTimer, runs_once_at_the_time_that_was_set_last) {
  RunningLoop loop;
  loop.start();
  std::unique_ptr<IoLoop::Timer> timer;
  std::atomic<int> calls{0};
  const auto begin = std::chrono::steady_clock::now();
  loop->run_and_wait([&] {
    timer = loop->make_timer([&] { ++calls; });
    EXPECT_FALSE(timer->is_running());
    timer->start(1ms);
    timer->start(1h);
    timer->start(20ms);
    EXPECT_TRUE(timer->is_running());
  });
  while (calls == 0) std::this_thread::sleep_for(1ms);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 20ms);
  std::this_thread::sleep_for(5ms);
  loop->run_and_wait([&] {
    EXPECT_EQ(calls, 1);
    EXPECT_FALSE(timer->is_running());
    timer.reset();
  });
}

TEST(IoLoopTimer, that_is_cancelled_or_gone_does_not_run) {
  RunningLoop loop;
  loop.start();
  std::unique_ptr<IoLoop::Timer> cancelled;
  std::unique_ptr<IoLoop::Timer> gone;
  std::atomic<int> calls{0};
  loop->run_and_wait([&] {
    cancelled = loop->make_timer([&] { ++calls; });
    gone = loop->make_timer([&] { ++calls; });
    cancelled->start(2ms);
    gone->start(2ms);
    // Both are due, and their handlers may be on their way.
    std::this_thread::sleep_for(5ms);
    cancelled->cancel();
    EXPECT_FALSE(cancelled->is_running());
    gone.reset();
  });
  std::this_thread::sleep_for(10ms);
  loop->run_and_wait([&] { cancelled.reset(); });
  EXPECT_EQ(calls, 0);
}

TEST(IoLoopTimer, can_set_itself_again) {
  RunningLoop loop;
  loop.start();
  std::unique_ptr<IoLoop::Timer> timer;
  std::atomic<int> calls{0};
  loop->run_and_wait([&] {
    timer = loop->make_timer([&] {
      if (++calls < 5) timer->start(1ms);
    });
    timer->start(0ms);
  });
  while (calls < 5) std::this_thread::sleep_for(1ms);
  loop->run_and_wait([&] { timer.reset(); });
}

}  // namespace
}  // namespace vblk::blockdev
