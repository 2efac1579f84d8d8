#include "blockdev/wash/report.h"

#include <algorithm>
#include <array>
#include <cmath>

#include <boost/json.hpp>
#include <fmt/core.h>

namespace vblk::wash {

namespace {

namespace json = boost::json;

constexpr int kSchema = 1;

std::string wrapped(const std::string& text, std::size_t width, const std::string& indent) {
  std::string lines;
  std::string line;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = std::min(text.find(' ', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    if (!line.empty() && indent.size() + line.size() + 1 + word.size() > width) {
      lines += indent + line + "\n";
      line.clear();
    }
    line += (line.empty() ? "" : " ") + word;
    begin = end + 1;
  }
  return lines + (line.empty() ? "" : indent + line + "\n");
}

std::string claim_text(const Report& report, const ClaimResult& result) {
  std::string text =
      fmt::format("{}  {}  {}\n", result.claim->id, result.outcome, result.claim->title);
  text += wrapped("\"" + result.claim->sentence + "\"", 100, "    ");
  text += wrapped(result.words, 100, "    ");
  for (const MetricOutcome& metric : result.metrics) {
    if (!metric.reason.empty() && metric.reason != report.judgement.controls.refusal)
      text +=
          wrapped(fmt::format("{}: no verdict, for {}", metric.metric, metric.reason), 100, "    ");
  }
  for (const ComparisonResult& comparison : result.comparisons) {
    if (comparison.cells.empty()) continue;
    text += fmt::format("    {} ({}): ratios of {} to {}\n", comparison.comparison->name,
                        part_text(*result.claim, *comparison.comparison),
                        comparison.comparison->aio, comparison.comparison->threads);
    text += fmt::format("      {:<34}{:<12}{:>26}  {:>8}  {}\n", "cell", "metric",
                        "ratio (90 % interval)", "blocks", "verdict");
    for (const CellVerdict& cell : comparison.cells) {
      std::string verdict = verdict_text(*report.analysis, *comparison.comparison, cell.verdict);
      if (!cell.reason.empty()) verdict += ": " + cell.reason;
      if (cell.verdict == Verdict::kInconclusive && cell.blocks_for_wash > cell.log_ratio.count)
        verdict += fmt::format(" (a wash would need about {} blocks)", cell.blocks_for_wash);
      if (!cell.missing.empty()) verdict += fmt::format(" (missing: {})", cell.missing);
      text += fmt::format("      {:<34}{:<12}{:>26}  {:>8}  {}\n", cell.cell, cell.metric,
                          ratio_text(cell), blocks_text(cell), verdict);
    }
    for (const Reported& one : comparison.reported)
      text += fmt::format("      {:<34}{}: {} and {}\n", one.cell, counter_name(one.counter),
                          counter_text(one.aio), counter_text(one.threads));
  }
  return text + "\n";
}

json::object counts_json(const std::map<Verdict, std::size_t>& counts) {
  json::object object;
  for (const auto& [verdict, count] : counts) object[to_string(verdict)] = count;
  return object;
}

json::object cell_json(const CellVerdict& cell) {
  json::object object{{"cell", cell.cell},
                      {"metric", cell.metric},
                      {"verdict", to_string(cell.verdict)},
                      {"blocks", cell.log_ratio.count},
                      {"blocks_of", cell.blocks_of}};
  if (!cell.missing.empty()) object["missing"] = cell.missing;
  if (!cell.reason.empty()) object["reason"] = cell.reason;
  if (cell.verdict == Verdict::kNotMeasured) return object;
  object["ratio"] = std::exp(cell.log_ratio.mean);
  object["interval"] = json::array{std::exp(cell.log_ratio.lower), std::exp(cell.log_ratio.upper)};
  object["standard_deviation_of_log_ratio"] = cell.log_ratio.standard_deviation;
  object["p_equivalent"] = cell.p_equivalent;
  object["p_better"] = cell.p_better;
  object["p_worse"] = cell.p_worse;
  object["p_no_worse"] = cell.p_no_worse;
  object["margin"] = std::expm1(cell.margin);
  object["aio_interval"] = json::array{std::exp(cell.log_aio.lower), std::exp(cell.log_aio.upper)};
  object["threads_interval"] =
      json::array{std::exp(cell.log_threads.lower), std::exp(cell.log_threads.upper)};
  object["aio_median"] = cell.aio_median;
  object["threads_median"] = cell.threads_median;
  object["blocks_for_wash"] = cell.blocks_for_wash;
  if (cell.bootstrap)
    object["bootstrap_interval"] =
        json::array{std::exp(cell.bootstrap->lower), std::exp(cell.bootstrap->upper)};
  return object;
}

json::array cells_json(const std::vector<CellVerdict>& cells) {
  json::array array;
  for (const CellVerdict& cell : cells) array.push_back(cell_json(cell));
  return array;
}

json::array reported_json(const std::vector<Reported>& reported) {
  json::array array;
  for (const Reported& one : reported) {
    json::object object{{"cell", one.cell}, {"counter", one.counter}};
    if (one.aio) object["aio"] = *one.aio;
    if (one.threads) object["threads"] = *one.threads;
    array.push_back(std::move(object));
  }
  return array;
}

const char* rule_name(ClaimRule rule) {
  switch (rule) {
    case ClaimRule::kShare:
      return "share";
    case ClaimRule::kCrossover:
      return "crossover";
    case ClaimRule::kDominance:
      return "dominance";
    case ClaimRule::kGain:
      return "gain";
  }
  return "?";
}

json::object claim_json(const ClaimResult& result) {
  json::array metrics;
  for (const MetricOutcome& metric : result.metrics) {
    metrics.push_back(
        json::object{{"comparison", metric.comparison->name},
                     {"expected", expectation_text(*metric.comparison, metric.metric)},
                     {"metric", metric.metric},
                     {"outcome", metric.outcome},
                     {"counts", counts_json(metric.counts)},
                     {"no_verdict_because", metric.reason}});
  }
  json::array comparisons;
  for (const ComparisonResult& one : result.comparisons) {
    comparisons.push_back(json::object{{"name", one.comparison->name},
                                       {"aio", one.comparison->aio},
                                       {"threads", one.comparison->threads},
                                       {"decides", one.comparison->decides},
                                       {"cells", cells_json(one.cells)},
                                       {"reported", reported_json(one.reported)}});
  }
  json::object object{{"id", result.claim->id},
                      {"title", result.claim->title},
                      {"rule", rule_name(result.claim->rule)},
                      {"sentence", result.claim->sentence},
                      {"outcome", result.outcome},
                      {"words", result.words},
                      {"metrics", std::move(metrics)},
                      {"comparisons", std::move(comparisons)}};
  if (result.crossover) {
    const Crossover& crossover = *result.crossover;
    json::object line{{"extra_us_per_operation", crossover.extra_us},
                      {"extra_us_interval", json::array{crossover.line.slope_lower * 1e6,
                                                        crossover.line.slope_upper * 1e6}},
                      {"intercept_cores", crossover.line.intercept},
                      {"r_squared", crossover.line.r_squared}};
    if (crossover.per_second) line["crossover_per_second"] = *crossover.per_second;
    object["crossover"] = std::move(line);
  }
  return object;
}

json::object texts_json(const std::map<std::string, std::string>& values) {
  json::object object;
  for (const auto& [name, value] : values) object[name] = value;
  return object;
}

// In double quotes where CSV (RFC 4180) asks for it.
std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char letter : text) {
    if (letter == '"') quoted += '"';
    quoted += letter;
  }
  return quoted + "\"";
}

}  // namespace

