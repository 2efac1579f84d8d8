#include "blockdev/bench/generator.h"

#include <algorithm>
#include <cerrno>
#include <memory>
#include <thread>
#include <time.h>
#include <utility>

#include <fmt/core.h>

namespace vblk::bench {

namespace {

// How often a sleeper looks whether it is to stop.
constexpr std::chrono::milliseconds kPhaseCheck{50};
// How often it is told what was counted.
constexpr std::chrono::milliseconds kInterval{100};
// What a disk that completes nothing gets once somebody wants the run to end.
constexpr std::chrono::seconds kPatience{2};
// Requests that are made visible together, so that a backend which is awake can start on them while
// the next are prepared.
constexpr unsigned kRequestsPerKick = 8;

std::chrono::nanoseconds cpu_time_of_this_thread() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

// Queues share the seed and not their sequences.
std::uint64_t seed_of(const GeneratorSetup& setup, std::uint64_t what) {
  return setup.workload.seed * 0x9e3779b97f4a7c15 + setup.queue_index * std::uint64_t{1000} + what;
}

std::span<std::byte> data_of(const Io& io) { return io.buffer.first(io.length_bytes); }

std::uint64_t block_count(const Workload& workload) {
  return workload.size_bytes / workload.block_bytes;
}

}  // namespace

void LiveFigures::take(Latencies& sum) {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < sum.size(); ++i) {
    sum[i].merge(latencies_[i]);
    latencies_[i].clear();
  }
}

Expected<std::unique_ptr<Generator>> Generator::create(Port& port, const GeneratorSetup& setup) {
  std::unique_ptr<Generator> generator(new Generator(port, setup));
  for (Lane& lane : generator->lanes_) {
    auto io = port.make_io(setup.workload.block_bytes);
    if (!io) return std::unexpected(std::move(io.error()));
    lane.io = *io;
    lane.generator = generator.get();
    lane.io->context = &lane;
    lane.io->complete = [](Io& done) {
      Lane& completed_lane = *static_cast<Lane*>(done.context);
      completed_lane.generator->completed(completed_lane);
    };
    generator->free_lanes_.push_back(&lane);
  }
  return generator;
}

// Sequences of several queues start at different places.
Generator::Generator(Port& port, const GeneratorSetup& setup)
    : port_(port),
      setup_(setup),
      offsets_(workload_.distribution, workload_.zipf_theta, block_count(workload_),
               block_count(workload_) / workload_.queue_count * setup.queue_index,
               seed_of(setup, 0)),
      mix_(seed_of(setup, 1)),
      lanes_(workload_.depth) {
  free_lanes_.reserve(lanes_.size());
}

GeneratorResult Generator::run() {
  stay_idle();
  const auto begin = Clock::now();
  begin_ = begin;
  interval_end_ = begin + kInterval;
  last_progress_ = begin;
  if (workload_.arrival != Arrival::kClosed) {
    arrivals_.emplace(workload_.arrival == Arrival::kPoisson,
                      workload_.rate_per_second / workload_.queue_count, begin, seed_of(setup_, 2));
  }
  note_phase(begin);
  while (is_running() || in_flight_ > 0) {
    if (is_running()) start_free_lanes();
    kick();
    if (!wait_for_progress()) break;
    note_phase(Clock::now());
  }
  leave_measured_phase();
  publish(Clock::now());
  result_.in_flight = in_flight_;
  result_.backlog_grew = backlog_.grows();
  return std::move(result_);
}

void Generator::stay_idle() const {
  const auto end = Clock::now() + workload_.idle_time;
  while (is_running() && Clock::now() < end) {
    std::this_thread::sleep_for(
        std::min<std::chrono::nanoseconds>(kPhaseCheck, end - Clock::now()));
  }
}

bool Generator::is_running() const {
  return !finished_ && setup_.phase->load(std::memory_order_relaxed) != Phase::kStopped;
}

