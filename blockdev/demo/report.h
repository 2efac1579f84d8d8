// What the measurements say, as a table and in words.
//
// The words are careful: an engine is ahead of another only if its slowest round was faster than
// the other's fastest. With five rounds that happens to two equal engines once in 126 times.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "blockdev/bench/runner.h"
#include "blockdev/demo/workloads.h"

namespace vblk::demo {

// One workload on one engine, round by round.
struct Series {
  std::vector<double> operations_per_second;
  std::vector<double> cpu_us_per_operation;
  std::vector<double> context_switches_per_operation;
  bench::LatencyHistogram latencies;  // of all rounds

  void add(const bench::RunResult& result);
};

struct EngineResults {
  std::string engine;
  std::array<Series, workloads.size()> series;  // in the order of workloads
};

// All series have the same number of rounds, at least one.
[[nodiscard]] std::string table(const std::vector<EngineResults>& results);
// One paragraph per workload; empty for fewer than two engines.
[[nodiscard]] std::string verdict(const std::vector<EngineResults>& results);

}  // namespace vblk::demo
