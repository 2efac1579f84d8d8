// Flush latency, from every side that a user of VM storage asks about: the tests of `vblk bench
// flush`.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "aio/engine_set.h"
#include "aio/error.h"
#include "blockdev/bench/latency_histogram.h"
#include "blockdev/bench/options.h"
#include "blockdev/bench/runner.h"
#include "blockdev/image.h"

namespace vblk::bench {

struct FlushSuiteOptions {
  TargetOptions target;
  // Of an image, each with each.
  std::vector<aio::EngineName> engines;
  std::vector<blockdev::CacheMode> caches;
  std::chrono::nanoseconds test_time{0};  // of each measurement
  std::chrono::nanoseconds idle_time{0};  // before the burst
  std::chrono::nanoseconds p99_limit{0};  // of a write and its flush, to pass
  std::uint64_t write_behind_bytes{0};    // what buffered images are tried with, too
  std::string flush_device;               // empty: none
  std::uint64_t seed{0};
  const std::atomic<bool>* interrupted{nullptr};
  std::function<void(const std::string& title, const Progress&)> show;
};

enum class FlushTest : std::uint8_t {
  kOneByOne,        // a write and its flush, then the next
  kConcurrency,     // many at once
  kBackgroundLoad,  // while something else writes, so and so fast
  kStreaming,       // now and then, while something else writes all it can to the page cache
  kWriteThrough,    // instead of a flush
  kBurst,           // after a time without requests
  kNothingToDo,     // a flush with nothing written since the last
};
[[nodiscard]] std::string_view to_string(FlushTest test);

// One line of the summary.
struct FlushRow {
  std::string target;  // "io_uring, none", or the socket
  FlushTest test{FlushTest::kOneByOne};
  std::string variant;  // "16 at once", "50 % load"
  double x{0};          // the same as a number, for plots
  double per_second{0};
  LatencyHistogram latencies;
  std::string timed;              // "flush", "write + flush", "write"
  std::optional<double> sharing;  // flushes asked for per flush that was issued
  std::optional<std::uint64_t> device_flushes;
  std::optional<bool> passed;
  bool saturated{false};
  std::optional<double> stream_bytes_per_second;  // of the other writer
  std::vector<Interval> intervals;
  std::string note;  // why nothing was measured
};

struct PowerCutCheck {
  unsigned cuts{0};
  unsigned lost{0};            // writes that were flushed and are not there
  bool canary_noticed{false};  // a disk that loses flushes was caught
};

struct FlushReport {
  std::vector<FlushRow> rows;
  PowerCutCheck power_cuts;
  std::vector<std::string> warnings;
  // Targets of which nobody knows whether they pass.
  std::vector<std::string> unjudged;
  bool interrupted{false};
  std::optional<Error> error;  // the rest holds up to then
};

FlushReport run_flush_suite(const FlushSuiteOptions& options);

// The same writes and flushes on a simulated disk whose power is cut at every step (docs/bench.md).
PowerCutCheck check_power_cuts(std::uint64_t seed);

}  // namespace vblk::bench