// Polls, and sleeps where that brings nothing. False: the disk has died.
bool Generator::wait_for_progress() {
  auto completions = port_.poll();
  if (completions && *completions > 0) {
    last_progress_ = Clock::now();
    return true;
  }
  if (completions) {
    if (in_flight_ == 0) last_progress_ = Clock::now();
    const bool is_unwanted = setup_.interrupted != nullptr && *setup_.interrupted;
    const auto limit = is_unwanted
                           ? std::min<std::chrono::nanoseconds>(kPatience, setup_.stall_timeout)
                           : setup_.stall_timeout;
    if (Clock::now() - last_progress_ > limit) {
      fail(ErrorKind::kBusy,
           fmt::format("queue {}: the disk completes nothing for {:g} s, {} requests "
                       "in flight",
                       setup_.queue_index, std::chrono::duration<double>(limit).count(),
                       in_flight_));
      return false;
    }
    const auto time = time_to_sleep();
    if (time.count() <= 0) return true;
    auto slept = port_.sleep(time);
    if (slept) return true;
    completions = std::unexpected(std::move(slept.error()));
  }
  if (!result_.error) result_.error = std::move(completions.error());
  stop();
  return false;
}

std::chrono::nanoseconds Generator::time_to_sleep() const {
  std::chrono::nanoseconds time = kPhaseCheck;
  if (arrivals_ && is_running() && !free_lanes_.empty())
    time = std::min<std::chrono::nanoseconds>(time, arrivals_->next() - Clock::now());
  return time;
}

// Also from a completion: where the disk answers within a submission, one poll may last as long as
// the run.
void Generator::note_phase(Clock::time_point now) {
  const Phase phase = setup_.phase->load(std::memory_order_relaxed);
  if (!measured_ && phase == Phase::kMeasured) enter_measured_phase(now);
  // An amount is done when its last request is.
  if (phase == Phase::kStopped && setup_.operations_left == nullptr) leave_measured_phase();
}

void Generator::enter_measured_phase(Clock::time_point now) {
  measured_ = true;
  measured_from_ = now;
  measured_from_statistics_ = port_.statistics();
  for (LatencyHistogram& latencies : interval_) latencies.clear();
  interval_end_ = now + kInterval;
  measured_from_cpu_time_ = cpu_time_of_this_thread();
}

void Generator::leave_measured_phase() {
  if (!measured_ || std::exchange(is_over_, true)) return;
  result_.cpu_time = cpu_time_of_this_thread() - measured_from_cpu_time_;
  result_.port = port_.statistics().since(measured_from_statistics_);
}

void Generator::start_free_lanes() {
  if (!arrivals_) {
    const auto now = Clock::now();
    while (!free_lanes_.empty() && is_running() && take_operation()) {
      Lane& lane = *free_lanes_.back();
      free_lanes_.pop_back();
      start(lane, now);
    }
    return;
  }
  auto now = Clock::now();
  const bool had_free_lanes = !free_lanes_.empty();
  while (arrivals_->next() <= now && !free_lanes_.empty() && take_operation()) {
    Lane& lane = *free_lanes_.back();
    free_lanes_.pop_back();
    const auto intended = arrivals_->next();
    arrivals_->advance();
    if (measured_ && had_free_lanes)
      result_.lateness.add(static_cast<std::uint64_t>((now - intended).count()));
    start(lane, intended);
    now = Clock::now();
  }
  result_.lag = std::max(std::chrono::nanoseconds{0}, now - arrivals_->next());
  note_backlog(now);
}

void Generator::note_backlog(Clock::time_point now) {
  const double overdue = std::chrono::duration<double>(result_.lag).count() *
                         workload_.rate_per_second / workload_.queue_count;
  backlog_.sample(now - begin_, in_flight_ + static_cast<std::uint64_t>(overdue));
}

bool Generator::take_operation() {
  if (setup_.operations_left == nullptr || !measured_) return true;
  if (setup_.operations_left->fetch_sub(1, std::memory_order_relaxed) > 0) return true;
  finished_ = true;
  return false;
}

