#include "blockdev/bench/flush_suite.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#include <fmt/core.h>

#include "aio/simulated_disk.h"
#include "aio/simulated_engine.h"
#include "blockdev/bench/measure.h"
#include "blockdev/io_context.h"
#include "blockdev/io_loop.h"
#include "blockdev/raw_node.h"

namespace vblk::bench {

namespace {

constexpr std::size_t kWriteBytes = 4096;
constexpr std::size_t kBackgroundBytes = std::size_t{128} << 10;
constexpr unsigned kBackgroundDepth = 8;
constexpr unsigned kBurst = 64;
constexpr unsigned kQueuesMax = 4;
// Beside a stream: often enough to be counted, seldom enough that something has piled up.
constexpr double kFlushesPerSecond = 10;
constexpr int kStreamingFactor = 4;
// A flush may last seconds there; those that come meanwhile share the next call.
constexpr unsigned kStreamingFlushesMax = 256;
// A flush that is faster reaches no disk: the host's page cache answers, or the device ignores it.
constexpr double kIgnoredFlushNs = 20'000;

constexpr auto kFlush = static_cast<std::size_t>(Operation::kFlush);
constexpr auto kWrite = static_cast<std::size_t>(Operation::kWrite);

bool is_qcow2(const blockdev::ImageOptions& image) {
  return image.format == blockdev::ImageFormat::kQcow2 ||
         (image.format == blockdev::ImageFormat::kByName && image.path.ends_with(".qcow2"));
}

// All tests on one target.
class Suite {
 public:
  Suite(const FlushSuiteOptions& options, TargetOptions target, std::string name,
        FlushReport& report)
      : options_(options), target_(std::move(target)), name_(std::move(name)), report_(report) {}

  void run() {
    write_and_flush();
    if (goes_on() && !is_judged_) report_.unjudged.push_back(name_);
    concurrency();
    background_load();
    streaming();
    write_through();
    burst();
    nothing_to_do();
  }

 private:
  [[nodiscard]] bool goes_on() const { return !report_.error && !report_.interrupted; }

  [[nodiscard]] Workload write_flush(unsigned depth) const {
    Workload workload;
    workload.name = "flush";
    workload.read_percent = 0;
    workload.block_bytes = kWriteBytes;
    workload.depth = depth;
    workload.flush_every = 1;
    workload.run_time = options_.test_time;
    workload.ramp_time = options_.test_time / 10;
    workload.seed = options_.seed;
    return workload;
  }

  // Nothing if the suite is at its end. What a backend does not have is a warning.
  std::optional<NamedRun> measured(const TargetOptions& target, const JobGroup& group,
                                   const std::string& title) {
    if (!goes_on()) return std::nullopt;
    MeasureOptions how{.flush_device = options_.flush_device, .interrupted = options_.interrupted};
    if (options_.show) {
      how.show = [this, &title](const Progress& progress) {
        options_.show(fmt::format("{}: {}", name_, title), progress);
      };
    }
    auto run = measure(target, group, how);
    if (!run && (run.error().kind == ErrorKind::kNotSupported ||
                 run.error().kind == ErrorKind::kInvalidArgument)) {
      report_.warnings.push_back(fmt::format("{}: {}: {}", name_, title, run.error().message));
      return std::nullopt;
    }
    if (!run) {
      report_.error = std::move(run.error());
      return std::nullopt;
    }
    report_.interrupted = run->result.interrupted;
    if (run->result.error) report_.error = run->result.error;
    return std::move(*run);
  }

  // Makes a row of what the first job of `run` says of `timed`.
  FlushRow& add(FlushTest test, std::string variant, double x, const NamedRun& run,
                std::size_t timed) {
    const JobResult& job = run.result.jobs.front();
    FlushRow row;
    row.target = name_;
    row.test = test;
    row.variant = std::move(variant);
    row.x = x;
    row.latencies = job.latencies[timed];
    row.timed = timed_name(timed);
    row.per_second = job.per_second(row.latencies.total());
    row.saturated = job.is_saturated();
    row.intervals = timed == kFlush ? job.flush_intervals : job.intervals;
    const RunUsage& usage = run.result.usage;
    if (usage.target.flushes_issued != 0) {
      row.sharing = static_cast<double>(usage.target.flushes) /
                    static_cast<double>(usage.target.flushes_issued);
    }
    row.device_flushes = usage.device_flushes;
    report_.rows.push_back(std::move(row));
    return report_.rows.back();
  }

