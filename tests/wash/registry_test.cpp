// analysis.json, as it is compiled in: everything that is promised is registered.
#include <algorithm>
#include <set>
#include <string>

#include <gtest/gtest.h>

#include "blockdev/wash/analysis.h"
#include "blockdev/wash/digest.h"

namespace vblk::wash {
namespace {

TEST(Registry, is_read_and_has_its_digest) {
  const auto analysis = parse_analysis(analysis_text());
  ASSERT_TRUE(analysis) << analysis.error().message;
  EXPECT_EQ(analysis->digest, sha256(analysis_text()));
}

TEST(Registry, has_every_claim_with_its_sentence) {
  std::set<std::string> claims;
  for (const Claim& claim : registered_analysis().claims) {
    claims.insert(claim.id);
    EXPECT_GT(claim.sentence.size(), 20U) << claim.id;
    EXPECT_FALSE(claim.title.empty()) << claim.id;
  }
  for (const char* id : {"C0", "C1a", "C1b", "C1c", "C2", "C3", "C4", "C5", "C6a", "C6b", "C6c",
                         "C7a", "C7b", "C7c", "C7d", "C7e", "C8", "C9", "VM"})
    EXPECT_TRUE(claims.contains(id)) << id;
}

TEST(Registry, has_every_pool_and_every_engine_among_its_arms) {
  std::set<threadpool::PoolKind> pools;
  std::set<aio::EngineName> engines;
  bool forced = false;
  for (const auto& [name, arm] : registered_analysis().arms) {
    pools.insert(arm.options.pool);
    engines.insert(arm.engine);
    forced = forced || arm.options.io_uring.force_async;
  }
  EXPECT_EQ(pools.size(), threadpool::kAllPoolKinds.size());
  EXPECT_EQ(engines.size(), 4U);
  EXPECT_TRUE(forced);
}

TEST(Registry, lets_every_claim_be_decided_by_the_standard_preset) {
  const Analysis& analysis = registered_analysis();
  const auto cells =
      cells_of(analysis, *analysis.preset("standard"), {"image", "ram", "files", "none"});
  for (const Claim& claim : analysis.claims) {
    for (const Comparison& comparison : claim.comparisons) {
      if (!comparison.decides) continue;
      EXPECT_TRUE(std::ranges::any_of(
          cells, [&](const Cell& cell) { return applies_to(comparison, cell); }))
          << claim.id << " " << comparison.name;
    }
  }
}

TEST(Registry, compares_an_engine_with_itself_by_each_metric_that_decides) {
  const Analysis& analysis = registered_analysis();
  std::set<std::string> controlled;
  for (const AgainControl& again : analysis.controls.again)
    controlled.insert(again.metrics.begin(), again.metrics.end());
  for (const Claim& claim : analysis.claims) {
    for (const Comparison& comparison : claim.comparisons) {
      if (!comparison.decides) continue;
      for (const auto& metric : comparison.metrics)
        EXPECT_TRUE(controlled.contains(metric)) << claim.id << " " << metric;
    }
  }
}

TEST(Registry, takes_an_expectation_from_the_claim_where_a_comparison_has_none) {
  const auto& claims = registered_analysis().claims;
  const auto& ranges = *std::ranges::find(claims, "C9", &Claim::id);
  EXPECT_EQ(ranges.comparisons.at(0).expects, Expectation::kAioWins);
  EXPECT_EQ(ranges.comparisons.at(1).expects, Expectation::kWash);
  const auto& batches = *std::ranges::find(claims, "C1a", &Claim::id);
  EXPECT_FALSE(batches.comparisons.at(0).needs_all);
}

TEST(Registry, names_each_cell_once) {
  const Analysis& analysis = registered_analysis();
  for (const Preset& preset : analysis.presets) {
    std::set<std::string> ids;
    const auto cells =
        cells_of(analysis, preset, {"image", "image:x.qcow2", "ram", "files", "none"});
    for (const Cell& cell : cells) ids.insert(cell.id);
    EXPECT_EQ(ids.size(), cells.size()) << preset.name;
    EXPECT_FALSE(cells.empty()) << preset.name;
  }
}

TEST(Registry, has_cells_for_each_image) {
  const Analysis& analysis = registered_analysis();
  const auto cells = cells_of(analysis, *analysis.preset("quick"), {"image", "image:x.qcow2"});
  const auto of = [&](const std::string& device) {
    return std::ranges::count_if(cells, [&](const Cell& cell) {
      return cell.device == device && cell.family->kind != Kind::kServe;
    });
  };
  EXPECT_GT(of("image"), 0);
  EXPECT_EQ(of("image"), of("image:x.qcow2"));
}

TEST(Registry, refuses_what_leads_nowhere) {
  std::string text(analysis_text());
  const auto replaced = [&text](const std::string& what, const std::string& by) {
    std::string changed = text;
    changed.replace(changed.find(what), what.size(), by);
    return parse_analysis(changed);
  };
  EXPECT_FALSE(parse_analysis("{"));
  EXPECT_FALSE(replaced("\"aio\": \"native\"", "\"aio\": \"warp\""));
  EXPECT_FALSE(replaced("\"metrics\": [\"rate\"", "\"metrics\": [\"warp\""));
  EXPECT_FALSE(replaced("\"families\": [\"core\"", "\"families\": [\"warp\""));
  EXPECT_FALSE(replaced("\"pool\": \"condition\"", "\"pool\": \"warp\""));
  EXPECT_FALSE(replaced("\"expects\": \"NO WORSE\"", "\"expects\": \"WARP\""));
  EXPECT_FALSE(replaced("\"expects\": \"LEVEL\"", "\"expects\": \"WASH\""));
  EXPECT_FALSE(replaced("\"aio_below\"", "\"warp\""));
  EXPECT_FALSE(replaced("\"margins\": {\"p50\": 1.0}", "\"margins\": {\"p99\": 1.0}"));
  EXPECT_TRUE(replaced("\"about\"", "\"abouts\""));
}

}  // namespace
}  // namespace vblk::wash
