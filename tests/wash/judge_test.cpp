// Whole experiments on simulated engines, whose truth is known: what is found, what is not, and
// what no verdict is given for.
#include "blockdev/wash/judge.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include <gtest/gtest.h>

#include "blockdev/wash/experiment.h"
#include "tests/support/seed.h"

namespace vblk::wash {
namespace {

// An engine's truth: what its metrics are, relative to the pool.
struct Truth {
  double rate{1};
  double latency{1};
  double cpu{1};
};

// What a run gives in the end, where that is not what an engine's truth says.
using Change = std::function<void(const Cell& cell, const std::string& arm, int round, RunRecord&)>;

// Runs as they would be stored, of all cells of some families in a preset, with metrics that a
// machine of some noise and drift would give.
class Laboratory {
 public:
  explicit Laboratory(const std::string& preset = "smoke",
                      const std::set<std::string>& families = {"core"})
      : preset_(*registered_analysis().preset(preset)),
        cells_(cells_of(registered_analysis(), preset_, {"image", "files", "none"})) {
    std::erase_if(cells_, [&](const Cell& cell) { return !families.contains(cell.family->id); });
    preset_.slowdown = 0.2;
    preset_.noisy_share_max = 0.25;
    truths_["threads-slowed"].cpu = 1.2;
  }

  Laboratory& truth(const std::string& arm, Truth truth) {
    truths_[arm] = truth;
    return *this;
  }
  Laboratory& noise(double deviation) {
    noise_ = deviation;
    return *this;
  }
  // The machine gets slower by so much from the first run to the last.
  Laboratory& drift(double factor) {
    drift_ = factor;
    return *this;
  }
  Laboratory& noisy_blocks(bool noisy) {
    noisy_ = noisy;
    return *this;
  }
  // So many cells are blind to the slowdown.
  Laboratory& blind_cells(std::size_t count) {
    blind_cells_ = count;
    return *this;
  }
  Laboratory& change(Change change) {
    change_ = std::move(change);
    return *this;
  }
  // Leaves a metric out of the first so many rounds of an arm in every cell.
  Laboratory& without(const std::string& lacking, const std::string& metric, int rounds) {
    return change([=](const Cell&, const std::string& arm, int round, RunRecord& record) {
      if (arm == lacking && round < rounds) record.metrics.erase(metric);
    });
  }
  [[nodiscard]] std::size_t cells() const { return cells_.size(); }
  Laboratory& rounds(int count) {
    rounds_ = count;
    return *this;
  }

  Judgement experiment(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal(0, noise_);
    std::vector<StoredRun> runs;
    const auto total = static_cast<double>(rounds_) * static_cast<double>(cells_.size()) * 7;
    for (int round = 0; round < rounds_; ++round) {
      for (const std::size_t index : order_of_cells(seed, round, cells_.size())) {
        const auto arms = order_of_arms(seed, round, 0, cells_[index]);
        for (const std::string& arm : arms) {
          const double slow = 1 + (drift_ - 1) * static_cast<double>(runs.size()) / total;
          Truth truth = truths_[arm];
          if (arm == "threads-slowed" && index < blind_cells_) truth = {};
          StoredRun run{.cell = cells_[index].id, .arm = arm, .round = round};
          run.block_end = &arm == &arms.back();
          run.noisy = noisy_ && run.block_end;
          const auto sample = [&](double value) { return value * std::exp(normal(random)); };
          run.record.metrics = {{"rate", sample(20000 * truth.rate / slow)},
                                {"p50", sample(100 * truth.latency * slow)},
                                {"p99", sample(300 * truth.latency * slow)},
                                {"cpu", sample(10 * truth.cpu * slow)},
                                {"per_wakeup", sample(8)},
                                {"per_call", sample(8)},
                                {"submit_max", sample(100)},
                                {"stream_rate", sample(1000)}};
          run.record.samples = 5000;
          if (change_) change_(cells_[index], arm, round, run.record);
          runs.push_back(std::move(run));
        }
      }
    }
    return judge(registered_analysis(), preset_, cells_, runs);
  }