  void write_and_flush() {
    const auto run = measured(target_, {write_flush(1)}, "write + flush, one at a time");
    if (!run) return;
    const FlushRow& flush = add(FlushTest::kOneByOne, "flush alone", 1, *run, kFlush);
    const double p50_ns = flush.latencies.quantile_ns(0.5);
    if (flush.latencies.total() > 0 && p50_ns < kIgnoredFlushNs) {
      report_.warnings.push_back(
          fmt::format("{}: half of the flushes take less than {:.1f} us: what lies below ignores "
                      "them, or has a "
                      "cache that survives a power cut; do not take these figures for a disk's",
                      name_, p50_ns / 1000));
    }
    if (flush.device_flushes == 0 && flush.latencies.total() > 0) {
      report_.warnings.push_back(
          fmt::format("{}: no flush reached the device '{}': the file system sends none, or the "
                      "device says that "
                      "it has no volatile cache",
                      name_, options_.flush_device));
    }
    FlushRow& both = add(FlushTest::kOneByOne, "with its write", 1, *run, kWriteAndFlush);
    // A slow disk has few samples, and needs a verdict all the same.
    is_judged_ = both.latencies.total() > 0;
    if (is_judged_)
      both.passed =
          both.latencies.quantile_ns(0.99) <= static_cast<double>(options_.p99_limit.count());
  }

  void concurrency() {
    for (const unsigned at_once : {1U, 4U, 16U, 64U}) {
      Workload workload = write_flush(std::max(1U, at_once / kQueuesMax));
      workload.queue_count = std::min(at_once, kQueuesMax);
      const auto run = measured(target_, {workload}, fmt::format("{} flushes at once", at_once));
      if (!run) continue;
      add(FlushTest::kConcurrency,
          fmt::format("{} at once, {} queue{}", at_once, workload.queue_count,
                      workload.queue_count == 1 ? "" : "s"),
          at_once, *run, kFlush);
    }
  }

  [[nodiscard]] Workload background() const {
    Workload workload;
    workload.name = "background";
    workload.read_percent = 0;
    workload.distribution = Distribution::kSequential;
    workload.block_bytes = kBackgroundBytes;
    workload.depth = kBackgroundDepth;
    workload.run_time = options_.test_time;
    workload.ramp_time = options_.test_time / 10;
    workload.seed = options_.seed;
    return workload;
  }

  // The whole bandwidth is what a writer reaches that flushes now and then, so that no page cache
  // takes it all.
  void background_load() {
    Workload alone = background();
    alone.flush_every = 64;
    const auto whole = measured(target_, {alone}, "bandwidth of writes");
    if (!whole) return;
    const JobResult& writer = whole->result.jobs.front();
    const double writes_per_second = writer.per_second(writer.latencies[kWrite].total());
    if (writes_per_second == 0) return;
    for (const unsigned percent : {0U, 25U, 50U, 75U}) {
      JobGroup group{write_flush(1)};
      if (percent != 0) {
        group.push_back(background());
        group.back().arrival = Arrival::kFixed;
        group.back().rate_per_second = writes_per_second * percent / 100;
      }
      const auto run =
          measured(target_, group, fmt::format("flushes beside {} % of that", percent));
      if (!run) return;
      FlushRow& row =
          add(FlushTest::kBackgroundLoad, fmt::format("{} % load", percent), percent, *run, kFlush);
      row.sharing.reset();
      // What could not write that much is no such load.
      if (percent != 0) row.saturated = row.saturated || run->result.jobs[1].is_saturated();
    }
  }

  // What a flush meets that comes when much has been written to the page cache.
  void streaming() {
    if (!target_.image || blockdev::uses_direct_io(target_.image->image.cache) ||
        !blockdev::has_write_cache(target_.image->image.cache))
      return;
    for (const bool is_behind : {false, true}) {
      TargetOptions target = target_;
      if (is_behind) target.image->image.write_behind_bytes = options_.write_behind_bytes;
      JobGroup group{write_flush(kStreamingFlushesMax), background()};
      group.front().arrival = Arrival::kFixed;
      group.front().rate_per_second = kFlushesPerSecond;
      for (Workload& job : group) job.run_time *= kStreamingFactor;
      const auto run =
          measured(target, group,
                   is_behind ? "flushes beside a stream, write-behind" : "flushes beside a stream");
      if (!run) return;
      FlushRow& row = add(FlushTest::kStreaming, is_behind ? "write-behind" : "no write-behind",
                          is_behind ? 1 : 0, *run, kFlush);
      row.sharing.reset();
      const JobResult& stream = run->result.jobs[1];
      row.stream_bytes_per_second =
          stream.per_second(stream.latencies[kWrite].total()) * kBackgroundBytes;
    }
  }

