#include "blockdev/wash/experiment.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string_view>
#include <sys/resource.h>
#include <tuple>
#include <utility>

#include <fmt/core.h>

#include "blockdev/bench/machine_usage.h"
#include "blockdev/wash/digest.h"

namespace vblk::wash {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::string_view kSystemCalls = "system_calls_per_io";
// What a run takes beside its ramp and its measured part: a process, an image, an engine.
constexpr double kSecondsPerRunAtStart = 0.15;

// Uniform, and the same in every standard library.
std::size_t below(std::mt19937_64& random, std::size_t bound) { return random() % bound; }

template <typename Value>
void shuffle(std::vector<Value>& values, std::mt19937_64& random) {
  for (std::size_t i = values.size(); i > 1; --i)
    std::swap(values[i - 1], values[below(random, i)]);
}

// A seed for one purpose, from that of the experiment.
std::uint64_t derived_seed(std::uint64_t seed, const std::string& purpose) {
  return std::stoull(sha256(fmt::format("{} {}", seed, purpose)).substr(0, 16), nullptr, 16);
}

std::chrono::nanoseconds cpu_time_of(int who) {
  rusage usage{};
  ::getrusage(who, &usage);
  const auto time = [](const timeval& value) {
    return std::chrono::seconds(value.tv_sec) + std::chrono::microseconds(value.tv_usec);
  };
  return time(usage.ru_utime) + time(usage.ru_stime);
}

// What others use of the processors while a block runs.
class ForeignLoad {
 public:
  ForeignLoad() : machine_(bench::machine_usage()), ours_(ours()) {}
  // `elsewhere`: of servers that are none of our processes.
  [[nodiscard]] double share(std::chrono::duration<double> elsewhere) const {
    return foreign_share(machine_, bench::machine_usage(), elsewhere + (ours() - ours_));
  }

 private:
  static std::chrono::nanoseconds ours() {
    return cpu_time_of(RUSAGE_SELF) + cpu_time_of(RUSAGE_CHILDREN);
  }
  bench::MachineUsage machine_;
  std::chrono::nanoseconds ours_;
};

using Key = std::tuple<std::string, std::string, int, unsigned>;  // cell, arm, round, attempt

class Conductor {
 public:
  Conductor(const Conduct& conduct, ResultStore& store)
      : conduct_(conduct), store_(store), cells_(cells_of(conduct)) {
    for (const StoredRun& run : store.runs()) remember(run);
    for (const Cell& cell : cells_) planned_ += conduct.preset->rounds * cell.family->arms.size();
  }

  Expected<bool> run() {
    begin_ = Clock::now();
    for (const Cell& cell : cells_) {
      if (auto done = calibrate(cell); !done || !*done) return done;
    }
    for (const Cell& cell : cells_) {
      if (auto done = count_system_calls(cell); !done || !*done) return done;
    }
    for (int round = 0; round < static_cast<int>(conduct_.preset->rounds); ++round) {
      for (const std::size_t index :
           order_of_cells(store_.experiment().seed, round, cells_.size())) {
        if (auto done = run_block(cells_[index], round); !done || !*done) return done;
      }
    }
    return true;
  }

 private:
  void remember(const StoredRun& run) {
    done_.insert({run.cell, run.arm, run.round, run.attempt});
    if (run.error.empty()) any_worked_ = true;
    if (run.round == StoredRun::kCalibration && run.error.empty()) {
      const auto cpu = run.record.metrics.find("cpu");
      if (cpu != run.record.metrics.end()) cpu_us_[run.cell] = cpu->second;
    }
    if (run.block_end) ended_[{run.cell, run.round}] = run.is_kept ? kKept : run.attempt;
  }

  [[nodiscard]] bool is_interrupted() const {
    return conduct_.interrupted != nullptr && *conduct_.interrupted;
  }

  [[nodiscard]] const Device& device_of(const Cell& cell) const {
    return *std::ranges::find(conduct_.devices, cell.device, &Device::name);
  }

  [[nodiscard]] RunSpec spec_of(const Cell& cell, const std::string& arm, int round,
                                unsigned attempt) const {
    const Device& device = device_of(cell);
    const Preset& preset = *conduct_.preset;
    RunSpec spec{.family = cell.family->id,
                 .levels = cell.levels,
                 .arm = arm,
                 .image_path = device.name == "files" ? "" : device.path,
                 .directory = device.name == "files" ? device.path : "",
                 .region_bytes = device.region_bytes,
                 .run_time = cell.family->run_times * preset.run_time,
                 .ramp_time = preset.ramp_time,
                 .idle_time = preset.idle_time,
                 .peer = conduct_.peer,
                 .count_system_calls = round == StoredRun::kCounting};
    // All arms of a block do the same.
    spec.seed = derived_seed(store_.experiment().seed,
                             fmt::format("load {} {} {}", cell.id, round, attempt));
    const auto cpu = cpu_us_.find(cell.id);
    if (conduct_.analysis->arms.at(arm).slowed && cpu != cpu_us_.end())
      spec.spin_ns = cpu->second * 1000 * preset.slowdown;
    return spec;
  }

