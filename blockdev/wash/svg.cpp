#include "blockdev/wash/svg.h"

#include <algorithm>
#include <cmath>

#include <fmt/core.h>

#include "blockdev/bench/markup.h"

namespace vblk::wash {

namespace {

constexpr double kWidth = 940;
constexpr double kRowHeight = 22;
constexpr double kLabelWidth = 360;
constexpr double kValueWidth = 250;
constexpr double kPlotHeight = 300;
constexpr double kPlotLeft = 70;
constexpr double kPlotRight = 700;
constexpr double kPlotTop = 12;
// Beyond a factor of eight an interval is cut off.
constexpr double kReachMax = 2.08;

std::string svg_of(double height, const std::string& title, const std::string& body) {
  return fmt::format(
      "<div class=\"scroll\"><svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" "
      "aria-label=\"{}\">{}</svg></div>\n",
      kWidth, height, bench::escaped(title), body);
}

std::string text_at(double x, double y, const char* anchor, const std::string& text,
                    const char* style = "") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\" class=\"{}\">{}</text>", x,
                     y, anchor, style, bench::escaped(text));
}

std::string line_at(double x1, double y1, double x2, double y2, const std::string& style) {
  return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" class=\"{}\"/>",
                     x1, y1, x2, y2, style);
}

// Values that people count in, between two of them: 1, 2, 5 and so on.
std::vector<std::pair<double, std::string>> round_marks(double least, double most) {
  std::vector<std::pair<double, std::string>> marks;
  if (most <= least) return marks;
  const double rough = (most - least) / 5;
  const double power = std::pow(10, std::floor(std::log10(rough)));
  double step = power;
  for (const double factor : {2.0, 5.0, 10.0}) {
    if (rough > step) step = power * factor;
  }
  const auto last = std::llround(std::floor(most / step + 1e-6));
  for (auto number = std::llround(std::ceil(least / step)); number <= last; ++number) {
    const double mark = static_cast<double>(number) * step;
    marks.emplace_back(mark, fmt::format("{:.6g}", mark));
  }
  return marks;
}

std::vector<std::pair<double, std::string>> decades(double least, double most) {
  std::vector<std::pair<double, std::string>> marks;
  for (int power = static_cast<int>(std::floor(std::log10(least)));
       power <= static_cast<int>(std::ceil(std::log10(most))); ++power) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      const double mark = factor * std::pow(10, power);
      if (mark >= least && mark <= most) marks.emplace_back(mark, fmt::format("{:.6g}", mark));
    }
  }
  return marks;
}

// From values to places on the page.
class Scale {
 public:
  Scale(const Axis& axis, double least, double most, double from, double to)
      : is_logarithmic_(axis.is_logarithmic), from_(from), to_(to) {
    if (!is_logarithmic_ && least > 0 && least < most / 2) least = 0;
    if (most <= least) most = least + 1;
    least_ = least;
    most_ = most;
    marks_ = axis.marks;
    if (marks_.empty())
      marks_ = is_logarithmic_ ? decades(least_, most_) : round_marks(least_, most_);
  }
  [[nodiscard]] double at(double value) const {
    const double part = is_logarithmic_ ? std::log(value / least_) / std::log(most_ / least_)
                                        : (value - least_) / (most_ - least_);
    return from_ + (to_ - from_) * std::clamp(part, 0.0, 1.0);
  }
  [[nodiscard]] bool has(double value) const { return value >= least_ && value <= most_; }
  [[nodiscard]] const auto& marks() const { return marks_; }

 private:
  bool is_logarithmic_;
  double from_;
  double to_;
  double least_{0};
  double most_{0};
  std::vector<std::pair<double, std::string>> marks_;
};

std::string drawn(const Series& series, const Scale& x, const Scale& y, std::size_t number) {
  const std::string style = fmt::format("series s{}", number % 6);
  std::string body;
  if (!series.is_line) {
    for (const auto& [at_x, at_y] : series.points)
      body += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" class=\"{}\"/>", x.at(at_x),
                          y.at(at_y), style);
    return body;
  }
  body +=
      fmt::format("<polyline class=\"{}{}\" points=\"", style, series.is_dashed ? " dashed" : "");
  for (const auto& [at_x, at_y] : series.points)
    body += fmt::format("{:.1f},{:.1f} ", x.at(at_x), y.at(at_y));
  return body + "\"/>";
}

}  // namespace

