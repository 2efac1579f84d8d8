// The kind "wake": k works handed at once to a pool whose workers sleep. What is timed is from the
// hand-over until the last of them has started, and what the hand-over itself takes.
//
// The works do nothing: only the waking is there. Between two batches the submitter sleeps long
// enough for the workers to fall asleep again.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <thread>
#include <unistd.h>
#include <vector>

#include "blockdev/bench/process_usage.h"
#include "blockdev/wash/run.h"
#include "threadpool/pool.h"

namespace vblk::wash {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kWorkersMin = 16;
constexpr std::chrono::microseconds kFallAsleep{150};

struct TimedWork : threadpool::Work {
  Clock::time_point started;
  std::atomic<std::uint32_t>* left{nullptr};
  TimedWork() {
    run = [](threadpool::Work& work) noexcept {
      auto& self = static_cast<TimedWork&>(work);
      self.started = Clock::now();
      if (self.left->fetch_sub(1, std::memory_order_acq_rel) == 1) self.left->notify_one();
    };
  }
};

}  // namespace

Expected<RunRecord> measure_wakes(const RunSpec& spec, const Arm& arm) {
  const auto count = static_cast<std::uint32_t>(std::stoul("0" + level_of(spec, "works")));
  if (count == 0) return make_error(ErrorKind::kInvalidArgument, "how many works to wake?");
  const auto pool = threadpool::make_pool(
      arm.options.pool, {.max_threads = std::max<std::size_t>(kWorkersMin, count)});
  std::atomic<std::uint32_t> left{0};
  std::vector<TimedWork> works(count);
  bench::LatencyHistogram until_last;
  std::chrono::nanoseconds submitting{0};
  const auto measured_from = Clock::now() + spec.ramp_time;
  const auto end = measured_from + spec.run_time;
  const StealMeter steal;
  bench::ProcessUsage before = bench::usage_of(::getpid());
  auto begun = Clock::now();
  bool measured = false;
  while (Clock::now() < end) {
    std::this_thread::sleep_for(kFallAsleep);
    if (!measured && Clock::now() >= measured_from) {
      measured = true;
      before = bench::usage_of(::getpid());
      begun = Clock::now();
    }
    threadpool::WorkList batch;
    left = count;
    for (TimedWork& work : works) {
      work.left = &left;
      batch.push_back(work);
    }
    const auto handed_over = Clock::now();
    pool->submit(batch);
    const auto submitted = Clock::now();
    for (std::uint32_t now = left; now != 0; now = left) left.wait(now);
    if (!measured) continue;
    const auto last = std::ranges::max_element(works, {}, &TimedWork::started)->started;
    until_last.add(
        static_cast<std::uint64_t>(std::chrono::nanoseconds(last - handed_over).count()));
    submitting += submitted - handed_over;
  }
  const bench::ProcessUsage after = bench::usage_of(::getpid());
  RunRecord record;
  record.seconds = std::chrono::duration<double>(Clock::now() - begun).count();
  record.steal_share = steal.share();
  add_latencies(record, until_last);
  if (record.samples == 0) return record;
  const auto batches = static_cast<double>(record.samples);
  const auto us = [](std::chrono::nanoseconds time) {
    return std::chrono::duration<double, std::micro>(time).count();
  };
  record.metrics["wake_cost"] = us(submitting) / batches;
  record.metrics["cpu"] = us(after.cpu_time - before.cpu_time) / batches;
  const auto switches = bench::context_switches_between(before, after);
  record.counters["sleeps_per_io"] = static_cast<double>(switches.voluntary) / batches;
  return record;
}

}  // namespace vblk::wash
