#include "blockdev/bench/runner.h"

#include <algorithm>
#include <cassert>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <sys/prctl.h>
#include <system_error>
#include <thread>
#include <utility>

#include <fmt/core.h>

#include "blockdev/bench/machine_usage.h"
#include "blockdev/bench/tracepoint_counter.h"

namespace vblk::bench {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kTick{50};
constexpr std::chrono::seconds kInterval{1};
// An open loop is behind if in the end it is late by more than this part of its time.
constexpr int kLagDivisor = 100;

// What is counted around the measured part.
class Counters {
 public:
  Counters(const Target& target, const RunSetup& setup)
      : process_(target.process()),
        punts_(process_, "io_uring/io_uring_queue_async_work"),
        before_(usage_of(process_)),
        target_(target),
        target_before_(target.statistics()),
        machine_before_(machine_usage()) {
    if (setup.count_system_calls) system_calls_.emplace(process_, kSystemCalls);
    if (!setup.flush_device.empty()) {
      if (auto counter = FlushCounter::open(setup.flush_device)) flushes_ = *counter;
    }
    if (flushes_) flushes_before_ = flushes_->count();
  }

  [[nodiscard]] RunUsage difference() const {
    const ProcessUsage after = usage_of(process_);
    const MachineUsage machine = machine_usage();
    RunUsage usage;
    usage.has_process = before_.exists && after.exists;
    usage.process_has_gone = before_.exists && !after.exists;
    if (usage.has_process) {
      usage.cpu_time = after.cpu_time - before_.cpu_time;
      const auto system_ticks = static_cast<double>(after.system_ticks - before_.system_ticks);
      const auto user_ticks = static_cast<double>(after.user_ticks - before_.user_ticks);
      if (system_ticks > 0) usage.system_share = system_ticks / (system_ticks + user_ticks);
      usage.context_switches = context_switches_between(before_, after);
    }
    if (system_calls_) usage.system_calls = system_calls_->count();
    usage.punts = punts_.count();
    usage.machine_busy = machine.busy - machine_before_.busy;
    usage.machine_steal = machine.steal - machine_before_.steal;
    usage.machine_time =
        usage.machine_busy + usage.machine_steal + (machine.idle - machine_before_.idle);
    if (const auto flushes = flushes_ ? flushes_->count() : std::nullopt;
        flushes && flushes_before_)
      usage.device_flushes = *flushes - *flushes_before_;
    usage.target = target_.statistics().since(target_before_);
    return usage;
  }

 private:
  const pid_t process_;
  const TracepointCounter punts_;
  std::optional<TracepointCounter> system_calls_;
  std::optional<FlushCounter> flushes_;
  std::optional<std::uint64_t> flushes_before_;
  const ProcessUsage before_;
  const Target& target_;
  const TargetStatistics target_before_;
  const MachineUsage machine_before_;
};

struct Job {
  Workload workload;
  std::atomic<Phase> phase{Phase::kRamp};
  std::atomic<std::int64_t> operations_left{0};
  std::int64_t operations_planned{0};              // 0: not limited
  std::vector<std::unique_ptr<LiveFigures>> live;  // by queue
  JobResult result;
  Clock::time_point measured_from;
  unsigned queues_finished{0};
  std::optional<Clock::time_point> stopped;
};

Interval interval_of(const LatencyHistogram& latencies, double seconds) {
  return {.seconds = seconds,
          .operations = latencies.total(),
          .p50_ns = latencies.quantile_ns(0.5),
          .p99_ns = latencies.quantile_ns(0.99),
          .max_ns = static_cast<double>(latencies.max_ns())};
}

// What counts as I/O in a report. The flushes of a workload of flushes do, those after writes not.
bool is_io(const Workload& workload, std::size_t timed) {
  if (timed == kWriteAndFlush) return false;
  return static_cast<Operation>(timed) != Operation::kFlush ||
         (workload.read_percent == 0 && workload.other == Operation::kFlush);
}

class Conductor {
 public:
  Conductor(Target& target, const RunSetup& setup) : target_(target), setup_(setup) {
    for (const Workload& workload : setup.jobs) {
      auto job = std::make_unique<Job>();
      job->workload = workload;
      job->result.workload = workload;
      if (workload.amount_bytes != 0) {
        job->operations_planned = static_cast<std::int64_t>(
            std::max<std::uint64_t>(1, workload.amount_bytes / workload.block_bytes));
        job->operations_left = job->operations_planned;
      }
      for (unsigned i = 0; i < workload.queue_count; ++i)
        job->live.push_back(std::make_unique<LiveFigures>());
      jobs_.push_back(std::move(job));
      ramp_time_ = std::max(ramp_time_, workload.ramp_time);
    }
  }