std::string verdict_text(const Analysis& analysis, const Comparison& comparison, Verdict verdict) {
  const auto is_thread = [&analysis](const std::string& arm) {
    const aio::EngineName engine = analysis.arms.at(arm).engine;
    return engine == aio::EngineName::kThreads || engine == aio::EngineName::kInline;
  };
  const bool is_aio_against_threads = !is_thread(comparison.aio) && is_thread(comparison.threads);
  if (!is_aio_against_threads && verdict == Verdict::kAioWins) return comparison.aio + " WINS";
  if (!is_aio_against_threads && verdict == Verdict::kThreadsWin)
    return comparison.threads + " WINS";
  return std::string(to_string(verdict));
}

std::string ratio_text(const CellVerdict& cell) {
  if (cell.verdict == Verdict::kNotMeasured) return "n/a";
  return fmt::format("{:.3f} ({:.3f} to {:.3f})", std::exp(cell.log_ratio.mean),
                     std::exp(cell.log_ratio.lower), std::exp(cell.log_ratio.upper));
}

std::string blocks_text(const CellVerdict& cell) {
  return fmt::format("{} of {}", cell.log_ratio.count, cell.blocks_of);
}

std::string counter_name(const std::string& counter) {
  if (counter == "system_calls_per_io") return "system calls per operation, load included";
  if (counter == "requests_per_submission") return "requests in a submission";
  if (counter == "sleeps_per_io") return "times asleep per operation";
  if (counter == "preemptions_per_io") return "times interrupted per operation";
  return counter;
}