  // How much processor time a request takes is known before some of it is injected.
  Expected<bool> calibrate(const Cell& cell) {
    const auto& arms = cell.family->arms;
    const bool has_slowed = std::ranges::any_of(
        arms, [this](const std::string& arm) { return conduct_.analysis->arms.at(arm).slowed; });
    const std::string& reference = conduct_.analysis->controls.slowed_against;
    if (!has_slowed || done_.contains({cell.id, reference, StoredRun::kCalibration, 0}))
      return true;
    StoredRun run = carry_out(cell, reference, StoredRun::kCalibration, 0);
    if (is_interrupted()) return false;
    if (auto stored = keep(std::move(run)); !stored) return std::unexpected(stored.error());
    --done_runs_;
    return true;
  }

  // What claims are to tell of system calls, each arm once: to count them makes them slower.
  Expected<bool> count_system_calls(const Cell& cell) {
    std::set<std::string> arms;
    for (const Claim& claim : conduct_.analysis->claims) {
      for (const Comparison& comparison : claim.comparisons) {
        if (applies_to(comparison, cell) &&
            std::ranges::find(comparison.reports, kSystemCalls) != comparison.reports.end())
          arms.insert({comparison.aio, comparison.threads});
      }
    }
    for (const std::string& arm : arms) {
      if (done_.contains({cell.id, arm, StoredRun::kCounting, 0})) continue;
      StoredRun run = carry_out(cell, arm, StoredRun::kCounting, 0);
      if (is_interrupted()) return false;
      if (auto stored = keep(std::move(run)); !stored) return std::unexpected(stored.error());
      --done_runs_;
    }
    return true;
  }

  // Again while it is noisy and may be repeated.
  Expected<bool> run_block(const Cell& cell, int round) {
    unsigned attempt = 0;
    if (const auto ended = ended_.find({cell.id, round}); ended != ended_.end()) {
      if (ended->second == kKept) {
        done_runs_ += cell.family->arms.size();
        return true;
      }
      attempt = ended->second + 1;
    }
    for (;; ++attempt) {
      const auto kept = run_attempt(cell, round, attempt);
      if (!kept) return std::unexpected(kept.error());
      if (is_interrupted()) return false;
      if (*kept) return true;
    }
  }

  // False: it is not kept, or was interrupted. What was interrupted begins anew when the experiment
  // goes on, for its runs must lie side by side.
  Expected<bool> run_attempt(const Cell& cell, int round, unsigned attempt) {
    std::vector<std::string> arms;
    for (const auto& arm : order_of_arms(store_.experiment().seed, round, attempt, cell)) {
      const auto failures = failures_.find({cell.id, arm});
      if (failures == failures_.end() || failures->second < kFailuresMax) arms.push_back(arm);
    }
    done_runs_ += cell.family->arms.size() - arms.size();
    double steal = 0;
    std::chrono::duration<double> elsewhere{0};
    bool failed = false;
    const ForeignLoad foreign;
    for (const std::string& arm : arms) {
      StoredRun run = carry_out(cell, arm, round, attempt);
      if (is_interrupted()) return false;
      steal += run.record.steal_share / static_cast<double>(arms.size());
      if (const auto served = run.record.counters.find(RunRecord::kServedElsewhere);
          served != run.record.counters.end())
        elsewhere += std::chrono::duration<double>(served->second);
      failed = failed || !run.error.empty();
      run.block_end = &arm == &arms.back();
      if (run.block_end) {
        judge_noise(cell, run, steal, foreign.share(elsewhere));
        run.is_kept = (!run.noisy && !failed) || attempt >= conduct_.preset->reruns_max;
      }
      const bool is_kept = run.is_kept;
      if (auto stored = keep(std::move(run)); !stored) return std::unexpected(stored.error());
      if (!is_kept) {
        done_runs_ -= cell.family->arms.size();
        return false;
      }
    }
    return true;
  }