  Expected<RunResult> run() {
    start_threads();
    if (wait_until_ready()) conduct();
    // From here on no thread touches another's port; they may go.
    {
      const std::lock_guard lock(mutex_);
      may_leave_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    if (set_up_error_) return std::unexpected(std::move(*set_up_error_));
    result_.usage.target += ports_;
    for (auto& job : jobs_) result_.jobs.push_back(std::move(job->result));
    return std::move(result_);
  }

 private:
  void start_threads() {
    unsigned queue = 0;
    for (std::size_t i = 0; i < jobs_.size(); ++i) {
      for (unsigned j = 0; j < jobs_[i]->workload.queue_count; ++j, ++queue) {
        try {
          threads_.emplace_back([this, i, j, queue] { run_queue(i, j, queue); });
        } catch (const std::system_error& error) {
          const std::lock_guard lock(mutex_);
          set_up_error_ = Error{.kind = ErrorKind::kExhausted,
                                .message = fmt::format("cannot start a thread: {}", error.what())};
          return;
        }
      }
    }
  }

  // A thread's whole life.
  void run_queue(std::size_t index, unsigned queue_of_job, unsigned queue) {
    Job& job = *jobs_[index];
    // Timers fire when they are due, not up to 50 us later.
    ::prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    auto port = target_.open_port(queue);
    Expected<std::unique_ptr<Generator>> generator;
    if (port) {
      generator = Generator::create(
          **port, {.workload = job.workload,
                   .queue_index = queue_of_job,
                   .content = setup_.content ? setup_.content(index) : nullptr,
                   .phase = &job.phase,
                   .operations_left = job.operations_planned != 0 ? &job.operations_left : nullptr,
                   .live = job.live[queue_of_job].get(),
                   .stall_timeout = setup_.stall_timeout,
                   .interrupted = setup_.interrupted});
    } else {
      generator = std::unexpected(std::move(port.error()));
    }
    if (meet(generator ? std::nullopt : std::optional(std::move(generator.error())))) {
      GeneratorResult result = (*generator)->run();
      const std::lock_guard lock(mutex_);
      job.result.failed += result.failed;
      job.result.in_flight += result.in_flight;
      job.result.lag = std::max(job.result.lag, result.lag);
      job.result.backlog_grew = job.result.backlog_grew || result.backlog_grew;
      job.result.lateness.merge(result.lateness);
      job.result.generator_cpu_time += result.cpu_time;
      ports_ += result.port;
      if (++job.queues_finished == job.workload.queue_count && !job.stopped)
        job.stopped = Clock::now();
      if (result.error && !result_.error) result_.error = std::move(result.error);
      // The kernel may still write to its buffers, and closing it would wait for that.
      if (result.in_flight > 0 && target_.is_in_process()) static_cast<void>(port->release());
    }
    std::unique_lock lock(mutex_);
    ++finished_count_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return may_leave_; });
  }