std::string counter_text(const std::optional<double>& value) {
  return value ? fmt::format("{:.3g}", *value) : "not known";
}

std::string expectation_text(const Comparison& comparison, const std::string& metric) {
  switch (comparison.expects) {
    case Expectation::kWash:
      return "WASH";
    case Expectation::kAioWins:
      return comparison.margins.contains(metric)
                 ? fmt::format("AIO WINS by a factor of {:g}", 1 + comparison.margins.at(metric))
                 : "AIO WINS";
    case Expectation::kThreadsWin:
      return "THREADS WIN";
    case Expectation::kNoWorse:
      return "NO WORSE";
    case Expectation::kLevel:
      break;
  }
  const Level& level = comparison.levels.at(metric);
  std::string text;
  const auto add = [&](const std::string& arm, const char* how,
                       const std::optional<double>& bound) {
    if (bound) text += fmt::format("{}{} {} {:g}", text.empty() ? "" : ", ", arm, how, *bound);
  };
  add(comparison.aio, "above", level.aio_above);
  add(comparison.aio, "below", level.aio_below);
  add(comparison.threads, "at most", level.threads_at_most);
  return text;
}

std::string part_text(const Claim& claim, const Comparison& comparison) {
  if (!comparison.decides) return "decides nothing";
  if (claim.rule != ClaimRule::kShare) return "decides";
  std::string text;
  for (const std::string& metric : comparison.metrics)
    text += fmt::format("{}{} by {}",
                        text.empty()           ? "must be "
                        : comparison.needs_all ? ", "
                                               : " or ",
                        expectation_text(comparison, metric), metric);
  return text;
}

std::string metric_name(const std::string& metric) {
  if (metric == "rate") return "operations per second";
  if (metric == "p50") return "median latency";
  if (metric == "p99") return "p99 latency";
  if (metric == "cpu") return "processor time of the process per operation";
  if (metric == "machine_cpu") return "processor time of the machine per operation";
  if (metric == "per_wakeup") return "results per sleep of the loop";
  if (metric == "wake_cost") return "time to hand over";
  if (metric == "submit_max") return "longest submission";
  if (metric == "stream_rate") return "rate of the stream";
  if (metric == "per_call") return "requests in a call";
  if (metric == "write_p99") return "p99 latency of the stream's writes";
  return metric;
}

std::string label_of(const Report& report) {
  return fmt::format("{}{} (preset {}, {} rounds)", report.preset->label,
                     report.complete ? "" : ", and not all of it is done", report.preset->name,
                     report.preset->rounds);
}

