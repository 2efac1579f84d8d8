// The load of one queue: keeps its requests in flight, times them, and checks what they bring.
//
// A lane is one request in flight at most: the depth is the number of lanes. In a closed loop a
// lane goes on when its request completes. In an open loop requests have times of their own, and
// wait for a free lane if there is none; that wait is part of their latency.
//
// Thread: all of it on the thread of the port, except the LiveFigures and the phase, which others
// read and set. Nothing is allocated while it runs.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <vector>

#include "aio/error.h"
#include "blockdev/bench/arrivals.h"
#include "blockdev/bench/backlog.h"
#include "blockdev/bench/block_content.h"
#include "blockdev/bench/latency_histogram.h"
#include "blockdev/bench/offsets.h"
#include "blockdev/bench/target.h"
#include "blockdev/bench/workload.h"

namespace vblk::bench {

// What is timed: each kind of operation, and a write with the flush that follows it.
inline constexpr std::size_t kWriteAndFlush = kOperationCount;
inline constexpr std::size_t kTimedCount = kOperationCount + 1;
using Latencies = std::array<LatencyHistogram, kTimedCount>;

// What has been counted so far, for whoever watches.
class LiveFigures {
 public:
  // Everything since the last call, merged into `sum`.
  void take(Latencies& sum);

 private:
  friend class Generator;
  std::mutex mutex_;
  Latencies latencies_;  // of whole intervals
};

// Where a run is; set by whoever conducts it, and by a generator that has failed.
enum class Phase : std::uint8_t { kRamp, kMeasured, kStopped };

struct GeneratorSetup {
  Workload workload;               // with every 0 that means "all" filled in
  unsigned queue_index{0};         // of workload.queue_count
  BlockContent* content{nullptr};  // none: nothing is checked
  std::atomic<Phase>* phase{nullptr};
  // Of all queues, those of the ramp not counted; nullptr: no end.
  std::atomic<std::int64_t>* operations_left{nullptr};
  LiveFigures* live{nullptr};
  std::chrono::nanoseconds stall_timeout{0};
  // Somebody wants the run to end: a stalled disk is waited for no longer than kPatience.
  const std::atomic<bool>* interrupted{nullptr};
};

struct GeneratorResult {
  std::uint64_t failed{0};               // requests
  std::size_t in_flight{0};              // when the disk died
  std::chrono::nanoseconds lag{0};       // open loop: how far behind its times it was in the end
  bool backlog_grew{false};              // open loop: more and more requests were due and not done
  LatencyHistogram lateness;             // open loop: of starts that had a free lane in time
  std::chrono::nanoseconds cpu_time{0};  // of this thread while it was measured
  TargetStatistics port;                 // of the port meanwhile
  std::optional<Error> error;            // the first one; the rest holds up to then
};

class Generator {
 public:
  // Error: as Port::make_io().
  static Expected<std::unique_ptr<Generator>> create(Port& port, const GeneratorSetup& setup);
  Generator(const Generator&) = delete;
  Generator& operator=(const Generator&) = delete;

  // Until the phase is kStopped, or nothing is left to do; then waits for what is in flight, which
  // is not counted.
  GeneratorResult run();

 private:
  using Clock = std::chrono::steady_clock;
  struct Lane {
    Generator* generator{nullptr};
    Io* io{nullptr};
    Clock::time_point begin;        // as intended
    Clock::time_point write_begin;  // of the write before a flush
    unsigned writes_since_flush{0};
    bool is_checked{false};
  };

  Generator(Port& port, const GeneratorSetup& setup);
  void stay_idle() const;
  void start_free_lanes();
  void note_backlog(Clock::time_point now);
  void start(Lane& lane, Clock::time_point intended);
  void submit(Lane& lane);
  void kick();
  void completed(Lane& lane);
  void count(std::size_t timed, Clock::time_point begin, Clock::time_point end);
  void publish(Clock::time_point now);
  void note_phase(Clock::time_point now);
  void enter_measured_phase(Clock::time_point now);
  void leave_measured_phase();
  [[nodiscard]] bool is_running() const;
  [[nodiscard]] bool take_operation();
  [[nodiscard]] std::chrono::nanoseconds time_to_sleep() const;
  void fail(ErrorKind kind, std::string message);
  void stop();
  bool wait_for_progress();

  Port& port_;
  const GeneratorSetup setup_;
  const Workload& workload_{setup_.workload};
  OffsetSource offsets_;
  SplitMix64 mix_;
  std::uniform_int_distribution<unsigned> percent_{0, 99};
  std::optional<Arrivals> arrivals_;
  Backlog backlog_;
  Clock::time_point begin_;
  std::vector<Lane> lanes_;
  std::vector<Lane*> free_lanes_;
  Latencies interval_;
  Clock::time_point interval_end_;
  Clock::time_point last_progress_;
  Clock::time_point measured_from_;
  std::chrono::nanoseconds measured_from_cpu_time_{0};
  TargetStatistics measured_from_statistics_;
  std::size_t in_flight_{0};
  unsigned submitted_since_kick_{0};
  bool measured_{false};
  bool is_over_{false};  // the measured phase
  bool finished_{false};
  GeneratorResult result_;
};

}  // namespace vblk::bench