  // Whether the run begins: all threads are ready, and none has failed.
  bool meet(std::optional<Error> error) {
    std::unique_lock lock(mutex_);
    if (error && !set_up_error_) set_up_error_ = std::move(error);
    ++ready_count_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return begun_ || may_leave_; });
    return begun_;
  }

  bool wait_until_ready() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return ready_count_ == threads_.size(); });
    if (set_up_error_) return false;
    begin_ = last_interval_ = Clock::now();
    if (ramp_time_.count() == 0) begin_measuring(begin_);
    begun_ = true;
    changed_.notify_all();
    return true;
  }

  // All jobs at once, so that what is counted is divided by what was done meanwhile.
  void begin_measuring(Clock::time_point now) {
    counters_.emplace(target_, setup_);
    for (auto& job : jobs_) {
      job->measured_from = now;
      // Unless it has failed.
      auto ramp = Phase::kRamp;
      job->phase.compare_exchange_strong(ramp, Phase::kMeasured);
    }
  }
  // To the end of the last job.
  void end_measuring() {
    if (!counters_ || usage_taken_) return;
    result_.usage = counters_->difference();
    usage_taken_ = true;
  }

  void conduct() {
    auto next_interval = begin_ + kInterval;
    std::unique_lock lock(mutex_);
    while (finished_count_ < threads_.size()) {
      changed_.wait_for(lock, kTick);
      const auto now = Clock::now();
      if (setup_.interrupted != nullptr && *setup_.interrupted) {
        result_.interrupted = true;
        stop_all(now);
      }
      if (result_.error) stop_all(now);
      if (!counters_ && now >= begin_ + ramp_time_) begin_measuring(now);
      for (auto& job : jobs_) direct(*job, now);
      if (std::ranges::all_of(jobs_, [](const auto& job) { return job->stopped.has_value(); }))
        end_measuring();
      if (now >= next_interval) {
        next_interval = now + kInterval;
        lock.unlock();
        end_interval(now);
        lock.lock();
      }
    }
    const auto now = Clock::now();
    end_measuring();
    for (auto& job : jobs_) {
      if (!job->stopped) job->stopped = now;
      job->result.elapsed = job->measured_from == Clock::time_point{}
                                ? std::chrono::nanoseconds{}
                                : *job->stopped - job->measured_from;
    }
    end_interval(now);
  }

  // Ends a job when it is time.
  void direct(Job& job, Clock::time_point now) {
    if (job.phase == Phase::kMeasured && job.workload.run_time.count() != 0 &&
        now >= job.measured_from + job.workload.run_time)
      stop(job, now);
  }
  static void stop(Job& job, Clock::time_point now) {
    if (!job.stopped) job.stopped = now;
    job.phase = Phase::kStopped;
  }
  void stop_all(Clock::time_point now) {
    for (auto& job : jobs_) stop(*job, now);
  }

  void end_interval(Clock::time_point now) {
    Progress progress{.elapsed = now - begin_};
    LatencyHistogram shown;
    for (auto& job : jobs_) {
      Latencies latencies;
      for (const auto& live : job->live) live->take(latencies);
      LatencyHistogram all;
      for (std::size_t timed = 0; timed < kTimedCount; ++timed) {
        job->result.latencies[timed].merge(latencies[timed]);
        if (is_io(job->workload, timed)) all.merge(latencies[timed]);
      }
      const double seconds = std::chrono::duration<double>(now - job->measured_from).count();
      if (all.total() > 0) job->result.intervals.push_back(interval_of(all, seconds));
      const auto& flushes = latencies[static_cast<std::size_t>(Operation::kFlush)];
      if (flushes.total() > 0) job->result.flush_intervals.push_back(interval_of(flushes, seconds));
      shown.merge(all);
      progress.ramping = progress.ramping || job->phase == Phase::kRamp;
      progress.planned = std::max(progress.planned, job->workload.run_time.count() == 0
                                                        ? std::chrono::nanoseconds{}
                                                        : ramp_time_ + job->workload.run_time);
      if (job->operations_planned != 0) {
        const auto left = std::max<std::int64_t>(0, job->operations_left);
        progress.done_fraction =
            std::max(progress.done_fraction,
                     1 - static_cast<double>(left) / static_cast<double>(job->operations_planned));
      }
    }
    progress.operations_per_second =
        static_cast<double>(shown.total()) /
        std::chrono::duration<double>(now - std::exchange(last_interval_, now)).count();
    progress.p99_ns = shown.quantile_ns(0.99);
    if (setup_.show) setup_.show(progress);
  }

  Target& target_;
  const RunSetup& setup_;
  std::vector<std::unique_ptr<Job>> jobs_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t ready_count_{0};
  std::size_t finished_count_{0};
  bool begun_{false};
  bool may_leave_{false};
  std::optional<Error> set_up_error_;
  std::chrono::nanoseconds ramp_time_{0};
  Clock::time_point begin_;
  Clock::time_point last_interval_;
  std::optional<Counters> counters_;
  TargetStatistics ports_;
  bool usage_taken_{false};
  RunResult result_;
};

}  // namespace