std::string forest_plot(const std::vector<ForestRow>& rows, const std::string& left,
                        const std::string& right) {
  if (rows.empty()) return {};
  double reach = 0.1;
  for (const ForestRow& row : rows) {
    reach = std::max({reach, 2 * row.margin, std::abs(row.middle)});
    if (std::isfinite(row.lower))
      reach = std::max({reach, std::abs(row.lower), std::abs(row.upper)});
  }
  reach = std::min(reach * 1.05, kReachMax);
  const double begin = kLabelWidth + 10;
  const double end = kWidth - kValueWidth;
  const double top = 24;
  const double bottom = top + kRowHeight * static_cast<double>(rows.size());
  const auto at = [&](double value) {
    return begin + (end - begin) * (std::clamp(value, -reach, reach) + reach) / (2 * reach);
  };
  std::string body = text_at(begin, 14, "start", "< " + left, "small");
  body += text_at(end, 14, "end", right + " >", "small");
  double y = top;
  for (const ForestRow& row : rows) {
    const double middle = y + kRowHeight / 2;
    body += fmt::format(
        "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" class=\"band\"/>",
        at(-row.margin), y, at(row.margin) - at(-row.margin), kRowHeight);
    body += text_at(kLabelWidth, middle + 4, "end", row.label, "small");
    if (std::isfinite(row.lower))
      body +=
          line_at(at(row.lower), middle, at(row.upper), middle, "interval " + row.verdict_class);
    body += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4\" class=\"dot {}\"/>",
                        at(row.middle), middle, row.verdict_class);
    body += text_at(end + 10, middle + 4, "start", row.value, "small");
    y += kRowHeight;
  }
  body += line_at(at(0), top, at(0), bottom, "one");
  for (const double ratio :
       {0.125, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.11, 1.25, 1.5, 2.0, 4.0, 8.0}) {
    const double place = std::log(ratio);
    if (std::abs(place) > reach || (reach > 0.5 && ratio != 1 && std::abs(place) < 0.45)) continue;
    body += line_at(at(place), bottom, at(place), bottom + 4, "axis");
    body += text_at(at(place), bottom + 17, "middle", fmt::format("{:g}", ratio), "small");
  }
  return svg_of(bottom + 24, "Ratios with 90 % intervals", body);
}

std::string chart(const Chart& chart) {
  std::vector<double> xs;
  std::vector<double> ys;
  for (const Series& series : chart.series) {
    for (const auto& [x, y] : series.points) {
      xs.push_back(x);
      ys.push_back(y);
    }
  }
  if (xs.empty()) return {};
  const auto [x_least, x_most] = std::ranges::minmax(xs);
  const auto [y_least, y_most] = std::ranges::minmax(ys);
  const double bottom = kPlotTop + kPlotHeight;
  const Scale x(chart.x, x_least, x_most, kPlotLeft, kPlotRight);
  const Scale y(chart.y, y_least, y_most, bottom, kPlotTop);
  std::string body;
  for (const auto& [value, label] : x.marks()) {
    if (!x.has(value)) continue;
    body += line_at(x.at(value), kPlotTop, x.at(value), bottom, "grid");
    body += text_at(x.at(value), bottom + 16, "middle", label, "small");
  }
  for (const auto& [value, label] : y.marks()) {
    if (!y.has(value)) continue;
    body += line_at(kPlotLeft, y.at(value), kPlotRight, y.at(value), "grid");
    body += text_at(kPlotLeft - 6, y.at(value) + 4, "end", label, "small");
  }
  body += line_at(kPlotLeft, bottom, kPlotRight, bottom, "axis");
  body += line_at(kPlotLeft, kPlotTop, kPlotLeft, bottom, "axis");
  body += text_at((kPlotLeft + kPlotRight) / 2, bottom + 34, "middle", chart.x.label, "small");
  body += fmt::format(
      "<text x=\"14\" y=\"{0:.1f}\" transform=\"rotate(-90 14 {0:.1f})\" text-anchor=\"middle\" "
      "class=\"small\">{1}</text>",
      (kPlotTop + bottom) / 2, bench::escaped(chart.y.label));
  double legend = kPlotTop + 14;
  for (std::size_t i = 0; i < chart.series.size(); ++i) {
    const Series& series = chart.series[i];
    if (series.points.empty()) continue;
    body += drawn(series, x, y, i);
    body +=
        fmt::format("<rect x=\"{:.0f}\" y=\"{:.1f}\" width=\"18\" height=\"4\" class=\"key s{}\"/>",
                    kPlotRight + 16, legend - 6, i % 6);
    body += text_at(kPlotRight + 42, legend, "start", series.label, "small");
    legend += 20;
  }
  if (chart.vertical && x.has(chart.vertical->first)) {
    const double place = x.at(chart.vertical->first);
    body += line_at(place, kPlotTop, place, bottom, "one");
    body += text_at(place + 4, kPlotTop + 12, "start", chart.vertical->second, "small");
  }
  return svg_of(bottom + 44, chart.y.label + " over " + chart.x.label, body);
}

}  // namespace vblk::wash