  void write_through() {
    Workload workload = write_flush(1);
    workload.flush_every = 0;
    workload.write_through = true;
    const auto through = measured(target_, {workload}, "write-through");
    if (through) add(FlushTest::kWriteThrough, "write, stable when done", 0, *through, kWrite);
    const auto flushed = measured(target_, {write_flush(1)}, "write + flush beside it");
    if (through && flushed)
      add(FlushTest::kWriteThrough, "write + flush", 1, *flushed, kWriteAndFlush);
  }

  void burst() {
    Workload workload = write_flush(kBurst);
    workload.run_time = workload.ramp_time = {};
    workload.amount_bytes = std::uint64_t{kBurst} * kWriteBytes;
    workload.idle_time = options_.idle_time;
    const auto run = measured(target_, {workload}, "burst after a rest");
    if (!run) return;
    const double idle_seconds = std::chrono::duration<double>(options_.idle_time).count();
    FlushRow& row = add(FlushTest::kBurst, fmt::format("{} after {:g} s", kBurst, idle_seconds),
                        idle_seconds, *run, kWriteAndFlush);
    row.per_second = 0;
    row.intervals.clear();
  }

  void nothing_to_do() {
    Workload workload = write_flush(1);
    workload.other = Operation::kFlush;
    workload.flush_every = 0;
    const auto run = measured(target_, {workload}, "flushes with nothing to do");
    if (run) add(FlushTest::kNothingToDo, "", 0, *run, kFlush);
    if (!target_.image || !goes_on()) return;
    if (is_qcow2(target_.image->image)) {
      FlushRow row;
      row.target = name_;
      row.test = FlushTest::kNothingToDo;
      row.variant = "each carried out";
      row.x = 1;
      row.timed = timed_name(kFlush);
      row.note = "not with qcow2, which answers such flushes itself";
      report_.rows.push_back(std::move(row));
      return;
    }
    TargetOptions each = target_;
    each.image->image.share_flushes = false;
    const auto real = measured(each, {workload}, "the same, each carried out");
    if (real) add(FlushTest::kNothingToDo, "each carried out", 1, *real, kFlush);
  }

  const FlushSuiteOptions& options_;
  const TargetOptions target_;
  const std::string name_;
  FlushReport& report_;
  bool is_judged_{false};
};

// A small disk that is written and flushed at random; then its power is cut. Returns how many
// writes that were flushed are gone.
class PowerCutTrial {
 public:
  PowerCutTrial(std::uint64_t seed, bool disk_loses_flushes)
      : random_(seed),
        disk_({.size_bytes = kSlots * blockdev::kSectorBytes,
               .seed = seed,
               .loses_flushes = disk_loses_flushes}),
        node_(blockdev::ImageFile::wrap(
                  aio::SimulatedDisk::kDirectFd, aio::SimulatedDisk::kBufferedFd,
                  kSlots * blockdev::kSectorBytes, blockdev::kSectorBytes, false),
              {.name = "simulated"}),
        context_(loop_, std::make_unique<aio::EngineSet>(
                            aio::SimulatedEngine::create(disk_, {.seed = seed}).value())) {
    for (Slot& slot : slots_) slot.trial = this;
  }

  unsigned lost_after(unsigned steps) {
    for (unsigned i = 0; i < steps; ++i) {
      Slot& slot = slots_[random_() % kSlots];
      if (slot.in_flight) {
        context_.poll();
      } else if (random_() % 4 == 0) {
        start_flush(slot);
      } else {
        start_write(slot);
      }
    }
    disk_.power_cut(random_());
    const auto left = disk_.durable();
    unsigned lost = 0;
    for (std::size_t i = 0; i < kSlots; ++i) {
      const auto value = std::to_integer<unsigned>(left[i * blockdev::kSectorBytes]);
      // Later writes may have made it as well, in part of the slots.
      if (value < slots_[i].promised) ++lost;
    }
    context_.drain();
    return lost;
  }