std::uint64_t JobResult::operations() const {
  std::uint64_t sum = 0;
  for (std::size_t timed = 0; timed < kTimedCount; ++timed) {
    if (is_io(workload, timed)) sum += latencies[timed].total();
  }
  return sum;
}

double JobResult::per_second(std::uint64_t count) const {
  return elapsed.count() == 0
             ? 0
             : static_cast<double>(count) / std::chrono::duration<double>(elapsed).count();
}

bool JobResult::is_saturated() const {
  return workload.arrival != Arrival::kClosed && (backlog_grew || lag > elapsed / kLagDivisor);
}

std::uint64_t RunResult::operations() const {
  std::uint64_t sum = 0;
  for (const JobResult& job : jobs) sum += job.operations();
  return sum;
}

unsigned queue_count(std::span<const Workload> jobs) {
  unsigned sum = 0;
  for (const Workload& job : jobs) sum += job.queue_count;
  return sum;
}

Expected<Workload> fit_to(const Target& target, const Workload& workload) {
  const auto refuse = [&](ErrorKind kind, std::string_view why) {
    return make_error(kind, fmt::format("{}: {}", workload.name, why));
  };
  Workload fitted = workload;
  const std::uint64_t disk_bytes = target.size_bytes();
  if (workload.offset_bytes > disk_bytes ||
      workload.size_bytes > disk_bytes - workload.offset_bytes)
    return refuse(
        ErrorKind::kInvalidArgument,
        fmt::format("the disk has {} bytes; choose --offset and --size to fit it", disk_bytes));
  if (fitted.size_bytes == 0) fitted.size_bytes = disk_bytes - workload.offset_bytes;
  fitted.size_bytes = fitted.size_bytes / workload.block_bytes * workload.block_bytes;
  if (fitted.size_bytes == 0)
    return refuse(ErrorKind::kInvalidArgument,
                  fmt::format("the disk has {} bytes, less than one block of {}", disk_bytes,
                              workload.block_bytes));
  if (workload.block_bytes > target.transfer_bytes_max())
    return refuse(ErrorKind::kNotSupported,
                  fmt::format("the backend takes at most {} bytes in one request",
                              target.transfer_bytes_max()));
  if (workload.changes_disk() && target.is_read_only())
    return refuse(ErrorKind::kNotSupported, "the disk is read-only");
  if (workload.read_percent < 100 && !target.can(workload.other))
    return refuse(ErrorKind::kNotSupported,
                  fmt::format("the disk takes no {}", to_string(workload.other)));
  if (workload.flush_every != 0 && !target.can(Operation::kFlush))
    return refuse(ErrorKind::kNotSupported, "the disk takes no flush");
  return fitted;
}

Expected<RunResult> run_jobs(Target& target, const RunSetup& setup) {
  return Conductor(target, setup).run();
}

}  // namespace vblk::bench
