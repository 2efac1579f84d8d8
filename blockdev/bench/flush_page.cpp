#include "blockdev/bench/flush_page.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <unistd.h>
#include <utility>
#include <vector>

#include <fmt/core.h>

#include "blockdev/bench/flush_report.h"
#include "blockdev/bench/markup.h"

namespace vblk::bench {

namespace {

// For a string in double quotes.
std::string for_gnuplot(std::string_view text) {
  std::string safe;
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') safe += '\\';
    safe += letter;
  }
  return safe;
}

// Runs gnuplot with `script`, and returns the SVG that it draws.
Expected<std::string> draw(const std::string& script) {
  const auto failed = [](int error) {
    return make_error(
        ErrorKind::kIo,
        fmt::format("gnuplot draws nothing: {}", error == 0 ? "it failed" : describe_errno(error)));
  };
  std::string path = "/tmp/vblk-plot-XXXXXX";
  const int fd = ::mkstemp(path.data());
  if (fd < 0) return failed(errno);
  const auto remove = [](std::string* name) { ::unlink(name->c_str()); };
  const std::unique_ptr<std::string, decltype(remove)> removed(&path, remove);
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> input(::fdopen(fd, "r"), std::fclose);
  std::FILE* const gnuplot = ::popen("gnuplot 2> /dev/null", "we");
  if (gnuplot == nullptr) return failed(errno);
  const std::string whole = fmt::format(
      "set terminal svg size 900,420 dynamic background 'white' font 'sans-serif,12' noenhanced\n"
      "set output '{}'\nset grid\nset key outside right\n{}",
      path, script);
  std::fwrite(whole.data(), 1, whole.size(), gnuplot);
  if (::pclose(gnuplot) != 0) return failed(0);
  std::string svg;
  std::array<char, 4096> chunk{};
  while (const std::size_t count = std::fread(chunk.data(), 1, chunk.size(), input.get()))
    svg.append(chunk.data(), count);
  // A page has one XML declaration at most, and this is none of its own.
  const auto begin = svg.find("<svg");
  if (begin == std::string::npos) return failed(0);
  return svg.substr(begin);
}

// A plot of several lines, each an inline block of data.
class Plot {
 public:
  explicit Plot(std::string settings) : settings_(std::move(settings)) {}
  void line(const std::string& title, const std::vector<std::pair<double, double>>& points,
            const char* style) {
    if (points.empty()) return;
    data_ += fmt::format("$line{} << END\n", count_);
    for (const auto& [x, y] : points) data_ += fmt::format("{:g} {:g}\n", x, y);
    data_ += "END\n";
    plot_ += fmt::format("{}$line{} using 1:2 with {} title \"{}\"", count_ == 0 ? "plot " : ", ",
                         count_, style, for_gnuplot(title));
    ++count_;
  }
  [[nodiscard]] bool empty() const { return count_ == 0; }
  // `after`: added to the plot command.
  [[nodiscard]] std::string script(const std::string& after = "") const {
    return settings_ + data_ + plot_ + after + "\n";
  }

