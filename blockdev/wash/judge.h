// From runs to verdicts. What decides is in analysis.json; how, in statistics.h.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "blockdev/wash/analysis.h"
#include "blockdev/wash/statistics.h"
#include "blockdev/wash/store.h"

namespace vblk::wash {

enum class Verdict : std::uint8_t { kWash, kAioWins, kThreadsWin, kInconclusive, kNotMeasured };
// "WASH", "AIO WINS", "THREADS WIN", "INCONCLUSIVE", "NOT MEASURED".
[[nodiscard]] std::string_view to_string(Verdict verdict);
// Of which more is better: rates.
[[nodiscard]] bool is_more_better(std::string_view metric);

// One comparison, in one cell, by one metric.
struct CellVerdict {
  std::string cell;
  std::string metric;
  Verdict verdict{Verdict::kNotMeasured};
  Estimate log_ratio;  // of the AIO side to the thread side; natural logarithms
  double p_equivalent{1};
  double p_better{1};  // of "the AIO side is not better by more than the margin"
  double p_worse{1};
  double p_no_worse{1};  // of "the AIO side is worse by more than the margin"
  double margin{0};      // of the logarithm
  // Each side's metric in itself: logarithms, at an error that is shared by the family.
  Estimate log_aio;
  Estimate log_threads;
  std::optional<BootstrapInterval> bootstrap;
  double aio_median{0};  // of the metric, over the blocks
  double threads_median{0};
  std::size_t blocks_for_wash{0};  // that the spread asks for; 0: unknown
  // Of so many blocks the estimate's `count` have the metric on both sides.
  std::size_t blocks_of{0};
  // What the other blocks lack, arm by arm: they are seldom like the rest, for a run in which the
  // disk stood still is one that ends without a rate or with too few samples.
  std::string missing;
  std::string reason;  // why it was not measured
};

// A counter that a comparison tells beside its ratios; medians over the blocks, or of the one run
// that counts what counting would make slower.
struct Reported {
  std::string cell;
  std::string counter;
  std::optional<double> aio;
  std::optional<double> threads;
};

struct ComparisonResult {
  const Comparison* comparison{nullptr};
  std::vector<CellVerdict> cells;
  std::vector<Reported> reported;
};

// What a metric of one comparison that decides says over all its cells.
struct MetricOutcome {
  const Comparison* comparison{nullptr};
  std::string metric;
  // A Verdict's name, "NO WORSE", "AS CLAIMED", "NOT AS CLAIMED", "DEPENDS ON THE CELL" or "NO
  // VERDICT".
  std::string outcome;
  std::map<Verdict, std::size_t> counts;
  std::string reason;  // of NO VERDICT
};

struct Crossover {
  Line line;           // extra processor time (us) of a pool per second, over the rate
  double extra_us{0};  // of each operation: the slope
  std::optional<double> per_second;                   // where it reaches the core share asked about
  std::vector<std::pair<double, double>> points;      // rate; extra share of a core
  std::vector<std::pair<double, double>> aio_points;  // rate; share of a core
  std::vector<std::pair<double, double>> threads_points;
};

struct ClaimResult {
  const Claim* claim{nullptr};
  std::string outcome;  // HOLDS, DOES NOT HOLD, INCONCLUSIVE, NO VERDICT, NOT MEASURED
  std::string words;    // one sentence
  std::vector<MetricOutcome> metrics;
  std::vector<ComparisonResult> comparisons;
  std::optional<Crossover> crossover;
};

struct ControlResult {
  std::map<std::string, std::map<Verdict, std::size_t>> again;  // by metric
  // Half the width of the 90 % interval, as a part (0.05), median over the cells, by metric: about
  // what these blocks can tell apart.
  std::map<std::string, double> again_within;
  std::size_t slowed_found{0};
  std::size_t slowed_cells{0};
  std::size_t blocks{0};
  std::size_t noisy_blocks{0};
  std::size_t repeated_blocks{0};
  std::vector<CellVerdict> again_cells;
  std::vector<CellVerdict> slowed;
  std::string refusal;                          // why there is no verdict at all; empty: there is
  std::map<std::string, std::string> refusals;  // the same of a metric
};

// The runs that count: of each block the attempt that was kept, of each arm its last run. By cell,
// arm, round.
using Measured = std::map<std::string, std::map<std::string, std::map<int, const StoredRun*>>>;
[[nodiscard]] Measured kept_runs(const std::vector<StoredRun>& runs);

struct Judgement {
  ControlResult controls;
  std::vector<ClaimResult> claims;
  std::size_t runs{0};
  std::size_t failed_runs{0};
  std::map<std::string, std::string> skipped;  // cell and arm: why
};

// The judgement refers to `analysis`; `runs` may go.
[[nodiscard]] Judgement judge(const Analysis& analysis, const Preset& preset,
                              const std::vector<Cell>& cells, const std::vector<StoredRun>& runs);

}  // namespace vblk::wash
