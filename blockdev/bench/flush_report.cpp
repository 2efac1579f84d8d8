#include "blockdev/bench/flush_report.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include <boost/json.hpp>
#include <fmt/core.h>
#include <fmt/format.h>

#include "blockdev/bench/report.h"

namespace vblk::bench {

namespace {

namespace json = boost::json;

std::string notes_of(const FlushRow& row) {
  std::string notes;
  const auto note = [&notes](const std::string& text) {
    notes += (notes.empty() ? "" : "; ") + text;
  };
  if (row.passed) {
    const bool few = !known_quantile_ns(row.latencies, 0.99);
    note(fmt::format("{}{}", *row.passed ? "PASS" : "FAIL", few ? " (of few samples)" : ""));
  }
  if (row.saturated) note("SATURATED");
  if (row.sharing) note(fmt::format("{:.2f} flushes per fdatasync", *row.sharing));
  if (row.stream_bytes_per_second)
    note(fmt::format("stream {:.0f} MiB/s", *row.stream_bytes_per_second / (1 << 20)));
  if (row.device_flushes) note(fmt::format("{} reached the device", *row.device_flushes));
  if (!row.note.empty()) note(row.note);
  return notes;
}

}  // namespace

std::array<std::string, kFlushColumns.size()> flush_cells(const FlushRow& row) {
  const auto quantile = [&row](double fraction) {
    return row.saturated ? "n/a" : microseconds(known_quantile_ns(row.latencies, fraction));
  };
  return {row.target,
          std::string(to_string(row.test)),
          row.variant,
          row.timed,
          row.per_second == 0 ? "" : fmt::format("{:.0f}", row.per_second),
          quantile(0.5),
          quantile(0.9),
          quantile(0.99),
          quantile(0.999),
          row.latencies.total() == 0 ? "n/a"
                                     : microseconds(static_cast<double>(row.latencies.max_ns())),
          std::to_string(row.latencies.total()),
          notes_of(row)};
}

std::string power_cut_line(const PowerCutCheck& check) {
  return fmt::format(
      "{} cuts of a simulated disk's power, {} flushed writes lost; a disk that loses "
      "flushes {} noticed",
      check.cuts, check.lost, check.canary_noticed ? "is" : "IS NOT");
}

std::string flush_text(const FlushReport& report) {
  std::vector<std::array<std::string, kFlushColumns.size()>> lines(1);
  std::ranges::copy(kFlushColumns, lines.front().begin());
  for (const FlushRow& row : report.rows) lines.push_back(flush_cells(row));
  std::array<std::size_t, kFlushColumns.size()> widths{};
  for (const auto& line : lines) {
    for (std::size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  constexpr std::size_t kTextColumns = 4;
  std::string text;
  const auto out = std::back_inserter(text);
  for (const auto& line : lines) {
    for (std::size_t i = 0; i + 1 < line.size(); ++i) {
      if (i < kTextColumns) {
        fmt::format_to(out, "{:<{}}  ", line[i], widths[i]);
      } else {
        fmt::format_to(out, "{:>{}}  ", line[i], widths[i]);
      }
    }
    fmt::format_to(out, "{}\n", line.back());
  }
  fmt::format_to(out, "\npower-cut model: {}\n", power_cut_line(report.power_cuts));
  for (const std::string& warning : report.warnings) fmt::format_to(out, "warning: {}\n", warning);
  for (const std::string& target : report.unjudged)
    fmt::format_to(out, "NO VERDICT: {}: no write with a flush was measured\n", target);
  return text;
}

std::string flush_json(const FlushReport& report) {
  json::array rows;
  for (const FlushRow& row : report.rows) {
    json::object percentiles;
    for (const double fraction : {0.5, 0.9, 0.99, 0.999, 0.9999}) {
      if (const auto value = known_quantile_ns(row.latencies, fraction); value && !row.saturated)
        percentiles[fmt::format("{:.6f}", fraction * 100)] = static_cast<std::uint64_t>(*value);
    }
    json::array intervals;
    for (const Interval& interval : row.intervals)
      intervals.push_back({{"seconds", interval.seconds}, {"p99_ns", interval.p99_ns}});
    rows.push_back(
        {{"target", row.target},
         {"test", to_string(row.test)},
         {"variant", row.variant},
         {"timed", row.timed},
         {"per_second", row.per_second},
         {"lat_ns",
          {{"N", row.latencies.total()},
           {"min", row.latencies.min_ns()},
           {"max", row.latencies.max_ns()},
           {"mean", row.latencies.mean_ns()},
           {"percentile", std::move(percentiles)}}},
         {"flushes_per_fdatasync", row.sharing ? json::value(*row.sharing) : json::value()},
         {"device_flushes", row.device_flushes ? json::value(*row.device_flushes) : json::value()},
         {"stream_bytes_per_second",
          row.stream_bytes_per_second ? json::value(*row.stream_bytes_per_second) : json::value()},
         {"passed", row.passed ? json::value(*row.passed) : json::value()},
         {"saturated", row.saturated},
         {"note", row.note.empty() ? json::value() : json::value(row.note)},
         {"intervals", std::move(intervals)}});
  }
  const json::object document{
      {"rows", std::move(rows)},
      {"power_cuts",
       {{"cuts", report.power_cuts.cuts},
        {"lost", report.power_cuts.lost},
        {"canary_noticed", report.power_cuts.canary_noticed}}},
      {"warnings", json::array(report.warnings.begin(), report.warnings.end())},
      {"unjudged", json::array(report.unjudged.begin(), report.unjudged.end())}};
  return json::serialize(document) + "\n";
}

}  // namespace vblk::bench
