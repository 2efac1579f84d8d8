// How an experiment is conducted: what is random, what a noisy block costs, and how it goes on.
#include "blockdev/wash/experiment.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "blockdev/wash/judge.h"
#include "tests/support/temp_dir.h"

namespace vblk::wash {
namespace {

class ExperimentTest : public testing::Test {
 protected:
  ExperimentTest() : analysis_(registered_analysis()), preset_(*analysis_.preset("smoke")) {
    std::erase_if(analysis_.families, [](const Family& family) { return family.id != "core"; });
    conduct_.analysis = &analysis_;
    conduct_.preset = &preset_;
    conduct_.devices = {{.name = "image", .path = "/nowhere", .region_bytes = 1 << 20}};
    conduct_.interrupted = &interrupted_;
    conduct_.carry_out = [this](const RunSpec& spec) -> Expected<RunRecord> {
      specs_.push_back(spec);
      if (specs_.size() == interrupt_after_) interrupted_ = true;
      if (spec.arm == broken_arm_ && ++failures_ <= failures_max_)
        return make_error(ErrorKind::kNotSupported, "no such engine");
      RunRecord record;
      record.metrics = {{"rate", 1000}, {"cpu", 10}};
      record.steal_share = steal_;
      return record;
    };
  }

  std::unique_ptr<ResultStore> open() {
    auto store = ResultStore::open(dir_.file("result"), {.seed = 7, .preset = "smoke"}, false);
    EXPECT_TRUE(store) << store.error().message;
    return std::move(*store);
  }
  Expected<bool> conduct(ResultStore& store) { return conduct_experiment(conduct_, store); }
  [[nodiscard]] std::size_t runs_of_a_round() const {
    std::size_t sum = 0;
    for (const Cell& cell : cells_of(conduct_)) sum += cell.family->arms.size();
    return sum;
  }
  // One run for each cell says what is to be burnt, and where one request is in flight two count
  // system calls.
  [[nodiscard]] std::size_t calibrations() const {
    std::size_t counting = 0;
    for (const Cell& cell : cells_of(conduct_))
      counting += level_of(cell, "iodepth") == "1" ? 2U : 0U;
    return cells_of(conduct_).size() + counting;
  }
  [[nodiscard]] std::vector<std::string> order() const {
    std::vector<std::string> order;
    for (const RunSpec& spec : specs_) order.push_back(spec.levels.back().second + spec.arm);
    return order;
  }