 private:
  std::string settings_;
  std::string data_;
  std::string plot_;
  int count_{0};
};

// Latency over the number of nines: 1 is 90 %, 2 is 99 %, 3 is 99.9 %.
std::vector<std::pair<double, double>> nines(const LatencyHistogram& latencies) {
  std::vector<std::pair<double, double>> points;
  const auto total = static_cast<double>(latencies.total());
  double seen = 0;
  latencies.for_each([&](double latency_ns, std::uint64_t count) {
    seen += static_cast<double>(count);
    const double beyond = std::max(total - seen, 0.5) / total;
    points.emplace_back(-std::log10(beyond), latency_ns / 1e6);
  });
  return points;
}

std::string heading(std::string_view title, std::string_view text, const std::string& svg) {
  return fmt::format("<h2>{}</h2>\n<p>{}</p>\n{}\n", title, text, svg);
}

Expected<std::string> latency_plot(const FlushReport& report, const FlushSuiteOptions& options) {
  Plot plot(
      "set logscale y\nset xlabel 'share of operations'\nset ylabel 'ms'\n"
      "set xtics ('50 %%' 0.30103, '90 %%' 1, '99 %%' 2, '99.9 %%' 3, '99.99 %%' 4, '99.999 %%' "
      "5)\n");
  for (const FlushRow& row : report.rows) {
    if (row.test == FlushTest::kOneByOne && row.timed == "write + flush")
      plot.line(row.target, nines(row.latencies), "lines lw 2");
  }
  if (plot.empty()) return std::string();
  const double limit_ms = std::chrono::duration<double, std::milli>(options.p99_limit).count();
  auto svg = draw(plot.script(fmt::format(
      ", {0:g} with lines dt 2 lc rgb 'gray40' title 'limit of p99, {0:g} ms'", limit_ms)));
  if (!svg) return svg;
  return heading("A write and its flush, one after the other",
                 "How many of the operations are at least so fast. The further right a line stays "
                 "low, the rarer are slow ones.",
                 *svg);
}

Expected<std::string> time_plot(const FlushReport& report) {
  Plot plot("set xlabel 'seconds'\nset ylabel 'p99, ms'\nset yrange [0:*]\n");
  for (const FlushRow& row : report.rows) {
    if (row.test != FlushTest::kOneByOne || row.timed != "flush") continue;
    std::vector<std::pair<double, double>> points;
    points.reserve(row.intervals.size());
    for (const Interval& interval : row.intervals)
      points.emplace_back(interval.seconds, interval.p99_ns / 1e6);
    plot.line(row.target, points, "linespoints pt 7 ps 0.4 lw 2");
  }
  if (plot.empty()) return std::string();
  auto svg = draw(plot.script());
  if (!svg) return svg;
  return heading("Flush p99, second by second",
                 "Steps and spikes are the storage's, or a neighbour's. A second with fewer than "
                 "1,000 flushes shows nearly its slowest.",
                 *svg);
}

Expected<std::string> load_plot(const FlushReport& report) {
  Plot plot(
      "set logscale y\nset xlabel 'other writes, % of the bandwidth'\nset ylabel 'flush p99, ms'\n"
      "set xrange [-2:80]\n");
  std::vector<std::pair<std::string, std::vector<std::pair<double, double>>>> lines;
  for (const FlushRow& row : report.rows) {
    if (row.test != FlushTest::kBackgroundLoad || row.saturated) continue;
    const std::string& title = row.target;
    if (lines.empty() || lines.back().first != title)
      lines.emplace_back(title, std::vector<std::pair<double, double>>{});
    lines.back().second.emplace_back(row.x, row.latencies.quantile_ns(0.99) / 1e6);
  }
  for (const auto& [title, points] : lines) plot.line(title, points, "linespoints pt 7 lw 2");
  if (plot.empty()) return std::string();
  auto svg = draw(plot.script());
  if (!svg) return svg;
  return heading("Flush p99 beside other writes",
                 "What a flush has to wait for, when something else writes to the same disk. Where "
                 "the table has no p99 there were too few, and this is nearly the slowest.",
                 *svg);
}

std::string table(const FlushReport& report) {
  std::string text = "<h2>All figures</h2>\n<table>\n<tr>";
  for (const auto& column : kFlushColumns) text += fmt::format("<th>{}</th>", escaped(column));
  text += "</tr>\n";
  for (const FlushRow& row : report.rows) {
    text += "<tr>";
    for (const auto& cell : flush_cells(row)) text += fmt::format("<td>{}</td>", escaped(cell));
    text += "</tr>\n";
  }
  return text + "</table>\n";
}

constexpr std::string_view kHead = R"(<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Flush latency</title>
<style>
body { font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 0.85em; }
th, td { padding: 0.2em 0.6em; border-bottom: 1px solid #ccc; text-align: right; }
th:nth-child(-n+4), td:nth-child(-n+4) { text-align: left; }
p.warning { background: #fff3cd; padding: 0.5em; }
svg { max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>Flush latency</h1>
)";

}  // namespace

Expected<void> find_gnuplot() {
  if (std::system("command -v gnuplot > /dev/null 2>&1") == 0) return {};
  return make_error(ErrorKind::kNotFound,
                    "--html draws with gnuplot, which is not there; install gnuplot-nox");
}

Expected<std::string> flush_page(const FlushReport& report, const FlushSuiteOptions& options) {
  std::string page(kHead);
  page += fmt::format("<p>vblk {}; power-cut model: {}</p>\n", VBLK_VERSION,
                      escaped(power_cut_line(report.power_cuts)));
  for (const std::string& warning : report.warnings)
    page += fmt::format("<p class=\"warning\">{}</p>\n", escaped(warning));
  const std::array<Expected<std::string>, 3> plots{latency_plot(report, options), time_plot(report),
                                                   load_plot(report)};
  for (const auto& plot : plots) {
    if (!plot) return plot;
    page += *plot;
  }
  return page + table(report) + "</body>\n</html>\n";
}

}  // namespace vblk::bench