  void judge_noise(const Cell& cell, StoredRun& run, double steal_share,
                   double foreign_share) const {
    const Rules& rules = conduct_.analysis->rules;
    // A loop device works in threads of the kernel that are nobody's.
    const bool is_foreign_known = cell.device != "ram";
    run.foreign_share = foreign_share;
    run.noisy =
        steal_share > rules.steal_max || (is_foreign_known && foreign_share > rules.foreign_max);
  }

  // A signal reaches the run, too: what an interrupted one says is not to be kept.
  StoredRun carry_out(const Cell& cell, const std::string& arm, int round, unsigned attempt) {
    show(fmt::format("{} {}", cell.id, arm));
    StoredRun run{.cell = cell.id, .arm = arm, .round = round, .attempt = attempt};
    auto record = conduct_.carry_out(spec_of(cell, arm, round, attempt));
    if (record) {
      run.record = std::move(*record);
    } else {
      run.error = record.error().message;
    }
    return run;
  }

  Expected<void> keep(StoredRun run) {
    remember(run);
    ++done_runs_;
    ++runs_here_;
    const std::string error = run.error;
    unsigned& failures = failures_[{run.cell, run.arm}];
    failures = error.empty() ? 0 : failures + 1;
    failures_of_all_ = error.empty() ? 0 : failures_of_all_ + 1;
    if (auto stored = store_.append(std::move(run)); !stored) return stored;
    // Where not even the first things can be done, the rest would be the same message.
    constexpr std::size_t kHopeless = 5;
    if (failures_of_all_ >= (any_worked_ ? kFailuresOfAllMax : kHopeless))
      return make_error(ErrorKind::kIo, error);
    return {};
  }

  void show(const std::string& what) {
    const auto now = Clock::now();
    if (!conduct_.show || now - last_shown_ < std::chrono::seconds(1)) return;
    last_shown_ = now;
    const Preset& preset = *conduct_.preset;
    const double spent = std::chrono::duration<double>(now - begin_).count();
    const double planned =
        std::chrono::duration<double>(preset.run_time + preset.ramp_time).count() +
        kSecondsPerRunAtStart;
    const double pace = runs_here_ < 10 ? planned : spent / static_cast<double>(runs_here_);
    const std::size_t left = planned_ > done_runs_ ? planned_ - done_runs_ : 0;
    conduct_.show(what, done_runs_, planned_, pace * static_cast<double>(left));
  }

  static constexpr unsigned kKept = ~0U;

  const Conduct& conduct_;
  ResultStore& store_;
  const std::vector<Cell> cells_;
  std::set<Key> done_;
  // Cell, arm: how often in a row, since this process began.
  std::map<std::pair<std::string, std::string>, unsigned> failures_;
  std::size_t failures_of_all_{0};
  std::map<std::pair<std::string, int>, unsigned> ended_;  // cell, round: last attempt, or kKept
  std::map<std::string, double> cpu_us_;                   // of a request, by cell
  bool any_worked_{false};
  std::size_t planned_{0};
  std::size_t done_runs_{0};
  std::size_t runs_here_{0};
  Clock::time_point begin_;
  Clock::time_point last_shown_;
};

}  // namespace

double foreign_share(const bench::MachineUsage& before, const bench::MachineUsage& after,
                     std::chrono::duration<double> own) {
  const std::chrono::duration<double> busy = after.busy - before.busy;
  const auto all = busy + (after.idle - before.idle) + (after.steal - before.steal);
  return all.count() <= 0 ? 0 : std::max(0.0, (busy - own) / all);
}

std::vector<Cell> cells_of(const Conduct& conduct) {
  std::vector<std::string> names;
  names.reserve(conduct.devices.size());
  for (const Device& device : conduct.devices) names.push_back(device.name);
  auto cells = cells_of(*conduct.analysis, *conduct.preset, names);
  std::erase_if(cells, [&](const Cell& cell) {
    return cell.family->kind == Kind::kServe && conduct.peer.empty();
  });
  return cells;
}

std::vector<std::size_t> order_of_cells(std::uint64_t seed, int round, std::size_t cell_count) {
  std::vector<std::size_t> order(cell_count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::mt19937_64 random(derived_seed(seed, fmt::format("cells {}", round)));
  shuffle(order, random);
  return order;
}

std::vector<std::string> order_of_arms(std::uint64_t seed, int round, unsigned attempt,
                                       const Cell& cell) {
  std::vector<std::string> arms = cell.family->arms;
  std::mt19937_64 random(derived_seed(seed, fmt::format("arms {} {} {}", cell.id, round, attempt)));
  shuffle(arms, random);
  return arms;
}

Expected<bool> conduct_experiment(const Conduct& conduct, ResultStore& store) {
  return Conductor(conduct, store).run();
}

}  // namespace vblk::wash