  test::TempDir dir_;
  Analysis analysis_;
  Preset preset_;
  Conduct conduct_;
  std::atomic<bool> interrupted_{false};
  std::vector<RunSpec> specs_;
  std::size_t interrupt_after_{0};
  std::string broken_arm_;
  unsigned failures_{0};
  unsigned failures_max_{~0U};
  double steal_{0};
};

TEST_F(ExperimentTest, runs_each_arm_of_each_cell_in_each_round) {
  preset_.rounds = 3;
  const auto store = open();
  EXPECT_EQ(conduct(*store).value(), true);
  EXPECT_EQ(specs_.size(), 3 * runs_of_a_round() + calibrations());
  const auto measured = kept_runs(store->runs());
  for (const Cell& cell : cells_of(conduct_)) {
    for (const auto& arm : cell.family->arms)
      EXPECT_EQ(measured.at(cell.id).at(arm).size(), 3U) << cell.id << arm;
  }
}

TEST_F(ExperimentTest, follows_the_seed_and_nothing_else) {
  const auto cells = cells_of(conduct_);
  EXPECT_EQ(order_of_arms(1, 0, 0, cells[0]), order_of_arms(1, 0, 0, cells[0]));
  std::set<std::vector<std::string>> orders;
  std::map<std::string, int> first;
  for (int round = 0; round < 200; ++round) {
    const auto arms = order_of_arms(1, round, 0, cells[0]);
    orders.insert(arms);
    ++first[arms.front()];
  }
  EXPECT_GT(orders.size(), 150U);
  for (const auto& arm : cells[0].family->arms) EXPECT_GT(first[arm], 10) << arm;
}

TEST_F(ExperimentTest, keeps_the_arms_of_a_block_side_by_side_with_the_same_load) {
  const auto store = open();
  ASSERT_TRUE(conduct(*store));
  const std::size_t arms = analysis_.families[0].arms.size();
  for (std::size_t i = calibrations(); i < specs_.size(); i += arms) {
    std::set<std::string> seen;
    for (std::size_t j = i; j < i + arms; ++j) {
      EXPECT_EQ(specs_[j].levels, specs_[i].levels);
      EXPECT_EQ(specs_[j].seed, specs_[i].seed);
      seen.insert(specs_[j].arm);
    }
    EXPECT_EQ(seen.size(), arms);
  }
}

TEST_F(ExperimentTest, burns_a_part_of_what_was_measured_before) {
  const auto store = open();
  ASSERT_TRUE(conduct(*store));
  for (const RunSpec& spec : specs_)
    EXPECT_EQ(spec.spin_ns, spec.arm == "threads-slowed" ? 10'000 * preset_.slowdown : 0)
        << spec.arm;
}

TEST_F(ExperimentTest, counts_system_calls_beside_the_blocks) {
  const auto store = open();
  ASSERT_TRUE(conduct(*store));
  std::multiset<std::string> counted;
  for (const RunSpec& spec : specs_) {
    if (spec.count_system_calls) counted.insert(spec.arm + level_of(spec, "iodepth"));
  }
  EXPECT_EQ(counted, (std::multiset<std::string>{"native1", "threads1"}));
  const auto measured = kept_runs(store->runs());
  for (const auto& [cell, arms] : measured) EXPECT_EQ(arms.at("native").size(), preset_.rounds);
}

TEST_F(ExperimentTest, goes_on_where_it_was_and_does_what_it_would_have_done) {
  {
    test::TempDir other;
    auto whole = ResultStore::open(other.file("result"), {.seed = 7, .preset = "smoke"}, false);
    ASSERT_TRUE(conduct(**whole));
  }
  const auto undisturbed = order();
  specs_.clear();
  interrupt_after_ = calibrations() + analysis_.families[0].arms.size() + 3;
  {
    const auto store = open();
    EXPECT_EQ(conduct(*store).value(), false);
    // Neither the run that a signal cut short is kept, nor is anything that was lost.
    EXPECT_EQ(store->runs().size(), interrupt_after_ - 1);
  }
  interrupted_ = false;
  const auto store = open();
  EXPECT_EQ(store->runs().size(), interrupt_after_ - 1);
  EXPECT_EQ(conduct(*store).value(), true);
  // The block that was interrupted begins anew; the rest comes in the order it would have.
  auto expected = undisturbed;
  const auto block =
      static_cast<std::ptrdiff_t>(calibrations() + analysis_.families[0].arms.size());
  expected.insert(expected.begin() + block, undisturbed.begin() + block,
                  undisturbed.begin() + block + 3);
  EXPECT_EQ(order(), expected);
  const auto measured = kept_runs(store->runs());
  for (const Cell& cell : cells_of(conduct_)) {
    for (const auto& arm : cell.family->arms)
      EXPECT_EQ(measured.at(cell.id).at(arm).size(), preset_.rounds);
  }
}

TEST_F(ExperimentTest, runs_nothing_where_all_is_done) {
  {
    const auto store = open();
    ASSERT_TRUE(conduct(*store));
  }
  specs_.clear();
  const auto store = open();
  EXPECT_EQ(conduct(*store).value(), true);
  EXPECT_TRUE(specs_.empty());
}

TEST_F(ExperimentTest, repeats_noisy_blocks_as_often_as_it_may) {
  steal_ = 0.5;
  preset_.rounds = 1;
  preset_.reruns_max = 2;
  const auto store = open();
  ASSERT_TRUE(conduct(*store));
  EXPECT_EQ(specs_.size(), 3 * runs_of_a_round() + calibrations());
  const auto measured = kept_runs(store->runs());
  for (const auto& [cell, arms] : measured) {
    for (const auto& [arm, runs] : arms) EXPECT_EQ(runs.at(0)->attempt, 2U);
  }
}

TEST_F(ExperimentTest, leaves_out_an_arm_that_cannot_be_measured_and_says_why) {
  broken_arm_ = "native";
  const auto store = open();
  EXPECT_EQ(conduct(*store).value(), true);
  EXPECT_EQ(std::ranges::count(specs_, "native", &RunSpec::arm),
            static_cast<std::ptrdiff_t>(cells_of(conduct_).size() * preset_.rounds + 1))
      << "once to count system calls";
  const auto judgement = judge(analysis_, preset_, cells_of(conduct_), store->runs());
  EXPECT_EQ(judgement.failed_runs, cells_of(conduct_).size() * preset_.rounds + 1);
  const auto& cell = judgement.claims.front().comparisons.front().cells.front();
  EXPECT_EQ(cell.verdict, Verdict::kNotMeasured);
  EXPECT_EQ(cell.reason, "0 of 2 blocks have it: native: no such engine in 2");
}

TEST_F(ExperimentTest, measures_a_block_again_in_which_a_run_failed) {
  preset_.reruns_max = 1;
  broken_arm_ = "native";
  failures_max_ = 1;
  const auto store = open();
  EXPECT_EQ(conduct(*store).value(), true);
  const auto measured = kept_runs(store->runs());
  for (const Cell& cell : cells_of(conduct_)) {
    const auto& runs = measured.at(cell.id).at("native");
    ASSERT_EQ(runs.size(), preset_.rounds) << cell.id;
    for (const auto& [round, run] : runs) EXPECT_EQ(run->error, "") << "the failure passed";
  }
}

TEST_F(ExperimentTest, gives_an_arm_up_after_failures_in_a_row_until_it_is_gone_on_with) {
  std::erase_if(analysis_.families[0].levels.at("smoke"), [](const auto&) { return true; });
  preset_.rounds = 6;
  broken_arm_ = "native";
  interrupt_after_ = calibrations() + 4 * analysis_.families[0].arms.size();
  {
    const auto store = open();
    EXPECT_EQ(conduct(*store).value(), false);
    EXPECT_EQ(std::ranges::count(specs_, "native", &RunSpec::arm),
              static_cast<std::ptrdiff_t>(kFailuresMax));
  }
  interrupted_ = false;
  interrupt_after_ = 0;
  broken_arm_ = "";
  specs_.clear();
  const auto store = open();
  EXPECT_EQ(conduct(*store).value(), true);
  EXPECT_GE(std::ranges::count(specs_, "native", &RunSpec::arm), 2) << "it is tried again";
}

TEST_F(ExperimentTest, stops_where_nothing_can_be_measured_any_more) {
  preset_ = *analysis_.preset("standard");
  const auto store = open();
  std::size_t runs = 0;
  conduct_.carry_out = [&](const RunSpec&) -> Expected<RunRecord> {
    if (++runs > 40) return make_error(ErrorKind::kIo, "the disk is gone");
    return RunRecord{.metrics = {{"rate", 1}, {"cpu", 1}}};
  };
  const auto done = conduct(*store);
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().message, "the disk is gone");
  EXPECT_EQ(runs, 40 + kFailuresOfAllMax);
}

TEST(ForeignLoad, is_what_is_neither_ours_nor_of_servers_that_we_drive) {
  using std::chrono::milliseconds;
  using std::chrono::seconds;
  const bench::MachineUsage before{.busy = seconds(100), .steal = seconds(1), .idle = seconds(50)};
  bench::MachineUsage after = before;
  after.busy += seconds(6);
  after.idle += seconds(3);
  after.steal += seconds(1);
  EXPECT_DOUBLE_EQ(foreign_share(before, after, seconds(2)), 0.4);
  EXPECT_DOUBLE_EQ(foreign_share(before, after, seconds(6)), 0);
  EXPECT_DOUBLE_EQ(foreign_share(before, after, seconds(7)), 0) << "ticks are coarse";
  EXPECT_DOUBLE_EQ(foreign_share(before, before, seconds(1)), 0);
}

TEST_F(ExperimentTest, stops_where_nothing_can_be_measured) {
  conduct_.carry_out = [](const RunSpec&) -> Expected<RunRecord> {
    return make_error(ErrorKind::kIo, "the disk is gone");
  };
  const auto store = open();
  const auto done = conduct(*store);
  ASSERT_FALSE(done);
  EXPECT_EQ(done.error().message, "the disk is gone");
}

}  // namespace
}  // namespace vblk::wash