std::string controls_text(const ControlResult& controls, const Preset& preset) {
  std::string text;
  for (const auto& [metric, counts] : controls.again) {
    std::string words;
    std::size_t differences = 0;
    for (const auto& [verdict, count] : counts) {
      if (verdict == Verdict::kAioWins || verdict == Verdict::kThreadsWin) {
        differences += count;
      } else {
        words += fmt::format("{}{} {}", words.empty() ? "" : ", ", count, to_string(verdict));
      }
    }
    if (differences > 0)
      words += fmt::format("{}{} DIFFERENT", words.empty() ? "" : ", ", differences);
    const auto within = controls.again_within.find(metric);
    if (within != controls.again_within.end())
      words += fmt::format(", within {:.1f} %", within->second * 100);
    text += fmt::format("An engine compared with itself, {}: {}. ", metric_name(metric), words);
  }
  text += fmt::format("An engine slowed down by {:.0f} % was found in {} of {} cells. ",
                      preset.slowdown * 100, controls.slowed_found, controls.slowed_cells);
  text += fmt::format("Of {} blocks {} are noisy; {} were repeated.", controls.blocks,
                      controls.noisy_blocks, controls.repeated_blocks);
  if (!controls.refusal.empty()) text += " No verdict, for " + controls.refusal + ".";
  return text;
}

std::string skipped_text(const Report& report) {
  std::string text;
  for (const SkippedDevice& one : report.skipped)
    text +=
        fmt::format("{} of the cells skipped, those of {}: {}\n", one.cells, one.device, one.why);
  return text;
}

std::vector<std::string> limits_of(const Experiment& experiment) {
  std::vector<std::string> limits;
  const auto fact = [&](const char* name) {
    const auto found = experiment.machine.find(name);
    return found == experiment.machine.end() ? std::string() : found->second;
  };
  const std::string processors = fact("processors");
  // Load, loop, and workers for a batch; with fewer processors they take turns.
  constexpr unsigned long kProcessorsForAll = 4;
  if (!processors.empty() && std::stoul("0" + processors) < kProcessorsForAll)
    limits.push_back(
        fmt::format("Load, loop and workers share {} processors: what is won by "
                    "working at the same time can hardly be seen, nor what many "
                    "processors get into each other's way with (C2).",
                    std::stoul("0" + processors)));
  if (fact("virtual machine") == "yes")
    limits.push_back(
        "A virtual machine: its processors and its disk are others' as well, and to "
        "wake an idle processor takes the hypervisor.");
  if (const std::string counters = fact("performance counters");
      !counters.empty() && counters != "yes")
    limits.push_back(
        fmt::format("No performance counters ({}): what an engine costs is processor "
                    "time, not cycles, and cache lines cannot be watched.",
                    counters));
  if (fact("block device, queues") == "1")
    limits.push_back(
        "The disk has one queue: submissions of several threads meet there, whatever "
        "the engine.");
  if (fact("block device, fua") == "0" && fact("block device, write_cache") == "write back")
    limits.push_back(
        "The disk has a volatile cache and no FUA: each durable write is a write and "
        "a flush.");
  return limits;
}

std::string headline(const Report& report) {
  std::string text;
  for (const ClaimResult& claim : report.judgement.claims) {
    if (claim.outcome == "NOT MEASURED") continue;
    text += fmt::format("  {:<4} {:<14} {}\n", claim.claim->id, claim.outcome, claim.claim->title);
  }
  return text.empty() ? "  nothing was measured\n" : text;
}

std::string text_report(const Report& report) {
  const Experiment& experiment = *report.experiment;
  std::string text = fmt::format("vblk wash: {}\n\n", label_of(report));
  text += headline(report);
  text += "\n" + wrapped(controls_text(report.judgement.controls, *report.preset), 100, "") + "\n";
  for (const std::string& note : report.notes) text += wrapped("note: " + note, 100, "");
  text += skipped_text(report);
  for (const std::string& limit : limits_of(experiment))
    text += wrapped("limit: " + limit, 100, "");
  for (const auto& [name, value] : experiment.devices)
    text += fmt::format("device {}: {}\n", name, value);
  for (const auto& [name, value] : experiment.machine) text += fmt::format("{}: {}\n", name, value);
  text += fmt::format("begun {}, seed {}, analysis {}\n\n", experiment.started, experiment.seed,
                      report.analysis->digest.substr(0, 16));
  for (const auto& [what, why] : report.judgement.skipped)
    text += wrapped(fmt::format("skipped: {}: {}", what, why), 100, "");
  if (!report.judgement.skipped.empty()) text += "\n";
  for (const ClaimResult& claim : report.judgement.claims) text += claim_text(report, claim);
  return text;
}

