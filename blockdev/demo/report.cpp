#include "blockdev/demo/report.h"

#include <algorithm>
#include <functional>
#include <iterator>

#include <fmt/core.h>
#include <fmt/format.h>

namespace vblk::demo {

namespace {

// With fewer operations than ten beyond it, a quantile is the luck of single ones.
constexpr double kOperationsBeyondQuantileMin = 10;
// Below this there is no spread to compare with.
constexpr std::size_t kRoundsForVerdict = 3;

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const std::size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

struct Comparison {
  double ratio_median;
  double ratio_min;
  double ratio_max;
  bool apart;  // the slower one's best round is below the faster one's worst
};

// Round by round, so that what disturbs the machine for a while disturbs both.
Comparison compare(const Series& faster, const Series& slower) {
  std::vector<double> ratios;
  std::ranges::transform(faster.operations_per_second, slower.operations_per_second,
                         std::back_inserter(ratios), std::divides{});
  const auto [least, most] = std::ranges::minmax(ratios);
  return {.ratio_median = median(ratios),
          .ratio_min = least,
          .ratio_max = most,
          .apart = std::ranges::min(faster.operations_per_second) >
                   std::ranges::max(slower.operations_per_second)};
}

std::string with_thousands(double value) {
  const std::string digits = fmt::format("{:.0f}", value);
  std::string text;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

std::string quantile(const bench::LatencyHistogram& latencies, double fraction) {
  const double beyond = (1 - fraction) * static_cast<double>(latencies.total());
  // The product is a hair off where it should be exactly ten.
  if (beyond < kOperationsBeyondQuantileMin - 1e-6) return "n/a";
  const double microseconds = latencies.quantile_ns(fraction) / 1000;
  return microseconds < 1000 ? fmt::format("{:.1f}", microseconds) : with_thousands(microseconds);
}

std::string factor(const Comparison& comparison) {
  return fmt::format("{:.2f}x ({:.2f} to {:.2f} by round)", comparison.ratio_median,
                     comparison.ratio_min, comparison.ratio_max);
}

// The engines' numbers, the fastest median first.
std::vector<std::size_t> ranking(const std::vector<EngineResults>& results, std::size_t workload) {
  std::vector<std::size_t> order(results.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::ranges::sort(order, std::ranges::greater{}, [&](std::size_t engine) {
    return median(results[engine].series[workload].operations_per_second);
  });
  return order;
}

std::string workload_verdict(const std::vector<EngineResults>& results, std::size_t workload) {
  const auto order = ranking(results, workload);
  const EngineResults& leader = results[order[0]];
  std::vector<std::string> ahead_of;
  std::vector<std::string> level_with;
  for (std::size_t i = 1; i < order.size(); ++i) {
    const EngineResults& other = results[order[i]];
    const auto comparison = compare(leader.series[workload], other.series[workload]);
    (comparison.apart ? ahead_of : level_with)
        .push_back(fmt::format("{}, {}", other.engine, factor(comparison)));
  }
  if (ahead_of.empty()) {
    return fmt::format("no difference seen. {} against {}.", leader.engine,
                       fmt::join(level_with, "; against "));
  }
  if (level_with.empty()) {
    return fmt::format("{} won: ahead of {}.", leader.engine, fmt::join(ahead_of, "; of "));
  }
  return fmt::format("{} is ahead of {}. No difference seen against {}.", leader.engine,
                     fmt::join(ahead_of, "; of "), fmt::join(level_with, "; against "));
}

}  // namespace

void Series::add(const bench::RunResult& result) {
  const bench::JobResult& job = result.jobs.front();
  const auto& measured =
      job.latencies[job.workload.flush_every != 0
                        ? bench::kWriteAndFlush
                        : static_cast<std::size_t>(job.workload.read_percent == 100
                                                       ? bench::Operation::kRead
                                                       : bench::Operation::kWrite)];
  const auto count = static_cast<double>(measured.total());
  operations_per_second.push_back(job.per_second(measured.total()));
  cpu_us_per_operation.push_back(
      std::chrono::duration<double, std::micro>(result.usage.cpu_time).count() / count);
  context_switches_per_operation.push_back(
      static_cast<double>(result.usage.context_switches.sum()) / count);
  latencies.merge(measured);
}

std::string table(const std::vector<EngineResults>& results) {
  std::string text;
  auto out = std::back_inserter(text);
  fmt::format_to(out, "{:<12}{:>9}{:>21}{:>10}{:>10}{:>10}{:>9}{:>9}\n", "", "IOPS", "(min to max)",
                 "p50 us", "p99 us", "p99.9 us", "CPU us", "context");
  fmt::format_to(out, "{:<12}{:>9}{:>21}{:>10}{:>10}{:>10}{:>9}{:>9}\n", "", "", "", "", "", "",
                 "per I/O", "switches");
  for (std::size_t workload = 0; workload < workloads.size(); ++workload) {
    fmt::format_to(out, "{}\n", workloads[workload].name);
    for (const EngineResults& result : results) {
      const Series& series = result.series[workload];
      const auto [least, most] = std::ranges::minmax(series.operations_per_second);
      fmt::format_to(out, "  {:<10}{:>9}{:>21}{:>10}{:>10}{:>10}{:>9.1f}{:>9.2f}\n", result.engine,
                     with_thousands(median(series.operations_per_second)),
                     fmt::format("({} to {})", with_thousands(least), with_thousands(most)),
                     quantile(series.latencies, 0.5), quantile(series.latencies, 0.99),
                     quantile(series.latencies, 0.999), median(series.cpu_us_per_operation),
                     median(series.context_switches_per_operation));
    }
  }
  return text;
}

std::string verdict(const std::vector<EngineResults>& results) {
  if (results.size() < 2) return {};
  std::string text;
  const std::size_t rounds = results.front().series.front().operations_per_second.size();
  if (rounds < kRoundsForVerdict) {
    return fmt::format(
        "{} is too few to tell a difference from chance; give --rounds {} or more.\n",
        rounds == 1 ? "One round" : fmt::format("{} rounds", rounds), kRoundsForVerdict);
  }
  for (std::size_t workload = 0; workload < workloads.size(); ++workload) {
    text +=
        fmt::format("  {}: {}\n", workloads[workload].name, workload_verdict(results, workload));
  }
  return text;
}

}  // namespace vblk::demo
