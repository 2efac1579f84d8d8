// From devices to verdicts: simulated disks of known latencies under a closed loop, through the
// histogram and its percentiles, to what is said of the two engines.
//
// Time is simulated, too: a disk of so many channels serves requests one by one, each for a time
// drawn from its distribution; an engine adds its overhead to each. So a run of thousands of
// requests takes microseconds, and its truth can be calculated.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <queue>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/bench/latency_histogram.h"
#include "blockdev/wash/judge.h"
#include "blockdev/wash/run.h"
#include "tests/support/seed.h"

namespace vblk::wash {
namespace {

struct Disk {
  double median_us{100};
  double spread{
      0.5};  // of the logarithm; the 99th percentile is exp(2.326 spread) times the median
  unsigned channels{8};
  double stall_chance{0};  // of a request
  double stall_us{0};
};

struct Engine {
  double overhead_us{0};  // of each request, before it reaches the disk
  double cpu_us{10};
};

constexpr double kZ99 = 2.3263478740408408;

// `requests` requests with `depth` of them in flight, on a machine that is `slow` times as slow.
RunRecord simulate(const Disk& disk, const Engine& engine, unsigned depth, unsigned requests,
                   double slow, std::mt19937_64& random) {
  std::lognormal_distribution<double> service(std::log(disk.median_us), disk.spread);
  std::uniform_real_distribution<double> uniform(0, 1);
  using Times = std::priority_queue<double, std::vector<double>, std::greater<>>;
  Times channels_free;  // when
  for (unsigned i = 0; i < disk.channels; ++i) channels_free.push(0);
  Times done;  // of requests in flight
  bench::LatencyHistogram latencies;
  double now = 0;
  for (unsigned i = 0; i < requests; ++i) {
    if (done.size() == depth) {
      now = done.top();
      done.pop();
    }
    const double reaches_disk = now + engine.overhead_us * slow;
    const double begins = std::max(reaches_disk, channels_free.top());
    channels_free.pop();
    const double stall = uniform(random) < disk.stall_chance ? disk.stall_us : 0;
    const double ends = begins + (service(random) + stall) * slow;
    channels_free.push(ends);
    done.push(ends);
    latencies.add(static_cast<std::uint64_t>((ends - now) * 1000));
  }
  RunRecord record;
  add_latencies(record, latencies);
  record.metrics["rate"] = requests / now * 1e6;
  record.metrics["cpu"] = engine.cpu_us * slow;
  return record;
}

TEST(SimulatedDisk, has_the_percentiles_that_it_was_given) {
  std::mt19937_64 random(test::test_seed());
  const Disk disk{.median_us = 250, .spread = 0.4};
  const RunRecord record = simulate(disk, {.overhead_us = 50}, 1, 100'000, 1, random);
  // The histogram is off by 0.8 % at most; of 100,000 samples a p99 by some 0.6 %, a median by 0.2
  // %.
  EXPECT_NEAR(record.metrics.at("p50"), 300, 300 * 0.03);
  EXPECT_NEAR(record.metrics.at("p99"), 50 + 250 * std::exp(kZ99 * 0.4),
              (50 + 250 * std::exp(kZ99 * 0.4)) * 0.06);
}

// All runs of the family "core" in the smoke preset on simulated disks.
class DeviceLaboratory {
 public:
  explicit DeviceLaboratory(const Disk& disk)
      : preset_(*registered_analysis().preset("smoke")),
        cells_(cells_of(registered_analysis(), preset_, {"image"})),
        disk_(disk) {
    std::erase_if(cells_, [](const Cell& cell) { return cell.family->id != "core"; });
    preset_.slowdown = 0.2;
    engines_["threads-slowed"].cpu_us = 12;
  }
  DeviceLaboratory& engine(const std::string& arm, const Engine& engine) {
    engines_[arm] = engine;
    return *this;
  }
  // The machine becomes slower by so much from the first run to the last.
  DeviceLaboratory& drift(double factor) {
    drift_ = factor;
    return *this;
  }
  DeviceLaboratory& requests(unsigned count) {
    requests_ = count;
    return *this;
  }
  Judgement experiment(std::uint64_t seed, int rounds) {
    std::mt19937_64 random(seed);
    // What processor time differs by from run to run.
    std::normal_distribution<double> noise(0, 0.01);
    std::vector<StoredRun> runs;
    const double all = static_cast<double>(rounds) * static_cast<double>(cells_.size()) * 7;
    for (int round = 0; round < rounds; ++round) {
      for (const Cell& cell : cells_) {
        std::vector<std::string> arms = cell.family->arms;
        std::ranges::shuffle(arms, random);
        for (const std::string& arm : arms) {
          const double slow = 1 + (drift_ - 1) * static_cast<double>(runs.size()) / all;
          StoredRun run{.cell = cell.id, .arm = arm, .round = round};
          run.block_end = arm == arms.back();
          const auto depth = static_cast<unsigned>(std::stoul(level_of(cell, "iodepth")));
          run.record = simulate(disk_, engines_[arm], depth, requests_, slow, random);
          run.record.metrics["cpu"] *= std::exp(noise(random));
          runs.push_back(std::move(run));
        }
      }
    }
    return judge(registered_analysis(), preset_, cells_, runs);
  }

 private:
  Preset preset_;
  std::vector<Cell> cells_;
  Disk disk_;
  std::map<std::string, Engine> engines_;
  double drift_{1};
  unsigned requests_{3'000};
};

const ClaimResult& claim_of(const Judgement& judgement, const std::string& id) {
  return *std::ranges::find(judgement.claims, id,
                            [](const ClaimResult& result) { return result.claim->id; });
}

std::string outcome_of(const Judgement& judgement, const std::string& metric) {
  for (const MetricOutcome& one : claim_of(judgement, "C0").metrics) {
    if (one.metric == metric) return one.outcome;
  }
  return "no such metric";
}

constexpr int kRounds = 26;

TEST(Device, of_a_quiet_machine_makes_equal_engines_a_wash) {
  const auto judgement = DeviceLaboratory({}).experiment(test::test_seed(), kRounds);
  EXPECT_EQ(judgement.controls.refusal, "");
  for (const char* metric : {"rate", "p50", "p99", "cpu"})
    EXPECT_EQ(outcome_of(judgement, metric), "WASH") << metric;
  EXPECT_EQ(claim_of(judgement, "C0").outcome, "HOLDS");
}

TEST(Device, shows_an_overhead_of_a_fifth_of_its_median_as_that) {
  // 20 us on 100 us at depth 1: the median is 1.2 times as long, the mean, which the rate is made
  // of, 1 + 20 / (100 exp(0.5^2 / 2)) = 1.176 times.
  const auto judgement = DeviceLaboratory({})
                             .engine("threads", {.overhead_us = 20})
                             .engine("threads-again", {.overhead_us = 20})
                             .engine("threads-slowed", {.overhead_us = 20, .cpu_us = 12})
                             .experiment(test::test_seed(), kRounds);
  for (const CellVerdict& cell : claim_of(judgement, "C0").comparisons.front().cells) {
    if (!cell.cell.ends_with("randread-1")) continue;
    if (cell.metric == "p50") {
      EXPECT_EQ(cell.verdict, Verdict::kAioWins);
      EXPECT_NEAR(std::exp(cell.log_ratio.mean), 1 / 1.2, 0.04);
    }
    if (cell.metric == "rate") {
      EXPECT_EQ(cell.verdict, Verdict::kAioWins);
      EXPECT_NEAR(std::exp(cell.log_ratio.mean), 1.176, 0.03);
    }
    if (cell.metric == "cpu") {
      EXPECT_EQ(cell.verdict, Verdict::kWash);
    }
  }
  EXPECT_EQ(claim_of(judgement, "C0").outcome, "DOES NOT HOLD");
}

TEST(Device, drowns_the_same_overhead_when_it_is_slow) {
  const auto judgement = DeviceLaboratory({.median_us = 4000})
                             .engine("threads", {.overhead_us = 20})
                             .engine("threads-again", {.overhead_us = 20})
                             .engine("threads-slowed", {.overhead_us = 20, .cpu_us = 12})
                             .experiment(test::test_seed(), kRounds);
  EXPECT_EQ(claim_of(judgement, "C0").outcome, "HOLDS") << "half a percent is within the margin";
}

TEST(Device, that_becomes_half_as_fast_fools_nobody) {
  const auto judgement = DeviceLaboratory({}).drift(2).experiment(test::test_seed(), kRounds);
  EXPECT_EQ(judgement.controls.refusal, "");
  EXPECT_EQ(claim_of(judgement, "C0").outcome, "HOLDS");
}

// One request in 50 stands still for ten times the median: nothing of that is in the median, all of
// it in p99, and what all engines meet alike is no difference between them.
TEST(Device, that_stalls_is_seen_in_the_tail_and_in_no_comparison) {
  const auto p99_of = [](const Judgement& result) {
    for (const CellVerdict& cell : claim_of(result, "C0").comparisons.front().cells) {
      if (cell.metric == "p99" && cell.cell.ends_with("randread-1")) return cell.threads_median;
    }
    return 0.0;
  };
  const auto quiet = DeviceLaboratory({}).experiment(test::test_seed(), kRounds);
  const auto stalling = DeviceLaboratory({.stall_chance = 0.02, .stall_us = 1000})
                            .experiment(test::test_seed(), kRounds);
  EXPECT_GT(p99_of(stalling), 3 * p99_of(quiet));
  EXPECT_EQ(outcome_of(stalling, "p50"), "WASH");
  EXPECT_NE(claim_of(stalling, "C0").outcome, "DOES NOT HOLD");
}

TEST(Device, with_too_few_requests_for_a_percentile_has_none) {
  const auto judgement = DeviceLaboratory({}).requests(999).experiment(test::test_seed(), 4);
  EXPECT_EQ(outcome_of(judgement, "p99"), "NOT MEASURED") << "1,000 are needed";
  EXPECT_NE(outcome_of(judgement, "p50"), "NOT MEASURED");
  EXPECT_NE(claim_of(judgement, "C0").outcome, "HOLDS");
}

}  // namespace
}  // namespace vblk::wash
