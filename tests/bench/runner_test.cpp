// Runs on a disk in memory: what is counted, when it ends, and what an error leaves.
#include "blockdev/bench/runner.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include <gtest/gtest.h>

#include "blockdev/bench/measure.h"
#include "blockdev/bench/pattern.h"
#include "blockdev/bench/report.h"
#include "tests/bench/memory_target.h"

namespace vblk::bench {
namespace {

using std::chrono::milliseconds;

constexpr auto kRead = static_cast<std::size_t>(Operation::kRead);
constexpr auto kWrite = static_cast<std::size_t>(Operation::kWrite);
constexpr auto kFlush = static_cast<std::size_t>(Operation::kFlush);

Workload by_amount(std::uint64_t requests, unsigned read_percent = 100) {
  Workload workload;
  workload.read_percent = read_percent;
  workload.amount_bytes = requests * workload.block_bytes;
  workload.seed = 1;
  return workload;
}

Workload by_time(milliseconds time) {
  Workload workload;
  workload.run_time = time;
  workload.seed = 1;
  return workload;
}

// As `vblk bench` does it.
NamedRun run(MemoryTarget& target, const JobGroup& jobs) {
  return measure_on(target, jobs, {}).value();
}
JobResult run(MemoryTarget& target, const Workload& workload) {
  NamedRun done = run(target, JobGroup{workload});
  EXPECT_FALSE(done.result.error) << done.result.error->message;
  return std::move(done.result.jobs.front());
}

TEST(Runner, does_exactly_the_amount_that_was_asked_for_however_many_queues_share_it) {
  for (const unsigned queues : {1U, 3U}) {
    MemoryTarget target;
    Workload workload = by_amount(1000, 0);
    workload.depth = 7;
    workload.queue_count = queues;
    const JobResult job = run(target, workload);
    EXPECT_EQ(job.operations(), 1000U);
    EXPECT_EQ(target.disk.writes, 1000U);
  }
}

TEST(Runner, ends_by_time) {
  MemoryTarget target;
  const JobResult job = run(target, by_time(milliseconds(200)));
  EXPECT_GE(job.elapsed, milliseconds(200));
  EXPECT_LT(job.elapsed, milliseconds(2000));
  EXPECT_GT(job.operations(), 100U);
}

TEST(Runner, counts_nothing_of_the_ramp) {
  MemoryTarget target;
  target.disk.service_time = milliseconds(1);
  Workload workload = by_time(milliseconds(100));
  workload.ramp_time = milliseconds(400);
  const JobResult job = run(target, workload);
  EXPECT_LE(job.operations(), 101U);
  EXPECT_LT(job.elapsed, milliseconds(400));
}

TEST(Runner, counts_no_part_of_an_amount_in_the_ramp) {
  MemoryTarget target;
  target.disk.service_time = milliseconds(1);
  Workload workload = by_amount(50);
  workload.depth = 4;
  workload.ramp_time = milliseconds(200);
  EXPECT_EQ(run(target, workload).operations(), 50U);
}

TEST(Runner, measures_a_disk_that_answers_within_the_submission) {
  MemoryTarget target;
  target.disk.answers_at_once = true;
  Workload workload = by_time(milliseconds(200));
  workload.depth = 8;
  workload.ramp_time = milliseconds(50);
  const JobResult job = run(target, workload);
  EXPECT_GT(job.operations(), 100U);
  EXPECT_GT(job.intervals.size(), 0U);
}

TEST(Runner, counts_the_port_as_long_as_the_requests) {
  MemoryTarget target;
  target.disk.service_time = milliseconds(1);
  Workload workload = by_time(milliseconds(100));
  workload.ramp_time = milliseconds(400);
  const NamedRun done = run(target, JobGroup{workload});
  // One request at a time, each with its kick.
  EXPECT_GT(done.result.usage.target.kicks, 0U);
  EXPECT_LE(done.result.usage.target.kicks, done.result.operations() + 2);
}

TEST(Runner, flushes_after_every_so_many_writes_of_a_lane) {
  MemoryTarget target;
  Workload workload = by_amount(90, 0);
  workload.flush_every = 3;
  const JobResult job = run(target, workload);
  EXPECT_EQ(job.latencies[kWrite].total(), 90U);
  EXPECT_EQ(job.operations(), 90U) << "flushes between writes are no I/O of their own";
  EXPECT_EQ(target.disk.flushes, 30U);
}

TEST(Runner, times_a_write_together_with_its_flush) {
  MemoryTarget target;
  target.disk.service_time = milliseconds(2);
  Workload workload = by_amount(11, 0);
  workload.flush_every = 1;
  const JobResult job = run(target, workload);
  EXPECT_GE(job.latencies[kWrite].quantile_ns(0.5), 2e6);
  EXPECT_GE(job.latencies[kWriteAndFlush].quantile_ns(0.5), 4e6);
  EXPECT_LT(job.latencies[kFlush].quantile_ns(0.5), job.latencies[kWriteAndFlush].quantile_ns(0.5));
}

TEST(Runner, keeps_to_the_mix) {
  MemoryTarget target;
  const JobResult job = run(target, by_amount(5000, 70));
  EXPECT_NEAR(static_cast<double>(job.latencies[kRead].total()), 3500, 200);
  EXPECT_EQ(job.latencies[kRead].total() + job.latencies[kWrite].total(), 5000U);
}

// A closed loop asks once during the stall and sees one slow request; an open loop goes on asking.
TEST(Runner, charges_a_stall_to_every_request_of_an_open_loop_that_it_delays) {
  for (const bool open : {false, true}) {
    MemoryTarget target;
    const auto now = MemoryDisk::Clock::now();
    target.disk.stall_begin = now + milliseconds(100);
    target.disk.stall_end = now + milliseconds(300);
    Workload workload = by_time(milliseconds(600));
    if (open) {
      workload.arrival = Arrival::kFixed;
      workload.rate_per_second = 1000;
    } else {
      target.disk.service_time = milliseconds(1);
    }
    const JobResult job = run(target, workload);
    std::uint64_t slow = 0;
    job.latencies[kRead].for_each([&slow](double latency_ns, std::uint64_t count) {
      if (latency_ns > 50e6) slow += count;
    });
    if (open) {
      EXPECT_GT(slow, 100U);
    } else {
      EXPECT_EQ(slow, 1U);
    }
  }
}

TEST(Runner, keeps_to_the_rate) {
  for (const Arrival arrival : {Arrival::kFixed, Arrival::kPoisson}) {
    MemoryTarget target;
    Workload workload = by_time(milliseconds(1000));
    workload.arrival = arrival;
    workload.rate_per_second = 2000;
    workload.depth = 64;
    workload.queue_count = 2;
    const JobResult job = run(target, workload);
    EXPECT_NEAR(job.per_second(job.operations()), 2000, 250);
    EXPECT_FALSE(job.is_saturated());
  }
}

TEST(Runner, says_that_a_disk_cannot_follow) {
  MemoryTarget target;
  target.disk.service_time = milliseconds(1);
  Workload workload = by_time(milliseconds(300));
  workload.arrival = Arrival::kFixed;
  workload.rate_per_second = 5000;
  workload.depth = 8;
  EXPECT_TRUE(run(target, workload).is_saturated());
}

TEST(Runner, says_that_a_disk_cannot_follow_before_the_depth_is_used_up) {
  for (const bool follows : {false, true}) {
    MemoryTarget target;
    target.disk.service_time = milliseconds(follows ? 0 : 1);
    Workload workload = by_time(milliseconds(400));
    workload.arrival = Arrival::kFixed;
    workload.rate_per_second = 2000;
    workload.depth = 1024;
    EXPECT_EQ(run(target, workload).is_saturated(), !follows);
  }
}

TEST(Runner, keeps_what_it_has_when_a_request_fails) {
  MemoryTarget target;
  target.disk.fail_after = 500;
  const NamedRun done = run(target, JobGroup{by_amount(1000)});
  ASSERT_TRUE(done.result.error);
  EXPECT_EQ(done.result.error->kind, ErrorKind::kIo);
  EXPECT_EQ(done.result.jobs.front().failed, 1U);
  EXPECT_EQ(done.result.jobs.front().operations(), 500U);
}

TEST(Runner, ends_when_the_disk_has_died_and_says_what_is_in_flight) {
  MemoryTarget target;
  target.disk.stall_begin = MemoryDisk::Clock::now() + milliseconds(100);
  Workload workload = by_time(milliseconds(60'000));
  workload.depth = 5;
  workload.size_bytes = target.size_bytes();
  const auto result = run_jobs(target, {.jobs = {workload}, .stall_timeout = milliseconds(200)});
  ASSERT_TRUE(result.has_value());
  ASSERT_TRUE(result->error);
  EXPECT_EQ(result->error->kind, ErrorKind::kBusy);
  EXPECT_EQ(result->jobs.front().in_flight, 5U);
  EXPECT_GT(result->jobs.front().operations(), 0U);
}

TEST(Runner, ends_when_it_is_interrupted_and_keeps_what_it_has) {
  MemoryTarget target;
  std::atomic<bool> interrupted{false};
  std::thread user([&interrupted] {
    std::this_thread::sleep_for(milliseconds(200));
    interrupted = true;
  });
  const auto done =
      measure_on(target, {by_time(milliseconds(60'000))}, {.interrupted = &interrupted});
  user.join();
  ASSERT_TRUE(done.has_value());
  EXPECT_TRUE(done->result.interrupted);
  EXPECT_FALSE(done->result.error);
  EXPECT_GT(done->result.jobs.front().operations(), 0U);
}

TEST(Runner, does_not_wait_for_a_stalled_disk_when_it_is_interrupted) {
  MemoryTarget target;
  target.disk.stall_begin = MemoryDisk::Clock::now() + milliseconds(100);
  std::atomic<bool> interrupted{false};
  std::thread user([&interrupted] {
    std::this_thread::sleep_for(milliseconds(300));
    interrupted = true;
  });
  const auto begin = MemoryDisk::Clock::now();
  const auto done =
      measure_on(target, {by_time(milliseconds(60'000))}, {.interrupted = &interrupted});
  user.join();
  ASSERT_TRUE(done.has_value());
  EXPECT_TRUE(done->result.interrupted);
  EXPECT_GT(done->result.jobs.front().operations(), 0U);
  EXPECT_EQ(done->result.jobs.front().in_flight, 1U);
  EXPECT_LT(MemoryDisk::Clock::now() - begin, milliseconds(20'000)) << "30 s is for a disk alone";
}

TEST(Runner, ends_the_time_of_a_job_with_its_amount) {
  MemoryTarget target;
  const NamedRun done = run(target, JobGroup{by_amount(10), by_time(milliseconds(1000))});
  EXPECT_LT(done.result.jobs[0].elapsed, milliseconds(900));
  EXPECT_GE(done.result.jobs[1].elapsed, milliseconds(1000));
}

TEST(Runner, runs_jobs_at_the_same_time_and_tells_them_apart) {
  MemoryTarget target;
  const NamedRun done = run(target, JobGroup{by_amount(300), by_amount(200, 0)});
  EXPECT_EQ(done.result.jobs[0].latencies[kRead].total(), 300U);
  EXPECT_EQ(done.result.jobs[1].latencies[kWrite].total(), 200U);
  EXPECT_EQ(done.result.operations(), 500U);
}

TEST(Runner, reads_back_what_it_has_written) {
  MemoryTarget target;
  Workload workload = by_amount(300, 0);
  workload.verify = true;
  const NamedRun good = run(target, JobGroup{workload});
  EXPECT_FALSE(good.result.error);
  EXPECT_GT(good.result.verified_blocks, 100U);
  EXPECT_EQ(good.result.unverified_blocks, 0U);

  MemoryTarget bad;
  bad.disk.loses_writes = true;
  const NamedRun lost = run(bad, JobGroup{workload});
  ASSERT_TRUE(lost.result.error);
  EXPECT_EQ(lost.result.error->kind, ErrorKind::kCorrupt);
  EXPECT_EQ(lost.result.verified_blocks, 0U);
  EXPECT_GT(lost.result.unverified_blocks, 100U);
}

TEST(Runner, does_not_call_verified_what_it_was_kept_from_reading_back) {
  MemoryTarget target;
  target.disk.service_time = milliseconds(1);
  Workload workload = by_time(milliseconds(100));
  workload.read_percent = 0;
  workload.verify = true;
  std::atomic<bool> interrupted{false};
  // The reading back takes seconds, and is what is shown when an amount is known.
  const auto show = [&](const Progress& progress) {
    target.disk.service_time = milliseconds(20);
    if (progress.done_fraction > 0) interrupted = true;
  };
  const auto done = measure_on(target, {workload}, {.interrupted = &interrupted, .show = show});
  ASSERT_TRUE(done.has_value());
  ASSERT_FALSE(done->result.error);
  EXPECT_TRUE(done->result.interrupted);
  EXPECT_EQ(done->result.verified_blocks, 0U);
  EXPECT_GT(done->result.unverified_blocks, 10U);
  EXPECT_NE(text_report(*done).find("NOT all of them read back"), std::string::npos);
}

TEST(Runner, verifies_in_a_later_run_with_the_same_seed) {
  MemoryTarget target;
  Workload writing = by_amount(256, 0);
  writing.distribution = Distribution::kSequential;
  writing.verify = true;
  EXPECT_FALSE(run(target, JobGroup{writing}).result.error);
  Workload reading = by_amount(500);
  reading.verify = true;
  EXPECT_FALSE(run(target, JobGroup{reading}).result.error);
  reading.seed = 2;
  EXPECT_TRUE(run(target, JobGroup{reading}).result.error) << "another seed's content";
}

TEST(Runner, checks_reads_beside_writes_only_where_something_was_written) {
  MemoryTarget target;
  Workload workload = by_amount(3000, 50);
  workload.verify = true;
  workload.depth = 8;
  EXPECT_FALSE(run(target, JobGroup{workload}).result.error);
}

TEST(FitTo, refuses_what_the_disk_does_not_have) {
  MemoryTarget target;
  const auto refused = [&target](auto&& change) {
    Workload workload = by_amount(1, 0);
    change(workload);
    return !fit_to(target, workload).has_value();
  };
  EXPECT_FALSE(refused([](Workload&) {}));
  EXPECT_TRUE(refused([](Workload& workload) { workload.size_bytes = 2 << 20; }));
  EXPECT_TRUE(refused([](Workload& workload) { workload.offset_bytes = 2 << 20; }));
  EXPECT_TRUE(refused([](Workload& workload) { workload.offset_bytes = ~std::uint64_t{0} - 511; }));
  EXPECT_TRUE(refused([](Workload& workload) { workload.block_bytes = 131072; }));
  EXPECT_TRUE(refused([](Workload& workload) { workload.other = Operation::kDiscard; }));
  target.read_only = true;
  EXPECT_TRUE(refused([](Workload&) {}));
  EXPECT_FALSE(refused([](Workload& workload) { workload.other = Operation::kFlush; }));
}

}  // namespace
}  // namespace vblk::bench
