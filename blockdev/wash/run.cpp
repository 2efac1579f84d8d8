#include "blockdev/wash/run.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <iterator>
#include <memory>
#include <thread>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>

#include "blockdev/bench/image_target.h"
#include "blockdev/bench/measure.h"
#include "blockdev/bench/process_usage.h"
#include "blockdev/wash/child.h"
#include "blockdev/wash/observed_target.h"
#include "blockdev/wash/settle.h"

namespace vblk::wash {

namespace {

constexpr std::size_t kFlush = static_cast<std::size_t>(bench::Operation::kFlush);
constexpr std::size_t kWrite = static_cast<std::size_t>(bench::Operation::kWrite);
constexpr std::uint64_t kBurst = 64;
constexpr std::size_t kStreamBytes = 131072;
constexpr unsigned kStreamDepth = 8;
// A median flush needs a number of them, however long they take.
constexpr double kStreamFlushesPerSecond = 40;
constexpr unsigned kStreamFlushesMax = 16;
constexpr int kStreamTimeFactor = 4;
constexpr std::uint64_t kWriteBehindBytes = std::uint64_t{8} << 20;
constexpr std::uint64_t kWarmUpBytes = std::uint64_t{1} << 20;
constexpr double kHotShareMin = 0.99;
// Processor time of the whole machine comes in ticks of 10 ms: in a shorter run they are too much.
constexpr double kSecondsForMachineMin = 0.85;

bench::ImageTargetOptions target_options(const RunSpec& spec, const Family& family,
                                         const Arm& arm) {
  bench::ImageTargetOptions options;
  options.image.path = spec.image_path;
  options.image.format = spec.format;
  options.image.cache = arm.cache.value_or(family.cache);
  options.image.share_flushes = family.share_flushes;
  options.aio.engine_of_kind.fill(arm.engine);
  options.engine = arm.options;
  if (arm.behind != Arm::Behind::kNone) {
    options.image.write_behind_bytes = kWriteBehindBytes;
    auto& behind = options.aio.engine_of_kind[static_cast<std::size_t>(aio::IoKind::kWriteBehind)];
    if (arm.behind == Arm::Behind::kInline) behind = aio::EngineName::kInline;
    if (arm.behind == Arm::Behind::kThreads) behind = aio::EngineName::kThreads;
    if (arm.behind == Arm::Behind::kIoUring) behind = aio::EngineName::kIoUring;
  }
  return options;
}

Expected<bench::Workload> workload_of(const RunSpec& spec, const Family& family) {
  bench::Workload workload;
  workload.name = spec.family;
  workload.size_bytes = spec.region_bytes;
  workload.run_time = spec.run_time;
  workload.ramp_time = spec.ramp_time;
  workload.seed = spec.seed;
  for (const Levels* levels : {&family.workload, &spec.levels}) {
    for (const auto& [key, value] : *levels) {
      if (auto done = bench::set_key(workload, key, value); !done)
        return std::unexpected(std::move(done.error()));
    }
  }
  if (auto done = bench::check(workload); !done) return std::unexpected(std::move(done.error()));
  return workload;
}

double per(double amount, std::uint64_t count) {
  return count == 0 ? 0 : amount / static_cast<double>(count);
}

double microseconds(std::chrono::nanoseconds time) {
  return std::chrono::duration<double, std::micro>(time).count();
}

// Busy is what is neither idle nor stolen: the kernel measures those two exactly, and samples the
// rest.
double machine_busy_us(const bench::RunUsage& usage, double seconds) {
  const auto idle = usage.machine_time - usage.machine_busy - usage.machine_steal;
  const double whole = seconds * 1e6 * static_cast<double>(::sysconf(_SC_NPROCESSORS_ONLN));
  return std::max(0.0, whole - microseconds(idle) - microseconds(usage.machine_steal));
}

// What all kinds that are driven by vblk bench have in common.
void add_usage(RunRecord& record, const bench::RunResult& result, std::uint64_t operations) {
  const bench::RunUsage& usage = result.usage;
  record.seconds = std::chrono::duration<double>(result.jobs.front().elapsed).count();
  if (operations == 0) return;
  if (usage.has_process) record.metrics["cpu"] = per(microseconds(usage.cpu_time), operations);
  if (record.seconds >= kSecondsForMachineMin)
    record.metrics["machine_cpu"] = per(machine_busy_us(usage, record.seconds), operations);
  if (usage.machine_time.count() > 0) {
    record.steal_share = static_cast<double>(usage.machine_steal.count()) /
                         static_cast<double>(usage.machine_time.count());
  }
  auto& counters = record.counters;
  counters["sleeps_per_io"] =
      per(static_cast<double>(usage.context_switches.voluntary), operations);
  counters["preemptions_per_io"] =
      per(static_cast<double>(usage.context_switches.involuntary), operations);
  if (usage.punts) counters["punts_per_io"] = per(static_cast<double>(*usage.punts), operations);
  const bench::TargetStatistics& target = usage.target;
  counters["requests_per_submission"] =
      per(static_cast<double>(target.submitted), target.submit_calls);
  if (target.submit_calls > 0 && target.submitted > 0)
    record.metrics["per_call"] = per(static_cast<double>(target.submitted), target.submit_calls);
  if (usage.system_calls)
    counters["system_calls_per_io"] = per(static_cast<double>(*usage.system_calls), operations);
  if (target.wake_ups > 0 && target.submitted > 0)
    record.metrics["per_wakeup"] = per(static_cast<double>(target.submitted), target.wake_ups);
  if (usage.device_flushes)
    counters["device_flushes_per_io"] = per(static_cast<double>(*usage.device_flushes), operations);
  counters["generator_cpu"] = per(microseconds(result.jobs.front().generator_cpu_time), operations);
}

void add_observation(RunRecord& record, const Observation& observation) {
  if (observation.submissions == 0) return;
  record.metrics["submit_max"] = microseconds(observation.longest_submission);
  record.counters["submit_mean"] =
      per(microseconds(observation.submitting), observation.submissions);
}

Expected<bench::RunResult> drive(bench::Target& target, const bench::JobGroup& group,
                                 const RunSpec& spec) {
  auto run = bench::measure_on(
      target, group,
      {.count_system_calls = spec.count_system_calls, .flush_device = spec.image_path});
  if (!run) return std::unexpected(std::move(run.error()));
  if (run->result.error) return std::unexpected(std::move(*run->result.error));
  return std::move(run->result);
}

// The latencies of what the workload is about: all requests, or a write with its flush.
bench::LatencyHistogram latencies_of(const bench::JobResult& job) {
  if (job.workload.flush_every != 0) return job.latencies[bench::kWriteAndFlush];
  bench::LatencyHistogram all;
  for (std::size_t timed = 0; timed < bench::kOperationCount; ++timed)
    all.merge(job.latencies[timed]);
  return all;
}

RunRecord record_of(const bench::RunResult& result) {
  const bench::JobResult& job = result.jobs.front();
  RunRecord record;
  add_usage(record, result, job.operations());
  record.metrics["rate"] = job.per_second(job.operations());
  record.saturated = job.is_saturated();
  add_latencies(record, latencies_of(job));
  // What was measured then is not what was asked for.
  if (record.saturated) record.metrics = {{"rate", record.metrics["rate"]}};
  return record;
}

// Reads the part of the image that the load uses into the page cache, whatever the format.
Expected<void> warm_up(const RunSpec& spec, const Family& family) {
  bench::Workload reading;
  reading.name = "warm up";
  reading.read_percent = 100;
  reading.distribution = bench::Distribution::kSequential;
  reading.block_bytes = kWarmUpBytes;
  reading.size_bytes = spec.region_bytes;
  reading.amount_bytes = spec.region_bytes;
  bench::ImageTargetOptions options = target_options(spec, family, {});
  options.aio.engine_of_kind.fill(aio::EngineName::kInline);
  auto target = bench::open_image_target(options);
  if (!target) return std::unexpected(std::move(target.error()));
  if (auto result = drive(**target, {reading}, spec); !result)
    return std::unexpected(std::move(result.error()));
  const auto cached = cached_bytes(spec.image_path);
  if (!cached) return std::unexpected(cached.error());
  if (static_cast<double>(*cached) < kHotShareMin * static_cast<double>(spec.region_bytes)) {
    return make_error(ErrorKind::kExhausted,
                      fmt::format("only {} of {} bytes of '{}' stay in the page cache", *cached,
                                  spec.region_bytes, spec.image_path));
  }
  return {};
}

Expected<RunRecord> measure_load(const RunSpec& spec, const Family& family, const Arm& arm) {
  const auto workload = workload_of(spec, family);
  if (!workload) return std::unexpected(workload.error());
  if (family.starts_hot) {
    if (auto warm = warm_up(spec, family); !warm) return std::unexpected(std::move(warm.error()));
  }
  auto target = bench::open_image_target(target_options(spec, family, arm));
  if (!target) return std::unexpected(std::move(target.error()));
  Observation observation;
  const auto observed = observe(std::move(*target), spec.ramp_time, spec.spin_ns, observation);
  const auto result = drive(*observed, {*workload}, spec);
  if (!result) return std::unexpected(result.error());
  RunRecord record = record_of(*result);
  add_observation(record, observation);
  return record;
}

bool has_enough_behind(std::uint64_t samples, double fraction) {
  const auto behind_min =
      static_cast<double>(registered_analysis().rules.samples_behind_quantile_min);
  return static_cast<double>(samples) * (1 - fraction) >= behind_min - 1e-9;
}

// A new process has no worker, of its own or of the kernel's: the burst starts them.
Expected<RunRecord> measure_burst(const RunSpec& spec, const Family& family, const Arm& arm) {
  auto workload = workload_of(spec, family);
  if (!workload) return std::unexpected(workload.error());
  workload->run_time = workload->ramp_time = {};
  workload->amount_bytes = kBurst * workload->block_bytes;
  workload->idle_time = spec.idle_time;
  auto target = bench::open_image_target(target_options(spec, family, arm));
  if (!target) return std::unexpected(std::move(target.error()));
  // The burst itself is too short for the kernel's ticks: its rest is counted, too.
  const StealMeter steal;
  const auto result = drive(**target, {*workload}, spec);
  if (!result) return std::unexpected(result.error());
  RunRecord record;
  record.steal_share = steal.share();
  add_latencies(record, latencies_of(result->jobs.front()));
  return record;
}

// How fast a stream becomes durable in the long run cannot be seen in so short a time: the rate is
// that of its writes, and the flushes beside it say what they meet.
Expected<RunRecord> measure_stream(const RunSpec& spec, const Family& family, const Arm& arm) {
  bench::Workload flushes;
  flushes.name = "flushes";
  flushes.read_percent = 0;
  flushes.size_bytes = spec.region_bytes;
  flushes.flush_every = 1;
  flushes.depth = kStreamFlushesMax;
  flushes.arrival = bench::Arrival::kFixed;
  flushes.rate_per_second = kStreamFlushesPerSecond;
  flushes.run_time = kStreamTimeFactor * spec.run_time;
  flushes.ramp_time = spec.ramp_time;
  flushes.seed = spec.seed;
  bench::Workload stream = flushes;
  stream.name = "stream";
  stream.distribution = bench::Distribution::kSequential;
  stream.block_bytes = kStreamBytes;
  stream.flush_every = 0;
  stream.depth = kStreamDepth;
  stream.arrival = bench::Arrival::kClosed;
  auto target = bench::open_image_target(target_options(spec, family, arm));
  if (!target) return std::unexpected(std::move(target.error()));
  const auto result = drive(**target, {flushes, stream}, spec);
  if (!result) return std::unexpected(result.error());
  const bench::JobResult& writer = result->jobs[1];
  RunRecord record;
  add_usage(record, *result, writer.operations());
  record.metrics["stream_rate"] = writer.per_second(writer.operations());
  if (has_enough_behind(writer.latencies[kWrite].total(), 0.99))
    record.metrics["write_p99"] = writer.latencies[kWrite].quantile_ns(0.99) / 1000;
  record.counters["flushes_late"] = result->jobs[0].is_saturated() ? 1 : 0;
  add_latencies(record, result->jobs[0].latencies[kFlush]);
  return record;
}

// A socket that is there may not be listened on yet.
Expected<std::unique_ptr<bench::Target>> connect(const std::string& socket_path, pid_t process,
                                                 const bench::Workload& workload) {
  constexpr int kAttempts = 100;
  constexpr std::chrono::milliseconds kBetween{10};
  Expected<std::unique_ptr<bench::Target>> target;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    target = bench::open_socket_target({.socket_path = socket_path,
                                        .depth_max = workload.depth,
                                        .block_bytes_max = workload.block_bytes,
                                        .process = process});
    if (target || target.error().errno_value != ECONNREFUSED) break;
    std::this_thread::sleep_for(kBetween);
  }
  return target;
}

Expected<RunRecord> measure_served(const RunSpec& spec, const Family& family, const Arm& arm) {
  const auto workload = workload_of(spec, family);
  if (!workload) return std::unexpected(workload.error());
  const std::string engine(aio::to_string(arm.engine));
  std::unique_ptr<ServerProcess> server;
  std::string socket_path;
  if (arm.server == Server::kPeer && !is_peer_command(spec.peer)) {
    socket_path = peer_socket(spec.peer, engine);
  } else {
    auto started = arm.server == Server::kVblk
                       ? ServerProcess::start_vblk(spec.image_path, engine)
                       : ServerProcess::start_peer(spec.peer, spec.image_path, engine);
    if (!started) return std::unexpected(std::move(started.error()));
    server = std::move(*started);
    socket_path = server->socket_path();
  }
  auto target = connect(socket_path, server ? server->pid() : 0, *workload);
  if (!target) return std::unexpected(std::move(target.error()));
  const pid_t elsewhere = server ? 0 : (*target)->process();
  const auto before = bench::usage_of(elsewhere);
  const auto result = drive(**target, {*workload}, spec);
  if (!result) return std::unexpected(result.error());
  RunRecord record = record_of(*result);
  if (elsewhere != 0) {
    const std::chrono::duration<double> used =
        bench::usage_of(elsewhere).cpu_time - before.cpu_time;
    record.counters[RunRecord::kServedElsewhere] = used.count();
  }
  return record;
}

}  // namespace