std::string json_report(const Report& report) {
  json::array claims;
  for (const ClaimResult& claim : report.judgement.claims) claims.push_back(claim_json(claim));
  const ControlResult& controls = report.judgement.controls;
  json::object again;
  for (const auto& [metric, counts] : controls.again) again[metric] = counts_json(counts);
  json::object within;
  for (const auto& [metric, part] : controls.again_within) within[metric] = part;
  json::object control_object{{"again", std::move(again)},
                              {"again_within", std::move(within)},
                              {"slowed_found", controls.slowed_found},
                              {"slowed_cells", controls.slowed_cells},
                              {"blocks", controls.blocks},
                              {"noisy_blocks", controls.noisy_blocks},
                              {"repeated_blocks", controls.repeated_blocks},
                              {"no_verdict_because", controls.refusal},
                              {"no_verdict_of_metric_because", texts_json(controls.refusals)},
                              {"again_cells", cells_json(controls.again_cells)},
                              {"slowed", cells_json(controls.slowed)}};
  json::array skipped;
  for (const SkippedDevice& one : report.skipped)
    skipped.push_back(
        json::object{{"device", one.device}, {"cells", one.cells}, {"because", one.why}});
  json::array limits;
  for (const std::string& limit : limits_of(*report.experiment))
    limits.push_back(json::string(limit));
  json::array notes;
  for (const std::string& note : report.notes) notes.push_back(json::string(note));
  const Experiment& experiment = *report.experiment;
  return json::serialize(json::object{{"schema", kSchema},
                                      {"preset", report.preset->name},
                                      {"label", report.preset->label},
                                      {"complete", report.complete},
                                      {"seed", experiment.seed},
                                      {"started", experiment.started},
                                      {"analysis_sha256", report.analysis->digest},
                                      {"identity", texts_json(experiment.identity)},
                                      {"machine", texts_json(experiment.machine)},
                                      {"devices", texts_json(experiment.devices)},
                                      {"runs", report.judgement.runs},
                                      {"failed_runs", report.judgement.failed_runs},
                                      {"skipped", texts_json(report.judgement.skipped)},
                                      {"skipped_cells", std::move(skipped)},
                                      {"limits", std::move(limits)},
                                      {"notes", std::move(notes)},
                                      {"controls", std::move(control_object)},
                                      {"claims", std::move(claims)}}) +
         "\n";
}

std::string csv_of_runs(const std::vector<StoredRun>& runs) {
  constexpr std::array kMetrics{"rate",        "p50",        "p99",       "cpu",
                                "machine_cpu", "per_wakeup", "wake_cost", "submit_max",
                                "stream_rate", "per_call",   "write_p99"};
  constexpr std::array kCounters{"sleeps_per_io", "preemptions_per_io", "requests_per_submission",
                                 "punts_per_io",  "generator_cpu",      "system_calls_per_io"};
  std::string text = "cell,arm,round,attempt,kept,noisy,samples,saturated,steal_share,error";
  for (const char* name : kMetrics) text += fmt::format(",{}", name);
  for (const char* name : kCounters) text += fmt::format(",{}", name);
  text += "\n";
  const auto field = [](const std::map<std::string, double>& values, const char* name) {
    const auto found = values.find(name);
    return found == values.end() ? std::string(",") : fmt::format(",{:.6g}", found->second);
  };
  for (const StoredRun& run : runs) {
    text += fmt::format("{},{},{},{},{:d},{:d},{},{:d},{:.4f},{}", run.cell, run.arm, run.round,
                        run.attempt, run.is_kept, run.noisy, run.record.samples,
                        run.record.saturated, run.record.steal_share, csv_field(run.error));
    for (const char* name : kMetrics) text += field(run.record.metrics, name);
    for (const char* name : kCounters) text += field(run.record.counters, name);
    text += "\n";
  }
  return text;
}

}  // namespace vblk::wash
