#include "blockdev/bench/report.h"

#include <algorithm>
#include <array>
#include <ctime>
#include <iterator>

#include <boost/json.hpp>
#include <fmt/core.h>
#include <fmt/format.h>

namespace vblk::bench {

namespace {

namespace json = boost::json;

// Samples that must lie beyond a quantile for it to be told.
constexpr double kSamplesBeyondMin = 10;

struct Quantile {
  const char* name;  // fio's key
  double fraction;
};
constexpr std::array kQuantiles{
    Quantile{"1.000000", 0.01},    Quantile{"5.000000", 0.05},   Quantile{"10.000000", 0.1},
    Quantile{"20.000000", 0.2},    Quantile{"30.000000", 0.3},   Quantile{"40.000000", 0.4},
    Quantile{"50.000000", 0.5},    Quantile{"60.000000", 0.6},   Quantile{"70.000000", 0.7},
    Quantile{"80.000000", 0.8},    Quantile{"90.000000", 0.9},   Quantile{"95.000000", 0.95},
    Quantile{"99.000000", 0.99},   Quantile{"99.500000", 0.995}, Quantile{"99.900000", 0.999},
    Quantile{"99.950000", 0.9995}, Quantile{"99.990000", 0.9999}};
constexpr std::array kShownQuantiles{0.5, 0.9, 0.99, 0.999, 0.9999};

double mib_per_second(const JobResult& job, std::uint64_t operations) {
  return job.per_second(operations) * static_cast<double>(job.workload.block_bytes) / (1 << 20);
}

std::string load_of(const Workload& workload) {
  switch (workload.arrival) {
    case Arrival::kFixed:
      return fmt::format("open loop, {:g} per second", workload.rate_per_second);
    case Arrival::kPoisson:
      return fmt::format("open loop, {:g} per second, Poisson", workload.rate_per_second);
    case Arrival::kClosed:
      break;
  }
  return "closed loop";
}

void print_latencies(std::back_insert_iterator<std::string> out, const JobResult& job) {
  fmt::format_to(out, "  {:<13} {:>10} {:>9} {:>9}", "", "per s", "MiB/s", "mean us");
  for (const double fraction : kShownQuantiles)
    fmt::format_to(out, " {:>9}", fmt::format("p{:g}", fraction * 100));
  fmt::format_to(out, " {:>9} {:>10}\n", "max", "samples");
  for (std::size_t timed = 0; timed < kTimedCount; ++timed) {
    const LatencyHistogram& latencies = job.latencies[timed];
    if (latencies.total() == 0) continue;
    const bool moves_data = timed != kWriteAndFlush && timed != std::size_t{2};
    fmt::format_to(out, "  {:<13} {:>10.0f} {:>9} {:>9.1f}", timed_name(timed),
                   job.per_second(latencies.total()),
                   moves_data ? fmt::format("{:.1f}", mib_per_second(job, latencies.total())) : "",
                   latencies.mean_ns() / 1000);
    for (const double fraction : kShownQuantiles)
      fmt::format_to(out, " {:>9}", microseconds(known_quantile_ns(latencies, fraction)));
    fmt::format_to(out, " {:>9} {:>10}\n", microseconds(static_cast<double>(latencies.max_ns())),
                   latencies.total());
  }
}

std::string per_operation(std::optional<std::uint64_t> count, double operations) {
  return count ? fmt::format("{:.2f}", static_cast<double>(*count) / operations) : "n/a";
}

std::chrono::nanoseconds generator_cpu_time(const RunResult& result) {
  std::chrono::nanoseconds sum{0};
  for (const JobResult& job : result.jobs) sum += job.generator_cpu_time;
  return sum;
}

double us_per(std::chrono::nanoseconds time, double operations) {
  return std::chrono::duration<double, std::micro>(time).count() / operations;
}

void print_usage(std::back_insert_iterator<std::string> out, const NamedRun& run) {
  const RunUsage& usage = run.result.usage;
  const auto operations = static_cast<double>(run.result.operations());
  if (operations == 0) return;
  fmt::format_to(out, "  CPU us per I/O: ");
  if (usage.has_process) {
    fmt::format_to(out, "{} {:.2f}, ", run.in_process ? "this process, load included," : "backend",
                   us_per(usage.cpu_time, operations));
  } else if (usage.process_has_gone) {
    fmt::format_to(out, "backend n/a (it has gone), ");
  }
  if (!run.in_process)
    fmt::format_to(out, "load {:.2f}, ", us_per(generator_cpu_time(run.result), operations));
  fmt::format_to(out, "whole machine {:.2f}\n", us_per(usage.machine_busy, operations));
  fmt::format_to(out, "  per I/O: ");
  if (usage.has_process) {
    fmt::format_to(out, "wake-ups {:.2f}, preemptions {:.2f}, system calls {}, io-wq punts {}, ",
                   static_cast<double>(usage.context_switches.voluntary) / operations,
                   static_cast<double>(usage.context_switches.involuntary) / operations,
                   per_operation(usage.system_calls, operations),
                   per_operation(usage.punts, operations));
  }
  if (run.in_process) {
    fmt::format_to(out, "requests per submission {:.1f}\n",
                   usage.target.submit_calls == 0
                       ? 0.0
                       : static_cast<double>(usage.target.submitted) /
                             static_cast<double>(usage.target.submit_calls));
  } else {
    fmt::format_to(out, "kicks {:.2f}, interrupts {:.2f}\n",
                   static_cast<double>(usage.target.kicks) / operations,
                   static_cast<double>(usage.target.wake_ups) / operations);
  }
  if (usage.target.flushes != 0) {
    fmt::format_to(out, "  flushes: {} asked for, {} issued to the kernel\n", usage.target.flushes,
                   usage.target.flushes_issued);
  }
  if (usage.device_flushes)
    fmt::format_to(out, "  flushes that reached the device: {}\n", *usage.device_flushes);
  if (usage.machine_time.count() != 0) {
    fmt::format_to(out, "  steal: {:.1f} % of the processors\n",
                   100.0 * static_cast<double>(usage.machine_steal.count()) /
                       static_cast<double>(usage.machine_time.count()));
  }
}

// ---- JSON

// As in fio, percentiles and bins are there only where there is something to be told.
json::object latency_object(const LatencyHistogram& latencies) {
  json::object object{{"min", latencies.min_ns()},
                      {"max", latencies.max_ns()},
                      {"mean", latencies.mean_ns()},
                      {"stddev", latencies.standard_deviation_ns()},
                      {"N", latencies.total()}};
  if (latencies.total() == 0) return object;
  json::object percentiles;
  for (const Quantile& quantile : kQuantiles) {
    if (const auto value = known_quantile_ns(latencies, quantile.fraction))
      percentiles[quantile.name] = static_cast<std::uint64_t>(*value);
  }
  object["percentile"] = std::move(percentiles);
  json::object bins;
  latencies.for_each([&bins](double latency_ns, std::uint64_t count) {
    bins[std::to_string(static_cast<std::uint64_t>(latency_ns))] = count;
  });
  object["bins"] = std::move(bins);
  return object;
}

// The latencies of a load that the disk could not follow would say how long it ran.
LatencyHistogram told(const JobResult& job, const LatencyHistogram& latencies) {
  return job.is_saturated() ? LatencyHistogram{} : latencies;
}

// fio's "read", "write" and "trim". What is not known of a direction is zero there as well.
json::object direction_object(const JobResult& job, const LatencyHistogram& latencies) {
  const double iops = job.per_second(latencies.total());
  const double bandwidth = iops * static_cast<double>(job.workload.block_bytes);
  const LatencyHistogram none;
  return {
      {"io_bytes", latencies.total() * job.workload.block_bytes},
      {"io_kbytes", latencies.total() * job.workload.block_bytes / 1024},
      {"bw_bytes", static_cast<std::uint64_t>(bandwidth)},
      {"bw", static_cast<std::uint64_t>(bandwidth / 1024)},
      {"iops", iops},
      {"runtime", latencies.total() == 0
                      ? 0
                      : std::chrono::duration_cast<std::chrono::milliseconds>(job.elapsed).count()},
      {"total_ios", latencies.total()},
      {"short_ios", 0},
      {"drop_ios", 0},
      {"slat_ns", latency_object(none)},
      {"clat_ns", latency_object(told(job, latencies))},
      {"lat_ns", latency_object(told(job, latencies))}};
}

json::array interval_array(std::span<const Interval> intervals) {
  json::array array;
  for (const Interval& interval : intervals) {
    array.push_back({{"seconds", interval.seconds},
                     {"operations", interval.operations},
                     {"p50_ns", interval.p50_ns},
                     {"p99_ns", interval.p99_ns},
                     {"max_ns", interval.max_ns}});
  }
  return array;
}

json::value value_of(std::optional<std::uint64_t> count) {
  return count ? json::value(*count) : json::value();
}

json::object usage_object(const NamedRun& run) {
  const RunUsage& usage = run.result.usage;
  const auto operations = std::max(1.0, static_cast<double>(run.result.operations()));
  json::object object{
      {"in_process", run.in_process},
      {"cpu_us_per_io", nullptr},
      {"load_cpu_us_per_io", us_per(generator_cpu_time(run.result), operations)},
      {"machine_cpu_us_per_io", us_per(usage.machine_busy, operations)},
      {"kicks", usage.target.kicks},
      {"interrupts", usage.target.wake_ups},
      {"submit_calls", usage.target.submit_calls},
      {"submitted", usage.target.submitted},
      {"flushes", usage.target.flushes},
      {"flushes_issued", usage.target.flushes_issued},
      {"device_flushes", value_of(usage.device_flushes)},
      {"steal_ms",
       std::chrono::duration_cast<std::chrono::milliseconds>(usage.machine_steal).count()}};
  if (!usage.has_process) return object;
  object["cpu_us_per_io"] = us_per(usage.cpu_time, operations);
  object["voluntary_context_switches"] = usage.context_switches.voluntary;
  object["involuntary_context_switches"] = usage.context_switches.involuntary;
  object["context_switches_per_io"] =
      static_cast<double>(usage.context_switches.sum()) / operations;
  object["system_calls"] = value_of(usage.system_calls);
  object["io_uring_punts"] = value_of(usage.punts);
  return object;
}

json::object options_object(const Workload& workload) {
  json::object object{{"bs", std::to_string(workload.block_bytes)},
                      {"iodepth", std::to_string(workload.depth)},
                      {"numjobs", std::to_string(workload.queue_count)},
                      {"offset", std::to_string(workload.offset_bytes)},
                      {"size", std::to_string(workload.size_bytes)},
                      {"randseed", std::to_string(workload.seed)}};
  if (workload.flush_every != 0) object["fsync"] = std::to_string(workload.flush_every);
  if (workload.arrival != Arrival::kClosed) {
    object["rate_iops"] = fmt::format("{:g}", workload.rate_per_second);
    object["rate_process"] = workload.arrival == Arrival::kFixed ? "linear" : "poisson";
  }
  return object;
}

json::object job_object(const NamedRun& run, const JobResult& job, std::size_t group) {
  const auto& latencies = job.latencies;
  const auto of = [&latencies](Operation operation) -> const LatencyHistogram& {
    return latencies[static_cast<std::size_t>(operation)];
  };
  LatencyHistogram trims = of(Operation::kDiscard);
  trims.merge(of(Operation::kWriteZeroes));
  const auto cpu_time = run.result.usage.cpu_time;
  const double cpu_percent = job.elapsed.count() == 0
                                 ? 0
                                 : 100.0 * static_cast<double>(cpu_time.count()) /
                                       static_cast<double>(job.elapsed.count());
  json::object own{{"target", run.target},
                   {"usage", usage_object(run)},
                   {"saturated", job.is_saturated()},
                   {"failed", job.failed},
                   {"in_flight_at_end", job.in_flight},
                   {"verified_blocks", run.result.verified_blocks},
                   {"unverified_blocks", run.result.unverified_blocks},
                   {"intervals", interval_array(job.intervals)},
                   {"flush_intervals", interval_array(job.flush_intervals)},
                   {"write_and_flush_ns", latency_object(told(job, latencies[kWriteAndFlush]))}};
  if (job.workload.arrival != Arrival::kClosed)
    own["start_lateness_ns"] = latency_object(job.lateness);
  return {
      {"jobname", job.workload.name},
      {"groupid", group},
      {"error", run.result.error ? 5 : 0},
      {"eta", 0},
      {"elapsed", std::chrono::duration_cast<std::chrono::seconds>(job.elapsed).count()},
      {"job options", options_object(job.workload)},
      {"read", direction_object(job, of(Operation::kRead))},
      {"write", direction_object(job, of(Operation::kWrite))},
      {"trim", direction_object(job, trims)},
      {"sync",
       {{"total_ios", of(Operation::kFlush).total()},
        {"lat_ns", latency_object(told(job, of(Operation::kFlush)))}}},
      {"job_runtime", std::chrono::duration_cast<std::chrono::milliseconds>(job.elapsed).count()},
      {"usr_cpu", cpu_percent * (1 - run.result.usage.system_share)},
      {"sys_cpu", cpu_percent * run.result.usage.system_share},
      {"ctx", run.result.usage.context_switches.sum()},
      {"vblk", std::move(own)}};
}

}  // namespace

std::optional<double> known_quantile_ns(const LatencyHistogram& latencies, double fraction) {
  const auto total = static_cast<double>(latencies.total());
  if (total * std::min(fraction, 1 - fraction) < kSamplesBeyondMin) return std::nullopt;
  return latencies.quantile_ns(fraction);
}

std::string microseconds(std::optional<double> nanoseconds) {
  return nanoseconds ? fmt::format("{:.1f}", *nanoseconds / 1000) : "n/a";
}

std::string_view timed_name(std::size_t timed) {
  return timed == kWriteAndFlush ? "write + flush" : to_string(static_cast<Operation>(timed));
}

std::string text_report(const NamedRun& run) {
  std::string text;
  const auto out = std::back_inserter(text);
  for (const JobResult& job : run.result.jobs) {
    const Workload& workload = job.workload;
    fmt::format_to(out, "{}: {} bytes, depth {}, {} queue{}, {}; {:.1f} s on {}\n", workload.name,
                   workload.block_bytes, workload.depth, workload.queue_count,
                   workload.queue_count == 1 ? "" : "s", load_of(workload),
                   std::chrono::duration<double>(job.elapsed).count(), run.target);
    if (job.is_saturated()) {
      fmt::format_to(out,
                     "  SATURATED: the disk cannot follow; {:.0f} per second done, {}. Its "
                     "latencies would say "
                     "how long it ran.\n",
                     job.per_second(job.operations()),
                     job.backlog_grew
                         ? "and the backlog grew all the time"
                         : fmt::format("{:.1f} s behind in the end",
                                       std::chrono::duration<double>(job.lag).count()));
    } else {
      print_latencies(out, job);
    }
    if (!job.is_saturated() && job.lateness.total() > 0) {
      fmt::format_to(
          out,
          "  the load itself started requests late by {} us (p99 {}), which is in their latency\n",
          microseconds(job.lateness.mean_ns()),
          microseconds(known_quantile_ns(job.lateness, 0.99)));
    }
    if (workload.verify) {
      fmt::format_to(out, "  to verify it in a later run: --randseed {}\n", workload.seed);
    }
    if (job.failed != 0 || job.in_flight != 0) {
      fmt::format_to(out, "  FAILED: {} requests with errors, {} in flight at the end\n",
                     job.failed, job.in_flight);
    }
  }
  if (run.result.verified_blocks != 0)
    fmt::format_to(out, "  verify: {} blocks written, read back, 0 wrong\n",
                   run.result.verified_blocks);
  if (run.result.unverified_blocks != 0) {
    fmt::format_to(out, "  verify: {} blocks written and NOT all of them read back, {} wrong\n",
                   run.result.unverified_blocks, run.result.failed_verification);
  }
  print_usage(out, run);
  return text;
}

std::string text_summary(std::span<const NamedRun> runs) {
  std::string text;
  const auto out = std::back_inserter(text);
  fmt::format_to(out, "{:<14} {:>8} {:>6} {:>7} {:>10} {:>9} {:>9} {:>9} {:>10}\n", "job", "bytes",
                 "depth", "queues", "IOPS", "p50 us", "p99 us", "p99.9 us", "CPU us/IO");
  for (const NamedRun& run : runs) {
    for (const JobResult& job : run.result.jobs) {
      LatencyHistogram all;
      for (std::size_t timed = 0; timed < kOperationCount; ++timed) all.merge(job.latencies[timed]);
      const auto shown = [&](double fraction) {
        return job.is_saturated() ? "saturated" : microseconds(known_quantile_ns(all, fraction));
      };
      const auto operations = std::max(1.0, static_cast<double>(run.result.operations()));
      fmt::format_to(out, "{:<14} {:>8} {:>6} {:>7} {:>10.0f} {:>9} {:>9} {:>9} {:>10}\n",
                     job.workload.name, job.workload.block_bytes, job.workload.depth,
                     job.workload.queue_count, job.per_second(job.operations()), shown(0.5),
                     shown(0.99), shown(0.999),
                     run.result.usage.has_process
                         ? fmt::format("{:.2f}", us_per(run.result.usage.cpu_time, operations))
                         : "n/a");
    }
  }
  return text;
}

std::string json_report(std::span<const NamedRun> runs) {
  json::array jobs;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    for (const JobResult& job : runs[i].result.jobs) jobs.push_back(job_object(runs[i], job, i));
  }
  const std::time_t now = std::time(nullptr);
  const json::object document{
      {"fio version", "vblk " VBLK_VERSION}, {"timestamp", now}, {"jobs", std::move(jobs)}};
  return json::serialize(document) + "\n";
}

}  // namespace vblk::bench
