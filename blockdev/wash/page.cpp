// The report as one page.
#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/markup.h"
#include "blockdev/wash/report.h"
#include "blockdev/wash/svg.h"

namespace vblk::wash {

namespace {

constexpr const char* kStyle = R"css(
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --soft: #f3f4f6; --line: #c9ced6;
  --band: #dbe7f5; --wash: #3566a8; --aio: #1d7a4a; --threads: #a8480f; --open: #6b7280;
  --s0: #a8480f; --s1: #1d7a4a; --s2: #3566a8; --s3: #8a3ffc; --s4: #6b7280; --s5: #b0107d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #15181c; --soft: #20252b; --line: #47505b; --band: #24354a;
    --wash: #8ab4f0; --aio: #63cf95; --threads: #f0a06a; --open: #a3abb6;
    --s0: #f0a06a; --s1: #63cf95; --s2: #8ab4f0; --s3: #c3a1ff; --s4: #a3abb6; --s5: #f08cc8; } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --soft: #f3f4f6; --line: #999;
  --band: #e4e4e4; } section { break-inside: auto; } tr, svg { break-inside: avoid; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  .scroll { overflow: visible; } .scroll > svg { min-width: 0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
blockquote { margin: 0.5rem 0; padding: 0.2rem 1rem; border-left: 4px solid var(--line); font-style: italic; }
.label { display: inline-block; padding: 0.1rem 0.6rem; background: var(--soft); border: 1px solid var(--line);
  border-radius: 1rem; }
.scroll { overflow-x: auto; } .scroll > svg { min-width: 44rem; width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-size: 0.9rem; } .scroll > table { min-width: 100%; }
th, td { text-align: left; padding: 0.25rem 0.7rem 0.25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.outcome { font-weight: 600; white-space: nowrap; }
.WASH, .HOLDS { color: var(--wash); } .AIO { color: var(--aio); } .THREADS, .DOES { color: var(--threads); }
.INCONCLUSIVE, .NOT, .NO, .DEPENDS { color: var(--open); }
svg text { fill: var(--ink); } svg text.small { font-size: 13px; }
svg .band { fill: var(--band); } svg .one { stroke: var(--ink); stroke-dasharray: 4 3; }
svg .axis { stroke: var(--ink); } svg .grid { stroke: var(--line); stroke-width: 0.6; }
svg .interval { stroke: currentColor; stroke-width: 2.5; } svg .dot { fill: currentColor; }
svg polyline.series { fill: none; stroke-width: 1.8; } svg .dashed { stroke-dasharray: 6 4; }
svg .s0 { stroke: var(--s0); } svg .s1 { stroke: var(--s1); } svg .s2 { stroke: var(--s2); }
svg .s3 { stroke: var(--s3); } svg .s4 { stroke: var(--s4); } svg .s5 { stroke: var(--s5); }
svg circle.s0, svg .key.s0 { fill: var(--s0); } svg circle.s1, svg .key.s1 { fill: var(--s1); }
svg circle.s2, svg .key.s2 { fill: var(--s2); } svg circle.s3, svg .key.s3 { fill: var(--s3); }
svg circle.s4, svg .key.s4 { fill: var(--s4); } svg circle.s5, svg .key.s5 { fill: var(--s5); }
summary { cursor: pointer; }
)css";

// The first word is a class of the style sheet.
std::string class_of(const std::string& outcome) { return outcome.substr(0, outcome.find(' ')); }

std::string badge(const std::string& outcome) {
  return fmt::format("<span class=\"outcome {}\">{}</span>", class_of(outcome),
                     bench::escaped(outcome));
}

std::string facts_table(const std::map<std::string, std::string>& facts) {
  std::string table = "<div class=\"scroll\"><table>";
  for (const auto& [name, value] : facts)
    table +=
        fmt::format("<tr><th>{}</th><td>{}</td></tr>", bench::escaped(name), bench::escaped(value));
  return table + "</table></div>\n";
}

std::string headline_table(const Report& report) {
  std::string table =
      "<div class=\"scroll\"><table "
      "id=\"headline\"><tr><th></th><th>outcome</th><th>claim</th></tr>\n";
  for (const ClaimResult& claim : report.judgement.claims) {
    table += fmt::format(
        "<tr><td><a href=\"#{0}\">{0}</a></td><td>{1}</td><td>{2}<br><q>{3}</q></td></tr>\n",
        bench::escaped(claim.claim->id), badge(claim.outcome), bench::escaped(claim.claim->title),
        bench::escaped(claim.claim->sentence));
  }
  return table + "</table></div>\n";
}

std::vector<ForestRow> forest_rows(const std::vector<CellVerdict>& cells) {
  std::vector<ForestRow> rows;
  for (const CellVerdict& cell : cells) {
    if (cell.verdict == Verdict::kNotMeasured) continue;
    rows.push_back({.label = fmt::format("{} {}", cell.cell, cell.metric),
                    .value = ratio_text(cell),
                    .verdict_class = class_of(std::string(to_string(cell.verdict))),
                    .middle = cell.log_ratio.mean,
                    .lower = cell.log_ratio.lower,
                    .upper = cell.log_ratio.upper,
                    .margin = cell.margin});
  }
  return rows;
}

std::string cells_table(const Analysis& analysis, const Comparison& comparison,
                        const std::vector<CellVerdict>& cells) {
  std::string table =
      "<details><summary>numbers</summary><div class=\"scroll\"><table><tr><th>cell</th>"
      "<th>metric</th><th>AIO side</th><th>thread side</th><th>ratio, 90 % interval</th>"
      "<th>blocks</th><th>verdict</th></tr>\n";
  for (const CellVerdict& cell : cells) {
    const std::string verdict(to_string(cell.verdict));
    table += fmt::format("<tr><td>{}</td><td>{}</td>", bench::escaped(cell.cell),
                         bench::escaped(cell.metric));
    if (cell.verdict == Verdict::kNotMeasured) {
      table += "<td></td><td></td><td></td>";
    } else {
      table += fmt::format(
          "<td class=\"number\">{:.4g}</td><td class=\"number\">{:.4g}</td><td "
          "class=\"number\">{}</td>",
          cell.aio_median, cell.threads_median, ratio_text(cell));
    }
    table += fmt::format(
        "<td class=\"number\">{}</td><td><span class=\"outcome {}\">{}</span> {}</td></tr>\n",
        blocks_text(cell), class_of(verdict),
        bench::escaped(verdict_text(analysis, comparison, cell.verdict)),
        bench::escaped(cell.missing.empty() ? cell.reason : "missing: " + cell.missing));
  }
  return table + "</table></div></details>\n";
}

std::string reported_table(const ComparisonResult& result) {
  if (result.reported.empty()) return {};
  std::string table = fmt::format(
      "<div class=\"scroll\"><table><tr><th>cell</th><th>beside "
      "it</th><th>{}</th><th>{}</th></tr>\n",
      bench::escaped(result.comparison->aio), bench::escaped(result.comparison->threads));
  for (const Reported& one : result.reported)
    table += fmt::format(
        "<tr><td>{}</td><td>{}</td><td class=\"number\">{}</td>"
        "<td class=\"number\">{}</td></tr>\n",
        bench::escaped(one.cell), bench::escaped(counter_name(one.counter)), counter_text(one.aio),
        counter_text(one.threads));
  return table + "</table></div>\n";
}

std::string comparison_part(const Analysis& analysis, const Claim& claim,
                            const ComparisonResult& result) {
  if (result.cells.empty()) return {};
  const Comparison& comparison = *result.comparison;
  std::string part =
      fmt::format("<h3>{} <small>({})</small></h3>\n", bench::escaped(comparison.name),
                  bench::escaped(part_text(claim, comparison)));
  part += fmt::format("<p>{} divided by {}; for rates more is better, for times less.</p>\n",
                      bench::escaped(analysis.arms.at(comparison.aio).what),
                      bench::escaped(analysis.arms.at(comparison.threads).what));
  part += forest_plot(forest_rows(result.cells), "smaller", "greater");
  return part + reported_table(result) + cells_table(analysis, comparison, result.cells);
}

std::string crossover_part(const Analysis& analysis, const Crossover& crossover) {
  const auto fitted = [](const std::vector<std::pair<double, double>>& points) {
    std::vector<double> x;
    std::vector<double> y;
    for (const auto& [at_x, at_y] : points) {
      x.push_back(at_x);
      y.push_back(at_y);
    }
    std::vector<std::pair<double, double>> ends;
    const auto line = fit_line(x, y, 0.05);
    if (!line) return ends;
    const auto [least, most] = std::ranges::minmax(x);
    for (const double at : {least, most}) ends.emplace_back(at, line->intercept + line->slope * at);
    return ends;
  };
  Chart plot{.x = {.label = "operations per second"},
             .y = {.label = "share of a core"},
             .series = {{"threads", crossover.threads_points, false, false},
                        {"AIO", crossover.aio_points, false, false},
                        {"what threads take more", crossover.points, false, false}}};
  plot.series.push_back({"threads, fitted", fitted(crossover.threads_points), true, false});
  plot.series.push_back({"AIO, fitted", fitted(crossover.aio_points), true, true});
  plot.series.push_back({"more, fitted", fitted(crossover.points), true, true});
  if (crossover.per_second) {
    plot.vertical = {*crossover.per_second, fmt::format("r*: {:.0f} % of a core",
                                                        analysis.rules.crossover_core_share * 100)};
  }
  return chart(plot);
}

std::string claim_part(const Report& report, const ClaimResult& claim) {
  std::string part =
      fmt::format("<section id=\"{0}\"><h2>{0} {1} {2}</h2>\n", bench::escaped(claim.claim->id),
                  bench::escaped(claim.claim->title), badge(claim.outcome));
  part += fmt::format("<blockquote>{}</blockquote>\n<p>{}</p>\n",
                      bench::escaped(claim.claim->sentence), bench::escaped(claim.words));
  std::set<std::string> reasons;
  for (const MetricOutcome& metric : claim.metrics) {
    if (!metric.reason.empty() && metric.reason != report.judgement.controls.refusal)
      reasons.insert(metric.reason);
  }
  for (const std::string& reason : reasons)
    part += fmt::format("<p>No verdict where {}.</p>\n", bench::escaped(reason));
  if (claim.crossover) part += crossover_part(*report.analysis, *claim.crossover);
  for (const ComparisonResult& comparison : claim.comparisons)
    part += comparison_part(*report.analysis, *claim.claim, comparison);
  return part + "</section>\n";
}

// Latency over the number of nines of an arm in a cell, all kept runs together.
std::vector<std::pair<double, double>> nines(const std::map<int, const StoredRun*>& runs) {
  std::map<double, std::uint64_t> merged;
  std::uint64_t total = 0;
  for (const auto& [round, run] : runs) {
    for (const auto& [latency_ns, count] : run->record.histogram) {
      merged[latency_ns] += count;
      total += count;
    }
  }
  constexpr double kNinesMax = 5;
  std::vector<std::pair<double, double>> points;
  std::uint64_t seen = 0;
  for (const auto& [latency_ns, count] : merged) {
    seen += count;
    const double beyond =
        std::max(static_cast<double>(total - seen), 0.5) / static_cast<double>(total);
    const double at = -std::log10(beyond);
    // Closer than can be seen.
    if (!points.empty() && at - points.back().first < 0.01) continue;
    points.emplace_back(std::min(at, kNinesMax), latency_ns / 1000);
    if (at >= kNinesMax) break;
  }
  return points;
}

std::string latency_part(const Report& report) {
  const Measured measured = kept_runs(*report.runs);
  std::string part;
  for (const Cell& cell : report.cells) {
    const auto arms = measured.find(cell.id);
    const Kind kind = cell.family->kind;
    if (arms == measured.end() || kind == Kind::kWake || kind == Kind::kBurst) continue;
    Chart plot{.x = {.label = "share of operations",
                     .marks = {{0.30103, "50 %"},
                               {1, "90 %"},
                               {2, "99 %"},
                               {3, "99.9 %"},
                               {4, "99.99 %"},
                               {5, "99.999 %"}}},
               .y = {.label = "us", .is_logarithmic = true}};
    for (const std::string& arm : cell.family->arms) {
      const auto runs = arms->second.find(arm);
      if (runs == arms->second.end() || report.analysis->is_control(arm)) continue;
      plot.series.push_back({arm, nines(runs->second), true, false});
    }
    const std::string drawn = chart(plot);
    if (!drawn.empty()) part += fmt::format("<h3>{}</h3>\n{}", bench::escaped(cell.id), drawn);
  }
  if (part.empty()) return {};
  return "<section id=\"latencies\"><h2>Latencies</h2>\n<p>Service times where requests wait for "
         "each other, "
         "response times in the family of rates. All kept runs of an arm together.</p>\n"
         "<details><summary>every cell</summary>\n" +
         part + "</details></section>\n";
}

double median_over(const std::map<int, const StoredRun*>& runs, const char* name) {
  std::vector<double> values;
  for (const auto& [round, run] : runs) {
    for (const auto* all : {&run->record.metrics, &run->record.counters}) {
      const auto found = all->find(name);
      if (found != all->end()) values.push_back(found->second);
    }
  }
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::ranges::nth_element(values, middle);
  return *middle;
}

// One value of each arm over how many flushes there are at once, on a device; medians over blocks.
Chart flush_chart(const Report& report, const Measured& measured, const Family& family,
                  const std::string& device, const char* name, const Axis& y) {
  Chart plot{.x = {.label = "writes with their flush at once", .is_logarithmic = true}, .y = y};
  std::map<std::string, std::vector<std::pair<double, double>>> points;
  for (const Cell& cell : report.cells) {
    const auto arms = measured.find(cell.id);
    const std::string depth = level_of(cell, "iodepth");
    if (cell.family != &family || cell.device != device || arms == measured.end() || depth.empty())
      continue;
    plot.x.marks.emplace_back(std::stod(depth), depth);
    for (const auto& [arm, runs] : arms->second) {
      // No axis has a place for none on a logarithmic scale.
      if (const double value = median_over(runs, name); value > 0)
        points[arm].emplace_back(std::stod(depth), value);
    }
  }
  for (const std::string& arm : family.arms) {
    // A line through one point is none.
    const bool is_line = points[arm].size() > 1;
    plot.series.push_back({arm, points[arm], is_line, false});
  }
  return plot;
}

std::string flushes_part(const Report& report) {
  const Family* const family = report.analysis->family("flushes");
  if (family == nullptr) return {};
  const Measured measured = kept_runs(*report.runs);
  std::set<std::string> devices;
  for (const Cell& cell : report.cells) {
    if (cell.family == family) devices.insert(cell.device);
  }
  std::string part;
  for (const std::string& device : devices) {
    std::string drawn;
    for (const auto& [title, name, y] :
         {std::tuple("How many per second", "rate",
                     Axis{.label = "per second", .is_logarithmic = true}),
          std::tuple("Until a write is durable, p99", "p99",
                     Axis{.label = "us", .is_logarithmic = true}),
          std::tuple("Flushes that the disk was sent, for each one asked for",
                     "device_flushes_per_io", Axis{.label = "flushes of the disk"})}) {
      const std::string plot = chart(flush_chart(report, measured, *family, device, name, y));
      if (!plot.empty())
        drawn += fmt::format("<h3>{}: {}</h3>\n{}", bench::escaped(device), title, plot);
    }
    part += drawn;
  }
  if (part.empty()) return {};
  return fmt::format(
      "<section id=\"flushes\"><h2>Flushes</h2>\n<p>{}; medians over the blocks.</p>\n{}"
      "</section>\n",
      bench::escaped(family->what), part);
}

std::string controls_part(const Report& report) {
  const ControlResult& controls = report.judgement.controls;
  std::string part = "<section id=\"controls\"><h2>Controls</h2>\n";
  part += fmt::format("<p>{}</p>\n", bench::escaped(controls_text(controls, *report.preset)));
  part += "<h3>An engine and itself</h3>\n" +
          forest_plot(forest_rows(controls.again_cells), "smaller", "greater");
  part += "<h3>The engine slowed down and itself</h3>\n" +
          forest_plot(forest_rows(controls.slowed), "smaller", "greater");
  return part + "</section>\n";
}

std::string reading_part(const Report& report) {
  return fmt::format(
      "<section id=\"reading\"><h2>How to read this</h2>\n<p>Each dot is the mean ratio over the "
      "blocks of a cell, its line the 90 % interval, the band behind it the margin within which a "
      "difference is too small to matter. WASH: the interval of every block's ratio lies inside "
      "the "
      "margin with an error of at most {:.0f} %, Holm's correction over the claim's cells "
      "included. A "
      "side WINS where it is surely better by more than the margin. INCONCLUSIVE says that these "
      "blocks cannot tell; it is no wash. What decides was fixed before anything was measured "
      "(analysis.json, SHA-256 {}).</p></section>\n",
      report.analysis->rules.alpha * 100, report.analysis->digest);
}

std::string setting_part(const Report& report) {
  const Experiment& experiment = *report.experiment;
  std::string part = "<section id=\"setting\"><h2>The machine and the experiment</h2>\n";
  part += facts_table(experiment.machine);
  const auto limits = limits_of(experiment);
  if (!limits.empty()) {
    part += "<h3 id=\"limits\">What this machine cannot show</h3>\n<ul>";
    for (const std::string& limit : limits)
      part += fmt::format("<li>{}</li>", bench::escaped(limit));
    part += "</ul>\n";
  }
  for (const SkippedDevice& one : report.skipped)
    part += fmt::format("<p>{} of the cells skipped, those of {}: {}.</p>\n", one.cells,
                        bench::escaped(one.device), bench::escaped(one.why));
  part += "<h3>Devices</h3>\n" + facts_table(experiment.devices);
  part += "<h3>Identity</h3>\n" + facts_table(experiment.identity);
  part += fmt::format("<p>Begun {}, seed {}; {} runs, {} of them failed.</p>\n",
                      bench::escaped(experiment.started), experiment.seed, report.judgement.runs,
                      report.judgement.failed_runs);
  if (!report.judgement.skipped.empty())
    part += "<h3>Skipped</h3>\n" + facts_table(report.judgement.skipped);
  for (const std::string& note : report.notes)
    part += fmt::format("<p>{}</p>\n", bench::escaped(note));
  return part + "</section>\n";
}

}  // namespace

std::string html_report(const Report& report) {
  std::string page = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<title>vblk wash: {}</title>\n<style>{}</style></head><body>\n",
      bench::escaped(label_of(report)), kStyle);
  page += fmt::format(
      "<h1>AIO against a thread pool: is it a wash?</h1>\n<p><span class=\"label\">{}"
      "</span> {}</p>\n",
      bench::escaped(label_of(report)), bench::escaped(report.experiment->started));
  page += headline_table(report);
  page += reading_part(report);
  page += controls_part(report);
  for (const ClaimResult& claim : report.judgement.claims) page += claim_part(report, claim);
  page += flushes_part(report);
  page += latency_part(report);
  page += setting_part(report);
  return page + "</body></html>\n";
}

}  // namespace vblk::wash