 private:
  Preset preset_;
  std::vector<Cell> cells_;
  std::map<std::string, Truth> truths_;
  double noise_{0.01};
  double drift_{1};
  bool noisy_{false};
  std::size_t blind_cells_{0};
  Change change_;
  int rounds_{12};
};

const ClaimResult& claim(const Judgement& judgement, const std::string& id) {
  return *std::ranges::find(judgement.claims, id,
                            [](const ClaimResult& result) { return result.claim->id; });
}

std::string outcome(const Judgement& judgement, const std::string& id, const std::string& metric) {
  for (const MetricOutcome& one : claim(judgement, id).metrics) {
    if (one.metric == metric) return one.outcome;
  }
  return "no such metric";
}

TEST(Judge, calls_engines_that_are_alike_a_wash) {
  const auto judgement = Laboratory().experiment(test::test_seed());
  EXPECT_EQ(judgement.controls.refusal, "");
  for (const char* metric : {"rate", "p50", "p99", "cpu"})
    EXPECT_EQ(outcome(judgement, "C0", metric), "WASH") << metric;
  EXPECT_EQ(claim(judgement, "C0").outcome, "HOLDS");
  EXPECT_EQ(claim(judgement, "C3").outcome, "HOLDS");
  EXPECT_EQ(claim(judgement, "C9").outcome, "NOT MEASURED");
}

TEST(Judge, finds_ten_percent_of_processor_time_and_nothing_else) {
  const auto judgement =
      Laboratory().truth("native", {.cpu = 1 / 1.1}).experiment(test::test_seed());
  EXPECT_EQ(outcome(judgement, "C0", "rate"), "WASH");
  EXPECT_EQ(outcome(judgement, "C0", "cpu"), "AIO WINS");
  EXPECT_EQ(claim(judgement, "C0").outcome, "DOES NOT HOLD");
}

TEST(Judge, knows_which_side_is_better_by_each_metric) {
  const auto judgement = Laboratory()
                             .truth("native", {.rate = 0.8, .latency = 1.3, .cpu = 1.2})
                             .experiment(test::test_seed());
  for (const char* metric : {"rate", "p50", "p99", "cpu"})
    EXPECT_EQ(outcome(judgement, "C0", metric), "THREADS WIN") << metric;
}

TEST(Judge, is_not_fooled_by_a_machine_that_becomes_half_as_fast) {
  const auto judgement = Laboratory().drift(2).experiment(test::test_seed());
  EXPECT_EQ(judgement.controls.refusal, "");
  EXPECT_EQ(claim(judgement, "C0").outcome, "HOLDS");
  const auto found =
      Laboratory().drift(2).truth("native", {.rate = 1.1}).experiment(test::test_seed());
  EXPECT_EQ(outcome(found, "C0", "rate"), "AIO WINS");
}

TEST(Judge, gives_no_verdict_where_an_injected_slowdown_is_not_found) {
  const auto judgement = Laboratory().truth("threads-slowed", {}).experiment(test::test_seed());
  EXPECT_NE(judgement.controls.refusal.find("blind"), std::string::npos);
  EXPECT_EQ(claim(judgement, "C0").outcome, "NO VERDICT");
  EXPECT_EQ(outcome(judgement, "C0", "rate"), "NO VERDICT");
}

TEST(Judge, is_content_with_a_slowdown_found_in_four_cells_of_five) {
  const std::size_t blind_most = Laboratory("standard").cells() / 5;
  ASSERT_GT(blind_most, 0U);
  const auto enough = Laboratory("standard").blind_cells(blind_most).experiment(test::test_seed());
  EXPECT_EQ(enough.controls.refusal, "");
  const auto too_few =
      Laboratory("standard").blind_cells(blind_most + 1).experiment(test::test_seed());
  EXPECT_NE(too_few.controls.refusal.find("blind"), std::string::npos);
}

TEST(Judge, gives_no_verdict_where_an_engine_differs_from_itself) {
  const auto judgement =
      Laboratory().truth("threads-again", {.latency = 1.5}).experiment(test::test_seed());
  EXPECT_EQ(outcome(judgement, "C0", "p99"), "NO VERDICT");
  EXPECT_EQ(outcome(judgement, "C0", "rate"), "WASH") << "each metric has its own control";
}

// Where runs differ by a factor of e, a slowdown of 20 % is found by luck alone: seldom.
TEST(Judge, gives_no_verdict_on_a_machine_that_is_too_noisy) {
  const std::uint64_t seed = test::test_seed();
  unsigned refused = 0;
  for (std::uint64_t i = 0; i < 10; ++i) {
    const auto noise = Laboratory().noise(1).experiment(seed + i);
    if (claim(noise, "C0").outcome == "NO VERDICT") ++refused;
  }
  EXPECT_GE(refused, 5);
  const auto blocks = Laboratory().noisy_blocks(true).experiment(seed);
  EXPECT_NE(blocks.controls.refusal.find("noisy"), std::string::npos);
}

TEST(Judge, does_not_take_a_single_block_for_anything) {
  const auto judgement = Laboratory().rounds(1).experiment(test::test_seed());
  EXPECT_EQ(claim(judgement, "C0").outcome, "NOT MEASURED");
  EXPECT_FALSE(judgement.controls.refusal.empty());
}

// 200 experiments in which nothing differs, on a quiet and on a loud machine. Each metric of C0 is
// a family whose chance of a wrong win is at most 5 %; four metrics make 20 % at most.
// VBLK_JUDGE_RUNS: how many experiments.
TEST(Judge, calls_no_more_winners_among_equals_than_promised) {
  const std::uint64_t seed = test::test_seed();
  const char* const given = std::getenv("VBLK_JUDGE_RUNS");
  const std::uint64_t runs = given == nullptr ? 200 : std::stoull(given);
  for (const double noise : {0.02, 0.15}) {
    unsigned families = 0;
    unsigned wrong = 0;
    for (std::uint64_t i = 0; i < runs; ++i) {
      const auto judgement = Laboratory().noise(noise).rounds(8).experiment(seed + i);
      for (const ComparisonResult& comparison : claim(judgement, "C0").comparisons) {
        std::map<std::string, bool> wins;
        for (const CellVerdict& cell : comparison.cells) {
          wins[cell.metric] = wins[cell.metric] || cell.verdict == Verdict::kAioWins ||
                              cell.verdict == Verdict::kThreadsWin;
        }
        for (const auto& [metric, any] : wins) {
          ++families;
          if (any) ++wrong;
        }
      }
    }
    // 5 %, and four standard deviations.
    EXPECT_LE(wrong, 0.05 * families + 4 * std::sqrt(0.05 * 0.95 * families))
        << "of " << families << " at noise " << noise;
  }
}

const CellVerdict& first_cell(const Judgement& judgement, const std::string& id,
                              const std::string& metric) {
  for (const CellVerdict& cell : claim(judgement, id).comparisons.front().cells) {
    if (cell.metric == metric) return cell;
  }
  throw std::runtime_error("no cell by " + metric);
}

TEST(Judge, says_how_many_blocks_a_cell_rests_on_and_what_the_others_lack) {
  const auto judgement = Laboratory().without("native", "p99", 2).experiment(test::test_seed());
  const CellVerdict& cell = first_cell(judgement, "C0", "p99");
  EXPECT_EQ(cell.verdict, Verdict::kWash);
  EXPECT_EQ(cell.log_ratio.count, 10U);
  EXPECT_EQ(cell.blocks_of, 12U);
  EXPECT_EQ(cell.missing, "native: too few samples for p99 (5000 at most) in 2");
  EXPECT_EQ(first_cell(judgement, "C0", "p50").missing, "");
}

TEST(Judge, takes_a_cell_that_lacks_more_than_a_fifth_of_its_blocks_for_not_measured) {
  const auto judgement = Laboratory()
                             .change([](const Cell&, const std::string& arm, int round, auto& run) {
                               if (arm != "threads" || round >= 3) return;
                               // The disk stood still.
                               run.metrics = {{"rate", 0}};
                               run.samples = 0;
                             })
                             .experiment(test::test_seed());
  const CellVerdict& cell = first_cell(judgement, "C0", "rate");
  EXPECT_EQ(cell.verdict, Verdict::kNotMeasured);
  EXPECT_EQ(cell.reason, "9 of 12 blocks have it: threads: no operation ended in time in 3")
      << "it blames the side that lacks it";
  EXPECT_EQ(cell.log_ratio.count, 9U);
}

TEST(Judge, names_each_side_that_lacks_something) {
  const auto judgement = Laboratory()
                             .change([](const Cell&, const std::string& arm, int round, auto& run) {
                               if (arm == "threads" && round < 2) run.saturated = true;
                               if (arm == "native" && round < 5) run.samples = 580;
                               if (run.saturated || run.samples == 580) run.metrics.erase("p99");
                             })
                             .experiment(test::test_seed());
  EXPECT_EQ(first_cell(judgement, "C0", "p99").reason,
            "7 of 12 blocks have it: native: too few samples for p99 (580 at most) in 5, threads "
            "could not follow the rate in 2");
}

TEST(Judge, lets_no_claim_hold_of_which_a_part_was_not_measured) {
  const auto judgement = Laboratory().without("native", "p99", 12).experiment(test::test_seed());
  EXPECT_EQ(outcome(judgement, "C0", "p99"), "NOT MEASURED");
  EXPECT_EQ(outcome(judgement, "C0", "rate"), "WASH");
  EXPECT_EQ(claim(judgement, "C0").outcome, "INCONCLUSIVE");
  EXPECT_NE(claim(judgement, "C0").words.find("not measured)"), std::string::npos)
      << claim(judgement, "C0").words;
  const auto refuted = Laboratory()
                           .without("native", "p99", 12)
                           .truth("native", {.cpu = 0.5})
                           .experiment(test::test_seed());
  EXPECT_EQ(claim(refuted, "C0").outcome, "DOES NOT HOLD") << "one metric is enough for that";
}

TEST(Judge, takes_shares_of_all_cells_and_not_of_those_that_were_measured) {
  // One cell of two is a wash, the other was not measured.
  const auto judgement =
      Laboratory()
          .change([](const Cell& cell, const std::string& arm, int, RunRecord& record) {
            if (arm == "native" && level_of(cell, "iodepth") == "1") record.metrics.erase("rate");
          })
          .experiment(test::test_seed());
  EXPECT_EQ(outcome(judgement, "C0", "rate"), "INCONCLUSIVE");
}

// The pool's extra processor time by the rate, in cores; the rest of a core is the same.
Laboratory rates(const std::function<double(double rate)>& extra_cores) {
  Laboratory laboratory("standard", {"core", "rates"});
  laboratory.change([=](const Cell& cell, const std::string& arm, int, RunRecord& record) {
    const std::string rate = level_of(cell, "rate_iops");
    if (rate.empty()) return;
    const double per_second = std::stod(rate);
    const double extra = arm == "threads" ? extra_cores(per_second) : 0;
    record.metrics["cpu"] += extra / per_second * 1e6;
  });
  return laboratory;
}

TEST(Judge, finds_where_a_pool_costs_a_twentieth_of_a_core) {
  // At 20,000 per second.
  const auto judgement =
      rates([](double rate) { return 2.5e-6 * rate; }).noise(0.001).experiment(test::test_seed());
  EXPECT_EQ(claim(judgement, "C4").outcome, "HOLDS") << claim(judgement, "C4").words;
  const auto early =
      rates([](double rate) { return 25e-6 * rate; }).noise(0.001).experiment(test::test_seed());
  EXPECT_EQ(claim(early, "C4").outcome, "DOES NOT HOLD") << claim(early, "C4").words;
}

TEST(Judge, takes_no_crossover_from_a_line_that_describes_nothing) {
  // Much at low rates, then less: no line.
  const auto judgement = rates([](double rate) { return rate < 10000 ? 0.5 : 0.2; })
                             .noise(0.001)
                             .experiment(test::test_seed());
  EXPECT_EQ(claim(judgement, "C4").outcome, "INCONCLUSIVE") << claim(judgement, "C4").words;
}

TEST(Judge, calls_it_no_crossover_where_latency_is_won_at_low_rates) {
  const auto judgement = rates([](double rate) { return 2.5e-6 * rate; })
                             .truth("native", {.latency = 0.7})
                             .noise(0.001)
                             .experiment(test::test_seed());
  EXPECT_EQ(claim(judgement, "C4").outcome, "DOES NOT HOLD") << claim(judgement, "C4").words;
}

// A metric of an arm, in all cells of a family or in those with a level, times something.
struct Factor {
  std::string arm;
  std::string metric;
  double factor{1};
  std::string level;  // empty: any
  std::string value;
};
Judgement with(const std::set<std::string>& families, const std::vector<Factor>& factors) {
  return Laboratory("smoke", families)
      .change([=](const Cell& cell, const std::string& arm, int, RunRecord& record) {
        for (const Factor& one : factors) {
          if (one.arm == arm && (one.level.empty() || level_of(cell, one.level) == one.value))
            record.metrics[one.metric] *= one.factor;
        }
      })
      .experiment(test::test_seed());
}

TEST(Judge, believes_that_only_aio_retrieves_many_where_the_pool_retrieves_one) {
  const auto retrieving = [](double native, double threads) {
    return with({"core"}, {{"native", "per_wakeup", native / 8},
                           {"threads", "per_wakeup", threads / 8},
                           {"threads-again", "per_wakeup", threads / 8}});
  };
  const auto said = [&](double native, double threads) {
    return claim(retrieving(native, threads), "C1b").outcome;
  };
  EXPECT_EQ(said(8, 1), "HOLDS");
  EXPECT_EQ(said(8, 8), "DOES NOT HOLD") << "as many";
  EXPECT_EQ(said(16, 4), "DOES NOT HOLD") << "fewer, and yet many";
  EXPECT_EQ(said(8, 1.5), "INCONCLUSIVE") << "neither one nor many";
  EXPECT_EQ(said(1.5, 1), "DOES NOT HOLD") << "AIO does not either";
}

TEST(Judge, looks_at_calls_to_see_whether_batching_is_kept) {
  EXPECT_EQ(claim(with({"core"}, {}), "C7a").outcome, "HOLDS");
  // One call for each request is none, however cheap it is.
  const auto dear =
      with({"core"}, {{"kernel-pool", "per_call", 1.0 / 8}, {"kernel-pool", "cpu", 0.5}});
  EXPECT_EQ(claim(dear, "C7a").outcome, "DOES NOT HOLD");
}

TEST(Judge, asks_of_a_submission_that_it_is_shorter_and_short) {
  const auto said = [](double kernel_pool, double native) {
    return claim(with({"core"}, {{"kernel-pool", "submit_max", kernel_pool / 100},
                                 {"native", "submit_max", native / 100}}),
                 "C7c")
        .outcome;
  };
  EXPECT_EQ(said(100, 300), "HOLDS");
  EXPECT_EQ(said(100, 100), "DOES NOT HOLD") << "no shorter";
  EXPECT_EQ(said(1500, 9000), "DOES NOT HOLD") << "shorter, and longer than a millisecond";
}

TEST(Judge, takes_what_is_better_for_no_worse) {
  const auto said = [](double rate) {
    return claim(with({"core", "buffered"}, {{"kernel-pool", "rate", rate}}), "C7d").outcome;
  };
  EXPECT_EQ(said(1), "HOLDS");
  EXPECT_EQ(said(1.5), "HOLDS");
  EXPECT_EQ(said(0.8), "DOES NOT HOLD");
}

TEST(Judge, lets_a_claim_of_two_parts_hold_by_both_alone) {
  // C1a: over a pool, and over itself with one request in a call.
  const auto batching = [](double over_pool, double over_itself) {
    return claim(with({"core", "pools"},
                      {{"pool-condition", "cpu", over_pool}, {"native-one", "cpu", over_itself}}),
                 "C1a")
        .outcome;
  };
  EXPECT_EQ(batching(1.5, 1.5), "HOLDS");
  EXPECT_EQ(batching(1.5, 1), "DOES NOT HOLD");
  EXPECT_EQ(batching(1, 1.5), "DOES NOT HOLD");
  // C9: cheaper where much is dirty, and only there.
  EXPECT_EQ(claim(with({"core", "ranges"}, {{"range-io_uring", "p50", 0.5, "dirty", "1M"}}), "C9")
                .outcome,
            "HOLDS");
  EXPECT_EQ(claim(with({"core", "ranges"}, {{"range-io_uring", "p50", 0.5}}), "C9").outcome,
            "DOES NOT HOLD");
  EXPECT_EQ(claim(with({"core", "ranges"}, {}), "C9").outcome, "DOES NOT HOLD");
}

TEST(Judge, wants_flushes_halved_by_writing_behind_and_the_stream_as_fast) {
  const auto said = [](double flushes, double stream, double from_pool) {
    return claim(with({"core", "streams"}, {{"no-behind", "p50", 1 / flushes},
                                            {"no-behind", "stream_rate", 1 / stream},
                                            {"behind-threads", "p50", from_pool},
                                            {"behind-threads-again", "p50", from_pool}}),
                 "C8")
        .outcome;
  };
  EXPECT_EQ(said(0.3, 1, 1), "HOLDS");
  EXPECT_EQ(said(0.8, 1, 1), "DOES NOT HOLD") << "not halved";
  EXPECT_EQ(said(0.3, 0.5, 1), "DOES NOT HOLD") << "at the stream's cost";
  EXPECT_EQ(said(0.3, 1, 2), "DOES NOT HOLD") << "not as from a pool";
}

TEST(Judge, gives_no_verdict_by_a_metric_that_no_engine_was_compared_with_itself_by) {
  const auto judgement =
      Laboratory()
          .change([](const Cell&, const std::string& arm, int, RunRecord& record) {
            if (arm == "threads-again") record.metrics.erase("per_wakeup");
          })
          .experiment(test::test_seed());
  EXPECT_EQ(outcome(judgement, "C1b", "per_wakeup"), "NO VERDICT");
  EXPECT_EQ(claim(judgement, "C1b").outcome, "NO VERDICT");
  EXPECT_EQ(outcome(judgement, "C0", "rate"), "WASH");
}

TEST(Judge, tells_the_counters_that_a_claim_must_report) {
  const auto judgement =
      Laboratory()
          .change([](const Cell&, const std::string& arm, int, RunRecord& record) {
            record.counters["sleeps_per_io"] = arm == "native" ? 1 : 3;
          })
          .experiment(test::test_seed());
  std::map<std::string, Reported> told;
  for (const Reported& one : claim(judgement, "C3").comparisons.front().reported)
    told[one.counter] = one;
  EXPECT_EQ(told.at("sleeps_per_io").aio, 1);
  EXPECT_EQ(told.at("sleeps_per_io").threads, 3);
  EXPECT_FALSE(told.at("system_calls_per_io").aio) << "not counted is not 0";
}

// How many more at a depth of 16 than of 1, by arm; all rates at depth 1 are alike.
Laboratory flushes(const std::map<std::string, double>& gain) {
  Laboratory laboratory("standard", {"core", "flushes"});
  laboratory.change([=](const Cell& cell, const std::string& arm, int, RunRecord& record) {
    if (cell.family->id != "flushes") return;
    const auto found = gain.find(arm);
    if (level_of(cell, "iodepth") == "16")
      record.metrics["rate"] *= found == gain.end() ? 4 : found->second;
    if (arm == "threads-unflushed") record.metrics["rate"] *= 30;
  });
  return laboratory;
}

TEST(Judge, compares_what_engines_gain_from_many_flushes_at_once) {
  const auto alike = flushes({}).experiment(test::test_seed());
  EXPECT_EQ(claim(alike, "C6c").outcome, "HOLDS") << claim(alike, "C6c").words;
  EXPECT_EQ(claim(alike, "C6b").outcome, "HOLDS") << claim(alike, "C6b").words;
  const auto differs = flushes({{"native", 8}}).experiment(test::test_seed());
  EXPECT_EQ(claim(differs, "C6c").outcome, "DOES NOT HOLD") << claim(differs, "C6c").words;
}

TEST(Judge, does_not_judge_gain_and_dominance_without_some_of_the_flushes) {
  const auto judgement =
      Laboratory("standard", {"core", "flushes"})
          .change([](const Cell& cell, const std::string& arm, int round, RunRecord& record) {
            if (cell.family->id != "flushes") return;
            if (level_of(cell, "iodepth") == "16") record.metrics["rate"] *= 4;
            if (arm == "threads-unflushed") record.metrics["rate"] *= 30;
            if (arm == "io_uring" && round < 3) record.metrics["rate"] = 0;
          })
          .experiment(test::test_seed());
  for (const char* id : {"C6b", "C6c"}) {
    EXPECT_EQ(claim(judgement, id).outcome, "INCONCLUSIVE") << claim(judgement, id).words;
    EXPECT_NE(claim(judgement, id).words.find("not measured"), std::string::npos);
  }
}

TEST(KeptRuns, are_the_last_of_the_attempt_that_was_kept) {
  std::vector<StoredRun> runs;
  const auto add = [&runs](unsigned attempt, double rate, bool end, bool kept) {
    StoredRun run{.cell = "c", .arm = "a", .attempt = attempt, .block_end = end, .is_kept = kept};
    run.record.metrics["rate"] = rate;
    runs.push_back(run);
  };
  add(0, 1, true, false);  // too noisy, done again
  add(1, 2, false, true);  // interrupted
  add(1, 3, true, true);   // begun anew
  const auto measured = kept_runs(runs);
  EXPECT_EQ(measured.at("c").at("a").at(0)->record.metrics.at("rate"), 3);
}

TEST(KeptRuns, leave_out_a_block_that_is_not_done) {
  std::vector<StoredRun> runs{{.cell = "c", .arm = "a"}};
  EXPECT_TRUE(kept_runs(runs).empty());
}

}  // namespace
}  // namespace vblk::wash
