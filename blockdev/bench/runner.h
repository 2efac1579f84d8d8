// Conducts a run: a thread per queue, the phases, the counters around the measured part, and what
// is shown meanwhile.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "aio/error.h"
#include "blockdev/bench/block_content.h"
#include "blockdev/bench/generator.h"
#include "blockdev/bench/process_usage.h"
#include "blockdev/bench/target.h"
#include "blockdev/bench/workload.h"

namespace vblk::bench {

// One second of a job.
struct Interval {
  double seconds{0};  // from the start of the measured part to its end
  std::uint64_t operations{0};
  double p50_ns{0};
  double p99_ns{0};
  double max_ns{0};
};

struct JobResult {
  Workload workload;
  std::chrono::nanoseconds elapsed{0};
  Latencies latencies;
  std::vector<Interval> intervals;  // of all operations; of flushes alone: flush_intervals
  std::vector<Interval> flush_intervals;
  std::uint64_t failed{0};
  std::size_t in_flight{0};  // when the disk died
  std::chrono::nanoseconds lag{0};
  bool backlog_grew{false};
  LatencyHistogram lateness;
  std::chrono::nanoseconds generator_cpu_time{0};

  // Requests that count as I/O: all but the flushes that follow writes.
  [[nodiscard]] std::uint64_t operations() const;
  [[nodiscard]] double per_second(std::uint64_t count) const;
  // An open loop that the disk could not follow: its latencies grow with the length of the run, and
  // mean nothing.
  [[nodiscard]] bool is_saturated() const;
};

// Differences over the measured part. What the kernel does not tell is not there.
struct RunUsage {
  std::chrono::nanoseconds cpu_time{0};  // of the target's process
  double system_share{0};                // of that, in the kernel; coarse
  ContextSwitches context_switches;
  bool has_process{false};
  bool process_has_gone{false};  // meanwhile: nothing is known of it
  std::optional<std::uint64_t> system_calls;
  std::optional<std::uint64_t> punts;  // what io_uring handed to kernel workers
  std::chrono::nanoseconds machine_busy{0};
  std::chrono::nanoseconds machine_steal{0};
  std::chrono::nanoseconds machine_time{0};  // of all processors
  std::optional<std::uint64_t> device_flushes;
  TargetStatistics target;
};

struct RunResult {
  std::vector<JobResult> jobs;
  RunUsage usage;
  bool interrupted{false};
  std::optional<Error> error;          // the first; the rest holds up to then
  std::uint64_t verified_blocks{0};    // written, and all of them read back
  std::uint64_t unverified_blocks{0};  // written, and not all of them read back
  std::uint64_t failed_verification{0};

  [[nodiscard]] std::uint64_t operations() const;
};

struct Progress {
  std::chrono::nanoseconds elapsed{0};
  std::chrono::nanoseconds planned{0};  // 0: by amount, see done_fraction
  double done_fraction{0};
  bool ramping{false};
  double operations_per_second{0};  // of the last second
  double p99_ns{0};
};

struct RunSetup {
  // At the same time, on queues of their own. The longest ramp is that of all.
  std::vector<Workload> jobs;
  bool count_system_calls{false};
  std::string flush_device;  // path whose device's flushes are counted; empty: none
  const std::atomic<bool>* interrupted{nullptr};
  std::function<void(const Progress&)> show;  // about once a second
  // A disk with requests in flight that completes none for so long has died.
  std::chrono::nanoseconds stall_timeout{std::chrono::seconds{30}};
  // What the blocks of job `i` hold; nullptr: noise.
  std::function<BlockContent*(std::size_t job)> content;
};

// Queues that the jobs need, together.
[[nodiscard]] unsigned queue_count(std::span<const Workload> jobs);

// Fills in what `workload` leaves to the disk, and checks that the disk can do it.
// Errors: kInvalidArgument (sizes that do not fit), kNotSupported.
Expected<Workload> fit_to(const Target& target, const Workload& workload);

// Errors only where nothing was measured: those of Target::open_port() and Port::make_io().
// Where requests are in flight in the end, and the disk is in this process, ports are left open for
// ever, and `target` must not go either.
Expected<RunResult> run_jobs(Target& target, const RunSetup& setup);

}  // namespace vblk::bench