void Generator::start(Lane& lane, Clock::time_point intended) {
  Io& io = *lane.io;
  lane.begin = intended;
  const bool reads = workload_.read_percent == 100 ||
                     (workload_.read_percent > 0 && percent_(mix_) < workload_.read_percent);
  io.operation = reads ? Operation::kRead : workload_.other;
  io.offset_bytes = workload_.offset_bytes + offsets_.next() * workload_.block_bytes;
  io.length_bytes = workload_.block_bytes;
  if (setup_.content != nullptr && io.operation == Operation::kRead)
    lane.is_checked = setup_.content->before_read(io.offset_bytes, data_of(io));
  if (setup_.content != nullptr && io.operation == Operation::kWrite)
    setup_.content->before_write(io.offset_bytes, data_of(io));
  submit(lane);
}

void Generator::submit(Lane& lane) {
  if (!port_.submit(*lane.io))
    return fail(ErrorKind::kExhausted,
                "the backend's queue has no room for so many requests (it takes three descriptors "
                "for each); use a smaller --iodepth");
  ++in_flight_;
  if (++submitted_since_kick_ == kRequestsPerKick) kick();
}

void Generator::kick() {
  submitted_since_kick_ = 0;
  port_.kick();
}

void Generator::completed(Lane& lane) {
  --in_flight_;
  Io& io = *lane.io;
  const auto now = Clock::now();
  note_phase(now);
  if (io.error != 0) {
    ++result_.failed;
    fail(ErrorKind::kIo,
         fmt::format("a {} of {} bytes at offset {} failed: {}", to_string(io.operation),
                     io.length_bytes, io.offset_bytes, describe_errno(io.error)));
  } else if (io.operation == Operation::kRead && lane.is_checked &&
             !setup_.content->is_right(io.offset_bytes, data_of(io))) {
    ++result_.failed;
    fail(ErrorKind::kCorrupt,
         fmt::format("verify: the {} bytes at offset {} are not what was written there",
                     io.length_bytes, io.offset_bytes));
  } else {
    count(static_cast<std::size_t>(io.operation), lane.begin, now);
    const bool ends_commit = io.operation == Operation::kFlush && workload_.flush_every != 0;
    if (ends_commit) count(kWriteAndFlush, lane.write_begin, now);
    if (setup_.content != nullptr && io.operation == Operation::kWrite)
      setup_.content->written(io.offset_bytes, io.length_bytes);
  }
  if (!is_running()) return;
  if (io.operation == Operation::kWrite && workload_.flush_every != 0 &&
      ++lane.writes_since_flush == workload_.flush_every) {
    lane.writes_since_flush = 0;
    lane.write_begin = std::exchange(lane.begin, now);
    io.operation = Operation::kFlush;
    return submit(lane);
  }
  if (!arrivals_ && take_operation()) return start(lane, now);
  free_lanes_.push_back(&lane);
}

void Generator::count(std::size_t timed, Clock::time_point begin, Clock::time_point end) {
  if (setup_.operations_left != nullptr ? begin < measured_from_ : !is_running()) return;
  interval_[timed].add(static_cast<std::uint64_t>(std::chrono::nanoseconds(end - begin).count()));
  if (end >= interval_end_) publish(end);
}

// Ends an interval. What was counted before the measured phase is thrown away.
void Generator::publish(Clock::time_point now) {
  for (std::size_t i = 0; i < interval_.size(); ++i) {
    if (interval_[i].total() == 0) continue;
    if (measured_) {
      const std::lock_guard lock(setup_.live->mutex_);
      setup_.live->latencies_[i].merge(interval_[i]);
    }
    interval_[i].clear();
  }
  interval_end_ = now + kInterval;
}

void Generator::fail(ErrorKind kind, std::string message) {
  if (!result_.error) result_.error = Error{.kind = kind, .message = std::move(message)};
  stop();
}

// All queues.
void Generator::stop() {
  finished_ = true;
  setup_.phase->store(Phase::kStopped);
}

}  // namespace vblk::bench
