// What a run says, for people and for programs that read fio's output.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "blockdev/bench/runner.h"

namespace vblk::bench {

// A run and what it ran on.
struct NamedRun {
  std::string target;
  bool in_process{false};
  RunResult result;
};

// A quantile of `latencies`; nothing where fewer than ten samples lie beyond it: then it would be
// the luck of a few.
[[nodiscard]] std::optional<double> known_quantile_ns(const LatencyHistogram& latencies,
                                                      double fraction);

// "12.3", or "n/a".
[[nodiscard]] std::string microseconds(std::optional<double> nanoseconds);

// "read, write + flush" and so on: the name of each thing that is timed.
[[nodiscard]] std::string_view timed_name(std::size_t timed);

// One run in full.
[[nodiscard]] std::string text_report(const NamedRun& run);
// Several runs, a line for each job.
[[nodiscard]] std::string text_summary(std::span<const NamedRun> runs);
// All runs in the structure of `fio --output-format=json+`; what fio does not have is under "vblk".
[[nodiscard]] std::string json_report(std::span<const NamedRun> runs);

}  // namespace vblk::bench
