#include "blockdev/wash/judge.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include <fmt/core.h>

namespace vblk::wash {

namespace {

constexpr const char* kDepends = "DEPENDS ON THE CELL";
constexpr const char* kNoVerdict = "NO VERDICT";
constexpr const char* kHolds = "HOLDS";
constexpr const char* kDoesNotHold = "DOES NOT HOLD";
constexpr const char* kInconclusive = "INCONCLUSIVE";
constexpr const char* kNotMeasured = "NOT MEASURED";
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

// What one metric of two arms says in the blocks that have both.
struct Paired {
  std::vector<double> log_ratios;
  std::vector<double> aio;
  std::vector<double> threads;
  std::string reason;  // why there are none
};

std::string why_none(const Measured& measured, const std::string& cell, const std::string& arm,
                     const std::string& metric) {
  const auto arms = measured.find(cell);
  if (arms == measured.end()) return "the cell was not run";
  const auto runs = arms->second.find(arm);
  if (runs == arms->second.end() || runs->second.empty()) return arm + " was not run";
  const StoredRun& last = *runs->second.rbegin()->second;
  if (!last.error.empty()) return fmt::format("{}: {}", arm, last.error);
  if (last.record.saturated) return arm + " could not follow the rate";
  if (metric == "p50" || metric == "p99")
    return fmt::format("{}: too few samples ({}) for {}", arm, last.record.samples, metric);
  return fmt::format("{} has no {}", arm, metric);
}

Paired pair_up(const Measured& measured, const std::string& cell, const std::string& aio,
               const std::string& threads, const std::string& metric) {
  Paired paired;
  const auto arms = measured.find(cell);
  if (arms != measured.end() && arms->second.contains(aio) && arms->second.contains(threads)) {
    const auto& others = arms->second.at(threads);
    for (const auto& [round, run] : arms->second.at(aio)) {
      const auto other = others.find(round);
      if (other == others.end()) continue;
      const auto one = value_of(*run, metric);
      const auto two = value_of(*other->second, metric);
      if (!one || !two) continue;
      paired.log_ratios.push_back(std::log(*one / *two));
      paired.aio.push_back(*one);
      paired.threads.push_back(*two);
    }
  }
  if (paired.log_ratios.size() >= 2) return paired;
  paired.reason = why_none(measured, cell, aio, metric);
  if (const auto why = why_none(measured, cell, threads, metric); !paired.log_ratios.empty()) {
    paired.reason = "fewer than two blocks";
  } else if (paired.reason.ends_with(" has no " + metric) || paired.reason.empty()) {
    paired.reason = why;
  }
  return paired;
}

// A family: what is decided together, Holm's adjustment over all of it.
struct Asked {
  std::string cell;
  std::string aio;
  std::string threads;
};

std::vector<CellVerdict> decide_family(const Analysis& analysis, const Measured& measured,
                                       const std::vector<Asked>& asked, const std::string& metric,
                                       Sides sides = Sides::kBoth) {
  const double margin = analysis.margin(metric);
  const double alpha = analysis.rules.alpha;
  std::vector<CellVerdict> verdicts;
  std::vector<std::vector<double>> samples;
  std::vector<std::size_t> indexes;
  for (const Asked& one : asked) {
    Paired paired = pair_up(measured, one.cell, one.aio, one.threads, metric);
    CellVerdict verdict{.cell = one.cell, .metric = metric, .reason = paired.reason};
    if (paired.reason.empty()) {
      verdict.log_ratio = estimate(paired.log_ratios, alpha);
      verdict.aio_median = median_of(paired.aio);
      verdict.threads_median = median_of(paired.threads);
      verdict.bootstrap = bootstrap(paired.log_ratios, alpha, paired.log_ratios.size());
      verdict.blocks_for_wash =
          blocks_for_wash(verdict.log_ratio.standard_deviation, margin, alpha, kPower);
      samples.push_back(std::move(paired.log_ratios));
      indexes.push_back(verdicts.size());
    }
    verdicts.push_back(std::move(verdict));
  }
  const auto decisions = decide(samples, margin, alpha, sides);
  const bool more = is_more_better(metric);
  for (std::size_t i = 0; i < decisions.size(); ++i) {
    CellVerdict& verdict = verdicts[indexes[i]];
    verdict.p_equivalent = decisions[i].p_equivalent;
    verdict.p_better = more ? decisions[i].p_above : decisions[i].p_below;
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

std::string outcome_of(const Rules& rules, const std::map<Verdict, std::size_t>& counts) {
  const auto all = static_cast<double>(measured_in(counts));
  if (all == 0) return kNotMeasured;
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
  const auto asked_in = [&](const std::vector<std::string>& families, const std::string& one,
                            const std::string& other) {
    std::vector<Asked> asked;
    for (const Cell& cell : cells) {
      if (std::ranges::find(families, cell.family->id) != families.end())
        asked.push_back({cell.id, one, other});
    }
    return asked;
  };
  for (const std::string& metric : controls.again_metrics) {
    auto verdicts = decide_family(
        analysis, measured,
        asked_in(controls.again_families, controls.again, controls.again_against), metric);
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
    }
    std::vector<double> widths;
    for (const CellVerdict& verdict : verdicts) {
      if (verdict.verdict == Verdict::kNotMeasured) continue;
      widths.push_back(std::expm1((verdict.log_ratio.upper - verdict.log_ratio.lower) / 2));
    }
    if (!widths.empty()) result.again_within[metric] = median_of(std::move(widths));
    result.again_cells.insert(result.again_cells.end(), verdicts.begin(), verdicts.end());
  }
  result.slowed =
      decide_family(analysis, measured,
                    asked_in(controls.slowed_families, controls.slowed, controls.slowed_against),
                    controls.slowed_metric,
                    is_more_better(controls.slowed_metric) ? Sides::kBelow : Sides::kAbove);
  for (const CellVerdict& verdict : result.slowed) {
    if (verdict.verdict == Verdict::kNotMeasured) continue;
    ++result.slowed_cells;
    if (verdict.verdict == Verdict::kThreadsWin) ++result.slowed_found;
  }
  if (result.slowed_cells == 0) {
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

std::vector<std::string> deciding_metrics(const Claim& claim) {
  std::vector<std::string> metrics;
  for (const Comparison& comparison : claim.comparisons) {
    if (!comparison.decides) continue;
    for (const std::string& metric : comparison.metrics) {
      if (std::ranges::find(metrics, metric) == metrics.end()) metrics.push_back(metric);
    }
  }
  return metrics;
}

// All comparisons of a claim; one family of Holm's for each metric of those that decide, and one of
// the others.
void compare_all(const Analysis& analysis, const std::vector<Cell>& cells, const Measured& measured,
                 ClaimResult& result) {
  for (const Comparison& comparison : result.claim->comparisons)
    result.comparisons.push_back({.comparison = &comparison, .cells = {}});
  std::set<std::string> metrics;
  for (const Comparison& comparison : result.claim->comparisons)
    metrics.insert(comparison.metrics.begin(), comparison.metrics.end());
  for (const std::string& metric : metrics) {
    for (const bool decides : {true, false}) {
      std::vector<Asked> asked;
      std::vector<ComparisonResult*> owners;
      for (ComparisonResult& one : result.comparisons) {
        const Comparison& comparison = *one.comparison;
        if (comparison.decides != decides ||
            std::ranges::find(comparison.metrics, metric) == comparison.metrics.end())
          continue;
        for (const Cell& cell : cells) {
          if (!applies_to(comparison, cell)) continue;
          asked.push_back({cell.id, comparison.aio, comparison.threads});
          owners.push_back(&one);
        }
      }
      auto verdicts = decide_family(analysis, measured, asked, metric);
      for (std::size_t i = 0; i < verdicts.size(); ++i)
        owners[i]->cells.push_back(std::move(verdicts[i]));
    }
  }
}

std::string refusal_of(const ControlResult& controls, const std::string& metric) {
  if (!controls.refusal.empty()) return controls.refusal;
  const auto found = controls.refusals.find(metric);
  return found == controls.refusals.end() ? "" : found->second;
}

void sum_up_metrics(const Analysis& analysis, const ControlResult& controls, ClaimResult& result) {
  for (const std::string& metric : deciding_metrics(*result.claim)) {
    MetricOutcome outcome{.metric = metric};
    for (const ComparisonResult& one : result.comparisons) {
      if (!one.comparison->decides) continue;
      for (const CellVerdict& cell : one.cells) {
        if (cell.metric == metric) ++outcome.counts[cell.verdict];
      }
    }
    outcome.outcome = outcome_of(analysis.rules, outcome.counts);
    outcome.reason = refusal_of(controls, metric);
    if (outcome.outcome != kNotMeasured && !outcome.reason.empty()) outcome.outcome = kNoVerdict;
    result.metrics.push_back(std::move(outcome));
  }
}

std::string words_of_metrics(const ClaimResult& result) {
  std::string words;
  for (const MetricOutcome& metric : result.metrics) {
    words += fmt::format(
        "{}{}: {} ({} wash, {} AIO, {} threads, {} open)", words.empty() ? "" : "; ", metric.metric,
        metric.outcome, count_of(metric.counts, Verdict::kWash),
        count_of(metric.counts, Verdict::kAioWins), count_of(metric.counts, Verdict::kThreadsWin),
        count_of(metric.counts, Verdict::kInconclusive));
  }
  return words;
}

void conclude_share(ClaimResult& result) {
  const std::string& expected = result.claim->expects;
  std::size_t as_expected = 0;
  std::size_t otherwise = 0;
  std::size_t measured = 0;
  bool refused = false;
  for (const MetricOutcome& metric : result.metrics) {
    if (metric.outcome == kNotMeasured) continue;
    ++measured;
    if (metric.outcome == kNoVerdict) refused = true;
    if (metric.outcome == expected) {
      ++as_expected;
    } else if (metric.outcome != kInconclusive && metric.outcome != kNoVerdict) {
      ++otherwise;
    }
  }
  const bool needs_all = result.claim->needs_all;
  if (measured == 0) {
    result.outcome = kNotMeasured;
  } else if (needs_all ? as_expected == measured : as_expected > 0) {
    result.outcome = kHolds;
  } else if (needs_all ? otherwise > 0 : otherwise == measured) {
    result.outcome = kDoesNotHold;
  } else {
    result.outcome = refused ? kNoVerdict : kInconclusive;
  }
  result.words = words_of_metrics(result);
}

double rate_of(const std::string& cell, const std::vector<Cell>& cells) {
  const auto found = std::ranges::find(cells, cell, &Cell::id);
  const std::string level = found == cells.end() ? "" : level_of(*found, "rate_iops");
  return level.empty() ? 0 : std::stod(level);
}

// The share of a core that each arm takes at each rate, run by run, and the line through the extra.
void conclude_crossover(const Analysis& analysis, const ControlResult& controls,
                        const std::vector<Cell>& cells, const Measured& measured,
                        ClaimResult& result) {
  const auto deciding =
      std::ranges::find(result.comparisons, true,
                        [](const ComparisonResult& one) { return one.comparison->decides; });
  Crossover crossover;
  std::vector<double> rates;
  std::vector<double> extras;
  for (const CellVerdict& cell : deciding->cells) {
    if (cell.metric != "cpu") continue;
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
  const auto line = fit_line(rates, extras, analysis.rules.alpha);
  if (!line) {
    result.outcome = kNotMeasured;
    result.words = "fewer than two rates were measured";
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
  const std::string refusal = refusal_of(controls, "cpu");
  // What the line says must be sure over the whole of its interval.
  const auto at = [&](double slope) {
    return slope <= 0 ? HUGE_VAL : (rules.crossover_core_share - line->intercept) / slope;
  };
  const double earliest = at(line->slope_upper);
  const double latest = at(line->slope_lower);
  if (!refusal.empty()) {
    result.outcome = kNoVerdict;
    result.words += "; " + refusal;
  } else if (earliest >= rules.crossover_low && latest < rules.crossover_high &&
             line->r_squared >= rules.crossover_r_squared_min) {
    result.outcome = kHolds;
  } else if (latest < rules.crossover_low || earliest >= rules.crossover_high) {
    result.outcome = kDoesNotHold;
  } else {
    result.outcome = kInconclusive;
  }
  result.crossover = std::move(crossover);
}

// Whether what decides has a far larger effect than the other comparisons.
void conclude_dominance(const Analysis& analysis, const ControlResult& controls,
                        ClaimResult& result) {
  const Rules& rules = analysis.rules;
  double engines = 0;
  std::optional<double> least;
  std::optional<double> most;
  for (const ComparisonResult& one : result.comparisons) {
    for (const CellVerdict& cell : one.cells) {
      if (cell.verdict == Verdict::kNotMeasured) continue;
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
    result.words = "flushes were not measured";
    return;
  }
  // An engine effect that is nothing would be dominated by anything.
  const double yardstick = std::max(engines, rules.margins.at("rate"));
  result.words = fmt::format(
      "without flushes the rate changes by {:.0f} % to {:.0f} %; the largest difference between "
      "engines is {:.0f} %",
      *least * 100, *most * 100, engines * 100);
  const std::string refusal = refusal_of(controls, "rate");
  if (!refusal.empty()) {
    result.outcome = kNoVerdict;
    result.words += "; " + refusal;
  } else if (*least >= rules.dominance_holds_from * yardstick) {
    result.outcome = kHolds;
  } else if (*most < rules.dominance_refuted_below * yardstick) {
    result.outcome = kDoesNotHold;
  } else {
    result.outcome = kInconclusive;
  }
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

// Block by block: how much more a deeper cell does than a shallow one, for each arm.
void conclude_gain(const Analysis& analysis, const ControlResult& controls,
                   const std::vector<Cell>& cells, const Measured& measured, ClaimResult& result) {
  const Claim& claim = *result.claim;
  const auto cell_with = [&](const Comparison& comparison, const std::string& value) {
    for (const Cell& cell : cells) {
      if (applies_to(comparison, cell) && level_of(cell, claim.gain_level) == value) return cell.id;
    }
    return std::string();
  };
  const auto rate_in = [&](const std::string& cell, const std::string& arm, int round) {
    const auto arms = measured.find(cell);
    if (arms == measured.end() || !arms->second.contains(arm)) return std::optional<double>();
    const auto& runs = arms->second.at(arm);
    const auto run = runs.find(round);
    return run == runs.end() ? std::optional<double>() : value_of(*run->second, "rate");
  };
  bool all_alike = true;
  bool any_differs = false;
  bool all_gain = true;
  std::size_t seen = 0;
  for (const Comparison& comparison : claim.comparisons) {
    const std::string from = cell_with(comparison, claim.gain_from);
    const std::string to = cell_with(comparison, claim.gain_to);
    std::vector<double> differences;
    std::vector<double> aio_gains;
    std::vector<double> threads_gains;
    for (const int round : rounds_of(measured, from)) {
      const auto a = rate_in(from, comparison.aio, round);
      const auto b = rate_in(to, comparison.aio, round);
      const auto c = rate_in(from, comparison.threads, round);
      const auto d = rate_in(to, comparison.threads, round);
      if (!a || !b || !c || !d) continue;
      aio_gains.push_back(std::log(*b / *a));
      threads_gains.push_back(std::log(*d / *c));
      differences.push_back(aio_gains.back() - threads_gains.back());
    }
    if (differences.size() < 2) continue;
    ++seen;
    const double alpha = analysis.rules.alpha;
    const auto tests = test_margin(differences, std::log1p(analysis.rules.gain_margin));
    if (tests.equivalent > alpha) all_alike = false;
    if (std::min(tests.above, tests.below) * 2 <= alpha) any_differs = true;
    const double aio_gain = std::exp(estimate(aio_gains, alpha).mean);
    const double threads_gain = std::exp(estimate(threads_gains, alpha).mean);
    if (std::min(aio_gain, threads_gain) < analysis.rules.gain_factor_min) all_gain = false;
    result.words += fmt::format(
        "{}{}: {} at once instead of {} is {:.2f} times as fast, with "
        "threads {:.2f} times",
        result.words.empty() ? "" : "; ", comparison.aio, claim.gain_to, claim.gain_from, aio_gain,
        threads_gain);
  }
  const std::string refusal = refusal_of(controls, "rate");
  if (seen == 0) {
    result.outcome = kNotMeasured;
    result.words = "flushes were not measured at both depths";
  } else if (!refusal.empty()) {
    result.outcome = kNoVerdict;
    result.words += "; " + refusal;
  } else if (any_differs) {
    result.outcome = kDoesNotHold;
  } else {
    result.outcome = all_alike && all_gain ? kHolds : kInconclusive;
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
  return metric == "rate" || metric == "stream_rate" || metric == "per_wakeup";
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
    sum_up_metrics(analysis, judgement.controls, result);
    switch (claim.rule) {
      case ClaimRule::kShare:
        conclude_share(result);
        break;
      case ClaimRule::kCrossover:
        conclude_crossover(analysis, judgement.controls, cells, measured, result);
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