 private:
  static constexpr std::size_t kSlots = 16;
  struct Slot : blockdev::BlockRequest {
    PowerCutTrial* trial{nullptr};
    alignas(512) std::array<std::byte, blockdev::kSectorBytes> data{};
    iovec element{};
    bool in_flight{false};
    unsigned written{0};                            // value of the last write that has completed
    unsigned promised{0};                           // value that a completed flush has made stable
    std::array<unsigned, kSlots> written_before{};  // of all slots, when this flush was submitted
  };

  void start_write(Slot& slot) {
    if (slot.written == 255) return;
    slot.data.fill(std::byte(slot.written + 1));
    slot.element = {slot.data.data(), slot.data.size()};
    slot.operation = blockdev::BlockOperation::kWrite;
    slot.offset_bytes = static_cast<std::uint64_t>(&slot - slots_.data()) * blockdev::kSectorBytes;
    slot.length_bytes = blockdev::kSectorBytes;
    slot.iov = &slot.element;
    slot.iov_count = 1;
    submit(slot, [](blockdev::BlockRequest& request, int /*error*/) {
      Slot& done = static_cast<Slot&>(request);
      done.in_flight = false;
      ++done.written;
    });
  }
  void start_flush(Slot& slot) {
    for (std::size_t i = 0; i < kSlots; ++i) slot.written_before[i] = slots_[i].written;
    slot.operation = blockdev::BlockOperation::kFlush;
    slot.length_bytes = 0;
    submit(slot, [](blockdev::BlockRequest& request, int /*error*/) {
      Slot& done = static_cast<Slot&>(request);
      done.in_flight = false;
      for (std::size_t i = 0; i < kSlots; ++i) {
        Slot& other = done.trial->slots_[i];
        other.promised = std::max(other.promised, done.written_before[i]);
      }
    });
  }
  void submit(Slot& slot, blockdev::BlockRequest::Completion complete) {
    slot.in_flight = true;
    slot.complete = complete;
    node_.submit(slot, context_);
  }

  std::mt19937_64 random_;
  aio::SimulatedDisk disk_;
  blockdev::RawNode node_;
  blockdev::IoLoop loop_;
  blockdev::IoContext context_;
  std::array<Slot, kSlots> slots_;
};

constexpr unsigned kPowerCuts = 400;
constexpr unsigned kStepsMax = 120;

}  // namespace

std::string_view to_string(FlushTest test) {
  switch (test) {
    case FlushTest::kOneByOne:
      return "write + flush";
    case FlushTest::kConcurrency:
      return "concurrency";
    case FlushTest::kBackgroundLoad:
      return "background load";
    case FlushTest::kStreaming:
      return "streaming";
    case FlushTest::kWriteThrough:
      return "write-through";
    case FlushTest::kBurst:
      return "burst";
    case FlushTest::kNothingToDo:
      return "nothing to flush";
  }
  return "?";
}

PowerCutCheck check_power_cuts(std::uint64_t seed) {
  PowerCutCheck check;
  for (unsigned i = 0; i < kPowerCuts; ++i) {
    const unsigned steps = 1 + i % kStepsMax;
    check.lost += PowerCutTrial(seed + i, false).lost_after(steps);
    if (PowerCutTrial(seed + i, true).lost_after(steps) > 0) check.canary_noticed = true;
    ++check.cuts;
  }
  return check;
}

FlushReport run_flush_suite(const FlushSuiteOptions& options) {
  FlushReport report;
  report.power_cuts = check_power_cuts(options.seed);
  if (!options.target.image) {
    Suite(options, options.target, options.target.socket_path, report).run();
    return report;
  }
  for (const aio::EngineName engine : options.engines) {
    for (const blockdev::CacheMode cache : options.caches) {
      TargetOptions target = options.target;
      target.image->aio.engine_of_kind.fill(engine);
      target.image->image.cache = cache;
      Suite(options, target,
            fmt::format("{}, {}", aio::to_string(engine), blockdev::to_string(cache)), report)
          .run();
    }
  }
  return report;
}

}  // namespace vblk::bench