double StealMeter::share() const {
  const bench::MachineUsage now = bench::machine_usage();
  const std::chrono::duration<double> steal = now.steal - before_.steal;
  const auto all = steal + (now.busy - before_.busy) + (now.idle - before_.idle);
  return all.count() <= 0 ? 0 : steal / all;
}

void add_latencies(RunRecord& record, const bench::LatencyHistogram& latencies) {
  record.samples = latencies.total();
  const auto add = [&](const char* name, double fraction) {
    if (has_enough_behind(record.samples, fraction))
      record.metrics[name] = latencies.quantile_ns(fraction) / 1000;
  };
  add("p50", 0.5);
  add("p99", 0.99);
  latencies.for_each([&record](double latency_ns, std::uint64_t count) {
    record.histogram.emplace_back(latency_ns, count);
  });
}

Expected<RunRecord> carry_out(const RunSpec& spec) {
  const Analysis& analysis = registered_analysis();
  const Family* const family = analysis.family(spec.family);
  const auto arm = analysis.arms.find(spec.arm);
  if (family == nullptr || arm == analysis.arms.end()) {
    return make_error(ErrorKind::kInvalidArgument,
                      fmt::format("there is no '{}' in '{}'", spec.arm, spec.family));
  }
  BeforeRun before = analysis.rules.before_run;
  before.drop_cache = before.drop_cache && !family->starts_hot;
  for (const std::string& path : {spec.image_path, spec.directory}) {
    if (path.empty()) continue;
    if (auto settled = settle(path, before); !settled)
      return std::unexpected(std::move(settled.error()));
  }
  switch (family->kind) {
    case Kind::kLoad:
      return measure_load(spec, *family, arm->second);
    case Kind::kBurst:
      return measure_burst(spec, *family, arm->second);
    case Kind::kStream:
      return measure_stream(spec, *family, arm->second);
    case Kind::kWake:
      return measure_wakes(spec, arm->second);
    case Kind::kCalls:
      return measure_calls(spec, arm->second);
    case Kind::kRange:
      return measure_ranges(spec, arm->second);
    case Kind::kServe:
      return measure_served(spec, *family, arm->second);
  }
  return make_error(ErrorKind::kNotSupported, "an unknown kind of run");
}

Expected<RunRecord> carry_out_elsewhere(const RunSpec& spec) {
  const auto answer = ask_child({"wash", "run-one"}, to_json(spec));
  if (!answer) return std::unexpected(answer.error());
  return parse_run_record(*answer);
}

int run_one() {
  // ^C reaches every process of the terminal. This one is over soon, and clears up after itself.
  ::signal(SIGINT, SIG_IGN);
  const std::string text{std::istreambuf_iterator<char>(std::cin), {}};
  const auto spec = parse_run_spec(text);
  const auto record = spec ? carry_out(*spec) : std::unexpected(spec.error());
  if (!record) {
    fmt::print(stderr, "{}\n", record.error().message);
    return 1;
  }
  fmt::print("{}\n", to_json(*record));
  return 0;
}

}  // namespace vblk::wash
