#include "blockdev/wash/judge.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace vblk::wash {

namespace {

constexpr const char* kDepends = "DEPENDS ON THE CELL";
constexpr const char* kNoVerdict = "NO VERDICT";
constexpr const char* kHolds = "HOLDS";
constexpr const char* kDoesNotHold = "DOES NOT HOLD";
constexpr const char* kInconclusive = "INCONCLUSIVE";
constexpr const char* kNotMeasured = "NOT MEASURED";
constexpr const char* kNoWorse = "NO WORSE";
constexpr const char* kAsClaimed = "AS CLAIMED";
constexpr const char* kNotAsClaimed = "NOT AS CLAIMED";
// With which power the number of blocks is foretold.
constexpr double kPower = 0.9;

double median_of(std::vector<double> values) {
  if (values.empty()) return 0;
  std::ranges::sort(values);
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

std::optional<double> value_of(const StoredRun& run, const std::string& metric) {
  const auto found = run.record.metrics.find(metric);
  if (!run.error.empty() || found == run.record.metrics.end() || found->second <= 0)
    return std::nullopt;
  return found->second;
}

// Blocks that lack a metric, by what is the matter: how many, and the most samples in any of them.
struct Lack {
  std::size_t blocks{0};
  std::uint64_t samples_most{0};
};

// What one metric of two arms says in the blocks that have both, and what the others lack.
struct Paired {
  std::vector<double> log_ratios;
  std::vector<double> aio;
  std::vector<double> threads;
  std::size_t blocks_of{0};
  std::map<std::string, Lack> lacks;
};

// Why a run has no such metric; it is asked of one that has none.
std::string why_none(const StoredRun& run, const std::string& metric) {
  if (!run.error.empty()) return fmt::format("{}: {}", run.arm, run.error);
  if (run.record.saturated) return run.arm + " could not follow the rate";
  if (run.record.metrics.contains(metric) || run.record.samples == 0)
    return run.arm + ": no operation ended in time";
  if (metric == "p50" || metric == "p99" || metric == "write_p99")
    return fmt::format("{}: too few samples for {}", run.arm, metric);
  return fmt::format("{} has no {}", run.arm, metric);
}

// The same where an arm was left out: its failures were why.
std::string why_left_out(const std::string& arm, const std::map<int, const StoredRun*>* runs) {
  if (runs != nullptr) {
    for (const auto& [round, run] : *runs) {
      if (!run->error.empty()) return why_none(*run, "");
    }
  }
  return arm + " was not run";
}

std::set<int> rounds_of(const Measured& measured, const std::string& cell) {
  std::set<int> rounds;
  const auto arms = measured.find(cell);
  if (arms == measured.end()) return rounds;
  for (const auto& [arm, runs] : arms->second) {
    for (const auto& [round, run] : runs) rounds.insert(round);
  }
  return rounds;
}

Paired pair_up(const Measured& measured, const std::string& cell, const std::string& aio,
               const std::string& threads, const std::string& metric) {
  Paired paired;
  const std::set<int> rounds = rounds_of(measured, cell);
  paired.blocks_of = rounds.size();
  if (rounds.empty()) return paired;
  const auto& arms = measured.at(cell);
  for (const int round : rounds) {
    const auto value_in = [&](const std::string& arm) -> std::optional<double> {
      const auto runs = arms.find(arm);
      const bool is_there = runs != arms.end() && runs->second.contains(round);
      const StoredRun* const run = is_there ? runs->second.at(round) : nullptr;
      if (run != nullptr) {
        if (const auto value = value_of(*run, metric)) return value;
      }
      Lack& lack =
          paired.lacks[run != nullptr
                           ? why_none(*run, metric)
                           : why_left_out(arm, runs == arms.end() ? nullptr : &runs->second)];
      ++lack.blocks;
      if (run != nullptr) lack.samples_most = std::max(lack.samples_most, run->record.samples);
      return std::nullopt;
    };
    const auto one = value_in(aio);
    const auto two = value_in(threads);
    if (!one || !two) continue;
    paired.log_ratios.push_back(std::log(*one / *two));
    paired.aio.push_back(*one);
    paired.threads.push_back(*two);
  }
  return paired;
}

// "threads: too few samples for p99 (580 at most) in 9, native: no operation ended in time in 2".
std::string words_of(const std::map<std::string, Lack>& lacks) {
  std::vector<std::pair<std::string, Lack>> sorted(lacks.begin(), lacks.end());
  std::ranges::sort(sorted, {}, [](const auto& lack) {
    return std::pair(-static_cast<std::int64_t>(lack.second.blocks), lack.first);
  });
  std::string words;
  for (const auto& [what, lack] : sorted) {
    const bool tells_samples = what.find("too few samples") != std::string::npos;
    words += fmt::format("{}{}{} in {}", words.empty() ? "" : ", ", what,
                         tells_samples ? fmt::format(" ({} at most)", lack.samples_most) : "",
                         lack.blocks);
  }
  return words;
}

// Why what is left says too little; empty: it says enough.
std::string why_not_measured(const Rules& rules, const Paired& paired) {
  if (paired.blocks_of == 0) return "the cell was not run";
  const std::size_t blocks = paired.log_ratios.size();
  if (blocks >= 2 &&
      static_cast<double>(blocks) >= rules.blocks_share_min * static_cast<double>(paired.blocks_of))
    return {};
  if (paired.lacks.empty()) return "fewer than two blocks";
  return fmt::format("{} of {} blocks have it: {}", blocks, paired.blocks_of,
                     words_of(paired.lacks));
}

// A family: what is decided together, Holm's adjustment over all of it.
struct Asked {
  std::string cell;
  std::string aio;
  std::string threads;
  double margin{0};
};

Estimate estimate_of_logarithms(const std::vector<double>& values, double alpha) {
  std::vector<double> logarithms;
  logarithms.reserve(values.size());
  for (const double value : values) logarithms.push_back(std::log(value));
  return estimate(logarithms, alpha);
}

std::vector<CellVerdict> decide_family(const Analysis& analysis, const Measured& measured,
                                       const std::vector<Asked>& asked, const std::string& metric,
                                       Sides sides = Sides::kBoth) {
  const double alpha = analysis.rules.alpha;
  std::vector<CellVerdict> verdicts;
  std::vector<std::vector<double>> samples;
  std::vector<double> margins;
  std::vector<std::size_t> indexes;
  for (const Asked& one : asked) {
    Paired paired = pair_up(measured, one.cell, one.aio, one.threads, metric);
    CellVerdict verdict{
        .cell = one.cell, .metric = metric, .margin = one.margin, .blocks_of = paired.blocks_of};
    verdict.reason = why_not_measured(analysis.rules, paired);
    verdict.log_ratio.count = paired.log_ratios.size();
    if (verdict.reason.empty()) {
      verdict.missing = words_of(paired.lacks);
      verdict.log_ratio = estimate(paired.log_ratios, alpha);
      verdict.aio_median = median_of(paired.aio);
      verdict.threads_median = median_of(paired.threads);
      verdict.bootstrap = bootstrap(paired.log_ratios, alpha, paired.log_ratios.size());
      verdict.blocks_for_wash =
          blocks_for_wash(verdict.log_ratio.standard_deviation, one.margin, alpha, kPower);
      const double shared = alpha / static_cast<double>(asked.size());
      verdict.log_aio = estimate_of_logarithms(paired.aio, shared);
      verdict.log_threads = estimate_of_logarithms(paired.threads, shared);
      margins.push_back(one.margin);
      samples.push_back(std::move(paired.log_ratios));
      indexes.push_back(verdicts.size());
    }
    verdicts.push_back(std::move(verdict));
  }
  const auto decisions = decide(samples, margins, alpha, sides);
  const bool more = is_more_better(metric);
  for (std::size_t i = 0; i < decisions.size(); ++i) {
    CellVerdict& verdict = verdicts[indexes[i]];
    verdict.p_equivalent = decisions[i].p_equivalent;
    verdict.p_better = more ? decisions[i].p_above : decisions[i].p_below;
    verdict.p_no_worse = more ? decisions[i].p_not_below : decisions[i].p_not_above;
    verdict.p_worse = more ? decisions[i].p_below : decisions[i].p_above;
    switch (decisions[i].direction) {
      case Direction::kEquivalent:
        verdict.verdict = Verdict::kWash;
        break;
      case Direction::kAbove:
        verdict.verdict = more ? Verdict::kAioWins : Verdict::kThreadsWin;
        break;
      case Direction::kBelow:
        verdict.verdict = more ? Verdict::kThreadsWin : Verdict::kAioWins;
        break;
      case Direction::kUnknown:
        verdict.verdict = Verdict::kInconclusive;
        break;
    }
  }
  return verdicts;
}

std::map<Verdict, std::size_t> counts_of(const std::vector<CellVerdict>& verdicts) {
  std::map<Verdict, std::size_t> counts;
  for (const CellVerdict& verdict : verdicts) ++counts[verdict.verdict];
  return counts;
}

std::size_t count_of(const std::map<Verdict, std::size_t>& counts, Verdict verdict) {
  const auto found = counts.find(verdict);
  return found == counts.end() ? 0 : found->second;
}

std::size_t measured_in(const std::map<Verdict, std::size_t>& counts) {
  std::size_t sum = 0;
  for (const auto& [verdict, count] : counts) sum += verdict == Verdict::kNotMeasured ? 0 : count;
  return sum;
}

std::size_t cells_in(const std::map<Verdict, std::size_t>& counts) {
  return measured_in(counts) + count_of(counts, Verdict::kNotMeasured);
}

// Shares are of all cells: one that was not measured is neither a wash nor a win.
std::string outcome_of(const Rules& rules, const std::map<Verdict, std::size_t>& counts) {
  const auto all = static_cast<double>(cells_in(counts));
  if (measured_in(counts) == 0) return kNotMeasured;
  const auto share = [&](Verdict verdict) {
    return static_cast<double>(count_of(counts, verdict)) / all;
  };
  const bool aio_wins = share(Verdict::kAioWins) > rules.win_share_min;
  const bool threads_win = share(Verdict::kThreadsWin) > rules.win_share_min;
  if (aio_wins && threads_win) return kDepends;
  if (aio_wins) return std::string(to_string(Verdict::kAioWins));
  if (threads_win) return std::string(to_string(Verdict::kThreadsWin));
  if (share(Verdict::kWash) >= rules.wash_share_min) return std::string(to_string(Verdict::kWash));
  return kInconclusive;
}

// ---- Controls.

ControlResult check_controls(const Analysis& analysis, const Preset& preset,
                             const std::vector<Cell>& cells, const Measured& measured,
                             const std::vector<StoredRun>& runs) {
  ControlResult result;
  for (const StoredRun& run : runs) {
    if (!run.block_end) continue;
    ++(run.is_kept ? result.blocks : result.repeated_blocks);
    if (run.is_kept && run.noisy) ++result.noisy_blocks;
  }
  const Controls& controls = analysis.controls;
  const auto ask_in = [&](const std::vector<std::string>& families, const std::string& one,
                          const std::string& other, const std::string& metric,
                          std::vector<Asked>& asked) {
    for (const Cell& cell : cells) {
      if (std::ranges::find(families, cell.family->id) != families.end())
        asked.push_back({cell.id, one, other, analysis.margin(metric)});
    }
  };
  // All pairs that are compared by a metric are one family.
  std::map<std::string, std::vector<Asked>> again;
  for (const AgainControl& control : controls.again) {
    for (const std::string& metric : control.metrics)
      ask_in(control.families, control.arm, control.against, metric, again[metric]);
  }
  for (const auto& [metric, asked] : again) {
    auto verdicts = decide_family(analysis, measured, asked, metric);
    const auto counts = counts_of(verdicts);
    result.again[metric] = counts;
    const std::size_t wins =
        count_of(counts, Verdict::kAioWins) + count_of(counts, Verdict::kThreadsWin);
    const std::size_t all = measured_in(counts);
    if (wins > 0) {
      result.refusals[metric] = fmt::format(
          "an engine compared with itself differs in {} of {} cells: the machine or the bench is "
          "not to be trusted",
          wins, all);
    } else if (all == 0) {
      result.refusals[metric] = "no engine was compared with itself by it";
    }
    std::vector<double> widths;
    for (const CellVerdict& verdict : verdicts) {
      if (verdict.verdict == Verdict::kNotMeasured) continue;
      widths.push_back(std::expm1((verdict.log_ratio.upper - verdict.log_ratio.lower) / 2));
    }
    if (!widths.empty()) result.again_within[metric] = median_of(std::move(widths));
    result.again_cells.insert(result.again_cells.end(), verdicts.begin(), verdicts.end());
  }
  std::vector<Asked> slowed;
  ask_in(controls.slowed_families, controls.slowed, controls.slowed_against, controls.slowed_metric,
         slowed);
  result.slowed =
      decide_family(analysis, measured, slowed, controls.slowed_metric,
                    is_more_better(controls.slowed_metric) ? Sides::kBelow : Sides::kAbove);
  // Where it was not measured it was not found.
  result.slowed_cells = result.slowed.size();
  result.slowed_found = static_cast<std::size_t>(
      std::ranges::count(result.slowed, Verdict::kThreadsWin, &CellVerdict::verdict));
  if (std::ranges::all_of(result.slowed, [](const CellVerdict& verdict) {
        return verdict.verdict == Verdict::kNotMeasured;
      })) {
    result.refusal = "the controls were not measured";
  } else if (static_cast<double>(result.slowed_found) <
             controls.found_share_min * static_cast<double>(result.slowed_cells)) {
    result.refusal = fmt::format(
        "an engine slowed down by {:.0f} % was found in only {} of {} cells: the bench is blind",
        preset.slowdown * 100, result.slowed_found, result.slowed_cells);
  } else if (result.blocks > 0 && static_cast<double>(result.noisy_blocks) >
                                      preset.noisy_share_max * static_cast<double>(result.blocks)) {
    result.refusal = fmt::format("{} of {} blocks are noisy (others use the processors)",
                                 result.noisy_blocks, result.blocks);
  }
  return result;
}

// ---- Claims.

// What Holm's adjustment covers together, of a claim and a metric.
enum class Group : std::uint8_t { kDecidesByRatio, kDecidesByLevel, kDecidesNothing };

Group group_of(const Comparison& comparison) {
  if (!comparison.decides) return Group::kDecidesNothing;
  return comparison.expects == Expectation::kLevel ? Group::kDecidesByLevel
                                                   : Group::kDecidesByRatio;
}

// All comparisons of a claim.
void compare_all(const Analysis& analysis, const std::vector<Cell>& cells, const Measured& measured,
                 ClaimResult& result) {
  std::set<std::string> metrics;
  for (const Comparison& comparison : result.claim->comparisons) {
    result.comparisons.push_back({.comparison = &comparison});
    metrics.insert(comparison.metrics.begin(), comparison.metrics.end());
  }
  for (const std::string& metric : metrics) {
    for (const Group group :
         {Group::kDecidesByRatio, Group::kDecidesByLevel, Group::kDecidesNothing}) {
      std::vector<Asked> asked;
      std::vector<ComparisonResult*> owners;
      for (ComparisonResult& one : result.comparisons) {
        const Comparison& comparison = *one.comparison;
        if (group_of(comparison) != group ||
            std::ranges::find(comparison.metrics, metric) == comparison.metrics.end())
          continue;
        for (const Cell& cell : cells) {
          if (!applies_to(comparison, cell)) continue;
          asked.push_back(
              {cell.id, comparison.aio, comparison.threads, analysis.margin(comparison, metric)});
          owners.push_back(&one);
        }
      }
      auto verdicts = decide_family(analysis, measured, asked, metric);
      for (std::size_t i = 0; i < verdicts.size(); ++i)
        owners[i]->cells.push_back(std::move(verdicts[i]));
    }
  }
}

// Counters that are told, over the kept runs; where they have none, of the runs that only count.
void report_counters(const std::vector<Cell>& cells, const Measured& measured,
                     const std::vector<StoredRun>& runs, ClaimResult& result) {
  const auto median_in = [&](const std::string& cell, const std::string& arm,
                             const std::string& counter) -> std::optional<double> {
    std::vector<double> values;
    const auto take = [&](const StoredRun& run) {
      const auto found = run.record.counters.find(counter);
      if (found != run.record.counters.end()) values.push_back(found->second);
    };
    const auto arms = measured.find(cell);
    if (arms != measured.end() && arms->second.contains(arm)) {
      for (const auto& [round, run] : arms->second.at(arm)) take(*run);
    }
    if (values.empty()) {
      for (const StoredRun& run : runs) {
        if (run.round == StoredRun::kCounting && run.cell == cell && run.arm == arm) take(run);
      }
    }
    if (values.empty()) return std::nullopt;
    return median_of(std::move(values));
  };
  for (ComparisonResult& one : result.comparisons) {
    const Comparison& comparison = *one.comparison;
    for (const Cell& cell : cells) {
      if (!applies_to(comparison, cell)) continue;
      for (const std::string& counter : comparison.reports) {
        one.reported.push_back({.cell = cell.id,
                                .counter = counter,
                                .aio = median_in(cell.id, comparison.aio, counter),
                                .threads = median_in(cell.id, comparison.threads, counter)});
      }
    }
  }
}

std::string refusal_of(const ControlResult& controls, const std::string& metric) {
  if (!controls.refusal.empty()) return controls.refusal;
  const auto found = controls.refusals.find(metric);
  return found == controls.refusals.end() ? "" : found->second;
}

// Whether a cell's sides are what they are said to be: yes, no, or these blocks cannot tell.
std::optional<bool> is_as_claimed(const Level& level, const CellVerdict& cell) {
  if (cell.verdict == Verdict::kNotMeasured) return std::nullopt;
  bool is_sure = true;
  const auto ask = [&is_sure](bool holds, bool fails) {
    is_sure = is_sure && holds;
    return fails;
  };
  bool fails = false;
  if (level.aio_above) {
    const double bound = std::log(*level.aio_above);
    fails |= ask(cell.log_aio.lower > bound, cell.log_aio.upper < bound);
  }
  if (level.aio_below) {
    const double bound = std::log(*level.aio_below);
    fails |= ask(cell.log_aio.upper<bound, cell.log_aio.lower> bound);
  }
  if (level.threads_at_most) {
    const bool is_as_much =
        cell.verdict == Verdict::kWash || cell.verdict == Verdict::kThreadsWin ||
        (level.aio_above && cell.log_threads.lower > std::log(*level.aio_above));
    fails |= ask(cell.log_threads.upper <= std::log(*level.threads_at_most), is_as_much);
  }
  if (fails) return false;
  return is_sure ? std::optional(true) : std::nullopt;
}

std::string outcome_by_level(const Rules& rules, const Level& level,
                             const std::vector<const CellVerdict*>& cells) {
  double as_claimed = 0;
  double otherwise = 0;
  for (const CellVerdict* const cell : cells) {
    const auto is_so = is_as_claimed(level, *cell);
    if (is_so) ++(*is_so ? as_claimed : otherwise);
  }
  const auto all = static_cast<double>(cells.size());
  if (as_claimed / all >= rules.wash_share_min) return kAsClaimed;
  return otherwise / all > rules.win_share_min ? kNotAsClaimed : kInconclusive;
}

std::string outcome_of_metric(const Rules& rules, const Comparison& comparison,
                              const std::string& metric,
                              const std::vector<const CellVerdict*>& cells,
                              const std::map<Verdict, std::size_t>& counts) {
  std::string outcome = outcome_of(rules, counts);
  if (outcome == kNotMeasured) return outcome;
  if (comparison.expects == Expectation::kLevel)
    return outcome_by_level(rules, comparison.levels.at(metric), cells);
  if (comparison.expects != Expectation::kNoWorse) return outcome;
  const auto no_worse = std::ranges::count_if(
      cells, [&](const CellVerdict* cell) { return cell->p_no_worse <= rules.alpha; });
  const auto all = static_cast<double>(cells.size());
  if (static_cast<double>(no_worse) / all >= rules.wash_share_min) return kNoWorse;
  // To be better in some of the cells is not to be worse.
  return outcome == to_string(Verdict::kAioWins) ? kInconclusive : outcome;
}

void sum_up_metrics(const Analysis& analysis, const ControlResult& controls, ClaimResult& result) {
  for (const ComparisonResult& one : result.comparisons) {
    const Comparison& comparison = *one.comparison;
    if (!comparison.decides) continue;
    for (const std::string& metric : comparison.metrics) {
      MetricOutcome outcome{.comparison = &comparison, .metric = metric};
      std::vector<const CellVerdict*> cells;
      for (const CellVerdict& cell : one.cells) {
        if (cell.metric != metric) continue;
        cells.push_back(&cell);
        ++outcome.counts[cell.verdict];
      }
      outcome.outcome =
          outcome_of_metric(analysis.rules, comparison, metric, cells, outcome.counts);
      if (outcome.outcome != kNotMeasured) outcome.reason = refusal_of(controls, metric);
      if (!outcome.reason.empty()) outcome.outcome = kNoVerdict;
      result.metrics.push_back(std::move(outcome));
    }
  }
}

std::string words_of_metrics(const ClaimResult& result) {
  const auto deciding = std::ranges::count_if(
      result.comparisons, [](const ComparisonResult& one) { return one.comparison->decides; });
  std::string words;
  for (const MetricOutcome& metric : result.metrics) {
    words += fmt::format(
        "{}{}{}: {} ({} wash, {} AIO, {} threads, {} open", words.empty() ? "" : "; ",
        deciding > 1 ? metric.comparison->name + ", " : "", metric.metric, metric.outcome,
        count_of(metric.counts, Verdict::kWash), count_of(metric.counts, Verdict::kAioWins),
        count_of(metric.counts, Verdict::kThreadsWin),
        count_of(metric.counts, Verdict::kInconclusive));
    const std::size_t unmeasured = count_of(metric.counts, Verdict::kNotMeasured);
    words += unmeasured == 0 ? ")" : fmt::format(", {} not measured)", unmeasured);
  }
  return words;
}

// The outcome that is expected.
std::string_view wanted_by(const Comparison& comparison) {
  switch (comparison.expects) {
    case Expectation::kWash:
      return to_string(Verdict::kWash);
    case Expectation::kAioWins:
      return to_string(Verdict::kAioWins);
    case Expectation::kThreadsWin:
      return to_string(Verdict::kThreadsWin);
    case Expectation::kNoWorse:
      return kNoWorse;
    case Expectation::kLevel:
      return kAsClaimed;
  }
  return {};
}

// A claim holds if each comparison that decides comes out as is expected of it, and does not hold
// if any surely does not. A metric that was not measured is as far from what is expected as one
// that is INCONCLUSIVE.
void conclude_share(ClaimResult& result) {
  bool all_hold = true;
  bool any_fails = false;
  bool any_measured = false;
  bool any_refused = false;
  for (const Comparison& comparison : result.claim->comparisons) {
    if (!comparison.decides) continue;
    std::size_t metrics = 0;
    std::size_t as_expected = 0;
    std::size_t otherwise = 0;
    for (const MetricOutcome& metric : result.metrics) {
      if (metric.comparison != &comparison) continue;
      ++metrics;
      if (metric.outcome == kNotMeasured) continue;
      any_measured = true;
      if (metric.outcome == kNoVerdict) {
        any_refused = true;
      } else if (metric.outcome == wanted_by(comparison)) {
        ++as_expected;
      } else if (metric.outcome != kInconclusive) {
        ++otherwise;
      }
    }
    all_hold = all_hold && (comparison.needs_all ? as_expected == metrics : as_expected > 0);
    any_fails = any_fails || (comparison.needs_all ? otherwise > 0 : otherwise == metrics);
  }
  if (!any_measured) {
    result.outcome = kNotMeasured;
  } else if (any_fails) {
    result.outcome = kDoesNotHold;
  } else if (all_hold) {
    result.outcome = kHolds;
  } else {
    result.outcome = any_refused ? kNoVerdict : kInconclusive;
  }
  result.words = words_of_metrics(result);
}

// Below the rates that a claim of a crossover names nothing may be won by latency, and most must be
// a wash.
struct Below {
  std::size_t cells{0};
  std::size_t washes{0};
  std::size_t wins{0};
};

double rate_of(const std::string& cell, const std::vector<Cell>& cells) {
  const auto found = std::ranges::find(cells, cell, &Cell::id);
  const std::string level = found == cells.end() ? "" : level_of(*found, "rate_iops");
  return level.empty() ? 0 : std::stod(level);
}

// The share of a core that each arm takes at each rate, run by run, and the line through the extra.
void conclude_crossover(const Analysis& analysis, const std::vector<Cell>& cells,
                        const Measured& measured, ClaimResult& result) {
  const auto deciding =
      std::ranges::find(result.comparisons, true,
                        [](const ComparisonResult& one) { return one.comparison->decides; });
  Crossover crossover;
  std::vector<double> rates;
  std::vector<double> extras;
  std::string unmeasured;
  for (const CellVerdict& cell : deciding->cells) {
    if (cell.metric != "cpu") continue;
    if (cell.verdict == Verdict::kNotMeasured) {
      unmeasured += fmt::format("; not measured: {} ({})", cell.cell, cell.reason);
      continue;
    }
    const Paired paired = pair_up(measured, cell.cell, deciding->comparison->aio,
                                  deciding->comparison->threads, "cpu");
    const double rate = rate_of(cell.cell, cells);
    for (std::size_t i = 0; i < paired.aio.size(); ++i) {
      // us per operation, times operations per second, in cores.
      crossover.aio_points.emplace_back(rate, paired.aio[i] * rate / 1e6);
      crossover.threads_points.emplace_back(rate, paired.threads[i] * rate / 1e6);
      rates.push_back(rate);
      extras.push_back((paired.threads[i] - paired.aio[i]) * rate / 1e6);
      crossover.points.emplace_back(rate, extras.back());
    }
  }
  Below below;
  for (const CellVerdict& cell : deciding->cells) {
    if (cell.metric == "cpu" || rate_of(cell.cell, cells) >= analysis.rules.crossover_low) continue;
    ++below.cells;
    below.washes += cell.verdict == Verdict::kWash ? 1 : 0;
    below.wins += cell.verdict == Verdict::kAioWins ? 1 : 0;
  }
  const auto share_below = [&](std::size_t count) {
    return below.cells == 0 ? 0 : static_cast<double>(count) / static_cast<double>(below.cells);
  };
  const auto line = fit_line(rates, extras, analysis.rules.alpha);
  if (!line) {
    result.outcome = kNotMeasured;
    result.words = "fewer than two rates were measured" + unmeasured;
    return;
  }
  const Rules& rules = analysis.rules;
  crossover.line = *line;
  crossover.extra_us = line->slope * 1e6;
  if (line->slope > 0)
    crossover.per_second =
        std::max(0.0, (rules.crossover_core_share - line->intercept) / line->slope);
  std::string where = "at no rate";
  if (crossover.per_second) {
    where = *crossover.per_second > 0
                ? fmt::format("at {:.0f} operations per second", *crossover.per_second)
                : "at every rate";
  }
  result.words = fmt::format(
      "a pool takes {:.2f} us more per operation ({:.2f} to {:.2f}; R^2 {:.2f}), which is {:.0f} % "
      "of a core {}",
      crossover.extra_us, line->slope_lower * 1e6, line->slope_upper * 1e6, line->r_squared,
      rules.crossover_core_share * 100, where);
  result.words += fmt::format("; by latency below {:.0f} per second {} of {} are a wash, {} AIO's",
                              rules.crossover_low, below.washes, below.cells, below.wins);
  result.words += unmeasured;
  std::string refusal;
  for (const MetricOutcome& metric : result.metrics) {
    if (metric.outcome == kNoVerdict) refusal = metric.reason;
  }
  // What the line says must be sure over the whole of its interval.
  const auto at = [&](double slope) {
    return slope <= 0 ? HUGE_VAL : (rules.crossover_core_share - line->intercept) / slope;
  };
  const double earliest = at(line->slope_upper);
  const double latest = at(line->slope_lower);
  // Where a line describes it badly, where the line crosses says nothing either way.
  const bool is_line = line->r_squared >= rules.crossover_r_squared_min;
  if (!refusal.empty()) {
    result.outcome = kNoVerdict;
    result.words += "; " + refusal;
  } else if (share_below(below.wins) > rules.win_share_min ||
             (is_line && (latest < rules.crossover_low || earliest >= rules.crossover_high))) {
    result.outcome = kDoesNotHold;
  } else if (is_line && earliest >= rules.crossover_low && latest < rules.crossover_high &&
             share_below(below.washes) >= rules.wash_share_min) {
    result.outcome = kHolds;
  } else {
    result.outcome = kInconclusive;
  }
  if (!is_line)
    result.words += fmt::format("; no line, for R^2 is below {}", rules.crossover_r_squared_min);
  result.crossover = std::move(crossover);
}

// Whether what decides has a far larger effect than the other comparisons.
void conclude_dominance(const Analysis& analysis, const ControlResult& controls,
                        ClaimResult& result) {
  const Rules& rules = analysis.rules;
  double engines = 0;
  std::optional<double> least;
  std::optional<double> most;
  std::string unmeasured;
  for (const ComparisonResult& one : result.comparisons) {
    for (const CellVerdict& cell : one.cells) {
      if (cell.verdict == Verdict::kNotMeasured) {
        unmeasured +=
            fmt::format("; not measured: {}, {} ({})", one.comparison->aio, cell.cell, cell.reason);
        continue;
      }
      if (!one.comparison->decides) {
        engines = std::max(engines, std::expm1(std::abs(cell.log_ratio.mean)));
      } else {
        least = std::min(least.value_or(HUGE_VAL), std::expm1(cell.log_ratio.lower));
        most = std::max(most.value_or(-HUGE_VAL), std::expm1(cell.log_ratio.upper));
      }
    }
  }
  if (!least) {
    result.outcome = kNotMeasured;
    result.words = "flushes were not measured" + unmeasured;
    return;
  }
  // An engine effect that is nothing would be dominated by anything.
  const double yardstick = std::max(engines, rules.margins.at("rate"));
  result.words = fmt::format(
      "without flushes the rate changes by {:.0f} % to {:.0f} %; the largest difference between "
      "engines is {:.0f} %",
      *least * 100, *most * 100, engines * 100);
  result.words += unmeasured;
  // Least, most and largest are those of all cells or nothing.
  const bool is_whole = unmeasured.empty();
  const std::string refusal = refusal_of(controls, "rate");
  if (!refusal.empty()) {
    result.outcome = kNoVerdict;
    result.words += "; " + refusal;
  } else if (is_whole && *least >= rules.dominance_holds_from * yardstick) {
    result.outcome = kHolds;
  } else if (is_whole && *most < rules.dominance_refuted_below * yardstick) {
    result.outcome = kDoesNotHold;
  } else {
    result.outcome = kInconclusive;
  }
}

// What one comparison gains from a shallow cell to a deep one, block by block.
struct Gains {
  std::vector<double> aio;  // logarithms
  std::vector<double> threads;
  std::vector<double> differences;
  std::string reason;  // why there is too little of it
};

Gains gains_of(const Rules& rules, const Measured& measured, const Comparison& comparison,
               const std::string& from, const std::string& to) {
  Gains gains;
  const auto rate_in = [&](const std::string& cell, const std::string& arm,
                           int round) -> std::optional<double> {
    const auto arms = measured.find(cell);
    if (arms == measured.end() || !arms->second.contains(arm)) return std::nullopt;
    const auto& runs = arms->second.at(arm);
    const auto run = runs.find(round);
    return run == runs.end() ? std::nullopt : value_of(*run->second, "rate");
  };
  const std::set<int> rounds = rounds_of(measured, from);
  for (const int round : rounds) {
    const auto a = rate_in(from, comparison.aio, round);
    const auto b = rate_in(to, comparison.aio, round);
    const auto c = rate_in(from, comparison.threads, round);
    const auto d = rate_in(to, comparison.threads, round);
    if (!a || !b || !c || !d) continue;
    gains.aio.push_back(std::log(*b / *a));
    gains.threads.push_back(std::log(*d / *c));
    gains.differences.push_back(gains.aio.back() - gains.threads.back());
  }
  const std::size_t blocks = gains.differences.size();
  if (blocks < 2 ||
      static_cast<double>(blocks) < rules.blocks_share_min * static_cast<double>(rounds.size()))
    gains.reason = fmt::format("{}: {} of {} rounds have a rate of both engines at both depths",
                               comparison.aio, blocks, rounds.size());
  return gains;
}

// How much more a deeper cell does than a shallow one, for each arm. All comparisons are one family
// of Holm's.
void conclude_gain(const Analysis& analysis, const ControlResult& controls,
                   const std::vector<Cell>& cells, const Measured& measured, ClaimResult& result) {
  const Claim& claim = *result.claim;
  const Rules& rules = analysis.rules;
  const auto cell_with = [&](const Comparison& comparison, const std::string& value) {
    for (const Cell& cell : cells) {
      if (applies_to(comparison, cell) && level_of(cell, claim.gain_level) == value) return cell.id;
    }
    return std::string();
  };
  std::vector<std::vector<double>> differences;
  std::vector<std::string> words;
  bool all_gain = true;
  bool all_measured = true;
  for (const Comparison& comparison : claim.comparisons) {
    Gains gains = gains_of(rules, measured, comparison, cell_with(comparison, claim.gain_from),
                           cell_with(comparison, claim.gain_to));
    if (!gains.reason.empty()) {
      all_measured = false;
      words.push_back("not measured: " + gains.reason);
      continue;
    }
    const double aio_gain = std::exp(estimate(gains.aio, rules.alpha).mean);
    const double threads_gain = std::exp(estimate(gains.threads, rules.alpha).mean);
    if (std::min(aio_gain, threads_gain) < rules.gain_factor_min) all_gain = false;
    words.push_back(
        fmt::format("{}: {} at once instead of {} is {:.2f} times as fast, with "
                    "threads {:.2f} times",
                    comparison.aio, claim.gain_to, claim.gain_from, aio_gain, threads_gain));
    differences.push_back(std::move(gains.differences));
  }
  result.words = fmt::format("{}", fmt::join(words, "; "));
  const auto decisions = decide(differences, std::log1p(rules.gain_margin), rules.alpha);
  const std::string refusal = refusal_of(controls, "rate");
  if (differences.empty()) {
    result.outcome = kNotMeasured;
  } else if (!refusal.empty()) {
    result.outcome = kNoVerdict;
    result.words += "; " + refusal;
  } else if (std::ranges::any_of(decisions, [](const CellDecision& decision) {
               return decision.direction == Direction::kAbove ||
                      decision.direction == Direction::kBelow;
             })) {
    result.outcome = kDoesNotHold;
  } else {
    const bool all_alike = std::ranges::all_of(decisions, [](const CellDecision& decision) {
      return decision.direction == Direction::kEquivalent;
    });
    result.outcome = all_measured && all_alike && all_gain ? kHolds : kInconclusive;
  }
}

}  // namespace

std::string_view to_string(Verdict verdict) {
  switch (verdict) {
    case Verdict::kWash:
      return "WASH";
    case Verdict::kAioWins:
      return "AIO WINS";
    case Verdict::kThreadsWin:
      return "THREADS WIN";
    case Verdict::kInconclusive:
      return "INCONCLUSIVE";
    case Verdict::kNotMeasured:
      return "NOT MEASURED";
  }
  return "?";
}

bool is_more_better(std::string_view metric) {
  return metric == "rate" || metric == "stream_rate" || metric == "per_wakeup" ||
         metric == "per_call";
}

Measured kept_runs(const std::vector<StoredRun>& runs) {
  std::map<std::pair<std::string, int>, unsigned> kept;
  for (const StoredRun& run : runs) {
    if (run.block_end && run.is_kept) kept[{run.cell, run.round}] = run.attempt;
  }
  Measured measured;
  for (const StoredRun& run : runs) {
    const auto attempt = kept.find({run.cell, run.round});
    if (attempt != kept.end() && attempt->second == run.attempt)
      measured[run.cell][run.arm][run.round] = &run;
  }
  return measured;
}

Judgement judge(const Analysis& analysis, const Preset& preset, const std::vector<Cell>& cells,
                const std::vector<StoredRun>& runs) {
  Judgement judgement;
  judgement.runs = runs.size();
  for (const StoredRun& run : runs) {
    if (run.error.empty()) continue;
    ++judgement.failed_runs;
    judgement.skipped[run.cell + " " + run.arm] = run.error;
  }
  const Measured measured = kept_runs(runs);
  judgement.controls = check_controls(analysis, preset, cells, measured, runs);
  for (const Claim& claim : analysis.claims) {
    ClaimResult result{.claim = &claim};
    compare_all(analysis, cells, measured, result);
    report_counters(cells, measured, runs, result);
    sum_up_metrics(analysis, judgement.controls, result);
    switch (claim.rule) {
      case ClaimRule::kShare:
        conclude_share(result);
        break;
      case ClaimRule::kCrossover:
        conclude_crossover(analysis, cells, measured, result);
        break;
      case ClaimRule::kDominance:
        conclude_dominance(analysis, judgement.controls, result);
        break;
      case ClaimRule::kGain:
        conclude_gain(analysis, judgement.controls, cells, measured, result);
        break;
    }
    judgement.claims.push_back(std::move(result));
  }
  return judgement;
}

}  // namespace vblk::wash
