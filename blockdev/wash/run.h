// One measurement: one arm in one cell, in a process of its own.
//
// The process that conducts an experiment starts `vblk wash run-one` for each, so that nothing of
// one run (threads, caches of the allocator, where code and stacks lie) is left to the next. What
// to do comes as JSON on the standard input, and the outcome goes as JSON to the standard output.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "aio/error.h"
#include "blockdev/bench/latency_histogram.h"
#include "blockdev/bench/machine_usage.h"
#include "blockdev/image.h"
#include "blockdev/wash/analysis.h"

namespace vblk::wash {

struct RunSpec {
  std::string family;
  Levels levels;
  std::string arm;
  std::string image_path;  // of kinds that use one
  blockdev::ImageFormat format{blockdev::ImageFormat::kByName};
  std::string directory;  // of kinds that make files
  std::uint64_t region_bytes{0};
  std::chrono::milliseconds run_time{0};
  std::chrono::milliseconds ramp_time{0};
  std::chrono::milliseconds idle_time{0};
  std::uint64_t seed{0};
  double spin_ns{0};  // burnt on each request
  std::string peer;   // of Server::kPeer: a command
  bool count_system_calls{false};
};

struct RunRecord {
  // What verdicts are made of, by the names of analysis.json; what cannot be known is not there.
  // Rates per second, times in microseconds.
  std::map<std::string, double> metrics;
  // What explains them: counts and times that no verdict rests on.
  std::map<std::string, double> counters;
  // Processor time of servers that run already: none of this process, and yet not of strangers.
  static constexpr const char* kServedElsewhere = "served_elsewhere_seconds";
  std::uint64_t samples{0};
  bool saturated{false};
  double seconds{0};
  double steal_share{0};  // of the processors' time
  // Latencies: nanoseconds and how many.
  std::vector<std::pair<double, std::uint64_t>> histogram;
};

[[nodiscard]] std::string to_json(const RunSpec& spec);
Expected<RunSpec> parse_run_spec(const std::string& text);
[[nodiscard]] std::string to_json(const RunRecord& record);
Expected<RunRecord> parse_run_record(const std::string& text);

// Carries `spec` out in this process.
Expected<RunRecord> carry_out(const RunSpec& spec);
// The same in a new process. Errors: also what that process says, or that it died.
Expected<RunRecord> carry_out_elsewhere(const RunSpec& spec);

// `vblk wash run-one`: the other end of that. Returns the exit status.
int run_one();

// The kinds with loops of their own.
Expected<RunRecord> measure_wakes(const RunSpec& spec, const Arm& arm);
Expected<RunRecord> measure_calls(const RunSpec& spec, const Arm& arm);
Expected<RunRecord> measure_ranges(const RunSpec& spec, const Arm& arm);

// What the hypervisor takes from now on, for runs that vblk bench does not count itself.
class StealMeter {
 public:
  StealMeter() : before_(bench::machine_usage()) {}
  // Of the processors' time.
  [[nodiscard]] double share() const;

 private:
  const bench::MachineUsage before_;
};

// Adds quantiles that have enough samples behind them, "p50" and "p99", and the histogram itself.
void add_latencies(RunRecord& record, const bench::LatencyHistogram& latencies);
// The value of `name` among the levels; empty if it is not there.
[[nodiscard]] std::string level_of(const RunSpec& spec, std::string_view name);

}  // namespace vblk::wash
